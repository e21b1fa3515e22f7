"""Differences on many pairs -> their mean, its interval, and p corrected for several methods.

Pairs of one kind and seed share parent and base. They differ only in how long the long model was trained. So they
aren't independent, and the unit is their *lineage*: the mean over its pairs.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

LEVEL = 0.95  # of every interval
EXACT = 16  # up to so many lineages all changes of signs are tried
DRAWS = 1 << 16  # drawn changes of signs, for more lineages


@dataclass(frozen=True)
class Mean:
    """A mean difference over lineages.

    Attributes:
        value: the mean. Every lineage counts the same.
        interval: of 95 %, by Student's t; None for a single lineage.
        p: two-sided, by changes of signs.
        adjusted: p after Holm's correction over the family of methods; None outside of a family.
        lineages: how many there are.
    """

    value: float
    interval: tuple[float, float] | None
    p: float
    adjusted: float | None
    lineages: int


def of_lineages(differences: Sequence[tuple[Hashable, float]]) -> FloatArray:
    """Return the mean difference of each lineage [lineage], from (lineage, difference) of each pair."""
    found: dict[Hashable, list[float]] = {}
    for lineage, value in differences:
        found.setdefault(lineage, []).append(value)
    return np.array([np.mean(values) for values in found.values()])


def mean(values: FloatArray) -> Mean:
    """Return the mean of differences [lineage], with its interval and p."""
    low, high = t_interval(values)
    interval = None if np.isnan(low) else (float(low), float(high))
    return Mean(float(values.mean()), interval, float(sign_flip(values)), None, len(values))


def family(values: Mapping[str, FloatArray]) -> dict[str, Mean]:
    """Do the same for several methods, each compared with one reference, with Holm's correction over them."""
    found = {name: mean(its) for name, its in values.items()}
    adjusted = holm(np.array([its.p for its in found.values()]))
    return {name: replace(its, adjusted=float(p)) for (name, its), p in zip(found.items(), adjusted, strict=True)}


def t_interval(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return Student's interval of the mean of values [..., lineage]; NaN for a single lineage.

    A bootstrap over so few values would be too narrow. With nine lineages this interval covers the mean in 95 of 100
    cases where differences are normal, in 93 to 94 where their skewness is 1, and in 90 where they are exponential.
    """
    from scipy.stats import t

    count = values.shape[-1]
    if count < 2:
        nothing = np.full(values.shape[:-1], np.nan)
        return nothing, nothing
    middle = values.mean(axis=-1)
    half = t.ppf((1 + LEVEL) / 2, count - 1) * values.std(axis=-1, ddof=1) / np.sqrt(count)
    return middle - half, middle + half


def sign_flip(values: FloatArray, seed: int = 0) -> FloatArray:
    """Return the two-sided p [...] of a mean of 0, from values [..., lineage].

    p is the share of changes of their signs that give a mean no smaller in size. It is exact for differences that are
    as likely above 0 as below by the same amount. Up to 16 lineages all changes are tried. For more lineages 65,536
    are tried: drawn ones, and no change at all.
    """
    count = values.shape[-1]
    if count <= EXACT:
        signs = 1.0 - 2.0 * (np.arange(1 << count)[:, None] >> np.arange(count) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(DRAWS, count))
        signs[0] = 1.0
    found = np.abs(values @ signs.T)
    # Sums in another order differ by rounding. A sum that is as large but for rounding counts.
    least = np.abs(values.sum(axis=-1, keepdims=True)) - 1e-12 * np.abs(values).sum(axis=-1, keepdims=True)
    return (found >= least).mean(axis=-1)


def holm(p: FloatArray) -> FloatArray:
    """Return Holm's adjusted p of several tests [..., test].

    The chance that any test without an effect falls below a level is at most that level.
    """
    count = p.shape[-1]
    order = np.argsort(p, axis=-1)
    steps = np.take_along_axis(p, order, axis=-1) * np.arange(count, 0, -1)
    steps = np.minimum(np.maximum.accumulate(steps, axis=-1), 1.0)
    return np.take_along_axis(steps, np.argsort(order, axis=-1), axis=-1)
