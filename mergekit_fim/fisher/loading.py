"""Choose where and in which dtype the base model runs, and load it: whole, or layer by layer as it runs.

The model is built without weights from its config. mergekit's own loader reads its tensors, exactly as in the merge:
any file format, sharded or not, adapters applied.
"""

import fnmatch
import operator
import timeit
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import accelerate
import torch
import tqdm
from mergekit.common import dtype_from_name
from mergekit.options import MergeOptions
from torch import nn
from transformers import PreTrainedModel

from mergekit_fim.errors import FimError
from mergekit_fim.fisher.weights import Beside, CheckpointTensors, ResidentWeights, StreamedWeights, Weights, put
from mergekit_fim.models.completion import key_prefixes
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.models.language import language_model, outside, without_weights
from mergekit_fim.models.parallel import in_threads, readers

# On the CPU a 16-bit dtype must be this many times faster than float32 to be worth its lost digits. The known CPUs are
# far from it on either side: 0.002 and 0.6 without matrix units, 3 and more with them.
_WORTH_IT = 1.5

# What an accelerator needs beside the weights, for activations and chunks of logits, in bytes and as a part of the
# weights. Where it turns out to be more, the measurement starts again with streamed weights.
RESERVE, RESERVED_PART = 1 << 30, 0.1


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
    """Choose where the base model is measured, by what the user told mergekit.

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
    """Choose what to run the model in: `wanted`, or float32 on a CPU that multiplies it faster, or nearly as fast.

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
    """Time a matrix product on the CPU, the best of several."""
    a, b = torch.zeros(256, 1024, dtype=dtype), torch.zeros(1024, 1024, dtype=dtype)
    return min(timeit.repeat(lambda: nn.functional.linear(a, b), repeat=8, number=1))


def default_dtype(base: InputModel, dtype: str | None, device: torch.device) -> torch.dtype:
    """Choose what to run a model in that is read in the merge's `dtype` or, if None, the checkpoint's own."""
    return running_dtype(dtype_from_name(dtype) or base.stored_dtype(), device)


@dataclass(frozen=True)
class DevicePlan:
    """Which devices get a base model."""

    devices: tuple[int, ...]  # counted from 0
    device_map: Mapping[str, int]  # accelerate's map of the modules; where it is empty, the model is streamed

    def __str__(self) -> str:
        if len(self.devices) > 1:
            several = ", ".join(map(str, self.devices))
            return f"accelerators {several} hold the base together, by a device map, and run it in turn"
        if self.device_map:
            return f"accelerator {self.devices[0]} holds the base whole and measures all sequences"
        return f"accelerator {self.devices[0]} gets the base streamed, a decoder layer at a time"


def plan_devices(model: nn.Module, layers: Sequence[nn.Module], free: Sequence[int]) -> DevicePlan:
    """Choose which devices hold a model, whose weights may be on the meta device.

    Several devices hold it together, in parts as even as whole decoder layers allow, even where one of them has room
    for all of it: what is read then goes over all their buses at once. Where together they lack the room, one device
    holds the model, or has it streamed. `free` is the number of bytes that are free on each device.
    """
    rooms = {device: max(0, int((size - RESERVE) / (1 + RESERVED_PART))) for device, size in enumerate(free)}
    if len(free) > 1:
        undivided = sorted({type(layer).__name__ for layer in layers})
        # Where even parts are too small for what isn't divided, each device takes as much as it has room for.
        for memory in (accelerate.utils.get_balanced_memory(model, rooms, undivided), rooms):
            try:
                device_map = accelerate.infer_auto_device_map(model, memory, undivided, offload_buffers=True)
            except IndexError:  # accelerate 1.15 fails at a tied bias in a part that it has divided, as RoBERTa's
                continue
            if "disk" not in device_map.values():
                return DevicePlan(tuple(sorted(set(device_map.values()))), device_map)
    roomiest = max(rooms, key=free.__getitem__)
    size = sum(parameter.nbytes for parameter in model.parameters())
    return DevicePlan((roomiest,), {"": roomiest} if size <= rooms[roomiest] else {})


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that can be run, in evaluation mode."""

    model: PreTrainedModel  # without streamed weights
    layers: list[nn.Module]
    weights: Weights
    placement: Placement  # as it was chosen


def load_to_run(
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
        dtype: the merge's, in which every tensor is read, or None for the checkpoint's own.
        options: the merge's.
        where: the device, and whether to stream, which is also done where the accelerators don't hold the weights.
        running: what to run it in, by default the `default_dtype`.
        rows: whether streaming may leave out the input embeddings, of which the engine loads the rows that occur.
        beside: is shown every tensor that is read whole, on the device that it is for; from several threads.

    Raises:
        FimError: it can't be built or read.
        torch.OutOfMemoryError: an accelerator has less memory than it said.
    """
    model = _without_weights(base, running or default_dtype(base, dtype, where.device), options.trust_remote_code)
    layers = decoder_layers(model, base)
    tensors = CheckpointTensors(base, model, dtype, options, beside)
    has_rows = isinstance(model.get_input_embeddings(), nn.Embedding)
    if where.streamed and has_rows and type(model.get_output_embeddings()) is nn.Linear:
        return _streamed(model, layers, tensors, where, rows)
    devices, on_cpu = where.devices(), where.device.type == "cpu"
    plan = DevicePlan((0,), {"": 0}) if on_cpu else plan_devices(model, layers, _free(devices))
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
    """Say what `load_to_run` will choose, with the memory that is free now; None on the CPU."""
    where = placement(options)
    if where.device.type == "cpu":
        return None
    model = _without_weights(base, default_dtype(base, dtype, where.device), options.trust_remote_code)
    return plan_devices(model, decoder_layers(model, base), _free(where.devices()))


def _streamed(
    model: PreTrainedModel, layers: list[nn.Module], tensors: CheckpointTensors, where: Placement, rows: bool
) -> LoadedModel:
    """Load what is outside the decoder layers, without the head and, with `rows`, the embeddings."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    by_rows = {id(end.weight) for end in ends if end is not None} - (set() if rows else {id(ends[0].weight)})
    _fill(model, tensors, where.device, skip=by_rows | {id(p) for layer in layers for p in layer.parameters()})
    for name, parameter in model.named_parameters():
        if tensors.beside is not None and id(parameter) in by_rows:
            tensors.on(name, torch.device("cpu"))  # which shows it whole
    weights = StreamedWeights(tensors, model, where.device)
    return LoadedModel(language_model(model), layers, weights, replace(where, spread=False))


def _without_weights(base: InputModel, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Build the model on the meta device, in evaluation mode; buffers that are not in the checkpoint are real."""
    with torch.random.fork_rng(devices=[]), accelerate.init_empty_weights(include_buffers=False):
        model = without_weights(base.config, trust_remote_code, dtype=dtype)
    model.config.return_dict = True
    model.tie_weights()
    for name in outside(model):  # towers and projectors, which tokens alone don't come to
        part, _, own = name.rpartition(".")
        parameters = model.get_submodule(part)._parameters
        if own in parameters:
            parameters[own] = None
    in_float32 = model._get_dtype_plan(dtype)  # what a model insists on, as from_pretrained has it
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatch(f".{name}.", f"*.{pattern}.*") for pattern in in_float32):
            parameter.data = parameter.data.float()
    return model.eval()


def _free(devices: Sequence[torch.device]) -> list[int]:
    """Count the bytes that are free on each accelerator."""
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
    """Load all parameters but those with an id in `skip`, and the buffers.

    Modules go to their devices in `device_map`, with all that is in them, and the others to `device`.
    """

    def device_of(name: str) -> torch.device:
        return next((d for module, d in device_map.items() if f"{name}.".startswith(f"{module}.")), device)

    def load(name: str) -> None:
        put(model, name, device_of(name), tensors.on(name, device_of(name)), wanted[name].dtype)

    wanted = {n: p for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in skip}
    names: dict[int, str] = {}
    firsts = {name: names.setdefault(id(parameter), name) for name, parameter in wanted.items()}
    loading = in_threads(readers({device_of(name) for name in names.values()}), load, names.values())
    for _ in tqdm.tqdm(loading, desc="Loading the base model", unit="tensor", total=len(names), disable=quiet):
        pass
    for name, first in firsts.items():
        if first != name:  # as BERT's biases are: `put` has made a new one of the first name
            put(model, name, device_of(name), operator.attrgetter(first)(model).detach(), wanted[name].dtype)
    for name, buffer in list(model.named_buffers()):
        put(model, name, device_of(name), tensors.get(name, buffer), buffer.dtype)
    if not skip:
        model.tie_weights()


def decoder_layers(model: PreTrainedModel, base: InputModel) -> list[nn.Module]:
    """Find the modules of the base's decoder layers, by what transformers calls their tensors.

    Raises:
        FimError: transformers names its modules otherwise.
    """
    modules, layers = dict(model.named_modules(remove_duplicate=False)), []
    for layer in base.layout.layers:
        prefixes = (layer.prefix, *key_prefixes(layer.index, layer.tensors, base.loading))
        module = next((modules[p.rstrip(".")] for p in prefixes if p.rstrip(".") in modules), None)
        if module is None:
            raise FimError(
                f"{base}: expected the decoder layer {layer.prefix.rstrip('.')} in transformers' "
                f"{type(model).__name__}, found none of that name; this architecture isn't supported"
            )
        layers.append(module)
    return layers
