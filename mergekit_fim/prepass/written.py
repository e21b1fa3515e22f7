"""What the pre-pass found -> the config, as mergekit's own filtered parameters."""

import math
from collections.abc import Container, Mapping, Sequence

from mergekit.config import ConditionalParameter, MergeConfiguration

from mergekit_fim.config.parameters import PARAMETERS
from mergekit_fim.config.settings import conditions
from mergekit_fim.merging.gates import is_fused, is_gate_projection, is_layout_known
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.prepass.result import BaseCoefficients, SourceSlice
from mergekit_fim.prepass.slices import output_slices
from mergekit_fim.prepass.task_vectors import LayerPair

# The paper has one density for 1.5B parameters and one for 7B. That the change comes here is this project's choice.
_LARGE_MODEL = 3_000_000_000


def write_alphas(
    sources: Sequence[SourceSlice], automatic: Container[SourceSlice], coefficients: Sequence[BaseCoefficients]
) -> None:
    """Set `alpha` of the sources, at a lower precedence than what the user set by hand."""
    results = {(c.base.reference, m.model.reference): m for c in coefficients for m in c.models}
    for source in sources:
        if source in automatic:
            result = results[source.ends]
            write_alpha(source, result.model, dict(zip(result.pairs, result.alphas, strict=True)), result.alpha_other)
        else:  # mergekit wants a value for kept tensors, too
            source.write("alpha", [*source.settings("alpha"), ConditionalParameter(value=1.0)])


def write_alpha(source: SourceSlice, model: InputModel, alphas: Mapping[LayerPair, float], outside: float) -> None:
    """Set `alpha` of a source, at a lower precedence than what the user set by hand."""
    layers = {p: alphas[pair] for pair in source.pairs() for p in model.layout.layers[pair.source_layer].prefixes}
    source.write("alpha", [*source.settings("alpha"), *source.filters(model, layers, outside)])


def write_kept(config: MergeConfiguration, base: InputModel, kept: Mapping[str, str]) -> None:
    """Set `other_modules` at the highest precedence, for exactly the tensors that are kept."""
    names = [tensor.name for tensor in base.layout.all_tensors() if any(part in tensor.name for part in kept)]
    names.sort(key=len)  # a filter matches any part of a name, so that longer names come first
    values = [ConditionalParameter(filter=name, value=kept.get(name, "merge")) for name in names[::-1]]
    values.append(ConditionalParameter(value="merge"))
    for _, out_slice, _ in output_slices(config):
        out_slice.parameters = {**(out_slice.parameters or {}), "other_modules": values}


def default_density(base: InputModel) -> float:
    """The paper's density for a base of this size: 0.2 at 1.5B, 0.4 at 7B (arXiv 2603.21705, as summarised)."""
    parameters = sum(math.prod(header.shape) for header in base.headers.values())
    return 0.2 if parameters < _LARGE_MODEL else 0.4


def write_default_density(config: MergeConfiguration, density: float) -> None:
    """Set `density` at the lowest precedence."""
    given = (config.parameters or {}).get("density")
    value = density if given is None else [*conditions(given), ConditionalParameter(value=density)]
    config.parameters = {**(config.parameters or {}), "density": value}


def leave_unknown_gates(config: MergeConfiguration, base: InputModel) -> None:
    """Set `gate_scale` to 1 at the highest precedence, for tensors that gate protection leaves alone.

    These are fused tensors in which it isn't known where the gate is, and gates outside the language model.
    """
    names = {name for name in base.other_modules if is_gate_projection(name) or is_fused(name)}
    for layer in base.layout.layers:
        fused = (tensor.name for tensor in layer.tensors if is_fused(tensor.name))
        names |= {layer.local(name) for name in fused if not is_layout_known(name, base.text_config.model_type)}
    if not names:
        return
    exceptions = [ConditionalParameter(filter=name, value=1.0) for name in sorted(names)]
    default = PARAMETERS["gate_scale"].default_for(config.merge_method)
    config.parameters = {"gate_scale": default} | (config.parameters or {})
    for scope in (config, *(config.modules or {}).values(), *(out_slice for _, out_slice, _ in output_slices(config))):
        if scope.parameters and "gate_scale" in scope.parameters:
            given = conditions(scope.parameters["gate_scale"])
            scope.parameters = {**scope.parameters, "gate_scale": [*exceptions, *given]}
