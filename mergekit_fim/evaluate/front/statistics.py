"""Outcomes of a sweep's runs -> accuracy against length: intervals, Pareto set, chord, fronts."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_fim.errors import require
from mergekit_fim.evaluate.front.paired import LEVEL, adjusted_interval, score_interval

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.integer[Any]]
BoolArray = npt.NDArray[np.bool_]

RESAMPLES = 2000
# Ways to halve the problems of each resample. The more, the narrower the held-out gain's interval, and the longer
# it takes.
_HALVINGS = 8
# Counts of a block of resamples: 32 MB, however many problems there are.
_BLOCK = 1 << 22


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What a run answered. The runs of a sweep share the problems, their order, and the number of samples.

    Attributes:
        run: its name, such as "base" or "fim_ties alpha_mean=0.35".
        method: the merge method; None for a model as it is.
        settings: what a merge was given, such as {"alpha_mean": 0.35}.
        correct: whether the answer is right [problem, sample].
        tokens: its length [problem, sample].
        truncated: whether it ended at the limit of tokens [problem, sample].
        unclosed: whether it began to think and didn't end it [problem, sample].
        empty: whether it had no text [problem, sample].
        seconds: what the run took; None where that isn't known.

    Raises:
        ValueError: there are no problems or no samples, or the shapes differ.
    """

    run: str
    method: str | None
    settings: Mapping[str, Any]
    correct: BoolArray
    tokens: IntArray
    truncated: BoolArray
    unclosed: BoolArray
    empty: BoolArray
    seconds: float | None = None

    def __post_init__(self) -> None:
        shapes = {x.shape for x in (self.correct, self.tokens, self.truncated, self.unclosed, self.empty)}
        if len(shapes) > 1 or self.correct.ndim != 2 or self.correct.size == 0:
            raise ValueError(f"{self.run}: expected five arrays [problem, sample] of one shape, found {sorted(shapes)}")


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, whose ends are None where a single problem gives none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Paired:
    """A run's accuracy minus another's, on the same problems.

    Attributes:
        difference: with Tango's interval for one sample a problem. For several with the bootstrap's, which is too
            narrow where few answers differ and has no width where none does, and so is widened to what it lacks of
            Bonett and Price's.
        gained: how many problems this run alone solves; None with several samples a problem.
        lost: how many the other alone solves; None with several.
        mcnemar: the exact p of McNemar's test; None with several.
    """

    difference: Estimate
    gained: int | None
    lost: int | None
    mcnemar: float | None


@dataclass(frozen=True)
class RunSummary:
    """A run in figures. Rates are shares of all answers.

    Attributes:
        accuracy: with Wilson's interval for one sample a problem, and the bootstrap's over problems for several.
        tokens_mean: of all answers.
        correct_tokens_mean: of the right ones; None where there are none.
        tokens_per_second: None where the time isn't known.
        against_base: None for the base itself.
        against_long: None for the long model itself.
        length_ratio: mean tokens over the long model's; None where that writes none.
        above_chord: accuracy above the chord at the run's mean tokens; None for its two ends, and where there is none.
        pareto: whether no other run is at least as accurate with at most as many tokens, and better in one.
    """

    run: str
    method: str | None
    settings: Mapping[str, Any]
    accuracy: Estimate
    tokens_mean: float
    tokens_median: float
    correct_tokens_mean: float | None
    correct_tokens_median: float | None
    truncated: float
    unclosed: float
    empty: float
    tokens_per_second: float | None
    against_base: Paired | None
    against_long: Paired | None
    length_ratio: float | None
    above_chord: Estimate | None
    pareto: bool


@dataclass(frozen=True)
class Area:
    """The mean height of a front between the base's and the long model's mean tokens, in units of accuracy.

    Attributes:
        method: whose runs the front is of, beside the base and the long model; None for all runs.
        runs: how many these are, without the base and the long model.
        area: the mean height. A hull over noisy points is biased upwards, as it takes the luckiest: 5 runs that all lie
            on the chord gain about 0.037, 0.029, 0.014 and 0.008 on 60, 100, 500 and 1,319 problems, 10 runs 0.051,
            0.040, 0.020 and 0.012 (`benchmarks/fronts.py`). So compare methods of equally many runs. The interval,
            which takes a part of that off, covers the true area in 80 to 98 of 100 sweeps.
        gain: `area` above the chord's mean, with the same bias.
        held_out: the gain without that luck: the front is found on one half of the problems, and the other half says
            how accurate the mixes that lie on it are, at the lengths that they have on the first. The mean of many
            halvings. None of a single problem. What is left: a front of half the problems is a worse choice, which
            takes up to 0.01 of a gain of many small steps, and a run that was short by luck counts as short, which
            adds up to 0.01 where the lengths of a run's answers differ much (200 problems). The interval covered the
            true gain in 90 to 100 of 100 simulated sweeps of 60 problems or more (`benchmarks/fronts.py`).
    """

    method: str | None
    runs: int
    area: Estimate
    gain: float
    held_out: Estimate | None


@dataclass(frozen=True)
class AreaDifference:
    """The area of one method's front minus that of another's."""

    first: str
    second: str
    difference: Estimate


@dataclass(frozen=True)
class Summary:
    """A sweep in figures.

    Attributes:
        base: the name of the short model's run.
        long: of the long model's.
        resamples: of the bootstrap.
        runs: in the order in which they were given.
        no_chord: why there is neither a chord nor an area; None where there are.
        front: the corners (mean tokens, accuracy) of the front of all runs, from its shortest to its most accurate.
        areas: of every method in order of appearance, then of all runs; empty without a chord.
        differences: of the areas of every two methods.
    """

    base: str
    long: str
    problems: int
    samples: int
    seed: int
    resamples: int
    runs: tuple[RunSummary, ...]
    no_chord: str | None
    front: tuple[tuple[float, float], ...]
    areas: tuple[Area, ...]
    differences: tuple[AreaDifference, ...]

    def __getitem__(self, run: str) -> RunSummary:
        return next(found for found in self.runs if found.run == run)


def summarize(
    outcomes: Sequence[Outcomes], base: str, long: str, *, seed: int = 0, resamples: int = RESAMPLES
) -> Summary:
    """Summarise a sweep.

    The *chord* is the straight line between the base's and the long model's mean tokens and accuracy: what one gets by
    letting either answer at random. A run shorter than the base is held against the base, a longer one than the long
    model against that.

    A *front* at t is the best accuracy that a random mix of runs reaches with at most t mean tokens: the upper concave
    hull of their points, which never falls. Its area is its mean over t from the base's to the long model's mean
    tokens. It compares methods of equally many runs; whether any run is above the chord, `Area.held_out` says.

    Every interval but Wilson's and Tango's is of one bootstrap over problems, in which all runs are resampled together:
    the percentile interval, but for an area that turned round its value (the basic interval). A resample is biased as
    the sweep is, so an area's percentile interval is biased twice, and covers the true area less often.

    Args:
        outcomes: of every run.
        base: the name of the short model's run.
        long: of the long model's.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        ValueError: the runs don't share problems and samples, two have one name, or `base` or `long` isn't among them.
    """
    names = [o.run for o in outcomes]
    if len(set(names)) < len(names) or len({o.correct.shape for o in outcomes}) > 1:
        raise ValueError(f"expected runs of different names and the same problems and samples, found {names}")
    if base == long or not {base, long} <= set(names):
        raise ValueError(f"expected {base} and {long} to be two of the runs {names}")
    draws = _draw(outcomes, seed, resamples)
    accuracy, tokens = draws.accuracy, draws.tokens
    b, e = names.index(base), names.index(long)
    no_chord = None
    if tokens[0, e] <= tokens[0, b]:
        found = f"{tokens[0, e]:,.1f} and {tokens[0, b]:,.1f} mean tokens"
        no_chord = f"{long} isn't longer than {base} ({found}), so there is neither a chord nor an area"
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
        front=tuple((float(tokens[0, i[0]]), float(accuracy[0, i[0]])) for i, *_ in _pieces(accuracy[:1], tokens[:1])),
        areas=areas,
        differences=differences,
    )


def _runs(outcomes: Sequence[Outcomes], draws: "_Draws", b: int, e: int, *, has_chord: bool) -> tuple[RunSummary, ...]:
    """Every run in figures, where the runs b and e are the base and the long model."""
    accuracy, tokens = draws.accuracy, draws.tokens
    gains = accuracy - _chord(accuracy, tokens, b, e)
    pareto = pareto_set(accuracy[0], tokens[0])

    def against(i: int, other: int) -> Paired | None:
        if i == other:
            return None
        return _paired(outcomes[i], outcomes[other], _estimate(accuracy[:, i] - accuracy[:, other], draws.problems))

    def run(i: int, o: Outcomes) -> RunSummary:
        right, count = o.tokens[o.correct], int(o.correct.sum())
        by_draws = _estimate(accuracy[:, i], draws.problems)
        return RunSummary(
            run=o.run,
            method=o.method,
            settings=o.settings,
            accuracy=wilson(count, draws.problems) if o.correct.shape[1] == 1 else by_draws,
            tokens_mean=float(tokens[0, i]),
            tokens_median=float(np.median(o.tokens)),
            correct_tokens_mean=float(right.mean()) if count else None,
            correct_tokens_median=float(np.median(right)) if count else None,
            truncated=float(o.truncated.mean()),
            unclosed=float(o.unclosed.mean()),
            empty=float(o.empty.mean()),
            tokens_per_second=float(o.tokens.sum()) / o.seconds if o.seconds else None,
            against_base=against(i, b),
            against_long=against(i, e),
            length_ratio=float(tokens[0, i] / tokens[0, e]) if tokens[0, e] > 0 else None,
            above_chord=_estimate(gains[:, i], draws.problems) if has_chord and i not in (b, e) else None,
            pareto=bool(pareto[i]),
        )

    return tuple(run(i, o) for i, o in enumerate(outcomes))


def _areas(
    outcomes: Sequence[Outcomes], draws: "_Draws", b: int, e: int
) -> tuple[tuple[Area, ...], tuple[AreaDifference, ...]]:
    """The area of every method's front and of that of all runs, and the differences of the methods'."""
    accuracy, tokens = draws.accuracy, draws.tokens
    methods = list(dict.fromkeys(o.method for o in outcomes if o.method is not None))
    parts: dict[str | None, list[int]] = {m: [i for i, o in enumerate(outcomes) if o.method == m] for m in methods}
    parts[None] = [i for i in range(len(outcomes)) if i not in (b, e)]
    chord = (accuracy[0, b] + accuracy[0, e]) / 2
    heights = {method: _area(accuracy, tokens, accuracy, b, e, part) for method, part in parts.items()}

    def estimate(values: FloatArray) -> Estimate:
        return _estimate(values, draws.problems)

    areas = (
        Area(m, len(parts[m]), _turned(estimate(h)), float(h[0] - chord), _held_out(draws, b, e, parts[m]))
        for m, h in heights.items()
    )
    differences = (AreaDifference(x, y, estimate(heights[x] - heights[y])) for x, y in combinations(methods, 2))
    return tuple(areas), tuple(differences)


def as_json(summary: Summary) -> dict[str, Any]:
    """A summary as what JSON can hold; nothing in it is NaN or infinite."""
    return dataclasses.asdict(summary)


def wilson(count: int, trials: int) -> Estimate:
    """A share with Wilson's interval."""
    interval = _binomtest()(count, trials).proportion_ci(LEVEL, method="wilson")
    return Estimate(count / trials, float(interval.low), float(interval.high))


def mcnemar(gained: int, lost: int) -> float:
    """The exact p of McNemar's test: two-sided, of the problems that exactly one of two runs solves."""
    return float(_binomtest()(gained, gained + lost).pvalue) if gained + lost else 1.0


def _binomtest() -> Callable[..., Any]:
    require("scipy.stats", "sweep")
    from scipy.stats import binomtest

    return binomtest


def _paired(one: Outcomes, other: Outcomes, bootstrap: Estimate) -> Paired:
    """One run against another.

    Args:
        one: the run.
        other: what it is held against.
        bootstrap: the difference of their accuracies, with the bootstrap's interval.
    """
    problems, samples = one.correct.shape
    if samples == 1:
        gained, lost = int((one.correct & ~other.correct).sum()), int((other.correct & ~one.correct).sum())
        low, high = score_interval(gained, lost, problems)
        return Paired(Estimate(bootstrap.value, low, high), gained, lost, mcnemar(gained, lost))
    low, high = adjusted_interval((one.correct.mean(axis=1) - other.correct.mean(axis=1)).tolist())
    if bootstrap.low is not None and bootstrap.high is not None:
        low, high = min(low, bootstrap.low), max(high, bootstrap.high)
    return Paired(Estimate(bootstrap.value, low, high), None, None, None)


@dataclass(frozen=True, eq=False)
class _Draws:
    """Every run's accuracy and mean tokens, as observed and in every resample of the problems.

    Attributes:
        problems: how many there are.
        accuracy: [1 + resample, run], what was observed first.
        tokens: likewise.
        halves: of what was observed, halved in many ways: accuracy, tokens [halving, half, run].
        halves_of_draws: of every resample: accuracy, tokens [resample, halving, half, run].
    """

    problems: int
    accuracy: FloatArray
    tokens: FloatArray
    halves: tuple[FloatArray, FloatArray]
    halves_of_draws: tuple[FloatArray, FloatArray]


def _draw(outcomes: Sequence[Outcomes], seed: int, resamples: int) -> _Draws:
    """Resample the problems.

    By numpy, not by `scipy.stats.bootstrap`: what is resampled are means, so that how often each problem was drawn is
    all that it takes, a matrix product instead of gathering [resample, problem, run]; scipy refuses a single problem,
    and knows no halves. The sums are of whole numbers and so exact: no comparison rests on how a processor adds.
    """
    problems, samples = outcomes[0].correct.shape
    columns = [o.correct.sum(axis=1) for o in outcomes] + [o.tokens.sum(axis=1) for o in outcomes]
    counted = np.stack([*columns, np.full(problems, samples)], axis=1).astype(np.float64)  # [problem, 2 · run + 1]
    generator = np.random.default_rng(seed)

    def means(sums: FloatArray) -> tuple[FloatArray, FloatArray]:
        found = sums[..., :-1] / np.maximum(sums[..., -1:], 1)  # a half may have no problems
        accuracy, tokens = np.split(found, 2, axis=-1)
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
    return _Draws(problems, *means(np.concatenate(drawn)), means(observed), means(np.concatenate(halves_of_draws)))


def _estimate(values: FloatArray, problems: int) -> Estimate:
    """What was observed, values[0], with the percentile interval of the resamples after it."""
    if problems < 2:
        return Estimate(float(values[0]), None, None)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(values[1:], [tail, 100 - tail])
    return Estimate(float(values[0]), float(low), float(high))


def _turned(estimate: Estimate) -> Estimate:
    """The basic bootstrap's interval from the percentile one, of what is a share."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if low is None or high is None:
        return estimate
    return Estimate(value, max(0.0, min(value, 2 * value - high)), min(1.0, max(value, 2 * value - low)))


def _chord(accuracy: FloatArray, tokens: FloatArray, base: int, long: int) -> FloatArray:
    """What the mix of base and long model that is as long as a run gives: [..., run], as the arguments."""
    start, span = tokens[..., [base]], tokens[..., [long]] - tokens[..., [base]]
    share = (tokens > start).astype(np.float64)  # of the long model, where both are equally long
    np.divide(tokens - start, span, out=share, where=np.broadcast_to(span != 0, share.shape))
    share = np.clip(share, 0, 1)
    return (1 - share) * accuracy[..., [base]] + share * accuracy[..., [long]]


def pareto_set(accuracy: FloatArray, tokens: FloatArray) -> BoolArray:
    """Which of the runs no other is at least as accurate as with at most as many tokens, and better in one [run]."""
    better = (accuracy[None] > accuracy[:, None]) | (tokens[None] < tokens[:, None])
    beaten = (accuracy[None] >= accuracy[:, None]) & (tokens[None] <= tokens[:, None]) & better
    return np.logical_not(beaten.any(axis=1))


def _pieces(accuracy: FloatArray, tokens: FloatArray) -> Iterator[tuple[IntArray, IntArray, BoolArray]]:
    """The front's pieces, from left to right, of many sets of points at once: gift wrapping, a step for each piece.

    Args:
        accuracy: [set, run].
        tokens: [set, run].

    Yields:
        Of every set: the runs where the piece begins and ends, the same for the last one, which goes on level for ever;
        and whether its last piece has been yielded before.
    """
    rows = np.arange(len(tokens))
    here = np.where(tokens == tokens.min(axis=1, keepdims=True), accuracy, -np.inf).argmax(axis=1)
    finished = np.zeros(len(tokens), dtype=bool)
    while not finished.all():
        rise, run = accuracy - accuracy[rows, here][:, None], tokens - tokens[rows, here][:, None]
        slopes = np.divide(rise, run, out=np.zeros_like(rise), where=(rise > 0) & (run > 0))
        there = slopes.argmax(axis=1)
        last = slopes[rows, there] == 0
        there = np.where(last, here, there)
        yield here, there, finished
        here, finished = there, last


def _area(
    accuracy: FloatArray, tokens: FloatArray, heights: FloatArray, base: int, long: int, part: Sequence[int]
) -> FloatArray:
    """The mean [set], between the base's and the long model's tokens, of the mixes that lie on a front.

    Args:
        accuracy: [set, run].
        tokens: [set, run].
        heights: what is averaged [set, run]: `accuracy`, for the front's own area.
        base: the short end.
        long: the long end.
        part: the runs that the front is of, beside these two.
    """
    # In a resample the base may be the longer one: the ends, and the chord between them, are the same.
    low, high = np.sort(tokens[:, [base, long]], axis=1).T
    # Where the ends meet, the mean is the height there: means of whole numbers are further apart than this.
    high = np.maximum(high, low + 1e-6)
    accuracy, tokens, heights = (x[:, [base, long, *part]] for x in (accuracy, tokens, heights))
    rows = np.arange(len(tokens))
    total = np.zeros(len(tokens))
    for here, there, finished in _pieces(accuracy, tokens):
        start, end = tokens[rows, here], np.where(here == there, np.inf, tokens[rows, there])
        slope = (heights[rows, there] - heights[rows, here]) / (end - start)
        left, right = np.clip(start, low, high), np.clip(end, low, high)
        middle = heights[rows, here] + slope * ((left + right) / 2 - start)
        total += np.where(finished, 0, (right - left) * middle)
    return total / (high - low)


def _held_out(draws: _Draws, base: int, long: int, part: Sequence[int]) -> Estimate | None:
    """What the mixes on the front of one half of the problems gain on the other half.

    At every length t between the base's and the long model's on the half that chooses, the front there is a mix of
    runs; the other half says how accurate that mix is, and how accurate base and long model are, between whose mean
    tokens the chord has the mean of both. Accuracy on the other half is independent of the choice, so that luck in
    accuracy isn't counted. The length of a mix is that of the half that chose it: where a front has reached its height
    before t it has tokens to spare, and the chord at the mix's own length would credit the height without its cost.
    Taken from the other half, the runs' order on the axis would change by noise, and cost more than it tells.
    """
    if draws.problems < 2:
        return None

    def gain(accuracy: FloatArray, tokens: FloatArray) -> FloatArray:
        others = accuracy[..., ::-1, :]  # each half's of the other one
        chosen, lengths, heights = (x.reshape(-1, x.shape[-1]) for x in (accuracy, tokens, others))
        found = _area(chosen, lengths, heights, base, long, part) - (heights[:, base] + heights[:, long]) / 2
        return found.reshape(accuracy.shape[:-1]).mean(axis=-1)

    observed = gain(*draws.halves).mean()
    return _estimate(np.append(observed, gain(*draws.halves_of_draws).mean(axis=-1)), draws.problems)
