"""Checkpoints -> squared norms of task vectors, tensor by tensor."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import tqdm
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from mergekit_fim.errors import FimError
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.models.layout import DecoderLayer
from mergekit_fim.models.parallel import in_threads, readers
from mergekit_fim.norms import squared_distance


@dataclass(frozen=True, order=True)
class LayerPair:
    """A decoder layer of a fine-tuned model, and the base's layer that it is merged into; by slices they may differ."""

    base_layer: int
    source_layer: int


@dataclass(frozen=True)
class TaskVectorNorms:
    """Squared Frobenius norms of a fine-tuned model's task vector δ = θ_model − θ_base."""

    layers: Mapping[LayerPair, float]  # over all tensors of the layer
    other: float | None  # over all tensors outside the decoder layers; None if the vocabularies differ in size


class TaskVectorSweep:
    """Measures the task vectors of all fine-tuned models of one base, and reads every tensor once.

    The base's own measurement calls this with each tensor that it reads, so that a base larger than memory is read once
    for both. `norms` reads the others.
    """

    def __init__(
        self,
        base: InputModel,
        models: Mapping[InputModel, Collection[LayerPair]],
        dtype: str | None,
        devices: Sequence[torch.device] = (torch.device("cpu"),),
    ) -> None:
        """Pair the tensors, and measure nothing yet.

        Args:
            base: the base model.
            models: the fine-tuned models, each with the pairs of layers that its merge needs.
            dtype: what the merge reads every tensor as; None for the checkpoints' own.
            devices: the devices that share the work.

        Raises:
            FimError: the layers of a pair don't have the same tensors.
        """
        self._base, self._dtype, self._devices = base, dtype, devices
        self._models = {model: tuple(pairs) for model, pairs in models.items()}
        # Those outside the layers, but no head that is tied in all the models: it is their embeddings.
        comparisons = [
            _Comparison(index, tensor, [(model, None, tensor) for model in models])
            for index, tensor in enumerate(base.layout.other)
            if any(model.stored_name(tensor, tied=False) is not None for model in (base, *models))
        ]
        for layer in base.layout.layers:
            comparisons += _of_layer(base, layer, models)
        self._work = {its.tensor.name: its for its in comparisons if its.tuned}
        self._found: dict[str, list[float | None]] = {}  # [tensor name][fine-tuned tensor]

    def __call__(self, tensor: WeightInfo, values: torch.Tensor) -> None:
        """Measure the task vectors of a tensor of the base, on the device of its values.

        Raises:
            FimError: one isn't finite, or has another shape.
        """
        work = self._work.get(tensor.name)
        if work is None or tensor.name in self._found:
            return
        # All or none of them, so that a tensor is measured again if memory ran out.
        self._found[tensor.name] = [self._distance(values, *its) for its in work.tuned]

    def norms(self, *, quiet: bool) -> dict[ModelReference, TaskVectorNorms]:
        """Measure what is left, with a progress bar unless `quiet`, and return each model's squared norms."""
        left = [work for name, work in self._work.items() if name not in self._found]
        measuring = in_threads(readers(self._devices), self._read, left)
        bar = {"desc": "Measuring task vectors", "unit": "tensor", "total": len(left), "disable": quiet or not left}
        for _ in tqdm.tqdm(measuring, **bar):
            pass
        found: dict[tuple[InputModel, LayerPair | None], list[float | None]] = defaultdict(list)
        for name, work in self._work.items():
            for (model, pair, _), distance in zip(work.tuned, self._found[name], strict=True):
                found[model, pair].append(distance)
        LoaderCache().flush_all()  # a pickled checkpoint is in memory as long as its loader is
        norms = {}
        for model, pairs in self._models.items():
            # `fsum` gives the same digits in any order: mergekit lists the tensors of some models in that of a set.
            layers = {pair: math.fsum(distance or 0.0 for distance in found[model, pair]) for pair in pairs}
            outside = [distance for distance in found[model, None] if distance is not None]
            is_known = len(outside) == len(found[model, None])
            norms[model.reference] = TaskVectorNorms(layers, math.fsum(outside) if is_known else None)
        return norms

    def _read(self, work: "_Comparison") -> None:
        values = self._base.load(work.tensor, self._dtype)
        if values is None:
            self._found[work.tensor.name] = [0.0] * len(work.tuned)
        else:
            self(work.tensor, values.to(self._devices[work.index % len(self._devices)]))

    def _distance(
        self, reference: torch.Tensor, model: InputModel, pair: LayerPair | None, tensor: WeightInfo
    ) -> float | None:
        """‖θ_model − θ_base‖² of one tensor; 0 if the model lacks an optional one, None if the vocabularies differ."""
        base = self._base
        where = "the tensors outside the layers" if pair is None else f"decoder layer {pair.source_layer}"
        tuned = model.load(tensor, self._dtype)
        if tuned is None:
            return 0.0
        if reference.shape == tuned.shape:
            distance = squared_distance(tuned, reference)
            if not distance < float("inf"):
                refuse(base, reference, model, tuned, tensor, where)
            return distance
        if tensor.vocabulary_axis is None:
            raise FimError(
                f"{model}: expected the shape {list(reference.shape)} of {tensor.name} as in the base {base}, "
                f"found {list(tuned.shape)}; the models must share one architecture"
            )
        _check_finite(base, reference, tensor, where)
        _check_finite(model, tuned, tensor, where)
        return None


@dataclass(frozen=True)
class _Comparison:
    """A tensor of the base, and the fine-tuned tensors that it is compared with."""

    index: int  # the number of its layer, or its own among the tensors outside; the devices take turns by it
    tensor: WeightInfo
    tuned: Sequence[tuple[InputModel, LayerPair | None, WeightInfo]]  # the pair is None for a tensor outside


def _of_layer(
    base: InputModel, layer: DecoderLayer, models: Mapping[InputModel, Collection[LayerPair]]
) -> Iterator[_Comparison]:
    users = [(m, pair) for m, pairs in models.items() for pair in pairs if pair.base_layer == layer.index]
    for model, pair in users:
        source = model.layout.layers[pair.source_layer]
        names = [[x.local(t.name) for t in x.tensors] for x in (source, layer)]
        # mergekit's definition may list the same tensors for every kind of layer: compare what the checkpoints hold.
        if names[0] != names[1] or not _held(model, source) <= _held(base, layer):
            raise FimError(
                f"{model}: decoder layer {source.index} has other tensors than the base's layer {layer.index} "
                "that the slices pair it with; pair layers of the same kind"
            )
    for k, tensor in enumerate(layer.tensors):
        tuned = [(m, pair, m.layout.layers[pair.source_layer].tensors[k]) for m, pair in users]
        yield _Comparison(layer.index, tensor, tuned)


def _held(model: InputModel, layer: DecoderLayer) -> set[str]:
    return {layer.local(t.name) for t in layer.tensors if t.name not in model.absent}


def refuse(
    base: InputModel, reference: torch.Tensor, model: InputModel, tuned: torch.Tensor, tensor: WeightInfo, where: str
) -> NoReturn:
    """Say why a task vector isn't finite: a model's tensor isn't, or their difference."""
    _check_finite(base, reference, tensor, where)
    _check_finite(model, tuned, tensor, where)
    raise FimError(f"{model}: the task vector of {tensor.name} ({where}) overflows float32; the weights are not usable")


def _check_finite(model: InputModel, values: torch.Tensor, tensor: WeightInfo, where: str) -> None:
    if not torch.isfinite(values).all():
        found = "NaN" if torch.isnan(values).any() else "an infinite value"
        raise FimError(
            f"{model}: tensor {tensor.name} ({where}) contains {found}, expected finite weights; "
            "use an intact checkpoint, or a wider dtype if the config's `dtype` made it overflow"
        )
