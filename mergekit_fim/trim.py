"""TIES' trimming: keep a task vector's largest entries, found by selection instead of a sort."""

import torch


def trim_(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Set all but the largest entries of `delta` to zero, in place (TIES, arXiv 2306.01708, section 4, step 1).

    The number of entries to keep is k = max(1, ⌊density · n⌋), as in mergekit. Where several entries have exactly the
    magnitude of the k-th largest, all of them are kept; mergekit keeps an arbitrary choice of them.

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
    magnitude = delta.abs()
    threshold = magnitude.reshape(-1).kthvalue(n - keep + 1).values
    return delta.masked_fill_(magnitude < threshold, 0)
