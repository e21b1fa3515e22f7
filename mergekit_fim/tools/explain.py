"""A planned merge in words: what it will do that the config doesn't show."""

import re
from collections.abc import Iterator, Sequence

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_fim.merging.gates import is_fused, is_gate_projection
from mergekit_fim.text import size, wrapped
from mergekit_fim.tools.cost import merge_cost
from mergekit_fim.tools.plan import MergePlan


def explain(plan: MergePlan, options: MergeOptions) -> str:
    """In words, what the merge will do beside what the report says."""
    return "\n".join(line for note in _plan_notes(plan, options) for line in wrapped(f"- {note}")) + "\n"


def _plan_notes(plan: MergePlan, options: MergeOptions) -> Iterator[str]:
    assert plan.pre_pass is not None
    inputs = plan.pre_pass.inputs
    if plan.config.merge_method == "fim_ties":
        densities: dict[ModelReference, set[float]] = {}
        for tensor in plan.tensors:
            for model, density in tensor.per_model("density").items():
                densities.setdefault(model, set()).add(density)
        for model, values in densities.items():
            shown = " to ".join(f"{v:g}" for v in sorted({min(values), max(values)}))
            yield f"of each tensor of {model}'s task vector, the fraction {shown} is kept"
    scaled = [t.name for t in plan.tensors if t.per_model("alpha") and t.parameter("gate_scale") != 1]
    if protected := [name for name in scaled if is_gate_projection(name)]:
        yield f"gate-protected tensors: {', '.join(_with_ranges(protected))}"
    if fused := [name for name in scaled if is_fused(name)]:
        yield f"gate-protected in their gate's half: {', '.join(_with_ranges(fused))}"
    heads = {str(reference): model.text_config.tie_word_embeddings for reference, model in inputs.items()}
    tied = plan.output_config.get_text_config().tie_word_embeddings
    says = ", ".join(f"{name} {'tied' if is_tied else 'of its own'}" for name, is_tied in heads.items())
    yield f"output head: {says}; in the merged model {'tied' if tied else 'of its own'}"
    cost = merge_cost(plan, options)
    yield (
        f"reads {size(cost.pre_pass_reads)} in the pre-pass and {size(cost.merge_reads)} in the merge (from disk only "
        f"what the system hasn't kept in memory); writes {size(cost.writes)}"
    )
    if options.multi_gpu or options.device != "cpu":
        yield (
            f"memory on the accelerator: the base's {size(cost.base)} in the pre-pass, or one decoder layer at a time "
            "where they don't fit; in the merge a tensor of every model at a time"
        )
    yield (
        f"memory on the CPU, beside the mapped checkpoints: about {size(cost.pre_pass_memory)} in the pre-pass, up to "
        f"{size(cost.merge_memory)} in the merge, {size(cost.shard)} of it collected for a file (--out-shard-size)"
    )


def _with_ranges(names: Sequence[str]) -> list[str]:
    """`model.layers.{0-27}.mlp.gate_proj.weight` for names that differ only in consecutive numbers of their layers."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        before, number, after = re.split(r"(?<=\.)(\d+)(?=\.)", name, maxsplit=1)
        groups.setdefault((before, after), []).append(int(number))
    shown = []
    for (before, after), numbers in groups.items():
        if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
            shown.append(f"{before}{{{numbers[0]}-{numbers[-1]}}}{after}")
        else:
            shown += [f"{before}{number}{after}" for number in numbers]
    return shown
