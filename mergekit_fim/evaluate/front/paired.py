"""Two runs on the same problems: the interval of their difference, and how many problems a margin takes."""

from collections.abc import Sequence
from math import ceil, inf, sqrt
from statistics import NormalDist

LEVEL = 0.95  # of every interval
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_HALVINGS = 60  # of the interval [-1, 1]: beyond what a float64 tells apart


def score_interval(gained: float, lost: float, problems: float) -> tuple[float, float]:
    """Find Tango's score interval of the difference of two accuracies, of one answer each to every problem.

    `gained` problems are solved by the one run alone, `lost` by the other alone. The interval holds the differences
    that the score test doesn't reject (Tango, Statistics in Medicine 17, 1998, 891-908). Where no answers differ it has
    width, unlike a bootstrap's: of 12 problems, 0.24 to either side.
    """

    def end(outside: float) -> float:
        inside = (gained - lost) / problems
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            if abs(_score(gained, lost, problems, middle)) <= _Z:
                inside = middle
            else:
                outside = middle
        return inside

    return end(-1.0), end(1.0)


def enough_problems(gained: float, lost: float, problems: float, margin: float) -> int | None:
    """Find how many problems take the lower end of Tango's interval to -margin, if the same shares of them differ.

    The score grows with the root of their number. Where the difference itself is not above -margin, none does.
    """
    if (gained - lost) / problems <= -margin:
        return None
    return ceil(problems * (_Z / _score(gained, lost, problems, -margin)) ** 2)


def _score(gained: float, lost: float, problems: float, difference: float) -> float:
    """Compute Tango's statistic, which is standard normal where this is the true difference."""
    # The likeliest share of problems that the other run alone solves, given the difference.
    second = 2 * problems
    first = (second - gained + lost) * difference - gained - lost
    last = -lost * difference * (1 - difference)
    share = (sqrt(max(0.0, first * first - 4 * second * last)) - first) / (2 * second)
    above = gained - lost - problems * difference
    variance = problems * (2 * share + difference * (1 - difference))
    if variance <= 0:
        return 0.0 if above == 0 else inf if above > 0 else -inf
    return above / sqrt(variance)


def adjusted_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Find the normal interval of the mean of differences in [-1, 1], with one of 1 and one of -1 added.

    The differences are of two runs' shares of right answers [problem]. With one answer to every problem that is Bonett
    and Price's interval (Journal of Educational and Behavioral Statistics 37, 2012, 479-488). With several it is on the
    safe side: it has width where no answers differ.
    """
    count = len(differences) + 2
    mean = sum(differences) / count
    variance = (sum(x * x for x in differences) + 2) / count - mean * mean
    half = _Z * sqrt(variance / count)
    return max(-1.0, mean - half), min(1.0, mean + half)
