"""Write a planned merge as an ordinary mergekit config, and say what that config can't."""

import copy
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, InputModelDefinition, MergeConfiguration, OutputModuleDefinition
from mergekit.graph import Executor, Task
from mergekit.options import MergeOptions

from mergekit_fim.config.settings import base_of
from mergekit_fim.errors import FimError
from mergekit_fim.merging.gates import is_fused, is_gate_projection
from mergekit_fim.merging.methods import shares
from mergekit_fim.norms import squared_distance, squared_norm
from mergekit_fim.tools.plan import MergePlan, PlannedTensor, plan_merge

STOCK_METHODS = {"fim_ties": "ties", "fim_ta": "task_arithmetic"}


@dataclass(frozen=True)
class Difference:
    """How far a tensor of the exported merge is from ours."""

    name: str
    relative: float  # ‖θ_exported − θ‖ / ‖θ‖
    of_change: float  # ‖θ_exported − θ‖ / ‖θ − θ0‖, θ0 the base's tensor


def check_exportable(method: str) -> None:
    """Check that stock mergekit has such a method, before the work of planning."""
    if method == "fim_kron":
        raise FimError(
            "fim_kron can't be exported: stock mergekit has one coefficient for a whole tensor, not one for each of "
            "its directions; merge by `mergekit-yaml`, and for a small file use `mergekit-extract-lora`"
        )


def export(plan: MergePlan, options: MergeOptions) -> tuple[MergeConfiguration, MergePlan]:
    """Write a planned merge as one of mergekit's own methods: as a config, and as the plan of that.

    `fim_ta` becomes `task_arithmetic` and `fim_ties` becomes `ties`, with `normalize: false`. Each model's coefficient
    of every tensor becomes a filtered `weight`: λ · weight · α, divided by the weights' sum where the merge normalises,
    gate protection included.

    Raises:
        FimError: stock mergekit can't plan the exported config, or reads other coefficients from it.
    """
    config = plan.config.model_copy(deep=True)
    config.merge_method = STOCK_METHODS[plan.config.merge_method]
    config.parameters, config.modules = {"normalize": False}, None
    modules = {name: _module(plan, name) for name in plan.config.modules or {}}
    if len(modules) == 1:
        (own,) = modules.values()
        config.models, config.slices = own.models, own.slices
    else:
        config.modules = modules
    # Validated anew: a copy isn't.
    config = MergeConfiguration.model_validate(config.model_dump(exclude_none=True))
    exported = plan_merge(config, options)
    _check_coefficients(plan, exported)
    return config, exported


def _module(plan: MergePlan, name: str) -> OutputModuleDefinition:
    """Write a module of the exported config: by `models` where they are merged whole, else by `slices`."""
    slices = []
    for out_slice, tensors in zip((plan.config.modules or {})[name].slices or [], _by_slice(plan, name), strict=True):
        base = base_of(plan.config, out_slice)
        own = {s.model: _parameters(plan, s.model, tensors) for s in out_slice.sources if s.model != base}
        sources = [source.model_copy(update={"parameters": own.get(source.model)}) for source in out_slice.sources]
        slices.append(out_slice.model_copy(update={"sources": sources, "parameters": None}))
    whole = {reference: (0, model.num_layers(name)) for reference, model in plan.pre_pass.inputs.items()}
    is_whole = all(tuple(source.layer_range) == whole[source.model] for s in slices for source in s.sources)
    if len(slices) > 1 or slices[0].base_model is not None or not is_whole:
        return OutputModuleDefinition(slices=slices)
    tuned = [source for source in slices[0].sources if source.model != plan.config.base_model]
    return OutputModuleDefinition(models=[InputModelDefinition(model=s.model, parameters=s.parameters) for s in tuned])


def _by_slice(plan: MergePlan, name: str) -> list[list[PlannedTensor]]:
    """Sort a module's tensors by the slice whose parameters mergekit uses: outside layers the first's or the last's."""
    layout, slices = plan.pre_pass.base.layout, (plan.config.modules or {})[name].slices or []
    if name != layout.stack:  # these have one slice
        names = {tensor.name for tensor in layout.modules[name]}
        return [[tensor for tensor in plan.tensors if tensor.name in names]]
    elsewhere = {t.name for module, tensors in layout.modules.items() if module != name for t in tensors}
    numbered = [(layer.index, prefix) for layer in layout.layers for prefix in layer.prefixes]
    stems = {re.escape(prefix.removesuffix(f"{index}.")) for index, prefix in numbered}
    layer_number = re.compile(rf"(?:{'|'.join(stems)})(\d+)\.")  # in the merged model
    of_layer = [i for i, out_slice in enumerate(slices) for _ in range(*out_slice.sources[0].layer_range)]
    tensors: list[list[PlannedTensor]] = [[] for _ in slices]
    outside = 0
    for tensor in (tensor for tensor in plan.tensors if tensor.name not in elsewhere):
        number = layer_number.match(tensor.name)
        if number is not None:
            outside = -1  # what is planned after the layers
        tensors[outside if number is None else of_layer[int(number[1])]].append(tensor)
    return tensors


def _coefficients(tensor: PlannedTensor) -> dict[ModelReference, float]:
    """Find what each model's task vector, trimmed or not, is multiplied by."""
    alphas, weights = tensor.per_model("alpha"), tensor.per_model("weight")
    if (kept := tensor.parameter("other_modules")) != "merge":
        return dict.fromkeys(alphas, 1.0 if kept == "tuned" else 0.0)
    scale = tensor.parameter("lambda") * (tensor.parameter("gate_scale") if is_gate_projection(tensor.name) else 1.0)
    parts = shares(list(weights.values()), tensor.parameter("normalize"))
    return {model: scale * part * alphas[model] for model, part in zip(weights, parts, strict=True)}


def _parameters(plan: MergePlan, model: ModelReference, tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
    """Write a source's parameters for stock mergekit, whose filters see the names of the source's own tensors."""
    of_layers = [prefix for layer in plan.pre_pass.inputs[model].layout.layers for prefix in layer.prefixes]
    names = [tensor.sources()[model].name for tensor in tensors]
    prefixes = [next((prefix for prefix in of_layers if name.startswith(prefix)), None) for name in names]
    values = {"weight": [_coefficients(tensor)[model] for tensor in tensors]}
    if plan.config.merge_method == "fim_ties":
        values["density"] = [
            1.0 if tensor.parameter("other_modules") == "tuned" else tensor.per_model("density")[model]
            for tensor in tensors
        ]
    return {key: _setting(names, prefixes, column) for key, column in values.items()}


def _setting(names: Sequence[str], prefixes: Sequence[str | None], values: Sequence[float]) -> Any:
    """Write one value, or filters: one per decoder layer, and one per tensor unlike it. The first match wins."""
    if len(set(values)) == 1:
        return values[0]
    rows = list(zip(prefixes, names, values, strict=True))
    usual = {
        prefix: Counter(value for own, _, value in rows if own == prefix).most_common(1)[0][0]
        for prefix in dict.fromkeys(prefixes)
    }
    filters: list[tuple[str | None, str | None, float]] = [row for row in rows if row[2] != usual[row[0]]]
    filters += [(prefix, prefix, value) for prefix, value in usual.items()]
    # Layers first: the name of a tensor outside them may be a part of the name of one inside.
    filters.sort(key=lambda row: row[0] is None)
    return [ConditionalParameter(filter=filter, value=value) for _, filter, value in filters]


def _check_coefficients(plan: MergePlan, exported: MergePlan) -> None:
    """Check that stock mergekit reads from the exported config what every tensor is multiplied by."""
    stock, wanted = exported.config.merge_method, {tensor.name: _coefficients(tensor) for tensor in plan.tensors}
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


def losses(plan: MergePlan, exported: MergePlan) -> Iterator[str]:
    """Say what stock mergekit does otherwise, a line for each reason."""
    method, stock = plan.config.merge_method, exported.config.merge_method
    tensors = plan.tensors
    fused = [t.name for t in tensors if is_fused(t.name) and t.per_model("alpha") and t.parameter("gate_scale") != 1]
    if fused:
        yield (
            f"gate protection: {stock} has one weight for a whole tensor, so that the gate's half of {len(fused)} "
            f"fused tensors such as {fused[0]} is merged like the rest (gate_scale: 1 makes {method} the same)"
        )
    if kept := [tensor.name for tensor in tensors if tensor.parameter("other_modules") == "tuned"]:
        yield (
            f"other_modules: {stock} computes the {len(kept)} tensors that are kept from the fine-tuned model, such as "
            f"{kept[0]}, as the base and the difference: their last digits may be others"
        )
    if added := sorted({tensor.name for tensor in tensors} - {tensor.name for tensor in exported.tensors}):
        yield (
            f"{stock} leaves out {len(added)} tensors such as {added[0]}, which mergekit's definition of the "
            "architecture lacks: a model merged by the exported config isn't complete"
        )
    if tolerances := {tensor.parameter("norm_tolerance") for tensor in tensors} - {0}:
        yield (
            f"norm calibration: {stock} doesn't rescale tensors whose norm is off by more than "
            f"{' or '.join(f'{t:g}' for t in sorted(tolerances))} (norm_tolerance: 0 makes {method} the same)"
        )
    if method == "fim_ties":
        if any(tensor.parameter("normalize") and len(tensor.per_model("weight")) > 1 for tensor in tensors):
            yield (
                "several models with normalize: true: fim_ties divides every entry by the weights of the models that "
                "agree in its sign, the exported config by those of all models (normalize: false makes fim_ties the "
                "same)"
            )
        if (plan.config.dtype or str(plan.pre_pass.base.stored_dtype())).endswith("16"):
            yield (
                "trimming in 16 bits: stock mergekit rounds task vectors before it trims them, and keeps others of the "
                "entries that are equally large at the threshold (dtype: float32 makes it nearly the same)"
            )
    yield from _losses_of_config(plan, exported)


def _losses_of_config(plan: MergePlan, exported: MergePlan) -> Iterator[str]:
    ours, theirs = plan.output_config.to_dict(), exported.output_config.to_dict()
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            yield (
                f"config key {key}: stock mergekit writes {json.dumps(theirs.get(key))}, {plan.config.merge_method} "
                f"writes {json.dumps(ours.get(key))}: change it in the merged model's config.json"
            )
    try:
        with tempfile.TemporaryDirectory() as folder:
            copy.deepcopy(exported.output_config).save_pretrained(folder)
    except Exception as error:  # huggingface_hub's check of its own configs
        yield f"stock mergekit can't save the merged model's config ({' '.join(str(error).split())})"


class _Compare(Task[Difference | None]):
    """Merge a tensor both ways, and compare the results."""

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


def compare(plan: MergePlan, exported: MergePlan, options: MergeOptions) -> list[Difference]:
    """Merge every tensor both ways, and write none: how far apart are they?"""
    ours = {tensor.name: tensor.task for tensor in plan.tensors}
    targets = [
        _Compare(name=theirs.name, ours=task, exported=theirs.task, inputs=task.gather_tensors, base=task.base_model)
        for theirs in exported.tensors
        if (task := ours.get(theirs.name)) is not None
    ]
    executor = Executor(targets=targets, math_device=options.device, storage_device="cpu")
    return [difference for _, difference in executor.run(quiet=options.quiet) if difference is not None]


def summary(differences: Sequence[Difference]) -> str:
    """Say how far the exported merge is from ours, by the tensor that differs most."""
    worst = max(differences, key=lambda d: d.relative)
    most = max(differences, key=lambda d: d.of_change)
    return (
        f"largest relative difference of a merged tensor: {worst.relative:.1e} of its norm ({worst.name}), or "
        f"{most.of_change:.1e} of what the merge changes in it ({most.name})"
    )
