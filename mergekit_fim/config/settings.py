"""Check a whole merge config before anything expensive begins, and read the pre-pass settings from it.

mergekit ignores a parameter name that it doesn't know, so a typo would silently leave the default. Here every name and
every value is checked as the user wrote it.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, ConfigReader, MergeConfiguration, OutputSliceDefinition
from transformers import PretrainedConfig

from mergekit_fim import coefficients
from mergekit_fim.config.parameters import FLOAT_DTYPES, PARAMETERS, FisherSettings, Scope
from mergekit_fim.errors import FimError, brief, shown


@dataclass(frozen=True)
class Settings:
    """The pre-pass settings: one value each for the whole merge."""

    fisher: FisherSettings  # what determines the measurement
    given: frozenset[str]  # the names of those of `fisher` that the config sets
    saved: str | None  # a saved measurement to use, a file or a Hub reference
    cache: bool  # whether measurements are kept and used again
    mapping: coefficients.Mapping  # how scores become coefficients
    alpha_other: float | None  # the coefficient outside the decoder layers; None for the mean of theirs
    damping: float | None = None  # what fim_kron adds to each factor, a part of its mean diagonal; else None


def _parameter_blocks(config: MergeConfiguration) -> Iterator[tuple[str, Mapping[str, Any], Scope]]:
    """Yield the place in words, the values and the scope of every `parameters:` in `config`, in reading order."""
    modules = [(f"modules.{name}.", module) for name, module in (config.modules or {}).items()]
    for prefix, module in [("", config), *modules]:
        where, scope = (f"{prefix}parameters", Scope.TENSOR) if prefix else ("the top-level parameters", Scope.MERGE)
        yield where, module.parameters or {}, scope
        for i, model in enumerate(module.models or []):
            yield f"{prefix}models[{i}] ({model.model})", model.parameters or {}, Scope.MODEL
        for i, out_slice in enumerate(module.slices or []):
            yield f"{prefix}slices[{i}].parameters", out_slice.parameters or {}, Scope.TENSOR
            for j, source in enumerate(out_slice.sources):
                yield f"{prefix}slices[{i}].sources[{j}] ({source.model})", source.parameters or {}, Scope.MODEL


def check_config(config: MergeConfiguration) -> Settings:
    """Check what can be checked of a config as the user wrote it, and read the pre-pass settings from it.

    Raises:
        FimError: no base model or no fine-tuned model, a bad parameter, or an unusable dtype.
    """
    settings = read_settings(config)
    method = config.merge_method
    if config.base_model is None:  # not only per slice: mergekit would take the merged model's config from any model
        raise FimError(f"{method} needs a base model; add `base_model:` to the config, at the top")
    models = []
    for module in (config, *(config.modules or {}).values()):
        models += [(model.model, config.base_model) for model in module.models or []]
        for i, out_slice in enumerate(module.slices or []):
            if not out_slice.sources:
                raise FimError(
                    f"slices[{i}]: expected the base and a fine-tuned model in `sources`, found none; add them"
                )
            models += [(source.model, base_of(config, out_slice)) for source in out_slice.sources]
    if all(model == base for model, base in models):
        raise FimError(f"{method} needs at least one fine-tuned model beside the base; list one in `models:`")
    for name in ("dtype", "out_dtype"):
        value = getattr(config, name)
        if value is not None and value.removeprefix("torch.") not in FLOAT_DTYPES:
            raise FimError(f"{name}: expected one of {', '.join(FLOAT_DTYPES)}, found {value}; change it")
    return settings


def check_modules(config: MergeConfiguration, architecture: ModelArchitecture, model_config: PretrainedConfig) -> None:
    """Check that a config has the modules of mergekit's definition of the models, all of them, and no others.

    Raises:
        FimError: it hasn't, or the definition doesn't fit the models.
    """
    names = sorted(architecture.modules)
    given = config.modules or {}
    for name in given:
        if name not in names:
            raise FimError(f"modules: expected {' or '.join(names)}, found {name}; rename it, or use `models:`")
    missing = [name for name in names if given and name not in given]
    if missing:
        raise FimError(f"modules: expected all of {', '.join(names)}, found no {missing[0]}; add it, or use `models:`")
    if config.slices and len(names) > 1:
        raise FimError(
            f"slices: these models have the modules {', '.join(names)}, and mergekit can't tell which one is "
            "meant; use `modules:`, with `slices:` in that of the decoder layers and `models:` in the others"
        )
    for module in architecture.modules.values():
        try:
            module.architecture.num_layers(model_config)
        except Exception as error:  # mergekit's own
            kind = next(iter(model_config.architectures or ()), model_config.model_type)
            raise FimError(
                f"mergekit's definition of {kind} doesn't fit its config.json, which has no "
                f"{module.architecture.num_layers_config_key()}: this version of mergekit can't merge such a model"
            ) from error


def base_of(config: MergeConfiguration, out_slice: OutputSliceDefinition | None = None) -> ModelReference:
    """Find the base model of a merge, or of one slice."""
    base = (out_slice.base_model if out_slice else None) or config.base_model
    assert base is not None  # by `check_config`
    return base


def read_settings(config: MergeConfiguration) -> Settings:
    """Check every parameter in `config`, and read the pre-pass settings from it.

    Raises:
        FimError: an unknown or misplaced name, a wrong type or value, or a gradient or a filter out of place.
    """
    for where, block, scope in _parameter_blocks(config):
        for name, setting in block.items():
            _check_parameter(name, setting, where, scope, config.merge_method)
    given = config.parameters or {}
    values = {
        name: parameter.parse(given[name]) if name in given else parameter.default_for(config.merge_method)
        for name, parameter in PARAMETERS.items()
        if parameter.scope is Scope.MERGE
    }
    try:
        mapping = coefficients.Mapping(**{field.name: values[field.name] for field in fields(coefficients.Mapping)})
    except ValueError as error:
        raise FimError(f"the top-level parameters: {error}; change one of them") from None
    fisher = FisherSettings(**{field.name: values[f"fisher_{field.name}"] for field in fields(FisherSettings)})
    by_user = frozenset(name for name in vars(fisher) if f"fisher_{name}" in given)
    damping = values["damping"] if config.merge_method == "fim_kron" else None
    return Settings(fisher, by_user, values["fisher"], values["fisher_cache"], mapping, values["alpha_other"], damping)


def _check_parameter(name: str, setting: Any, where: str, scope: Scope, method: str) -> None:
    parameter = PARAMETERS.get(name)
    if parameter is None:
        known = [own.name for own in PARAMETERS.values() if method in own.methods]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"{method} knows {', '.join(known)}"
        raise FimError(f"{where}: unknown parameter `{brief(name)}`; {hint}")
    if method not in parameter.methods:
        others = " and ".join(parameter.methods)
        raise FimError(f"{where}: `{name}` has no meaning in {method}, only in {others}; leave it out")
    if parameter.scope is Scope.MERGE and scope is not Scope.MERGE:
        raise FimError(f"{where}: `{name}` is one value for the whole merge; move it to the top-level `parameters:`")
    if parameter.scope_in(method) is Scope.TENSOR and scope is Scope.MODEL:
        raise FimError(f"{where}: `{name}` has no effect on a single model; set it {Scope.TENSOR.value} instead")
    if parameter.scope is Scope.MERGE and isinstance(setting, (list, ConditionalParameter)):
        shape = "gradient or a list of filters" if isinstance(setting, list) else "filter"
        raise FimError(f"{where}: `{name}` takes one value, {parameter.expected}; found a {shape}; give one value")
    given = [condition.value for condition in conditions(setting)]
    if [] in given:
        raise FimError(f"{where}: `{name}` is an empty list; give a value, a gradient or filters")
    if parameter.type is str and any(isinstance(item, list) for item in given):
        raise FimError(f"{where}: `{name}` is {parameter.expected}, found a gradient; give one value, or filters")
    for value in (v for item in given for v in (item if isinstance(item, list) else [item])):
        try:
            parameter.parse(value)
        except ValueError as error:
            raise FimError(f"{where}: `{name}` must be {error}, found {shown(value)}; change it") from None


def conditions(setting: Any) -> list[ConditionalParameter]:
    """Write any parameter setting as mergekit's list of filters, of which the first match wins."""
    if isinstance(setting, ConditionalParameter):
        return [setting]
    if isinstance(setting, Sequence) and setting and isinstance(setting[0], ConditionalParameter):
        return list(setting)
    return [ConditionalParameter(value=setting)]


def settings_of(reader: ConfigReader, name: str, model: ModelReference | None = None) -> list[ConditionalParameter]:
    """List the settings of a parameter that hold in a slice, or for a model in it, in mergekit's order."""
    scopes = reader.parameter_sources(model)
    return [condition for scope in scopes if scope and name in scope for condition in conditions(scope[name])]


def as_set(readers: Sequence[ConfigReader], name: str, default: Any, model: ModelReference | None = None) -> Any:
    """Find a parameter as the user set it: a value, a gradient or filters; where slices differ, one of these for each.

    Where nothing is set, it is `default`, if there is one.
    """
    values = []
    for reader in readers:
        given = settings_of(reader, name, model)
        if default is not None:
            given += conditions(default)
        values.append(None if not given else given[0].value if given[0].filter in (None, "*") else given)
    return values[0] if all(value == values[0] for value in values) else values
