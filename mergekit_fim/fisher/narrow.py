"""Linear layers whose weights are stored in 16 bits and multiplied in float32, without a float32 copy of the weights.

Many CPUs multiply float32 matrices faster than 16-bit ones (`placement.running_dtype`). Converted a run at a time, the
weights stay in the caches, and the checkpoint's mapped file is all the memory that they take.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# Elements of the weight that are converted at a time: large enough for matrix products at full speed.
_ELEMENTS = 1 << 21


def narrow_linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """xWᵀ + b in the dtype of x, [..., in] -> [..., out], whatever the dtype of the weight, which gets no gradient."""
    weight = module._parameters["weight"]  # as it is stored: see `_NarrowLinear`
    assert weight is not None
    if weight.dtype == x.dtype:
        return nn.functional.linear(x, weight, module.bias)
    product: torch.Tensor = _NarrowProduct.apply(x, weight, module.bias)
    return product


class _NarrowLinear(nn.Linear):
    """What a linear layer is while it is `narrowed`."""

    running_dtype: torch.dtype

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """For code that uses the weight itself, as Mamba's does: a copy in the dtype that the model runs in."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight.to(self.running_dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return narrow_linear(self, input)


@contextlib.contextmanager
def narrowed(module: nn.Linear, dtype: torch.dtype) -> Iterator[None]:
    """A context in which a linear layer multiplies in `dtype`, whatever its weight is stored in."""
    own = module.__class__
    module.__class__, module.running_dtype = _NarrowLinear, dtype  # type: ignore[assignment]
    try:
        yield
    finally:
        del module.running_dtype
        module.__class__ = own


class _NarrowProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        rows = x.reshape(-1, x.shape[-1])
        product = x.new_empty(len(rows), len(weight))
        for part, out in _parts(weight, product, x.dtype):
            out.copy_(rows @ part.mT)
        if bias is not None:
            product += bias
        return product.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return input_gradient(gradient, weight), None, None


def input_gradient(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """gW, [..., out] -> [..., in], in the dtype of the gradient, whatever that of the weight."""
    if weight.dtype == gradient.dtype:
        return gradient @ weight
    rows = gradient.reshape(-1, gradient.shape[-1])
    product = gradient.new_zeros(len(rows), weight.shape[1])
    for part, out in _parts(weight, rows, gradient.dtype):
        product.addmm_(out, part)
    return product.view(*gradient.shape[:-1], weight.shape[1])


def _parts(weight: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype) -> Any:
    """Runs of the weight's rows, converted, with the columns that belong to them."""
    step = max(1, _ELEMENTS // weight.shape[1])
    buffer = torch.empty((min(step, len(weight)), weight.shape[1]), dtype=dtype, device=weight.device)
    for start in range(0, len(weight), step):
        part = weight[start : start + step]
        yield buffer[: len(part)].copy_(part), columns[:, start : start + step]
