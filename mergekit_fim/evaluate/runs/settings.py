"""What varies from merge to merge: `--set NAME=V1,V2,...`, and a config in which parameters have other values."""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import ParameterScope

from mergekit_fim.config.parameters import METHODS, PARAMETERS, Scope
from mergekit_fim.config.settings import read_settings
from mergekit_fim.errors import FimError, brief, shown


def parse_settings(methods: Sequence[str], given: Sequence[str]) -> list[dict[str, tuple[Any, ...]]]:
    """Read every `NAME=V1,V2,...`: for each method, the values of its parameters by name.

    The strength of one method isn't set in the others.

    Raises:
        FimError: a setting has another form, no method knows its name, or a method refuses its value.
    """
    texts: dict[str, str] = {}
    known = set[str]().union(*map(parameter_names, methods))
    for text in given:
        name, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not name:
            raise FimError(f"--set: expected NAME=VALUE,VALUE,..., found {shown(text)}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(sorted(known)) or 'none'}"
            raise FimError(f"--set: no parameter of {' or '.join(methods)} is called `{brief(name)}`; {hint}")
        if name in texts:
            raise FimError(f"--set: found `{name}` twice; give all its values at once, with commas between them")
        texts[name] = values
    strengths = {strength_of(method, texts) for method in methods}
    return [
        {
            name: _values(method, name, values)
            for name, values in texts.items()
            if name in parameter_names(method) and name not in strengths - {strength_of(method, texts)}
        }
        for method in methods
    ]


def _values(method: str, name: str, text: str) -> tuple[Any, ...]:
    values = tuple(_value(method, name, value.strip()) for value in text.split(","))
    if len(set(values)) < len(values):
        raise FimError(f"--set: expected values of `{name}` that differ, found {shown(text)}; leave one out")
    return values


def _value(method: str, name: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    try:
        return PARAMETERS[name].parse(value) if method in METHODS else _parameters(method)[name].validate(value)
    except ValueError as error:
        expected = str(error) if method in METHODS else "a value that mergekit takes"
        raise FimError(f"--set: `{name}` must be {expected}, found {shown(text)}; change it") from None


def parameter_names(method: str) -> set[str]:
    """Name the parameters of a method, those of its pre-pass included."""
    if method in METHODS:
        return {name for name, parameter in PARAMETERS.items() if method in parameter.methods}
    return set(_parameters(method))


def _parameters(method: str) -> dict[str, Any]:
    try:
        return {parameter.name: parameter for parameter in registry.get(method).spec.parameters}
    except RuntimeError:
        known = ", ".join(sorted(its.spec.name for its in registry.registered_methods()))
        raise FimError(f"expected a merge method, found {shown(method)}; name one of {known}") from None


def strength_of(method: str, varied: Collection[str] = ()) -> str:
    """Name the parameter by which a method moves from the base to the fine-tuned models; empty where it has none.

    Where `alpha`, set by hand, is among the names of what varies, it takes the place of `alpha_mean`.
    """
    if method in METHODS:
        return "alpha" if "alpha" in varied and "alpha_mean" not in varied else "alpha_mean"
    return next((name for name in ("weight", "t") if name in parameter_names(method)), "")


def with_settings(
    config: MergeConfiguration, settings: Mapping[str, Any], base: ModelReference | None = None
) -> MergeConfiguration:
    """Copy a config with these values, which replace all that it says of these parameters.

    A parameter of single models gets its value for every fine-tuned model: for all but `base`, and the config's own.
    """
    config, method = config.model_copy(deep=True), config.merge_method
    tuned = fine_tuned(config, base)
    for block in blocks(config):
        if getattr(block, "model", None) in (None, *tuned):
            leave_only(block, (block.parameters or {}).keys() - settings.keys())
    entries = [entry for entry, *_ in placed(config) if entry.model in tuned]
    for name, value in settings.items():
        if method in METHODS:
            is_per_model = PARAMETERS[name].scope is Scope.MODEL
        else:
            is_per_model = _parameters(method)[name].scope is not ParameterScope.SHARED
        for block in entries if entries and is_per_model else [config]:
            block.parameters = {**(block.parameters or {}), name: value}
    if method in METHODS:
        read_settings(config)
    return config


def leave_only(block: Any, names: Collection[str]) -> None:
    """Leave only these of a block's parameters."""
    block.parameters = {name: value for name, value in (block.parameters or {}).items() if name in names} or None


def blocks(config: MergeConfiguration) -> Iterator[Any]:
    """Go through everything in a config that has `parameters:`."""
    for part in (config, *(config.modules or {}).values()):
        yield from (part, *(part.slices or []))
    yield from (entry for entry, *_ in placed(config))


def placed(config: MergeConfiguration) -> Iterator[tuple[Any, ...]]:
    """Go through the places where models stand, each with what else has parameters for it, by mergekit's precedence."""
    for part in (config, *(config.modules or {}).values()):
        above = (config,) if part is config else (part, config)
        yield from ((entry, *above) for entry in part.models or [])
        for out_slice in part.slices or []:
            yield from ((source, out_slice, *above) for source in out_slice.sources)


def fine_tuned(config: MergeConfiguration, base: ModelReference | None = None) -> list[ModelReference]:
    """List the models of a merge, in order, each once; not its bases, nor `base`, which `linear` lists as a model."""
    parts = (config, *(config.modules or {}).values())
    bases = {base, config.base_model, *(s.base_model for part in parts for s in part.slices or [])}
    return [model for model in dict.fromkeys(entry.model for entry, *_ in placed(config)) if model not in bases]
