"""A module's inputs and the gradients of its outputs -> squared norms of its parameter gradients, per sequence.

No weight gradient is ever formed whole: for a linear layer with inputs A [position, in] and output gradients
B [position, out] of one sequence, ‖BᵀA‖² = ⟨AAᵀ, BBᵀ⟩ (Goodfellow, arXiv 1510.01799). So all sequences share one
forward and one backward pass. `batched` checks the rules against autograd for every kind of decoder layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

# Where the product BᵀA is cheaper than the two Gram matrices, it is formed in runs of this many elements.
_PRODUCT_ELEMENTS = 1 << 21


class GramCache:
    """The Gram matrices of the inputs of one layer: projections that share their input share the matrix."""

    def __init__(self) -> None:
        self._grams: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """AAᵀ, [sequence, position, position], of x, [sequence, position, feature]."""
        key = x.data_ptr(), x.shape, x.stride()
        if key not in self._grams:
            wide = widened(x)
            self._grams[key] = wide @ wide.mT, x  # x, so that no other tensor gets its address
        return self._grams[key][0]


@dataclass(frozen=True)
class Call:
    """One call of a module in a decoder layer, for all sequences of a micro-batch.

    Attributes:
        module: the module.
        parameters: its own parameters, by name, as they were in the call.
        x: its input, without a graph, [sequence, ..., feature]; [sequence, position] ids for an embedding.
        grams: the layer's Gram matrices.
    """

    module: nn.Module
    parameters: dict[str, torch.Tensor]
    x: torch.Tensor
    grams: GramCache


# (call, gradient of the module's output) -> [sequence], float64: the sum of ‖∇L_n‖² over the module's own parameters.
Rule = Callable[[Call, torch.Tensor], torch.Tensor]


def rule_for(module: nn.Module) -> Rule | None:
    """The rule for a module's own parameters, or None where only autograd will do."""
    for kind, rule in _RULES.items():
        if isinstance(module, kind):
            # A subclass with a forward pass of its own may use its parameters in another way.
            return rule if type(module).forward is kind.forward else None
    own = list(module.parameters(recurse=False))
    is_small = all(0 < parameter.ndim <= 2 and parameter.is_floating_point() for parameter in own)
    is_leaf = next(module.children(), None) is None
    return _broadcast if is_small and is_leaf and not isinstance(module, nn.modules.conv._ConvNd) else None


def widened(x: torch.Tensor) -> torch.Tensor:
    """In float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product_squared_norm(a: torch.Tensor, b: torch.Tensor, grams: GramCache) -> torch.Tensor:
    """Compute ‖BᵀA‖² per sequence, float64, by the Gram identity or the product, whichever takes fewer operations.

    Args:
        a: [sequence, position, in].
        b: [sequence, position, out].
        grams: where AAᵀ is kept.
    """
    length, inputs, outputs = a.shape[1], a.shape[2], b.shape[2]
    if length * (inputs + outputs) <= inputs * outputs:
        gram = widened(b) @ widened(b).mT
        return gram.mul_(grams(a)).sum(-1).sum(-1, dtype=torch.float64)
    total = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    step = max(1, _PRODUCT_ELEMENTS // inputs)
    for n in range(len(a)):
        x = widened(a[n])
        for part in widened(b[n]).mT.split(step):
            total[n] += (part @ x).square_().sum(-1).sum(dtype=torch.float64)
    return total


def _positions_squared_norm(gradients: torch.Tensor) -> torch.Tensor:
    """Compute ‖Σ_position g‖² per sequence, of the gradients at every position: [sequence, ..., feature]."""
    summed = widened(gradients).flatten(1, -2).sum(1)
    return summed.square_().sum(-1, dtype=torch.float64)


def _linear(call: Call, gradient: torch.Tensor) -> torch.Tensor:
    norms = product_squared_norm(call.x.flatten(1, -2), gradient.flatten(1, -2), call.grams)
    if call.parameters.get("bias") is not None:
        norms = norms + _positions_squared_norm(gradient)
    return norms


def _layer_norm(call: Call, gradient: torch.Tensor) -> torch.Tensor:
    module = call.module
    assert isinstance(module, nn.LayerNorm)
    normalised = F.layer_norm(widened(call.x), module.normalized_shape, eps=module.eps)
    shape = len(module.normalized_shape)
    gradient = widened(gradient).flatten(-shape)
    norms = _positions_squared_norm(gradient * normalised.flatten(-shape))
    if call.parameters.get("bias") is not None:
        norms = norms + _positions_squared_norm(gradient)
    return norms


def _embedding(call: Call, gradient: torch.Tensor) -> torch.Tensor:
    """The rows' gradients are sums over the positions that look them up: ⟨[id_s = id_t], BBᵀ⟩."""
    ids, wide = call.x.flatten(1), widened(gradient).flatten(1, -2)
    same = ids[:, :, None] == ids[:, None, :]
    return (wide @ wide.mT).mul_(same).sum(-1).sum(-1, dtype=torch.float64)


def _broadcast(call: Call, gradient: torch.Tensor) -> torch.Tensor:
    """Let autograd do elementwise parameters, such as every model's own RMSNorm, with one copy for each sequence."""
    copies = {
        name: parameter.detach()
        .expand(len(call.x), *[1] * (call.x.ndim - 1 - parameter.ndim), *parameter.shape)
        .clone()
        .requires_grad_(True)
        for name, parameter in call.parameters.items()
    }
    with torch.enable_grad():
        output = torch.func.functional_call(call.module, copies, (call.x,))
    gradients = torch.autograd.grad(output, list(copies.values()), gradient)
    return torch.stack([widened(g).flatten(1).square().sum(-1, dtype=torch.float64) for g in gradients]).sum(0)


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    Conv1D: _linear,  # GPT-2's: a linear layer with its weight transposed, which leaves the norm as it is
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}


class Recorder:
    """Applies the rules while a decoder layer runs forward, and then backward.

    Attributes:
        norms: [sequence], float64: ‖∇L_n‖² over all the layer's parameters.
    """

    def __init__(self, rules: dict[nn.Module, Rule], sequences: int) -> None:
        self._rules = rules
        self._called: set[nn.Module] = set()
        self._calls_valid = True
        self._sequences = sequences
        self._grams = GramCache()
        self._handles: list[Any] = []
        self.norms: Any = 0.0

    @property
    def is_valid(self) -> bool:
        """Whether every module was called once, with the sequences along the first axis."""
        return self._calls_valid and self._called == self._rules.keys()

    def __enter__(self) -> "Recorder":
        self._handles = [m.register_forward_hook(self._on_call, with_kwargs=True) for m in self._rules]
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not (self._is_by_sequence(x) and self._is_by_sequence(output)) or module in self._called:
            self._calls_valid = False
            return
        self._called.add(module)
        if not output.requires_grad:
            output.requires_grad_(True)
        call = Call(module, dict(module.named_parameters(recurse=False)), x.detach(), self._grams)
        output.register_hook(partial(self._on_gradient, call, self._rules[module]))

    def _is_by_sequence(self, value: Any) -> TypeGuard[torch.Tensor]:
        return isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[0] == self._sequences

    def _on_gradient(self, call: Call, rule: Rule, gradient: torch.Tensor) -> None:
        self.norms = self.norms + rule(call, gradient)
