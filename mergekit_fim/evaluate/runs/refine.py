"""A method's runs so far -> the strength at which one more would show most.

Where a merge turns from one model's answers to the other's, and how fast, is different for every method and pair: a
grid of strengths may step over it. So each further run goes to the middle of the widest gap on the way.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from mergekit_fim.evaluate.records import Answer

# A gap of strengths that isn't halved any more, in parts of the largest.
_NARROWEST = 0.01
# Accuracy counts half as much as length: it is the noisier of the two. Differences of accuracy below this are noise.
_WEIGHT, _NOISE = 0.5, 0.05


@dataclass(frozen=True)
class Point:
    """A run: its strength, accuracy, and mean tokens."""

    strength: float
    accuracy: float
    tokens: float

    @staticmethod
    def of(strength: float, answers: Iterable[Answer]) -> "Point":
        """Where these answers came out."""
        found = list(answers)
        return Point(strength, fmean(answer.correct is True for answer in found), fmean(a.tokens for a in found))


def next_strength(points: Sequence[Point], base: Point, long: Point) -> float | None:
    """The middle of the widest gap between neighbours.

    A gap is how much of the way from base to long it is in tokens, and half of how much it is in accuracy.

    Args:
        points: the runs, of different strengths, and the models as they are that stand for an end of them.
        base: for how far apart the two models are.
        long: likewise.

    Returns:
        A strength between two of the points'; None where no gap is left.
    """
    points = sorted(points, key=lambda point: point.strength)
    tokens = abs(long.tokens - base.tokens) or 1.0
    accuracy = max(_NOISE, abs(long.accuracy - base.accuracy))

    def gap(x: Point, y: Point) -> float:
        return abs(y.tokens - x.tokens) / tokens + _WEIGHT * abs(y.accuracy - x.accuracy) / accuracy

    narrowest = _NARROWEST * abs(points[-1].strength)
    gaps = [
        (gap(x, y), y.strength - x.strength, x.strength)
        for x, y in itertools.pairwise(points)
        if y.strength - x.strength > narrowest
    ]
    if not gaps:
        return None
    _, width, start = max(gaps)
    return start + width / 2
