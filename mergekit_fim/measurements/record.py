"""Records of a Fisher measurement: numbers, from which all else follows. They need no torch."""

import functools
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata

import mergekit_fim
from mergekit_fim.config.parameters import FisherSettings


@dataclass(frozen=True)
class Experts:
    """The routed experts of one decoder layer."""

    count: int
    not_reached: tuple[int, ...]  # the numbers, from 0, of those to which no token of the measurement was sent

    @staticmethod
    def together(parts: Iterable["Experts | None"]) -> "Experts | None":
        """Join what parts of the tokens showed of one layer; None where no part showed anything."""
        known = [part for part in parts if part is not None]
        idle = [set(part.not_reached) for part in known]
        return Experts(known[0].count, tuple(sorted(set.intersection(*idle)))) if known else None


@dataclass(frozen=True)
class LayerFisher:
    """The measurement of one decoder layer."""

    index: int  # from 0
    parameters: int  # P, the number of parameters in the layer, all experts included
    squared_norms: tuple[float, ...]  # [sequence], ‖∇_{θ^l} L_n‖², from which all else follows
    experts: Experts | None = None  # none, too, where the choices of their router can't be seen

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
    """A diagonal Fisher information: the gradient of each sequence's mean next-token loss, squared, then averaged."""

    vocab_size: int  # the random tokens were uniform over this many
    dtype: str  # what the model ran in, such as "bfloat16"; squares and sums are wider
    settings: FisherSettings
    layers: tuple[LayerFisher, ...]  # in order
    warnings: tuple[str, ...] = ()  # what the user should know about how it was measured, a line each


@dataclass(frozen=True)
class ModelIdentity:
    """Which model was measured."""

    id: str  # its folder or its name on the Hub, with an adapter as in mergekit
    revision: str | None  # its branch, tag or commit, where one was given
    architecture: str | None  # the class in transformers
    num_layers: int  # its decoder layers
    vocab_size: int  # the random tokens were uniform over this many
    fingerprint: str  # see `models.identity.fingerprint`

    def difference(self, other: "ModelIdentity") -> str | None:
        """Say in what two models differ; None for two copies of one model."""
        own, others = (model.fingerprint.partition("-")[::2] for model in (self, other))
        parts = zip(("weights", "config.json"), own, others, strict=True)
        return " and ".join(name for name, a, b in parts if a != b) or None


@dataclass(frozen=True)
class Measurement:
    """A Fisher measurement and what was measured."""

    model: ModelIdentity
    fisher: FisherMeasurement  # the numbers, and the settings that they depend on
    versions: Mapping[str, str]  # the packages that it was made with

    @property
    def settings(self) -> FisherSettings:
        """Those of the numbers."""
        return self.fisher.settings

    @classmethod
    def of(cls, fisher: FisherMeasurement, model: ModelIdentity) -> "Measurement":
        """Make the record of a measurement that was just taken."""
        return cls(model, fisher, versions())


def versions() -> dict[str, str]:
    """List the versions of the packages that make a measurement or a merge."""
    packages = {name: _version(name) for name in ("mergekit", "torch", "transformers", "accelerate")}
    return {"mergekit-fim": mergekit_fim.__version__, **packages, "python": platform.python_version()}


# Each look reads and parses a file.
_version = functools.cache(metadata.version)
