"""The architectures of the tests: a tiny random model of each."""

from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

LAYERS = 2
HYBRID = {"layer_types": ["conv", "full_attention"]}


@dataclass(frozen=True)
class Kind:
    """A variant of an architecture.

    `gate`: which of its tensors are MLP gate projections. `fused`: those that have one as their first half, and the
    axis of it. `masks`: its checkpoints hold causal masks.
    """

    kind: str
    changes: dict
    gate: str | None = r"\.gate_proj\."
    fused: tuple[str, int] | None = None
    masks: bool = False


PLAIN, DENSE, EXPERTS = None, (r"\.gate_up_proj\.weight", 0), (r"\.experts\.gate_up_proj", 1)
UNTIED = {"tie_word_embeddings": False}
KINDS = {
    "Llama": Kind("llama", {}),
    "Mistral": Kind("mistral", {}),
    "Qwen2": Kind("qwen2", {}),
    "Qwen2, tied": Kind("qwen2", {"tie_word_embeddings": True}),
    "Qwen3": Kind("qwen3", {}),
    "Gemma": Kind("gemma", {}),
    "Gemma2": Kind("gemma2", {}),
    "Gemma3 (text)": Kind("gemma3", {}),
    "Phi3": Kind("phi3", {}, PLAIN, DENSE),
    "Phi3, tied": Kind("phi3", {"tie_word_embeddings": True}, PLAIN, DENSE),
    "Phi": Kind("phi", {}, PLAIN),
    "OLMo2": Kind("olmo2", {}),
    "StableLM2": Kind("stablelm", {}),
    "StableLM2 with qk-norm": Kind("stablelm", {"qk_layernorm": True}),
    "Starcoder2": Kind("starcoder2", {}, PLAIN),
    "Cohere with qk-norm": Kind("cohere", {"use_qk_norm": True}),
    "Cohere without qk-norm": Kind("cohere", {}),
    "Cohere2": Kind("cohere2", {}),
    "Granite": Kind("granite", {}),
    "GPT-2": Kind("gpt2", {"n_layer": LAYERS}, PLAIN),
    "GPT-NeoX, old checkpoint": Kind("gpt_neox", {}, PLAIN, masks=True),
    "GPT-NeoX, new checkpoint": Kind("gpt_neox", {}, PLAIN),
    "Falcon, old decoder": Kind("falcon", {}, PLAIN),
    "Falcon, new decoder": Kind("falcon", {"new_decoder_architecture": True}, PLAIN),
    "Falcon, new decoder, untied": Kind("falcon", UNTIED | {"new_decoder_architecture": True}, PLAIN),
    "Mixtral": Kind("mixtral", {}, PLAIN, EXPERTS),
    "Qwen3-MoE": Kind("qwen3_moe", {}, PLAIN, EXPERTS),
    "GPT-OSS": Kind("gpt_oss", {}, PLAIN),
    "GLM": Kind("glm", {}, PLAIN, DENSE),
    "GLM4": Kind("glm4", {}, PLAIN, DENSE),
    "LFM2": Kind("lfm2", HYBRID, r"\.feed_forward\.w1\."),
    "Mamba": Kind("mamba", {}, PLAIN),
    "SmolLM3": Kind("smollm3", {}),
}


def configure(kind: str, changes: dict) -> transformers.PretrainedConfig:
    layers = {} if kind == "gpt2" else {"num_hidden_layers": LAYERS}
    return tiny.config(kind, **layers | changes)


# What GPT-NeoX's checkpoints held once, such as Pythia's, and mergekit's definition of it still requires.
MASKS = (".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq")


def add_masks(path: Path) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    for layer in range(LAYERS):
        values = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril(), torch.tensor(-1e9), torch.tensor([1.0])
        tensors |= {f"gpt_neox.layers.{layer}{n}": v for n, v in zip(MASKS, values, strict=True)}
    save_file(tensors, file, metadata={"format": "pt"})


# Language models by `zoo` in every run: how many tensors mergekit's definition leaves out, or makes otherwise.
ADDED = {
    "afmoe": 0,
    "bamba": 0,
    "deepseek_v2": 12,
    "deepseek_v3": 12,
    "deepseek_v32": 12,
    "dots1": 12,
    "ernie4_5": 0,
    "ernie4_5_moe": 13,
    "exaone4": 0,
    "falcon_h1": 0,
    "gemma4_text": 0,
    "glm4_moe": 0,
    "glm4_moe_lite": 12,
    "gpt_oss": 0,
    "granitemoehybrid": 0,
    "hunyuan_v1_dense": 0,
    "hunyuan_v1_moe": 0,
    "jamba": 12,
    "kimi_linear": 27,
    "lfm2_moe": 12,
    "mimo_v2_flash": 13,
    "minimax_m2": 0,
    "ministral3": 0,
    "nemotron_h": 26,
    "olmo3": 0,
    "olmo_hybrid": 4,
    "qwen3_5_text": 0,
    "qwen3_5_moe_text": 0,
    "qwen3_next": 0,
    "seed_oss": 0,
    "solar_open": 0,
    # Run otherwise: biases that are tied, an input that is changed, positions first, tensors handed on in another form.
    "bert": 0,
    "ctrl": 0,
    "xlnet": 0,
    "xlstm": 0,
}
