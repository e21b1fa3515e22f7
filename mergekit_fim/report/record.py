"""`fim_report.json`: what a pre-pass found, kept beside the merged model."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel
from pydantic import BaseModel

from mergekit_fim.config.parameters import PARAMETERS
from mergekit_fim.files import REPORT_FORMAT, REPORT_NAME, write_text
from mergekit_fim.measurements.file import layers_as_json
from mergekit_fim.measurements.record import versions
from mergekit_fim.merging.gates import is_fused, is_gate_projection, is_layout_known
from mergekit_fim.merging.output_folder import ReplaceModel
from mergekit_fim.prepass.result import BaseCoefficients, ModelCoefficients, PrePass
from mergekit_fim.report import kron


def as_json(pre_pass: PrePass) -> dict[str, Any]:
    """The report, as it is written beside the merged model."""
    base = str(pre_pass.base)
    fisher = {str(c.base): _fisher(c) for c in pre_pass.coefficients}
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


def _fisher(coefficients: BaseCoefficients) -> dict[str, Any]:
    return {
        "model": dict(vars(coefficients.measurement.model)),
        "vocab_size": coefficients.fisher.vocab_size,
        "dtype": coefficients.fisher.dtype,
        "num_layers": len(coefficients.fisher.layers),
        "layers": layers_as_json(coefficients.fisher),
    }


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
    """The tensors of the decoder layers that `is_one` chooses, such as the gate projections."""
    base = pre_pass.base
    names = [tensor.name for layer in base.layout.layers for tensor in layer.tensors]
    return [name for name in names if is_one(name) and name not in base.absent]


def protected_halves(pre_pass: PrePass) -> list[str]:
    """The fused tensors in which gate protection knows the gate's half."""
    model_type = pre_pass.base.text_config.model_type
    return [name for name in gate_tensors(pre_pass, is_fused) if is_layout_known(name, model_type)]


def jsonable(value: Any) -> Any:
    """A config's value, without pydantic's classes."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_none=True)
    return [jsonable(item) for item in value] if isinstance(value, list) else value


class WriteReport(Task[None]):
    """Writes the report when the merged model is complete."""

    finalize: FinalizeModel
    text: str
    out_path: str

    def arguments(self) -> dict[str, Any]:
        """mergekit's name for the tasks that must come first."""
        return {"finalize": self.finalize}

    def main_thread_only(self) -> bool:
        """Run where `FinalizeModel` runs."""
        return True

    def execute(self, **_kwargs: Any) -> None:
        """Write the report whole or not at all."""
        write_text(os.path.join(self.out_path, REPORT_NAME), self.text)


def with_report(targets: Sequence[Any], pre_pass: PrePass, out_path: str) -> list[Any]:
    """Add the report to mergekit's tasks, after the `FinalizeModel` among them, which becomes a `ReplaceModel`.

    Wherever a merge stops, a report lies only beside its own model, and a config.json only beside its own weights:
    mergekit writes the config.json last.
    """
    (finalize,) = (task for task in targets if isinstance(task, FinalizeModel))
    text = json.dumps(as_json(pre_pass), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replace = ReplaceModel(tensor_save_tasks=finalize.tensor_save_tasks, writer_task=finalize.writer_task)
    others = [replace if task is finalize else task for task in targets]
    return [*others, WriteReport(finalize=replace, text=text, out_path=out_path)]
