"""Results of any kinds -> one front of all their runs."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mergekit_fim.errors import FimError, brief, require
from mergekit_fim.evaluate.folder import SweepFolder
from mergekit_fim.evaluate.front.bootstrap import Outcomes
from mergekit_fim.evaluate.front.findings import Findings, find
from mergekit_fim.evaluate.front.gathered import gather
from mergekit_fim.evaluate.front.recommended import check_margin
from mergekit_fim.evaluate.records import Row
from mergekit_fim.evaluate.results.logs import read_log
from mergekit_fim.evaluate.results.rows import READERS, read_rows
from mergekit_fim.evaluate.results.sweeps import check_alike, open_sweep


def front_of(
    results: Sequence[str], base: str | None, long: str | None, *, seed: int, margin: float
) -> tuple[Findings, list[SweepFolder]]:
    """Find out what the runs of all results show together, and which folders of sweeps are among the results.

    Results are folders of sweeps, logs of Inspect, and files of rows; docs/sweep.md has the columns. By default, base
    and long model are the first sweep's, else the run or the family of this name. The run to keep may be less accurate
    than the long model by the margin; the seed is of the bootstrap.

    Raises:
        FimError: one of the results can't be read, or they don't belong together.
    """
    check_margin(margin)
    require("scipy.stats", "sweep")
    sweeps = {path: open_sweep(path) for path in results if os.path.isdir(path)}
    opened = list(sweeps.values())
    for other in opened[1:]:
        check_alike(opened[0], other)
    gathered = gather({path: sweeps[path].rows() if path in sweeps else _rows(path) for path in results})
    answered = {its.run for its in gathered.outcomes}
    for path, run in ((swept.folder.answers(run), run) for swept in opened for run in swept.runs):
        if run not in answered:
            raise FimError(f"{path}: expected the answers of {run}, found none; give the sweep's command again")
    if opened:
        base, long = base or opened[0].base, long or opened[0].long
    ends = _end("base", base, gathered.outcomes), _end("long", long, gathered.outcomes)
    if ends[0] == ends[1]:
        raise FimError(f"--long: expected another run than the base, {brief(ends[0])}, found that; name the long model")
    runs = tuple(replace(its, method=None) if its.run in ends else its for its in gathered.outcomes)
    gathered = replace(gathered, outcomes=runs)
    ungradable = dict.fromkeys(its for swept in opened for its in swept.ungradable)
    found = find(gathered, (ends[0], ends[1:]), seed=seed, margin=margin, ungradable=ungradable)
    return found, [swept.folder for swept in opened]


def _rows(path: str) -> Iterable[Row]:
    ending = os.path.splitext(path)[1]
    if ending == ".eval":
        return read_log(path)
    if ending not in READERS:
        raise FimError(
            f"{path}: expected the folder of a sweep, a log of Inspect (.eval), or rows in a file that ends in "
            f"{', '.join(READERS)}; check the name"
        )
    return read_rows(path)


def _end(name: str, given: str | None, outcomes: Sequence[Outcomes]) -> str:
    """Find the run at one end of the chord."""
    runs = [its.run for its in outcomes]
    if given is not None:
        found, expected = [run for run in runs if run == given], f"a run called {brief(given)}"
    else:
        found = [name] if name in runs else [its.run for its in outcomes if its.method == name]
        expected = f"a run called {name}, or one run of a family called so"
    if len(found) != 1:
        raise FimError(f"--{name}: expected {expected}, found {brief(', '.join(found or runs))}; name the run")
    return found[0]
