"""Two measurements -> do they rank the layers alike?"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_fim.errors import FimError, wrapped
from mergekit_fim.measurements.record import Measurement

# A layer moved beyond what chance explains where its shift is more than this many standard errors.
SIGNIFICANT = 2.0


@dataclass(frozen=True)
class LayerShift:
    """How one layer stands in the second measurement, beside the first.

    Attributes:
        index: the decoder layer.
        first: its Fisher information in the first measurement.
        second: in the second.
        shift: ln(second / first) minus the mean of that over all layers, which changes no coefficient.
        stderr: the standard error of ln(second / first), from those of the two measurements taken as independent;
            None where one of them has a single sequence.
    """

    index: int
    first: float
    second: float
    shift: float
    stderr: float | None

    @property
    def is_beyond(self) -> bool | None:
        """Whether it moved by more than `SIGNIFICANT` standard errors; None where these aren't known."""
        return None if self.stderr is None else abs(self.shift) > SIGNIFICANT * self.stderr


@dataclass(frozen=True)
class Comparison:
    """How alike two measurements are.

    Attributes:
        spearman: the rank correlation over the layers; None where a measurement is the same everywhere.
        log_pearson: the correlation of ln F over the layers; likewise.
        factor: exp of the mean of ln(second / first): by what the second is larger altogether.
        layers: every layer that has a Fisher information in both, the one that moved most first.
    """

    spearman: float | None
    log_pearson: float | None
    factor: float
    layers: tuple[LayerShift, ...]


def compare_fisher(
    first: Sequence[float],
    second: Sequence[float],
    first_stderr: Sequence[float | None] | None = None,
    second_stderr: Sequence[float | None] | None = None,
) -> Comparison:
    """Compare two measurements of the same layers.

    Layers with F = 0 in either are left out: they have no logarithm and no coefficient of their own.

    Args:
        first: [layer], Fisher information.
        second: [layer].
        first_stderr: [layer], standard errors.
        second_stderr: [layer].

    Raises:
        ValueError: they have different numbers of layers, or fewer than two to compare.
    """
    if len(first) != len(second):
        raise ValueError(f"expected two measurements of the same layers, found {len(first)} and {len(second)}")
    both = [layer for layer in range(len(first)) if first[layer] > 0 and second[layer] > 0]
    if len(both) < 2:
        raise ValueError(f"expected at least two layers with Fisher information in both, found {len(both)}")
    logs = [[math.log(values[layer]) for layer in both] for values in (first, second)]
    ratios = [b - a for a, b in zip(*logs, strict=True)]
    mean = math.fsum(ratios) / len(ratios)
    shifts = []
    for layer, ratio in zip(both, ratios, strict=True):
        relative = [
            None if errors is None or (error := errors[layer]) is None else error / values[layer]
            for values, errors in ((first, first_stderr), (second, second_stderr))
        ]
        known = [r for r in relative if r is not None]
        stderr = math.hypot(*known) if len(known) == 2 else None
        shifts.append(LayerShift(layer, first[layer], second[layer], ratio - mean, stderr))
    varies = all(min(values) < max(values) for values in logs)
    return Comparison(
        statistics.correlation(*(_ranks(values) for values in logs)) if varies else None,
        statistics.correlation(*logs) if varies else None,
        math.exp(mean),
        tuple(sorted(shifts, key=lambda shift: -abs(shift.shift))),
    )


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def render_comparison(first: Measurement, second: Measurement, count: int) -> str:
    """Two measurements side by side.

    Args:
        first: the one that the other is compared with.
        second: the other.
        count: how many of the layers that moved most are listed.

    Raises:
        FimError: they have different numbers of layers, or too few to compare.
    """
    sides = (first.fisher, second.fisher)
    try:
        found = compare_fisher(
            *([layer.fisher for layer in side.layers] for side in sides),
            *([layer.stderr for layer in side.layers] for side in sides),
        )
    except ValueError as error:
        raise FimError(f"these can't be compared: {error}; name two measurements of models of one shape") from None
    lines = []
    for name, side in zip(("first", "second"), (first, second), strict=True):
        settings = side.fisher.settings
        lines += wrapped(
            f"{name}: {side.model.id}, {settings.samples} × {settings.seq_len} tokens, seed {settings.seed}, labels: "
            f"{settings.labels}, in {side.fisher.dtype}"
        )
    difference = first.model.difference(second.model)
    if difference:
        lines += wrapped(f"They are of different models: {difference} differ.")
    tokens = [(side.vocab_size, side.settings.seed, side.settings.seq_len) for side in sides]
    if tokens[0] == tokens[1]:
        lines += wrapped(
            "They share tokens, having the same seed: the standard errors, which take them for independent, are too "
            "large, and too many layers are within them; another --seed makes them right."
        )
    numbers = [("Spearman", found.spearman), ("Pearson of ln F", found.log_pearson)]
    lines.append(", ".join(f"{name} {'undefined' if v is None else f'{v:.3f}'}" for name, v in numbers))
    known = [layer for layer in found.layers if layer.is_beyond is not None]
    beyond = sum(bool(layer.is_beyond) for layer in known)
    lines.append(f"the second is {found.factor:.3g} times the first, over all layers")
    if known:
        lines.append(f"{beyond} of {len(known)} layers moved by more than {SIGNIFICANT:g} standard errors from that")
    if count:
        lines += ["", f"{'layer':>8}{'first':>12}{'second':>12}{'shift':>10}{'± of ln':>10}"]
    for layer in found.layers[:count]:
        stderr = "" if layer.stderr is None else f"{layer.stderr:.2f}"
        verdict = {None: "", True: "  beyond", False: "  within"}[layer.is_beyond]
        lines.append(
            f"{layer.index:>8}{layer.first:>12.3e}{layer.second:>12.3e}{math.exp(layer.shift):>9.2f}×{stderr:>10}{verdict}"
        )
    return "\n".join(lines)
