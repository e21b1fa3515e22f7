"""The folder of a sweep -> the rows that it concluded from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mergekit_fim.errors import FimError, brief
from mergekit_fim.evaluate.folder import SweepFolder, difference, read_answers, read_record
from mergekit_fim.evaluate.records import Row, row_of


@dataclass(frozen=True)
class Swept:
    """A sweep that came to an end."""

    folder: SweepFolder
    record: dict[str, Any]  # its `sweep.json`
    base: str  # the base's run
    long: str  # the long model's
    runs: list[str]  # those that it has findings of
    ungradable: list[tuple[str, int, str]]  # the problems that can't be graded: source, index, why

    def rows(self) -> Iterator[Row]:
        """Read the answers that it has findings of."""
        left_out = {(source, index) for source, index, _ in self.ungradable}
        for entry in self.record["runs"]:
            if entry["run"] in self.runs:
                for answer in read_answers(self.folder.answers(entry["run"])).values():
                    if (answer.source, answer.index) not in left_out:
                        yield row_of(entry, answer)


def open_sweep(path: str) -> Swept:
    """Open the folder of a sweep.

    Raises:
        FimError: it is no sweep's, or the sweep hasn't come to an end.
    """
    folder = SweepFolder(path)
    record = read_record(folder)
    findings = record.get("findings")
    if findings is None:
        raise FimError(f"{path}: expected a sweep that came to an end, found no findings; finish it by its command")
    try:
        ungradable = [(its["source"], its["index"], its["why"]) for its in findings["ungradable"]]
        summary = findings["summary"]
        runs = [its["run"] for its in summary["runs"]]
        return Swept(folder, record, summary["base"], summary["long"], runs, ungradable)
    except (KeyError, TypeError) as error:
        raise FimError(
            f"{folder.record}: expected the findings of a sweep, found damaged ones ({error!r}); remove "
            "them, and give the sweep's command again"
        ) from None


def check_alike(one: Swept, other: Swept) -> None:
    """Check that two sweeps asked the same.

    Raises:
        FimError: they had other problems, or options that change answers.
    """
    own = {"config", "configs", "models"}
    here, there = ({k: v for k, v in its.record["identity"].items() if k not in own} for its in (one, other))
    found = difference(here, there)
    if found is not None:
        where, expected, its = found
        raise FimError(
            f"{other.folder.path}: expected a sweep of the same problems and options as {one.folder.path}, found one "
            f"whose {where} is {brief(its)}, there {brief(expected)}; leave one out"
        )
