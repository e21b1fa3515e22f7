"""TIES' trimming: keep a task vector's largest entries, found by selection instead of a sort."""

import torch


def trim_(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Set all but the largest entries of `delta` to zero, in place (TIES, arXiv 2306.01708, section 4, step 1).

    Exactly k = max(1, ⌊density · n⌋) entries are kept, as in mergekit. Differences of 16-bit weights take few distinct
    magnitudes, so that many entries can equal the k-th largest: of these, a choice spread evenly over the tensor is
    kept, the same one every time, where mergekit's choice is the sort's.

    Args:
        delta: a task vector of n entries, any shape.
        density: fraction to keep, in (0, 1].

    Returns:
        `delta`.
    """
    n = delta.numel()
    keep = max(1, int(density * n))
    if keep >= n:
        return delta
    magnitude = delta.abs().reshape(-1)
    threshold = magnitude.kthvalue(n - keep + 1).values
    above = magnitude > threshold
    equal = (magnitude == threshold).nonzero()[:, 0]
    wanted = keep - int(above.sum())
    kept = equal[torch.arange(wanted, device=equal.device) * len(equal) // wanted]
    above[kept] = True
    return delta.masked_fill_(~above.view(delta.shape), 0)
