"""Every run's answers -> what they show: in figures, a page, and a sentence."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergekit_fim.evaluate.folder import SweepFolder, note_findings
from mergekit_fim.evaluate.front.figure import write_figure
from mergekit_fim.evaluate.front.statistics import Outcomes, Summary, as_json, summarize
from mergekit_fim.evaluate.front.table import Recommendation, recommendation, render_table
from mergekit_fim.evaluate.problems.questions import Questions
from mergekit_fim.evaluate.records import LENGTH, Answer, Key, ordered_by
from mergekit_fim.files import write_text
from mergekit_fim.measurements.record import versions
from mergekit_fim.text import escaped, markdown_table, wrapped


@dataclass(frozen=True)
class Findings:
    """What a sweep shows.

    Attributes:
        summary: over all problems that can be graded.
        by_source: the same of each source, where there are several.
        recommended: the run to keep.
        ungradable: the problems whose answers can't be graded, as (source, index, why).
    """

    summary: Summary
    by_source: Mapping[str, Summary]
    recommended: Recommendation
    ungradable: tuple[tuple[str, int, str], ...]


def find(
    entries: Sequence[Mapping[str, Any]],
    answers: Mapping[str, Mapping[Key, Answer]],
    questions: Questions,
    base: str,
    tuned: Sequence[str],
    seed: int,
    margin: float,
) -> Findings:
    """Summarise the runs that have answered everything.

    Args:
        entries: what `sweep.json` says of each run.
        answers: of each run.
        questions: what was asked.
        base: the base's run.
        tuned: the fine-tuned models' runs, of which the long model is the one that writes most.
        seed: of the bootstrap.
        margin: how much less accurate than the long model the run to keep may be.
    """
    entries = _sorted(entries)

    def summary(source: str | None) -> Summary:
        keys = questions.gradable(source)
        return summarize([outcomes(e, answers[e["run"]], keys) for e in entries], base, long, seed=seed)

    every = [key for problem in questions.gradable() for key in problem]
    long = max(tuned, key=lambda run: sum(answers[run][key].tokens for key in every))
    sources = [s.source for s in questions.problem_sets]
    overall = summary(None)
    return Findings(
        overall,
        {source: summary(source) for source in sources} if len(sources) > 1 else {},
        recommendation(overall, margin),
        tuple((s.source, index, why) for s in questions.problem_sets for index, why in s.ungradable.items()),
    )


def _sorted(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Runs of one method together, by their strength: several commands may have added to them."""
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    varied = list(dict.fromkeys(tuple(entry["settings"]) for entry in entries))

    def place(entry: Mapping[str, Any]) -> tuple[int, int, float]:
        strength = entry["settings"].get(ordered_by(entry["settings"]))
        number = float(strength) if isinstance(strength, (int, float)) else 0.0
        return methods.index(entry["method"]), varied.index(tuple(entry["settings"])), number

    return sorted(entries, key=place)


def outcomes(entry: Mapping[str, Any], answers: Mapping[Key, Answer], keys: Sequence[Sequence[Key]]) -> Outcomes:
    """A run's answers as the statistics take them.

    Args:
        entry: the run's `run`, `method` and `settings`.
        answers: all of its answers.
        keys: of those that can be graded [problem, sample].
    """
    rows = [[answers[key] for key in problem] for problem in keys]
    return Outcomes(
        run=entry["run"],
        method=entry["method"],
        settings=entry["settings"],
        correct=np.array([[answer.correct is True for answer in row] for row in rows]),
        tokens=np.array([[answer.tokens for answer in row] for row in rows]),
        truncated=np.array([[answer.ended == LENGTH for answer in row] for row in rows]),
        unclosed=np.array([[answer.unclosed for answer in row] for row in rows]),
        empty=np.array([[not answer.text.strip() for answer in row] for row in rows]),
        seconds=sum(answer.seconds for row in rows for answer in row) or None,
    )


def write_findings(folder: SweepFolder, entries: Sequence[Mapping[str, Any]], findings: Findings) -> None:
    """Write `sweep.json`, `sweep.md`, `sweep.png` and `sweep.svg`.

    Raises:
        FimError: one of them can't be written.
    """
    found: dict[str, Any] = {
        "summary": as_json(findings.summary),
        "by_source": {source: as_json(summary) for source, summary in findings.by_source.items()},
        "recommended": dataclasses.asdict(findings.recommended),
        "ungradable": [{"source": s, "index": i, "why": why} for s, i, why in findings.ungradable],
    }
    note_findings(folder, versions(), found)
    for ending in ("png", "svg"):
        write_figure(found["summary"], os.path.join(folder.path, f"sweep.{ending}"))
    write_text(os.path.join(folder.path, "sweep.md"), _page(folder, entries, findings))


def render(folder: SweepFolder, findings: Findings) -> str:
    """What came out, for a terminal."""
    parts = [render_table(findings.summary)]
    for source, summary in findings.by_source.items():
        parts.append(f"{source}\n{render_table(summary)}")
    if findings.ungradable:
        parts.append("\n".join(wrapped(_not_graded(findings))))
    parts.append("\n".join([*wrapped(findings.recommended.sentence), *wrapped(_how(folder, findings))]))
    return "\n\n".join(parts)


def _how(folder: SweepFolder, findings: Findings) -> str:
    """How to get the recommended merge; empty where it is no merge."""
    run = findings.recommended.run
    if findings.summary[run].method is None:
        return ""
    if os.path.isdir(folder.model(run)):
        return f"It is in {folder.model(run)}."
    return f"To merge it: mergekit-fim merge {folder.config(run)} merged"


def _not_graded(findings: Findings) -> str:
    count = len(findings.ungradable)
    return f"Not graded, and in none of these figures: {count} problem{'s' * (count > 1)} (sweep.md lists them)."


def _page(folder: SweepFolder, entries: Sequence[Mapping[str, Any]], findings: Findings) -> str:
    identity = folder.identity
    options = {name: identity[name] for name in ("seed", "max_tokens", "temperature", "samples", "system")}
    options["margin"] = findings.recommended.margin
    blocks = [
        "# Accuracy against length",
        " ".join(filter(None, [escaped(findings.recommended.sentence), escaped(_how(folder, findings))])),
        "![Accuracy against mean tokens of every run, and the front](sweep.png)",
        render_table(findings.summary, markdown=True),
    ]
    for source, summary in findings.by_source.items():
        blocks += [f"## {escaped(source)}", render_table(summary, markdown=True)]
    if findings.ungradable:
        rows = [(escaped(source), str(index), escaped(why)) for source, index, why in findings.ungradable]
        blocks += ["## Not graded", markdown_table(("source", "problem", "why"), rows)]
    blocks += [
        "## What was run",
        markdown_table(
            ("source", "problems", "what it is"),
            (
                (
                    escaped(its["source"]),
                    str(its["problems"]),
                    escaped(", ".join(f"{k} {v}" for k, v in its.items() if k not in ("source", "problems"))),
                )
                for its in identity["problems"]
            ),
        ),
        markdown_table(
            ("option", "value"), ((name, escaped(str(value))) for name, value in options.items() if value is not None)
        ),
        markdown_table(
            ("run", "prompts", "on", "in"),
            (
                (
                    escaped(entry["run"]),
                    (entry["template"] or {"kind": "the server's"})["kind"],
                    escaped(str(entry["of"].get("server") or entry.get("device", ""))),
                    str(entry.get("dtype", "")).removeprefix("torch."),
                )
                for entry in entries
            ),
        ),
        f"Models: {', '.join(f'{escaped(name)} ({value})' for name, value in identity['models'].items())}.",
        f"Made with {', '.join(f'{name} {version}' for name, version in versions().items())}.",
        "The merge config, in which the runs set what their names say:",
        f"```yaml\n{identity['config']}\n```",
    ]
    return "\n\n".join(blocks) + "\n"
