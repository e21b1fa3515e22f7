"""Rows from anywhere become outcomes on the same problems, or one line says why they can't."""

import itertools
import random

import numpy as np
import pytest

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.front.findings import find
from mergekit_fim.evaluate.front.gathered import gather
from mergekit_fim.evaluate.front.statistics import summarize
from mergekit_fim.evaluate.records import Row


def row(run="base", problem="1", correct=1.0, tokens=5.0, *, method=None, strength=None, source="s", sample=0, **more):
    settings = {} if strength is None else {"strength": strength}
    return Row(run, method, settings, source, problem, sample, correct, tokens, **more)


ROWS = [
    *(row("base", problem, correct, tokens) for problem, correct, tokens in (("2", 1, 3), ("1", 0, 4), ("3", 0, 6))),
    *(row("long", problem, correct, 9) for problem, correct in (("1", 1), ("2", 0), ("3", 1))),
]


def test_runs_share_the_problems_and_their_order():
    base, long = gather({"a": ROWS}).outcomes
    assert (base.run, base.method, base.settings) == ("base", None, {})
    assert base.correct.tolist() == [[True], [False], [False]]
    assert base.tokens.tolist() == [[3], [4], [6]]
    assert long.correct.tolist() == [[False], [True], [True]]  # in the order of the first run
    assert (base.truncated, base.unclosed, base.empty, base.seconds) == (None,) * 4


def test_the_order_of_rows_and_their_results_change_nothing():
    every = itertools.product("ab", range(5), (0, 1))
    rows = [row(run, str(problem), problem % 2, 7, sample=sample) for run, problem, sample in every]
    expected = gather({"one": rows}).outcomes
    rest = rows[1:]
    random.Random(0).shuffle(rest)
    found = gather({"one": rows[:1] + rest[:9], "two": rest[6:] + rows[:1]})  # some rows are in both
    by_name = {its.run: its for its in found.outcomes}
    for its in expected:
        assert sorted(by_name[its.run].correct.tolist()) == sorted(its.correct.tolist())
        assert by_name[its.run].correct.shape == (5, 2)


def test_what_is_known_of_all_answers_is_kept():
    rows = [row(problem=str(i), truncated=i == 0, unclosed=False, seconds=0.5) for i in range(2)]
    (its,) = gather({"a": rows}).outcomes
    assert its.truncated.tolist() == [[True], [False]]
    assert its.unclosed.tolist() == [[False], [False]]
    assert its.empty is None
    assert its.seconds.tolist() == [[0.5], [0.5]]
    (its,) = gather({"a": [*rows, row(problem="3", seconds=1.0)]}).outcomes
    assert its.truncated is None
    assert its.seconds.shape == (3, 1)


def test_partly_right_answers_have_the_bootstraps_intervals():
    rng = np.random.default_rng(0)
    made = [
        row(run, str(i), value, tokens)
        for run, mean, tokens in (("base", 0.3, 10), ("long", 0.6, 50))
        for i, value in enumerate(rng.beta(4 * mean, 4 * (1 - mean), size=50))
    ]
    base, long = gather({"a": made}).outcomes
    assert not base.is_binary
    found = summarize([base, long], "base", "long", resamples=400)
    assert found["long"].accuracy.value == pytest.approx(long.correct.mean())
    error = long.correct.std() / 50**0.5
    assert found["long"].accuracy.low == pytest.approx(long.correct.mean() - 1.96 * error, abs=0.3 * error)
    assert (found["long"].against_base.mcnemar, found["long"].against_base.gained) == (None, None)
    assert found["long"].against_base.difference.low > 0
    assert found["long"].correct_tokens_mean is None  # none is wholly right


def test_findings_are_by_source_and_models_as_they_are_come_first():
    rows = [row("m", method="x", strength=0.5), row("base"), row("long", tokens=9)]
    rows += [its._replace(source="t", correct=0.0) for its in rows]
    found = find(gather({"a": rows}), ("base", ["long"]), seed=0, margin=0.05)
    assert [run.run for run in found.summary.runs] == ["base", "long", "m"]
    assert {source: its["m"].accuracy.value for source, its in found.by_source.items()} == {"s": 1.0, "t": 0.0}
    assert found.summary["m"].accuracy.value == 0.5


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ({"a.csv": [], "b.csv": []}, ["a.csv, b.csv", "found none"]),
        ({"a.csv": [*ROWS, row(problem="3")]}, ["a.csv", "found two of base to problem 3 of s", "`sample`"]),
        ({"a.csv": ROWS, "b.csv": [row(problem="3", correct=1.0, tokens=6)]}, ["b.csv", "has in a.csv", "problem 3"]),
        ({"a.csv": ROWS, "b.csv": [row(problem="3", correct=0, tokens=7)]}, ["b.csv", "has in a.csv", "problem 3"]),
        ({"a.csv": ROWS[:-1]}, ["no answer of long to problem 3 of s (1 of 6 are missing)"]),
        ({"a.csv": [row(source=""), row("long", "2", source="")]}, ["no answer of base to problem 2 (2 of 4"]),
        ({"a.csv": ROWS[1:]}, ["no answer of base to problem 2 of s", "1 of 6"]),
        ({"a.csv": [*ROWS, row(sample=1)]}, ["no answer of base to problem 2 of s (sample 1)", "5 of 12"]),
        ({"a.csv": [*ROWS, row("m", method="x"), row("m", "2", method="y")]}, ["a.csv", "run m", "x and y"]),
        (
            {"a.csv": [*ROWS, row("m", method="x", strength=1.0), row("m", "2", method="x", strength=2.0)]},
            ["a.csv", "one family and strength", "x 1.0 and x 2.0"],
        ),
    ],
)
def test_rows_that_do_not_belong_together(results, words):
    with pytest.raises(FimError) as error:
        gather(results)
    for word in words:
        assert word in str(error.value)


@pytest.mark.slow
def test_more_answers_are_due_than_can_be_numbered():
    """Each row has a run, a problem and a sample of its own."""
    count = 1 << 21
    with pytest.raises(FimError, match="2,097,152 rows of 2,097,152 runs"):
        gather({"a": (row(str(i), str(i), sample=i) for i in range(count))})
