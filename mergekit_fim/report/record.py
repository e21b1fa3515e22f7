"""`fim_report.json`: what a pre-pass found, kept beside the merged model."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mergekit.io.tasks import FinalizeModel
from pydantic import BaseModel

from mergekit_fim.config.parameters import PARAMETERS
from mergekit_fim.files import REPORT_FORMAT
from mergekit_fim.measurements.file import layers_as_json
from mergekit_fim.measurements.record import Measurement, versions
from mergekit_fim.merging.gates import is_fused, is_gate_projection, is_layout_known
from mergekit_fim.merging.output_folder import ReplaceModel
from mergekit_fim.prepass.result import ModelCoefficients, PrePass
from mergekit_fim.report import kron


def as_json(pre_pass: PrePass) -> dict[str, Any]:
    """Make the report, as it is written beside the merged model."""
    base = str(pre_pass.base)
    fisher = {str(c.base): _fisher(c.measurement) for c in pre_pass.coefficients}
    return {
        "format": REPORT_FORMAT,
        "version": 1,
        "method": pre_pass.config.merge_method,
        "base_model": base,
        "settings": _settings(pre_pass),
        "fisher": fisher.pop(base, None),
        "fisher_of_other_bases": fisher,
        "models": list(_models(pre_pass)),
        **({} if pre_pass.kron is None else {"kron": kron.as_json(pre_pass.kron)}),
        "gate_projections": gate_tensors(pre_pass, is_gate_projection),
        "fused_gate_projections": protected_halves(pre_pass),
        "modules": list(_modules(pre_pass)),
        "added_tensors": list(pre_pass.base.added),
        "config_differences": [
            {"key": d.key, "values": dict(d.values), "written": d.written} for d in pre_pass.differences
        ],
        "warnings": list(pre_pass.warnings),
        "versions": versions(),
    }


def _settings(pre_pass: PrePass) -> dict[str, Any]:
    settings, method = pre_pass.settings, pre_pass.config.merge_method
    own = {f"fisher_{key}": value for key, value in vars(settings.fisher).items()} | vars(settings.mapping)
    own |= {"alpha_other": settings.alpha_other, "damping": settings.damping}
    return {
        "fisher": settings.saved,
        **{name: value for name, value in own.items() if method in PARAMETERS[name].methods},
        **{name: jsonable(value) for name, value in pre_pass.shared.items()},
        "default_density": pre_pass.default_density,
        "dtype": pre_pass.config.dtype,
        "out_dtype": pre_pass.config.out_dtype,
    }


def _fisher(measurement: Measurement) -> dict[str, Any]:
    its = measurement.fisher
    shape = {"vocab_size": its.vocab_size, "dtype": its.dtype, "num_layers": len(its.layers)}
    return {"model": dict(vars(measurement.model)), **shape, "layers": layers_as_json(its)}


def _models(pre_pass: PrePass) -> Iterator[dict[str, Any]]:
    weighed = {(c.base, model.model): model for c in pre_pass.coefficients for model in c.models}
    for settings in pre_pass.models:
        model = weighed.get((settings.base, settings.model))
        yield {
            "model": str(settings.model),
            "base_model": str(settings.base),
            "weight": jsonable(settings.weight),
            "density": jsonable(settings.density),
            "alpha": jsonable(settings.alpha),
            "alpha_other": model.alpha_other if model else None,
            "layers": list(_layers(model)) if model else [],
        }


def _layers(model: ModelCoefficients) -> Iterator[dict[str, Any]]:
    for (pair, sq_norm), score, alpha in zip(model.norms.layers.items(), model.scores, model.used_alphas, strict=True):
        layer = {"index": pair.source_layer, "task_vector_sq_norm": sq_norm, "score": score, "alpha": alpha}
        yield layer if pair.source_layer == pair.base_layer else layer | {"base_index": pair.base_layer}


def _modules(pre_pass: PrePass) -> Iterator[dict[str, Any]]:
    base, layout = pre_pass.base, pre_pass.base.layout
    for name in sorted(layout.modules):
        outside = [tensor.name for tensor in layout.modules[name] if tensor.name not in base.absent]
        kept = [pre_pass.kept.get(tensor) for tensor in outside]
        yield {
            "module": name,
            "decoder_layers": len(layout.layers) if name == layout.stack else 0,
            "tensors_outside": len(outside),
            "of_other_modules": sum(tensor in base.other_modules for tensor in outside),
            "kept_from_base": kept.count("base"),
            "kept_from_tuned": kept.count("tuned"),
        }


def gate_tensors(pre_pass: PrePass, is_one: Callable[[str], bool]) -> list[str]:
    """List the tensors of the decoder layers that `is_one` chooses, such as the gate projections."""
    base = pre_pass.base
    names = [tensor.name for layer in base.layout.layers for tensor in layer.tensors]
    return [name for name in names if is_one(name) and name not in base.absent]


def protected_halves(pre_pass: PrePass) -> list[str]:
    """List the fused tensors in which gate protection knows the gate's half."""
    model_type = pre_pass.base.text_config.model_type
    return [name for name in gate_tensors(pre_pass, is_fused) if is_layout_known(name, model_type)]


def jsonable(value: Any) -> Any:
    """Write a config's value without pydantic's classes."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_none=True)
    return [jsonable(item) for item in value] if isinstance(value, list) else value


def with_report(targets: Sequence[Any], pre_pass: PrePass) -> list[Any]:
    """Make the `FinalizeModel` among mergekit's tasks a `ReplaceModel`, which writes the report, too."""
    text = json.dumps(as_json(pre_pass), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return [
        ReplaceModel(tensor_save_tasks=task.tensor_save_tasks, writer_task=task.writer_task, report=text)
        if isinstance(task, FinalizeModel)
        else task
        for task in targets
    ]
