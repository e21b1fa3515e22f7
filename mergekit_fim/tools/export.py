"""Planned merge -> an ordinary mergekit config with the coefficients in it, and what that config can't say."""

import copy
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.graph import Executor, Task
from mergekit.options import MergeOptions

from mergekit_fim.errors import FimError
from mergekit_fim.merging.gates import is_fused, is_gate_projection
from mergekit_fim.merging.methods import shares
from mergekit_fim.norms import squared_distance, squared_norm
from mergekit_fim.tools.plan import MergePlan, PlannedTensor, plan_merge

STOCK_METHODS = {"fim_ties": "ties", "fim_ta": "task_arithmetic"}


@dataclass(frozen=True)
class Export:
    """A merge without this package."""

    config: MergeConfiguration  # for stock mergekit
    losses: tuple[str, ...]  # what that does otherwise than the merge that it stands for, a line each


@dataclass(frozen=True)
class Difference:
    """How far a tensor of the exported merge is from the same one of the merge that it stands for."""

    name: str
    relative: float  # ‖θ_exported − θ‖ / ‖θ‖
    of_change: float  # ‖θ_exported − θ‖ / ‖θ − θ0‖, θ0 the base's tensor


def check_exportable(method: str) -> None:
    """Check that stock mergekit has a method for it, before the work of planning.

    Raises:
        FimError: it hasn't.
    """
    if method == "fim_kron":
        raise FimError(
            "fim_kron can't be exported: a config for stock mergekit has one coefficient for a whole tensor, not one "
            "for each of its directions; merge by `mergekit-yaml`, and if you need a small file, make a LoRA of the "
            "merged model by `mergekit-extract-lora`"
        )


def export(plan: MergePlan, options: MergeOptions) -> Export:
    """Write a planned merge as one of mergekit's own methods.

    `fim_ta` becomes `task_arithmetic` and `fim_ties` becomes `ties`, with `normalize: false` and, as filtered `weight`,
    each model's coefficient of every tensor: λ · weight · α, divided by the weights' sum where the merge normalises,
    gate protection included.

    Raises:
        FimError: stock mergekit has no such method (`fim_kron`), or can't plan the exported config.
    """
    check_exportable(plan.config.merge_method)
    config = plan.config.model_copy(deep=True)
    config.merge_method = STOCK_METHODS[plan.config.merge_method]
    config.parameters, config.modules = {"normalize": False}, None
    contents = {name: _contents(plan, name) for name in plan.config.modules or {}}
    if len(contents) == 1:
        (own,) = contents.values()
        config.models, config.slices = own.models, own.slices
    else:
        config.modules = contents
    # Validated anew: a copy isn't.
    config = MergeConfiguration.model_validate(config.model_dump(exclude_none=True))
    return Export(config, tuple(_losses(plan, plan_merge(config, options))))


def _contents(plan: MergePlan, name: str) -> OutputModuleDefinition:
    """A module of the exported config."""
    slices = _slices(plan, name)
    count = {reference: model.num_layers(name) for reference, model in plan.inputs.items()}
    is_whole = all(tuple(source.layer_range) == (0, count[source.model]) for s in slices for source in s.sources)
    if len(slices) > 1 or slices[0].base_model is not None or not is_whole:
        return OutputModuleDefinition(slices=slices)
    models = [
        InputModelDefinition(model=source.model, parameters=source.parameters)
        for source in slices[0].sources
        if source.model != plan.config.base_model
    ]
    return OutputModuleDefinition(models=models)


def _slices(plan: MergePlan, name: str) -> list[OutputSliceDefinition]:
    slices = (plan.config.modules or {})[name].slices or []
    tensors: list[list[PlannedTensor]] = [[] for _ in slices]
    for index, tensor in _by_slice(plan, name):
        tensors[index].append(tensor)
    exported = []
    for out_slice, own in zip(slices, tensors, strict=True):
        base = out_slice.base_model or plan.config.base_model
        sources = [
            InputSliceDefinition(
                model=source.model,
                layer_range=source.layer_range,
                parameters=None if source.model == base else _parameters(plan, source.model, own),
            )
            for source in out_slice.sources
        ]
        exported.append(OutputSliceDefinition(sources=sources, base_model=out_slice.base_model))
    return exported


def _by_slice(plan: MergePlan, name: str) -> Iterator[tuple[int, PlannedTensor]]:
    """Every tensor of a module with the slice whose parameters mergekit uses: outside layers the first's or last's."""
    layout = next(iter(plan.inputs.values())).layout
    elsewhere = {t.name for module, tensors in layout.modules.items() if module != layout.stack for t in tensors}
    if name != layout.stack:  # these have one slice
        own = {t.name for t in layout.modules[name]}
        yield from ((0, tensor) for tensor in plan.tensors if tensor.name in own)
        return
    slices = plan.slices
    tensors = [tensor for tensor in plan.tensors if tensor.name not in elsewhere]
    of_layer = [i for i, s in enumerate(slices) for _ in range(*s.sources[0].layer_range)]
    numbers = [_layer_number(plan, tensor.name) for tensor in tensors]
    begin = next(i for i, number in enumerate(numbers) if number is not None)
    for i, (tensor, number) in enumerate(zip(tensors, numbers, strict=True)):
        yield of_layer[number] if number is not None else 0 if i < begin else len(slices) - 1, tensor


def _layer_number(plan: MergePlan, name: str) -> int | None:
    """Which decoder layer of the merged model a tensor is in."""
    layers = next(iter(plan.inputs.values())).layout.layers
    for stem in {layer.stem(prefix) for layer in layers for prefix in layer.prefixes}:
        number = name.removeprefix(stem).split(".")[0]
        if name.startswith(stem) and number.isdigit():
            return int(number)
    return None


def _coefficients(tensor: PlannedTensor) -> dict[ModelReference, float]:
    """By what each model's task vector, or trimmed task vector, is multiplied."""
    if (kept := tensor.parameter("other_modules")) != "merge":
        return dict.fromkeys(tensor.per_model("alpha"), 1.0 if kept == "tuned" else 0.0)
    alphas, weights = tensor.per_model("alpha"), tensor.per_model("weight")
    scale = tensor.parameter("lambda") * (tensor.parameter("gate_scale") if is_gate_projection(tensor.name) else 1.0)
    parts = shares(list(weights.values()), tensor.parameter("normalize"))
    return {model: scale * part * alphas[model] for model, part in zip(weights, parts, strict=True)}


def _parameters(plan: MergePlan, model: ModelReference, tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
    """A source's parameters for stock mergekit, whose filters see the names of the source's own tensors."""
    layers = plan.inputs[model].layout.layers
    names = [tensor.sources()[model].name for tensor in tensors]
    of_layers = {prefix: None for layer in layers for prefix in layer.prefixes}
    prefixes = [next((prefix for prefix in of_layers if name.startswith(prefix)), None) for name in names]
    values = {"weight": [_coefficients(tensor)[model] for tensor in tensors]}
    if plan.config.merge_method == "fim_ties":
        values["density"] = [
            1.0 if tensor.parameter("other_modules") == "tuned" else tensor.per_model("density")[model]
            for tensor in tensors
        ]
    return {key: _setting(names, prefixes, column) for key, column in values.items()}


def _setting(names: Sequence[str], prefixes: Sequence[str | None], values: Sequence[float]) -> Any:
    """One value, or filters, the first match of which wins: a line per decoder layer, and one per tensor unlike it."""
    if len(set(values)) == 1:
        return values[0]
    usual = {
        prefix: Counter(v for p, v in zip(prefixes, values, strict=True) if p == prefix).most_common(1)[0][0]
        for prefix in dict.fromkeys(prefixes)
    }
    filters: list[ConditionalParameter] = []
    # Layers first: the name of a tensor outside them may be a part of the name of one inside.
    for inside in (True, False):
        filters += [
            ConditionalParameter(filter=name, value=value)
            for name, prefix, value in zip(names, prefixes, values, strict=True)
            if (prefix is not None) is inside and value != usual[prefix]
        ]
        filters += [
            ConditionalParameter(filter=prefix, value=value)
            for prefix, value in usual.items()
            if (prefix is not None) is inside
        ]
    return filters


def _losses(plan: MergePlan, exported: MergePlan) -> Iterator[str]:
    method, stock = plan.config.merge_method, exported.config.merge_method
    fused = [
        t.name for t in plan.tensors if is_fused(t.name) and t.per_model("alpha") and t.parameter("gate_scale") != 1
    ]
    if fused:
        yield (
            f"gate protection: {stock} has one weight for a whole tensor, so that the gate's half of {len(fused)} "
            f"fused tensors such as {fused[0]} is merged like the rest (gate_scale: 1 makes {method} the same)"
        )
    if kept := [tensor.name for tensor in plan.tensors if tensor.parameter("other_modules") == "tuned"]:
        yield (
            f"other_modules: {stock} computes the {len(kept)} tensors that are kept from the fine-tuned model, such as "
            f"{kept[0]}, as the base and the difference: their last digits may be others"
        )
    wanted = {tensor.name: _coefficients(tensor) for tensor in plan.tensors}
    for tensor in exported.tensors:
        if tensor.name not in wanted:
            raise FimError(
                f"mergekit's definition of the architecture requires the tensor {tensor.name}, which the models don't "
                f"have: {stock} can't merge them, so that there is nothing to export"
            )
        if tensor.per_model("weight") != wanted[tensor.name]:
            raise FimError(
                f"the coefficients of {tensor.name} can't be written as filters of {stock}: it can't be exported"
            )
    if added := sorted(wanted.keys() - {tensor.name for tensor in exported.tensors}):
        yield (
            f"{stock} leaves out {len(added)} tensors such as {added[0]}, which mergekit's definition of the "
            "architecture lacks: a model merged by the exported config isn't complete"
        )
    tolerances = {tensor.parameter("norm_tolerance") for tensor in plan.tensors} - {0}
    if tolerances:
        yield (
            f"norm calibration: {stock} doesn't rescale tensors whose norm is off by more than "
            f"{' or '.join(f'{t:g}' for t in sorted(tolerances))} (norm_tolerance: 0 makes {method} the same)"
        )
    if method == "fim_ties" and any(
        tensor.parameter("normalize") and len(tensor.per_model("weight")) > 1 for tensor in plan.tensors
    ):
        yield (
            "several models with normalize: true: fim_ties divides every entry by the weights of the models that agree "
            "in its sign, the exported config by those of all models (normalize: false makes fim_ties the same)"
        )
    base = next(iter(plan.inputs.values()))
    narrow = (plan.config.dtype or str(base.stored_dtype())).endswith("16")
    if method == "fim_ties" and narrow:
        yield (
            "trimming in 16 bits: stock mergekit rounds task vectors before it trims them, and keeps others of the "
            "entries that are equally large at the threshold (dtype: float32 makes it nearly the same)"
        )
    ours, theirs = plan.output_config.to_dict(), exported.output_config.to_dict()
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            yield (
                f"config key {key}: stock mergekit writes {json.dumps(theirs.get(key))}, {method} writes "
                f"{json.dumps(ours.get(key))}: change it in the merged model's config.json"
            )
    try:
        with tempfile.TemporaryDirectory() as folder:
            copy.deepcopy(exported.output_config).save_pretrained(folder)
    except Exception as error:  # huggingface_hub's check of its own configs
        yield f"stock mergekit can't save the merged model's config ({' '.join(str(error).split())})"


class _Compare(Task[Difference | None]):
    """Merges a tensor both ways and compares the results."""

    name: str
    ours: Task
    exported: Task
    inputs: Task
    base: ModelReference

    def arguments(self) -> dict[str, Any]:
        return {"ours": self.ours, "exported": self.exported, "inputs": self.inputs}

    def group_label(self) -> str | None:
        return self.ours.group_label()

    def execute(
        self, ours: torch.Tensor | None, exported: torch.Tensor | None, inputs: Mapping[ModelReference, torch.Tensor]
    ) -> Difference | None:
        if ours is None or exported is None:
            return None
        distance = math.sqrt(squared_distance(exported, ours))
        norm, change = math.sqrt(float(squared_norm(ours))), math.sqrt(squared_distance(ours, inputs[self.base]))
        return Difference(self.name, distance / norm if norm else distance, distance / change if change else distance)


def compare(plan: MergePlan, exported: MergeConfiguration, options: MergeOptions) -> list[Difference]:
    """Merge every tensor both ways, by the plan and by its `Export.config`, without writing any: how far apart?"""
    theirs = {tensor.name: tensor.task for tensor in plan_merge(exported, options).tensors}
    targets = [
        _Compare(
            name=tensor.name,
            ours=tensor.task,
            exported=theirs[tensor.name],
            inputs=tensor.task.gather_tensors,
            base=tensor.task.base_model,
        )
        for tensor in plan.tensors
        if tensor.name in theirs
    ]
    executor = Executor(targets=targets, math_device=options.device, storage_device="cpu")
    return [found for _, found in executor.run(quiet=options.quiet) if found is not None]


def summary(differences: Sequence[Difference]) -> str:
    """In words, how far the exported merge is from the other: by the tensor that differs most."""
    worst = max(differences, key=lambda d: d.relative)
    most = max(differences, key=lambda d: d.of_change)
    return (
        f"largest relative difference of a merged tensor: {worst.relative:.1e} of its norm ({worst.name}), or "
        f"{most.of_change:.1e} of what the merge changes in it ({most.name})"
    )
