"""Signals -> a merge coefficient for every group of tensors, at a strength between 0 (base) and 1 (long model).

Each mapping is a family of coefficients that grow with the strength. None knows how many tokens a strength gives. So
fronts are compared, not strengths.
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
    """Group the tensors of the decoder layers by layer and part [group, member]."""
    found: dict[object, list[int]] = {}
    for index, name in enumerate(tensors):
        if (layer := layer_of(name)) is not None:
            found.setdefault((layer, part(name)), []).append(index)
    return list(found.values())


def whole(tensor: str) -> str:
    """Make each layer one group."""
    return ""


def block(tensor: str) -> str:
    """Take attention and MLP apart, each with the norm before it."""
    return "attention" if re.search(r"attn|attention|input_layernorm|ln_1", tensor) else "mlp"


def itself(tensor: str) -> str:
    """Make each tensor a group."""
    return tensor


def score(signals: Signals) -> np.ndarray:
    """Return the paper's score F · ‖δ‖² [group]."""
    return signals.fisher(BASE) * signals.moved


def sigmoid_of(sharpness: float) -> Coefficients:
    """Return the package's own mapping, by `alpha_mean`."""

    def found(strength: float, signals: Signals) -> np.ndarray:
        return np.array(merge_coefficients(score(signals).tolist(), Mapping(sharpness, alpha_mean=strength)))

    return found


def anchored(sharpness: float, adapted: bool) -> Coefficients:
    """Return α = λ·σ(t·(max ln s − ln s)). λ is the strength. t is taken as it is, or over the spread of ln s."""

    def found(strength: float, signals: Signals) -> np.ndarray:
        logs = np.log(score(signals))
        slope = sharpness / max(1.0, logs.std()) if adapted else sharpness
        return strength / (1 + np.exp(-slope * (logs.max() - logs)))

    return found


def two_endpoints(quadratic: bool) -> Coefficients:
    """Return α = βq1 / ((1 − β)q0 + βq1). q is E[⟨∇L, δ⟩²] or F · ‖δ‖² at either model, β the strength."""

    def found(strength: float, signals: Signals) -> np.ndarray:
        q0, q1 = (signals.quadratic(at) if quadratic else signals.fisher(at) for at in (BASE, LONG))
        return strength * q1 / ((1 - strength) * q0 + strength * q1)

    return found


def together(strength: float, signals: Signals) -> np.ndarray:
    """Minimise (1 − β)·αᵀG0α + β·(1 − α)ᵀG1(1 − α) over α in [0, 1], with G[l, k] = E[⟨∇L, δ⟩_l ⟨∇L, δ⟩_k]."""
    from scipy.optimize import lsq_linear

    low, high = (signals.dots[at] * np.sqrt(share) for at, share in ((BASE, 1 - strength), (LONG, strength)))
    # The sequences leave some α open. A pull towards the strength, of a thousandth of the mean, decides these.
    pull = np.sqrt(1e-3 * np.square([low, high]).sum() / low.shape[1]) * np.eye(low.shape[1])
    rows = np.concatenate([low, high, pull])
    wanted = np.concatenate([np.zeros(len(low)), high.sum(axis=1), pull.sum(axis=1) * strength])
    return lsq_linear(rows, wanted, bounds=(0, 1)).x
