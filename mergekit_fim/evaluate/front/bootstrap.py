"""Outcomes -> accuracy and mean tokens of every run, as observed, in every resample of the problems, and in halves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_fim.evaluate.front.paired import LEVEL

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.integer[Any]]
BoolArray = npt.NDArray[np.bool_]

# Ways to halve the problems of each resample. More of them take longer, and narrow the held-out gain's interval.
_HALVINGS = 8
# Counts of a block of resamples: 32 MB, however many problems there are.
_BLOCK = 1 << 22


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What a run answered. The runs of a front share the problems, their order, and the number of samples.

    The arrays are [problem, sample], and None where something isn't known. `Row` says what each has.

    Raises:
        ValueError: there are no problems or no samples, or the shapes differ.
    """

    run: str
    method: str | None
    settings: Mapping[str, Any]
    correct: BoolArray | FloatArray
    tokens: IntArray | FloatArray
    truncated: BoolArray | None = None
    unclosed: BoolArray | None = None
    empty: BoolArray | None = None
    seconds: FloatArray | None = None

    def __post_init__(self) -> None:
        shapes = {its.shape for its in self._arrays.values()}
        if len(shapes) > 1 or self.correct.ndim != 2 or self.correct.size == 0:
            raise ValueError(f"{self.run}: expected arrays [problem, sample] of one shape, found {sorted(shapes)}")

    @property
    def _arrays(self) -> dict[str, Any]:
        names = ("correct", "tokens", "truncated", "unclosed", "empty", "seconds")
        return {name: its for name in names if (its := getattr(self, name)) is not None}

    @property
    def is_binary(self) -> bool:
        """Whether every problem has one answer, which is right or wrong."""
        return self.correct.dtype == bool and self.correct.shape[1] == 1

    def of(self, problems: BoolArray) -> "Outcomes":
        """Leave out the other problems [problem]."""
        return replace(self, **{name: its[problems] for name, its in self._arrays.items()})


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, whose ends are None where a single problem gives none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, eq=False)
class Draws:
    """Every run's accuracy and mean tokens."""

    problems: int
    accuracy: FloatArray  # [1 + resample, run], what was observed first
    tokens: FloatArray  # likewise
    halves: tuple[FloatArray, FloatArray]  # of what was observed: accuracy, tokens [halving, half, run]
    halves_of_draws: tuple[FloatArray, FloatArray]  # of every resample: both [resample, halving, half, run]

    def estimate(self, values: FloatArray) -> Estimate:
        """Give values[0], which was observed, the percentile interval of values[1:], which are of the resamples."""
        if self.problems < 2:
            return Estimate(float(values[0]), None, None)
        tail = 50 * (1 - LEVEL)
        low, high = np.percentile(values[1:], [tail, 100 - tail])
        return Estimate(float(values[0]), float(low), float(high))


def draw(outcomes: Sequence[Outcomes], seed: int, resamples: int) -> Draws:
    """Resample the problems.

    What is resampled are means, so it takes only how often each problem was drawn: a matrix product. That is why numpy
    does it, and not `scipy.stats.bootstrap`, which gathers [resample, problem, run], and knows no halves. The sums are
    of whole numbers and so exact: no comparison depends on how a processor adds.
    """
    problems, samples = outcomes[0].correct.shape
    columns = [o.correct.sum(axis=1) for o in outcomes] + [o.tokens.sum(axis=1) for o in outcomes]
    counted = np.stack([*columns, np.full(problems, samples)], axis=1).astype(np.float64)  # [problem, 2 · run + 1]
    generator = np.random.default_rng(seed)

    def means(sums: FloatArray) -> tuple[FloatArray, FloatArray]:
        both = sums[..., :-1] / np.maximum(sums[..., -1:], 1)  # a half may have no problems
        accuracy, tokens = np.split(both, 2, axis=-1)
        return accuracy, tokens

    def halved(counts: FloatArray) -> FloatArray:
        """Sums [count, halving, half, column]: a problem is in one half however often it was drawn."""
        whole = counts @ counted
        sums = [(counts * (generator.random(counts.shape) < 0.5)) @ counted for _ in range(_HALVINGS)]
        return np.stack([np.stack([half, whole - half], axis=1) for half in sums], axis=1)

    block = max(1, _BLOCK // problems)
    drawn, halves, halves_of_draws = [counted.sum(axis=0, keepdims=True)], [], []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        counts = generator.multinomial(problems, np.full(problems, 1 / problems), size=size).astype(np.float64)
        drawn.append(counts @ counted)
        halves_of_draws.append(halved(counts))
        halves.append(halved(np.ones((-(-size // _HALVINGS), problems))))
    observed = np.concatenate(halves).reshape(-1, 2, counted.shape[1])
    return Draws(problems, *means(np.concatenate(drawn)), means(observed), means(np.concatenate(halves_of_draws)))
