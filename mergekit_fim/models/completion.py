"""Make mergekit's definition of an architecture fit the models of a merge.

A tensor that it leaves out is added under the checkpoints' own name. One that it requires, and that models like these
don't have, such as a tied output head, is left out.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field

from mergekit.architecture import (
    ConfiguredModuleArchitecture,
    ModelArchitecture,
    ModuleArchitecture,
    ModuleDefinition,
    WeightInfo,
)
from mergekit.architecture.auto import infer_vocabulary_axes
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from transformers import PretrainedConfig

from mergekit_fim.errors import FimError
from mergekit_fim.models.layout import (
    DecoderLayer,
    ModelLayout,
    OpenedModel,
    layer_prefix,
    local_name,
    model_layout,
    names_of,
    tensor_names,
)
from mergekit_fim.models.names import Loading


@dataclass(frozen=True)
class Changes:
    """What is changed in mergekit's definition. Added tensors have their names in the checkpoints."""

    added: tuple[str, ...] = ()
    parts: tuple[tuple[str, str], ...] = ()  # of names added in decoder layers, before and after the layer's number
    other: Mapping[str, tuple[WeightInfo, ...]] = field(default_factory=dict)  # added outside them, by module
    unneeded: frozenset[str] = frozenset()  # required, and no model has or needs it; without what names the layer


@dataclass(frozen=True)
class _Changed(ModuleArchitecture):
    """A module's definition with changes. All changed tensors are optional: mergekit skips one that no model has.

    Added tensors have the checkpoints' own names, so all names here include their module's prefix.
    """

    inner: ModuleDefinition
    parts: tuple[tuple[str, str], ...]
    other: tuple[WeightInfo, ...]
    unneeded: frozenset[str]

    def _configured(self, config: PretrainedConfig) -> ConfiguredModuleArchitecture:
        inner = self.inner
        return ConfiguredModuleArchitecture(info=inner.architecture, config=config, weight_prefix=inner.weight_prefix)

    def _own(self, weights: Iterable[WeightInfo], index: int | None = None) -> list[WeightInfo]:
        def is_unneeded(name: str) -> bool:
            return name in self.unneeded or (index is not None and local_name(name, index) in self.unneeded)

        return [w.model_copy(update={"optional": True}) if is_unneeded(w.name) else w for w in weights]

    def pre_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """mergekit's."""
        return self._own(self._configured(config).pre_weights())

    def post_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """mergekit's, and those added outside the layers."""
        return [*self._own(self._configured(config).post_weights()), *self.other]

    def layer_weights(self, index: int, config: PretrainedConfig) -> list[WeightInfo]:
        """mergekit's, and the same further ones in every layer: mergekit pairs layers' tensors by their place."""
        added = [WeightInfo(name=f"{before}{index}{after}", optional=True) for before, after in self.parts]
        return self._own(self._configured(config).layer_weights(index), index) + added

    def num_layers(self, config: PretrainedConfig) -> int:
        return int(self.inner.architecture.num_layers(config))

    def num_layers_config_key(self) -> str:
        return str(self.inner.architecture.num_layers_config_key())


def changed(architecture: ModelArchitecture, changes: Changes, stack: str) -> ModelArchitecture:
    """Change mergekit's definition of a model, in which the module `stack` has the decoder layers."""
    if changes == Changes():
        return architecture
    modules = {}
    for name, module in architecture.modules.items():
        parts = changes.parts if name == stack else ()
        own = _Changed(module, parts, changes.other.get(name, ()), changes.unneeded)
        modules[name] = ModuleDefinition(architecture=own, subfolder=module.subfolder)
    return architecture.model_copy(update={"modules": modules})


def changes_for(model: OpenedModel, architecture: ModelArchitecture, stack: str, stored: Set[str]) -> Changes:
    """Find the changes that make mergekit's definition fit a model of the merge, whose models together hold `stored`.

    Raises:
        FimError: the model lacks a parameter, or has a tensor that has no place in the definition.
    """
    unneeded = _unneeded(model, model_layout(model, architecture, stack), stored)
    layout = model_layout(model, changed(architecture, Changes(unneeded=unneeded), stack), stack)
    written = set(_written(model, layout, stored))
    there = model.loading.loaded(written) | written
    parameters = tensor_names(model.skeleton, layout, model.loading, floating_point=True)
    required = {name for names in parameters for name in names}
    prefixes = {layer.index: key_prefixes(layer.index, layer.tensors, model.loading) for layer in layout.layers}
    vocabulary, homes = infer_vocabulary_axes(model.skeleton), _homes(layout, model.loading)
    added: dict[str, None] = {}
    split: dict[tuple[str, str], None] = {}
    other: dict[str, dict[str, WeightInfo]] = {}
    for names in tensor_names(model.skeleton, layout, model.loading):
        sources = next((parts for key in names if (parts := model.loading.sources.get(key))), ())
        if not there.isdisjoint(names) or (not sources and required.isdisjoint(names)):
            continue  # it is written, or a buffer that the model makes itself
        layers = [index for index, own in prefixes.items() if any(key.startswith(own) for key in names)]
        if not sources or len(layers) > 1:
            raise FimError(
                f"{_not_covered(model, names[0])}, so that the merged model would lack it; this model can't be merged "
                "by this version of mergekit"
            )
        for source in (source for source in sources if source not in written):
            added[source] = None
            if layers:
                prefix = layer_prefix(source, layers[0])
                if prefix is None:
                    raise FimError(
                        f"{_not_covered(model, source)}, which is part of decoder layer {layers[0]} but doesn't have "
                        "its number; this model can't be merged"
                    )
                split[prefix.removesuffix(f"{layers[0]}."), f".{source.removeprefix(prefix)}"] = None
            else:
                axis = next((vocabulary[key] for key in names if key in vocabulary), None)
                # The module whose tensors' names have most in common with this one's.
                start = max((s for name in names for s in _beginnings(name) if s in homes), key=len, default="")
                weight = WeightInfo(name=source, optional=True, vocabulary_axis=axis)
                other.setdefault(homes.get(start, stack), {})[source] = weight
    outside = {module: tuple(weights.values()) for module, weights in other.items()}
    return Changes(tuple(added), tuple(split), outside, unneeded)


def _unneeded(model: OpenedModel, layout: ModelLayout, stored: Set[str]) -> frozenset[str]:
    """Name what mergekit's definition requires and no model of the merge has or needs; see `Changes.unneeded`."""
    keys = tensor_names(model.skeleton, layout, model.loading)
    needed = {name for names in keys if model.loading.sources.keys().isdisjoint(names) for name in names}
    return frozenset(
        tensor.name if layer is None else layer.local(tensor.name)
        for layer, tensor in layout.placed()
        if not tensor.optional
        and tensor.name not in needed
        and stored.isdisjoint(names_of(tensor, tied=True))
        and (
            not is_convertible(model, tensor, layer)
            or any(model.loading.is_reordered(key) for key in model.loading.keys_of(tensor.name))
        )
    )


def is_convertible(model: OpenedModel, tensor: WeightInfo, layer: DecoderLayer | None) -> bool:
    """Tell whether mergekit can make a tensor from others in the checkpoint, such as single experts."""
    candidates = [set(model.headers)]
    number = layer.index if layer is not None else (re.findall(r"\.(\d+)\.", tensor.name) or [None])[0]
    if number is not None:  # a conversion stays within its layer, and searching all of a large MoE takes minutes
        candidates.insert(0, {name for name in model.headers if f".{number}." in name})
    kind, names = model.config.model_type, names_of(tensor)
    return any(can_convert_checkpoint_keys(kind, keys, name) for keys in candidates for name in names)


def _written(model: OpenedModel, layout: ModelLayout, stored: Set[str]) -> Iterator[str]:
    """Yield the names and aliases of the tensors that mergekit will write, without those that it skips."""
    for tensor in layout.all_tensors():
        is_tied = any(name in model.headers for name in tensor.tied_names or ())
        if not tensor.optional or is_tied or not stored.isdisjoint(names_of(tensor)):
            yield from names_of(tensor)


def _not_covered(model: OpenedModel, name: str) -> str:
    return f"{model}: mergekit's definition of {type(model.skeleton).__name__} doesn't cover the tensor {name}"


def check_same(changes: Mapping[ModelReference, Changes]) -> None:
    """Check that the models of a merge, the base first, have the same tensors beyond mergekit's definition.

    Raises:
        FimError: one lacks some of them, or has others.
    """
    (base, expected), *others = changes.items()
    for model, own in others:
        names = (set(expected.added), set(own.added))
        for has, lacks, differ in ((base, model, names[0] - names[1]), (model, base, names[1] - names[0])):
            if differ:
                raise FimError(
                    f"{lacks}: expected the tensor {min(differ)} as in {has}, found none of that name: what mergekit's "
                    "definition leaves out is merged under the checkpoints' own names, which have to be the same; use "
                    "models of one kind, saved by the same version of transformers"
                )


def key_prefixes(index: int, tensors: Iterable[WeightInfo], loading: Loading) -> tuple[str, ...]:
    """List what the names of a decoder layer's tensors begin with in transformers' model."""
    keys = [key for tensor in tensors for key in loading.keys_of(tensor.name)]
    return tuple({prefix: None for key in keys if (prefix := layer_prefix(key, index)) is not None})


def _homes(layout: ModelLayout, loading: Loading) -> dict[str, str]:
    """Find mergekit's modules by what the names of their tensors in transformers' model begin with."""
    homes: dict[str, str] = {}
    for module, tensors in layout.modules.items():
        for tensor in tensors:
            for key in (tensor.name, *loading.targets(tensor.name)):
                for start in _beginnings(key):
                    homes.setdefault(start, module)
    return homes


def _beginnings(name: str) -> list[str]:
    """List what a name begins with, cut at its dots."""
    return [name[: dot.start()] for dot in re.finditer(r"\.", name)]
