"""The records of a pre-pass: the models, their coefficients, and the config that carries these."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, ConfigReader, InputSliceDefinition, MergeConfiguration

from mergekit_fim.config.settings import Settings, settings_of
from mergekit_fim.measurements.factors import FactorsFile
from mergekit_fim.measurements.record import FisherMeasurement, Measurement
from mergekit_fim.merging.kron import Spread
from mergekit_fim.merging.output_config import ConfigDifference
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.prepass.task_vectors import LayerPair, TaskVectorNorms


@dataclass(frozen=True)
class SourceSlice:
    """Consecutive layers of one fine-tuned model in the config, and the base's layers that they are merged into.

    Attributes:
        module: mergekit's name of the module.
        base: the base model.
        base_start: the first of the base's layers; None in modules other than the decoder layers' own.
        source: the config's part, with the fine-tuned model and its layers.
        reader: mergekit's reader of the slice's parameters; the sources of one slice share it.
    """

    module: str
    base: ModelReference
    base_start: int | None
    source: InputSliceDefinition
    reader: ConfigReader

    @property
    def ends(self) -> tuple[ModelReference, ModelReference]:
        """The base, and the fine-tuned model."""
        return self.base, self.source.model

    def pairs(self) -> list[LayerPair]:
        """The pairs of decoder layers, in order."""
        if self.base_start is None:
            return []
        start, end = self.source.layer_range
        return [LayerPair(self.base_start + i, start + i) for i in range(end - start)]

    def gradient(self, index: int) -> float:
        """Where one of the layers stands on mergekit's gradients, from 0 to 1."""
        count = len(self.pairs())
        return index / (count - 1) if count > 1 else 1.0

    def settings(self, name: str) -> list[ConditionalParameter]:
        """The user's settings of a parameter as one list of filters, the highest precedence first."""
        return settings_of(self.reader, name, self.source.model)

    def filters(self, model: InputModel, of_layers: dict[str, Any], outside: Any) -> list[ConditionalParameter]:
        """Write a parameter as mergekit's filters: a value for each prefix of layers, and one for all outside.

        A prefix ends in a dot, so that `model.layers.1.` doesn't match layer 12. But it may be part of a name outside,
        such as `vision_model.layers.1.norm`: such names come first.
        """
        tensors = model.layout.modules[self.module]
        names = [tensor.name for tensor in tensors if any(prefix in tensor.name for prefix in of_layers)]
        values = dict.fromkeys(names, outside) | of_layers
        filters = [ConditionalParameter(filter=name, value=value) for name, value in values.items()]
        return [*filters, ConditionalParameter(value=outside)]

    def write(self, name: str, filters: list[ConditionalParameter]) -> None:
        """Put a parameter of the model into the config."""
        self.source.parameters = {**(self.source.parameters or {}), name: filters}


@dataclass(frozen=True)
class ModelCoefficients:
    """The merge coefficients of one fine-tuned model.

    Attributes:
        model: the fine-tuned model.
        norms: its squared task-vector norms, by pair of layers.
        scores: [pair], s = F · ‖δ‖².
        alphas: [pair], the merge coefficients.
        used_alphas: [pair], what the layer gets: α or, where the user set it by hand, the mean over its tensors.
        alpha_other: the merge coefficient outside the decoder layers, unless the user set it by hand.
    """

    model: InputModel
    norms: TaskVectorNorms
    scores: tuple[float, ...]
    alphas: tuple[float, ...]
    used_alphas: tuple[float, ...]
    alpha_other: float

    @property
    def pairs(self) -> tuple[LayerPair, ...]:
        """The layers, by the base's and then the model's index."""
        return tuple(self.norms.layers)


@dataclass(frozen=True)
class BaseCoefficients:
    """The measurement of a base, and the coefficients of each model that is merged into it.

    `origin` says in words where the measurement comes from; it is empty if it was made now.
    """

    base: InputModel
    measurement: Measurement
    origin: str
    models: tuple[ModelCoefficients, ...]

    @property
    def fisher(self) -> FisherMeasurement:
        """The numbers of the measurement."""
        return self.measurement.fisher


@dataclass(frozen=True)
class KronLayer:
    """What `fim_kron` does with a decoder layer of a fine-tuned model."""

    pair: LayerPair  # the layer, and the base's layer that it is merged into
    sq_norm: float  # of its task vector
    alpha: float  # the mean of its tensors' α
    beta: float  # the mean of α × the model's share of the weights, the coefficient of tensors without factors
    # How the directions' coefficients spread over all matrices with factors, in the parts `attention` (whatever mixes
    # tokens) and `mlp` that have any.
    spreads: Mapping[str, Spread]


@dataclass(frozen=True)
class KronModel:
    """What `fim_kron` does with a fine-tuned model: its layers in the base's order, and α outside them."""

    base: ModelReference
    model: ModelReference
    layers: tuple[KronLayer, ...]
    alpha_other: float


@dataclass(frozen=True)
class Kron:
    """What the pre-pass of `fim_kron` found: the factors of every model, and the fine-tuned models."""

    factors: Mapping[InputModel, FactorsFile]
    models: tuple[KronModel, ...]


@dataclass(frozen=True)
class ModelSettings:
    """A fine-tuned model's own parameters as the user set them, in the form of `config.settings.as_set`.

    Attributes:
        density: None but for fim_ties.
        density_is_default: whether the size of the base decides it.
        alpha: what is set by hand; None if the pre-pass finds all of it.
    """

    base: InputModel
    model: InputModel
    weight: Any
    density: Any
    density_is_default: bool
    alpha: Any


@dataclass(frozen=True)
class PrePass:
    """All that is known about a merge before its first tensor.

    Attributes:
        settings: the pre-pass settings.
        config: the normalised merge config, with the coefficients.
        inputs: every model, by reference, the base first.
        coefficients: per base; empty if every `alpha` was set by hand, and for fim_kron.
        models: the fine-tuned models' own parameters.
        shared: the parameters of whole tensors, as the user set them.
        kept: the tensors outside the language model that aren't merged, and whose they stay: `base` or `tuned`.
        default_density: the `density` of models whose config sets none; for fim_ties only, else None.
        differences: the config keys in which the inputs differ.
        warnings: what the user should know, a line each.
        kron: for fim_kron only.
    """

    settings: Settings
    config: MergeConfiguration
    inputs: Mapping[ModelReference, InputModel]
    coefficients: tuple[BaseCoefficients, ...]
    models: tuple[ModelSettings, ...]
    shared: Mapping[str, Any]
    kept: Mapping[str, str]
    default_density: float | None
    differences: tuple[ConfigDifference, ...]
    warnings: tuple[str, ...]
    kron: Kron | None = None

    @property
    def base(self) -> InputModel:
        """The merge's base model."""
        return next(iter(self.inputs.values()))
