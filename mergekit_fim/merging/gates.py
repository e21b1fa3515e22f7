"""Say which tensors, or which parts of them, are MLP gate projections: gate protection is for these."""

import math
import re
from collections.abc import Sequence

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter

# MLP gate projections that are a tensor of their own, by the names that mergekit's architectures use. The router of a
# mixture of experts (`mlp.gate`) is not one.
_SEPARATE = re.compile(
    r"(?<!\.self_attn)\.gate_proj\."  # Llama and most others, experts included; AFMoE's attention has one too
    r"|\.feed_forward\.w1\."  # LFM2, InternLM2
    r"|\.mlp\.c_fc_0\."  # EXAONE
    r"|\.mlp\.c_fc2\."  # Jais
    r"|^transformer\.h\.\d+\.mlp\.w2\."  # Qwen (1)
)

# Tensors in which gate and up projection are fused. In a linear layer the gate's outputs come first, then the others,
# in every decoder of transformers (Phi-3, GLM, GLM-4, Granite's shared MLP). Fused experts are [expert, output, input]
# in most models, but not in all (GPT-OSS): see `is_layout_known`.
_FUSED = re.compile(r"gate_up_proj|\.shared_mlp\.input_linear\.")
_FUSED_LINEAR = re.compile(r"\.(?:gate_up_proj|shared_mlp\.input_linear)\.(?:weight|bias)$")
_FUSED_EXPERTS = re.compile(r"\.experts\.gate_up_proj$")


def is_gate_projection(tensor_name: str) -> bool:
    """Whether a tensor is a separate MLP gate projection, to which gate protection applies (arXiv 2603.21705)."""
    return _SEPARATE.search(tensor_name) is not None


def is_fused(tensor_name: str) -> bool:
    """Whether a tensor has an MLP gate projection as one of its parts."""
    return _FUSED.search(tensor_name) is not None


def is_layout_known(tensor_name: str, model_type: str) -> bool:
    """Whether the gate's part of a fused tensor is its first half, along the axis of the outputs.

    For experts transformers says it, when it makes the fused tensor of single experts' gate and up projections.
    """
    if _FUSED_LINEAR.search(tensor_name):
        return True
    if not _FUSED_EXPERTS.search(tensor_name):
        return False
    for converter in get_checkpoint_conversion_mapping(model_type) or []:
        if isinstance(converter, WeightConverter) and any("gate_up_proj" in t for t in converter.target_patterns):
            last = converter.operations[-1]
            names = [re.split(r"\W+", pattern)[-2] for pattern in converter.source_patterns]
            if names in (["gate_proj", "up_proj"], ["w1", "w3"]) and isinstance(last, Concatenate) and last.dim == 1:
                return True
    return False


def gate_parts(tensor_name: str, shape: Sequence[int]) -> tuple[list[slice], list[slice]]:
    """Divide a tensor into the parts that are gate projection, and those that aren't, as runs of its entries in memory.

    In a fused tensor the gate projection is the first half, along the axis of the outputs.
    """
    entries = math.prod(shape)
    whole = [slice(0, entries)]
    if not is_fused(tensor_name):
        return (whole, []) if is_gate_projection(tensor_name) else ([], whole)
    axis = 1 if _FUSED_EXPERTS.search(tensor_name) else 0
    step = math.prod(shape[axis:])
    starts = range(0, entries, step)
    return [slice(s, s + step // 2) for s in starts], [slice(s + step // 2, s + step) for s in starts]
