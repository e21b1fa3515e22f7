"""The check of a whole merge config before anything expensive begins, and the pre-pass settings read from it.

mergekit ignores parameter names that it doesn't know, so that a typo would merge with a default unseen. Here every name
and every value in the config is checked, in the shape in which the user wrote it.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.config import ConditionalParameter, MergeConfiguration

from mergekit_fim import coefficients
from mergekit_fim.config.parameters import PARAMETERS, Scope
from mergekit_fim.errors import FimError
from mergekit_fim.text import brief


@dataclass(frozen=True)
class FisherSettings:
    """What determines a Fisher measurement, besides the model.

    Attributes:
        samples: N, the number of sequences.
        seq_len: T, the tokens per sequence.
        seed: of the random tokens.
        labels: what is predicted, `inputs` or `sampled`.

    Raises:
        FimError: a value of another type or out of range.
    """

    samples: int = 8
    seq_len: int = 64
    seed: int = 0
    labels: str = "inputs"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            parameter = PARAMETERS[f"fisher_{name}"]
            is_kind = isinstance(value, parameter.type) and not isinstance(value, bool)
            if not is_kind or not parameter.accepts(value):
                raise FimError(f"FisherSettings: `{name}` must be {parameter.expected}, found {_shown(value)}")


@dataclass(frozen=True)
class Settings:
    """The settings of the pre-pass: one value each for the whole merge.

    Attributes:
        fisher: what determines the measurement.
        given: the names of those of `fisher` that the config sets.
        saved: a saved measurement to use, a file or a Hub reference.
        cache: whether measurements are kept and used again.
        mapping: how scores become coefficients.
        alpha_other: the coefficient outside the decoder layers; None for the mean of theirs.
    """

    fisher: FisherSettings
    given: frozenset[str]
    saved: str | None
    cache: bool
    mapping: coefficients.Mapping
    alpha_other: float | None


@dataclass(frozen=True)
class ParameterBlock:
    """One `parameters:` mapping of a merge config, and where it stands."""

    where: str
    values: Mapping[str, Any]
    scope: Scope


def parameter_blocks(config: MergeConfiguration) -> Iterator[ParameterBlock]:
    """Every `parameters:` mapping in `config`, in reading order."""
    if config.parameters:
        yield ParameterBlock("the top-level parameters", config.parameters, Scope.MERGE)
    yield from _blocks(config.models, config.slices, "")
    for name, module in (config.modules or {}).items():
        if module.parameters:
            yield ParameterBlock(f"modules.{name}.parameters", module.parameters, Scope.TENSOR)
        yield from _blocks(module.models, module.slices, f"modules.{name}.")


def _blocks(models: Any, slices: Any, prefix: str) -> Iterator[ParameterBlock]:
    for i, model in enumerate(models or []):
        if model.parameters:
            yield ParameterBlock(f"{prefix}models[{i}] ({model.model})", model.parameters, Scope.MODEL)
    for i, out_slice in enumerate(slices or []):
        if out_slice.parameters:
            yield ParameterBlock(f"{prefix}slices[{i}].parameters", out_slice.parameters, Scope.TENSOR)
        for j, source in enumerate(out_slice.sources):
            if source.parameters:
                where = f"{prefix}slices[{i}].sources[{j}] ({source.model})"
                yield ParameterBlock(where, source.parameters, Scope.MODEL)


def read_settings(config: MergeConfiguration) -> Settings:
    """Check every parameter in `config`, and read the pre-pass settings from it.

    Raises:
        FimError: an unknown or misplaced name, a wrong type, a value out of range, or a per-layer gradient or a filter
            where only one value makes sense.
    """
    for block in parameter_blocks(config):
        for name, setting in block.values.items():
            _check_parameter(name, setting, block, config.merge_method)
    given = config.parameters or {}
    values = {
        name: parameter.parse(given[name]) if name in given else parameter.default
        for name, parameter in PARAMETERS.items()
        if parameter.scope is Scope.MERGE
    }
    try:
        mapping = coefficients.Mapping(
            values["sharpness"], values["alpha_min"], values["alpha_max"], values["alpha_mean"]
        )
    except ValueError as error:
        raise FimError(f"the top-level parameters: {error}; change one of them") from None
    fisher = FisherSettings(
        values["fisher_samples"], values["fisher_seq_len"], values["fisher_seed"], values["fisher_labels"]
    )
    by_user = frozenset(name for name in vars(fisher) if f"fisher_{name}" in given)
    return Settings(fisher, by_user, values["fisher"], values["fisher_cache"], mapping, values["alpha_other"])


def _check_parameter(name: str, setting: Any, block: ParameterBlock, method: str) -> None:
    parameter = PARAMETERS.get(name)
    if parameter is None:
        near = difflib.get_close_matches(name, PARAMETERS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"{method} knows {', '.join(PARAMETERS)}"
        raise FimError(f"{block.where}: unknown parameter `{brief(name)}`; {hint}")
    if block.scope is not Scope.MERGE:
        if parameter.scope is Scope.MERGE:
            raise FimError(
                f"{block.where}: `{name}` is one value for the whole merge; move it to the top-level `parameters:`"
            )
        if parameter.scope is Scope.TENSOR and block.scope is Scope.MODEL:
            raise FimError(
                f"{block.where}: `{name}` has no effect on a single model; set it {Scope.TENSOR.value} instead"
            )
    if parameter.scope is Scope.MERGE and isinstance(setting, (list, ConditionalParameter)):
        raise FimError(
            f"{block.where}: `{name}` takes one value for the whole merge, {parameter.expected}; "
            f"found a {'gradient or a list of filters' if isinstance(setting, list) else 'filter'}; give one value"
        )
    for value in leaves(setting, f"{block.where}: `{name}`"):
        try:
            parameter.parse(value)
        except ValueError as error:
            raise FimError(f"{block.where}: `{name}` must be {error}, found {_shown(value)}; change it") from None


def _shown(value: Any) -> str:
    return repr(brief(value)) if isinstance(value, str) else brief(value)


def leaves(setting: Any, where: str) -> Iterator[Any]:
    """The plain values in one of mergekit's parameter settings: a value, a gradient, or filters with either.

    Raises:
        FimError: an empty list.
    """
    if isinstance(setting, ConditionalParameter):
        yield from leaves(setting.value, where)
    elif isinstance(setting, list):
        if not setting:
            raise FimError(f"{where} is an empty list; give a value, a gradient or filters")
        for item in setting:
            yield from leaves(item, where)
    else:
        yield setting


def conditions(setting: Any) -> list[ConditionalParameter]:
    """Any parameter setting as mergekit's list of filters, the first match of which wins."""
    if isinstance(setting, ConditionalParameter):
        return [setting]
    if isinstance(setting, Sequence) and setting and isinstance(setting[0], ConditionalParameter):
        return list(setting)
    return [ConditionalParameter(value=setting)]
