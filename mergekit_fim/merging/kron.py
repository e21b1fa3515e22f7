"""Task vectors and what one linear layer is given -> the merged task vector. Pure functions of tensors.

K-FAC (arXiv 1503.05671) has the Fisher information of a linear layer y = W x, W [output, input], as A ⊗ G: A the mean
of x xᵀ over the inputs, and G, of gradients at the outputs, is left out here (docs/method.md). Of model k on n_k tokens

    A_k = X_kᵀX_k / n_k + λ_k I,    λ_k the damping times the mean of the first term's diagonal,

X_k [token, input]. The base is model 0, with w_0 = 1 − Σ_m β_m; a fine-tuned model m has w_m = β_m and the task vector
δ_m. The merged task vector Δ is the least of

    w_0 tr(Δ A_0 Δᵀ) + Σ_m β_m tr((Δ − δ_m) A_m (Δ − δ_m)ᵀ),    so that  Δ = (Σ_m β_m δ_m A_m) (Σ_k w_k A_k)⁻¹

(RegMean, arXiv 2212.09849, with weights). Every n_k is far below the width of a large model's layers: all is done
within the span of the rows, and outside of it A_k is λ_k I.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.linalg import solve_triangular

_BLOCK = 256  # rows of a symmetric product that are made at a time

# A spread is of at most so many tokens of each model, evenly spaced: an eigenproblem takes their number's third power.
_TOKENS_OF_SPREAD = 128


@dataclass(frozen=True)
class Spread:
    """The coefficients α of one matrix' directions: by what a model's task vector is multiplied there."""

    mean: float
    std: float  # the population's
    least: float
    largest: float
    directions: float  # how many aren't treated by β: (Σ d²)² / Σ d⁴, the participation ratio of d = α − β, or 0


class InputMap:
    """Δ = (Σ_m β_m δ_m A_m) (Σ_k w_k A_k)⁻¹, ready for all tensors that have the same inputs.

    With the rows Z = √(w_k / n_k) X_k of all models and λ̄ = Σ_k w_k λ_k, Σ_k w_k A_k is ZᵀZ + λ̄ I. By Woodbury and
    ZZᵀ + λ̄ I = LLᵀ, V = L⁻¹Z, with E_m the selector of model m's rows and c_m = β_m λ_m / λ̄,

        Δ = Σ_m c_m δ_m + (Σ_m (δ_m Vᵀ) T_m) V,    T_m = Lᵀ E_m L⁻ᵀ − c_m I.

    V's rows are no longer than 1, whatever the size of the inputs, so that the products with task vectors lose no
    digits in float32; L, V and T_m are made in float64. Where there are more rows than inputs, Δ = Σ_m δ_m C_m with
    C_m = β_m A_m (ZᵀZ + λ̄ I)⁻¹ itself.
    """

    def __init__(self, inputs: Sequence[Tensor], betas: Sequence[float], damping: float, dtype: torch.dtype) -> None:
        """Prepare the map.

        Args:
            inputs: X_k, [token, input] each, the base's first; on the device of the task vectors.
            betas: β_m, not negative, their sum at most 1.
            damping: a part of the mean diagonal, above 0.
            dtype: that of the task vectors, float32 or float64.

        Raises:
            ValueError: coefficients out of range, or factors that are singular or not finite.
        """
        stacked = _stacked(inputs, betas, damping)
        self._plain = betas if stacked is None else None
        if stacked is None:
            return
        rows, owners, lambdas, mean = stacked
        self._moving = [m for m, beta in enumerate(betas) if beta > 0]
        self._shares = [betas[m] * lambdas[m + 1] / mean for m in self._moving]
        is_whole = len(rows) >= rows.shape[1]
        eye = torch.eye(min(rows.shape), dtype=rows.dtype, device=rows.device)
        factor, info = torch.linalg.cholesky_ex(_gram(rows.T if is_whole else rows) + mean * eye)
        if int(info):
            raise ValueError("the factors are singular, damping included")
        self._basis = None if is_whole else solve_triangular(factor, rows, upper=False).to(dtype)
        self._maps = []
        for m, share in zip(self._moving, self._shares, strict=True):
            own = owners[m + 1]
            if is_whole:
                made = torch.cholesky_solve(rows[own].T @ rows[own] + betas[m] * lambdas[m + 1] * eye, factor).T
            else:
                made = (solve_triangular(factor, eye[:, own], upper=False) @ factor[own]).T - share * eye
            self._maps.append(made.to(dtype))

    def __call__(self, deltas: Sequence[Tensor]) -> Tensor:
        """The merged task vector Δ of task vectors δ_m, all [output, input]."""
        if self._plain is not None:
            return weighted(deltas, self._plain)
        moving = [deltas[m] for m in self._moving]
        if self._basis is not None:
            outputs, (count, width) = len(deltas[0]), self._basis.shape
            # C_m, [input, input], may take fewer operations for so many outputs, its making included.
            if outputs * width + count * (count + width) < outputs * count * (2 + count / width):
                eye = torch.eye(width, dtype=self._basis.dtype, device=self._basis.device)
                maps = zip(self._maps, self._shares, strict=True)
                self._maps = [(self._basis.T @ (own @ self._basis)).add_(eye, alpha=share) for own, share in maps]
                self._basis = None
        if self._basis is None:
            return sum((d @ own for d, own in zip(moving, self._maps, strict=True)), torch.zeros_like(deltas[0]))
        inside = deltas[0].new_zeros(len(deltas[0]), len(self._basis))
        for delta, own in zip(moving, self._maps, strict=True):
            inside.addmm_(delta @ self._basis.T, own)
        merged = inside @ self._basis
        for delta, share in zip(moving, self._shares, strict=True):
            merged.add_(delta, alpha=share)
        return merged


def spreads(inputs: Sequence[Tensor], betas: Sequence[float], damping: float) -> list[Spread]:
    """Compute the coefficients of every fine-tuned model's directions; see `InputMap` for the arguments.

    They are the eigenvalues of β_m A_m (Σ_k w_k A_k)⁻¹ within the span of the rows Z = √(w_k / n_k) X_k of all models.
    With ZZᵀ = Q D Qᵀ, the rows of Q √D are Z in an orthonormal basis of that span, in which Σ_k w_k A_k is D + λ̄ I.

    Raises:
        ValueError: coefficients out of range, or factors that are not finite.
    """
    stacked = _stacked([x[:: -(-len(x) // _TOKENS_OF_SPREAD)] for x in inputs], betas, damping)
    if stacked is None:
        return [Spread(beta, 0.0, beta, beta, 0.0) for beta in betas]
    rows, owners, lambdas, mean = stacked
    values, vectors = torch.linalg.eigh(_gram(rows))
    # Directions of so little beside the damping change no coefficient, and are known to few digits.
    kept = values > max(1e-6 * mean, len(values) * torch.finfo(values.dtype).eps * float(values[-1]))
    values, vectors = values[kept], vectors[:, kept]
    whitened = vectors * (values / (values + mean)).sqrt()  # [row, direction]
    found = []
    for beta, own, each in zip(betas, owners[1:], lambdas[1:], strict=True):
        part = whitened[own].T @ whitened[own] + torch.diag(beta * each / (values + mean))
        alphas = torch.linalg.eigvalsh(part).clamp(0, 1)
        apart = (alphas - beta).square()
        apart = apart.where(apart > 1e-18, 0)
        fourth = float(apart.square().sum())
        directions = float(apart.sum()) ** 2 / fourth if fourth > 0 else 0.0
        ends = float(alphas.min()), float(alphas.max())
        found.append(Spread(float(alphas.mean()), float(alphas.std(correction=0)), *ends, directions))
    return found


def check_betas(betas: Sequence[float]) -> list[float]:
    """The weights w_k of the base and of the fine-tuned models; the base's is 0 where it is so but for rounding.

    Raises:
        ValueError: one is below 0.
    """
    rest = 1 - sum(betas)
    if not (all(beta >= 0 for beta in betas) and rest >= -1e-9):
        found = " + ".join(f"{beta:g}" for beta in betas)
        raise ValueError(f"expected coefficients of at least 0 that sum up to at most 1, found {found}")
    return [rest if rest > 1e-9 else 0.0, *betas]


def weighted(deltas: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ_m c_m δ_m: a single one that is 1 leaves its task vector as it is."""
    return sum((d * c for d, c in zip(deltas, shares, strict=True) if c), torch.zeros_like(deltas[0]))


def _stacked(
    inputs: Sequence[Tensor], betas: Sequence[float], damping: float
) -> tuple[Tensor, list[slice], list[float], float] | None:
    """Z, [row, input] in float64, which rows are whose, every λ_k, and λ̄; None where the factors make no difference."""
    weights = check_betas(betas)
    lambdas = [damping * float(x.double().square().sum()) / x.numel() for x in inputs]
    mean = sum(w * each for w, each in zip(weights, lambdas, strict=True))
    if mean == 0 or max(weights) == 1:
        return None
    if not math.isfinite(mean):
        raise ValueError("the factors are not finite")
    scaled = [(w / len(x)) ** 0.5 * x.double() for x, w in zip(inputs, weights, strict=True) if w > 0]
    counts = (len(x) if w > 0 else 0 for x, w in zip(inputs, weights, strict=True))
    owners = [slice(*ends) for ends in pairwise(accumulate(counts, initial=0))]
    return torch.cat(scaled), owners, lambdas, mean


def _gram(rows: Tensor) -> Tensor:
    """R Rᵀ of [row, column], in blocks of which the symmetric ones are made once."""
    made = torch.empty(len(rows), len(rows), dtype=rows.dtype, device=rows.device)
    for start in range(0, len(rows), _BLOCK):
        end = start + _BLOCK
        made[start:, start:end] = block = rows[start:] @ rows[start:end].T
        made[start:end, end:] = block[_BLOCK:].T
    return made
