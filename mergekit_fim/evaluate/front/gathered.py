"""Rows of graded answers, from anywhere -> the outcomes of every run, on the same problems in the same order."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_fim.errors import FimError, brief
from mergekit_fim.evaluate.front.bootstrap import Outcomes
from mergekit_fim.evaluate.records import Row

_FLAGS, _UNKNOWN = ("truncated", "unclosed", "empty"), -1
# A row: numbers for what it is of, and what it says.
_CELL = np.dtype(
    [(name, np.int32) for name in ("results", "run", "problem", "sample")]
    + [(name, np.float64) for name in ("correct", "tokens", "seconds")]
    + [(name, np.int8) for name in _FLAGS]
)
_Cells = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Gathered:
    """The outcomes of every run, and the source of each problem, in the problems' order."""

    outcomes: tuple[Outcomes, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class _Names:
    """What rows are of, each with its number in the order in which it first came."""

    runs: dict[str, int] = field(default_factory=dict)
    problems: dict[tuple[str, str], int] = field(default_factory=dict)  # source, problem
    samples: dict[int, int] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.runs), len(self.problems), len(self.samples)

    def of(self, run: int, problem: int, sample: int) -> str:
        """Name an answer for a message."""
        source, its = list(self.problems)[problem]
        names = [f"{list(self.runs)[run]} to problem {its}"]
        names += [f"of {source}"] if source else []
        names += [f"(sample {list(self.samples)[sample]})"] if len(self.samples) > 1 else []
        return brief(" ".join(names))


def gather(results: Mapping[str, Iterable[Row]]) -> Gathered:
    """Put rows together. Runs and problems are in the order in which they first come.

    A run may be in several results. Then its rows add up, and a row that is in two of them must say the same.

    Args:
        results: rows by the name of where they are from. They are read once, and take about 100 bytes each.

    Raises:
        FimError: there are none, one is there twice or missing, or two of one run contradict each other.
    """
    names, told = _Names(), dict[str, tuple[str | None, Mapping[str, Any]]]()
    cells = np.fromiter(_cells(results, names, told), _CELL)
    if not len(cells):
        raise FimError(f"{', '.join(results)}: expected rows of graded answers, found none; add some")
    if math.prod(names.shape) > np.iinfo(np.int64).max:  # more than can be numbered
        runs, problems, samples = names.shape
        raise FimError(
            f"expected every run to answer every problem, found {len(cells):,} rows of {runs:,} runs, {problems:,} "
            f"problems and {samples:,} samples; check the columns"
        )
    places = np.ravel_multi_index((cells["run"], cells["problem"], cells["sample"]), names.shape)
    order = np.argsort(places, kind="stable")
    again = np.append(False, np.diff(places[order]) == 0)
    twice = np.flatnonzero(again)
    _check_same(cells[order[twice - 1]], cells[order[twice]], list(results), names)
    order = order[~again]
    _check_complete(places[order], names)
    table = cells[order].reshape(names.shape)
    return Gathered(
        tuple(_outcomes(run, *told[run], its) for run, its in zip(names.runs, table, strict=True)),
        tuple(source for source, _ in names.problems),
    )


def _cells(
    results: Mapping[str, Iterable[Row]], names: _Names, told: dict[str, tuple[str | None, Mapping[str, Any]]]
) -> Iterator[tuple[float, ...]]:
    """Put each row in numbers, and gather the names, and what is told of each run: its family and settings."""
    runs, problems, samples = names.runs, names.problems, names.samples
    for number, (where, rows) in enumerate(results.items()):
        for row in rows:
            own = (row.method, row.settings)
            if told.setdefault(row.run, own) != own:
                one, other = (" ".join(map(str, (method, *its.values()))) for method, its in (told[row.run], own))
                raise FimError(
                    f"{where}: expected one family and strength of the run {brief(row.run)}, found {brief(one)} and "
                    f"{brief(other)}; give each a name of its own"
                )
            yield (
                number,
                runs.setdefault(row.run, len(runs)),
                problems.setdefault((row.source, row.problem), len(problems)),
                samples.setdefault(row.sample, len(samples)),
                row.correct,
                row.tokens,
                np.nan if row.seconds is None else row.seconds,
                *(_UNKNOWN if flag is None else flag for flag in (row.truncated, row.unclosed, row.empty)),
            )


def _check_same(first: _Cells, second: _Cells, results: Sequence[str], names: _Names) -> None:
    """Check pairs of cells [pair] that are of the same answer: they must be of two results, and say the same."""
    is_one = first["results"] == second["results"]
    differ = is_one | (first["correct"] != second["correct"]) | (first["tokens"] != second["tokens"])
    if not differ.any():
        return
    i = int(differ.argmax())
    one, other = results[first[i]["results"]], results[second[i]["results"]]
    what = names.of(*(int(second[i][name]) for name in ("run", "problem", "sample")))
    if is_one[i]:
        raise FimError(
            f"{one}: expected one row of each answer, found two of {what}; remove one, or number answers to the same "
            "problem in a column `sample`"
        )
    raise FimError(
        f"{other}: expected the answers that a run of this name has in {one}, found another one of {what}; leave one "
        "of the runs out, or rename it"
    )


def _check_complete(places: npt.NDArray[np.int64], names: _Names) -> None:
    """Check that every run has answered everything, by the places [answer] of what there is, in order."""
    due = math.prod(names.shape)
    if len(places) < due:
        first = (np.append(places, due) != np.arange(len(places) + 1)).argmax()
        what = names.of(*map(int, np.unravel_index(first, names.shape)))
        raise FimError(
            f"expected every run to answer every problem, found no answer of {what} ({due - len(places):,} of {due:,} "
            "are missing); add them, or leave the run out"
        )


def _outcomes(run: str, method: str | None, settings: Mapping[str, Any], cells: _Cells) -> Outcomes:
    """Take a run's cells [problem, sample] apart."""
    correct = cells["correct"]
    return Outcomes(
        run,
        method,
        settings,
        correct=correct == 1 if np.isin(correct, (0, 1)).all() else correct,
        tokens=cells["tokens"],
        seconds=None if np.isnan(cells["seconds"]).any() else cells["seconds"],
        **{name: None if (cells[name] == _UNKNOWN).any() else cells[name] == 1 for name in _FLAGS},
    )
