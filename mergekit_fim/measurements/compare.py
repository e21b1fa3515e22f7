"""Compare two measurements: do they rank the layers alike? And two files of factors: how alike are they?"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_fim.errors import FimError
from mergekit_fim.measurements.factors import FactorsFile
from mergekit_fim.measurements.record import FisherMeasurement, LayerFisher, Measurement
from mergekit_fim.text import wrapped

if TYPE_CHECKING:
    from torch import Tensor

# A layer moved beyond what chance explains where its shift is more than this many standard errors.
SIGNIFICANT = 2.0


@dataclass(frozen=True)
class LayerShift:
    """How one decoder layer stands in the second measurement, beside the first."""

    first: LayerFisher
    second: LayerFisher
    shift: float  # ln(F_second / F_first) minus the mean of that over all layers, which changes no coefficient

    @property
    def stderr(self) -> float | None:
        """The standard error of ln(F_second / F_first), if the two are independent; None for a single sequence."""
        relative = [x.stderr / x.fisher for x in (self.first, self.second) if x.stderr is not None]
        return math.hypot(*relative) if len(relative) == 2 else None

    @property
    def is_beyond(self) -> bool | None:
        """Whether it moved by more than `SIGNIFICANT` standard errors; None where these aren't known."""
        return None if self.stderr is None else abs(self.shift) > SIGNIFICANT * self.stderr


@dataclass(frozen=True)
class Comparison:
    """How alike two measurements are."""

    spearman: float | None  # the rank correlation over the layers; None where a measurement is the same everywhere
    log_pearson: float | None  # the correlation of ln F over the layers; likewise
    factor: float  # exp of the mean of ln(F_second / F_first): how many times larger the second is
    layers: tuple[LayerShift, ...]  # that have Fisher information in both; the one that moved most comes first


def compare_fisher(first: FisherMeasurement, second: FisherMeasurement) -> Comparison:
    """Compare two measurements of the same layers.

    Layers with F = 0 in either are left out: they have no logarithm and no coefficient of their own.

    Raises:
        FimError: they have different numbers of layers, or fewer than two to compare.
    """
    counts = len(first.layers), len(second.layers)
    pairs = [(a, b) for a, b in zip(first.layers, second.layers, strict=False) if a.fisher > 0 and b.fisher > 0]
    if counts[0] != counts[1] or len(pairs) < 2:
        raise FimError(
            "these can't be compared: expected the same layers, at least two with Fisher information in both, found "
            f"{counts[0]} and {counts[1]} layers, {len(pairs)} with it; name two measurements of models of one shape"
        )
    logs = [[math.log(layer.fisher) for layer in side] for side in zip(*pairs, strict=True)]
    ratios = [b - a for a, b in zip(*logs, strict=True)]
    mean = math.fsum(ratios) / len(ratios)
    shifts = [LayerShift(a, b, ratio - mean) for (a, b), ratio in zip(pairs, ratios, strict=True)]
    varies = all(min(values) < max(values) for values in logs)
    return Comparison(
        statistics.correlation(*map(_ranks, logs)) if varies else None,
        statistics.correlation(*logs) if varies else None,
        math.exp(mean),
        tuple(sorted(shifts, key=lambda layer: -abs(layer.shift))),
    )


def _ranks(values: Sequence[float]) -> list[float]:
    """Rank values, from 1. Equal ones share the mean of their ranks."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def render_comparison(first: Measurement, second: Measurement, count: int) -> str:
    """Show two measurements side by side, with the `count` layers that moved most."""
    comparison = compare_fisher(first.fisher, second.fisher)
    lines = []
    for name, side in (("first", first), ("second", second)):
        its = side.fisher.settings
        tokens = f"{its.samples} × {its.seq_len} tokens, seed {its.seed}, labels: {its.labels}"
        lines += wrapped(f"{name}: {side.model.id}, {tokens}, in {side.fisher.dtype}")
    if difference := first.model.difference(second.model):
        lines += wrapped(f"They are of different models: {difference} differ.")
    drawn = [(side.vocab_size, side.settings.seed, side.settings.seq_len) for side in (first.fisher, second.fisher)]
    if drawn[0] == drawn[1]:
        lines += wrapped(
            "They share tokens, having the same seed. The standard errors take them for independent and are too large, "
            "so too many layers are within them; another --seed makes them right."
        )
    numbers = [("Spearman", comparison.spearman), ("Pearson of ln F", comparison.log_pearson)]
    lines.append(", ".join(f"{name} {'undefined' if v is None else f'{v:.3f}'}" for name, v in numbers))
    lines.append(f"the second is {comparison.factor:.3g} times the first, over all layers")
    if known := [layer.is_beyond for layer in comparison.layers if layer.is_beyond is not None]:
        moved = f"moved by more than {SIGNIFICANT:g} standard errors from that"
        lines.append(f"{sum(known)} of {len(known)} layers {moved}")
    if count:
        lines += ["", f"{'layer':>8}{'first':>12}{'second':>12}{'shift':>10}{'± of ln':>10}"]
    for layer in comparison.layers[:count]:
        stderr = "" if layer.stderr is None else f"{layer.stderr:.2f}"
        verdict = {None: "", True: "  beyond", False: "  within"}[layer.is_beyond]
        values = f"{layer.first.fisher:>12.3e}{layer.second.fisher:>12.3e}{math.exp(layer.shift):>9.2f}×"
        lines.append(f"{layer.first.index:>8}{values}{stderr:>10}{verdict}")
    return "\n".join(lines)


def compare_factors(first: FactorsFile, second: FactorsFile) -> dict[int, list[tuple[str, float]]]:
    """Say how alike the factors of the same tensors are: the cosine ⟨A, A'⟩ / (‖A‖ ‖A'‖).

    Only products of tokens with tokens are formed: ⟨A, A'⟩ is ‖X X'ᵀ‖² but for a factor.

    Returns:
        For each decoder layer (tensor, cosine), of a stack for each expert.

    Raises:
        FimError: they have no tensor of one shape in common.
    """

    def product(x: "Tensor", y: "Tensor") -> float:
        return float((x.float() @ y.float().T).square().sum())

    found: dict[int, list[tuple[str, float]]] = {}
    for name, its in first.tensors.items():
        for a, b in zip(its, second.tensors.get(name, ()), strict=False):
            if a is None or b is None:
                continue
            x, y = first.inputs(a.inputs), second.inputs(b.inputs)
            if x.shape[1] == y.shape[1]:
                cosine = product(x, y) / (math.sqrt(product(x, x) * product(y, y)) or 1.0)
                found.setdefault(a.layer, []).append((name, cosine))
    if not found:
        raise FimError(
            f"these can't be compared: expected factors of tensors of one shape, found none in {first.path} and "
            f"{second.path}; name two of models of one shape"
        )
    return found


def render_factors(first: FactorsFile, second: FactorsFile) -> str:
    """Show two files of factors side by side: for each decoder layer the mean cosine, and the least alike tensor."""
    lines = []
    for name, its in (("first", first), ("second", second)):
        lines += wrapped(f"{name}: {its.model.id}, {its.settings}, in {its.settings.dtype}")
    lines += ["They are of different tokens."] if first.settings.tokens != second.settings.tokens else []
    lines += ["", f"{'layer':>8}{'inputs':>10}   least alike"]
    for layer, cosines in sorted(compare_factors(first, second).items()):
        least, name = min((cosine, name) for name, cosine in cosines)
        mean = math.fsum(cosine for _, cosine in cosines) / len(cosines)
        lines.append(f"{layer:>8}{mean:>10.3f}   {least:.3f} {name}")
    return "\n".join(lines)
