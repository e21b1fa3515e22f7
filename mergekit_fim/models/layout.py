"""Which tensor belongs to which decoder layer, and which lie outside."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mergekit.architecture import ConfiguredModelArchitecture, ModelArchitecture, WeightInfo
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_fim.errors import FimError
from mergekit_fim.models.language import decoder
from mergekit_fim.models.names import Loading


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer of a model.

    Attributes:
        index: from 0.
        prefix: what the names of exactly this layer's tensors begin with, dot included: `model.layers.3.`.
        tensors: the layer's tensors, in mergekit's order, and then those that its definition leaves out, which may have
            another prefix.
    """

    index: int
    prefix: str
    tensors: tuple[WeightInfo, ...]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """`prefix`, and those of tensors that are named otherwise in checkpoints."""
        found = (layer_prefix(tensor.name, self.index) or self.prefix for tensor in self.tensors)
        return tuple(dict.fromkeys((self.prefix, *found)))

    def stem(self, prefix: str) -> str:
        """One of the `prefixes` without the layer's number."""
        return prefix.removesuffix(f"{self.index}.")

    def local(self, tensor_name: str) -> str:
        """The name of one of the layer's tensors without what says which layer it is in."""
        return local_name(tensor_name, self.index)


@dataclass(frozen=True)
class ModelLayout:
    """All the tensors of a model that mergekit merges.

    Attributes:
        layers: those of the language model's decoder layers.
        modules: the others, by mergekit's modules.
        stack: the module that has the decoder layers.
    """

    layers: tuple[DecoderLayer, ...]
    modules: Mapping[str, tuple[WeightInfo, ...]]
    stack: str

    @property
    def other(self) -> tuple[WeightInfo, ...]:
        """The tensors outside the decoder layers."""
        return tuple(tensor for tensors in self.modules.values() for tensor in tensors)

    def all_tensors(self) -> tuple[WeightInfo, ...]:
        """Every tensor once."""
        return tuple(tensor for layer in self.layers for tensor in layer.tensors) + self.other


def model_layout(architecture: ModelArchitecture, config: PretrainedConfig, model_name: str, stack: str) -> ModelLayout:
    """Assign every tensor of a model to its decoder layer, by mergekit's definition of the architecture.

    Args:
        architecture: the definition.
        config: the model's.
        model_name: for errors.
        stack: the module that has the decoder layers.

    Raises:
        FimError: there are no decoder layers, or some that can't be told apart by name.
    """
    configured = ConfiguredModelArchitecture(info=architecture, config=config)
    modules = {name: configured.get_module(name) for name in architecture.modules}
    layers = []
    for index in range(modules[stack].num_layers()):
        # Granite's definition repeats some.
        tensors = tuple({tensor.name: tensor for tensor in modules[stack].layer_weights(index)}.values())
        prefixes = [layer_prefix(tensor.name, index) for tensor in tensors]
        prefix = prefixes[0] if prefixes and None not in prefixes else None
        if prefix is None:
            raise FimError(
                f"{model_name}: the tensors of decoder layer {index} don't share one name prefix with the layer's "
                f"number in it (found e.g. {tensors[0].name if tensors else 'none'}); this architecture isn't supported"
            )
        layers.append(DecoderLayer(index, prefix, tensors))
    if not layers:
        raise FimError(f"{model_name}: expected at least one decoder layer, found none; there is nothing to measure")
    others = {
        name: tuple((*module.pre_weights(), *module.post_weights()) if name == stack else module.all_weights())
        for name, module in modules.items()
    }
    return ModelLayout(tuple(layers), others, stack)


def stack_of(
    architecture: ModelArchitecture, config: PretrainedConfig, model_name: str, model: PreTrainedModel, loading: Loading
) -> str:
    """The module of mergekit's definition that has the language model's decoder layers.

    Args:
        architecture: the definition.
        config: the model's.
        model_name: for errors.
        model: transformers' model, which may be without weights.
        loading: where it puts the checkpoint's tensors.

    Raises:
        FimError: there is none, or several may be it.
    """
    if len(architecture.modules) == 1:
        return next(iter(architecture.modules))
    configured = ConfiguredModelArchitecture(info=architecture, config=config)
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    within = re.compile(rf"{re.escape(decoder(model)[0])}\.\w+\.0\.")
    found = []
    for name in architecture.modules:
        module = configured.get_module(name)
        if module.num_layers() == count and any(
            within.match(key) for t in module.layer_weights(0) for key in loading.keys_of(t.name)
        ):
            found.append(name)
    if len(found) != 1:
        raise FimError(
            f"{model_name}: expected one stack of decoder layers, found the modules "
            f"{', '.join(sorted(architecture.modules))}, {'several' if found else 'none'} of which may be the language "
            f"model's; {next(iter(config.architectures or ()), config.model_type)} isn't supported"
        )
    return found[0]


def layer_prefix(tensor_name: str, index: int) -> str | None:
    """What the name of a tensor of a decoder layer begins with, the layer's number and a dot included."""
    match = re.match(rf"(?:.*?\.)?{index}\.", tensor_name)
    return match.group() if match else None


def local_name(tensor_name: str, index: int) -> str:
    """The name of a tensor of a decoder layer without what says which layer it is in."""
    return tensor_name.removeprefix(layer_prefix(tensor_name, index) or "")


def tensor_names(
    model: PreTrainedModel, layout: ModelLayout, loading: Loading, *, floating_point: bool = False
) -> list[list[str]]:
    """Every tensor, or every floating-point one, of transformers' model with all of its names.

    Tied ones have several, and mergekit may know one by a name that transformers gives it in checkpoints only, as it
    does GPT-NeoX's head.
    """
    names: dict[int, list[str]] = {}
    known: dict[str, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point() or not floating_point:
            known[name] = names.setdefault(id(value), [])
            known[name].append(name)
    for tensor in layout.all_tensors():
        if tensor.name not in known and loading.is_whole(tensor.name):
            for key in loading.targets(tensor.name):
                known.get(key, []).append(tensor.name)
    return list(names.values())
