"""Where the language model is in a model that sees or hears, too; of a text-only model it is everything."""

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
    """transformers' auto class for the model that a config names, or None where it is no language model."""
    name = next(iter(config.architectures or ()), None)
    for kind, table in _KINDS.items():
        if name in getattr(modeling_auto, table, {}).values():
            return getattr(transformers, kind)
    own = getattr(config, "auto_map", None) or {}
    return next((getattr(transformers, k) for k in _KINDS if k in own), None) if trust_remote_code else None


def is_tied(config: PretrainedConfig) -> bool:
    """Whether a config ties the output head to the input embeddings: where it has parts, they don't count."""
    return bool(getattr(config, "tie_word_embeddings", False))


def without_weights(config: PretrainedConfig, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """transformers' model; on which device its weights are made is the caller's to say."""
    cls = auto_class(config, trust_remote_code)
    model: PreTrainedModel = cls.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code, **options)
    return model


def decoder(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The module that holds the language model's decoder layers, and its name in the model.

    Where several may be it, that is the one around them.
    """
    start: Any = model.get_decoder()
    text = model.config.get_text_config()
    stacks = [*_stacks(start, type(text), getattr(text, "num_hidden_layers", None))]
    found = stacks[0] if len(stacks) == 1 else start
    return next(name for name, module in model.named_modules() if module is found), found


def _stacks(module: nn.Module, kind: type, count: int | None) -> Iterator[nn.Module]:
    """The modules with a list of as many layers, without those of parts with a config of another kind: of towers."""
    if any(len(child) == count for child in module.children() if isinstance(child, nn.ModuleList)):
        yield module
        return
    for child in module.children():
        own = getattr(child, "config", None)
        if isinstance(own, kind) or not isinstance(own, PretrainedConfig):
            yield from _stacks(child, kind, count)


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """What is to be run on tokens alone: the model, or within it a language model with an output head of its own."""
    inner = model.get_decoder() if is_composite(model) else model
    has_head = isinstance(inner, PreTrainedModel) and inner.get_output_embeddings() is not None
    return inner if has_head else model


def is_composite(model: PreTrainedModel) -> bool:
    """Whether the language model is a part of the model."""
    return model.config.get_text_config() is not model.config


def outside(model: PreTrainedModel) -> frozenset[str]:
    """The names, in the state dict, of what isn't the language model's: of vision and audio towers and projectors."""
    if not is_composite(model):
        return frozenset()
    parts = (decoder(model)[1], model.get_input_embeddings(), model.get_output_embeddings())
    own = {id(t) for part in parts if part is not None for t in part.state_dict(keep_vars=True).values()}
    return frozenset(name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in own)
