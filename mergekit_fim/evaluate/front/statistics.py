"""Outcomes of a sweep's runs -> the sweep in figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from mergekit_fim.errors import require
from mergekit_fim.evaluate.front.bootstrap import BoolArray, Draws, Estimate, Outcomes, draw
from mergekit_fim.evaluate.front.fronts import area, chord, held_out_gain, pareto_set, pieces
from mergekit_fim.evaluate.front.paired import LEVEL, adjusted_interval, score_interval


@dataclass(frozen=True)
class Paired:
    """A run's accuracy minus another's, on the same problems.

    The difference has Tango's interval for one sample a problem. For several, or for answers that may be partly right,
    it has the bootstrap's, widened to Bonett and Price's, as the bootstrap's has no width where no answers differ. Then
    the other figures are None.
    """

    difference: Estimate
    gained: int | None  # how many problems this run alone solves
    lost: int | None  # how many the other alone solves
    mcnemar: float | None  # the exact p of McNemar's test


@dataclass(frozen=True)
class RunSummary:
    """A run in figures. Rates are shares of all answers; None where they aren't known.

    Accuracy has Wilson's interval for one sample a problem, and the bootstrap's over problems for several, or for
    answers that may be partly right.
    """

    run: str
    method: str | None
    settings: Mapping[str, Any]
    accuracy: Estimate
    tokens_mean: float
    tokens_median: float
    correct_tokens_mean: float | None  # of the right answers; None where there are none
    correct_tokens_median: float | None
    truncated: float | None
    unclosed: float | None
    empty: float | None
    tokens_per_second: float | None
    against_base: Paired | None  # None for the base itself
    against_long: Paired | None
    length_ratio: float | None  # mean tokens over the long model's; None where that writes none
    above_chord: Estimate | None  # accuracy above the chord at the run's mean tokens; None for its ends, or without one
    pareto: bool  # whether no other run is at least as accurate with at most as many tokens, and better in one


@dataclass(frozen=True)
class Area:
    """The mean height of a front between the base's and the long model's mean tokens, in units of accuracy.

    The area is too high, as a front takes the luckiest of its runs: compare methods of equally many runs. Its interval
    is turned round the value, which corrects a part of this. docs/statistics.md says how far luck moves these figures,
    and how often their intervals hold the truth (`benchmarks/fronts.py`).
    """

    method: str | None  # whose runs the front is of, beside the base and the long model; None for all runs
    runs: int  # how many these are
    area: Estimate
    gain: float  # the area above the chord's mean; too high likewise
    held_out: Estimate | None  # the gain without that luck, of many halvings; None of a single problem


@dataclass(frozen=True)
class AreaDifference:
    """The area of one method's front minus that of another's."""

    first: str
    second: str
    difference: Estimate


@dataclass(frozen=True)
class Summary:
    """A sweep in figures."""

    base: str
    long: str
    problems: int
    samples: int
    seed: int
    resamples: int
    runs: tuple[RunSummary, ...]
    no_chord: str | None  # why there is neither a chord nor an area; None where there are
    front: tuple[tuple[float, float], ...]  # the corners (mean tokens, accuracy) of the front of all runs, by tokens
    areas: tuple[Area, ...]  # of every method in order of appearance, then of all runs; empty without a chord
    differences: tuple[AreaDifference, ...]  # of the areas of every two methods

    def __getitem__(self, name: str) -> RunSummary:
        return next(run for run in self.runs if run.run == name)


def summarize(outcomes: Sequence[Outcomes], base: str, long: str, *, seed: int = 0, resamples: int = 2000) -> Summary:
    """Summarise a sweep.

    The *chord* is the straight line between the base's and the long model's mean tokens and accuracy: what one gets by
    letting either answer at random. A run shorter than the base is held against the base, a longer one than the long
    model against that.

    A *front* at t is the best accuracy that a random mix of runs reaches with at most t mean tokens: the upper concave
    hull of their points, which never falls. Its area is its mean over t from the base's to the long model's mean
    tokens.

    Every interval but Wilson's and Tango's is of one bootstrap over problems, in which all runs are resampled together:
    the percentile interval, but for an area that turned round its value (the basic interval). A resample is biased as
    the sweep is, so an area's percentile interval is biased twice.

    Raises:
        ValueError: the runs don't share problems and samples, two have one name, or `base` or `long` isn't among them.
    """
    names = [o.run for o in outcomes]
    if len(set(names)) < len(names) or len({o.correct.shape for o in outcomes}) > 1:
        raise ValueError(f"expected runs of different names and the same problems and samples, found {names}")
    if base == long or not {base, long} <= set(names):
        raise ValueError(f"expected {base} and {long} to be two of the runs {names}")
    draws = draw(outcomes, seed, resamples)
    accuracy, tokens = draws.accuracy, draws.tokens
    b, e = names.index(base), names.index(long)
    no_chord = None
    if tokens[0, e] <= tokens[0, b]:
        lengths = f"{tokens[0, e]:,.1f} and {tokens[0, b]:,.1f} mean tokens"
        no_chord = f"{long} isn't longer than {base} ({lengths}), so there is neither a chord nor an area"
    areas, differences = ((), ()) if no_chord else _areas(outcomes, draws, b, e)
    problems, samples = outcomes[0].correct.shape
    return Summary(
        base=base,
        long=long,
        problems=problems,
        samples=samples,
        seed=seed,
        resamples=resamples,
        runs=_runs(outcomes, draws, b, e, has_chord=no_chord is None),
        no_chord=no_chord,
        front=tuple((float(tokens[0, i[0]]), float(accuracy[0, i[0]])) for i, *_ in pieces(accuracy[:1], tokens[:1])),
        areas=areas,
        differences=differences,
    )


def _runs(outcomes: Sequence[Outcomes], draws: Draws, b: int, e: int, *, has_chord: bool) -> tuple[RunSummary, ...]:
    """Put every run in figures, where the runs b and e are the base and the long model."""
    accuracy, tokens = draws.accuracy, draws.tokens
    gains = accuracy - chord(accuracy, tokens, b, e)
    pareto = pareto_set(accuracy[0], tokens[0])

    def rate(flags: BoolArray | None) -> float | None:
        return None if flags is None else float(flags.mean())

    def run(i: int, o: Outcomes) -> RunSummary:
        right = o.tokens[o.correct == 1]
        took = 0.0 if o.seconds is None else float(o.seconds.sum())
        return RunSummary(
            run=o.run,
            method=o.method,
            settings=o.settings,
            accuracy=wilson(len(right), draws.problems) if o.is_binary else draws.estimate(accuracy[:, i]),
            tokens_mean=float(tokens[0, i]),
            tokens_median=float(np.median(o.tokens)),
            correct_tokens_mean=float(right.mean()) if len(right) else None,
            correct_tokens_median=float(np.median(right)) if len(right) else None,
            truncated=rate(o.truncated),
            unclosed=rate(o.unclosed),
            empty=rate(o.empty),
            tokens_per_second=float(o.tokens.sum()) / took if took else None,
            against_base=_paired(outcomes, draws, i, b),
            against_long=_paired(outcomes, draws, i, e),
            length_ratio=float(tokens[0, i] / tokens[0, e]) if tokens[0, e] > 0 else None,
            above_chord=draws.estimate(gains[:, i]) if has_chord and i not in (b, e) else None,
            pareto=bool(pareto[i]),
        )

    return tuple(run(i, o) for i, o in enumerate(outcomes))


def _areas(
    outcomes: Sequence[Outcomes], draws: Draws, b: int, e: int
) -> tuple[tuple[Area, ...], tuple[AreaDifference, ...]]:
    """Find the area of every method's front and of the front of all runs, and how far the methods' areas differ."""
    accuracy, tokens = draws.accuracy, draws.tokens
    methods = list(dict.fromkeys(o.method for o in outcomes if o.method is not None))
    parts: dict[str | None, list[int]] = {m: [i for i, o in enumerate(outcomes) if o.method == m] for m in methods}
    parts[None] = [i for i in range(len(outcomes)) if i not in (b, e)]
    level = (accuracy[0, b] + accuracy[0, e]) / 2
    heights = {method: area(accuracy, tokens, accuracy, b, e, part) for method, part in parts.items()}
    areas = (
        Area(m, len(parts[m]), _turned(draws.estimate(h)), float(h[0] - level), _held_out(draws, b, e, parts[m]))
        for m, h in heights.items()
    )
    differences = (AreaDifference(x, y, draws.estimate(heights[x] - heights[y])) for x, y in combinations(methods, 2))
    return tuple(areas), tuple(differences)


def _turned(estimate: Estimate) -> Estimate:
    """Turn the percentile interval of a share round its value: the basic bootstrap's interval."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if low is None or high is None:
        return estimate
    return Estimate(value, max(0.0, min(value, 2 * value - high)), min(1.0, max(value, 2 * value - low)))


def _held_out(draws: Draws, base: int, long: int, part: Sequence[int]) -> Estimate | None:
    if draws.problems < 2:
        return None
    observed = held_out_gain(*draws.halves, base, long, part).mean()
    of_draws = held_out_gain(*draws.halves_of_draws, base, long, part).mean(axis=-1)
    return draws.estimate(np.append(observed, of_draws))


def wilson(count: int, trials: int) -> Estimate:
    """Give a share Wilson's interval."""
    interval = _binomtest(count, trials).proportion_ci(LEVEL, method="wilson")
    return Estimate(count / trials, float(interval.low), float(interval.high))


def mcnemar(gained: int, lost: int) -> float:
    """Find the exact p of McNemar's test: two-sided, of the problems that exactly one of two runs solves."""
    return float(_binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _binomtest(count: int, trials: int) -> Any:
    require("scipy.stats", "sweep")
    from scipy.stats import binomtest

    return binomtest(count, trials)


def _paired(outcomes: Sequence[Outcomes], draws: Draws, i: int, k: int) -> Paired | None:
    """Hold run i against run k; None for the same run."""
    if i == k:
        return None
    one, other = outcomes[i], outcomes[k]
    bootstrap = draws.estimate(draws.accuracy[:, i] - draws.accuracy[:, k])
    if one.is_binary and other.is_binary:
        gained, lost = int((one.correct > other.correct).sum()), int((other.correct > one.correct).sum())
        low, high = score_interval(gained, lost, len(one.correct))
        return Paired(Estimate(bootstrap.value, low, high), gained, lost, mcnemar(gained, lost))
    low, high = adjusted_interval((one.correct.mean(axis=1) - other.correct.mean(axis=1)).tolist())
    if bootstrap.low is not None and bootstrap.high is not None:
        low, high = min(low, bootstrap.low), max(high, bootstrap.high)
    return Paired(Estimate(bootstrap.value, low, high), None, None, None)
