"""Every parameter of the methods: its name, type, legal values and default, and who chose the default."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mergekit_fim.coefficients import MAPPINGS
from mergekit_fim.errors import FimError, shown

METHODS = ("fim_ties", "fim_ta", "fim_kron")
BY_LAYER = METHODS[:2]  # those that weigh a layer by one number
LABELS = ("inputs", "sampled")
OTHER_MODULES = ("merge", "base", "tuned")
FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


# The tokens of fim_kron's factors. Fewer did better than 8 x 64 on the pairs that it was developed on
# (docs/evidence.md), whose layers are 160 to 640 wide. For wider layers nothing is known.
KRON_SAMPLES, KRON_SEQ_LEN = 2, 64


class Scope(Enum):
    """Where in a merge config a parameter has a meaning."""

    MERGE = "once, in the top-level `parameters:`"
    TENSOR = "in the `parameters:` of the config, a module or a slice"
    MODEL = "per model, or in any `parameters:` above it"


@dataclass(frozen=True)
class Parameter:
    """One parameter: its name, type, legal values, scope and defaults, and who chose the default."""

    name: str
    type: type
    expected: str
    accepts: Callable[[Any], bool]
    scope: Scope
    default: Any
    source: str
    meaning: str
    others: Mapping[str, Any] = field(default_factory=dict)  # the defaults of methods that have another one
    methods: tuple[str, ...] = METHODS  # those in which it has a meaning

    def default_for(self, method: str) -> Any:
        """Find the default in one of `METHODS`."""
        return self.others.get(method, self.default)

    def scope_in(self, method: str) -> Scope:
        """Say where it has a meaning in one of `METHODS`. fim_kron trims the merged task vector, not each model's."""
        return Scope.TENSOR if method == "fim_kron" and self.name == "density" else self.scope

    def parse(self, value: Any) -> Any:
        """Check a value, and convert it to the parameter's type.

        Raises:
            ValueError: `value` is of the wrong type or out of range.
        """
        try:
            parsed = _convert(value, self.type)
            if self.accepts(parsed):
                return parsed
        except (TypeError, ValueError, OverflowError):  # a whole number of hundreds of digits is no float
            pass
        raise ValueError(self.expected)


def _convert(value: Any, kind: type) -> Any:
    from pydantic import TypeAdapter  # not with the table, which the command line's help needs

    if kind in (bool, str):  # as mergekit reads them: 1 and "true" are true
        return TypeAdapter(kind).validate_python(value, strict=kind is str)
    # YAML reads 1e-3 as a string; mergekit takes such strings for numbers, so they are taken here too.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    number: float = TypeAdapter(float).validate_python(value)  # by the same reading as mergekit's
    if kind is int:
        if not number.is_integer():
            raise ValueError
        return int(value) if isinstance(value, int) else int(number)
    return number


def _parameters() -> dict[str, Parameter]:
    merge, tensor, model = Scope.MERGE, Scope.TENSOR, Scope.MODEL
    kron = ("fim_kron",)
    finite = (float, "a finite number", math.isfinite)
    switch = (bool, "true or false", lambda v: True)
    # fmt: off
    table = [
        Parameter("fisher", str, "a file, or user/repo or user/repo/FILE on the Hub", bool, merge, None, "ours",
                  "a saved measurement to use instead of measuring; in fim_kron files of factors, separated by commas"),
        Parameter("fisher_cache", *switch, merge, True, "ours",
                  "keep the measurement for the next merge of these models, and use what was kept"),
        Parameter("fisher_samples", int, "a whole number of at least 1", lambda v: v >= 1, merge, 8, "paper",
                  "number N of random-token sequences", {"fim_kron": KRON_SAMPLES}),
        Parameter("fisher_seq_len", int, "a whole number of at least 2", lambda v: v >= 2, merge, 64, "paper",
                  "tokens T per sequence", {"fim_kron": KRON_SEQ_LEN}),
        Parameter("fisher_seed", int, "a whole number from 0 to 2^63 − 1", lambda v: 0 <= v < 2**63, merge, 0, "ours",
                  "seed of the random tokens (mergekit's --random-seed doesn't change them)"),
        Parameter("fisher_labels", str, "`inputs` or `sampled`", lambda v: v in LABELS, merge, "inputs", "ours",
                  "what is predicted: the next random token (empirical Fisher), or a token drawn from the model's "
                  "own distribution (a one-sample estimate of the true Fisher)", methods=BY_LAYER),
        Parameter("damping", float, "a number in (0, 1]", lambda v: 0 < v <= 1, merge, 0.1, "ours",
                  "fim_kron: what is added to the diagonal of every factor, as a part of its mean", methods=kron),
        Parameter("sharpness", *finite, merge, 1.0, "ours", "slope of the sigmoid; 0 is the uniform merge, a negative "
                  "one turns the mapping round; in fim_kron the power of a direction's ratio between the models",
                  {"fim_kron": 4.0}),
        Parameter("mapping", str, "`centred` or `anchored`", lambda v: v in MAPPINGS, merge, "centred", "ours",
                  "where the sigmoid has its middle: at the mean log-score, or at the largest, which leaves that layer "
                  "half-way and the others above (with `alpha_mean` both are the same)", methods=BY_LAYER),
        Parameter("alpha_mean", float, "a number in (0, 1)", lambda v: 0 < v < 1, merge, None, "ours",
                  "moves the sigmoid's centre so that the layers' α average to this; in fim_kron α itself",
                  {"fim_kron": 0.5}),
        Parameter("alpha_min", *finite, merge, 0.0, "ours", "lower end of α", methods=BY_LAYER),
        Parameter("alpha_max", *finite, merge, 1.0, "ours", "upper end of α", methods=BY_LAYER),
        Parameter("alpha_other", *finite, merge, None, "ours",
                  "α of the tensors outside the decoder layers (default: the mean of the layers' α)"),
        Parameter("gate_scale", float, "a finite number of at least 0", lambda v: math.isfinite(v) and v >= 0, tensor,
                  0.7, "paper", "gate protection: α of the MLP gate projection is multiplied by this",
                  {"fim_ta": 1.0, "fim_kron": 1.0}),
        Parameter("norm_tolerance", float, "a finite number of at least 0 (0 switches it off)",
                  lambda v: math.isfinite(v) and v >= 0, tensor, 0.05, "paper",
                  "norm calibration: a merged tensor whose norm is off by more than this is rescaled",
                  {"fim_ta": 0.0, "fim_kron": 0.0}),
        Parameter("lambda", *finite, tensor, 1.0, "mergekit", "factor of the whole merged task vector"),
        Parameter("normalize", *switch, tensor, True, "mergekit", "divide by the sum of the models' weights",
                  {"fim_ta": False}),
        Parameter("other_modules", str, "`merge`, `base` or `tuned`", lambda v: v in OTHER_MODULES, tensor, "merge",
                  "ours", "what becomes of all that isn't the language model's (vision or audio tower, projector): "
                  "merged, by the α outside the decoder layers, or kept as in the base or in the fine-tuned model"),
        Parameter("int8_mask", *switch, tensor, False, "mergekit", "accepted for stock configs; it has no effect here"),
        Parameter("rescale", bool, "false (for fim_ties, norm_tolerance takes its place)", lambda v: v is False, tensor,
                  False, "mergekit", "accepted for stock configs when false"),
        Parameter("weight", *finite, model, 1.0, "mergekit", "the model's weight beside the other fine-tuned models"),
        Parameter("density", float, "a number in (0, 1]", lambda v: 0 < v <= 1, model, None, "paper",
                  "fraction of each task vector's entries that is kept (0.2 below 3 billion base parameters, "
                  "else 0.4); in fim_kron of the merged task vector's", {"fim_kron": 1.0}),
        Parameter("alpha", *finite, model, None, "ours",
                  "sets α by hand; with it on every model there is no pre-pass but fim_kron's"),
    ]
    # fmt: on
    return {parameter.name: parameter for parameter in table}


PARAMETERS = _parameters()


@dataclass(frozen=True)
class FisherSettings:
    """What determines a Fisher measurement, besides the model.

    Raises:
        FimError: a value of another type or out of range.
    """

    samples: int = 8  # N, the number of sequences
    seq_len: int = 64  # T, the tokens per sequence
    seed: int = 0  # of the random tokens
    labels: str = "inputs"  # what is predicted, `inputs` or `sampled`

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            parameter = PARAMETERS[f"fisher_{name}"]
            is_kind = isinstance(value, parameter.type) and not isinstance(value, bool)
            if not is_kind or not parameter.accepts(value):
                raise FimError(f"FisherSettings: `{name}` must be {parameter.expected}, found {shown(value)}")
