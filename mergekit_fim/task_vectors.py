"""Checkpoints -> squared task-vector norms, tensor by tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import tqdm
from mergekit.architecture import WeightInfo

from mergekit_fim.errors import FimError
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.models.layout import DecoderLayer
from mergekit_fim.norms import squared_distance


@dataclass(frozen=True)
class LayerPair:
    """A decoder layer of a fine-tuned model and the base's layer that it is merged into. The same, but for slices."""

    base_layer: int
    source_layer: int


@dataclass(frozen=True)
class TaskVectorNorms:
    """Squared Frobenius norms of a fine-tuned model's task vector δ = θ_model − θ_base.

    Attributes:
        layers: per pair of layers, over all the layer's tensors.
        other: over the tensors outside the decoder layers; None where the vocabularies' sizes differ.
    """

    layers: Mapping[LayerPair, float]
    other: float | None


class TaskVectorSweep:
    """Measures the task vectors of all fine-tuned models of one base, reading every tensor once.

    An iterator: each step measures those of the base's next decoder layer. The measurement of the base, which reads its
    layers in the same order, takes a step before each, so that a base larger than memory is read once for both.
    """

    def __init__(self, base: InputModel, models: Mapping[InputModel, Sequence[LayerPair]], dtype: str | None) -> None:
        """Measure the tensors outside the layers, and be ready for the layers.

        Args:
            base: the base model.
            models: the fine-tuned models, each with the pairs of layers that its merge needs.
            dtype: what the merge casts every tensor to when it reads it, or None for the checkpoints' own.

        Raises:
            FimError: layers of a pair don't have the same tensors, or a task vector isn't finite.
        """
        self._base, self._dtype = base, dtype
        self._work = [_layer_work(base, layer, models) for layer in base.layout.layers]
        self._other = _outside(base, list(models), dtype)
        self._sums = {model: dict.fromkeys(pairs, 0.0) for model, pairs in models.items()}

    def __iter__(self) -> "TaskVectorSweep":
        return self

    def __next__(self) -> None:
        if not self._work:
            raise StopIteration
        sums: list[tuple[InputModel, LayerPair, float]] = []
        for base_tensor, users in self._work[0]:
            reference = self._base.load(base_tensor, self._dtype) if users else None
            for model, pair, tensor in users:
                where = f"decoder layer {pair.source_layer}"
                sums.append((model, pair, _distance(self._base, reference, model, tensor, self._dtype, where) or 0.0))
        for model, pair, distance in sums:  # all or none: where memory ran out, the step is taken again
            self._sums[model][pair] += distance
        del self._work[0]

    def norms(self, *, quiet: bool) -> dict[InputModel, TaskVectorNorms]:
        """The squared norms per model, after measuring whatever is left, with a progress bar unless `quiet`.

        Raises:
            FimError: a task vector that isn't finite.
        """
        count = len(self._work)
        list(tqdm.tqdm(self, total=count, desc="Measuring task vectors", unit="layer", disable=quiet or not count))
        return {model: TaskVectorNorms(sums, self._other[model]) for model, sums in self._sums.items()}


def _outside(base: InputModel, models: Sequence[InputModel], dtype: str | None) -> dict[InputModel, float | None]:
    """‖δ‖² over the tensors outside the layers; None where the vocabularies' sizes differ."""
    other: dict[InputModel, float | None] = dict.fromkeys(models, 0.0)
    for base_tensor in base.layout.other:
        if not any(m.stored_name(base_tensor, tied=False) is not None for m in (base, *models)):
            continue  # a head that is tied in all the models: it is their embeddings
        reference = base.load(base_tensor, dtype)
        for model in models:
            distance = _distance(base, reference, model, base_tensor, dtype, "the tensors outside the layers")
            so_far = other[model]
            other[model] = None if distance is None or so_far is None else so_far + distance
    return other


def _layer_work(
    base: InputModel, layer: DecoderLayer, models: Mapping[InputModel, Sequence[LayerPair]]
) -> list[tuple[WeightInfo, list[tuple[InputModel, LayerPair, WeightInfo]]]]:
    """Every tensor of one of the base's layers, with the fine-tuned tensors that it is compared with."""
    users = [(m, pair) for m, pairs in models.items() for pair in pairs if pair.base_layer == layer.index]
    for model, pair in users:
        source = model.layout.layers[pair.source_layer]
        names = [[x.local(t.name) for t in x.tensors] for x in (source, layer)]
        # mergekit's definition may have the same for layers of every kind: what counts is also what they hold of it.
        if names[0] != names[1] or not _held(model, source) <= _held(base, layer):
            raise FimError(
                f"{model}: decoder layer {source.index} has other tensors than the base's layer {layer.index} "
                "that the slices pair it with; pair layers of the same kind"
            )
    return [
        (tensor, [(m, pair, m.layout.layers[pair.source_layer].tensors[k]) for m, pair in users])
        for k, tensor in enumerate(layer.tensors)
    ]


def _held(model: InputModel, layer: DecoderLayer) -> set[str]:
    return {layer.local(t.name) for t in layer.tensors if t.name not in model.absent}


def _distance(
    base: InputModel,
    reference: torch.Tensor | None,
    model: InputModel,
    tensor: WeightInfo,
    dtype: str | None,
    where: str,
) -> float | None:
    """‖θ_model − θ_base‖² of one tensor; 0 where a model lacks an optional one, None where vocabularies differ."""
    tuned = model.load(tensor, dtype)
    if reference is None or tuned is None:
        return 0.0
    if reference.shape != tuned.shape:
        if tensor.vocabulary_axis is None:
            raise FimError(
                f"{model}: expected the shape {list(reference.shape)} of {tensor.name} as in the base {base}, "
                f"found {list(tuned.shape)}; the models must share one architecture"
            )
        _check_finite(base, reference, tensor, where)
        _check_finite(model, tuned, tensor, where)
        return None
    distance = squared_distance(tuned, reference)
    if not distance < float("inf"):
        _check_finite(base, reference, tensor, where)
        _check_finite(model, tuned, tensor, where)
        raise FimError(
            f"{model}: the task vector of {tensor.name} ({where}) overflows float32; the weights are not usable"
        )
    return distance


def _check_finite(model: InputModel, values: torch.Tensor, tensor: WeightInfo, where: str) -> None:
    if not torch.isfinite(values).all():
        found = "NaN" if torch.isnan(values).any() else "an infinite value"
        raise FimError(
            f"{model}: tensor {tensor.name} ({where}) contains {found}, expected finite weights; "
            "use an intact checkpoint, or a wider dtype if the config's `dtype` made it overflow"
        )
