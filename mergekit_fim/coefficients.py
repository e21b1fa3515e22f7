"""Fisher information and task-vector norms -> importance scores -> merge coefficients. Pure functions of numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAPPINGS = ("centred", "anchored")


@dataclass(frozen=True)
class Mapping:
    """How a layer's score becomes its merge coefficient; see `merge_coefficients`.

    Attributes:
        sharpness: slope of the sigmoid. Positive (the paper's direction): a high score takes a low coefficient.
            Zero: the same coefficient everywhere. Negative: a high score takes a high coefficient.
        alpha_min: lower end of the coefficients.
        alpha_max: upper end of the coefficients.
        alpha_mean: the mean of the coefficients, strictly between `alpha_min` and `alpha_max`; None to leave it open.
        mapping: the middle of the sigmoid without `alpha_mean`: "centred" at the mean log-score, or "anchored" at the
            largest.
    """

    sharpness: float = 1.0
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    alpha_mean: float | None = None
    mapping: str = "centred"

    def __post_init__(self) -> None:
        numbers = [self.sharpness, self.alpha_min, self.alpha_max]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"sharpness, alpha_min and alpha_max must be finite, got {numbers}")
        if self.alpha_min > self.alpha_max:
            raise ValueError(f"alpha_min ({self.alpha_min:g}) must not exceed alpha_max ({self.alpha_max:g})")
        if not math.isfinite(self.alpha_max - self.alpha_min):
            raise ValueError(f"alpha_min ({self.alpha_min:g}) and alpha_max ({self.alpha_max:g}) are too far apart")
        if self.alpha_mean is not None and not self.alpha_min < self.alpha_mean < self.alpha_max:
            raise ValueError(
                f"alpha_mean ({self.alpha_mean:g}) must lie strictly between alpha_min ({self.alpha_min:g}) "
                f"and alpha_max ({self.alpha_max:g})"
            )
        if self.mapping not in MAPPINGS:
            raise ValueError(f"mapping must be {' or '.join(MAPPINGS)}, got {self.mapping}")


def importance_scores(fisher: Sequence[float], task_vector_sq_norms: Sequence[float]) -> list[float]:
    """s^l = F^l · ‖δ^l‖², the layer's importance (arXiv 2603.21705, as summarised).

    Args:
        fisher: [layer], mean diagonal Fisher information of each decoder layer.
        task_vector_sq_norms: [layer], squared Frobenius norm of each layer's task vector.

    Returns:
        [layer] scores.

    Raises:
        ValueError: the lengths differ, or a value is negative or not finite.
    """
    if len(fisher) != len(task_vector_sq_norms):
        raise ValueError(f"{len(fisher)} Fisher values for {len(task_vector_sq_norms)} task-vector norms")
    for name, values in (("Fisher information", fisher), ("squared task-vector norm", task_vector_sq_norms)):
        for layer, value in enumerate(values):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"the {name} of layer {layer} must be finite and not negative, got {value}")
    return [f * d for f, d in zip(fisher, task_vector_sq_norms, strict=True)]


def merge_coefficients(scores: Sequence[float], mapping: Mapping) -> list[float]:
    """Turn importance scores into merge coefficients.

    z^l = (ln s^l − mean ln s) / max(1, std ln s), with the population's std (divided by the number of layers). If
    it is anchored, max ln s takes the place of the mean.
    α^l = alpha_min + (alpha_max − alpha_min) · sigmoid(b − sharpness · z^l). b is 0; or with `alpha_mean` it makes that
    the mean of α^l over the scored layers, and both mappings are the same.

    The log-normalisation, the sigmoid and its direction are the paper's (arXiv 2603.21705, as summarised). This exact
    form, the max(1, ·) and `alpha_mean` are this project's. That the paper anchors at the largest score is an inference
    (docs/method.md).

    Layers with a score of 0 (no task vector, or no Fisher information) get `alpha_max`, and don't count in the mean and
    the standard deviation.

    Args:
        scores: [layer], not negative.
        mapping: the parameters of the map.

    Returns:
        [layer] merge coefficients in [alpha_min, alpha_max].
    """
    scored = [layer for layer, score in enumerate(scores) if score > 0]
    alphas = [mapping.alpha_max] * len(scores)
    if not scored:
        return alphas
    logs = [math.log(scores[layer]) for layer in scored]
    mean = math.fsum(logs) / len(logs)
    std = math.sqrt(math.fsum((log - mean) ** 2 for log in logs) / len(logs))
    # Below one nat of spread the scores say little, so that they aren't stretched to the full range.
    anchor = max(logs) if mapping.mapping == "anchored" else mean
    exponents = [_clip(-mapping.sharpness * (log - anchor) / max(1.0, std)) for log in logs]
    span = mapping.alpha_max - mapping.alpha_min
    offset = 0.0
    if mapping.alpha_mean is not None:
        offset = _centre(exponents, (mapping.alpha_mean - mapping.alpha_min) / span)
    for layer, exponent in zip(scored, exponents, strict=True):
        alpha = mapping.alpha_min + span * _sigmoid(exponent + offset)
        alphas[layer] = min(mapping.alpha_max, max(mapping.alpha_min, alpha))  # rounding may go beyond
    return alphas


def _clip(exponent: float) -> float:
    """Limit an exponent far beyond where a sigmoid is 0 or 1 in float64, but where `_centre` tells exponents apart."""
    return max(-1e6, min(1e6, exponent))


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    e = math.exp(x)
    return e / (1.0 + e)


def _centre(exponents: Sequence[float], target: float) -> float:
    """Find the b at which the mean of sigmoid(exponent + b) is `target` in (0, 1), by bisection: it grows with b."""
    target = min(1 - 2**-53, max(2**-1074, target))  # rounding may make it 0 or 1
    logit = math.log(target) - math.log1p(-target)
    # At the lower end every sigmoid is at most the target, at the upper end at least.
    low, high = logit - max(exponents), logit - min(exponents)
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return middle
        if math.fsum(_sigmoid(x + middle) for x in exponents) / len(exponents) < target:
            low = middle
        else:
            high = middle
