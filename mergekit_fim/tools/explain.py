"""Say what a planned merge will do that its config doesn't show, and what it will read, write and hold."""

import math
import os
from collections.abc import Iterator

from mergekit.common import dtype_from_name
from mergekit.options import MergeOptions

from mergekit_fim.fisher.batched import micro_batch
from mergekit_fim.fisher.loading import device_plan
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.models.language import is_tied
from mergekit_fim.prepass.result import BaseCoefficients
from mergekit_fim.text import size, wrapped
from mergekit_fim.tools.plan import MergePlan, PlannedTensor

# What Python, torch, transformers and mergekit hold without a model, and beside a model in the pre-pass, in bytes:
# measured with benchmarks/cost.py (docs/scale.md).
PROGRAM_MEMORY = 0.40e9
PRE_PASS_MEMORY = 0.65e9


def explain(plan: MergePlan, options: MergeOptions) -> str:
    """Say what the merge will do that neither its config nor its report says."""
    return "\n".join(line for note in _notes(plan, options) for line in wrapped(f"- {note}")) + "\n"


def _notes(plan: MergePlan, options: MergeOptions) -> Iterator[str]:
    if plan.config.merge_method == "fim_ties":
        for settings in (m for m in plan.pre_pass.models if not m.density_is_default):
            model = settings.model.reference
            values = {own[model] for tensor in plan.tensors if model in (own := tensor.per_model("density"))}
            shown = " to ".join(f"{v:g}" for v in sorted({min(values), max(values)}))
            yield f"of each tensor of {model}'s task vector, the fraction {shown} is kept"
    if all(difference.key != "tie_word_embeddings" for difference in plan.pre_pass.differences):
        tied = is_tied(plan.output_config)
        yield f"output head of the merged model: {'tied to its embeddings' if tied else 'of its own'}"
    yield from _cost(plan, options)


def _cost(plan: MergePlan, options: MergeOptions) -> Iterator[str]:
    """Say what the merge will read, write and hold, from the checkpoints' headers, as if it used all layers.

    The pre-pass reads everything once, for the task vectors and the forward pass. If it measures, it reads the base's
    layers once more for the backward pass, and more often where it splits the sequences into micro-batches. Files that
    fit in the system's own cache are read from disk once in all.
    """
    inputs = plan.pre_pass.inputs
    sizes = {reference: sum(its.nbytes for its in model.headers.values()) for reference, model in inputs.items()}
    reads, memory = 0, PROGRAM_MEMORY
    for its in plan.pre_pass.coefficients:
        reads += sizes[its.base.reference] + sum(sizes[m.model.reference] for m in its.models)
        if not its.origin:  # it is measured now
            settings = plan.pre_pass.settings.fisher
            sequences = micro_batch(settings.samples, settings.seq_len, "cpu")
            prefixes = tuple(prefix for layer in its.base.layout.layers for prefix in layer.prefixes)
            of_layers = sum(header.nbytes for name, header in its.base.headers.items() if name.startswith(prefixes))
            reads += (2 * math.ceil(settings.samples / sequences) - 1) * of_layers
            memory = max(memory, PRE_PASS_MEMORY + _activations(its, sequences * settings.seq_len))
    if plan.pre_pass.kron is not None:  # a forward pass, and the task vectors
        factors = plan.pre_pass.kron.factors
        reads += 2 * sum(sizes[model.reference] for model in factors)
        recorded = [its.size for its in factors.values() if not its.origin]
        memory = max([memory, *(PRE_PASS_MEMORY + count for count in recorded)])
        on_disk = sum(its.size for its in factors.values())
        yield f"the factors of {len(factors)} models take {size(on_disk)} on disk"
    base = plan.pre_pass.base
    width = (dtype_from_name(plan.config.out_dtype or plan.config.dtype) or base.stored_dtype()).itemsize
    written = [width * _elements(tensor, base) for tensor in plan.tensors]
    shard = min(options.out_shard_size, sum(written)) if options.out_shard_size > 0 else sum(written)
    pickled = 0 if options.lazy_unpickle else sum(_largest_pickle(model) for model in inputs.values())
    merge_memory = PROGRAM_MEMORY + shard + max(written, default=0) + pickled
    yield (
        f"reads {size(reads)} in the pre-pass and {size(sum(sizes.values()))} in the merge (from disk only what the "
        f"system hasn't kept in memory); writes {size(sum(written))}"
    )
    if options.multi_gpu or options.device != "cpu":
        yield (
            f"memory on an accelerator: the base's {size(sizes[base.reference])} in the pre-pass where they fit, and "
            "in the merge a tensor of every model at a time"
        )
        for base_to_measure in (its.base for its in plan.pre_pass.coefficients if not its.origin):
            chosen = device_plan(base_to_measure, plan.config.dtype, options)
            yield f"the measurement of {base_to_measure}, with the memory that is free now: {chosen}"
    yield (
        f"memory on the CPU, beside the mapped checkpoints: about {size(memory + pickled)} in the pre-pass, up to "
        f"{size(merge_memory)} in the merge, {size(shard)} of it collected for a file (--out-shard-size)"
    )


def activation_memory(layers: int, hidden: int, intermediate: int, tokens: int, width: int) -> float:
    """Count the bytes of activations in the pre-pass: the inputs of all decoder layers, and what is inside one."""
    return width * tokens * (layers * hidden + 6 * hidden + 5 * intermediate)


def _activations(its: BaseCoefficients, tokens: int) -> float:
    text = its.base.text_config
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    width = dtype_from_name(its.fisher.dtype).itemsize
    return activation_memory(len(its.base.layout.layers), text.hidden_size, intermediate, tokens, width)


def _largest_pickle(model: InputModel) -> int:
    """Find the size of a model's largest `.bin` file. These are in memory whole while they are read."""
    paths = {header.path for header in model.headers.values() if not header.path.endswith(".safetensors")}
    return max(map(os.path.getsize, paths), default=0)


def _elements(tensor: PlannedTensor, base: InputModel) -> int:
    """Count a merged tensor's entries, by the base's header. Single experts that mergekit fuses aren't in there."""
    own = tensor.sources().get(base.reference)
    name = base.stored_name(own) if own is not None else None
    return math.prod(base.headers[name].shape) if name is not None else 0
