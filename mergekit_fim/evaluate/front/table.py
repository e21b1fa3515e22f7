"""A sweep's summary -> its tables, and the run to keep with the sentence that says why."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil

from mergekit_fim.evaluate.front.paired import enough_problems
from mergekit_fim.evaluate.front.statistics import Estimate, Paired, RunSummary, Summary
from mergekit_fim.text import markdown_table, wrapped

# A run that is cut off more often than this is longer than it looks, and perhaps better.
_MANY_TRUNCATED = 0.05


@dataclass(frozen=True)
class Recommendation:
    """Which run to keep.

    Attributes:
        run: its name.
        margin: how much less accurate than the long model it may be.
        sentence: why it is this one.
    """

    run: str
    margin: float
    sentence: str


def recommendation(summary: Summary, margin: float) -> Recommendation:
    """The shortest run that is at most `margin` less accurate than the long model, by the interval of their difference.

    A run of which that isn't known isn't kept, so that few problems keep the long model, and not any run. How many
    problems would tell is estimated from how many answers differ on these.

    Args:
        summary: of all runs.
        margin: in [0, 1).
    """
    digits = _digits(summary)
    long = summary[summary.long]

    def may_be_kept(run: RunSummary) -> bool:
        low = run.against_long.difference.low if run.against_long else None
        return run.against_long is None or (low is not None and low >= -margin)

    found = min(filter(may_be_kept, summary.runs), key=lambda run: (run.tokens_mean, -run.accuracy.value))
    if found.against_long is None:
        return Recommendation(
            long.run,
            margin,
            f"{long.run} itself is the run to keep, {_interval(long.accuracy, digits)} at {_tokens(long.tokens_mean)} "
            f"tokens on {_problems(summary.problems)}: {_why_none(summary, margin)}.",
        )
    ratio = "" if found.length_ratio is None else f" ({found.length_ratio:.2f} of the length)"
    difference = _interval(found.against_long.difference, digits, "+")
    return Recommendation(
        found.run,
        margin,
        f"{found.run} is the shortest run that the interval shows to be {_close(margin)} than {long.run}: "
        f"{_interval(found.accuracy, digits)} at {_tokens(found.tokens_mean)} tokens instead of "
        f"{_tokens(long.tokens_mean)}{ratio}; difference {difference} on {_problems(summary.problems)}.",
    )


def _why_none(summary: Summary, margin: float) -> str:
    """Why no shorter run than the long model can be kept, and what would change that."""
    tokens = summary[summary.long].tokens_mean
    shorter = [(run.run, run.against_long) for run in summary.runs if run.against_long and run.tokens_mean < tokens]
    if not shorter:
        return "no run is shorter"
    none = f"no shorter run is shown to be {_close(margin)}"
    needed = [(_enough(paired, summary.problems, margin), run, paired.difference) for run, paired in shorter]
    told = [(enough, run, difference) for enough, run, difference in needed if enough is not None]
    if not told:
        return f"{none}, and more problems wouldn't help, as none came within that"
    enough, run, difference = min(told, key=lambda its: its[0])
    found = _interval(difference, _digits(summary), "+")
    return f"{none}; of {run}, whose difference is {found}, about {_problems(_rounded_up(enough))} might show it"


def _enough(paired: Paired, problems: int, margin: float) -> int | None:
    """How many problems would tell that a run is within the margin; None where it didn't come within it."""
    if paired.gained is not None and paired.lost is not None:
        return enough_problems(paired.gained, paired.lost, problems, margin)
    value, low = paired.difference.value, paired.difference.low
    if low is None or value <= -margin:
        return None
    return ceil(problems * ((value - low) / (value + margin)) ** 2)  # an interval's width is as 1 / sqrt(problems)


def _close(margin: float) -> str:
    return f"at most {margin:g} less accurate" if margin else "no less accurate"


def _problems(count: int) -> str:
    return "1 problem" if count == 1 else f"{count:,} problems"


def _rounded_up(count: int) -> int:
    """To two digits: it is an estimate."""
    step = 10 ** max(0, len(str(count)) - 2)
    return -(-count // step) * step


def render_table(summary: Summary, *, markdown: bool = False) -> str:
    """The runs, the areas of the fronts, and what to bear in mind: in Markdown, or shorter for a terminal."""
    grids = [_runs_in_full(summary) if markdown else _runs_in_short(summary)]
    if summary.areas:
        grids.append(_areas(summary))
    texts = [_markdown(grid) if markdown else "\n".join(_plain(grid)) for grid in grids]
    for note in _notes(summary):
        texts.append(note if markdown else "\n".join(wrapped(note)))
    return "\n\n".join(texts)


def markdown_rows(summary: Summary, runs: Collection[str]) -> str:
    """The rows of these runs alone, in Markdown."""
    head, *rows = _runs_in_full(summary)
    return _markdown([head, *(row for row in rows if row[0] in runs)])


def _runs_in_full(summary: Summary) -> list[list[str]]:
    digits = _digits(summary)
    grid = [
        [
            "run", "Pareto", "accuracy", "tokens, mean (median)", "of the right answers", f"of {summary.long}'s length",
            "truncated", "unclosed", "empty", "above the chord", f"against {summary.base}", f"against {summary.long}",
            "McNemar's p", "tokens/s",
        ]
    ]  # fmt: skip
    for run in summary.runs:
        p = run.against_long and run.against_long.mcnemar
        grid.append(
            [
                run.run,
                "*" if run.pareto else "",
                _interval(run.accuracy, digits),
                f"{_tokens(run.tokens_mean)} ({_tokens(run.tokens_median)})",
                f"{_tokens(run.correct_tokens_mean)} ({_tokens(run.correct_tokens_median)})"
                if run.correct_tokens_mean is not None
                else "",
                "" if run.length_ratio is None else f"{run.length_ratio:.2f}",
                *(f"{100 * rate:.1f} %" for rate in (run.truncated, run.unclosed, run.empty)),
                _interval(run.above_chord, digits, "+"),
                _interval(_difference(run.against_base), digits, "+"),
                _interval(_difference(run.against_long), digits, "+"),
                "" if p is None else f"{p:.2g}",
                _tokens(run.tokens_per_second),
            ]
        )
    return grid


def _runs_in_short(summary: Summary) -> list[list[str]]:
    digits = _digits(summary)
    grid = [["", "accuracy", "tokens", "cut", "above the chord", f"against {summary.long}"]]
    method = None
    for run in summary.runs:
        if run.method not in (None, method):
            grid.append([f"  {run.method}"])
        method = run.method
        name = run.run if method is None else "  " + (run.run.removeprefix(method).strip() or run.run)
        grid.append(
            [
                ("* " if run.pareto else "  ") + name,
                _interval(run.accuracy, digits),
                _tokens(run.tokens_mean),
                f"{100 * run.truncated:.0f}%",
                _interval(run.above_chord, digits, "+"),
                _interval(_difference(run.against_long), digits, "+"),
            ]
        )
    return grid


def _areas(summary: Summary) -> list[list[str]]:
    digits = _digits(summary) + 1  # they are means over many points
    grid = [["area under the front", "runs", "area", "gain", "held out"]]
    for area in summary.areas:
        values = [_interval(area.area, digits), f"{_rounded(area.gain, digits):+.{digits}f}"]
        grid.append([area.method or "all runs", str(area.runs), *values, _interval(area.held_out, digits, "+")])
    for found in summary.differences:
        grid.append([f"{found.first} minus {found.second}", "", _interval(found.difference, digits, "+")])
    return grid


def _notes(summary: Summary) -> list[str]:
    notes = ["In brackets: 95 % interval. * is on the Pareto set: no other run is as accurate with as few tokens."]
    if summary.areas:
        notes.append(
            f"The area is the mean height of a method's front from {summary.base}'s to {summary.long}'s tokens; the "
            "gain is what it has above the chord, luck included; held out, one half of the problems chooses the mixes "
            "on the front, and the other half says how accurate they are."
        )
    truncated = [run.run for run in summary.runs if run.truncated >= _MANY_TRUNCATED]
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
    rows = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in grid]
    return markdown_table(rows[0], (row + [""] * (len(rows[0]) - len(row)) for row in rows[1:]))


def _plain(grid: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in grid if i < len(row)) for i in range(len(grid[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        )
        for row in grid
    ]
    return [line.rstrip() for line in lines]


def _digits(summary: Summary) -> int:
    """Decimals of an accuracy: not more than its steps have."""
    return 2 if summary.problems < 1000 else 3


def _difference(paired: Paired | None) -> Estimate | None:
    return None if paired is None else paired.difference


def _interval(estimate: Estimate | None, digits: int, sign: str = "") -> str:
    if estimate is None:
        return ""
    value = f"{_rounded(estimate.value, digits):{sign}.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return value
    low, high = (f"{_rounded(end, digits):.{digits}f}" for end in (estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _rounded(value: float, digits: int) -> float:
    return round(value, digits) + 0.0  # never -0.00


def _tokens(count: float | None) -> str:
    if count is None:
        return ""
    return f"{count:.1f}" if count < 100 else f"{count:,.0f}"
