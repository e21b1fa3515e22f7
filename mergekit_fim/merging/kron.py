"""Task vectors and Kronecker factors of one linear layer -> the merged task vector. Pure functions of tensors.

K-FAC (arXiv 1503.05671) has the Fisher information of a linear layer y = W x, W [output, input], as A ⊗ G: A the mean
of x xᵀ over the inputs, G that of g gᵀ over the gradients at the outputs. Of model k on n_k tokens

    A_k = X_kᵀX_k / n_k + λ_k I,    G_k = B_kᵀB_k / n_k + μ_k I,    by `damping_of`,

X_k [token, input], B_k [token, output]. The base is model 0, with w_0 = 1 − Σ_m β_m; a fine-tuned model m has
w_m = β_m and the task vector δ_m. The merged task vector Δ is the least of

    w_0 tr(G_0 Δ A_0 Δᵀ) + Σ_m β_m tr(G_m (Δ − δ_m) A_m (Δ − δ_m)ᵀ),    so that  Σ_k w_k G_k Δ A_k = Σ_m β_m G_m δ_m A_m

(MaTS, arXiv 2312.04339, whose factors are of data). With inputs alone, G = I, it is RegMean (arXiv 2212.09849) with
weights. Every n_k is far below the width of a large model's layers: all is done within the span of the rows, and
outside of it A_k is λ_k I.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import solve_triangular

# Conjugate gradients end at this part of the right-hand side, or fail after so many steps.
_TOLERANCE, _STEPS = 1e-10, 2000

_BLOCK = 256  # rows of a symmetric product that are made at a time

# A spread is of at most so many tokens of each model, evenly spaced: an eigenproblem takes their number's third power.
_TOKENS_OF_SPREAD = 128


@dataclass(frozen=True)
class Spread:
    """The coefficients of one tensor's directions, or pairs of them: by what a model's task vector is multiplied there.

    They are those within the span of the rows; see `spread`.

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


def merge_by_both(deltas: Sequence[Tensor], inputs: "Side", gradients: "Side", betas: Sequence[float]) -> Tensor:
    """The merged task vector Δ by both factors.

    With orthonormal bases U of the gradients' span and V of the inputs', the equation falls into four: outside both
    spans Δ = Σ_m c_m δ_m with c_m = β_m μ_m λ_m / Σ_k w_k μ_k λ_k; outside one of them it is that of a single factor;
    and UᵀΔV solves it with the factors in these bases. For one fine-tuned model there are P and Q that turn these into
    diagonals, PᵀA_kP = a_k and QᵀG_kQ = g_k, and the entry (i, j) of δ in them is multiplied by
    α_ij = β g1_i a1_j / ((1 − β) g0_i a0_j + β g1_i a1_j). For several there is no closed form: conjugate gradients.

    Args:
        deltas: δ_m, [output, input] each, in float32 or float64.
        inputs: the A_k.
        gradients: the G_k.
        betas: β_m, not negative, their sum at most 1.

    Returns:
        [output, input], in the dtype of the task vectors.

    Raises:
        ValueError: coefficients out of range, factors that are singular, or conjugate gradients that don't converge.
    """
    weights, a, g = check_betas(betas), inputs, gradients
    outside = sum(w * x * y for w, x, y in zip(weights, a.dampings, g.dampings, strict=True))
    if outside == 0 or max(weights) == 1:
        return weighted(deltas, betas)
    dtype = deltas[0].dtype
    v, u = a.basis.to(dtype), g.basis.to(dtype)  # [rank, input], [rank, output]
    shares = [beta * x * y / outside for beta, x, y in zip(betas, a.dampings[1:], g.dampings[1:], strict=True)]
    merged = weighted(deltas, shares)
    right = [delta @ v.T for delta in deltas]  # [output, rank]
    left = [u @ delta for delta in deltas]  # [rank, input]
    core = [(u @ each).double() for each in right]
    by_inputs = a.solved([w * y for w, y in zip(weights, g.dampings, strict=True)])
    by_outputs = g.solved([w * x for w, x in zip(weights, a.dampings, strict=True)])
    new_right = sum((y @ c.T.to(dtype) for y, c in zip(right, by_inputs, strict=True)), torch.zeros_like(right[0]))
    new_left = sum((c.to(dtype) @ b for b, c in zip(left, by_outputs, strict=True)), torch.zeros_like(left[0]))
    inner = _core(core, a, g, weights).to(dtype)
    old_right, old_left = merged @ v.T, u @ merged
    inner += u @ (old_right - new_right) - new_left @ v.T
    merged += (new_right - old_right + u.T @ inner) @ v
    return merged.add_(u.T @ (new_left - old_left))


class Side:
    """One of the two factors of all models, in an orthonormal basis of the span of all their rows.

    Attributes:
        basis: [direction, width], float64.
        factors: of each model, [direction, direction], damping included, float64.
        dampings: of each model, what the factor is outside the span.
    """

    def __init__(self, rows: Sequence[Tensor], damping: float) -> None:
        """Make it of the rows [token, width] of all models, the base's first.

        Raises:
            ValueError: they are not finite.
        """
        self.dampings = [damping_of(x, damping) for x in rows]
        stacked, owners = _rows(rows, [1.0] * len(rows))
        wide = len(stacked) < stacked.shape[1]
        values, vectors = torch.linalg.eigh(_finite(_gram(stacked if wide else stacked.T)))
        # Directions of so little beside the damping change no coefficient, and are known to few digits.
        rounding = len(values) * torch.finfo(values.dtype).eps * float(values[-1])
        kept = values > max(1e-6 * min(self.dampings), rounding)
        values, vectors = values[kept], vectors[:, kept]
        if wide:
            inside = values.sqrt()[:, None] * vectors.T
            self.basis = (vectors / values.sqrt()).T @ stacked
        else:
            self.basis = vectors.T
            inside = self.basis @ stacked.T
        eye = torch.eye(len(values), dtype=values.dtype, device=values.device)
        self.factors = [
            inside[:, own] @ inside[:, own].T + each * eye for own, each in zip(owners, self.dampings, strict=True)
        ]

    def solved(self, weights: Sequence[float]) -> list[Tensor]:
        """(Σ_k w_k F_k)⁻¹ w_m F_m of each fine-tuned model m, of this side's factors F."""
        factor = _cholesky(self.together(weights))
        return [torch.cholesky_solve(w * f, factor) for w, f in zip(weights[1:], self.factors[1:], strict=True)]

    def together(self, weights: Sequence[float]) -> Tensor:
        """Σ_k w_k F_k."""
        return sum((w * f for w, f in zip(weights, self.factors, strict=True)), torch.zeros_like(self.factors[0]))


def _core(deltas: Sequence[Tensor], a: Side, g: Side, weights: Sequence[float]) -> Tensor:
    """X of Σ_k w_k G_k X A_k = Σ_m β_m G_m δ_m A_m within both spans, in coordinates in which Σ_k w_k F_k = I."""
    c, d = (_cholesky(side.together(weights)) for side in (a, g))
    inner, outer = ([_congruent(factor, f) for f in side.factors] for factor, side in ((c, a), (d, g)))
    right = [d.T @ delta @ c for delta in deltas]
    if len(deltas) == 1:
        beta = weights[1]
        (x, p), (y, q) = (torch.linalg.eigh(beta * factors[1]) for factors in (inner, outer))
        own = (y / beta)[:, None] * x
        rest = ((1 - y) / (1 - beta))[:, None].clamp_min(0) * (1 - x)
        found = q @ (own / (own + rest) * (q.T @ right[0] @ p)) @ p.T
    else:
        target = sum(
            (w * (o @ r @ i) for w, o, r, i in zip(weights[1:], outer[1:], right, inner[1:], strict=True)),
            torch.zeros_like(right[0]),
        )
        found = _conjugate_gradients(outer, inner, weights, target)
    return solve_triangular(d.T, solve_triangular(c, found, upper=False, left=False), upper=True)


def _conjugate_gradients(
    outer: Sequence[Tensor], inner: Sequence[Tensor], weights: Sequence[float], target: Tensor
) -> Tensor:
    """X of Σ_k w_k O_k X I_k = target (Hestenes and Stiefel 1952), for symmetric positive definite factors."""

    def applied(x: Tensor) -> Tensor:
        return sum((w * (o @ x @ i) for w, o, i in zip(weights, outer, inner, strict=True) if w), torch.zeros_like(x))

    x, residual = torch.zeros_like(target), target.clone()
    step, norm = residual.clone(), residual.square().sum()
    enough = _TOLERANCE**2 * norm
    for _ in range(_STEPS):
        if norm <= enough:
            return x
        moved = applied(step)
        length = norm / (step * moved).sum()
        x += length * step
        residual -= length * moved
        before, norm = norm, residual.square().sum()
        step = residual + norm / before * step
    raise ValueError(f"conjugate gradients did not converge in {_STEPS} steps")


def spread(
    model: int,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    betas: Sequence[float],
    damping: float,
    tokens: int | None = _TOKENS_OF_SPREAD,
) -> Spread:
    """The coefficients of a fine-tuned model's directions, from eigenvalues alone.

    By inputs alone they are the eigenvalues of β_m A_m (Σ_k w_k A_k)⁻¹ within the span of the rows; by both factors
    α_ij = β g1_i a1_j / ((1 − β) g0_i a0_j + β g1_i a1_j) of the pairs of directions, where several fine-tuned models
    have no bases in common: all but this one then count as one model, with the weighted means of their factors.

    Args:
        model: which of the fine-tuned ones, from 0.
        inputs: X_k, [token, input] each, the base's first.
        gradients: B_k, [token, output] each; None by inputs alone.
        betas: β_m, not negative, their sum at most 1.
        damping: see `damping_of`; above 0.
        tokens: at most so many of each model, evenly spaced; None for all.

    Raises:
        ValueError: the factors are singular or not finite.
    """
    beta, weights = betas[model], check_betas(betas)
    told = any(damping_of(x, damping) for x in inputs)
    if beta in (0.0, 1.0) or not told:
        return Spread(beta, 0.0, beta, beta, 0.0)
    shares = []
    for rows in (inputs, gradients) if gradients is not None else (inputs,):
        side = Side([x if tokens is None else x[:: -(-len(x) // tokens)] for x in rows], damping)
        factor = _cholesky(side.together(weights))
        shares.append(torch.linalg.eigvalsh(_congruent(factor, beta * side.factors[model + 1])).clamp(0, 1))
    alphas = shares[0]
    if len(shares) == 2:
        own = shares[1][:, None] * shares[0] / beta
        rest = (1 - shares[1])[:, None] * (1 - shares[0]) / (1 - beta)
        alphas = (own / (own + rest)).flatten()
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


def _congruent(factor: Tensor, matrix: Tensor) -> Tensor:
    """L⁻¹ M L⁻ᵀ, symmetric."""
    half = solve_triangular(factor, matrix, upper=False)
    made = solve_triangular(factor, half.T, upper=False)
    return (made + made.T) / 2


def _cholesky(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(_finite(matrix))
    if int(info):
        raise ValueError("the factors are singular, damping included")
    return factor


def _finite(matrix: Tensor) -> Tensor:
    if not torch.isfinite(matrix).all():
        raise ValueError("the factors are not finite")
    return matrix
