"""Task vectors and what one linear layer is given -> the merged task vector. Pure functions of tensors.

K-FAC (arXiv 1503.05671) has the Fisher information of a linear layer y = W x, W [output, input], as A ⊗ G: A the mean
of x xᵀ over the inputs, and G, of gradients at the outputs, is left out here (docs/method.md). Of model k on n_k tokens

    A_k = X_kᵀX_k / n_k + λ_k I,    by `damping_of`,

X_k [token, input]. The base is model 0, with w_0 = 1 − Σ_m β_m; a fine-tuned model m has w_m = β_m and the task vector
δ_m. The merged task vector Δ is the least of

    w_0 tr(Δ A_0 Δᵀ) + Σ_m β_m tr((Δ − δ_m) A_m (Δ − δ_m)ᵀ),    so that  Δ = (Σ_m β_m δ_m A_m) (Σ_k w_k A_k)⁻¹

(RegMean, arXiv 2212.09849, with weights). Every n_k is far below the width of a large model's layers: all is done
within the span of the rows, and outside of it A_k is λ_k I.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import solve_triangular

_BLOCK = 256  # rows of a symmetric product that are made at a time

# A spread is of at most so many tokens of each model, evenly spaced: an eigenproblem takes their number's third power.
_TOKENS_OF_SPREAD = 128


@dataclass(frozen=True)
class Spread:
    """The coefficients of one matrix' directions: by what a model's task vector is multiplied there; see `spreads`.

    Attributes:
        mean: of the coefficients α.
        std: their standard deviation, the population's.
        least: the smallest.
        largest: the largest.
        directions: how many directions the merge treats otherwise than by β: (Σ d²)² / Σ d⁴, the participation ratio
            of d = α − β; 0 where there is none.
    """

    mean: float
    std: float
    least: float
    largest: float
    directions: float


def damping_of(rows: Tensor, damping: float) -> float:
    """λ of a factor XᵀX / n: `damping` times the mean of its diagonal.

    Args:
        rows: X, [token, width].
        damping: the part of the mean diagonal.
    """
    return damping * float(rows.double().square().sum()) / rows.numel()


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
            damping: see `damping_of`; above 0.
            dtype: that of the task vectors, float32 or float64.

        Raises:
            ValueError: coefficients out of range, or factors that are not finite.
        """
        weights = check_betas(betas)
        lambdas = [damping_of(x, damping) for x in inputs]
        mean = sum(w * each for w, each in zip(weights, lambdas, strict=True))
        self._plain = betas if mean == 0 or max(weights) == 1 else None
        if self._plain is not None:
            return
        self._moving = [m for m, beta in enumerate(betas) if beta > 0]
        rows, owners = _rows(inputs, weights)
        self._shares = [betas[m] * lambdas[m + 1] / mean for m in self._moving]
        count, width = rows.shape
        eye = torch.eye(min(count, width), dtype=rows.dtype, device=rows.device)
        self._basis = None
        if count >= width:
            factor = _cholesky(_gram(rows.T) + mean * eye)
            parts = [rows[owners[m + 1]] for m in self._moving]
            made = [x.T @ x + betas[m] * lambdas[m + 1] * eye for m, x in zip(self._moving, parts, strict=True)]
            self._maps = [torch.cholesky_solve(a, factor).T.to(dtype) for a in made]
            return
        factor = _cholesky(_gram(rows) + mean * eye)
        self._basis = solve_triangular(factor, rows, upper=False).to(dtype)
        self._maps = []
        for m, share in zip(self._moving, self._shares, strict=True):
            own = owners[m + 1]
            inverse = solve_triangular(factor, eye[:, own], upper=False)
            self._maps.append(((inverse @ factor[own]).T - share * eye).to(dtype))

    def __call__(self, deltas: Sequence[Tensor]) -> Tensor:
        """The merged task vector Δ of task vectors δ_m, all [output, input]."""
        if self._plain is not None:
            return weighted(deltas, self._plain)
        moving = [deltas[m] for m in self._moving]
        if self._basis is not None and self._is_better_whole(len(deltas[0])):
            eye = torch.eye(self._basis.shape[1], dtype=self._basis.dtype, device=self._basis.device)
            maps = zip(self._maps, self._shares, strict=True)
            self._maps = [(self._basis.T @ (own @ self._basis)).add_(eye, alpha=share) for own, share in maps]
            self._basis = None
        if self._basis is None:
            return sum((d @ own for d, own in zip(moving, self._maps, strict=True)), torch.zeros_like(deltas[0]))
        inside = torch.zeros(len(deltas[0]), len(self._basis), dtype=deltas[0].dtype, device=deltas[0].device)
        for delta, own in zip(moving, self._maps, strict=True):
            inside.addmm_(delta @ self._basis.T, own)
        merged = inside @ self._basis
        for delta, share in zip(moving, self._shares, strict=True):
            merged.add_(delta, alpha=share)
        return merged

    def _is_better_whole(self, outputs: int) -> bool:
        """Whether C_m, [input, input], takes fewer operations for a matrix of so many outputs, its making included."""
        assert self._basis is not None
        count, width = self._basis.shape
        return outputs * width + count * (count + width) < outputs * count * (2 + count / width)


def spreads(inputs: Sequence[Tensor], betas: Sequence[float], damping: float) -> list[Spread]:
    """Compute the coefficients of every fine-tuned model's directions.

    They are the eigenvalues of β_m A_m (Σ_k w_k A_k)⁻¹ within the span of the rows Z = √(w_k / n_k) X_k of all models.
    With ZZᵀ = Q D Qᵀ, the rows of Q √D are Z in an orthonormal basis of that span, in which Σ_k w_k A_k is D + λ̄ I.

    Args:
        inputs: X_k, [token, input] each, the base's first; of each some tokens are taken, evenly spaced.
        betas: β_m, not negative, their sum at most 1.
        damping: see `damping_of`; above 0.

    Raises:
        ValueError: the factors are not finite.
    """
    weights, some = check_betas(betas), [x[:: -(-len(x) // _TOKENS_OF_SPREAD)] for x in inputs]
    lambdas = [damping_of(x, damping) for x in some]
    mean = sum(w * each for w, each in zip(weights, lambdas, strict=True))
    if mean == 0 or max(weights) == 1:
        return [Spread(beta, 0.0, beta, beta, 0.0) for beta in betas]
    rows, owners = _rows(some, weights)
    values, vectors = torch.linalg.eigh(_finite(_gram(rows)))
    # Directions of so little beside the damping change no coefficient, and are known to few digits.
    kept = values > max(1e-6 * mean, len(values) * torch.finfo(values.dtype).eps * float(values[-1]))
    values, vectors = values[kept], vectors[:, kept]
    whitened = vectors * (values / (values + mean)).sqrt()  # [row, direction]
    found = []
    for beta, own, each in zip(betas, owners[1:], lambdas[1:], strict=True):
        part = whitened[own].T @ whitened[own] + torch.diag(beta * each / (values + mean))
        found.append(_spread(torch.linalg.eigvalsh(part).clamp(0, 1), beta))
    return found


def _spread(alphas: Tensor, beta: float) -> Spread:
    apart = (alphas - beta).square()
    apart = apart.where(apart > 1e-18, 0)
    fourth = float(apart.square().sum())
    directions = float(apart.sum()) ** 2 / fourth if fourth > 0 else 0.0
    deviation = float(alphas.std(correction=0))
    return Spread(float(alphas.mean()), deviation, float(alphas.min()), float(alphas.max()), directions)


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


def _rows(rows: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, list[slice]]:
    """√(w_k / n_k) X_k of all models, [token, width] in float64, and which rows are whose."""
    scaled = [(w / len(x)) ** 0.5 * x.double() for x, w in zip(rows, weights, strict=True) if w > 0]
    owners, end = [], 0
    for x, weight in zip(rows, weights, strict=True):
        owners.append(slice(end, end := end + (len(x) if weight > 0 else 0)))
    return torch.cat(scaled), owners


def _gram(rows: Tensor) -> Tensor:
    """R Rᵀ of [row, column], in blocks of which the symmetric ones are made once."""
    made = torch.empty(len(rows), len(rows), dtype=rows.dtype, device=rows.device)
    for part in torch.arange(len(rows), device="cpu").split(_BLOCK):
        start, end = int(part[0]), int(part[-1]) + 1
        made[start:, start:end] = block = rows[start:] @ rows[start:end].T
        made[start:end, end:] = block[end - start :].T
    return made


def _cholesky(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(_finite(matrix))
    if int(info):
        raise ValueError("the factors are singular, damping included")
    return factor


def _finite(matrix: Tensor) -> Tensor:
    if not torch.isfinite(matrix).all():
        raise ValueError("the factors are not finite")
    return matrix
