"""Ask why a merge by the inputs' second moments works: make the same merge with one thing changed at a time.

A linear layer's inputs have second moments A0 at the base and A1 at the long model, on the same tokens. Their
generalised eigenvalues are the ratios r of A1 to A0. They say how much more of each direction the long model has.
Merging by inputs alone (RegMean, arXiv 2212.09849, with weights) multiplies δ by α = βr / ((1 − β) + βr) in each
direction; `fim_kron` has r⁴ in place of r. Here all of it is dense and in float64, for models whose layers are a few
hundred wide. What isn't nn.Linear or Conv1D moves uniformly.
"""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from benchmarks.evidence.entries import load, model_of, weights
from benchmarks.evidence.signals import BASE, LONG, Inputs, sequences
from benchmarks.pairs.training import layer_of

Moved = Callable[[Tensor, float], Tensor]  # ratios [direction] and strength -> coefficients [direction]
Rows = Mapping[str, Tensor]  # the inputs of each linear layer [token, input], by the name of its weight


def power(sharpness: float) -> Moved:
    """Return α = βrˢ / ((1 − β) + βrˢ): logit α = logit β + s · ln r. A sharpness s of 1 is the merge itself."""

    def found(ratios: Tensor, strength: float) -> Tensor:
        raised = ratios**sharpness
        return strength * raised / ((1 - strength) + strength * raised)

    return found


def share(ratios: Tensor, strength: float) -> Tensor:
    """Move all of δ in the directions with the largest ratios, nothing in the others. The strength is their share."""
    count = round(strength * len(ratios))
    found = torch.zeros_like(ratios)
    found[ratios.argsort(descending=True)[:count]] = 1
    return found


def changed(before: Callable[[Tensor], Tensor]) -> Moved:
    """Make the merge itself with other ratios."""
    return lambda ratios, strength: power(1)(before(ratios), strength)


def permuted(ratios: Tensor) -> Tensor:
    """Give each direction another direction's ratio."""
    return ratios[torch.randperm(len(ratios), generator=torch.Generator().manual_seed(len(ratios)))]


@dataclass(frozen=True)
class Directions:
    """One such merge.

    Attributes:
        inputs: the tokens. Their labels play no part.
        moved: the coefficients.
        damping: added to the diagonal of each model's second moments, in parts of what `by` says.
        by: "mean" is the mean of the model's own diagonal; "input" is each input's mean square, the mean of both
            models; "drift" is the mean square of what the long model's inputs differ by.
        rows: changes the inputs of both models before their second moments are taken.
        basis: "ratios" has the generalised eigenvectors; "sum" has the eigenvectors of A0 + A1; "inputs" has single
            inputs, with the ratios of their mean squares; "random" has an orthonormal basis that has nothing to do with
            either, with the ratios of "ratios".
        part: a pattern of the names of weights that are merged so. The others move uniformly.
    """

    inputs: Inputs = Inputs()  # noqa: RUF009 (it is frozen)
    moved: Moved = power(1)  # noqa: RUF009
    damping: float = 1e-3
    by: str = "mean"
    rows: Callable[[Rows, Rows], tuple[Rows, Rows]] = lambda low, high: (low, high)
    basis: str = "ratios"
    part: str = ""

    def __call__(self, pair: Path, strength: float) -> PreTrainedModel:
        """Make the merge of a pair at a strength."""
        _, deltas = weights(pair)
        found = {name: strength * delta for name, delta in deltas.items()}
        for name, (left, right, ratios) in _bases(pair, self).items():
            found[name] = ((left * self.moved(ratios, strength)) @ right).to(deltas[name].dtype)
            if _is_transposed(pair, name):
                found[name] = found[name].T
        return model_of(pair, found)


@functools.lru_cache(maxsize=1)
def _bases(pair: Path, how: Directions) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Split each linear layer's δ into directions.

    Returns:
        By the weight's name δR [output, direction], L [direction, input] with RL = I, and the ratios [direction].
    """
    _, deltas = weights(pair)
    low, high = how.rows(*recorded(pair, how.inputs))
    found = {}
    for name in low:
        if not re.search(how.part, name):
            continue
        delta = deltas[name].double()
        delta = delta.T if _is_transposed(pair, name) else delta
        a0, a1 = _moments(low[name], high[name], how.damping, how.by)
        eye = torch.eye(delta.shape[1])
        if how.basis == "sum":
            right = torch.linalg.eigh(a0 + a1).eigenvectors
            found[name] = delta @ right, right.T, (right * (a1 @ right)).sum(0) / (right * (a0 @ right)).sum(0)
            continue
        if how.basis == "inputs":
            found[name] = delta, eye.double(), a1.diagonal() / a0.diagonal()
            continue
        root = torch.linalg.cholesky(a0)
        inverse = torch.linalg.inv(root)
        ratios, u = torch.linalg.eigh(inverse @ a1 @ inverse.T)
        right, left = root @ u, u.T @ inverse
        if how.basis == "random":
            drawn = torch.randn(eye.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            right = torch.linalg.qr(drawn).Q
            left = right.T
        found[name] = delta @ right, left, ratios
    return found


def _moments(low: Tensor, high: Tensor, damping: float, by: str) -> list[Tensor]:
    """Return the damped second moments of both models' inputs."""
    found = [rows.T @ rows / len(rows) for rows in (low, high)]
    squares = [its.diagonal() for its in found]
    if by == "mean":
        added = [its.mean().expand(len(its)) for its in squares]
    else:
        added = [
            (squares[0] + squares[1]) / 2 if by == "input" else (high - low).square().mean().expand(low.shape[1])
        ] * 2
    return [its + damping * more.diag() for its, more in zip(found, added, strict=True)]


@functools.lru_cache(maxsize=4)
def recorded(pair: Path, inputs: Inputs) -> tuple[Rows, Rows]:
    """Record the inputs of the linear layers of base and long model on the same tokens."""
    models = [load(pair, name) for name in ("base", "long")]
    ids = torch.stack(list(sequences(pair, models, inputs)))
    return _given(models[BASE], ids), _given(models[LONG], ids)


@torch.no_grad()
def _given(model: PreTrainedModel, ids: Tensor) -> Rows:
    found: dict[str, Tensor] = {}
    handles = [
        part.register_forward_pre_hook(
            lambda _part, args, name=f"{name}.weight": found.update({name: args[0].flatten(0, -2).double()})
        )
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | Conv1D) and layer_of(f"{name}.weight") is not None
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@functools.lru_cache(maxsize=1)
def _transposed(pair: Path) -> frozenset[str]:
    model = load(pair, "base")
    return frozenset(f"{name}.weight" for name, part in model.named_modules() if isinstance(part, Conv1D))


def _is_transposed(pair: Path, name: str) -> bool:
    """Say whether a weight is stored as [input, output]."""
    return name in _transposed(pair)


# Changes to the rows of both models


def reversed_(low: Rows, high: Rows) -> tuple[Rows, Rows]:
    """Put base and long model in each other's place."""
    return high, low


def centred(low: Rows, high: Rows) -> tuple[Rows, Rows]:
    """Subtract the mean input."""
    return tuple({name: x - x.mean(0) for name, x in rows.items()} for rows in (low, high))  # type: ignore[return-value]


def drifted(times: float) -> Callable[[Rows, Rows], tuple[Rows, Rows]]:
    """Let the long model's inputs drift from the base's by so many times as much."""
    return lambda low, high: (low, {name: x + times * (high[name] - x) for name, x in low.items()})


def even_base(low: Rows, high: Rows) -> tuple[Rows, Rows]:
    """Spread the base's inputs evenly over all directions: only the long model's count."""
    return {name: _even(x) for name, x in low.items()}, high


def even_long(low: Rows, high: Rows) -> tuple[Rows, Rows]:
    """Spread the long model's inputs evenly over all directions: only the base's count."""
    return low, {name: _even(x) for name, x in high.items()}


def unpaired(low: Rows, high: Rows) -> tuple[Rows, Rows]:
    """Take the base on the first half of the tokens, the long model on the second."""
    half = {name: len(x) // 2 for name, x in low.items()}
    return {n: x[: half[n]] for n, x in low.items()}, {n: x[half[n] :] for n, x in high.items()}


def of_base_alone(low: Rows, high: Rows) -> tuple[Rows, Rows]:
    """Take the base on either half of the tokens: chance alone."""
    half = {name: len(x) // 2 for name, x in low.items()}
    return {n: x[: half[n]] for n, x in low.items()}, {n: x[half[n] :] for n, x in low.items()}


def _even(rows: Tensor) -> Tensor:
    width = rows.shape[1]
    return torch.eye(width, dtype=rows.dtype) * (width * rows.square().mean()).sqrt()
