"""A tiny random model of every language model that transformers has, by one builder: configs shrunk by name."""

import copy
import re
from typing import Any

import tiny
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

NAMES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
# Models that see, too, by their classes: each with its model type. The first of several is the one that has a class.
VISION = {cls: name for name, cls in reversed(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items())}

# What a config's number becomes, by its name: the first that matches.
_RULES: list[tuple[str, int]] = [
    (r"^ngram_vocab_size_base$", 37),
    (r"^(vocab_size|decoder_vocab_size|unpadded_vocab_size|vocab_size_per_layer_input)$", tiny.VOCAB),
    (r"^(pronunciation|shape|task_type)_vocab_size$", 7),
    (r"^encoder_hash_byte_group_vocab$", 50),
    (r"^(router_hidden_size|dim_head|adapter_rank|gated_norm_rank|time_step_rank|mamba_dt_rank|hc_lowrank)$", 4),
    (r"^hidden_size_per_layer_input$|^laurel_rank$|^mamba_(d_state)$|^state_size$|^ssm_state_size$|^d_rel$", 4),
    (r"^(hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|lru_width|word_embed_proj_dim)$", 32),
    (r"^(input_embedding_size|output_embedding_size|ple_embed_dim|(pronunciation|shape)_embed_dim)$", 32),
    (r"^(dim_model_base|shared_embed_dim)$", 16),
    (r"^(attention_hidden_size)$", 32),
    (r"^(moe|shared|expert).*(intermediate|ffn|hidden)_?(intermediate)?_?size$|^expert_ffn_hidden_size$", 24),
    (r"(intermediate_size|ffn_dim|ffn_hidden_size|feed_forward_size|^dff|^dim_ff|^d_inner)", 48),
    (r"^(num_hidden_layers|n_layers?|num_layers|num_blocks|(num_)?decoder_layers|num_layers_per_stack)$", 2),
    (r"^(encoder_layers|num_encoder_layers|first_k_dense_replace|num_dense_layers|moe_layer_start_index)$", 1),
    (r"^(num_nextn_predict_layers|num_kv_shared_layers)$", 0),
    (r"^(num_key_value_heads|swa_num_key_value_heads|num_kv_heads|num_query_groups)$", 2),
    (r"(attention_heads|^n_heads?|^num_heads|^linear_num_.*heads|^index_n_heads)$|^linear_num_heads$", 4),
    (r"^(head_dim|attention_head_dim|swa_head_dim|v_head_dim|qk_nope_head_dim|linear_.*head_dim|d_head)$", 8),
    (r"^(linear_head_dim|kv_channels|attention_head_size|query_pre_attn_scalar|index_head_dim)$", 8),
    (r"^rotary_dim$", 4),
    (r"^qk_rope_head_dim$", 8),
    (r"^qk_head_dim$", 16),
    (r"^(kv_lora_rank|q_lora_rank|o_lora_rank)$", 16),
    (r"^(mamba_d_head|mamba_head_dim|mamba_headdim)$", 16),
    (r"^(mamba_n_heads|mamba_num_heads|n_mamba_heads)$", 4),
    (r"^mamba_d_ssm$", 64),
    (r"^(mamba_n_groups|n_groups|mamba_ngroups|n_group|topk_group|num_expert_group|o_groups)$", 1),
    (r"^(chunk_size|mamba_chunk_size|attention_chunk_size|index_block_size|.*_chunk_length)$", 8),
    (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$", 4),
    (r"^(num_experts_per_tok(en)?|moe_k|moe_topk|top_k|index_topk_blocks|zero_expert_num)$", 2),
    (r"^(n_shared_experts|num_shared_experts|moe_num_shared_experts)$", 1),
    (r"^(index_topk)$", 6),
    (r"(max_position_embeddings|max_seq_len|n_positions|n_ctx|context_length|max_target_positions)$", 128),
    (r"^(max_source_positions|model_max_length|original_max_position_embeddings|rel_extent)$", 128),
    (r"(sliding_window|sliding_window_size|^window_size|attention_window_size|local_attention|window_len)$", 6),
    (r"^(keep_window_size|block_multiple_of|make_ngram_vocab_size_divisible_by|ffn_round_up_to_multiple_of)$", 8),
    (r"^split_ngram_parts$", 2),
    (r"^(attn_layer_period|layer_group_size|expert_layer_period)$", 2),
    (r"^(attn_layer_offset|expert_layer_offset)$", 1),
    (r"^(image_size)$", 28),
    (r"^(depth)$", 2),
    (r"^(position_embedding_size|num_position_embeddings|pos_emb_(height|width))$", 16),
    (r"^(out_hidden_size)$", 32),
    (r"^(patch_size)$", 14),
    (r"^(num_channels)$", 3),
]
_LISTS = ("layer_types", "mlp_layer_types", "indexer_types", "layers_block_type")

# What its names alone don't say.
_HEAD = {"head_dim": 8}
_MROPE = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}}
_SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma4": {
        "vision_config": {
            **{"model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": _HEAD,
    "nemotron": _HEAD | {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "full_attention"],
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 8, "indexer_compress_ratio": 2},
    },
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
        **{"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def _number(name: str, value: int) -> int:
    if re.search(r"token_id$|token_index$|^(unk|mask)_index$", name):
        return min(value, tiny.VOCAB - 1)
    return next((small for pattern, small in _RULES if re.search(pattern, name)), value)


def _shrunk(default: PretrainedConfig) -> dict[str, Any]:
    """The keyword arguments that make a small config of the kind of `default`."""
    found: dict[str, Any] = {}
    subs = {name for name in type(default).sub_configs if getattr(default, name, None) is not None}
    values = default.to_dict()
    for name, value in values.items():
        if name in subs:
            found[name] = _shrunk(getattr(default, name)) | {"model_type": getattr(default, name).model_type}
        elif isinstance(value, int) and not isinstance(value, bool):
            small = _number(name, value)
            if small != value:
                found[name] = small
        elif isinstance(value, list) and name.endswith("token_id"):
            found[name] = sorted({_number(name, item) for item in value})
    if "kv_lora_rank" in values:  # latent attention has no grouped heads
        found["num_key_value_heads"] = found.get("num_attention_heads", 4)
    kinds = {n: list(dict.fromkeys(values[n])) for n in _LISTS if isinstance(values.get(n), list) and values[n]}
    if kinds:
        layers = max(2, *(len(kind) for kind in kinds.values()))
        for name, kind in kinds.items():
            found[name] = kind + [kind[-1]] * (layers - len(kind))
        for name in ("num_hidden_layers", "num_layers"):
            if name in values:
                found[name] = layers
    return found


def _with(found: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Those within a part of a config leave its other values."""
    parts = {
        k: _with(found[k], v) for k, v in changes.items() if isinstance(v, dict) and isinstance(found.get(k), dict)
    }
    return found | changes | parts


def config(name: str, **changes: Any) -> PretrainedConfig:
    """A small config of a model type."""
    cls = CONFIG_MAPPING[name]
    return cls(**_with(_with(_shrunk(cls()), _SPECIAL.get(name, {})), changes))


def auto_class(name: str) -> Any:
    """transformers' auto class for one of `NAMES` or `VISION`."""
    return AutoModelForImageTextToText if name in VISION else AutoModelForCausalLM


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A small random model of a model type, or of a class of `VISION`, every tensor of another scale."""
    return tiny.build(config(VISION.get(name, name), **changes), auto=auto_class(name))


def tuned(base: PreTrainedModel, seed: int = 1, scale: float = 0.02) -> PreTrainedModel:
    """A fine-tune of `base`: the same weights plus noise."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for own, other in zip(model.state_dict().values(), base.state_dict().values(), strict=True):
            own.copy_(other + scale * torch.randn_like(other) if other.is_floating_point() else other)
    return model
