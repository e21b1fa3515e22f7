"""Which tensor belongs to which decoder layer, and which lie outside."""

import re
from dataclasses import dataclass

from mergekit.architecture import ConfiguredModelArchitecture, ModelArchitecture, WeightInfo
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from mergekit_fim.errors import FimError


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
    """All the tensors of a model that mergekit merges: those of the decoder layers, and the others."""

    layers: tuple[DecoderLayer, ...]
    other: tuple[WeightInfo, ...]

    def all_tensors(self) -> tuple[WeightInfo, ...]:
        """Every tensor once."""
        return tuple(tensor for layer in self.layers for tensor in layer.tensors) + self.other


def model_layout(architecture: ModelArchitecture, config: PretrainedConfig, model_name: str) -> ModelLayout:
    """Assign every tensor of a model to its decoder layer, by mergekit's definition of the architecture.

    Raises:
        FimError: the architecture has several modules, no decoder layers, or layers that can't be told apart by name.
    """
    if len(architecture.modules) != 1:
        raise FimError(
            f"{model_name}: expected one stack of decoder layers, found the modules "
            f"{', '.join(sorted(architecture.modules))}; fim_ties and fim_ta merge text-only causal language models"
        )
    module = ConfiguredModelArchitecture(info=architecture, config=config).get_module(next(iter(architecture.modules)))
    layers = []
    for index in range(module.num_layers()):
        tensors = tuple({tensor.name: tensor for tensor in module.layer_weights(index)}.values())  # Granite's repeat
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
    return ModelLayout(tuple(layers), (*module.pre_weights(), *module.post_weights()))


def layer_prefix(tensor_name: str, index: int) -> str | None:
    """What the name of a tensor of a decoder layer begins with, the layer's number and a dot included."""
    match = re.match(rf"(?:.*?\.)?{index}\.", tensor_name)
    return match.group() if match else None


def local_name(tensor_name: str, index: int) -> str:
    """The name of a tensor of a decoder layer without what says which layer it is in."""
    return tensor_name.removeprefix(layer_prefix(tensor_name, index) or "")


def tensor_names(model: PreTrainedModel, layout: ModelLayout, *, floating_point: bool = False) -> list[list[str]]:
    """Every tensor, or every floating-point one, of transformers' model with all of its names.

    Tied ones have several, and mergekit may know one by the name that transformers gives it in checkpoints only, as it
    does GPT-NeoX's head.
    """
    names: dict[int, list[str]] = {}
    known: dict[str, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point() or not floating_point:
            known[name] = names.setdefault(id(value), [])
            known[name].append(name)
    renamings = get_checkpoint_conversion_mapping(type(model).__name__) or []
    for renaming in (r for r in renamings if isinstance(r, WeightRenaming)):
        for tensor in layout.all_tensors():
            renamed, _pattern = renaming.rename_source_key(tensor.name)
            if renamed in known and tensor.name not in known:
                known[renamed].append(tensor.name)
    return list(names.values())
