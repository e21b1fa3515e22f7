"""A sweep's summary -> the run to keep, and the sentence that says why."""

from dataclasses import dataclass
from math import ceil

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.front.paired import enough_problems
from mergekit_fim.evaluate.front.statistics import Paired, RunSummary, Summary
from mergekit_fim.evaluate.front.table import interval, problems, tokens


@dataclass(frozen=True)
class Recommendation:
    """Which run to keep, how much less accurate than the long model it may be, and why it is this one."""

    run: str
    margin: float
    sentence: str


def check_margin(margin: float) -> None:
    """Check a margin.

    Raises:
        FimError: it is no difference of accuracies that a run to keep may have.
    """
    if not 0 <= margin < 1:
        raise FimError(f"--margin: expected a number of at least 0 and below 1, found {margin}; change it")


def recommendation(summary: Summary, margin: float) -> Recommendation:
    """Choose the shortest run that the interval shows to be at most `margin` less accurate than the long model.

    Where the interval doesn't show it, the run isn't kept: few problems keep the long model. The share of answers that
    differ on these problems gives an estimate of how many would show it.
    """
    long, count = summary[summary.long], problems(summary.problems)

    def may_be_kept(run: RunSummary) -> bool:
        low = run.against_long.difference.low if run.against_long else 0.0
        return low is not None and low >= -margin

    best = min(filter(may_be_kept, summary.runs), key=lambda run: (run.tokens_mean, -run.accuracy.value))
    itself = f"{interval(summary, best.accuracy)} at {tokens(best.tokens_mean)} tokens"
    if best.against_long is None:
        sentence = f"{best.run} itself is the run to keep, {itself} on {count}: {_why_none(summary, margin)}."
    else:
        ratio = "" if best.length_ratio is None else f" ({best.length_ratio:.2f} of the length)"
        sentence = (
            f"{best.run} is the shortest run that the interval shows to be {_close(margin)} than {long.run}: {itself} "
            f"instead of {tokens(long.tokens_mean)}{ratio}; difference {interval(summary, best.against_long, '+')} on "
            f"{count}."
        )
    return Recommendation(best.run, margin, sentence)


def _why_none(summary: Summary, margin: float) -> str:
    """Say why no shorter run than the long model can be kept, and what would change that."""
    length = summary[summary.long].tokens_mean
    shorter = [(run.run, run.against_long) for run in summary.runs if run.against_long and run.tokens_mean < length]
    if not shorter:
        return "no run is shorter"
    none = f"no shorter run is shown to be {_close(margin)}"
    needed = ((_enough(paired, summary.problems, margin), run, paired.difference) for run, paired in shorter)
    told = [(enough, run, difference) for enough, run, difference in needed if enough is not None]
    if not told:
        return f"{none}, and more problems wouldn't help, as none came within that"
    enough, run, difference = min(told, key=lambda its: its[0])
    step = 10 ** max(0, len(str(enough)) - 2)
    rounded = -(-enough // step) * step  # up, to two digits: it is an estimate
    return (
        f"{none}; of {run}, whose difference is {interval(summary, difference, '+')}, about {problems(rounded)} "
        "might show it"
    )


def _enough(paired: Paired, count: int, margin: float) -> int | None:
    """Estimate how many problems would tell that a run is within the margin; None where it didn't come within it."""
    if paired.gained is not None and paired.lost is not None:
        return enough_problems(paired.gained, paired.lost, count, margin)
    value, low = paired.difference.value, paired.difference.low
    if low is None or value <= -margin:
        return None
    return ceil(count * ((value - low) / (value + margin)) ** 2)  # an interval's width is as 1 / sqrt(problems)


def _close(margin: float) -> str:
    return f"at most {margin:g} less accurate" if margin else "no less accurate"
