"""What the user sees of a pre-pass: the warnings, a table, and notes in words."""

import json
import logging
import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from mergekit_fim.merging.gates import is_fused, is_gate_projection
from mergekit_fim.prepass.result import BaseCoefficients, ModelCoefficients, PrePass
from mergekit_fim.report import kron
from mergekit_fim.report.record import gate_tensors, jsonable, protected_halves
from mergekit_fim.text import echo, width, wrapped

LOG = logging.getLogger("mergekit_fim")


def show(pre_pass: PrePass, *, quiet: bool) -> None:
    """Log the warnings, and print the table unless `quiet`."""
    for warning in pre_pass.warnings:
        LOG.warning("%s", warning)
    if not quiet:
        echo(render(pre_pass))


def render(pre_pass: PrePass) -> str:
    """Write the coefficients as a table, and in words what else the merge will do."""
    lines = [""]
    for coefficients in pre_pass.coefficients:
        settings = pre_pass.settings.fisher
        lines += wrapped(
            f"Fisher information of {coefficients.base} on {settings.samples} × {settings.seq_len} random tokens "
            f"(seed {settings.seed}, labels: {settings.labels}, in {coefficients.fisher.dtype})"
        )
        if coefficients.origin:
            lines += wrapped(f"({coefficients.origin})")
        lines += _table(coefficients)
        lines.append("")
    if pre_pass.kron is not None:
        lines += [*kron.table(pre_pass.kron), ""]
    lines += [line for note in _notes(pre_pass) for line in wrapped(f"- {note}")]
    return "\n".join(lines) + "\n"


def _table(coefficients: BaseCoefficients) -> Iterator[str]:
    """Yield blocks of as many models as fit side by side, each with the columns of the base at the left."""
    group, left = 28, 30  # characters
    per_block = max(1, (width() - left) // group)
    models = coefficients.models
    for start in range(0, len(models), per_block):
        block = models[start : start + per_block]
        if len(models) > 1:
            names = (str(model.model) for model in block)
            yield " " * left + "".join(f"{n if len(n) < group - 1 else '…' + n[3 - group :]:>{group}}" for n in names)
        yield f"{'layer':>8}{'Fisher':>12}{'±':>10}" + f"{'‖δ‖':>10}{'score':>10}{'α':>8}" * len(block)
        for layer in coefficients.fisher.layers:
            stderr = "" if layer.stderr is None else f"{layer.stderr:.1e}"
            for cells in zip_longest(*(_cells(m, layer.index) for m in block), fillvalue=" " * group):
                yield f"{layer.index:>8}{layer.fisher:>12.3e}{stderr:>10}" + "".join(cells)
        other = ["n/a" if m.norms.other is None else f"{math.sqrt(m.norms.other):.3g}" for m in block]
        yield f"{'outside':>8}{'':>22}" + "".join(
            f"{norm:>10}{'':>10}{m.alpha_other:>8.3f}" for norm, m in zip(other, block, strict=True)
        )


def _cells(model: ModelCoefficients, base_layer: int) -> Iterator[str]:
    """Yield a row for each of the model's layers that is merged into a layer of the base."""
    for (pair, sq_norm), score, alpha in zip(model.norms.layers.items(), model.scores, model.used_alphas, strict=True):
        if pair.base_layer == base_layer:
            yield f"{math.sqrt(sq_norm):>10.3g}{score:>10.2e}{alpha:>8.3f}"


def _notes(pre_pass: PrePass) -> Iterator[str]:
    if pre_pass.coefficients or pre_pass.kron is not None:
        rule = "the mean of the layers' α" if pre_pass.settings.alpha_other is None else "set by alpha_other"
        more = ", vision or audio tower and projector" if pre_pass.base.other_modules else ""
        yield f"outside: embeddings, final norm, output head{more}; their α is {rule}"
    if pre_pass.kron is not None:
        yield from kron.notes(pre_pass.kron)
    yield from _module_notes(pre_pass)
    for coefficients in pre_pass.coefficients:
        yield from _idle_experts(coefficients)
    for settings in pre_pass.models:
        if settings.alpha is not None:
            yield f"alpha of {settings.model} is set by hand: {_plain(settings.alpha)}"
        if settings.density_is_default:
            yield f"density of {settings.model}: {settings.density:g}, the default for the size of the base"
    pairs = [(m.model, pair) for c in pre_pass.coefficients for m in c.models for pair in m.pairs]
    if pre_pass.kron is not None:
        pairs += [(m.model, layer.pair) for m in pre_pass.kron.models for layer in m.layers]
    shifted = [
        f"{model} layer {pair.source_layer} into base layer {pair.base_layer}"
        for model, pair in pairs
        if pair.source_layer != pair.base_layer
    ]
    if added := pre_pass.base.added:
        yield (
            f"merged beyond mergekit's definition of the architecture, which leaves them out: {len(added)} tensors "
            f"such as {added[0]}"
        )
    if shifted:
        yield f"the slices merge layers of different numbers: {', '.join(shifted)}"
    if pre_pass.shared["gate_scale"] != 1:
        yield from _gate_notes(pre_pass)
    tolerance = pre_pass.shared["norm_tolerance"]
    if tolerance != 0:
        yield f"norm calibration: a merged tensor whose norm is off by more than {_plain(tolerance)} is rescaled"
    for difference in pre_pass.differences:
        values = "; ".join(f"{model}: {_plain(value)}" for model, value in difference.values)
        yield f"config key {difference.key} differs ({values}); written: {_plain(difference.written)}"


def _module_notes(pre_pass: PrePass) -> Iterator[str]:
    base, layout = pre_pass.base, pre_pass.base.layout
    if len(layout.modules) > 1:
        others = ", ".join(sorted(layout.modules.keys() - {layout.stack}))
        yield f"the decoder layers are those of the module {layout.stack}; outside are also all of {others}"
    for source, name in (("base", "the base"), ("tuned", "the fine-tuned model")):
        if names := sorted(tensor for tensor, kept in pre_pass.kept.items() if kept == source):
            yield f"other_modules: {len(names)} tensors such as {names[0]} are kept from {name} as they are"
    if pre_pass.shared["other_modules"] != "merge" and not base.other_modules:
        yield "other_modules has no effect: these models are nothing but a language model"


def _idle_experts(coefficients: BaseCoefficients) -> Iterator[str]:
    experts = {layer.index: layer.experts for layer in coefficients.fisher.layers if layer.experts is not None}
    idle = {index: len(its.not_reached) for index, its in experts.items()}
    if any(idle.values()):
        most = max(idle, key=idle.__getitem__)
        yield (
            f"experts of {coefficients.base}: {sum(idle.values())} of {sum(its.count for its in experts.values())} "
            f"were reached by no random token (most in decoder layer {most}: {idle[most]}), and count as parameters "
            "without Fisher information; more fisher_samples reach more"
        )


def _gate_notes(pre_pass: PrePass) -> Iterator[str]:
    scale = _plain(pre_pass.shared["gate_scale"])
    if gates := gate_tensors(pre_pass, is_gate_projection):
        yield f"gate protection: α × {scale} on {len(gates)} MLP gate projections such as {gates[0]}"
    known = protected_halves(pre_pass)
    unknown = [name for name in gate_tensors(pre_pass, is_fused) if name not in known]
    if known:
        yield f"gate protection: α × {scale} on the gate's half of {len(known)} fused tensors such as {known[0]}"
    if unknown:
        yield (
            f"gate protection: not applied to {len(unknown)} tensors such as {unknown[0]}, which hold gate and up "
            "projection in an order that isn't known for certain"
        )
    if not (gates or known or unknown):
        yield "gate protection: not applied, the models have no MLP gate projection"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(jsonable(value), ensure_ascii=False)
