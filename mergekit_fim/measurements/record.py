"""What a Fisher measurement is: records of numbers, from which all else follows. Reading them needs no torch."""

import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version

import mergekit_fim
from mergekit_fim.config.parameters import FisherSettings


@dataclass(frozen=True)
class Experts:
    """The routed experts of one decoder layer.

    Attributes:
        count: how many there are.
        not_reached: those, from 0, that no token of the measurement was sent to.
    """

    count: int
    not_reached: tuple[int, ...]

    @staticmethod
    def together(found: Iterable["Experts | None"]) -> "Experts | None":
        """One layer's on all the tokens that it was seen on in parts; None where nothing was seen."""
        seen = [experts for experts in found if experts is not None]
        if not seen:
            return None
        return Experts(seen[0].count, tuple(sorted(set.intersection(*(set(its.not_reached) for its in seen)))))


@dataclass(frozen=True)
class LayerFisher:
    """The measurement of one decoder layer.

    Attributes:
        index: the layer, from 0.
        parameters: P, the number of parameters in the layer, all experts included.
        squared_norms: [sequence], ‖∇_{θ^l} L_n‖², from which all else follows.
        experts: None where it isn't a mixture of experts, or one whose router's choices can't be seen.
    """

    index: int
    parameters: int
    squared_norms: tuple[float, ...]
    experts: Experts | None = None

    @property
    def fisher(self) -> float:
        """F^l = 1/(N·P) · Σ_n ‖∇_{θ^l} L_n‖²: the mean diagonal Fisher information (arXiv 2603.21705)."""
        return math.fsum(self.squared_norms) / (len(self.squared_norms) * self.parameters)

    @property
    def stderr(self) -> float | None:
        """The standard error of `fisher` over the sequences; None for a single one."""
        n = len(self.squared_norms)
        if n < 2:
            return None
        mean = math.fsum(self.squared_norms) / n
        variance = math.fsum((s - mean) ** 2 for s in self.squared_norms) / (n - 1)
        return math.sqrt(variance / n) / self.parameters


@dataclass(frozen=True)
class FisherMeasurement:
    """Which Fisher: the diagonal one of the mean next-token loss per sequence, squared per sequence, then averaged.

    Attributes:
        vocab_size: the random tokens were uniform over this many.
        dtype: what the model ran in, such as "bfloat16"; squares and sums are wider.
        settings: samples, sequence length, seed and labels.
        layers: one entry per decoder layer, in order.
        warnings: what the user should know about how it was measured, a line each.
    """

    vocab_size: int
    dtype: str
    settings: FisherSettings
    layers: tuple[LayerFisher, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelIdentity:
    """Which model was measured.

    Attributes:
        id: its folder or its name on the Hub, with an adapter as in mergekit.
        revision: its branch, tag or commit, where one was given.
        architecture: the class in transformers.
        num_layers: its decoder layers.
        vocab_size: the random tokens were uniform over this many.
        fingerprint: see `models.identity.fingerprint`.
    """

    id: str
    revision: str | None
    architecture: str | None
    num_layers: int
    vocab_size: int
    fingerprint: str

    def difference(self, other: "ModelIdentity") -> str | None:
        """In what two models that are not the same differ; None for two copies of one model."""
        if self.fingerprint == other.fingerprint:
            return None
        (weights, config), (other_weights, other_config) = (m.fingerprint.partition("-")[::2] for m in (self, other))
        parts = [("weights", weights, other_weights), ("config.json", config, other_config)]
        return " and ".join(name for name, a, b in parts if a != b)


@dataclass(frozen=True)
class Measurement:
    """A Fisher measurement with what it is of.

    Attributes:
        model: the model.
        fisher: the numbers, and the settings that they depend on.
        versions: the packages that it was made with.
    """

    model: ModelIdentity
    fisher: FisherMeasurement
    versions: Mapping[str, str]

    @property
    def settings(self) -> FisherSettings:
        """Those of the numbers."""
        return self.fisher.settings

    @classmethod
    def of(cls, fisher: FisherMeasurement, model: ModelIdentity) -> "Measurement":
        """A measurement that was just made."""
        return cls(model, fisher, versions())


def versions() -> dict[str, str]:
    """What a measurement or a merge was made with."""
    packages = {name: version(name) for name in ("mergekit", "torch", "transformers", "accelerate")}
    return {"mergekit-fim": mergekit_fim.__version__, **packages, "python": platform.python_version()}
