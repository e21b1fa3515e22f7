"""Rows of graded answers, from anywhere -> the outcomes of every run, on the same problems in the same order."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_fim.errors import FimError, brief
from mergekit_fim.evaluate.front.bootstrap import Outcomes
from mergekit_fim.evaluate.records import Row

_Place = tuple[str, tuple[str, str], int]  # of an answer: run, (source, problem), sample


@dataclass(frozen=True, eq=False)
class Gathered:
    """The outcomes of every run, and the source of each problem, in the problems' order."""

    outcomes: tuple[Outcomes, ...]
    sources: tuple[str, ...]


def gather(results: Mapping[str, Iterable[Row]]) -> Gathered:
    """Put rows together. Runs and problems are in the order in which they first come.

    A run may be in several results. Then its rows add up, and a row that is in two of them must say the same.

    Args:
        results: rows by the name of where they are from. They are read once, and take about 650 bytes each.

    Raises:
        FimError: there are none, one is there twice or missing, or two of one run contradict each other.
    """
    answers = _read(results)
    if not answers:
        raise FimError(f"{', '.join(results)}: expected rows of graded answers, found none; add some")
    runs = list(dict.fromkeys(run for run, _, _ in answers))
    problems = list(dict.fromkeys(problem for _, problem, _ in answers))
    samples = list(dict.fromkeys(sample for _, _, sample in answers))
    due = len(runs) * len(problems) * len(samples)
    if len(answers) < due:
        missing = next(place for place in itertools.product(runs, problems, samples) if place not in answers)
        raise FimError(
            f"expected every run to answer every problem, found no answer of {_name(missing)} "
            f"({due - len(answers):,} of {due:,} are missing); add them, or leave the run out"
        )
    shape = len(problems), len(samples)
    own = ([answers[place] for place in itertools.product([run], problems, samples)] for run in runs)
    return Gathered(tuple(_outcomes(rows, shape) for rows in own), tuple(source for source, _ in problems))


def _read(results: Mapping[str, Iterable[Row]]) -> dict[_Place, Row]:
    """Put the rows of all results in their places, and check that they go together."""
    answers: dict[_Place, Row] = {}
    read_from: dict[_Place, str] = {}
    first: dict[str, Row] = {}
    for where, rows in results.items():
        for row in rows:
            known = first.setdefault(row.run, row)
            if (known.method, known.settings) != (row.method, row.settings):
                one, other = (" ".join(map(str, (its.method, *its.settings.values()))) for its in (known, row))
                raise FimError(
                    f"{where}: expected one family and strength of the run {brief(row.run)}, found {brief(one)} and "
                    f"{brief(other)}; give each a name of its own"
                )
            place = row.run, (row.source, row.problem), row.sample
            before, there = read_from.get(place), answers.setdefault(place, row)
            if before == where:
                raise FimError(
                    f"{where}: expected one row of each answer, found two of {_name(place)}; remove one, or number "
                    "answers to the same problem in a column `sample`"
                )
            if (there.correct, there.tokens) != (row.correct, row.tokens):
                raise FimError(
                    f"{where}: expected the answers that a run of this name has in {before}, found another one of "
                    f"{_name(place)}; leave one of the runs out, or rename it"
                )
            read_from[place] = where
    return answers


def _name(place: _Place) -> str:
    """Name an answer for a message."""
    run, (source, problem), sample = place
    return brief(f"{run} to problem {problem}{f' of {source}' if source else ''} (sample {sample})")


def _outcomes(rows: Sequence[Row], shape: tuple[int, int]) -> Outcomes:
    """Make arrays [problem, sample] of a run's rows."""
    correct = np.array([row.correct for row in rows], float).reshape(shape)

    def known(name: str, dtype: type) -> npt.NDArray[Any] | None:
        values = [getattr(row, name) for row in rows]
        return None if None in values else np.array(values, dtype).reshape(shape)

    return Outcomes(
        rows[0].run,
        rows[0].method,
        rows[0].settings,
        correct=correct == 1 if np.isin(correct, (0, 1)).all() else correct,
        tokens=np.array([row.tokens for row in rows], float).reshape(shape),
        seconds=known("seconds", float),
        **{name: known(name, bool) for name in ("truncated", "unclosed", "empty")},
    )
