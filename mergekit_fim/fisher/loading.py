"""Where and in which dtype the base model runs, and its loading: whole onto accelerators, or layer by layer as it runs.

The model is built without weights from its config. Its tensors are read by mergekit's own loader, exactly as the merge
reads them: any file format, sharded or not, adapters applied.
"""

import copy
import fnmatch
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import accelerate
import torch
import tqdm
from mergekit.architecture import WeightInfo
from mergekit.common import dtype_from_name
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import nn
from transformers import PreTrainedModel

from mergekit_fim.errors import FimError
from mergekit_fim.fisher.devices import DevicePlan, plan_devices
from mergekit_fim.fisher.weights import ResidentWeights, StreamedWeights, Weights, put
from mergekit_fim.models.completion import key_prefixes
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.models.language import language_model, outside, without_weights
from mergekit_fim.models.layout import tensor_names
from mergekit_fim.models.parallel import in_threads, readers

# On the CPU a 16-bit dtype must be this many times faster than float32 to be worth its lost digits. The known CPUs are
# far from it on either side: 0.002 and 0.6 without matrix units, 3 and more with them.
_WORTH_IT = 1.5

# (a tensor of the base, by mergekit's definition, and its values as the merge reads them) -> whatever is done with them
Beside = Callable[[WeightInfo, torch.Tensor], object]


@dataclass(frozen=True)
class Placement:
    """Where a model is run."""

    device: torch.device  # or the first of several
    spread: bool  # over all visible accelerators
    streamed: bool  # weights are brought to the device layer by layer

    def devices(self) -> tuple[torch.device, ...]:
        """All that may be used."""
        if not self.spread:
            return (self.device,)
        return tuple(torch.device(self.device.type, index) for index in range(torch.accelerator.device_count()))


def placement(options: MergeOptions) -> Placement:
    """Where the base model is to be measured, from what the user told mergekit.

    `--multi-gpu` (and `--gpu-rich`) spreads it over all accelerators, `--cuda` or `--device` puts it on that device,
    and without any of them it stays on the CPU, even where an accelerator exists. On the CPU weights are streamed.

    Raises:
        FimError: an accelerator was asked for that torch doesn't see.
    """
    try:
        device = torch.device(str(options.device))
    except RuntimeError:
        raise FimError(
            f"--device: expected a torch device such as cpu, cuda or cuda:1, found {options.device}"
        ) from None
    if not options.multi_gpu and device.type == "cpu":
        return Placement(device, spread=False, streamed=True)
    option = "--multi-gpu" if options.multi_gpu else f"--device {options.device}"
    current = torch.accelerator.current_accelerator(check_available=True)
    if current is None or (not options.multi_gpu and current.type != device.type):
        raise FimError(
            f"{option} asks for an accelerator, but torch sees {'none' if current is None else current.type}; "
            "leave it out to merge on the CPU"
        )
    if current.type == "mps":
        raise FimError(f"{option}: mps has no float64, in which norms are summed; leave it out to merge on the CPU")
    if options.multi_gpu:
        return Placement(current, spread=True, streamed=False)
    count = torch.accelerator.device_count()
    if (device.index or 0) >= count:
        raise FimError(f"{option}: torch sees {count} accelerator{'s' * (count > 1)}, counted from 0; choose another")
    return Placement(device, spread=False, streamed=False)


def running_dtype(wanted: torch.dtype, device: torch.device) -> torch.dtype:
    """What to run the model in: `wanted`, or float32 on a CPU that multiplies that faster, or nearly as fast.

    Few CPUs have fast 16-bit matrix products. The others take up to hundreds of times as long as in float32
    (pytorch/pytorch issue 146508), which would turn minutes into days.
    """
    if device.type != "cpu" or wanted.itemsize >= 4:
        return wanted
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[wanted]
    query = getattr(torch.ops.mkldnn, name, None) if torch.backends.mkldnn.is_available() else None
    if query is not None and not query():
        return torch.float32
    return wanted if _seconds(torch.float32) > _WORTH_IT * _seconds(wanted) else torch.float32


def _seconds(dtype: torch.dtype) -> float:
    """How long the CPU takes for a matrix product, at best."""
    a, b = torch.zeros(256, 1024, dtype=dtype), torch.zeros(1024, 1024, dtype=dtype)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        nn.functional.linear(a, b)
        times.append(time.perf_counter() - start)
    return min(times)


class CheckpointTensors(Mapping[str, torch.Tensor]):
    """A checkpoint's tensors by the names in transformers' state dict, each read when asked for."""

    def __init__(
        self, base: InputModel, model: PreTrainedModel, dtype: str | None, options: MergeOptions, beside: Beside | None
    ) -> None:
        """Read `base` for `model`, in the merge's `dtype` or, if None, the checkpoint's own."""
        self._base, self._dtype, self._options, self._beside = base, dtype, options, beside
        planned = {
            name: tensor
            for tensor in base.layout.all_tensors()
            for name in (tensor.name, *(tensor.aliases or ()))
            if tensor.name not in base.absent
        }
        self._tensors: dict[str, WeightInfo | str] = {}  # what the merge reads; the name of what it has otherwise
        for aliases in tensor_names(model, base.layout, base.loading):
            known: WeightInfo | str | None = next((planned[a] for a in aliases if a in planned), None)
            known = known or next((a for a in aliases if a in base.loading.sources), None)
            if known is not None:
                self._tensors |= dict.fromkeys(aliases, known)

    def __getitem__(self, name: str) -> torch.Tensor:
        LoaderCache().setup(self._options)  # one per thread, and autograd's are not the main one
        base, known, dtype = self._base, self._tensors[name], self._dtype
        tensor = base.load_key(known, dtype) if isinstance(known, str) else base.load(known, dtype)
        if tensor is None:
            raise FimError(f"{base}: the checkpoint lacks the parameter {name}; download or save the model again")
        return tensor

    def on(self, name: str, device: torch.device) -> torch.Tensor:
        """A tensor on a device, for the model, after whatever is done beside with it there: one way over the bus."""
        tensor, known = self[name].to(device), self._tensors[name]
        if self._beside is not None and not isinstance(known, str):  # else the merge reads it in other parts
            self._beside(known, tensor)
        return tensor

    def show(self, name: str) -> None:
        """Have done on the CPU what is done beside with a tensor of which the model gets rows only."""
        if self._beside is not None:
            self.on(name, torch.device("cpu"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that can be run, in evaluation mode, without streamed weights; `placement` as it was chosen."""

    model: PreTrainedModel
    layers: list[nn.Module]
    weights: Weights
    placement: Placement


def load_model(
    base: InputModel,
    dtype: str | None,
    options: MergeOptions,
    where: Placement,
    *,
    running: torch.dtype | None = None,
    rows: bool = True,
    beside: Beside | None = None,
) -> LoadedModel:
    """Make the base model ready to be run.

    Args:
        base: the model.
        dtype: the merge's dtype, in which every tensor is read, or None for the checkpoint's own.
        options: the merge's options.
        where: the device, and whether to stream. Without `streamed`, weights are streamed all the same where the
            accelerators don't hold them.
        running: what to run it in; by default the `running_dtype` for the dtype in which it is read.
        rows: whether streaming may leave out the input embeddings, of which the engine loads the rows that occur.
        beside: is shown every tensor that is read whole, on the device that it is for; from several threads.

    Raises:
        FimError: it can't be built or read.
        torch.OutOfMemoryError: an accelerator has less memory than it said.
    """
    model = _without_weights(base, running or default_dtype(base, dtype, where), options.trust_remote_code)
    layers = decoder_layers(model, base)
    tensors = CheckpointTensors(base, model, dtype, options, beside)
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    plain = type(ends[1]) is nn.Linear and isinstance(ends[0], nn.Embedding)  # of which single rows can be used
    if where.streamed and plain:
        return _streamed(model, layers, tensors, where, rows)
    if where.device.type == "cpu":
        _fill(model, tensors, where.device, quiet=options.quiet)
        return LoadedModel(language_model(model), layers, ResidentWeights(), replace(where, streamed=False))
    devices = where.devices()
    plan = plan_devices(model, layers, _free(devices))
    first = devices[plan.devices[0]]
    if not plan.device_map:
        return _streamed(model, layers, tensors, Placement(first, spread=False, streamed=True), rows)
    several = {name: devices[index] for name, index in plan.device_map.items()} if len(plan.devices) > 1 else {}
    _fill(model, tensors, first, several, quiet=options.quiet)
    if several:
        accelerate.dispatch_model(model, several, main_device=first)
    where = replace(where, device=first, streamed=False)
    return LoadedModel(language_model(model), layers, ResidentWeights(), where)


def device_plan(base: InputModel, dtype: str | None, options: MergeOptions) -> DevicePlan | None:
    """What `load_model` will choose, with the memory that is free now; None on the CPU.

    Raises:
        FimError: an accelerator was asked for that torch doesn't see.
    """
    where = placement(options)
    if where.device.type == "cpu":
        return None
    model = _without_weights(base, default_dtype(base, dtype, where), options.trust_remote_code)
    return plan_devices(model, decoder_layers(model, base), _free(where.devices()))


def default_dtype(base: InputModel, dtype: str | None, where: Placement) -> torch.dtype:
    """What to run a model in that is read in the merge's `dtype` or, if None, the checkpoint's own."""
    return running_dtype(dtype_from_name(dtype) or base.stored_dtype(), where.device)


def _streamed(
    model: PreTrainedModel, layers: list[nn.Module], tensors: CheckpointTensors, where: Placement, rows: bool
) -> LoadedModel:
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    by_layer = {id(p) for layer in layers for p in layer.parameters()}
    kept = by_layer | {id(end.weight) for end in ends if end is not None}
    if not rows:
        kept -= {id(ends[0].weight)}
    _fill(model, tensors, where.device, skip=kept)
    for name, parameter in model.named_parameters():
        if id(parameter) in kept - by_layer:
            tensors.show(name)
    return LoadedModel(
        language_model(model), layers, StreamedWeights(tensors, model, where.device), replace(where, spread=False)
    )


def _without_weights(base: InputModel, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The model on the meta device, in evaluation mode; buffers that are not part of the checkpoint are real."""
    config = copy.deepcopy(base.config)
    config.return_dict = True
    with torch.random.fork_rng(devices=[]), accelerate.init_empty_weights(include_buffers=False):
        model = without_weights(config, trust_remote_code, dtype=dtype)
    model.tie_weights()
    for name in outside(model):  # towers and projectors, which tokens alone don't come to
        part, _, own = name.rpartition(".")
        owner = model.get_submodule(part)
        if own in owner._parameters:
            owner._parameters[own] = None
    # As from_pretrained does: what a model insists on keeping in float32.
    patterns = set(model._keep_in_fp32_modules_strict or ())
    patterns |= set(model._keep_in_fp32_modules or ()) if dtype is torch.float16 else set()
    for name, parameter in model.named_parameters():
        if dtype.itemsize < 4 and any(fnmatch.fnmatch(f".{name}.", f"*.{pattern}.*") for pattern in patterns):
            parameter.data = parameter.data.float()
    return model.eval()


def _free(devices: Sequence[torch.device]) -> list[int]:
    """Bytes that are free on each accelerator."""
    return [torch.get_device_module(device).mem_get_info(device)[0] for device in devices]


def _fill(
    model: PreTrainedModel,
    tensors: CheckpointTensors,
    device: torch.device,
    device_map: Mapping[str, torch.device] = {},
    *,
    skip: Set[int] = frozenset(),
    quiet: bool = True,
) -> None:
    """Load all parameters but those in `skip`, and put the buffers on their devices.

    Args:
        model: the model.
        tensors: the weights.
        device: the device of what isn't in `device_map`.
        device_map: the devices of modules, with all that is in them.
        skip: the ids of parameters.
        quiet: no progress bar.
    """

    def device_of(name: str) -> torch.device:
        return next((d for module, d in device_map.items() if f"{name}.".startswith(f"{module}.")), device)

    def load(name: str) -> None:
        put(model, name, device_of(name), tensors.on(name, device_of(name)), wanted[name].dtype)

    wanted = {n: p for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in skip}
    names: dict[int, str] = {}
    known = {name: names.setdefault(id(parameter), name) for name, parameter in wanted.items()}
    loading = in_threads(readers({device_of(name) for name in names.values()}), load, names.values())
    for _ in tqdm.tqdm(loading, desc="Loading the base model", unit="tensor", total=len(names), disable=quiet):
        pass
    for name, first in known.items():
        if first != name:  # as BERT's biases are: `put` has made a new one of the first name
            put(model, name, device_of(name), operator.attrgetter(first)(model).detach(), wanted[name].dtype)
    for name, buffer in list(model.named_buffers()):
        put(model, name, device_of(name), tensors.get(name, buffer), buffer.dtype)
    if not skip:
        model.tie_weights()


def decoder_layers(model: PreTrainedModel, base: InputModel) -> list[nn.Module]:
    """The modules of the base's decoder layers, found by what transformers calls their tensors.

    Raises:
        FimError: transformers names its modules otherwise.
    """
    modules, found = dict(model.named_modules(remove_duplicate=False)), []
    for layer in base.layout.layers:
        prefixes = (layer.prefix, *key_prefixes(layer.index, layer.tensors, base.loading))
        its = [modules[prefix.rstrip(".")] for prefix in prefixes if prefix.rstrip(".") in modules]
        if not its:
            raise FimError(
                f"{base}: expected the decoder layer {layer.prefix.rstrip('.')} in transformers' "
                f"{type(model).__name__}, found none of that name; this architecture isn't supported"
            )
        found.append(its[0])
    return found
