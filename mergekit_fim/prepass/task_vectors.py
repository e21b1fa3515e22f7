"""Checkpoints -> squared task-vector norms, tensor by tensor."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import tqdm
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference

from mergekit_fim.errors import FimError
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.models.layout import DecoderLayer
from mergekit_fim.models.parallel import in_threads, readers
from mergekit_fim.norms import squared_distance


@dataclass(frozen=True, order=True)
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

    The measurement of the base, which reads its tensors too, shows each to this: a base larger than memory is read once
    for both, and goes once to an accelerator. What it didn't show is read at the end.
    """

    def __init__(
        self,
        base: InputModel,
        models: Mapping[InputModel, Collection[LayerPair]],
        dtype: str | None,
        devices: Sequence[torch.device] = (torch.device("cpu"),),
    ) -> None:
        """Be ready to measure.

        Args:
            base: the base model.
            models: the fine-tuned models, each with the pairs of layers that its merge needs.
            dtype: what the merge casts every tensor to when it reads it, or None for the checkpoints' own.
            devices: which share the work.

        Raises:
            FimError: layers of a pair don't have the same tensors.
        """
        self._base, self._dtype, self._devices = base, dtype, devices
        self._models = {model: tuple(pairs) for model, pairs in models.items()}
        parts = [
            *_outside(base, list(models)),
            *(p for layer in base.layout.layers for p in _parts(base, layer, models)),
        ]
        self._work = {part.tensor.name: part for part in parts if part.users}
        self._found: dict[str, list[float | None]] = {}

    @property
    def pairs(self) -> tuple[tuple[ModelReference, tuple[LayerPair, ...]], ...]:
        """The fine-tuned models, and their pairs of layers."""
        return tuple((model.reference, pairs) for model, pairs in self._models.items())

    def __call__(self, tensor: WeightInfo, values: torch.Tensor) -> None:
        """Measure the task vectors of a tensor of the base, on the device that its values are on.

        Raises:
            FimError: one isn't finite, or of another shape.
        """
        part = self._work.get(tensor.name)
        if part is None or tensor.name in self._found:
            return
        # All or none: where memory runs out, the tensor is measured again.
        self._found[tensor.name] = [
            _distance(self._base, values, model, its, self._dtype, _where(pair)) for model, pair, its in part.users
        ]

    def norms(self, *, quiet: bool) -> dict[InputModel, TaskVectorNorms]:
        """The squared norms per model, after measuring whatever is left, with a progress bar unless `quiet`.

        Raises:
            FimError: a task vector that isn't finite.
        """
        left = [part for name, part in self._work.items() if name not in self._found]
        measuring = in_threads(readers(self._devices), self._read, left)
        bar = {"desc": "Measuring task vectors", "unit": "tensor", "total": len(left), "disable": quiet or not left}
        for _ in tqdm.tqdm(measuring, **bar):
            pass
        sums = {model: dict.fromkeys(pairs, 0.0) for model, pairs in self._models.items()}
        other: dict[InputModel, float | None] = dict.fromkeys(self._models, 0.0)
        for name, part in self._work.items():
            for (model, pair, _), distance in zip(part.users, self._found[name], strict=True):
                so_far = other[model]
                if pair is not None:
                    sums[model][pair] += distance or 0.0
                else:
                    other[model] = None if distance is None or so_far is None else so_far + distance
        return {model: TaskVectorNorms(layers, other[model]) for model, layers in sums.items()}

    def _read(self, part: "_Part") -> None:
        values = self._base.load(part.tensor, self._dtype)
        if values is None:
            self._found[part.tensor.name] = [0.0] * len(part.users)
        else:
            self(part.tensor, values.to(self._devices[part.share % len(self._devices)]))


@dataclass(frozen=True)
class _Part:
    """A tensor of the base, and the fine-tuned tensors that it is compared with, for a pair of layers or outside them.

    `share`: the number of its layer; a device takes the parts of every so-manieth.
    """

    share: int
    tensor: WeightInfo
    users: list[tuple[InputModel, LayerPair | None, WeightInfo]]


def _where(pair: LayerPair | None) -> str:
    return "the tensors outside the layers" if pair is None else f"decoder layer {pair.source_layer}"


def _outside(base: InputModel, models: Sequence[InputModel]) -> list[_Part]:
    """The tensors outside the layers, without a head that is tied in all the models: it is their embeddings."""
    return [
        _Part(share, tensor, [(model, None, tensor) for model in models])
        for share, tensor in enumerate(base.layout.other)
        if any(m.stored_name(tensor, tied=False) is not None for m in (base, *models))
    ]


def _parts(base: InputModel, layer: DecoderLayer, models: Mapping[InputModel, Collection[LayerPair]]) -> list[_Part]:
    """The tensors of one of the base's layers."""
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
        _Part(layer.index, tensor, [(m, pair, m.layout.layers[pair.source_layer].tensors[k]) for m, pair in users])
        for k, tensor in enumerate(layer.tensors)
    ]


def _held(model: InputModel, layer: DecoderLayer) -> set[str]:
    return {layer.local(t.name) for t in layer.tensors if t.name not in model.absent}


def _distance(
    base: InputModel,
    reference: torch.Tensor,
    model: InputModel,
    tensor: WeightInfo,
    dtype: str | None,
    where: str,
) -> float | None:
    """‖θ_model − θ_base‖² of one tensor; 0 where a model lacks an optional one, None where vocabularies differ."""
    tuned = model.load(tensor, dtype)
    if tuned is None:
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
        refuse(base, reference, model, tuned, tensor, where)
    return distance


def refuse(
    base: InputModel, reference: torch.Tensor, model: InputModel, tuned: torch.Tensor, tensor: WeightInfo, where: str
) -> NoReturn:
    """Say why a task vector isn't finite.

    Raises:
        FimError: a model's tensor isn't, or their difference.
    """
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
