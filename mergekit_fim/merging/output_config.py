"""Make the merged model's config say what was merged; mergekit itself writes the base's config unchanged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.io.tasks import LoaderCache
from transformers import PretrainedConfig

from mergekit_fim.models.checkpoint import IMMATERIAL
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.models.language import is_tied

# Lists with one entry per decoder layer, in the configs of transformers 5.
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


@dataclass(frozen=True)
class ConfigDifference:
    """A config key in which the inputs differ."""

    key: str
    values: tuple[tuple[str, Any], ...]  # (model, its value), the base first
    written: Any  # in the merged model's config


def adapt_output_config(
    output: PretrainedConfig, inputs: Sequence[InputModel], base_layers: Sequence[int], *, truncated: bool
) -> list[ConfigDifference]:
    """Correct the config that the merged model will be saved with, in place.

    - `tie_word_embeddings` becomes false where the merge writes an output head of its own: where any input has one that
      isn't its embedding. (A tied base beside an untied fine-tuned model: its embedding is merged as its head.)
    - `max_position_embeddings` becomes the longest of the inputs', provided that all of them use the same rotary
      position parameters; otherwise the base's stays, as its rotary parameters do.
    - `num_hidden_layers` and the lists with one entry per decoder layer (`layer_types` and others) follow
      `base_layers`, the base's layers that slices keep, drop or repeat, in the output's order.
    - `vocab_size` becomes the number of rows that `--unsafe-truncate-embeddings` leaves, where embeddings are
      `truncated`.

    Returns:
        The keys in which the inputs, the base first, differ.
    """
    base, text = inputs[0], output.get_text_config()
    if any(_has_own_head(model) for model in inputs):
        output.tie_word_embeddings = text.tie_word_embeddings = False
    lengths: list[Any] = [getattr(model.text_config, "max_position_embeddings", None) for model in inputs]
    rotary = [getattr(model.text_config, "rope_parameters", None) for model in inputs]
    if None not in lengths and rotary[0] and all(parameters == rotary[0] for parameters in rotary):
        text.max_position_embeddings = max(lengths)
    if list(base_layers) != list(range(len(base.layout.layers))):
        for key in _PER_LAYER:
            values = getattr(base.text_config, key, None)
            if values and len(values) == len(base.layout.layers):
                setattr(text, key, [values[layer] for layer in base_layers])
        text.num_hidden_layers = len(base_layers)
    if truncated:
        text.vocab_size = min(_vocabulary_rows(model) for model in inputs)

    configs, written = [_flat(model.config) for model in inputs], _flat(output)
    differences = []
    for key in sorted(set().union(*configs)):
        values = [config.get(key) for config in configs]
        if key.rpartition(".")[2] not in IMMATERIAL and any(value != values[0] for value in values):
            named = tuple((str(model), value) for model, value in zip(inputs, values, strict=True))
            differences.append(ConfigDifference(key, named, written.get(key)))
    return differences


def _vocabulary_rows(model: InputModel) -> int:
    """The length of the vocabulary axis in the checkpoint, which may be padded beyond the config's `vocab_size`."""
    rows = [
        model.headers[name].shape[tensor.vocabulary_axis]
        for tensor in model.layout.other
        if tensor.vocabulary_axis is not None and (name := model.stored_name(tensor)) is not None
    ]
    return min(rows, default=model.text_config.vocab_size)


def _has_own_head(model: InputModel) -> bool:
    """Whether the checkpoint has an output head that is not, in effect, its input embedding."""
    for tensor in model.layout.other:
        own = model.stored_name(tensor, tied=False)
        if not tensor.tied_names or own is None:
            continue
        if not is_tied(model.config):
            return True
        # Declared tied, and stored all the same: a copy, or a head that was trained on its own.
        embedding = next((name for name in tensor.tied_names if name in model.headers), None)
        loader = LoaderCache().get(model.reference)
        if embedding and not torch.equal(loader.get_tensor(own), loader.get_tensor(embedding)):
            return True
    return False


def _flat(config: PretrainedConfig) -> dict[str, Any]:
    """All keys of a config, those of its parts after the part's name: `text_config.rope_parameters`."""
    flat = config.to_dict()
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig) and flat.pop(name, None) is not None:
            flat |= {f"{name}.{key}": value for key, value in _flat(part).items()}
    return flat
