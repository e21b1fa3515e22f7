"""Build transformers' model, and find the language model in it: the whole of a text-only model, or a part."""

import copy
from collections.abc import Iterator
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

_KINDS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}


def auto_class(config: PretrainedConfig, trust_remote_code: bool) -> Any:
    """Choose transformers' auto class for the model that a config names; None where it is no language model."""
    name = next(iter(config.architectures or ()), None)
    for kind, table in _KINDS.items():
        if name in getattr(modeling_auto, table, {}).values():
            return getattr(transformers, kind)
    own = getattr(config, "auto_map", None) or {}
    return next((getattr(transformers, kind) for kind in _KINDS if kind in own), None) if trust_remote_code else None


def is_tied(config: PretrainedConfig) -> bool:
    """Tell whether a config ties the output head to the input embeddings. The configs of its parts don't count."""
    return bool(getattr(config, "tie_word_embeddings", False))


def without_weights(config: PretrainedConfig, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """Build transformers' model; the caller chooses the device of its random weights."""
    cls = auto_class(config, trust_remote_code)
    model: PreTrainedModel = cls.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code, **options)
    return model


def decoder(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Find the module that holds the language model's decoder layers, with its name in the model.

    Where several modules may be it, take the one around them.
    """
    start: Any = model.get_decoder()
    text = model.config.get_text_config()
    stacks = list(_stacks(start, type(text), getattr(text, "num_hidden_layers", None)))
    stack = stacks[0] if len(stacks) == 1 else start
    return next(name for name, module in model.named_modules() if module is stack), stack


def _stacks(module: nn.Module, kind: type, count: int | None) -> Iterator[nn.Module]:
    """Yield the modules with a list of `count` layers, but not those of towers, whose config is of another kind."""
    if any(len(child) == count for child in module.children() if isinstance(child, nn.ModuleList)):
        yield module
        return
    for child in module.children():
        own = getattr(child, "config", None)
        if isinstance(own, kind) or not isinstance(own, PretrainedConfig):
            yield from _stacks(child, kind, count)


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """Choose what runs on tokens alone: the model, or the language model in it if that has its own output head."""
    inner = model.get_decoder() if _is_composite(model) else model
    has_head = isinstance(inner, PreTrainedModel) and inner.get_output_embeddings() is not None
    return inner if has_head else model


def outside(model: PreTrainedModel) -> frozenset[str]:
    """Name what isn't the language model's, as in the state dict: vision and audio towers, and projectors."""
    if not _is_composite(model):
        return frozenset()
    parts = (decoder(model)[1], model.get_input_embeddings(), model.get_output_embeddings())
    own = {id(t) for part in parts if part is not None for t in part.state_dict(keep_vars=True).values()}
    return frozenset(name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in own)


def _is_composite(model: PreTrainedModel) -> bool:
    """Tell whether the language model is a part of the model."""
    return model.config.get_text_config() is not model.config
