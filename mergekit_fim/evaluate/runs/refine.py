"""A family's runs so far -> the strength at which one more would show most.

Every method and pair turns from one model's answers to the other's at another place, and a grid of strengths may step
over it. So each further run goes to the middle of the widest gap on the way.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
        """Tell where these answers came out."""
        every = list(answers)
        return Point(strength, fmean(answer.correct is True for answer in every), fmean(a.tokens for a in every))


def between_ends(strength: str, points: Sequence[Point], base: Point, long: Point | None) -> list[Point]:
    """Put a family's runs between the models that it leads from and to, unless it goes beyond them.

    Args:
        strength: the parameter that says how far a merge goes. `lambda` scales trimmed task vectors, of which it often
            takes more than 1.
        points: the family's runs.
        base: the base.
        long: the fine-tuned model; None where there are several, which no merge becomes.

    Returns:
        The base at strength 0, the runs, and the long model at strength 1.
    """
    start = [replace(base, strength=0.0)] if all(point.strength > 0 for point in points) else []
    leads_there = long is not None and strength != "lambda" and all(point.strength < 1 for point in points)
    return [*start, *points, *([replace(long, strength=1.0)] if long is not None and leads_there else [])]


def next_strength(points: Sequence[Point], base: Point, long: Point) -> float | None:
    """Find the middle of the widest gap between neighbours among `points`, of different strengths.

    A gap is the part of the way from base to long model that it takes in tokens, and half of the part in accuracy.

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
