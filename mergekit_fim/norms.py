"""Squared norms that neither lose digits nor copy a tensor to float32 whole, the same for any number of threads."""

import torch

# Elements that are converted to float32 at a time: on a CPU few enough to stay in its caches; on an accelerator enough
# to be worth a launch, and few enough to take hardly any memory.
_CHUNK, _CHUNK_ON_ACCELERATORS = 1 << 20, 1 << 23

# Elements of a row, which torch sums in float32, pairwise, so that the sum keeps seven digits. The rows' sums are added
# in float64. One thread sums a row: the last digits of a longer sum depend on the number of threads.
_ROW = 1 << 12


def squared_norm(tensor: torch.Tensor) -> torch.Tensor:
    """‖t‖² as a float64 scalar on the tensor's device, from float32 (for float64 tensors: float64) sums over rows."""
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for chunk in tensor.detach().reshape(-1).split(_chunk(tensor.device)):
        total += _sum_of_rows(chunk.to(_sum_dtype(chunk)).square())
    return total


def squared_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖² of two tensors of one shape, summed as in `squared_norm` on `b`'s device; `a` is moved part by part."""
    total = torch.zeros((), dtype=torch.float64, device=b.device)
    for x, y in zip(*(t.reshape(-1).split(_chunk(b.device)) for t in (a, b)), strict=True):
        x = x.to(b.device)
        total += _sum_of_rows((x.to(_sum_dtype(x)) - y.to(_sum_dtype(y))).square_())
    return float(total)


def _chunk(device: torch.device) -> int:
    return _CHUNK if device.type == "cpu" else _CHUNK_ON_ACCELERATORS


def _sum_of_rows(values: torch.Tensor) -> torch.Tensor:
    whole = len(values) // _ROW * _ROW
    rows = values[:whole].view(-1, _ROW).sum(-1)
    return rows.sum(dtype=torch.float64) + values[whole:].sum(dtype=torch.float64)


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
