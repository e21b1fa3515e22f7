"""Signals -> a merge coefficient for every group of tensors, at a strength between 0 (base) and 1 (long model).

Each is a family of coefficients that grows with the strength. None knows what a strength comes to in tokens: fronts are
compared, not strengths.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.evidence.signals import BASE, LONG, Signals
from benchmarks.pairs.training import layer_of
from mergekit_fim import Mapping, merge_coefficients

# Strength and signals of the groups -> coefficients [group].
Coefficients = Callable[[float, Signals], np.ndarray]


def groups_by(tensors: Sequence[str], part: Callable[[str], object]) -> list[list[int]]:
    """The tensors of the decoder layers [group, member], by layer and part."""
    found: dict[object, list[int]] = {}
    for index, name in enumerate(tensors):
        if (layer := layer_of(name)) is not None:
            found.setdefault((layer, part(name)), []).append(index)
    return list(found.values())


def whole(tensor: str) -> str:
    """A layer is one group."""
    return ""


def block(tensor: str) -> str:
    """Attention and MLP apart, each with the norm before it."""
    return "attention" if re.search(r"attn|attention|input_layernorm|ln_1", tensor) else "mlp"


def itself(tensor: str) -> str:
    """Every tensor is a group."""
    return tensor


def score(signals: Signals) -> np.ndarray:
    """F · ‖δ‖², the paper's [group]."""
    return signals.fisher(BASE) * signals.moved


def sigmoid_of(sharpness: float) -> Coefficients:
    """The package's own mapping, by `alpha_mean`."""

    def found(strength: float, signals: Signals) -> np.ndarray:
        return np.array(merge_coefficients(score(signals).tolist(), Mapping(sharpness, alpha_mean=strength)))

    return found


def anchored(sharpness: float, adapted: bool) -> Coefficients:
    """α = λ·σ(t·(max ln s − ln s)), t as it is or over the spread of ln s; λ is the strength."""

    def found(strength: float, signals: Signals) -> np.ndarray:
        logs = np.log(score(signals))
        slope = sharpness / max(1.0, logs.std()) if adapted else sharpness
        return strength / (1 + np.exp(-slope * (logs.max() - logs)))

    return found


def two_endpoints(quadratic: bool) -> Coefficients:
    """α = βq1 / ((1 − β)q0 + βq1), q = E[⟨∇L, δ⟩²] or F · ‖δ‖² at either model; β is the strength."""

    def found(strength: float, signals: Signals) -> np.ndarray:
        q0, q1 = (signals.quadratic(at) if quadratic else signals.fisher(at) for at in (BASE, LONG))
        return strength * q1 / ((1 - strength) * q0 + strength * q1)

    return found


def together(strength: float, signals: Signals) -> np.ndarray:
    """The α in [0, 1] that minimise (1 − β)·αᵀG0α + β·(1 − α)ᵀG1(1 − α), G[l, k] = E[⟨∇L, δ⟩_l ⟨∇L, δ⟩_k]."""
    from scipy.optimize import lsq_linear

    low, high = (signals.dots[at] * np.sqrt(share) for at, share in ((BASE, 1 - strength), (LONG, strength)))
    # A pull towards the strength itself, of a thousandth of the mean, decides what the sequences leave open.
    pull = np.sqrt(1e-3 * np.square([low, high]).sum() / low.shape[1]) * np.eye(low.shape[1])
    rows = np.concatenate([low, high, pull])
    wanted = np.concatenate([np.zeros(len(low)), high.sum(axis=1), pull.sum(axis=1) * strength])
    return lsq_linear(rows, wanted, bounds=(0, 1)).x
