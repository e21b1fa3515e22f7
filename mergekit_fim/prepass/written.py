"""What the pre-pass found or chose -> the config, as mergekit's own filtered parameters."""

import math
from collections.abc import Container, Mapping, Sequence

from mergekit.config import ConditionalParameter, MergeConfiguration

from mergekit_fim.config.parameters import PARAMETERS
from mergekit_fim.config.settings import conditions
from mergekit_fim.merging.gates import is_fused, is_gate_projection, is_layout_known
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.prepass.result import BaseCoefficients, SourceSlice
from mergekit_fim.prepass.task_vectors import LayerPair

# Below this many base parameters `density` is the paper's value for 1.5B, from there on its value for 7B. Where between
# the two the change lies is this project's choice.
_LARGE_MODEL = 3_000_000_000


def write_alphas(
    sources: Sequence[SourceSlice], automatic: Container[SourceSlice], coefficients: Sequence[BaseCoefficients]
) -> None:
    """Put the coefficients into the sources' parameters, behind what the user set by hand for some of the tensors."""
    found = {(c.base.reference, m.model.reference): m for c in coefficients for m in c.models}
    for source in sources:
        if source not in automatic:  # but for tensors that are kept, of which mergekit wants to know it all the same
            source.write("alpha", [*source.settings("alpha"), ConditionalParameter(value=1.0)])
            continue
        result = found[source.ends]
        write_alpha(source, result.model, dict(zip(result.pairs, result.alphas, strict=True)), result.alpha_other)


def write_alpha(source: SourceSlice, model: InputModel, alphas: Mapping[LayerPair, float], outside: float) -> None:
    """Put α into a source's parameters, behind what the user set by hand."""
    layers = {p: alphas[pair] for pair in source.pairs() for p in model.layout.layers[pair.source_layer].prefixes}
    source.write("alpha", [*source.settings("alpha"), *source.filters(model, layers, outside)])


def write_kept(config: MergeConfiguration, base: InputModel, kept: Mapping[str, str]) -> None:
    """Set `other_modules`, at the highest precedence, so that it holds for just the tensors that it is about."""
    # A filter is a part of a name, so that longer names come first.
    names = [tensor.name for tensor in base.layout.all_tensors()]
    filters = [name for name in names if name in kept or any(part in name for part in kept)]
    values = [
        ConditionalParameter(filter=name, value=kept.get(name, "merge")) for name in sorted(filters, key=len)[::-1]
    ]
    values.append(ConditionalParameter(value="merge"))
    for module in (config.modules or {}).values():
        for out_slice in module.slices or []:
            out_slice.parameters = {**(out_slice.parameters or {}), "other_modules": values}


def default_density(base: InputModel) -> float:
    """The paper's density for a base of this size: 0.2 at 1.5B, 0.4 at 7B (arXiv 2603.21705, as summarised)."""
    parameters = sum(math.prod(header.shape) for header in base.headers.values())
    return 0.2 if parameters < _LARGE_MODEL else 0.4


def write_default_density(config: MergeConfiguration, density: float) -> None:
    """Set `density` at the lowest precedence, where the user hasn't."""
    parameters = dict(config.parameters or {})
    given = parameters.get("density")
    default = ConditionalParameter(value=density)
    parameters["density"] = density if given is None else [*conditions(given), default]
    config.parameters = parameters


def leave_unknown_gates(config: MergeConfiguration, base: InputModel) -> None:
    """Set `gate_scale` to 1, at the highest precedence, for tensors that gate protection isn't for.

    Those are fused ones of which nobody knows the gate's part, and gates outside the language model.
    """
    names = {
        layer.local(tensor.name)
        for layer in base.layout.layers
        for tensor in layer.tensors
        if is_fused(tensor.name) and not is_layout_known(tensor.name, base.text_config.model_type)
    }
    names |= {name for name in base.other_modules if is_gate_projection(name) or is_fused(name)}
    if not names:
        return
    exceptions = [ConditionalParameter(filter=name, value=1.0) for name in sorted(names)]
    default = PARAMETERS["gate_scale"].default_for(config.merge_method)
    config.parameters = {"gate_scale": default} | (config.parameters or {})
    modules = (config.modules or {}).values()
    for scope in (config, *modules, *(out_slice for module in modules for out_slice in module.slices or [])):
        if scope.parameters and "gate_scale" in scope.parameters:
            given = conditions(scope.parameters["gate_scale"])
            scope.parameters = {**scope.parameters, "gate_scale": [*exceptions, *given]}
