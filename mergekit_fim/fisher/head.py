"""Hidden states before the output head -> gradient of the loss. The logits of the whole vocabulary never exist at once.

The head runs over chunks of the vocabulary. Each chunk serves the forward and the backward pass, by a softmax that is
rescaled as its maximum grows (Milakov and Gimelshein, arXiv 1805.02867). The model's own code does what comes after
the head: a factor, a soft cap.
"""

from collections.abc import Callable

import torch
from torch import nn

from mergekit_fim.fisher.rules import widened
from mergekit_fim.fisher.samples import sample_labels
from mergekit_fim.fisher.weights import Weights

# Logits that exist at a time.
_LOGITS = 1 << 21

# (output of the head module, [sequence, position, token]) -> logits, by the model's own forward pass
Tail = Callable[[torch.Tensor], torch.Tensor]


class Head:
    """The output head of a model, row by row: `module` makes logits of hidden states in `dtype`."""

    def __init__(self, module: nn.Linear, weights: Weights, dtype: torch.dtype) -> None:
        self._module, self._weights, self._dtype = module, weights, dtype
        self.size = module.out_features
        self.device = weights.rows(module, slice(0, 1)).device

    def __call__(self, hidden: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """The head's output for the tokens from `start` up to `end`: [sequence, position, token]."""
        bias = self._module.bias
        rows = self._weights.rows(self._module, slice(start, end)).to(self._dtype)
        # As one matrix: for a batch of them, torch's backward pass takes twice as long.
        output = nn.functional.linear(hidden.flatten(0, 1), rows, None if bias is None else bias.detach()[start:end])
        return output.view(*hidden.shape[:2], -1)

    def of_labels(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The head's output for one token per position: [sequence, position, 1]."""
        rows = self._weights.rows(self._module, labels.flatten()).to(self._dtype).view(*labels.shape, -1)
        output = (hidden * rows).sum(-1, keepdim=True)
        bias = self._module.bias
        return output if bias is None else output + bias.detach()[labels][..., None]


def is_separable(head: Head, tail: Tail, hidden: torch.Tensor) -> bool:
    """Whether a token's logit is a function of the head's output for this token alone, so that chunks are possible."""
    half, whole = max(1, min(64, head.size // 2)), min(128, head.size)
    hidden = hidden[:1, :1].detach()
    with torch.no_grad():
        parts = torch.cat([tail(head(hidden, 0, half)), tail(head(hidden, half, whole))], -1)
        together = tail(head(hidden, 0, whole))
    return parts.shape == together.shape and torch.allclose(parts, together, rtol=0.02, atol=1e-3)


def loss_gradient(
    head: Head, tail: Tail, hidden: torch.Tensor, labels: torch.Tensor | None, uniforms: torch.Tensor | None
) -> torch.Tensor:
    """Compute ∇ Σ_{n, t} −ln p(label_{n, t}), with respect to the hidden states before the head.

    Args:
        head: the output head.
        tail: what the model does to the head's output.
        hidden: [sequence, position, feature], one position per label.
        labels: [sequence, position], or None to sample them.
        uniforms: [sequence, position], the quantiles at which labels are sampled.

    Returns:
        [sequence, position, feature], float32 or wider.
    """
    hidden = hidden.detach().requires_grad_(True)
    if not is_separable(head, tail, hidden):
        return _whole(head, tail, hidden, labels, uniforms)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    starts = range(0, head.size, max(1, _LOGITS // hidden.shape[:2].numel()))
    expected = torch.zeros_like(hidden, dtype=wide)  # Σ_v e^(z_v − peak) ∇z_v
    peak = torch.full((*hidden.shape[:2], 1), -torch.inf, dtype=wide, device=hidden.device)
    total = torch.zeros_like(peak, dtype=torch.float64)
    for start in starts:
        with torch.enable_grad():
            logits = tail(head(hidden, start, min(start + starts.step, head.size)))
        scores = logits.detach().to(wide)
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        shrink = (peak - new_peak).exp_()
        weights = (scores - new_peak).exp_()
        total = total * shrink + weights.sum(-1, keepdim=True, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(logits, hidden, weights.to(logits.dtype))
        expected.mul_(shrink).add_(gradient)
        peak = new_peak
    expected /= total.to(wide)
    if labels is None:
        assert uniforms is not None
        labels = _sample(head, tail, hidden.detach(), uniforms, peak, total, starts)
    with torch.enable_grad():
        chosen = tail(head.of_labels(hidden, labels))
    (gradient,) = torch.autograd.grad(chosen, hidden, torch.ones_like(chosen))
    return expected - gradient


def _whole(
    head: Head, tail: Tail, hidden: torch.Tensor, labels: torch.Tensor | None, uniforms: torch.Tensor | None
) -> torch.Tensor:
    """Do as `loss_gradient`, with all the logits of one sequence at a time."""
    gradients: list[torch.Tensor] = []
    for n in range(len(hidden)):
        one = hidden[n : n + 1].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = widened(tail(head(one, 0, head.size))[0])
        target = sample_labels(logits.detach(), uniforms[n]) if uniforms is not None else labels[n]  # type: ignore
        loss = nn.functional.cross_entropy(logits, target.to(logits.device), reduction="sum")
        gradients += torch.autograd.grad(loss, one)
    return widened(torch.cat(gradients))


def _sample(
    head: Head,
    tail: Tail,
    hidden: torch.Tensor,
    uniforms: torch.Tensor,
    peak: torch.Tensor,
    total: torch.Tensor,
    starts: range,
) -> torch.Tensor:
    """Choose the first token at which the cumulative probability exceeds the quantile: [sequence, position]."""
    labels = torch.full(hidden.shape[:2], head.size - 1, device=hidden.device)
    wanted = uniforms.to(hidden.device)[..., None] * total
    before = torch.zeros_like(total)
    for start in starts:
        with torch.no_grad():
            logits = tail(head(hidden, start, min(start + starts.step, head.size)))
        cumulative = (logits.double() - peak).exp_().cumsum(-1).add_(before)
        found = torch.searchsorted(cumulative, wanted, right=True)
        here = (wanted >= before) & (found < cumulative.shape[-1])
        labels = torch.where(here, start + found, labels[..., None])[..., 0]
        before = cumulative[..., -1:]
    return labels
