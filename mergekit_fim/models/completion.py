"""mergekit's definition of an architecture, made to fit the models of a merge.

What it leaves out is added under the checkpoints' own names. What it requires and models like these don't have, such as
a tied output head, is left out.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mergekit.architecture import (
    ConfiguredModuleArchitecture,
    ModelArchitecture,
    ModuleArchitecture,
    ModuleDefinition,
    WeightInfo,
)
from mergekit.common import ModelReference
from transformers import PretrainedConfig

from mergekit_fim.errors import FimError
from mergekit_fim.models.layout import ModelLayout, layer_prefix, local_name
from mergekit_fim.models.names import Loading


@dataclass(frozen=True)
class Changes:
    """What is changed in mergekit's definition.

    Attributes:
        added: tensors that it leaves out, by their names in the checkpoints.
        templates: those of the decoder layers, with {} for the layer's number; each for whichever layers have it.
        other: those outside the layers, by mergekit's modules.
        unneeded: tensors that it requires and no model of the merge has or needs, without what names their layer.
    """

    added: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    other: Mapping[str, tuple[WeightInfo, ...]] = field(default_factory=dict)
    unneeded: frozenset[str] = frozenset()


class _Changed(ModuleArchitecture):
    """A module's definition with changes; all that they are about is optional: what no model has, mergekit skips.

    What is added has the checkpoints' own names, so that the names have their module's prefix in here.
    """

    def __init__(
        self, inner: ModuleDefinition, templates: Iterable[str], other: Iterable[WeightInfo], unneeded: frozenset[str]
    ) -> None:
        self._inner, self._templates, self._other, self._unneeded = inner, templates, other, unneeded

    def _configured(self, config: PretrainedConfig) -> ConfiguredModuleArchitecture:
        inner = self._inner
        return ConfiguredModuleArchitecture(info=inner.architecture, config=config, weight_prefix=inner.weight_prefix)

    def _own(self, weights: Iterable[WeightInfo], index: int | None = None) -> list[WeightInfo]:
        def is_unneeded(name: str) -> bool:
            return name in self._unneeded or (index is not None and local_name(name, index) in self._unneeded)

        return [w.model_copy(update={"optional": True}) if is_unneeded(w.name) else w for w in weights]

    def pre_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """mergekit's."""
        return self._own(self._configured(config).pre_weights())

    def post_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """mergekit's, and those added outside the layers."""
        return [*self._own(self._configured(config).post_weights()), *self._other]

    def layer_weights(self, index: int, config: PretrainedConfig) -> list[WeightInfo]:
        """mergekit's, and in every layer the same templates: mergekit pairs layers' tensors by their place."""
        added = [WeightInfo(name=t.format(index), optional=True) for t in self._templates]
        return self._own(self._configured(config).layer_weights(index), index) + added

    def num_layers(self, config: PretrainedConfig) -> int:
        return int(self._inner.architecture.num_layers(config))

    def num_layers_config_key(self) -> str:
        return str(self._inner.architecture.num_layers_config_key())


def changed(architecture: ModelArchitecture, changes: Changes, stack: str) -> ModelArchitecture:
    """mergekit's definition of a model, with changes; `stack`: the module that has the decoder layers."""
    if changes == Changes():
        return architecture
    modules = {
        name: ModuleDefinition(
            architecture=_Changed(
                module, changes.templates if name == stack else (), changes.other.get(name, ()), changes.unneeded
            ),
            subfolder=module.subfolder,
        )
        for name, module in architecture.modules.items()
    }
    return architecture.model_copy(update={"modules": modules})


def unneeded(
    layout: ModelLayout, lacking: Iterable[str], loading: Loading, tensors: Sequence[Sequence[str]]
) -> frozenset[str]:
    """What mergekit's definition requires and no model of the merge has or needs.

    Args:
        layout: a model's tensors by mergekit's definition.
        lacking: the names of those that it requires and that aren't to be had of any model.
        loading: where transformers puts the checkpoint's tensors.
        tensors: all that transformers' model has, each with all of its names.

    Returns:
        Their names, without what says which decoder layer they are in.
    """
    needed = {name for aliases in tensors if not any(key in loading.sources for key in aliases) for name in aliases}
    there_not = set(lacking) - needed
    return frozenset(
        name if layer is None else local_name(name, layer.index)
        for layer in (*layout.layers, None)
        for name in (t.name for t in (layer.tensors if layer else layout.other))
        if name in there_not
    )


def left_out(
    model: str,
    layout: ModelLayout,
    planned: Iterable[str],
    loading: Loading,
    tensors: Sequence[Sequence[str]],
    floats: Sequence[Sequence[str]],
    vocabulary: Mapping[str, int],
    architecture: str,
) -> Changes:
    """The tensors of a model that a merge by mergekit's definition would lack, so that loading it would make them up.

    Args:
        model: its name.
        layout: its tensors by mergekit's definition.
        planned: the names of those that mergekit will write, or other names that these have.
        loading: where transformers puts the checkpoint's tensors.
        tensors: all that the model has, each with all of its names.
        floats: the parameters among them: these have to be there.
        vocabulary: for each name of a tensor that goes by tokens, along which axis.
        architecture: the name of the model's class.

    Raises:
        FimError: a parameter that the checkpoint doesn't hold either, or that belongs to several decoder layers.
    """
    written = set(planned)
    there = loading.loaded(written) | written
    required = {name for aliases in floats for name in aliases}
    prefixes = {layer.index: key_prefixes(layer.index, layer.tensors, loading) for layer in layout.layers}
    names: dict[str, None] = {}
    templates: dict[str, None] = {}
    other: dict[str, dict[str, WeightInfo]] = {}
    homes = _homes(layout, loading)
    for aliases in tensors:
        if not there.isdisjoint(aliases):
            continue
        sources = next((found for key in aliases if (found := loading.sources.get(key))), ())
        if not sources and required.isdisjoint(aliases):
            continue  # a buffer that the model makes itself
        layers = [index for index, own in prefixes.items() if any(key.startswith(own) for key in aliases)]
        if not sources or len(layers) > 1:
            raise FimError(
                f"{model}: mergekit's definition of {architecture} doesn't cover the tensor {aliases[0]}, so that the "
                "merged model would lack it; this model can't be merged by this version of mergekit"
            )
        for source in sources:
            if source in written:
                continue
            prefix = layer_prefix(source, layers[0]) if layers else None
            if prefix is not None:
                stem = prefix.removesuffix(f"{layers[0]}.")
                template = f"{_escaped(stem)}{{}}.{_escaped(source.removeprefix(prefix))}"
                templates[template] = None
            elif layers:
                raise FimError(
                    f"{model}: mergekit's definition of {architecture} doesn't cover the tensor {source}, which is "
                    f"part of decoder layer {layers[0]} but doesn't have its number; this model can't be merged"
                )
            else:
                axis = next((vocabulary[key] for key in aliases if key in vocabulary), None)
                home = _home(aliases, homes) or layout.stack
                other.setdefault(home, {})[source] = WeightInfo(name=source, optional=True, vocabulary_axis=axis)
            names[source] = None
    return Changes(tuple(names), tuple(templates), {module: tuple(its.values()) for module, its in other.items()})


def check_same(found: Mapping[ModelReference, Changes]) -> None:
    """Check that the models of a merge, the base first, have the same tensors beyond mergekit's definition.

    Raises:
        FimError: one lacks some of them, or has others.
    """
    (base, expected), *others = found.items()
    for model, changes in others:
        names = (set(expected.added), set(changes.added))
        for has, lacks, differ in ((base, model, names[0] - names[1]), (model, base, names[1] - names[0])):
            if differ:
                raise FimError(
                    f"{lacks}: expected the tensor {min(differ)} as in {has}, found none of that name: what mergekit's "
                    "definition leaves out is merged under the checkpoints' own names, which have to be the same; use "
                    "models of one kind, saved by the same version of transformers"
                )


def key_prefixes(index: int, tensors: Iterable[WeightInfo], loading: Loading) -> tuple[str, ...]:
    """What the names of a decoder layer's tensors begin with in transformers' model."""
    keys = [key for tensor in tensors for key in loading.keys_of(tensor.name)]
    return tuple({prefix: None for key in keys if (prefix := layer_prefix(key, index)) is not None})


def _homes(layout: ModelLayout, loading: Loading) -> dict[str, str]:
    """By all that names in transformers' model begin with outside the decoder layers: mergekit's module of them."""
    found: dict[str, str] = {}
    for module, tensors in layout.modules.items():
        for tensor in tensors:
            for key in (tensor.name, *loading.targets(tensor.name)):
                found |= {start: found.get(start, module) for start in _beginnings(key)}
    return found


def _home(aliases: Iterable[str], homes: Mapping[str, str]) -> str | None:
    """The module whose tensors' names have most in common with a tensor's."""
    starts = [start for name in aliases for start in _beginnings(name) if start in homes]
    return homes[max(starts, key=len)] if starts else None


def _beginnings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _escaped(text: str) -> str:
    return re.sub(r"[{}]", r"\g<0>\g<0>", text)
