"""Where and in which dtype the base model runs, and its loading: whole onto accelerators, or layer by layer as it runs.

The model is built without weights from its config. Its tensors are read by mergekit's own loader, exactly as the merge
reads them: any file format, sharded or not, adapters applied.
"""

import copy
import fnmatch
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import accelerate
import torch
import tqdm
import transformers
from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map
from mergekit.architecture import WeightInfo
from mergekit.common import dtype_from_name
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import nn
from transformers import PreTrainedModel

from mergekit_fim.errors import FimError
from mergekit_fim.fisher.weights import ResidentWeights, StreamedWeights, Weights, put
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.models.layout import tensor_names

# On the CPU a 16-bit dtype must be this many times faster than float32 to be worth its lost digits. The known CPUs are
# far from it on either side: 0.002 and 0.6 without matrix units, 3 and more with them.
_WORTH_IT = 1.5

# What an accelerator needs beside the weights, for activations and chunks of logits, in bytes and as a part of the
# weights. Where it turns out to be more, the measurement starts again with streamed weights.
_RESERVE, _RESERVED_PART = 1 << 30, 0.1


@dataclass(frozen=True)
class Placement:
    """Where a model is run."""

    device: torch.device  # or the first of several
    spread: bool  # over all visible accelerators
    streamed: bool  # weights are brought to the device layer by layer


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

    def __init__(self, base: InputModel, model: PreTrainedModel, dtype: str | None, options: MergeOptions) -> None:
        """Read `base` for `model`, in the merge's `dtype` or, if None, the checkpoint's own."""
        self._base, self._dtype, self._options = base, dtype, options
        planned = {
            name: tensor
            for tensor in base.layout.all_tensors()
            for name in (tensor.name, *(tensor.aliases or ()))
            if tensor.name not in base.absent
        }
        self._tensors: dict[str, WeightInfo | str] = {}  # what the merge reads; the name of what it has otherwise
        for aliases in tensor_names(model, base.layout):
            known: WeightInfo | str | None = next((planned[a] for a in aliases if a in planned), None)
            known = known or next((a for a in aliases if a in base.loading.sources), None)
            if known is not None:
                self._tensors |= dict.fromkeys(aliases, known)

    def __getitem__(self, name: str) -> torch.Tensor:
        LoaderCache().setup(self._options)  # one per thread, and autograd's are not the main one
        known = self._tensors[name]
        if isinstance(known, str):
            tensor = self._base.load_key(known, self._dtype)
        else:
            tensor = self._base.load(known, self._dtype)
        if tensor is None:
            raise FimError(f"{self._base}: the checkpoint lacks the parameter {name}; download or save the model again")
        return tensor

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
    beside: Iterator[object] | None = None,
) -> LoadedModel:
    """Make the base model ready to be run.

    Args:
        base: the model.
        dtype: the merge's dtype, in which every tensor is read, or None for the checkpoint's own.
        options: the merge's options.
        where: the device, and whether to stream. Without `streamed`, weights are streamed all the same to an
            accelerator that they don't fit on.
        running: what to run it in; by default the `running_dtype` for the dtype in which it is read.
        beside: takes a step before each decoder layer is first read.

    Raises:
        FimError: it can't be built or read.
    """
    running = running or running_dtype(dtype_from_name(dtype) or base.stored_dtype(), where.device)
    model = _without_weights(base, running, options.trust_remote_code)
    layers = decoder_layers(model, base)
    tensors = CheckpointTensors(base, model, dtype, options)
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    plain = type(ends[1]) is nn.Linear and isinstance(ends[0], nn.Embedding)  # of which single rows can be used
    streamed = where.streamed and plain
    device_map: dict[str, Any] | None = None
    if not streamed and where.device.type != "cpu":
        device_map = _fitting(model, layers, where)
        streamed = device_map is None
    where = replace(where, streamed=streamed, spread=where.spread and not streamed)
    if streamed:
        by_layer = {id(p) for layer in layers for p in layer.parameters()}
        kept = by_layer | {id(end.weight) for end in ends if end is not None}
        _fill(model, tensors, lambda _name: where.device, skip=kept)
        weights: Weights = StreamedWeights(tensors, model, where.device, beside)
    else:
        for _ in beside or ():
            pass
        spread = device_map or {"": where.device}
        names = sorted(spread, key=len, reverse=True)
        total = len(list(model.parameters()))
        with tqdm.tqdm(total=total, desc="Loading the base model", unit="tensor", disable=options.quiet) as progress:
            _fill(
                model,
                tensors,
                lambda name: torch.device(
                    next(spread[n] for n in names if n == "" or name == n or name.startswith(n + "."))
                ),
                progress=progress.update,
            )
        if device_map is not None and len(set(device_map.values())) > 1:
            accelerate.dispatch_model(model, device_map, main_device=next(iter(device_map.values())))
        weights = ResidentWeights()
    return LoadedModel(model, layers, weights, where)


def _without_weights(base: InputModel, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The model on the meta device, in evaluation mode; buffers that are not part of the checkpoint are real."""
    config = copy.deepcopy(base.config)
    config.return_dict = True
    with torch.random.fork_rng(devices=[]), accelerate.init_empty_weights(include_buffers=False):
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, dtype=dtype
        )
    model.tie_weights()
    # As from_pretrained does: what a model insists on keeping in float32.
    patterns = set(model._keep_in_fp32_modules_strict or ())
    patterns |= set(model._keep_in_fp32_modules or ()) if dtype is torch.float16 else set()
    for name, parameter in model.named_parameters():
        if dtype.itemsize < 4 and any(fnmatch.fnmatch(f".{name}.", f"*.{pattern}.*") for pattern in patterns):
            parameter.data = parameter.data.float()
    return model.eval()


def _fitting(model: PreTrainedModel, layers: list[nn.Module], where: Placement) -> dict[str, Any] | None:
    """accelerate's device map of the whole model on the accelerator or accelerators, or None if it doesn't fit."""
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    if not where.spread:  # accelerate would take some memory on every accelerator to ask for what is free
        free, _ = torch.get_device_module(where.device).mem_get_info(where.device)
        return {"": where.device} if needed * (1 + _RESERVED_PART) + _RESERVE < free else None
    sizes = {index: size for index, size in get_max_memory().items() if index != "cpu"}
    classes = sorted({type(layer).__name__ for layer in layers})
    limits = {index: max(0, int(size * (1 - _RESERVED_PART)) - _RESERVE) for index, size in sizes.items()}
    balanced = get_balanced_memory(model, max_memory=limits | {"cpu": 0}, no_split_module_classes=classes)
    device_map: dict[str, Any] = infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=classes)
    if {"cpu", "disk"} & {str(place) for place in device_map.values()}:
        return None
    return {name: torch.device(where.device.type, int(place)) for name, place in device_map.items()}


def _fill(
    model: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    device_of: Callable[[str], torch.device],
    *,
    skip: set[int] = frozenset(),  # type: ignore[assignment]
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Load all parameters but those in `skip`, and put the buffers on their devices."""
    filled: dict[int, torch.Tensor] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in skip:
            is_tied = id(parameter) in filled  # as BERT's biases are: `put` makes a new one
            put(model, name, device_of(name), filled[id(parameter)] if is_tied else tensors[name], parameter.dtype)
            filled[id(parameter)] = operator.attrgetter(name)(model).detach()
            progress()
    for name, buffer in list(model.named_buffers()):
        put(model, name, device_of(name), tensors.get(name, buffer), buffer.dtype)
    if not skip:
        model.tie_weights()


def decoder_layers(model: PreTrainedModel, base: InputModel) -> list[nn.Module]:
    """The modules of the base's decoder layers, found by the names that mergekit gives their tensors.

    Raises:
        FimError: transformers names its modules otherwise.
    """
    try:
        return [model.get_submodule(layer.prefix.rstrip(".")) for layer in base.layout.layers]
    except AttributeError:
        raise FimError(
            f"{base}: expected the decoder layer {base.layout.layers[0].prefix.rstrip('.')} in transformers' "
            f"{type(model).__name__}, found none of that name; this architecture isn't supported"
        ) from None
