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
    """Put a family's runs between the base at strength 0 and the long model at 1, unless it goes beyond them.

    Where the strength is `lambda`, it scales trimmed task vectors, of which it often takes more than 1. Where there are
    several fine-tuned models, no merge becomes one: `long` is None.
    """
    strengths = [point.strength for point in points]
    start = [replace(base, strength=0.0)] if min(strengths) > 0 else []
    end = [replace(long, strength=1.0)] if long is not None and strength != "lambda" and max(strengths) < 1 else []
    return [*start, *points, *end]


def next_strength(points: Sequence[Point], base: Point, long: Point) -> float | None:
    """Find the middle of the widest gap between neighbours among `points`, of different strengths.

    A gap is the part of the way from base to long model that it takes in tokens, and half of the part in accuracy.
    Return None where no gap is left.
    """
    points = sorted(points, key=lambda point: point.strength)
    tokens = abs(long.tokens - base.tokens) or 1.0
    accuracy = max(_NOISE, abs(long.accuracy - base.accuracy))
    gaps = []
    for x, y in itertools.pairwise(points):
        gap = abs(y.tokens - x.tokens) / tokens + _WEIGHT * abs(y.accuracy - x.accuracy) / accuracy
        width = y.strength - x.strength
        if width > _NARROWEST * abs(points[-1].strength):
            gaps.append((gap, width, x.strength + width / 2))
    return max(gaps)[2] if gaps else None
