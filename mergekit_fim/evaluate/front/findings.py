"""Every run's outcomes -> what they show: in figures, for a terminal, and as a page."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mergekit_fim.evaluate.front.bootstrap import Outcomes
from mergekit_fim.evaluate.front.gathered import Gathered
from mergekit_fim.evaluate.front.recommended import Recommendation, recommendation
from mergekit_fim.evaluate.front.statistics import Summary, summarize
from mergekit_fim.evaluate.front.table import problems, render_table
from mergekit_fim.evaluate.records import ordered_by
from mergekit_fim.measurements.record import versions
from mergekit_fim.text import escaped, markdown_table, wrapped


@dataclass(frozen=True)
class Findings:
    """What a sweep shows."""

    summary: Summary  # over all problems that can be graded
    by_source: Mapping[str, Summary]  # the same of each source, where there are several
    recommended: Recommendation  # the run to keep
    ungradable: tuple[tuple[str, int, str], ...]  # problems whose answers can't be graded: source, index, why

    def as_json(self) -> dict[str, Any]:
        """What `sweep.json` has of it; nothing in it is NaN or infinite."""
        ungradable = [dict(zip(("source", "index", "why"), its, strict=True)) for its in self.ungradable]
        return asdict(self) | {"ungradable": ungradable}


def find(
    gathered: Gathered,
    ends: tuple[str, Sequence[str]],
    *,
    seed: int,
    margin: float,
    ungradable: Iterable[tuple[str, int, str]] = (),
) -> Findings:
    """Find out what runs show that have answered the same problems, all but those that are `ungradable`.

    The `ends` are the base's run, and those of the fine-tuned models; the long model is the one that writes most. The
    `margin` says how much less accurate than that the run to keep may be.
    """
    base, tuned = ends
    runs = _sorted(gathered.outcomes)
    length = {run.run: float(run.tokens.sum()) for run in runs}
    long = max(tuned, key=length.__getitem__)
    overall = summarize(runs, base, long, seed=seed)
    names, sources = dict.fromkeys(gathered.sources), np.array(gathered.sources, dtype=object)
    by_source = {
        name: summarize([run.of(sources == name) for run in runs], base, long, seed=seed)
        for name in (names if len(names) > 1 else ())
    }
    return Findings(overall, by_source, recommendation(overall, margin), tuple(ungradable))


def _sorted(outcomes: Sequence[Outcomes]) -> list[Outcomes]:
    """Sort runs by method, models as they are first, then by strength: they may come from anywhere."""
    methods = list(dict.fromkeys([None, *(run.method for run in outcomes)]))
    varied = list(dict.fromkeys(tuple(run.settings) for run in outcomes))

    def place(run: Outcomes) -> tuple[int, int, float]:
        strength = run.settings.get(ordered_by(run.settings))
        number = float(strength) if isinstance(strength, (int, float)) else 0.0
        return methods.index(run.method), varied.index(tuple(run.settings)), number

    return sorted(outcomes, key=place)


def render(findings: Findings, remedy: str) -> str:
    """Show what came out on a terminal, with how to get the run to keep."""
    parts = [render_table(findings.summary)]
    parts += [f"{source}\n{render_table(summary)}" for source, summary in findings.by_source.items()]
    if findings.ungradable:
        count = problems(len(findings.ungradable))
        parts.append("\n".join(wrapped(f"Not graded, and in none of these figures: {count} (sweep.md lists them).")))
    parts.append("\n".join([*wrapped(findings.recommended.sentence), *wrapped(remedy)]))
    return "\n\n".join(parts)


def page(identity: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], findings: Findings, remedy: str) -> str:
    """Write sweep.md, of `sweep.json`'s identity and runs, with how to get the run to keep."""
    blocks = [
        "# Accuracy against length",
        f"{escaped(findings.recommended.sentence)} {escaped(remedy)}".strip(),
        "![Accuracy against mean tokens of every run, and the front](sweep.png)",
        render_table(findings.summary, markdown=True),
    ]
    for source, summary in findings.by_source.items():
        blocks += [f"## {escaped(source)}", render_table(summary, markdown=True)]
    if findings.ungradable:
        blocks += ["## Not graded", _table(("source", "problem", "why"), findings.ungradable)]
    sources = [
        (source, count, ", ".join(f"{name} {value}" for name, value in rest))
        for (_, source), (_, count), *rest in (its.items() for its in identity["problems"])
    ]
    options = {name: identity[name] for name in ("seed", "max_tokens", "temperature", "samples", "system")}
    options["margin"] = findings.recommended.margin
    runs = [
        (
            entry["run"],
            (entry["template"] or {"kind": "the server's"})["kind"],
            entry["of"].get("server") or entry.get("device", ""),
            str(entry.get("dtype", "")).removeprefix("torch."),
        )
        for entry in entries
    ]
    blocks += [
        "## What was run",
        _table(("source", "problems", "what it is"), sources),
        _table(("option", "value"), [option for option in options.items() if option[1] is not None]),
        _table(("run", "prompts", "on", "in"), runs),
        f"Models: {', '.join(f'{escaped(name)} ({value})' for name, value in identity['models'].items())}.",
        f"Made with {', '.join(f'{name} {version}' for name, version in versions().items())}.",
    ]
    for name, config in identity.get("configs", {"the merge config": identity.get("config")}).items():
        blocks += [f"In {escaped(name)} the runs set what their names say:", f"```yaml\n{config}\n```"]
    return "\n\n".join(blocks) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return markdown_table(head, ([escaped(str(cell)) for cell in row] for row in rows))
