"""Points (mean tokens, accuracy) -> chord, Pareto set, front, and the front's area."""

from collections.abc import Iterator, Sequence

import numpy as np

from mergekit_fim.evaluate.front.bootstrap import BoolArray, FloatArray, IntArray


def chord(accuracy: FloatArray, tokens: FloatArray, base: int, long: int) -> FloatArray:
    """Find what the mix of base and long model that is as long as a run gives: [..., run], as the arguments."""
    start, span = tokens[..., [base]], tokens[..., [long]] - tokens[..., [base]]
    share = (tokens > start).astype(np.float64)  # of the long model, where both are equally long
    np.divide(tokens - start, span, out=share, where=np.broadcast_to(span != 0, share.shape))
    share = np.clip(share, 0, 1)
    return (1 - share) * accuracy[..., [base]] + share * accuracy[..., [long]]


def pareto_set(accuracy: FloatArray, tokens: FloatArray) -> BoolArray:
    """Find the runs [run] that no other beats: as accurate with as few tokens, and better in one of the two."""
    better = (accuracy[None] > accuracy[:, None]) | (tokens[None] < tokens[:, None])
    beaten = (accuracy[None] >= accuracy[:, None]) & (tokens[None] <= tokens[:, None]) & better
    return np.logical_not(beaten.any(axis=1))


def pieces(accuracy: FloatArray, tokens: FloatArray) -> Iterator[tuple[IntArray, IntArray, BoolArray]]:
    """Go along the fronts of many sets of points [set, run], from left to right: gift wrapping, a step for each piece.

    Yields:
        Of every set [set]: the run where the piece begins, and the run where it ends, which are the same for the last
        piece, as that goes on level for ever; and whether the set's last piece has been yielded before.
    """
    rows = np.arange(len(tokens))
    here = np.where(tokens == tokens.min(axis=1, keepdims=True), accuracy, -np.inf).argmax(axis=1)
    finished = np.zeros(len(tokens), dtype=bool)
    while not finished.all():
        rise, run = accuracy - accuracy[rows, here][:, None], tokens - tokens[rows, here][:, None]
        slopes = np.divide(rise, run, out=np.zeros_like(rise), where=(rise > 0) & (run > 0))
        there = slopes.argmax(axis=1)
        last = slopes[rows, there] == 0
        there = np.where(last, here, there)
        yield here, there, finished
        here, finished = there, last


def area(
    accuracy: FloatArray, tokens: FloatArray, heights: FloatArray, base: int, long: int, part: Sequence[int]
) -> FloatArray:
    """Average a front between the base's and the long model's tokens [set].

    Args:
        accuracy: [set, run]; likewise `tokens`.
        heights: what is averaged of the mixes on the front [set, run]; `accuracy` for the front's own area.
        base: the short end; likewise `long`.
        part: the runs that the front is of, beside these two.
    """
    # In a resample the base may be the longer one: the ends, and the chord between them, are the same.
    low, high = np.sort(tokens[:, [base, long]], axis=1).T
    # Where the ends meet, the mean is the height there: means of whole numbers are further apart than this.
    high = np.maximum(high, low + 1e-6)
    accuracy, tokens, heights = (x[:, [base, long, *part]] for x in (accuracy, tokens, heights))
    rows = np.arange(len(tokens))
    total = np.zeros(len(tokens))
    for here, there, finished in pieces(accuracy, tokens):
        start, end = tokens[rows, here], np.where(here == there, np.inf, tokens[rows, there])
        slope = (heights[rows, there] - heights[rows, here]) / (end - start)
        left, right = np.clip(start, low, high), np.clip(end, low, high)
        middle = heights[rows, here] + slope * ((left + right) / 2 - start)
        total += np.where(finished, 0, (right - left) * middle)
    return total / (high - low)


def held_out_gain(accuracy: FloatArray, tokens: FloatArray, base: int, long: int, part: Sequence[int]) -> FloatArray:
    """Tell what the mixes on the front of one half of the problems gain on the other half: the mean of both [...].

    At every length between the base's and the long model's on the half that chooses, the front there is a mix of runs.
    The other half says how accurate that mix is, and how accurate the mean of base and long model is. So luck in
    accuracy isn't counted. A mix keeps its length of the half that chose it. On the other half, noise would change the
    runs' order by length; and where a front has reached its height, the mix's own length would hide what it costs.

    Accuracy and tokens are [..., half, run]; `area` says what the others are.
    """
    others = accuracy[..., ::-1, :]  # each half's of the other one
    chosen, lengths, heights = (x.reshape(-1, x.shape[-1]) for x in (accuracy, tokens, others))
    gains = area(chosen, lengths, heights, base, long, part) - (heights[:, base] + heights[:, long]) / 2
    return np.asarray(gains.reshape(accuracy.shape[:-1]).mean(axis=-1))
