"""A sweep's statistics, tables and figure, against hand arithmetic and brute force."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from itertools import combinations, pairwise

import numpy as np
import pytest
from environments import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks import fronts
from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.front import bootstrap
from mergekit_fim.evaluate.front.bootstrap import Outcomes
from mergekit_fim.evaluate.front.figure import draw, write_figure
from mergekit_fim.evaluate.front.fronts import held_out_gain
from mergekit_fim.evaluate.front.paired import adjusted_interval, enough_problems, score_interval
from mergekit_fim.evaluate.front.recommended import recommendation
from mergekit_fim.evaluate.front.statistics import mcnemar, summarize, wilson
from mergekit_fim.evaluate.front.table import render_table


def outcomes(run, correct, tokens, method=None, seconds=None, **more) -> Outcomes:
    """Of one sample a problem where the lists are flat; merges are named "method name=value"."""
    correct = np.asarray(correct, bool)
    correct = correct.reshape(len(correct), -1)
    tokens = np.broadcast_to(np.asarray(tokens).reshape(-1, 1), correct.shape) if np.ndim(tokens) < 2 else tokens
    if run not in ("base", "long") and method is None and " " in run:
        method = run.split()[0]
    values = {k: float(v) for k, v in (part.split("=") for part in run.split()[1:])} if method else {}
    rates = {name: np.zeros_like(correct) for name in ("truncated", "unclosed", "empty")} | {
        name: np.asarray(value, bool).reshape(correct.shape) for name, value in more.items()
    }
    took = None if seconds is None else np.full(correct.shape, seconds / correct.size)
    return Outcomes(run, method, values, correct, np.array(tokens), seconds=took, **rates)


def sweep(points: dict[str, tuple[float, float]], problems: int, seed: int) -> list[Outcomes]:
    """Runs of expected accuracy and mean tokens; some problems are harder than others, for every run."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(size=(problems, 1)) * 2
    made = []
    for name, (accuracy, tokens) in points.items():
        chance = 1 / (1 + np.exp(-(math.log(accuracy / (1 - accuracy)) * 1.54 + ease)))
        length = np.maximum(1, rng.lognormal(math.log(tokens) - 0.18, 0.6, size=(problems, 1)))
        made.append(outcomes(name, rng.random((problems, 1)) < chance, length.astype(int)))
    return made


def on_a_chord(methods, runs, bulge=0.0) -> dict[str, tuple[float, float]]:
    points = {"base": (0.5, 30.0), "long": (0.8, 300.0)}
    for method in methods:
        for i in range(1, runs + 1):
            s = i / (runs + 1)
            points[f"{method} x={i}"] = (0.5 + 0.3 * s + 4 * bulge * s * (1 - s), 30 + 270 * s)
    return points


# by hand


SMALL = [
    outcomes("base", [1, 1, 0, 0], [5, 10, 10, 15], seconds=8.0, empty=[0, 0, 0, 1]),
    outcomes("long", [1, 1, 1, 0], [20, 20, 40, 40], unclosed=[0, 0, 1, 1], truncated=[0, 0, 0, 1]),
    outcomes("ours x=1", [1, 0, 1, 1], [10, 10, 20, 20]),
    outcomes("theirs x=1", [0, 0, 1, 1], [20, 20, 20, 20]),
    outcomes("theirs x=2", [0, 0, 0, 0], [40, 40, 40, 40]),
]


def test_a_small_sweep_by_hand():
    found = summarize(SMALL, "base", "long")
    base, long, ours, theirs, wrong = found.runs
    assert [run.accuracy.value for run in found.runs] == [0.5, 0.75, 0.75, 0.5, 0.0]
    assert [run.tokens_mean for run in found.runs] == [10, 30, 15, 20, 40]
    assert [run.tokens_median for run in found.runs] == [10, 30, 15, 20, 40]
    assert (base.correct_tokens_mean, base.correct_tokens_median) == (7.5, 7.5)
    assert long.correct_tokens_mean == pytest.approx(80 / 3)
    assert long.correct_tokens_median == 20
    assert (wrong.correct_tokens_mean, wrong.correct_tokens_median) == (None, None)
    assert (base.empty, base.unclosed, base.truncated) == (0.25, 0, 0)
    assert (long.empty, long.unclosed, long.truncated) == (0, 0.5, 0.25)
    assert (base.tokens_per_second, long.tokens_per_second) == (5.0, None)
    assert [run.length_ratio for run in found.runs] == pytest.approx([1 / 3, 1, 0.5, 2 / 3, 4 / 3])
    # the chord rises from 0.5 at 10 tokens to 0.75 at 30, and stays there
    assert (base.above_chord, long.above_chord) == (None, None)
    gains = [run.above_chord.value for run in (ours, theirs, wrong)]
    assert gains == pytest.approx([0.75 - 0.5625, 0.5 - 0.625, -0.75])
    assert [run.run for run in found.runs if run.pareto] == ["base", "ours x=1"]
    assert base.against_base is None
    assert long.against_long is None
    assert base.against_long.difference.value == long.against_base.difference.value * -1 == -0.25
    assert ours.against_long.difference.value == 0.0
    assert ours.against_long.mcnemar == 1.0  # one problem each way
    assert theirs.against_long.mcnemar == 1.0  # two against one
    assert wrong.against_long.mcnemar == 0.25  # three against none: 2 / 2^3
    # from (10, 0.5) to (15, 0.75), then level
    assert found.front == ((10, 0.5), (15, 0.75))
    areas = {area.method: area for area in found.areas}
    assert {method: area.runs for method, area in areas.items()} == {"ours": 1, "theirs": 2, None: 3}
    by_hand = (5 * 0.625 + 15 * 0.75) / 20
    assert areas["ours"].area.value == areas[None].area.value == pytest.approx(by_hand)
    assert areas["theirs"].area.value == pytest.approx(0.625)  # the chord itself
    assert areas["ours"].gain == pytest.approx(by_hand - 0.625)
    assert areas["theirs"].gain == pytest.approx(0.0)
    (difference,) = found.differences
    assert (difference.first, difference.second) == ("ours", "theirs")
    assert difference.difference.value == pytest.approx(by_hand - 0.625)


def test_a_run_shorter_than_the_base_is_held_against_the_base():
    found = summarize([*SMALL, outcomes("ours x=2", [1, 0, 0, 0], [1, 1, 1, 1])], "base", "long")
    assert found["ours x=2"].above_chord.value == -0.25
    assert found.front[0] == (1.0, 0.25)
    # a mix of it with the run at (15, 0.75) is better than the base
    at_base = 0.25 + 0.5 * 9 / 14
    assert found.areas[0].area.value == pytest.approx((5 * (at_base + 0.75) / 2 + 15 * 0.75) / 20)


def test_ends_that_are_a_part_of_a_token_apart():
    """And in the resample of the first problem alone they meet."""
    made = [outcomes("base", [0, 0], [1, 1]), outcomes("long", [0, 1], [1, 2]), outcomes("ours x=1", [1, 1], [1, 2])]
    (area, _) = summarize(made, "base", "long", resamples=50).areas
    assert area.area.value == pytest.approx(0.5)
    assert 0 <= area.area.low <= 0.5 <= area.area.high <= 1


def test_a_longer_run_lifts_the_front_before_it():
    found = summarize([*SMALL[:2], outcomes("ours x=1", [1, 1, 1, 1], [50, 50, 50, 50])], "base", "long")
    # 0.5 at 10 tokens, 1 at 50, 0.75 at 30 on the line between them
    assert found.areas[0].area.value == pytest.approx(0.625)
    assert found["ours x=1"].above_chord.value == 0.25


@pytest.mark.parametrize(("count", "trials"), [(0, 7), (7, 7), (1, 1), (86, 100), (659, 1319)])
def test_wilson_by_its_formula(count, trials):
    z, p = 1.959963984540054, count / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    found = wilson(count, trials)
    assert (found.value, found.low, found.high) == pytest.approx((p, middle - half, middle + half), abs=1e-12)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 1), (6, 0), (3, 9), (9, 3), (5, 5), (20, 41)])
def test_mcnemar_by_counting(gained, lost):
    n, few = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, k) for k in range(few + 1)) / 2**n
    assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail))


# by brute force


def best_mix(points, t):
    """The runs i, j and the share of j of the best mix of at most t tokens, of all pairs."""
    best = None
    for i, j in [(i, i) for i in range(len(points))] + list(combinations(range(len(points)), 2)):
        (t0, a0), (t1, a1) = points[i], points[j]
        shares = [0.0, 1.0] + ([min(1.0, max(0.0, (t - t0) / (t1 - t0)))] if t0 != t1 else [])
        for share in shares:
            if t0 + share * (t1 - t0) <= t + 1e-9:
                height = a0 + share * (a1 - a0)
                if best is None or height > best[0] + 1e-12:
                    best = height, i, j, share
    return best


@st.composite
def runs(draw):
    """The outcomes of a few runs on a few problems, ties and all."""
    count, problems = draw(st.integers(2, 6)), draw(st.integers(1, 6))
    correct = draw(arrays(bool, (count, problems)))
    tokens = draw(arrays(np.int64, (count, problems), elements=st.integers(0, 8)))
    names = ["base", "long"] + [f"{'ours' if i % 2 else 'theirs'} x={i}" for i in range(count - 2)]
    return [outcomes(*run) for run in zip(names, correct, tokens, strict=True)]


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(runs())
def test_the_front_is_the_best_of_all_mixes(made):
    found = summarize(made, "base", "long", resamples=30)
    points = [(run.tokens_mean, run.accuracy.value) for run in found.runs]
    base, long = points[:2]
    shortest = min(t for t, _ in points)
    assert found.front[0] == (shortest, max(a for t, a in points if t == shortest))
    assert found.front[-1][1] == max(a for _, a in points)
    slopes = [(a1 - a0) / (t1 - t0) for (t0, a0), (t1, a1) in pairwise(found.front)]
    assert all(slope > 0 for slope in slopes)
    assert all(before >= after - 1e-12 for before, after in pairwise(slopes))
    for t, a in found.front:
        assert a == pytest.approx(best_mix(points, t)[0])
    undominated = [not any(x <= t and y >= a and (x, y) != (t, a) for x, y in points) for t, a in points]
    assert [run.pareto for run in found.runs] == undominated
    assert (found.no_chord is None) == bool(found.areas) == (long[0] > base[0])
    if found.areas:
        grid = np.linspace(base[0], long[0], 401)
        for area in found.areas:
            part = [p for p, o in zip(points, made, strict=True) if o.method == area.method or area.method is None]
            heights = [best_mix([base, long, *part], t)[0] for t in grid]
            assert area.area.value == pytest.approx(np.trapezoid(heights, grid) / (long[0] - base[0]), abs=2e-3)
            if long[1] >= base[1]:
                assert area.gain >= -1e-9


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(runs(), st.booleans())
def test_nothing_that_is_not_a_number_leaves(made, twice):
    """Whatever the outcomes: JSON, both tables, the sentence, and intervals round their values' neighbourhood."""
    if twice:
        made = [dataclasses.replace(o, **{n: np.repeat(getattr(o, n), 2, 1) for n in ARRAYS}) for o in made]
    found = summarize(made, "base", "long", resamples=40)
    content = json.loads(json.dumps(asdict(found), allow_nan=False))
    assert content["runs"][0]["run"] == "base"
    texts = [render_table(found), render_table(found, markdown=True), recommendation(found, 0.05).sentence]
    assert not re.search(r"\b(nan|inf|None)\b", "".join(texts))
    for run in content["runs"]:
        for paired in filter(None, (run["against_base"], run["against_long"])):
            its = paired["difference"]
            assert -1 <= its["low"] < its["high"] <= 1
            assert its["low"] - 1e-12 <= its["value"] <= its["high"] + 1e-12
    for found in [run["accuracy"] for run in content["runs"]] + [area["area"] for area in content["areas"]]:
        assert 0 <= found["value"] <= 1
        assert found["low"] is None or 0 <= found["low"] <= found["high"] <= 1


ARRAYS = ("correct", "tokens", "truncated", "unclosed", "empty")


def test_held_out_gains_by_brute_force():
    """The mixes that are best on one half, at every length there, as accurate as they are on the other half."""
    made = sweep(on_a_chord(["ours"], 3), 12, 5)
    draws = bootstrap.draw(made, 3, 6)
    gains = []
    accuracy, tokens = (x[:40] for x in draws.halves)
    for sides in zip(accuracy, tokens, strict=True):
        for one, other in ((0, 1), (1, 0)):
            points = list(zip(sides[1][one], sides[0][one], strict=True))
            heights = sides[0][other]
            low, high = sorted(t for t, _ in points[:2])
            mixes = [best_mix(points, t) for t in np.linspace(low, high, 801)]
            height = np.mean([(1 - share) * heights[i] + share * heights[j] for _, i, j, share in mixes])
            gains.append(height - (heights[0] + heights[1]) / 2)
    assert held_out_gain(accuracy, tokens, 0, 1, [2, 3, 4]).mean() == pytest.approx(np.mean(gains), abs=2e-3)


@st.composite
def counts(draw):
    problems = draw(st.integers(1, 60))
    gained = draw(st.integers(0, problems))
    return gained, draw(st.integers(0, problems - gained)), problems


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(counts())
def test_the_score_interval_is_of_the_differences_that_the_score_test_leaves(found):
    """By the likeliest shares under each difference, found by trying them."""
    gained, lost, problems = found
    low, high = score_interval(*found)
    shares = np.linspace(0, 1, 20_001)

    def statistic(difference):
        """Of shares p (gained) and q (lost) with p - q the difference, the rest being the same in both."""
        q = shares[(shares + difference >= 0) & (2 * shares + difference <= 1)]
        p = q + difference
        terms = ((gained, p), (lost, q), (problems - gained - lost, 1 - p - q))
        with np.errstate(divide="ignore"):
            likelihood = sum(k * np.log(np.maximum(0, x)) for k, x in terms if k)
        best = likelihood.argmax()
        variance = (p[best] + q[best] - difference**2) / problems
        return ((gained - lost) / problems - difference) / math.sqrt(variance)

    for end, sign in ((low, 1), (high, -1)):
        if abs(end) < 0.99:
            assert statistic(end) == pytest.approx(sign * 1.96, abs=0.02)
    assert score_interval(lost, gained, problems) == pytest.approx((-high, -low))


@pytest.mark.parametrize("problems", [12, 60, 200])
@pytest.mark.parametrize(("differ", "difference"), [(0.1, 0.0), (0.1, -0.05), (0.3, -0.1), (0.02, 0.0)])
def test_the_score_interval_covers_the_difference(problems, differ, difference):
    """By the chances of all the outcomes that there are; and its lower end is above it seldom enough to rely on."""
    binom = pytest.importorskip("scipy.stats").binom
    covered = above = 0.0
    for differing in range(problems + 1):
        chances = binom.pmf(differing, problems, differ) * binom.pmf(
            np.arange(differing + 1), differing, (1 + difference / differ) / 2
        )
        for gained in np.flatnonzero(chances > 1e-9).tolist():
            low, high = score_interval(gained, differing - gained, problems)
            covered += chances[gained] * (low <= difference <= high)
            above += chances[gained] * (low > difference)
    assert covered > 0.935
    assert above < 0.035


def test_the_interval_where_no_answers_differ():
    z2 = 1.959963984540054**2
    for problems in (12, 200):
        assert score_interval(0, 0, problems) == pytest.approx((-z2 / (problems + z2), z2 / (problems + z2)))
    low, high = adjusted_interval([0.0] * 12)
    assert low == -high == pytest.approx(-1.96 * math.sqrt(2 / 14 / 14), abs=1e-3)


@pytest.mark.parametrize(("gained", "lost", "problems"), [(0, 0, 12), (3, 4, 100), (1, 5, 200), (10, 4, 60)])
@pytest.mark.parametrize("margin", [0.01, 0.05, 0.2])
def test_how_many_problems_are_enough(gained, lost, problems, margin):
    enough = enough_problems(gained, lost, problems, margin)
    if (gained - lost) / problems <= -margin:
        assert enough is None
        return

    def low(count):
        return score_interval(gained * count / problems, lost * count / problems, count)[0]

    assert low(enough) >= -margin
    assert enough == 1 or low(enough - 1) < -margin


# by simulation


def test_the_interval_of_a_difference_covers_it():
    points = {"base": (0.5, 30.0), "long": (0.8, 300.0), "ours x=1": (0.65, 90.0)}
    truth = summarize(sweep(points, 200_000, 0), "base", "long", resamples=2)["ours x=1"]
    covered = np.zeros(2)
    for seed in range(200):
        found = summarize(sweep(points, 120, seed + 1), "base", "long", seed=seed, resamples=300)["ours x=1"]
        covered += [
            estimate.low <= value <= estimate.high
            for estimate, value in (
                (found.against_long.difference, truth.against_long.difference.value),
                (found.above_chord, truth.above_chord.value),
            )
        ]
    assert np.all((covered >= 182) & (covered <= 198)), covered  # 190 expected, 3 of them a standard deviation


def test_the_interval_of_several_samples_covers_the_difference_of_few_problems():
    """Also where hardly any answers differ, of which the bootstrap knows nothing."""
    covered = narrow = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        one = rng.random((12, 4)) < 0.99
        other = outcomes("long", rng.random((12, 4)) < 0.96, np.full((12, 4), 9))
        made = [outcomes("base", one, np.full((12, 4), 3)), other]
        found = summarize(made, "base", "long", seed=seed, resamples=100)["base"].against_long
        covered += found.difference.low <= 0.03 <= found.difference.high
        narrow += found.difference.high - found.difference.low < 0.1
        assert (found.gained, found.lost, found.mcnemar) == (None, None, None)
    assert covered >= 190
    assert narrow == 0


def test_runs_on_the_chord_gain_by_luck_but_not_on_held_out_problems():
    gains, held_out, shown, differences = [], [], 0, 0
    for seed in range(60):
        found = summarize(sweep(on_a_chord(["ours", "theirs"], 8), 80, seed), "base", "long", resamples=200)
        area = found.areas[0]
        gains.append(area.gain)
        held_out.append(area.held_out.value)
        shown += area.held_out.low > 0
        (difference,) = found.differences
        differences += not difference.difference.low <= 0 <= difference.difference.high
    assert np.mean(gains) > 0.025
    assert abs(np.mean(held_out)) < 0.01
    assert shown <= 3
    assert differences <= 6


@pytest.mark.parametrize("shape", ["saturated half-way", "above the long model"])
def test_held_out_gains_are_not_biased(shape):
    """Also where the front has reached its height before the long model's tokens, whose end it then has for nothing."""
    area, chord = fronts.true_areas(shape, 5)
    rng, found, covered = np.random.default_rng(4), [], 0
    for seed in range(40):
        made = fronts.sweep(rng, shape, fronts.EVEN, 200, 5)
        its = summarize(made, "base", "long", seed=seed, resamples=100).areas[0].held_out
        found.append(its.value)
        covered += its.low <= area - chord <= its.high
    assert np.mean(found) == pytest.approx(area - chord, abs=0.015)
    assert covered >= 34


def test_the_simulated_fronts_are_as_they_say():
    for shape, height in fronts.SHAPES.items():
        made = fronts.sweep(np.random.default_rng(0), shape, fronts.EVEN, 100_000, 2)[:4]
        assert [run.correct.mean() for run in made] == pytest.approx(
            [height(x) for x in (0, 1, 1 / 3, 2 / 3)], abs=0.01
        )
        assert [run.tokens.mean() for run in made] == pytest.approx([30, 300, 120, 210], rel=0.02)
    gains = {shape: np.subtract(*fronts.true_areas(shape, 5)) for shape in fronts.SHAPES}
    assert gains["on the chord"] == pytest.approx(0)
    assert gains["saturated half-way"] == pytest.approx(0.15)
    assert gains["above the long model"] == pytest.approx((0.5 / 2 + 0.6 + 0.7 + 0.8 + 0.9 + 0.9 + 0.9 / 2) / 6 - 0.65)


def test_the_interval_of_an_area_covers_it_more_often_than_the_percentile_one():
    points = on_a_chord(["ours"], 5)
    truth = summarize(sweep(points, 200_000, 0), "base", "long", resamples=2).areas[0].area.value
    ours = theirs = 0
    for seed in range(100):
        found = summarize(sweep(points, 100, seed + 1), "base", "long", seed=seed, resamples=200).areas[0].area
        ours += found.low <= truth <= found.high
        theirs += 2 * found.value - found.high <= truth <= 2 * found.value - found.low
    assert ours >= 80
    assert ours > theirs + 5


def test_a_real_gain_is_found_on_held_out_problems():
    points = on_a_chord(["ours", "theirs"], 5)
    points |= {name: point for name, point in on_a_chord(["ours"], 5, bulge=0.12).items() if name.startswith("ours")}
    found = summarize(sweep(points, 1000, 0), "base", "long", resamples=300)
    ours, theirs, _ = found.areas
    assert 0.05 < ours.held_out.low < ours.held_out.value < ours.gain + 0.005 < 0.12
    assert theirs.held_out.low < 0 < theirs.held_out.high
    assert found.differences[0].difference.low > 0.03


def test_the_bootstrap_is_that_of_scipy():
    from scipy.stats import bootstrap

    made = sweep({"base": (0.5, 30.0), "long": (0.8, 300.0)}, 100, 1)
    made = [dataclasses.replace(o, **{n: np.repeat(getattr(o, n), 2, 1) for n in ARRAYS}) for o in made]
    found = summarize(made, "base", "long", resamples=20_000)["base"].accuracy
    right = made[0].correct.mean(axis=1)
    theirs = bootstrap([right], np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2))
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.011)


def test_the_seed_alone_decides(monkeypatch):
    made = sweep(on_a_chord(["ours"], 2), 50, 0)
    first = asdict(summarize(made, "base", "long", seed=1, resamples=200))
    assert asdict(summarize(made, "base", "long", seed=1, resamples=200)) == first
    other = asdict(summarize(made, "base", "long", seed=2, resamples=200))
    assert other["areas"] != first["areas"]
    # the other runs of a sweep don't change what a run's interval is
    fewer = asdict(summarize(made[:3], "base", "long", seed=1, resamples=200))
    assert fewer["runs"][2]["above_chord"] == first["runs"][2]["above_chord"]
    monkeypatch.setattr(bootstrap, "_BLOCK", 50 * 7)  # blocks of seven resamples
    blocks = asdict(summarize(made, "base", "long", seed=1, resamples=200))
    for run, whole in zip(blocks["runs"], first["runs"], strict=True):
        assert run["accuracy"] == whole["accuracy"]
    ends = [x["areas"][0]["area"][end] for x in (blocks, first) for end in ("low", "high")]
    assert ends[:2] == pytest.approx(ends[2:], abs=0.05)


# edges


def test_several_samples():
    """The same samples twice say nothing new; an interval over problems knows that."""
    made = sweep(on_a_chord(["ours"], 2), 60, 0)
    twice = [dataclasses.replace(o, **{n: np.repeat(getattr(o, n), 2, 1) for n in ARRAYS}) for o in made]
    one, two = (summarize(x, "base", "long", resamples=400) for x in (made, twice))
    assert (one.samples, two.samples) == (1, 2)
    assert two.areas == one.areas
    for single, double in zip(one.runs, two.runs, strict=True):
        assert double.tokens_mean == single.tokens_mean
        assert double.accuracy.value == single.accuracy.value
        assert (double.accuracy.low, double.accuracy.high) == pytest.approx(
            (single.accuracy.low, single.accuracy.high), abs=0.03
        )
        for paired, of_one in ((double.against_base, single.against_base), (double.against_long, single.against_long)):
            assert (paired is None) == (of_one is None)
            if paired:
                assert paired.difference.value == of_one.difference.value
                ends = [(its.difference.low, its.difference.high) for its in (paired, of_one)]
                assert ends[0] == pytest.approx(ends[1], abs=0.03)
                assert (paired.gained, paired.lost, paired.mcnemar) == (None, None, None)
                assert of_one.mcnemar is not None


def test_a_single_problem():
    found = summarize([outcomes("base", [0], [3]), outcomes("long", [1], [9]), outcomes("ours x=1", [1], [6])], *ENDS)
    assert found["long"].accuracy.low == pytest.approx(0.2065, abs=1e-4)  # Wilson's
    its = found["ours x=1"].against_long.difference
    assert (its.value, its.low, its.high) == pytest.approx((0.0, -0.7935, 0.7935), abs=1e-4)
    assert dataclasses.astuple(found["ours x=1"].above_chord) == (0.5, None, None)
    assert found.areas[0].held_out is None
    assert found.areas[0].area.value == pytest.approx(0.75)
    assert "on 1 problem" in recommendation(found, 0.05).sentence


ENDS = ("base", "long")


@pytest.mark.parametrize("right", [0, 1])
def test_all_alike(right):
    made = [outcomes(name, [right] * 5, [4, 5, 6, 7, 8]) for name in ("base", "long", "ours x=1", "ours x=2")]
    found = summarize(made, *ENDS)
    assert found.no_chord == (
        "long isn't longer than base (6.0 and 6.0 mean tokens), so there is neither a chord nor an area"
    )
    assert found.areas == found.differences == ()
    assert found["ours x=1"].above_chord is None
    assert all(run.pareto for run in found.runs)
    assert found["ours x=1"].against_long.mcnemar == 1.0
    assert f"{found.no_chord}." in render_table(found, markdown=True)
    assert recommendation(found, 0.05).sentence.endswith(": no run is shorter.")


def test_a_long_model_that_is_less_accurate():
    made = [
        outcomes("base", [1, 1, 1, 0], [10] * 4),
        outcomes("long", [1, 0, 0, 0], [30] * 4),
        outcomes("ours x=1", [1, 1, 0, 0], [20] * 4),
    ]
    found = summarize(made, *ENDS)
    assert found["ours x=1"].above_chord.value == 0.0
    assert found.front == ((10.0, 0.75),)
    assert found.areas[0].area.value == 0.75
    assert found.areas[0].gain == 0.25
    text = " ".join(render_table(found).split())
    assert "long is less accurate than base: the chord falls, and a run above it may still be worse" in text


@pytest.mark.parametrize(
    ("correct", "tokens"), [(np.zeros((0, 1)), np.zeros((0, 1))), (np.zeros((3, 0)), np.zeros((3, 0)))]
)
def test_no_outcomes_are_refused(correct, tokens):
    with pytest.raises(ValueError, match=r"base: expected arrays \[problem, sample\]"):
        Outcomes("base", None, {}, correct.astype(bool), tokens)


def test_what_does_not_belong_together_is_refused():
    base, long = SMALL[:2]
    with pytest.raises(ValueError, match="one shape"):
        dataclasses.replace(base, tokens=base.tokens[:2])
    for made, ends in (
        ([base, base, long], ENDS),
        ([base, long, outcomes("ours x=1", [1], [1])], ENDS),
        ([base, long], ("base", "longer")),
        ([base, long], ("base", "base")),
    ):
        with pytest.raises(ValueError, match="expected"):
            summarize(made, *ends)


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(FimError, match=re.escape("pip install 'mergekit-fim[sweep]'")):
        summarize(SMALL, *ENDS)


def test_the_modules_import_neither_scipy_nor_matplotlib():
    code = (
        "import sys; from mergekit_fim.evaluate.front import figure, statistics, table\n"
        "print([name for name in ('scipy', 'matplotlib', 'torch', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# which run to keep


def alike(name, wrong, tokens, problems=100):
    """A run that is right but on the first `wrong` problems."""
    return outcomes(name, [i >= wrong for i in range(problems)], [tokens] * problems)


def test_the_shortest_run_that_is_within_the_margin_is_recommended():
    made = [alike("base", 50, 40), alike("long", 14, 310), alike("fim_ties alpha_mean=0.2", 30, 80),
            alike("fim_ties alpha_mean=0.35", 15, 120), alike("fim_ties alpha_mean=0.5", 10, 200)]  # fmt: skip
    found = recommendation(summarize(made, *ENDS), 0.06)
    assert (found.run, found.margin) == ("fim_ties alpha_mean=0.35", 0.06)
    assert found.sentence == (
        "fim_ties alpha_mean=0.35 is the shortest run that the interval shows to be at most 0.06 less accurate than "
        "long: 0.85 [0.77, 0.91] at 120 tokens instead of 310 (0.39 of the length); difference -0.01 [-0.05, 0.03] on "
        "100 problems."
    )
    # the lower end is -0.054
    found = recommendation(summarize(made, *ENDS), 0.05)
    assert found.run == "fim_ties alpha_mean=0.5"
    found = recommendation(summarize(made[:-1], *ENDS), 0.05)
    assert found.run == "long"
    assert found.sentence == (
        "long itself is the run to keep, 0.86 [0.78, 0.91] at 310 tokens on 100 problems: no shorter run is shown to "
        "be at most 0.05 less accurate; of fim_ties alpha_mean=0.35, whose difference is -0.01 [-0.05, 0.03], about "
        "120 problems might show it."
    )


def test_the_long_model_is_recommended_where_no_run_came_near():
    made = [alike("base", 50, 40), alike("long", 14, 310), alike("ours x=1", 40, 80), alike("ours x=2", 10, 400)]
    found = recommendation(summarize(made, *ENDS), 0.05)
    assert found.run == "long"
    assert found.sentence == (
        "long itself is the run to keep, 0.86 [0.78, 0.91] at 310 tokens on 100 problems: no shorter run is shown to "
        "be at most 0.05 less accurate, and more problems wouldn't help, as none came within that."
    )


def test_the_base_is_recommended_where_length_buys_nothing():
    made = [alike("base", 15, 40), alike("long", 14, 310), alike("ours x=1", 14, 80)]
    assert recommendation(summarize(made, *ENDS), 0.1).run == "base"


def test_few_problems_keep_the_long_model():
    """Of twelve problems nothing is known: not where no answers differ, and not where one run is right on none."""
    made = [alike("base", 12, 40, 12), alike("long", 11, 310, 12), alike("ours x=1", 11, 80, 12)]
    found = recommendation(summarize(made, *ENDS), 0.05)
    assert found.run == "long"
    assert "of ours x=1, whose difference is +0.00 [-0.24, 0.24], about 73 problems might show it" in found.sentence
    twice = [dataclasses.replace(o, **{n: np.repeat(getattr(o, n), 2, 1) for n in ARRAYS}) for o in made]
    found = recommendation(summarize(twice, *ENDS, resamples=100), 0.05)
    assert found.run == "long"
    assert re.search(r"of ours x=1, whose difference is \+0\.00 \[-0\.20, 0\.20\], about \d+ problems", found.sentence)


def test_without_a_margin_the_run_must_be_better():
    made = [alike("base", 50, 40), alike("long", 14, 310), alike("ours x=1", 14, 80), alike("ours x=2", 5, 200)]
    found = recommendation(summarize(made, *ENDS), 0.0)
    assert found.run == "ours x=2"
    assert " that the interval shows to be no less accurate than long: " in found.sentence


# tables


def test_the_table_in_markdown():
    made = [*SMALL, outcomes("a|b", [1, 1, 0, 1], [9, 9, 9, 9])]
    runs_table, areas, *notes = render_table(summarize(made, *ENDS), markdown=True).split("\n\n")
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in runs_table.splitlines()]
    assert len({len(row) for row in rows}) == 1
    header, rule, *body = [[cell.strip() for cell in row] for row in rows]
    assert set(rule) == {"---"}
    assert [row[0] for row in body] == ["base", "long", "ours x=1", "theirs x=1", "theirs x=2", r"a\|b"]
    found = dict(zip(header, body[1], strict=True))
    assert found == {
        "run": "long", "Pareto": "", "accuracy": "0.75 [0.30, 0.95]", "tokens, mean (median)": "30.0 (30.0)",
        "of the right answers": "26.7 (20.0)", "of long's length": "1.00", "truncated": "25.0 %", "unclosed": "50.0 %",
        "empty": "0.0 %", "above the chord": "", "against base": "+0.25 [-0.36, 0.70]", "against long": "",
        "McNemar's p": "", "tokens/s": "",
    }  # fmt: skip
    assert dict(zip(header, body[0], strict=True))["tokens/s"] == "5.0"
    assert dict(zip(header, body[4], strict=True))["of the right answers"] == ""
    assert dict(zip(header, body[4], strict=True))["McNemar's p"] == "0.25"
    assert dict(zip(header, body[5], strict=True))["Pareto"] == r"\*"
    assert areas.splitlines()[2].startswith("| ours | 1 | 0.719 [")
    assert "+0.094" in areas.splitlines()[2]
    assert areas.splitlines()[-1].startswith("| ours minus theirs |  | +0.094 [")
    assert any("cut off at the limit of tokens in long:" in note for note in notes)
    assert any("different numbers of runs" in note for note in notes)


def test_the_table_on_a_terminal():
    points = {"base": (0.5, 30.0), "long": (0.8, 300.0), "fim_ties alpha_mean=0.35": (0.75, 100.0)}
    points |= {"task_arithmetic weight=0.2": (0.6, 100.0), "task_arithmetic weight=0.5": (0.7, 200.0)}
    text = render_table(summarize(sweep(points, 100, 0), *ENDS))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    names = [line[:20].strip(" *") for line in lines[1:8]]
    assert names == ["base", "long", "fim_ties", "alpha_mean=0.35", "task_arithmetic", "weight=0.2", "weight=0.5"]
    assert "-0.00" not in text


def test_the_table_of_intervals_in_the_docs_is_what_its_lines_print(capsys):
    (page,) = [
        text for text in (p.read_text(encoding="utf-8") for p in ROOT.glob("docs/*.md")) if "import wilson" in text
    ]
    (block,) = [b for b in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M) if "import wilson" in b]
    exec(compile(block, "docs", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("\n") == 6
    assert printed in page


def test_more_problems_get_more_decimals():
    text = render_table(summarize(sweep(on_a_chord(["ours"], 1), 1000, 0), *ENDS))
    assert re.search(r"base +0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", text)


# the figure


@pytest.fixture
def content():
    points = on_a_chord(["fim_ties", "task_arithmetic"], 5, bulge=0.05)
    made = sweep(points, 100, 5)[::-1]  # not in order of strength
    return asdict(summarize([*made, outcomes("third", [1] * 100, [50] * 100)], *ENDS, resamples=50))


def test_the_figure_shows_every_run_where_it_belongs(content):
    (panel,) = draw(content).axes
    by_label = {line.get_label(): line for line in panel.lines}
    runs_of = {run["run"]: run for run in content["runs"]}
    for method in ("fim_ties", "task_arithmetic"):
        expected = [runs_of[f"{method} x={i}"] for i in range(1, 6)]
        found = by_label[method]
        assert list(found.get_xdata()) == [run["tokens_mean"] for run in expected]
        assert list(found.get_ydata()) == [run["accuracy"]["value"] for run in expected]
    chord = next(line for label, line in by_label.items() if label.startswith("chord"))
    assert chord.get_xydata().tolist() == [[runs_of[n]["tokens_mean"], runs_of[n]["accuracy"]["value"]] for n in ENDS]
    bars = {tuple(map(tuple, bar)) for bars in panel.collections for bar in bars.get_segments()}
    assert bars == {
        tuple((run["tokens_mean"], run["accuracy"][end]) for end in ("low", "high")) for run in content["runs"]
    }
    corners = by_label["front of all runs"].get_xydata().tolist()
    assert corners[: len(content["front"])] == [list(corner) for corner in content["front"]]
    assert {line.get_marker() for line in (by_label["fim_ties"], by_label["task_arithmetic"])} == {"o", "s"}


@pytest.mark.parametrize("crowded", [False, True])
def test_no_label_stands_on_another_or_on_a_point(content, crowded):
    if crowded:  # five runs of either method within a tenth of the axis
        names = ["base", "long", *[f"{method} x=0.{i}" for method in ("a", "b") for i in range(1, 6)]]
        right = [10, 18, 14, 15, 14, 15, 14, 14, 15, 14, 15, 14]
        made = [alike(name, 20 - r, t, 20) for name, r, t in zip(names, right, [10, 100, *range(50, 60)], strict=True)]
        content = asdict(summarize(made, *ENDS, resamples=20))
    figure = draw(content)
    (panel,) = figure.axes
    assert len(panel.texts) == len(content["runs"])
    boxes = [text.get_window_extent() for text in panel.texts]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    points = panel.transData.transform([(r["tokens_mean"], r["accuracy"]["value"]) for r in content["runs"]])
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_lines_join_runs_that_differ_in_their_strength_alone():
    names = [f"ours alpha_mean={a} density={d}" for a in (0.5, 0.2) for d in (0.2, 0.4)]
    made = [*SMALL[:2], *[outcomes(name, [1, 0, 1, 1], [10 + i] * 4) for i, name in enumerate(names)]]
    (panel,) = draw(asdict(summarize(made, *ENDS, resamples=20))).axes
    lines = [list(line.get_xdata()) for line in panel.lines if line.get_marker() == "o"]
    assert lines == [[12, 10], [13, 11]]
    assert [text.get_text() for text in panel.texts][:4] == ["0.5, 0.2", "0.5, 0.4", "0.2, 0.2", "0.2, 0.4"]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_figure_is_the_same_every_time(content, tmp_path, ending):
    written = []
    for name in ("a", "b"):
        write_figure(content, str(tmp_path / f"{name}.{ending}"))
        written.append((tmp_path / f"{name}.{ending}").read_bytes())
    assert written[0] == written[1]
    assert written[0].startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert b"dc:date" not in written[0]
    assert len(list(tmp_path.iterdir())) == 2


def test_the_figure_of_the_least(tmp_path):
    """One problem, no merges, no chord, names with what matplotlib takes for formulas."""
    made = [outcomes("$base$", [0], [0]), outcomes("long", [0], [0])]
    write_figure(json.loads(json.dumps(asdict(summarize(made, "$base$", "long")))), str(tmp_path / "a.svg"))
    assert "<!-- $base$ -->" in (tmp_path / "a.svg").read_text()


def test_a_figure_that_cannot_be_drawn(content, tmp_path, monkeypatch):
    with pytest.raises(FimError, match=r"\.png or \.svg"):
        write_figure(content, str(tmp_path / "a.pdf"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FimError, match="pip install"):
        write_figure(content, str(tmp_path / "a.png"))
    assert not list(tmp_path.iterdir())
