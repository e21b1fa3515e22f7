"""Every parameter of the two methods, and the check of a whole merge config before anything expensive begins.

mergekit ignores parameter names that it doesn't know, so that a typo would merge with a default unseen. Here every name
and every value in the config is checked, in the shape in which the user wrote it.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mergekit.config import ConditionalParameter, MergeConfiguration

from mergekit_fim import coefficients
from mergekit_fim.errors import FimError

METHODS = ("fim_ties", "fim_ta")
LABELS = ("inputs", "sampled")


class Scope(Enum):
    """Where in a merge config a parameter has a meaning."""

    MERGE = "once, in the top-level `parameters:`"
    TENSOR = "in the `parameters:` of the config, a module or a slice"
    MODEL = "per model, or in any `parameters:` above it"


@dataclass(frozen=True)
class Parameter:
    """One parameter: its name, type, legal values, scope, defaults, and whose choice the default is."""

    name: str
    type: type
    expected: str
    accepts: Callable[[Any], bool]
    scope: Scope
    default: Any
    source: str
    meaning: str
    default_ta: Any = None  # the default in fim_ta, where it is another one

    def default_for(self, method: str) -> Any:
        """The default in one of `METHODS`."""
        return self.default_ta if method == "fim_ta" and self.default_ta is not None else self.default

    def parse(self, value: Any) -> Any:
        """The checked value.

        Raises:
            ValueError: `value` is of the wrong type or out of range.
        """
        try:
            parsed = _convert(value, self.type)
        except (TypeError, ValueError):
            raise ValueError(self.expected) from None
        if not self.accepts(parsed):
            raise ValueError(self.expected)
        return parsed


def _convert(value: Any, kind: type) -> Any:
    if kind is bool or kind is str:
        if not isinstance(value, kind):
            raise TypeError
        return value
    # YAML reads 1e-3 as a string; mergekit takes such strings for numbers, so they are taken here too.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    number = float(value)
    if kind is int:
        if not number.is_integer():
            raise ValueError
        return int(value) if isinstance(value, int) else int(number)
    return number


def _any(value: Any) -> bool:
    return True


def _parameters() -> dict[str, Parameter]:
    merge, tensor, model = Scope.MERGE, Scope.TENSOR, Scope.MODEL
    # fmt: off
    table = [
        Parameter("fisher_samples", int, "a whole number of at least 1", lambda v: v >= 1, merge, 8, "paper",
                  "number N of random-token sequences"),
        Parameter("fisher_seq_len", int, "a whole number of at least 2", lambda v: v >= 2, merge, 64, "paper",
                  "tokens T per sequence"),
        Parameter("fisher_seed", int, "a whole number from 0 to 2^63 − 1", lambda v: 0 <= v < 2**63, merge, 0, "ours",
                  "seed of the random tokens (mergekit's --random-seed doesn't change them)"),
        Parameter("fisher_labels", str, "`inputs` or `sampled`", lambda v: v in LABELS, merge, "inputs", "ours",
                  "what is predicted: the next random token (empirical Fisher), or a token drawn from the model's "
                  "own distribution (a one-sample estimate of the true Fisher)"),
        Parameter("sharpness", float, "a finite number", math.isfinite, merge, 1.0, "ours",
                  "slope of the sigmoid; 0 is the uniform merge, a negative one turns the mapping round"),
        Parameter("alpha_mean", float, "a number in (0, 1)", lambda v: 0 < v < 1, merge, None, "ours",
                  "moves the sigmoid's centre so that the layers' α average to this"),
        Parameter("alpha_min", float, "a finite number", math.isfinite, merge, 0.0, "ours", "lower end of α"),
        Parameter("alpha_max", float, "a finite number", math.isfinite, merge, 1.0, "ours", "upper end of α"),
        Parameter("alpha_other", float, "a finite number", math.isfinite, merge, None, "ours",
                  "α of the tensors outside the decoder layers (default: the mean of the layers' α)"),
        Parameter("gate_scale", float, "a finite number of at least 0", lambda v: math.isfinite(v) and v >= 0, tensor,
                  0.7, "paper", "gate protection: α of the MLP gate projection is multiplied by this", default_ta=1.0),
        Parameter("norm_tolerance", float, "a finite number of at least 0 (0 switches it off)",
                  lambda v: math.isfinite(v) and v >= 0, tensor, 0.05, "paper",
                  "norm calibration: a merged tensor whose norm is off by more than this is rescaled", default_ta=0.0),
        Parameter("lambda", float, "a finite number", math.isfinite, tensor, 1.0, "mergekit",
                  "factor of the whole merged task vector"),
        Parameter("normalize", bool, "true or false", _any, tensor, True, "mergekit",
                  "divide by the sum of the models' weights", default_ta=False),
        Parameter("int8_mask", bool, "true or false", _any, tensor, False, "mergekit",
                  "accepted for stock configs; it has no effect here"),
        Parameter("rescale", bool, "false (for fim_ties, norm_tolerance takes its place)", lambda v: v is False, tensor,
                  False, "mergekit", "accepted for stock configs when false"),
        Parameter("weight", float, "a finite number", math.isfinite, model, 1.0, "mergekit",
                  "the model's weight beside the other fine-tuned models"),
        Parameter("density", float, "a number in (0, 1]", lambda v: 0 < v <= 1, model, None, "paper",
                  "fraction of each task vector's entries that is kept (0.2 below 3 billion base parameters, else 0.4)"),
        Parameter("alpha", float, "a finite number", math.isfinite, model, None, "ours",
                  "sets α by hand; with it on every model there is no pre-pass"),
    ]
    # fmt: on
    return {parameter.name: parameter for parameter in table}


PARAMETERS = _parameters()


@dataclass(frozen=True)
class FisherSettings:
    """What determines a Fisher measurement, besides the model."""

    samples: int = 8
    seq_len: int = 64
    seed: int = 0
    labels: str = "inputs"


@dataclass(frozen=True)
class Settings:
    """The settings of the pre-pass: one value each for the whole merge."""

    fisher: FisherSettings
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
    return Settings(fisher, mapping, values["alpha_other"])


def _check_parameter(name: str, setting: Any, block: ParameterBlock, method: str) -> None:
    parameter = PARAMETERS.get(name)
    if parameter is None:
        near = difflib.get_close_matches(name, PARAMETERS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"{method} knows {', '.join(PARAMETERS)}"
        raise FimError(f"{block.where}: unknown parameter `{name}`; {hint}")
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
            raise FimError(f"{block.where}: `{name}` must be {error}, found {value!r}; change it") from None


def leaves(setting: Any, where: str) -> Iterator[Any]:
    """The plain values in one of mergekit's parameter settings: a value, a gradient, or filters with either.

    Raises:
        FimError: an empty list, or a list that mixes values and filters.
    """
    if isinstance(setting, ConditionalParameter):
        yield from leaves(setting.value, where)
    elif isinstance(setting, list):
        if not setting:
            raise FimError(f"{where} is an empty list; give a value, a gradient or filters")
        kinds = {isinstance(item, ConditionalParameter) for item in setting}
        if len(kinds) > 1:
            raise FimError(f"{where} mixes plain values and filters in one list; use `- value: ...` for the default")
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
