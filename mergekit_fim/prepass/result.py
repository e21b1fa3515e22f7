"""What a pre-pass found, as records: the models, their coefficients, and the config that carries these."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, ConfigReader, InputSliceDefinition, MergeConfiguration

from mergekit_fim.config.settings import Settings, settings_of
from mergekit_fim.measurements.record import FisherMeasurement, Measurement
from mergekit_fim.merging.kron import Spread
from mergekit_fim.merging.output_config import ConfigDifference
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.prepass.factors import MeasuredFactors
from mergekit_fim.prepass.task_vectors import LayerPair, TaskVectorNorms


@dataclass(frozen=True)
class SourceSlice:
    """A run of layers of one fine-tuned model in the config, with the base's run that it is merged into.

    Attributes:
        module: mergekit's module that it is in.
        base: the base model.
        base_start: the first layer of the base's run; None where the module isn't that of the decoder layers.
        source: the config's part, with the fine-tuned model and its layers.
        reader: mergekit's, which knows where the parameters of the slice stand.
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
        """The user's settings of a parameter, from the highest to the lowest precedence, as one list of filters."""
        return settings_of(self.reader, name, self.source.model)

    def filters(self, model: InputModel, of_layers: dict[str, Any], outside: Any) -> list[ConditionalParameter]:
        """A parameter as mergekit's filters: a value by each layer prefix of the model, and one for what is outside.

        A prefix ends in a dot, so that `model.layers.1.` doesn't match layer 12. But it may be a part of a name
        outside, such as `vision_model.layers.1.norm`.
        """
        tensors = model.layout.modules[self.module]
        names = [tensor.name for tensor in tensors if any(prefix in tensor.name for prefix in of_layers)]
        values = dict.fromkeys(names, outside) | of_layers
        found = [ConditionalParameter(filter=name, value=value) for name, value in values.items()]
        return [*found, ConditionalParameter(value=outside)]

    def write(self, name: str, filters: list[ConditionalParameter]) -> None:
        """Put a parameter of the model into the config."""
        self.source.parameters = {**(self.source.parameters or {}), name: filters}


@dataclass(frozen=True)
class ModelCoefficients:
    """What the pre-pass found for one fine-tuned model.

    Attributes:
        model: the fine-tuned model.
        pairs: the layers, by the base's and then the model's index.
        norms: its squared task-vector norms.
        scores: [pair], s = F · ‖δ‖².
        alphas: [pair], the merge coefficients.
        used_alphas: [pair], what the layer gets: α, or where the user set it by hand, the mean over its tensors.
        alpha_other: the merge coefficient outside the decoder layers, where the user didn't set it by hand.
    """

    model: InputModel
    pairs: tuple[LayerPair, ...]
    norms: TaskVectorNorms
    scores: tuple[float, ...]
    alphas: tuple[float, ...]
    used_alphas: tuple[float, ...]
    alpha_other: float


@dataclass(frozen=True)
class BaseCoefficients:
    """The measurement of one base model, and what followed for the models that are merged into it.

    Attributes:
        base: the base model.
        measurement: what was measured of it.
        origin: where that comes from, in words; empty where it was measured just now.
        models: the coefficients of each fine-tuned model.
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
    """What `fim_kron` does with a decoder layer of a fine-tuned model.

    Attributes:
        pair: the layer, and the base's that it is merged into.
        sq_norm: squared norm of its task vector.
        alpha: the mean of its tensors' α, as set by hand or not.
        beta: likewise of α × the model's share of the weights, the coefficient of all that has no factors.
        spreads: of the directions' coefficients, of `attention` (whatever mixes tokens) and `mlp`, together over the
            matrices that have factors; only those parts that have any.
    """

    pair: LayerPair
    sq_norm: float
    alpha: float
    beta: float
    spreads: Mapping[str, Spread]


@dataclass(frozen=True)
class KronModel:
    """What `fim_kron` does with a fine-tuned model.

    Attributes:
        base: what it is merged into.
        model: the fine-tuned model.
        layers: in the order of the base's.
        alpha_other: as in `ModelCoefficients`.
    """

    base: ModelReference
    model: ModelReference
    layers: tuple[KronLayer, ...]
    alpha_other: float


@dataclass(frozen=True)
class Kron:
    """What the pre-pass of `fim_kron` found.

    Attributes:
        factors: of each model.
        models: the fine-tuned models.
    """

    factors: Mapping[InputModel, MeasuredFactors]
    models: tuple[KronModel, ...]


@dataclass(frozen=True)
class ModelSettings:
    """A fine-tuned model's own parameters as the user set them: see `config.settings.as_set`.

    Attributes:
        base: what the model is merged into.
        model: the fine-tuned model.
        weight: its weight beside the others.
        density: None but for fim_ties.
        density_is_default: whether the config leaves it to the default for the size of the base.
        alpha: what the user set by hand; None where all is left to the pre-pass.
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
        config: the normalised merge config, coefficients included.
        inputs: every model, by reference, the base first.
        coefficients: per base; empty where every `alpha` was set by hand.
        models: the fine-tuned models' own parameters.
        shared: those that are neither per model nor the pre-pass's, as the user set them.
        kept: the names of those tensors outside the language model that aren't merged, and from where they are kept.
        default_density: what `density` is where the config doesn't set it; None but for fim_ties.
        differences: the config keys in which the inputs differ.
        warnings: what the user should know, a line each.
        kron: of `fim_kron`, which has no `coefficients`.
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
