"""All runs' answers -> what they show, in `sweep.json`, `sweep.md` and figures, and logs of inspect_ai's."""

import os
from collections.abc import Sequence

from mergekit_fim.evaluate.folder import SweepFolder, file_name, note_findings, read_record
from mergekit_fim.evaluate.front.figure import write_figure
from mergekit_fim.evaluate.front.findings import Findings, find, page
from mergekit_fim.evaluate.front.gathered import gather
from mergekit_fim.evaluate.one_run import Answers, Asked, whole_answers
from mergekit_fim.evaluate.problems.grader import carried_out
from mergekit_fim.evaluate.records import row_of
from mergekit_fim.evaluate.runs.families import Run
from mergekit_fim.files import write_text, written_whole
from mergekit_fim.measurements.record import versions

_MOMENT = 2.0  # seconds for which another process has a run that it only looks at


def is_concluded(folder: SweepFolder, runs: Sequence[Run], margin: float) -> bool:
    """Whether `sweep.json` has what these runs show."""
    findings = read_record(folder).get("findings")
    return (
        findings is not None
        and findings["recommended"].get("margin") == margin
        and {run["run"] for run in findings["summary"]["runs"]} >= {run.name for run in runs}
    )


def conclude(
    asked: Asked, answers: dict[str, Answers], ends: tuple[str, Sequence[str]], seed: int, margin: float
) -> Findings:
    """Find out what all runs show; those of other commands that have answered everything are added to `answers`."""
    entries = read_record(asked.folder)["runs"]
    for name in [entry["run"] for entry in entries if entry["run"] not in answers]:
        if others := whole_answers(asked, name, _MOMENT):
            answers[name] = others
    gradable = asked.questions.gradable()
    known = [entry for entry in entries if entry["run"] in answers]
    rows = (row_of(entry, answers[entry["run"]][key]) for entry in known for key in gradable)
    ungradable = [(its.source, i, why) for its in asked.questions.problem_sets for i, why in its.ungradable.items()]
    return find(gather({asked.folder.path: rows}), ends, seed=seed, margin=margin, ungradable=ungradable)


def write_findings(folder: SweepFolder, findings: Findings) -> None:
    """Write `sweep.json`, `sweep.md`, `sweep.png` and `sweep.svg`."""
    content = findings.as_json()
    note_findings(folder, versions(), content)
    for ending in ("png", "svg"):
        write_figure(content["summary"], os.path.join(folder.path, f"sweep.{ending}"))
    text = page(folder.identity, read_record(folder)["runs"], findings, folder.remedy(findings.recommended.run))
    write_text(os.path.join(folder.path, "sweep.md"), text)


def write_logs(folder: SweepFolder, findings: Findings) -> None:
    """Write a log for inspect_ai of every run."""
    shown, logs = {run.run for run in findings.summary.runs}, os.path.join(folder.path, "inspect")
    os.makedirs(logs, exist_ok=True)
    for entry in read_record(folder)["runs"]:
        if entry["run"] in shown:
            path, answers = os.path.join(logs, f"{file_name(entry['run'])}.eval"), folder.answers(entry["run"])
            with written_whole(path) as part:
                carried_out("inspect_log", path, path=part, answers=answers, entry=entry, identity=folder.identity)
