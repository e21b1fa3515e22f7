"""The records of a pre-pass: the models, their coefficients, and the config that carries these."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import (
    ConditionalParameter,
    ConfigReader,
    InputSliceDefinition,
    MergeConfiguration,
    evaluate_setting,
)

from mergekit_fim.config.parameters import PARAMETERS
from mergekit_fim.config.settings import Settings, settings_of
from mergekit_fim.measurements.factors import FactorsFile
from mergekit_fim.measurements.record import FisherMeasurement, Measurement
from mergekit_fim.merging.kron import Spread
from mergekit_fim.merging.output_config import ConfigDifference
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.prepass.task_vectors import LayerPair, TaskVectorNorms


@dataclass(frozen=True)
class SourceSlice:
    """Consecutive layers of one fine-tuned model in the config, and the base's layers that they are merged into."""

    module: str  # mergekit's name of it
    base: ModelReference
    base_start: int | None  # the first of the base's layers; None in modules other than the decoder layers' own
    source: InputSliceDefinition  # the config's part, with the fine-tuned model and its layers
    reader: ConfigReader  # mergekit's, of the slice's parameters; the sources of one slice share it

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

    def value(self, name: str, tensor: str, t: float = 0.0) -> Any:
        """A parameter of one tensor, its layer at `t` on gradients; the method's default where it isn't set."""
        found = evaluate_setting(tensor, self.settings(name), t, validate=PARAMETERS[name].type)
        return PARAMETERS[name].default_for(self.reader.config.merge_method) if found is None else found

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
    """The merge coefficients of one fine-tuned model."""

    model: InputModel
    norms: TaskVectorNorms  # its squared task-vector norms, by pair of layers
    scores: tuple[float, ...]  # [pair], s = F · ‖δ‖²
    alphas: tuple[float, ...]  # [pair], the merge coefficients
    used_alphas: tuple[float, ...]  # [pair], what the layer gets: α or, where it is set by hand, its tensors' mean
    alpha_other: float  # outside the decoder layers, unless the user set it by hand

    @property
    def pairs(self) -> tuple[LayerPair, ...]:
        """The layers, by the base's and then the model's index."""
        return tuple(self.norms.layers)


@dataclass(frozen=True)
class BaseCoefficients:
    """The measurement of a base, and the coefficients of each model that is merged into it."""

    base: InputModel
    measurement: Measurement
    origin: str  # of the measurement, in words; empty if it was made now
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
    """A fine-tuned model's own parameters as the user set them, in the form of `config.settings.as_set`."""

    base: InputModel
    model: InputModel
    weight: Any
    density: Any  # None but for fim_ties
    density_is_default: bool  # whether the size of the base decides it
    alpha: Any  # what is set by hand; None if the pre-pass finds all of it


@dataclass(frozen=True)
class PrePass:
    """All that is known about a merge before its first tensor."""

    settings: Settings
    config: MergeConfiguration  # normalised, with the coefficients
    inputs: Mapping[ModelReference, InputModel]  # every model, the base first
    coefficients: tuple[BaseCoefficients, ...]  # per base; empty if every `alpha` was set by hand, and for fim_kron
    models: tuple[ModelSettings, ...]
    shared: Mapping[str, Any]  # the parameters of whole tensors, as the user set them
    kept: Mapping[str, str]  # the tensors outside the language model that aren't merged, and whose: `base` or `tuned`
    default_density: float | None  # the `density` of models whose config sets none; for fim_ties only
    differences: tuple[ConfigDifference, ...]  # the config keys in which the inputs differ
    warnings: tuple[str, ...]  # what the user should know, a line each
    kron: Kron | None = None  # for fim_kron only

    @property
    def base(self) -> InputModel:
        """The merge's base model."""
        return next(iter(self.inputs.values()))
