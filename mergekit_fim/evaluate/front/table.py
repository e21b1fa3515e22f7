"""A sweep's summary -> its tables, for a terminal or in Markdown."""

from collections.abc import Collection, Sequence
from dataclasses import astuple
from functools import partial

from mergekit_fim.evaluate.front.bootstrap import Estimate
from mergekit_fim.evaluate.front.statistics import Paired, RunSummary, Summary
from mergekit_fim.text import markdown_table, wrapped

# A run that is cut off more often than this is longer than it looks, and perhaps better.
_MANY_TRUNCATED = 0.05


def render_table(summary: Summary, *, markdown: bool = False) -> str:
    """Show the runs, the areas of the fronts, and what to bear in mind: in Markdown, or shorter for a terminal."""
    grids = [_runs_in_full(summary) if markdown else _runs_in_short(summary)]
    if summary.areas:
        grids.append(_areas(summary))
    texts = [_markdown(grid) if markdown else _plain(grid) for grid in grids]
    return "\n\n".join(texts + [note if markdown else "\n".join(wrapped(note)) for note in _notes(summary)])


def markdown_rows(summary: Summary, runs: Collection[str]) -> str:
    """Show the rows of these runs alone, in Markdown."""
    head, *rows = _runs_in_full(summary)
    return _markdown([head, *(row for row in rows if row[0] in runs)])


def _runs_in_full(summary: Summary) -> list[list[str]]:
    def row(run: RunSummary) -> dict[str, str]:
        p = run.against_long and run.against_long.mcnemar
        right = f"{tokens(run.correct_tokens_mean)} ({tokens(run.correct_tokens_median)})"
        return {
            "run": run.run,
            "Pareto": "*" if run.pareto else "",
            "accuracy": interval(summary, run.accuracy),
            "tokens, mean (median)": f"{tokens(run.tokens_mean)} ({tokens(run.tokens_median)})",
            "of the right answers": right if run.correct_tokens_mean is not None else "",
            f"of {summary.long}'s length": "" if run.length_ratio is None else f"{run.length_ratio:.2f}",
            "truncated": _percent(run.truncated, ".1f", " %"),
            "unclosed": _percent(run.unclosed, ".1f", " %"),
            "empty": _percent(run.empty, ".1f", " %"),
            "above the chord": interval(summary, run.above_chord, "+"),
            f"against {summary.base}": interval(summary, run.against_base, "+"),
            f"against {summary.long}": interval(summary, run.against_long, "+"),
            "McNemar's p": "" if p is None else f"{p:.2g}",
            "tokens/s": tokens(run.tokens_per_second),
        }

    rows = [row(run) for run in summary.runs]
    return [list(rows[0]), *(list(its.values()) for its in rows)]


def _runs_in_short(summary: Summary) -> list[list[str]]:
    grid = [["", "accuracy", "tokens", "cut", "above the chord", f"against {summary.long}"]]
    method = None
    for run in summary.runs:
        if run.method not in (None, method):
            grid.append([f"  {run.method}", *[""] * 5])
        method = run.method
        name = run.run if method is None else "  " + (run.run.removeprefix(method).strip() or run.run)
        grid.append(
            [
                ("* " if run.pareto else "  ") + name,
                interval(summary, run.accuracy),
                tokens(run.tokens_mean),
                _percent(run.truncated, ".0f", "%"),
                interval(summary, run.above_chord, "+"),
                interval(summary, run.against_long, "+"),
            ]
        )
    return grid


def _areas(summary: Summary) -> list[list[str]]:
    grid = [["area under the front", "runs", "area", "gain", "held out"]]
    shown = partial(interval, summary, more=1)  # a digit more: they are means over many points
    for area in summary.areas:
        values = [shown(area.area), shown(Estimate(area.gain, None, None), "+"), shown(area.held_out, "+")]
        grid.append([area.method or "all runs", str(area.runs), *values])
    for its in summary.differences:
        grid.append([f"{its.first} minus {its.second}", "", shown(its.difference, "+"), "", ""])
    return grid


def _notes(summary: Summary) -> list[str]:
    notes = ["In brackets: 95 % interval. * is on the Pareto set: no other run is as accurate with as few tokens."]
    if summary.areas:
        notes.append(
            f"The area is the mean height of a method's front from {summary.base}'s to {summary.long}'s tokens; the "
            "gain is what it has above the chord, luck included; held out, one half of the problems chooses the mixes "
            "on the front, and the other half says how accurate they are."
        )
    truncated = [run.run for run in summary.runs if (run.truncated or 0) >= _MANY_TRUNCATED]
    if truncated:
        notes.append(
            f"{100 * _MANY_TRUNCATED:.0f} % or more were cut off at the limit of tokens in {', '.join(truncated)}: "
            "these answers are longer than they count, and might have become right."
        )
    base, long = summary[summary.base], summary[summary.long]
    if summary.no_chord:
        notes.append(f"{summary.no_chord}.")
    elif long.accuracy.value < base.accuracy.value:
        notes.append(
            f"{long.run} is less accurate than {base.run}: the chord falls, and a run above it may still be worse than "
            f"{base.run}."
        )
    counts = {area.runs for area in summary.areas if area.method is not None}
    if len(counts) > 1:
        notes.append("The methods have different numbers of runs; the area of more runs is larger by chance alone.")
    return notes


def _markdown(grid: Sequence[Sequence[str]]) -> str:
    head, *rows = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in grid]
    return markdown_table(head, rows)


def _plain(grid: Sequence[Sequence[str]]) -> str:
    """Align the first column to the left, the others to the right."""
    left, *widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = ("  ".join([first.ljust(left), *map(str.rjust, others, widths)]) for first, *others in grid)
    return "\n".join(line.rstrip() for line in lines)


def _percent(share: float | None, digits: str, unit: str) -> str:
    return "" if share is None else f"{100 * share:{digits}}{unit}"


def interval(summary: Summary, shown: Estimate | Paired | None, sign: str = "", *, more: int = 0) -> str:
    """Write an accuracy or a difference with its interval, in no more decimals than its steps have, or `more`."""
    estimate = shown.difference if isinstance(shown, Paired) else shown
    if estimate is None:
        return ""
    digits = (2 if summary.problems < 1000 else 3) + more
    value, *ends = (round(x, digits) + 0.0 for x in astuple(estimate) if x is not None)  # never -0.00
    brackets = f" [{', '.join(f'{end:.{digits}f}' for end in ends)}]" if ends else ""
    return f"{value:{sign}.{digits}f}{brackets}"


def problems(count: int) -> str:
    """Write a number of problems."""
    return "1 problem" if count == 1 else f"{count:,} problems"


def tokens(count: float | None) -> str:
    """Write a number of tokens."""
    if count is None:
        return ""
    return f"{count:.1f}" if count < 100 else f"{count:,.0f}"
