"""The models that go into a merge, and everything about them that can be checked without reading their weights."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import accelerate
import torch
import transformers
from mergekit.architecture import ModelArchitecture, WeightInfo, get_architecture_info
from mergekit.architecture.auto import infer_vocabulary_axes
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import InputModelDefinition, MergeConfiguration
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from mergekit_fim.errors import FimError, check_own_code, reason
from mergekit_fim.models.checkpoint import TensorHeader, model_config, read_headers
from mergekit_fim.models.completion import Changes, changed, check_same, left_out, unneeded
from mergekit_fim.models.language import auto_class, is_tied, outside, without_weights
from mergekit_fim.models.layout import DecoderLayer, ModelLayout, model_layout, stack_of, tensor_names
from mergekit_fim.models.names import Loading

# Config keys that say what the weights mean, so that models which differ in one can't be merged: the shapes of the
# tensors alone don't show, for instance, 8 heads of 64 against 16 of 32.
_STRUCTURE = [
    *("model_type", "architectures", "num_hidden_layers", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
    *("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok"),
]


@dataclass(frozen=True, eq=False)
class InputModel:
    """One model of the merge. Compared and hashed by identity.

    Attributes:
        reference: mergekit's reference, as in the merge config.
        config: the model's transformers config.
        layout: its tensors, by decoder layer.
        headers: the tensors that its checkpoint holds, by their names there.
        absent: the names of the layout's tensors that the merge doesn't have of this model: that mergekit can't load
            from the checkpoint, not even by converting others (fused experts), or that it skips, because no model of
            the merge holds them under their own name.
        unknown: the names of the checkpoint's tensors that neither mergekit nor transformers has a place for.
        loading: where transformers puts the checkpoint's tensors.
        architecture: mergekit's description of the models, with what it leaves out.
        added: the names of those tensors of the checkpoint that mergekit's own description leaves out.
        other_modules: the names of the layout's tensors that aren't the language model's: of towers and projectors.
    """

    reference: ModelReference
    config: PretrainedConfig
    layout: ModelLayout
    headers: Mapping[str, TensorHeader]
    absent: frozenset[str]
    unknown: tuple[str, ...]
    loading: Loading
    architecture: ModelArchitecture
    added: tuple[str, ...] = ()
    other_modules: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return str(self.reference)

    @property
    def text_config(self) -> PretrainedConfig:
        """The config of the language model, which for text-only models is the whole config."""
        return self.config.get_text_config()

    @property
    def is_tied(self) -> bool:
        """Whether its config ties the output head to the input embeddings."""
        return is_tied(self.config)

    def num_layers(self, module: str) -> int:
        """How many layers one of mergekit's modules has."""
        return int(self.architecture.modules[module].architecture.num_layers(self.config))

    def stored_name(self, tensor: WeightInfo, *, tied: bool = True) -> str | None:
        """The name under which the checkpoint holds `tensor`: its own, an alias, or (if `tied`) what it is tied to."""
        names = (tensor.name, *(tensor.aliases or ()), *((tensor.tied_names or ()) if tied else ()))
        return next((name for name in names if name in self.headers), None)

    def stored_dtype(self) -> torch.dtype:
        """The dtype of most of the checkpoint's parameters."""
        elements: dict[torch.dtype, int] = {}
        for header in self.headers.values():
            if header.torch_dtype is not None:
                elements[header.torch_dtype] = elements.get(header.torch_dtype, 0) + math.prod(header.shape)
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
    """Read the configs and the checkpoints' headers of all the models, and check that they are of one kind.

    mergekit's `LoaderCache` must have been set up with the merge's options, as `run_merge` does.

    Args:
        references: the models, the base first.
        architecture: mergekit's description of them.
        trust_remote_code: whether models may bring code of their own.

    Raises:
        FimError: a model is not a causal language model in floats, or differs from the first in its structure.
    """
    configs = {reference: model_config(reference, trust_remote_code) for reference in references}
    for reference, config in configs.items():
        _check_causal_lm(reference, config, trust_remote_code)
    base = references[0]
    _check_structure(configs)
    skeletons = {r: _skeleton(r, config, trust_remote_code) for r, config in configs.items()}
    headers = {reference: read_headers(reference) for reference in references}
    loading = {reference: Loading(skeletons[reference], headers[reference]) for reference in references}
    stored = {name for held in headers.values() for name in held}
    stack = stack_of(architecture, configs[base], str(base), skeletons[base], loading[base])
    found = {
        r: _changes(architecture, stack, r, config, headers[r], stored, loading[r], skeletons[r])
        for r, config in configs.items()
    }
    check_same(found)
    architecture, added = changed(architecture, found[base], stack), found[base].added
    models = {}
    for reference, config in configs.items():
        skeleton, layout = skeletons[reference], model_layout(architecture, config, str(reference), stack)
        model = InputModel(
            *(reference, config, layout, headers[reference], frozenset()),
            tuple(_unknown(headers[reference], layout, skeleton, loading[reference])),
            *(loading[reference], architecture, added, _other_modules(layout, skeleton, loading[reference])),
        )
        names = tensor_names(skeleton, layout, loading[reference], floating_point=True)
        models[reference] = replace(model, absent=frozenset(_absent(model, names, stored)))
        _check_shapes(models[reference], {n: tuple(v.shape) for n, v in skeleton.state_dict().items()})
    return models


def _changes(
    architecture: ModelArchitecture,
    stack: str,
    reference: ModelReference,
    config: PretrainedConfig,
    headers: Mapping[str, TensorHeader],
    stored: Set[str],
    loading: Loading,
    skeleton: PreTrainedModel,
) -> Changes:
    """What makes mergekit's definition fit a model of the merge, whose models hold `stored` together.

    Raises:
        FimError: the model has a tensor that has no place in it.
    """
    layout = model_layout(architecture, config, str(reference), stack)
    tensors = tensor_names(skeleton, layout, loading)
    lacking = [
        tensor.name
        for layer in (*layout.layers, None)
        for tensor in (layer.tensors if layer else layout.other)
        if not tensor.optional
        and stored.isdisjoint((tensor.name, *(tensor.aliases or ()), *(tensor.tied_names or ())))
        and (
            not _is_convertible(config.model_type, headers, tensor, layer)
            or any(loading.is_reordered(key) for key in loading.keys_of(tensor.name))
        )
    ]
    without = unneeded(layout, lacking, loading, tensors)
    layout = model_layout(changed(architecture, Changes(unneeded=without), stack), config, str(reference), stack)
    found = left_out(
        str(reference),
        layout,
        _planned(layout, headers, stored),
        loading,
        tensors,
        tensor_names(skeleton, layout, loading, floating_point=True),
        infer_vocabulary_axes(skeleton),
        (config.architectures or [config.model_type])[0],
    )
    return replace(found, unneeded=without)


def _planned(layout: ModelLayout, headers: Mapping[str, TensorHeader], stored: Set[str]) -> Iterator[str]:
    """The names of all tensors that mergekit will write, and their other names: not those that it skips."""
    for tensor in layout.all_tensors():
        names = (tensor.name, *(tensor.aliases or ()))
        tied = any(name in headers for name in tensor.tied_names or ())
        if not tensor.optional or tied or not stored.isdisjoint(names):
            yield from names


def open_model(name: str, revision: str | None, options: MergeOptions) -> InputModel:
    """Open a single model, by the name that a merge config would give it.

    Raises:
        FimError: there is no such model, or it can't be measured.
    """
    return open_named([name], revision, options)[0]


def open_named(names: Sequence[str], revision: str | None, options: MergeOptions) -> list[InputModel]:
    """Open models of one kind by the names that a merge config would give them, the base first.

    Raises:
        FimError: there is no such model, or they don't share an architecture.
    """
    references = []
    for name in names:
        with _usable(name):
            reference = ModelReference.parse(name)
            if revision:
                reference = reference.model_copy(
                    update={"model": reference.model.model_copy(update={"revision": revision})}
                )
            references.append(reference)
    _check_structure({reference: model_config(reference, options.trust_remote_code) for reference in references})
    with _usable(names[0]):
        models = [InputModelDefinition(model=reference) for reference in references]
        architecture = get_architecture_info(MergeConfiguration(merge_method="linear", models=models), options)
    opened = open_models(references, architecture, options.trust_remote_code)
    return [opened[reference] for reference in references]


@contextlib.contextmanager
def _usable(name: str) -> Iterator[None]:
    try:
        yield
    except FimError:
        raise
    except Exception as error:  # pydantic's, and mergekit's own
        check_own_code(error)
        raise FimError(f"{name}: mergekit can't use this model ({reason(error)}); check the name") from error


def check_tokenizer(reference: ModelReference, trust_remote_code: bool) -> None:
    """Load a tokenizer that the config names.

    Raises:
        FimError: it can't be loaded.
    """
    try:
        transformers.AutoTokenizer.from_pretrained(
            reference.model.path, revision=reference.model.revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # each kind of tokenizer has its own
        raise FimError(
            f"{reference}: the config's tokenizer setting needs a tokenizer from it, which can't be loaded "
            f"({reason(error)}); put one into its folder, name another model, or leave the setting out"
        ) from error


def _skeleton(reference: ModelReference, config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """transformers' model, without weights."""
    try:
        with accelerate.init_empty_weights(include_buffers=True):
            skeleton = without_weights(config, trust_remote_code)
        skeleton.tie_weights()
        return skeleton
    except Exception as error:  # whatever a model's own code raises
        raise FimError(
            f"{reference}: transformers can't build the model from its config ({reason(error)}); check its config.json"
        ) from error


def _other_modules(layout: ModelLayout, skeleton: PreTrainedModel, loading: Loading) -> frozenset[str]:
    beside = outside(skeleton)
    return frozenset(t.name for t in layout.other if any(key in beside for key in loading.keys_of(t.name)))


def _absent(model: InputModel, names: Sequence[Sequence[str]], stored: Set[str]) -> Iterator[str]:
    """The layout's tensors that the merge doesn't have of a model; see `InputModel.absent`.

    Args:
        model: the model.
        names: the parameters of transformers' model, without the masks that old checkpoints hold.
        stored: the names of the tensors that any model of the merge holds.
    """
    reference, config, headers = model.reference, model.config, model.headers
    weights = {alias for aliases in names for alias in aliases}
    for layer in (*model.layout.layers, None):
        for tensor in layer.tensors if layer else model.layout.other:
            name = model.stored_name(tensor)
            if name is not None:
                if headers[name].torch_dtype is None and not weights.isdisjoint(
                    (tensor.name, *model.loading.targets(name))
                ):
                    raise FimError(
                        f"{reference}: tensor {name} is stored as {headers[name].dtype}, expected float16, bfloat16, "
                        "float32 or float64; use the model's unquantised checkpoint"
                    )
            elif tensor.optional and stored.isdisjoint((tensor.name, *(tensor.aliases or ()))):
                yield tensor.name
            elif not _is_convertible(config.model_type, headers, tensor, layer):
                if not tensor.optional:
                    raise FimError(
                        f"{reference}: the checkpoint lacks the tensor {tensor.name}, which mergekit's definition of "
                        f"{(config.architectures or [config.model_type])[0]} requires; "
                        f"{_lacking(tensor, headers, names)}"
                    )
                yield tensor.name


# Buffers that old checkpoints hold, and the models of today make themselves.
_OLD_BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")


def _unknown(
    headers: Mapping[str, TensorHeader], layout: ModelLayout, skeleton: PreTrainedModel, loading: Loading
) -> Iterator[str]:
    """Names in a checkpoint that are of no tensor of the model, and that transformers doesn't pass over knowingly."""
    known = {name for aliases in tensor_names(skeleton, layout, loading) for name in aliases}
    for tensor in layout.all_tensors():
        known.update((tensor.name, *(tensor.aliases or ()), *(tensor.tied_names or ())))
    conversions = [
        conversion
        for kind in (skeleton.config.model_type, type(skeleton).__name__)
        for conversion in get_checkpoint_conversion_mapping(kind) or []
    ]
    passed_over = [re.compile(pattern) for pattern in skeleton._keys_to_ignore_on_load_unexpected or ()]
    for name in headers:
        if (
            name not in known
            and not loading.targets(name)
            and not name.endswith(_OLD_BUFFERS)
            and not any(pattern.search(name) for pattern in passed_over)
            and all(conversion.rename_source_key(name)[1] is None for conversion in conversions)
        ):
            yield name


def _lacking(tensor: WeightInfo, headers: Mapping[str, TensorHeader], names: Sequence[Sequence[str]]) -> str:
    """What to do where a checkpoint lacks a tensor that mergekit requires."""
    aliases = next((aliases for aliases in names if tensor.name in aliases), None)
    if aliases is None:
        return "models with this config don't have it, so that this version of mergekit can't merge them"
    stored = next((alias for alias in aliases if alias in headers), None)
    if stored is not None:
        return f"it is tied to {stored} there; save the models with a copy of it and tie_word_embeddings: false"
    return "download or save the model again, or leave the model out"


def _check_shapes(model: InputModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the shapes of a checkpoint's tensors are those that its config means.

    Raises:
        FimError: one isn't, so that transformers can't load it.
    """
    for tensor in model.layout.all_tensors():
        stored = model.stored_name(tensor, tied=False)
        expected = next((shapes[name] for name in (tensor.name, *(tensor.aliases or ())) if name in shapes), None)
        if stored is None or expected is None:
            continue
        found = model.headers[stored].shape
        if found != expected:
            raise FimError(
                f"{model}: expected the shape {list(expected)} of {stored}, which follows from config.json, found "
                f"{list(found)}; download or save the model again"
            )


def _is_convertible(
    model_type: str, headers: Mapping[str, TensorHeader], tensor: WeightInfo, layer: DecoderLayer | None
) -> bool:
    """Whether mergekit can make `tensor` from differently laid out ones of the checkpoint, such as single experts."""
    candidates = [set(headers)]
    number = layer.index if layer is not None else (re.findall(r"\.(\d+)\.", tensor.name) or [None])[0]
    if number is not None:  # a conversion stays within its layer, and searching all of a large MoE takes minutes
        candidates.insert(0, {name for name in headers if f".{number}." in name})
    targets = (tensor.name, *(tensor.aliases or ()))
    return any(can_convert_checkpoint_keys(model_type, keys, name) for keys in candidates for name in targets)


def _check_structure(configs: Mapping[ModelReference, PretrainedConfig]) -> None:
    """Check that models differ from the first in nothing that says what the weights mean."""
    base = next(iter(configs))
    for reference, config in configs.items():
        for key in _STRUCTURE:
            expected, found = _structure(configs[base], key), _structure(config, key)
            if expected != found:
                raise FimError(
                    f"{reference}: expected {key} {expected} as in the base {base}, found {found}; "
                    "the models must share one architecture"
                )


def _structure(config: PretrainedConfig, key: str) -> Any:
    text = config if key in ("model_type", "architectures") else config.get_text_config()
    value, heads = _value(text, key), _value(text, "num_attention_heads")
    if isinstance(value, tuple):
        return value
    if key == "head_dim" and value is None and heads:
        return text.hidden_size // heads
    return heads if key == "num_key_value_heads" and value is None else value


def _value(config: PretrainedConfig, key: str) -> Any:
    """A key of a config: where layers differ in it, of every layer."""
    try:
        return getattr(config, key, None)
    except Exception:  # transformers has a class of its own for that
        layers: Any = config.per_layer_config
        return tuple(getattr(layer, key, None) for layer in (layers.values() if isinstance(layers, dict) else layers))


def _check_causal_lm(reference: ModelReference, config: PretrainedConfig, trust_remote_code: bool) -> None:
    names = config.architectures or ["none"]
    if config.is_encoder_decoder:
        raise FimError(f"{reference}: expected a causal language model, found the encoder-decoder {names[0]}")
    if auto_class(config, trust_remote_code) is None:
        raise FimError(
            f"{reference}: expected a causal language model that transformers can load, found {names[0]}; "
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
    """Check that `model` has the tensors of `base`, in the same shapes.

    Args:
        base: the base model.
        model: the fine-tuned model.
        vocabulary_aligned: whether mergekit was told how to align different vocabularies.

    Returns:
        Warnings: tensors that only the base has.

    Raises:
        FimError: the two can't be merged.
    """
    warnings = []
    vocabulary = {t.name: t.vocabulary_axis for t in base.layout.other if t.vocabulary_axis is not None}
    for tensor in model.layout.all_tensors():
        in_base, in_model = tensor.name not in base.absent, tensor.name not in model.absent
        if in_model and not in_base:
            raise FimError(f"{model}: the base {base} has no tensor {tensor.name}; the models must share their tensors")
        if in_base and not in_model:
            warnings.append(f"{model} has no tensor {tensor.name}: the base's is kept")
        names = base.stored_name(tensor), model.stored_name(tensor)
        if names[0] is None or names[1] is None:
            continue
        expected, found = base.headers[names[0]].shape, model.headers[names[1]].shape
        axis = vocabulary.get(tensor.name)
        if expected == found or (axis is not None and vocabulary_aligned and _same_except(expected, found, axis)):
            continue
        remedy = "the models must share one architecture"
        if axis is not None and _same_except(expected, found, axis):
            remedy = "align the vocabularies in the config, for example with `tokenizer: {source: base}`"
        raise FimError(
            f"{model}: expected the shape {list(expected)} of {tensor.name} as in the base {base}, "
            f"found {list(found)}; {remedy}"
        )
    return warnings


def _same_except(a: Sequence[int], b: Sequence[int], axis: int) -> bool:
    return len(a) == len(b) and all(i == axis or x == y for i, (x, y) in enumerate(zip(a, b, strict=True)))
