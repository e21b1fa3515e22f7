"""Open the models that go into a merge, and check all that can be checked without reading their weights."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import accelerate
import torch
import transformers
from mergekit.architecture import ModelArchitecture, WeightInfo, get_architecture_info
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import InputModelDefinition, MergeConfiguration
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from mergekit_fim.config.settings import check_modules
from mergekit_fim.errors import FimError
from mergekit_fim.models.checkpoint import TensorHeader, explained, model_config, read_headers
from mergekit_fim.models.completion import changed, changes_for, check_same, is_convertible
from mergekit_fim.models.language import auto_class, outside, without_weights
from mergekit_fim.models.layout import ModelLayout, OpenedModel, model_layout, names_of, stack_of, tensor_names
from mergekit_fim.models.names import Loading

# Config keys that say what the weights mean. Models that differ in one can't be merged, and the shapes of the tensors
# alone don't show it: 8 heads of 64, for instance, are as large as 16 of 32.
_STRUCTURE = [
    *("model_type", "architectures", "num_hidden_layers", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
    *("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok"),
]

# Buffers that old checkpoints hold, and the models of today make themselves.
_OLD_BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")


@dataclass(frozen=True, eq=False)
class InputModel(OpenedModel):
    """One model of the merge, laid out. Its tensors are named as in the layout or as in the checkpoint."""

    layout: ModelLayout  # its tensors, by decoder layer
    # Those of the layout that the merge doesn't have of this model. mergekit can't load them, not even by converting
    # other tensors (fused experts), or skips them, because no model of the merge holds them under their own name.
    absent: frozenset[str]
    unknown: tuple[str, ...]  # those of the checkpoint that neither mergekit nor transformers has a place for
    architecture: ModelArchitecture  # mergekit's definition of the models, with what it leaves out
    added: tuple[str, ...]  # those of the checkpoint that mergekit's own definition leaves out
    other_modules: frozenset[str]  # those of the layout that aren't the language model's: of towers and projectors

    @property
    def text_config(self) -> PretrainedConfig:
        """The config of the language model, which for text-only models is the whole config."""
        return self.config.get_text_config()

    def num_layers(self, module: str) -> int:
        """Count the layers of one of mergekit's modules."""
        return int(self.architecture.modules[module].architecture.num_layers(self.config))

    def stored_dtype(self) -> torch.dtype:
        """Find the dtype of most of the checkpoint's parameters."""
        elements: Counter[torch.dtype] = Counter()
        for header in self.headers.values():
            if header.torch_dtype is not None:
                elements[header.torch_dtype] += math.prod(header.shape)
        return max(elements, key=elements.__getitem__, default=torch.float32)

    def load(self, tensor: WeightInfo, dtype: str | None) -> torch.Tensor | None:
        """Read a tensor exactly as the merge will, by mergekit's own task, or None where it is optional and absent."""
        if tensor.name in self.absent:
            return None
        return LoadTensor(
            model=self.reference,
            tensor=tensor.name,
            dtype=tensor.force_dtype or dtype,
            optional=tensor.optional,
            aliases=tensor.aliases,
            tied_names=tensor.tied_names,
        ).execute()

    def load_key(self, key: str, dtype: str | None) -> torch.Tensor | None:
        """Read a tensor by its name in transformers' model, made of the checkpoint's as transformers' loader does."""
        loader = LoaderCache().get(self.reference)
        made = self.loading.read(key, loader.get_tensor)
        return made if made is None or dtype is None else made.to(dtype_from_name(dtype))


def open_models(
    references: Sequence[ModelReference], architecture: ModelArchitecture, trust_remote_code: bool
) -> dict[ModelReference, InputModel]:
    """Read the configs and the checkpoints' headers of all models, the base first, and check that they are of one kind.

    mergekit's `LoaderCache` must have been set up with the merge's options, as `run_merge` does.

    Raises:
        FimError: a model is not a causal language model in floats, or differs from the first in its structure.
    """
    configs = {reference: model_config(reference, trust_remote_code) for reference in references}
    for reference, config in configs.items():
        _check_causal_lm(reference, config, trust_remote_code)
    _check_structure(configs)
    opened = [_opened(reference, config, trust_remote_code) for reference, config in configs.items()]
    stored = {name for model in opened for name in model.headers}
    base = opened[0]
    stack = stack_of(base, architecture)
    changes = {model.reference: changes_for(model, architecture, stack, stored) for model in opened}
    check_same(changes)
    added = changes[base.reference].added
    architecture = changed(architecture, changes[base.reference], stack)
    return {model.reference: _laid_out(model, architecture, added, stack, stored) for model in opened}


def _opened(reference: ModelReference, config: PretrainedConfig, trust_remote_code: bool) -> OpenedModel:
    with explained(f"{reference}: transformers can't build the model from its config", "check its config.json"):
        with accelerate.init_empty_weights(include_buffers=True):
            skeleton = without_weights(config, trust_remote_code)
        skeleton.tie_weights()
    headers = read_headers(reference)
    return OpenedModel(reference, config, skeleton, headers, Loading(skeleton, headers))


def _laid_out(
    model: OpenedModel, architecture: ModelArchitecture, added: tuple[str, ...], stack: str, stored: Set[str]
) -> InputModel:
    """Lay out a model by a definition that is complete, and check its checkpoint; see `changes_for` for `stored`."""
    layout, beside = model_layout(model, architecture, stack), outside(model.skeleton)
    laid_out = InputModel(
        **vars(model),
        layout=layout,
        absent=frozenset(_absent(model, layout, stored)),
        unknown=tuple(_unknown(model, layout)),
        architecture=architecture,
        added=added,
        other_modules=frozenset(t.name for t in layout.other if not beside.isdisjoint(model.loading.keys_of(t.name))),
    )
    _check_shapes(laid_out)
    return laid_out


def open_model(name: str, revision: str | None, options: MergeOptions) -> InputModel:
    """Open a single model, by the name that a merge config would give it."""
    return open_named([name], revision, options)[0]


def open_named(names: Sequence[str], revision: str | None, options: MergeOptions) -> list[InputModel]:
    """Open models of one kind by the names that a merge config would give them, the base first.

    Raises:
        FimError: there is no such model, or they don't share an architecture.
    """
    references = []
    for name in names:
        with explained(f"{name}: mergekit can't use this model", "check the name"):
            reference = ModelReference.parse(name)
            if revision:
                path = reference.model.model_copy(update={"revision": revision})
                reference = reference.model_copy(update={"model": path})
            references.append(reference)
    configs = {reference: model_config(reference, options.trust_remote_code) for reference in references}
    _check_structure(configs)
    with explained(f"{names[0]}: mergekit can't use this model", "check the name"):
        models = [InputModelDefinition(model=reference) for reference in references]
        config = MergeConfiguration(merge_method="linear", models=models)
        architecture = get_architecture_info(config, options)
    check_modules(config, architecture, configs[references[0]])
    opened = open_models(references, architecture, options.trust_remote_code)
    return [opened[reference] for reference in references]


def check_tokenizer(reference: ModelReference, trust_remote_code: bool) -> None:
    """Load a tokenizer that the config names.

    Raises:
        FimError: it can't be loaded.
    """
    what = f"{reference}: the config's tokenizer setting needs a tokenizer from it, which can't be loaded"
    with explained(what, "put one into its folder, name another model, or leave the setting out"):
        transformers.AutoTokenizer.from_pretrained(
            reference.model.path, revision=reference.model.revision, trust_remote_code=trust_remote_code
        )


def _absent(model: OpenedModel, layout: ModelLayout, stored: Set[str]) -> Iterator[str]:
    """Yield the layout's tensors that the merge doesn't have of a model, and refuse one that no merge can have."""
    # Without the masks that old checkpoints hold.
    parameters = tensor_names(model.skeleton, layout, model.loading, floating_point=True)
    names = {name for aliases in parameters for name in aliases}
    for layer, tensor in layout.placed():
        held = model.stored_name(tensor)
        if held is not None:
            header = model.headers[held]
            if header.torch_dtype is None and not names.isdisjoint((tensor.name, *model.loading.targets(held))):
                raise FimError(
                    f"{model}: tensor {held} is stored as {header.dtype}, expected float16, bfloat16, float32 or "
                    "float64; use the model's unquantised checkpoint"
                )
        elif tensor.optional and stored.isdisjoint(names_of(tensor)):
            yield tensor.name
        elif not is_convertible(model, tensor, layer):
            if not tensor.optional:
                raise FimError(
                    f"{model}: the checkpoint lacks the tensor {tensor.name}, which mergekit's definition of "
                    f"{type(model.skeleton).__name__} requires; {_remedy(tensor, model.headers, parameters)}"
                )
            yield tensor.name


def _remedy(tensor: WeightInfo, headers: Mapping[str, TensorHeader], parameters: Sequence[Sequence[str]]) -> str:
    """Say what to do where a checkpoint lacks a tensor that mergekit requires."""
    names = next((names for names in parameters if tensor.name in names), None)
    if names is None:
        return "models with this config don't have it, so that this version of mergekit can't merge them"
    held = next((name for name in names if name in headers), None)
    if held is not None:
        return f"it is tied to {held} there; save the models with a copy of it and tie_word_embeddings: false"
    return "download or save the model again, or leave the model out"


def _unknown(model: OpenedModel, layout: ModelLayout) -> Iterator[str]:
    """Yield the checkpoint's names of no tensor of the model, but not those that transformers ignores on purpose."""
    known = {name for names in tensor_names(model.skeleton, layout, model.loading) for name in names}
    known.update(name for tensor in layout.all_tensors() for name in names_of(tensor, tied=True))
    kinds = (model.skeleton.config.model_type, type(model.skeleton).__name__)
    conversions = [conversion for kind in kinds for conversion in get_checkpoint_conversion_mapping(kind) or []]
    ignored = [re.compile(pattern) for pattern in model.skeleton._keys_to_ignore_on_load_unexpected or ()]
    for name in model.headers:
        if (
            name not in known
            and not model.loading.targets(name)
            and not name.endswith(_OLD_BUFFERS)
            and not any(pattern.search(name) for pattern in ignored)
            and all(conversion.rename_source_key(name)[1] is None for conversion in conversions)
        ):
            yield name


def _check_shapes(model: InputModel) -> None:
    """Check that the shapes of a checkpoint's tensors are those that its config means, as transformers loads them."""
    shapes = {name: tuple(value.shape) for name, value in model.skeleton.state_dict().items()}
    for tensor in model.layout.all_tensors():
        stored = model.stored_name(tensor, tied=False)
        expected = next((shapes[name] for name in names_of(tensor) if name in shapes), None)
        if stored is not None and expected is not None and model.headers[stored].shape != expected:
            raise FimError(
                f"{model}: expected the shape {list(expected)} of {stored}, which follows from config.json, found "
                f"{list(model.headers[stored].shape)}; download or save the model again"
            )


def _check_structure(configs: Mapping[ModelReference, PretrainedConfig]) -> None:
    """Check that models differ from the first in nothing that says what the weights mean."""
    base = next(iter(configs))
    for reference, config in configs.items():
        for key in _STRUCTURE:
            expected, own = _structure(configs[base], key), _structure(config, key)
            if expected != own:
                raise FimError(
                    f"{reference}: expected {key} {expected} as in the base {base}, found {own}; "
                    "the models must share one architecture"
                )


def _structure(config: PretrainedConfig, key: str) -> Any:
    text = config if key in ("model_type", "architectures") else config.get_text_config()
    value, heads = _value(text, key), _value(text, "num_attention_heads")
    if key == "head_dim" and value is None and heads:
        return text.hidden_size // heads
    return heads if key == "num_key_value_heads" and value is None else value


def _value(config: PretrainedConfig, key: str) -> Any:
    """Read a key of a config: where layers differ in it, of every layer."""
    try:
        return getattr(config, key, None)
    except Exception:  # transformers has a class of its own for that
        layers: Any = config.per_layer_config
        return tuple(getattr(layer, key, None) for layer in (layers.values() if isinstance(layers, dict) else layers))


def _check_causal_lm(reference: ModelReference, config: PretrainedConfig, trust_remote_code: bool) -> None:
    name = next(iter(config.architectures or ()), None)
    if config.is_encoder_decoder:
        raise FimError(f"{reference}: expected a causal language model, found the encoder-decoder {name}")
    if auto_class(config, trust_remote_code) is None:
        raise FimError(
            f"{reference}: expected a causal language model that transformers can load, found {name}; "
            "for a model with code of its own, pass --trust-remote-code"
        )
    vocab_size = getattr(config.get_text_config(), "vocab_size", 1)
    if vocab_size < 1:
        raise FimError(f"{reference}: expected a vocab_size of at least 1, found {vocab_size}; check its config.json")
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is not None:
        kind = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise FimError(
            f"{reference}: the checkpoint is quantised ({kind or 'unknown method'}), expected floating-point weights; "
            "use the model's unquantised checkpoint"
        )


def check_compatible(base: InputModel, model: InputModel, *, vocabulary_aligned: bool) -> list[str]:
    """Check that a fine-tuned model has the tensors of `base`, in the same shapes.

    With `vocabulary_aligned`, mergekit was told how to align different vocabularies.

    Returns:
        Warnings: tensors that only the base has.

    Raises:
        FimError: the two can't be merged.
    """
    warnings = []
    axes = {tensor.name: tensor.vocabulary_axis for tensor in base.layout.other}
    for tensor in model.layout.all_tensors():
        in_base, in_model = tensor.name not in base.absent, tensor.name not in model.absent
        if in_model and not in_base:
            raise FimError(f"{model}: the base {base} has no tensor {tensor.name}; the models must share their tensors")
        if in_base and not in_model:
            warnings.append(f"{model} has no tensor {tensor.name}: the base's is kept")
        names = base.stored_name(tensor), model.stored_name(tensor)
        if names[0] is None or names[1] is None:
            continue
        expected, own = base.headers[names[0]].shape, model.headers[names[1]].shape
        differ = {axis for axis, (a, b) in enumerate(zip_longest(expected, own)) if a != b}
        by_vocabulary = len(expected) == len(own) and differ == {axes.get(tensor.name)}
        if not differ or (by_vocabulary and vocabulary_aligned):
            continue
        remedy = "the models must share one architecture"
        if by_vocabulary:
            remedy = "align the vocabularies in the config, for example with `tokenizer: {source: base}`"
        raise FimError(
            f"{model}: expected the shape {list(expected)} of {tensor.name} as in the base {base}, "
            f"found {list(own)}; {remedy}"
        )
    return warnings
