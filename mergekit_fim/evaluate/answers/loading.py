"""A checkpoint -> a model that writes by transformers, and what is to be known of its cache."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from mergekit.options import MergeOptions
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from mergekit_fim.errors import FimError, check_own_code, is_out_of_memory, reason
from mergekit_fim.evaluate.answers.tokens import Reader, stop_tokens
from mergekit_fim.fisher.loading import placement
from mergekit_fim.models.checkpoint import explained
from mergekit_fim.models.language import auto_class


@dataclass(frozen=True, eq=False)
class LanguageModel(Reader):
    """A loaded model."""

    model: PreTrainedModel  # in evaluation mode, with a generation config that sets nothing
    joins: bool  # whether its cache is keys and values by token alone, so that rows can leave and join a batch
    pads: bool  # whether it passes over padding; else only rows of one length can be in a batch
    row_bytes: float  # what its cache takes for a row of any length
    token_bytes: float  # and for each token of it


def load_model(
    name: str,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    options: MergeOptions,
    dtype: torch.dtype | None,
    revision: str | None = None,
) -> LanguageModel:
    """Load a model for generation, from its folder or the Hub, onto the devices that the merge's options name.

    It runs in `dtype`, or in the checkpoint's own. Messages call it by `name`.

    Raises:
        FimError: it can't be loaded, lacks weights, or there is no such device.
    """
    where = placement(options)
    trust, places = options.trust_remote_code, {"": where.device}
    source = {"revision": revision, "cache_dir": options.transformers_cache, "trust_remote_code": trust}
    devices = {} if where.device.type == "cpu" else {"device_map": "auto" if where.spread else places}
    bars = transformers.utils.logging
    shows_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(path, **source)
        kind: Any = auto_class(config, trust) or transformers.AutoModelForCausalLM
        model, info = kind.from_pretrained(path, dtype=dtype or "auto", output_loading_info=True, **source, **devices)
    except Exception as error:  # transformers, huggingface_hub, safetensors and torch have their own
        check_own_code(error)
        wanted = "memory for its weights" if is_out_of_memory(error) else "a causal language model that can be loaded"
        raise FimError(f"{name}: expected {wanted}, found none ({reason(error)})") from error
    finally:
        if shows_bars:
            bars.enable_progress_bar()
    if missing := info["missing_keys"]:
        raise FimError(
            f"{name}: the checkpoint lacks {len(missing)} of the model's tensors, such as {min(missing)}, which would "
            "be random; download or save the model again"
        )
    model.eval()
    text_config = model.config.get_text_config()
    stop = stop_tokens((model.generation_config, model.config, text_config), tokenizer)
    # What it sets, such as a repetition penalty, would go into every `generate` that doesn't say otherwise.
    model.generation_config = GenerationConfig()
    context = getattr(text_config, "max_position_embeddings", None)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    with explained(f"{name}: transformers can't generate with this model", "leave it out, or pass --engine vllm"):
        return LanguageModel(name, tokenizer, stop, context, vocabulary, model, *_probe(model, vocabulary, context))


def _probe(model: PreTrainedModel, vocabulary: int, context: int | None) -> tuple[bool, bool, float, float]:
    """Find the last four attributes of `LanguageModel` by trying: the model alone knows what its cache is.

    A row of n tokens is continued alone, and beside one of 2n, so that it is padded.
    """
    n = max(1, min(8, (context or 16) // 2))
    ids = torch.stack([torch.arange(2 * n) % vocabulary] * 2).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, :n] = 0
    generate: Any = model.generate
    config = greedy(1, output_logits=True)
    alone, both = (
        generate(ids[rows, begin:], attention_mask=mask[rows, begin:], generation_config=config)
        for rows, begin in ((slice(1, 2), n), (slice(2), 0))
    )
    expected, found = alone.logits[0][0].float(), both.logits[0][1].float()
    # 16 bits round otherwise in a batch; a model that reads its padding is off by as much as its logits differ.
    tolerance = 0.05 if model.dtype.itemsize >= 4 else 0.25
    pads = bool((expected - found).abs().max() <= tolerance * expected.std(correction=0))
    layers = getattr(both.past_key_values, "layers", ())
    joins = pads and isinstance(both.past_key_values, DynamicCache) and all(type(x) is DynamicLayer for x in layers)
    one, two = _nbytes(alone.past_key_values), _nbytes(both.past_key_values) / 2
    if not one:  # a cache of a kind of its own: what full attention would take, at most
        shape: Any = model.config.get_text_config()
        return joins, pads, 0.0, 2.0 * shape.num_hidden_layers * shape.hidden_size * model.dtype.itemsize
    token = max(0.0, (two - one) / n)
    return joins, pads, max(0.0, one - n * token), token


def _nbytes(cache: Any) -> int:
    """Count the bytes of the tensors in a cache."""
    values: list[Any] = [value for layer in getattr(cache, "layers", ()) for value in vars(layer).values()]
    values += [part for value in values if isinstance(value, dict) for part in value.values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def greedy(steps: int, **changes: Any) -> GenerationConfig:
    """Have `generate` write so many tokens, each the likeliest."""
    return GenerationConfig(
        max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, disable_compile=True, **changes
    )
