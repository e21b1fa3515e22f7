"""Task vectors and what one linear layer is given -> the merged task vector. Pure functions of tensors.

K-FAC (arXiv 1503.05671) has the Fisher information of a linear layer y = W x, W [output, input], as A ⊗ G: A the mean
of x xᵀ over the inputs, and G, of gradients at the outputs, is left out here (docs/method.md). Of model k on n_k tokens

    A_k = X_kᵀX_k / n_k + λ_k I,    λ_k the damping times the mean of the first term's diagonal,

X_k [token, input]. The base is model 0, with w_0 = 1 − Σ_m β_m; a fine-tuned model m has w_m = β_m and the task vector
δ_m. The sharpness s tells the models' inputs further apart. With Ā = Σ_k w_k A_k,

    M_k = Ā^½ (Ā^-½ A_k Ā^-½)ˢ Ā^½,    so that M_k = A_k with s = 1.

The merged task vector Δ is the least of

    w_0 tr(Δ M_0 Δᵀ) + Σ_m β_m tr((Δ − δ_m) M_m (Δ − δ_m)ᵀ),    so that  Δ = (Σ_m β_m δ_m M_m) (Σ_k w_k M_k)⁻¹.

With s = 1 this is RegMean (arXiv 2212.09849) with weights. With one fine-tuned model δ is multiplied by
α = βrˢ / ((1 − β) + βrˢ) along each generalised eigenvector of A_1 and A_0, r its eigenvalue.

Every n_k is far below the width of a large model's layers: all is done within the span of the rows of all X_k, in an
orthonormal basis. Outside of it A_k is λ_k I.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SINGULAR = "the factors are singular, damping included"

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
    """What turns task vectors into the merged one, ready for all tensors that have the same inputs.

    With U [direction, input] of orthonormal rows, Δ = Σ_m c_m δ_m + (Σ_m (δ_m Uᵀ) T_m) U, or Σ_m δ_m C_m. U and T_m
    are made in float64.
    """

    def __init__(
        self, inputs: Sequence[Tensor], betas: Sequence[float], damping: float, sharpness: float, dtype: torch.dtype
    ) -> None:
        """Prepare the map.

        Args:
            inputs: X_k, [token, input] each, the base's first; on the device of the task vectors.
            betas: β_m, not negative, their sum at most 1.
            damping: a part of the mean diagonal, above 0.
            sharpness: s.
            dtype: that of the task vectors, float32 or float64.

        Raises:
            ValueError: coefficients out of range, or factors that are singular or not finite.
        """
        its = _sharpened(inputs, betas, damping, sharpness)
        self._plain = betas if its is None else None
        if its is None:
            return
        self._moving = [m for m, beta in enumerate(betas) if beta > 0]
        self._shares = [its.outside[m] for m in self._moving]
        self._basis: Tensor | None = its.basis.to(dtype)
        self._maps = []
        for m, share in zip(self._moving, self._shares, strict=True):
            made = its.scale[:, None] * its.maps[m] / its.scale
            made.diagonal().sub_(share)
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


def spreads(inputs: Sequence[Tensor], betas: Sequence[float], damping: float, sharpness: float) -> list[Spread]:
    """Compute the coefficients of every fine-tuned model's directions; see `InputMap` for the arguments.

    They are the eigenvalues of β_m M_m (Σ_k w_k M_k)⁻¹ within the span of the rows of all X_k.

    Raises:
        ValueError: coefficients out of range, or factors that are singular or not finite.
    """
    its = _sharpened([x[:: -(-len(x) // _TOKENS_OF_SPREAD)] for x in inputs], betas, damping, sharpness)
    if its is None:
        return [Spread(beta, 0.0, beta, beta, 0.0) for beta in betas]
    found = []
    for beta, own in zip(betas, its.maps, strict=True):
        values = torch.linalg.eigvalsh(own) if len(betas) == 1 else torch.linalg.eigvals(own).real
        alphas = values.clamp(0, 1)
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


@dataclass(frozen=True)
class _Sharpened:
    """What moments do to task vectors, within the span of the rows, where Ā is Uᵀ diag(scale²) U, and outside of it."""

    basis: Tensor  # U, [direction, input], of orthonormal rows
    scale: Tensor  # [direction]
    # β_m M_m (Σ_k w_k M_k)⁻¹ in U, its rows divided by `scale` and its columns multiplied: of each fine-tuned model
    # [direction, direction]. Of a single one it is symmetric.
    maps: list[Tensor]
    outside: list[float]  # c_m: a multiple of I there


def _sharpened(inputs: Sequence[Tensor], betas: Sequence[float], damping: float, sharpness: float) -> _Sharpened | None:
    """Prepare the moments; None where they make no difference. All is float64.

    With the rows Z = √(w_k / n_k) X_k of all models and λ̄ = Σ_k w_k λ_k, Ā is ZᵀZ + λ̄ I.
    """
    weights = check_betas(betas)
    lambdas = [damping * float(x.double().square().sum()) / x.numel() for x in inputs]
    mean = sum(w * each for w, each in zip(weights, lambdas, strict=True))
    if mean == 0 or max(weights) == 1:
        return None
    if not math.isfinite(mean):
        raise ValueError("the factors are not finite")
    rows = torch.cat([(w / len(x)) ** 0.5 * x.double() for x, w in zip(inputs, weights, strict=True)])
    is_whole = len(rows) >= rows.shape[1]
    values, vectors = torch.linalg.eigh(_gram(rows.T if is_whole else rows))
    # Directions of so little beside the damping change no coefficient, and are known to few digits.
    kept = values > max(1e-6 * mean, len(values) * torch.finfo(values.dtype).eps * float(values[-1]))
    values, vectors = values[kept], vectors[:, kept]
    basis = vectors.T if is_whole else (vectors / values.sqrt()).T @ rows
    scale = (values + mean).sqrt()
    whitened = rows @ basis.T / scale if is_whole else vectors * (values.sqrt() / scale)  # [row, direction]
    parts = zip(whitened.split([len(x) for x in inputs]), weights, lambdas, strict=True)
    # w_k B_k with B_k = Ā^-½ A_k Ā^-½: symmetric, not negative, and together I
    moments = [_gram(own.T) + torch.diag(w * each / scale.square()) for own, w, each in list(parts)[1:]]
    outside = torch.tensor(weights).double() * (torch.tensor(lambdas).double() / mean) ** sharpness
    maps = _maps(moments, weights, sharpness)
    if not (all(own.isfinite().all() for own in maps) and 0 < float(outside.sum()) < math.inf):
        raise ValueError(_SINGULAR)
    return _Sharpened(basis, scale, maps, (outside / outside.sum())[1:].tolist())


def _maps(moments: Sequence[Tensor], weights: Sequence[float], sharpness: float) -> list[Tensor]:
    """w_m B_mˢ (Σ_k w_k B_kˢ)⁻¹ of every fine-tuned model's w_m B_m.

    Raises:
        ValueError: the sum is singular.
    """
    if sharpness == 1:
        return list(moments)
    if len(moments) == 1:  # the base's has the same eigenvectors
        values, vectors = torch.linalg.eigh(moments[0])
        base, own = ((v.clamp(0, 1) / w) ** sharpness * w for v, w in zip((1 - values, values), weights, strict=True))
        return [vectors * (own / (base + own)) @ vectors.T]
    raised, eye = [], torch.eye(len(moments[0])).to(moments[0])
    for moment, w in zip((eye - sum(moments), *moments), weights, strict=True):
        values, vectors = torch.linalg.eigh(moment)
        raised.append(vectors * (values.clamp(min=0) / w) ** sharpness * w @ vectors.T if w else 0 * moment)
    total = sum(raised, torch.zeros_like(eye))
    inverse = torch.linalg.inv_ex(total).inverse
    if not (total @ inverse - eye).abs().max() < 1e-6:
        raise ValueError(_SINGULAR)
    return [own @ inverse for own in raised[1:]]


def _gram(rows: Tensor) -> Tensor:
    """R Rᵀ of [row, column], in blocks of which the symmetric ones are made once."""
    made = torch.empty(len(rows), len(rows), dtype=rows.dtype, device=rows.device)
    for start in range(0, len(rows), _BLOCK):
        end = start + _BLOCK
        made[start:, start:end] = block = rows[start:] @ rows[start:end].T
        made[start:end, end:] = block[_BLOCK:].T
    return made
