"""Say which tensor belongs to which decoder layer, and which lie outside."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mergekit.architecture import ConfiguredModelArchitecture, ModelArchitecture, WeightInfo
from mergekit.common import ModelReference
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_fim.errors import FimError
from mergekit_fim.models.checkpoint import TensorHeader
from mergekit_fim.models.language import decoder
from mergekit_fim.models.names import Loading


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """What the config and the checkpoint's headers say of a model of the merge. Compared and hashed by identity."""

    reference: ModelReference  # mergekit's, as in the merge config
    config: PretrainedConfig
    skeleton: PreTrainedModel  # transformers' model, without weights
    headers: Mapping[str, TensorHeader]  # by the names of the tensors in the checkpoint
    loading: Loading  # where transformers puts them

    def __str__(self) -> str:
        return str(self.reference)

    def stored_name(self, tensor: WeightInfo, *, tied: bool = True) -> str | None:
        """Find the checkpoint's name of a tensor: its own, an alias, or (if `tied`) that of what it is tied to."""
        return next((name for name in names_of(tensor, tied=tied) if name in self.headers), None)


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer of a model."""

    index: int  # from 0
    prefix: str  # what its tensors' names begin with, and no others', dot included: `model.layers.3.`
    tensors: tuple[WeightInfo, ...]  # mergekit's, and then those that it leaves out, which may have another prefix

    @property
    def prefixes(self) -> tuple[str, ...]:
        """`prefix`, and those of tensors that checkpoints name otherwise."""
        others = (layer_prefix(tensor.name, self.index) or self.prefix for tensor in self.tensors)
        return tuple(dict.fromkeys((self.prefix, *others)))

    def local(self, tensor_name: str) -> str:
        """Take the part that says which layer it is in from the name of one of the layer's tensors."""
        return local_name(tensor_name, self.index)


@dataclass(frozen=True)
class ModelLayout:
    """All the tensors of a model that mergekit merges."""

    layers: tuple[DecoderLayer, ...]  # of the language model
    modules: Mapping[str, tuple[WeightInfo, ...]]  # the tensors outside the layers, by mergekit's modules
    stack: str  # the module that has the decoder layers

    @property
    def other(self) -> tuple[WeightInfo, ...]:
        """The tensors outside the decoder layers."""
        return tuple(tensor for tensors in self.modules.values() for tensor in tensors)

    def placed(self) -> Iterator[tuple[DecoderLayer | None, WeightInfo]]:
        """Yield every tensor once, with its layer; None where it is outside."""
        yield from ((layer, tensor) for layer in self.layers for tensor in layer.tensors)
        yield from ((None, tensor) for tensor in self.other)

    def all_tensors(self) -> tuple[WeightInfo, ...]:
        """List every tensor once."""
        return tuple(tensor for _, tensor in self.placed())


def model_layout(model: OpenedModel, architecture: ModelArchitecture, stack: str) -> ModelLayout:
    """Assign every tensor of a model to its decoder layer, by mergekit's definition of the architecture.

    Raises:
        FimError: there are no decoder layers, or some that can't be told apart by name.
    """
    configured = ConfiguredModelArchitecture(info=architecture, config=model.config)
    modules = {name: configured.get_module(name) for name in architecture.modules}
    layers = []
    for index in range(modules[stack].num_layers()):
        # Granite's definition repeats some.
        tensors = tuple({tensor.name: tensor for tensor in modules[stack].layer_weights(index)}.values())
        prefixes = [layer_prefix(tensor.name, index) for tensor in tensors]
        prefix = prefixes[0] if prefixes and None not in prefixes else None
        if prefix is None:
            raise FimError(
                f"{model}: the tensors of decoder layer {index} don't share one name prefix with the layer's number "
                f"in it (found e.g. {tensors[0].name if tensors else 'none'}); this architecture isn't supported"
            )
        layers.append(DecoderLayer(index, prefix, tensors))
    if not layers:
        raise FimError(f"{model}: expected at least one decoder layer, found none; there is nothing to measure")
    others = {
        name: tuple((*module.pre_weights(), *module.post_weights()) if name == stack else module.all_weights())
        for name, module in modules.items()
    }
    return ModelLayout(tuple(layers), others, stack)


def stack_of(model: OpenedModel, architecture: ModelArchitecture) -> str:
    """Find the module of mergekit's definition that has the language model's decoder layers.

    Raises:
        FimError: there is none, or several may be it.
    """
    if len(architecture.modules) == 1:
        return next(iter(architecture.modules))
    configured = ConfiguredModelArchitecture(info=architecture, config=model.config)
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    within = re.compile(rf"{re.escape(decoder(model.skeleton)[0])}\.\w+\.0\.")
    stacks = []
    for name in architecture.modules:
        module = configured.get_module(name)
        if module.num_layers() == count:
            keys = (key for tensor in module.layer_weights(0) for key in model.loading.keys_of(tensor.name))
            stacks += [name] if any(map(within.match, keys)) else []
    if len(stacks) != 1:
        raise FimError(
            f"{model}: expected one stack of decoder layers, found the modules "
            f"{', '.join(sorted(architecture.modules))}, {'several' if stacks else 'none'} of which may be the "
            f"language model's; {type(model.skeleton).__name__} isn't supported"
        )
    return stacks[0]


def layer_prefix(tensor_name: str, index: int) -> str | None:
    """Find what the name of a decoder layer's tensor begins with, up to the layer's number and the dot after it."""
    match = re.match(rf"(?:.*?\.)?{index}\.", tensor_name)
    return match.group() if match else None


def local_name(tensor_name: str, index: int) -> str:
    """Take the part that says which layer it is in from the name of a decoder layer's tensor."""
    return tensor_name.removeprefix(layer_prefix(tensor_name, index) or "")


def names_of(tensor: WeightInfo, *, tied: bool = False) -> tuple[str, ...]:
    """List the names that a checkpoint may give a tensor of mergekit's, with `tied` those it may be tied to."""
    return (tensor.name, *(tensor.aliases or ()), *((tensor.tied_names or ()) if tied else ()))


def tensor_names(
    model: PreTrainedModel, layout: ModelLayout, loading: Loading, *, floating_point: bool = False
) -> list[list[str]]:
    """List every tensor, or every floating-point one, of transformers' model with all of its names.

    Tied tensors have several. So has one to which transformers gives another name in checkpoints, such as GPT-NeoX's
    head, if mergekit knows it by that name.
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
