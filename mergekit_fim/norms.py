"""Squared norms that neither lose digits nor copy a tensor to float32 whole."""

import torch

# Elements that are converted to float32 and summed at a time: small enough to stay in the caches, and a single float32
# sum of this length keeps seven digits (torch sums pairwise), while the sum of the chunks is kept in float64.
_CHUNK = 1 << 20


def squared_norm(tensor: torch.Tensor) -> torch.Tensor:
    """‖t‖² as a float64 scalar on the tensor's device, from float32 (for float64 tensors: float64) sums over chunks."""
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for chunk in tensor.detach().reshape(-1).split(_CHUNK):
        total += chunk.to(_sum_dtype(chunk)).square().sum()
    return total


def squared_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖² of two tensors of one shape, as `squared_norm` computes it."""
    total = 0.0
    for x, y in zip(a.reshape(-1).split(_CHUNK), b.reshape(-1).split(_CHUNK), strict=True):
        total += float((x.to(_sum_dtype(x)) - y.to(_sum_dtype(y))).square().sum())
    return total


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
