"""Trim task vectors as TIES does: keep the largest entries, by selection instead of a sort.

The task vector never exists whole. Two passes go over the two tensors that it is the difference of, in runs that stay
in the processor's caches.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# The k-th largest magnitude is looked for between two quantiles of a sample of about this many entries. They are so far
# on either side of it that it lies outside about once in a million tensors; then all the entries are looked at.
_SAMPLE = 1 << 16
_DEVIATIONS = 5.0

# part of a task vector -> its entries, which the callee may overwrite
Part = Callable[[slice], torch.Tensor]


@dataclass(frozen=True)
class Threshold:
    """Which entries of a task vector are kept: all from a magnitude up, but for some that have just this magnitude.

    Attributes:
        magnitude: of the smallest entry that is kept; above 0.
        dropped: [entry], the positions of the entries of this magnitude that are not kept, in order.
    """

    magnitude: float
    dropped: torch.Tensor


def runs(entries: int, device: torch.device) -> Iterator[slice]:
    """Divide a tensor into runs of consecutive entries: on a CPU, so short that they stay in its caches."""
    step = 1 << 18 if device.type == "cpu" else 1 << 24  # at most 2^24: `_compare`'s sums are exact up to there
    for start in range(0, max(1, entries), step):
        yield slice(start, min(start + step, entries))


def find_threshold(part: Part, entries: int, density: float, device: torch.device) -> Threshold | None:
    """Find what TIES' trimming keeps of a task vector (arXiv 2306.01708, section 4, step 1).

    Exactly k = max(1, ⌊density · n⌋) entries are kept, as in mergekit. Differences of 16-bit weights take few distinct
    magnitudes, so many entries can equal the k-th largest. Of these it keeps a choice that is spread evenly over the
    tensor, the same one every time. mergekit keeps those that its sort puts first.

    Args:
        part: the task vector's entries in a slice of 0 to n.
        entries: n.
        density: fraction to keep, in (0, 1].
        device: where the parts are.

    Returns:
        The threshold, or None where everything is kept: also where no more than k entries differ from zero, and where
        NaN leaves no order.
    """
    keep = max(1, int(density * entries))
    if keep >= entries:
        return None
    low, high = _bracket(part, entries, keep)
    while True:
        above, magnitudes, positions = 0, [], []
        for run in runs(entries, device):
            magnitude = part(run).abs_()
            over = _compare(torch.gt, magnitude, high)
            above += int(over.sum())
            # Without zeros: most of a tensor may be zeros, and whether they are kept makes no difference.
            inside = _compare(torch.ge if low else torch.gt, magnitude, low).sub_(over).nonzero()[:, 0]
            magnitudes.append(magnitude[inside])
            positions.append(inside.add_(run.start).to(torch.int32 if entries < 2**31 else torch.int64))
        count = sum(map(len, magnitudes))
        if above < keep <= above + count:
            break
        if above < keep and low == 0:
            return None
        low, high = 0.0, math.inf
    near = torch.cat(magnitudes)
    threshold = _smallest(near, count - (keep - above) + 1)
    kept = keep - above - int(torch.count_nonzero(near > threshold))
    del near
    equal = [where[magnitude == threshold] for magnitude, where in zip(magnitudes, positions, strict=True)]
    return Threshold(float(threshold), torch.cat([*_dropped(equal, kept)]))


def _dropped(equal: list[torch.Tensor], kept: int) -> Iterator[torch.Tensor]:
    """Choose which of equal entries, whose positions are given part by part, are not among the `kept` ones.

    Of E entries W are kept: the i-th where ⌈(i + 1)W/E⌉ − ⌈iW/E⌉ is 1.
    """
    total, before = sum(map(len, equal)), 0
    for where in equal:
        ranks = torch.arange(before, before + len(where) + 1, device=where.device)
        quota = -torch.div(-ranks * kept, total, rounding_mode="floor")
        yield where[quota.diff() == 0]
        before += len(where)


def _compare(comparison: Callable[..., torch.Tensor], entries: torch.Tensor, value: float) -> torch.Tensor:
    """Compare: 1 or 0 in the entries' dtype, which torch on a CPU writes several times faster than booleans."""
    if entries.device.type != "cpu":
        return comparison(entries, value).to(entries.dtype)
    return comparison(entries, value, out=torch.empty_like(entries))


def _smallest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Select the k-th smallest. CUDA does so with one block of threads, and not at all if it is to be deterministic."""
    return values.kthvalue(k).values if values.device.type == "cpu" else values.sort().values[k - 1]


def _bracket(part: Part, entries: int, keep: int) -> tuple[float, float]:
    """Guess two magnitudes between which the k-th largest lies, from an evenly spread sample."""
    stride = entries // _SAMPLE
    if stride < 2:
        return 0.0, math.inf
    sample = part(slice(0, entries, stride)).abs_().sort(descending=True).values
    expected, n = keep / entries * len(sample), len(sample)
    margin = _DEVIATIONS * math.sqrt(expected * (1 - keep / entries)) + 1
    first, last = math.floor(expected - margin), math.ceil(expected + margin)
    return float(sample[last]) if last < n else 0.0, float(sample[first]) if first >= 0 else math.inf


def trim_run(delta: torch.Tensor, run: slice, threshold: Threshold | None) -> torch.Tensor:
    """Set the entries of a run of a task vector, [entry], that are not kept to zero; `delta` may be overwritten."""
    if threshold is None:
        return delta
    span = torch.tensor([run.start, run.stop], dtype=threshold.dropped.dtype, device=delta.device)
    first, last = torch.searchsorted(threshold.dropped, span).tolist()
    if first < last:
        delta.index_fill_(0, threshold.dropped[first:last].long() - run.start, 0)
    # The largest number below, in the entries' dtype: `hardshrink` keeps what is larger than its argument.
    ends = (torch.tensor(value, dtype=delta.dtype, device="cpu") for value in (threshold.magnitude, 0.0))
    return F.hardshrink(delta, float(torch.nextafter(*ends)))
