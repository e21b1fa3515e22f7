"""Tiny random models, made on the spot."""

from pathlib import Path

import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

VOCAB = 97
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Ids outside the tiny vocabulary would make transformers warn.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_KINDS = {
    "cohere": ("CohereConfig", {}),
    "cohere2": ("Cohere2Config", {"sliding_window": 6}),
    "falcon": ("FalconConfig", {"num_kv_heads": 2}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}),
    "glm": ("GlmConfig", {"head_dim": 8}),
    "glm4": ("Glm4Config", {"head_dim": 8}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt_oss": ("GptOssConfig", _EXPERTS | {"head_dim": 8, "sliding_window": 6}),
    "granite": ("GraniteConfig", {}),
    "lfm2": ("Lfm2Config", {"block_auto_adjust_ff_dim": False}),
    "llama": ("LlamaConfig", {}),
    "mamba": ("MambaConfig", {"state_size": 4, "time_step_rank": 2}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "mixtral": ("MixtralConfig", _EXPERTS),
    "olmo2": ("Olmo2Config", {}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "phi3": ("Phi3Config", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "smollm3": ("SmolLM3Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {}),
}


# As many as `VOCAB`; both special, as some reasoning models have their tags.
CHARACTERS = [chr(code) for code in range(32, 127)] + ["<think>", "<end>"]


def tokenizer(**options) -> PreTrainedTokenizerBase:
    """One of single characters."""
    words = {character: i for i, character in enumerate(CHARACTERS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    options = {"eos_token": "<end>", "additional_special_tokens": ["<think>"]} | options
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **options)


def config(kind: str = "llama", **changes) -> PretrainedConfig:
    """A small config of an architecture, by its transformers model type."""
    if kind == "gpt2":
        shape = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 128}
        shape |= {"bos_token_id": None, "eos_token_id": None}
        return transformers.GPT2Config(**shape | changes)
    cls, extra = _KINDS[kind]
    return getattr(transformers, cls)(**_SHAPE | extra | changes)


def build(cfg: PretrainedConfig, seed: int = 0, *, spread: bool = True, auto=AutoModelForCausalLM) -> PreTrainedModel:
    """A random model. With `spread`, every tensor is of another scale, so that no layer looks like the next."""
    torch.manual_seed(seed)
    model = auto.from_config(cfg).eval()
    if spread:
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                parameter.add_(0.05 * torch.randn_like(parameter)).mul_(1 + 0.3 * (i % 7))
    return model


def tuned(base: PreTrainedModel, seed: int, *, cfg: PretrainedConfig | None = None, scale: float = 0.02):
    """A fine-tune of `base`: the same weights plus noise. With `cfg`, under another config of the same shape."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(cfg or base.config).eval()
    source = base.state_dict()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(source[name] + scale * torch.randn_like(source[name]) * (1 + len(name) % 5))
    return model


def save(model: PreTrainedModel, path: Path, dtype: torch.dtype | None = None, **options) -> Path:
    (model.to(dtype) if dtype else model).save_pretrained(path, **options)
    return path


def adapter(base: Path, path: Path, seed: int = 0) -> Path:
    """A LoRA adapter of a saved model, with random weights."""
    import peft

    torch.manual_seed(seed)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(path)
    return path
