"""Give the engine a model's weights: from the model, or from the checkpoint when they are needed."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from mergekit.architecture import WeightInfo
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import nn
from transformers import PreTrainedModel

from mergekit_fim.errors import FimError
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.models.layout import names_of, tensor_names
from mergekit_fim.models.parallel import in_threads, readers

# (a tensor of the base, by mergekit's definition, and its values as the merge reads them) -> whatever is done with them
Beside = Callable[[WeightInfo, torch.Tensor], object]


def put(module: nn.Module, name: str, device: torch.device, value: torch.Tensor, dtype: torch.dtype) -> None:
    """Set a module's parameter or buffer, without emptying the allocator's cache each time, as accelerate would."""
    set_module_tensor_to_device(module, name, device, value=value, dtype=dtype, clear_cache=False)


class CheckpointTensors:
    """A checkpoint's tensors by the names in transformers' state dict, each read when asked for."""

    def __init__(
        self, base: InputModel, model: PreTrainedModel, dtype: str | None, options: MergeOptions, beside: Beside | None
    ) -> None:
        """Read `base` for `model`, in the merge's `dtype` or, if None, the checkpoint's own."""
        self._base, self._dtype, self._options, self.beside = base, dtype, options, beside
        present = (tensor for tensor in base.layout.all_tensors() if tensor.name not in base.absent)
        planned = {name: tensor for tensor in present for name in names_of(tensor)}
        self._tensors: dict[str, WeightInfo | str] = {}  # what the merge reads; or the key of what it reads otherwise
        for names in tensor_names(model, base.layout, base.loading):
            known: WeightInfo | str | None = next((planned[name] for name in names if name in planned), None)
            known = known or next((name for name in names if name in base.loading.sources), None)
            if known is not None:
                self._tensors |= dict.fromkeys(names, known)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a tensor, on the CPU.

        Raises:
            FimError: the checkpoint lacks it.
        """
        LoaderCache().setup(self._options)  # one per thread, and autograd's are not the main one
        base, known, dtype = self._base, self._tensors[name], self._dtype
        tensor = base.load_key(known, dtype) if isinstance(known, str) else base.load(known, dtype)
        if tensor is None:
            raise FimError(f"{base}: the checkpoint lacks the parameter {name}; download or save the model again")
        return tensor

    def get(self, name: str, default: torch.Tensor) -> torch.Tensor:
        """Read a tensor; `default` where the model has it and the checkpoint doesn't."""
        return self[name] if name in self._tensors else default

    def on(self, name: str, device: torch.device) -> torch.Tensor:
        """Read a tensor onto a device, and show it there to `beside`, so that it goes over the bus once."""
        tensor, known = self[name].to(device), self._tensors[name]
        if self.beside is not None and not isinstance(known, str):  # else the merge reads it in other parts
            self.beside(known, tensor)
        return tensor


class ResidentWeights:
    """The weights of a model that is in memory."""

    def layer(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Do nothing: a decoder layer has its weights."""
        return contextlib.nullcontext()

    def rows(self, module: nn.Module, index: torch.Tensor | slice) -> torch.Tensor:
        """Take rows of the weight of an embedding or the output head, as stored, on the module's device."""
        weight: Any = module.weight
        rows: torch.Tensor = weight.detach()[index]
        return rows


class StreamedWeights:
    """Weights that come from the checkpoint when needed and go when done: one decoder layer is in memory.

    On the CPU, tensors of safetensors files that need no conversion are mapped, not copied.
    """

    def __init__(self, tensors: CheckpointTensors, model: nn.Module, device: torch.device) -> None:
        """Stream the weights of `model`, which runs on `device`."""
        self._tensors, self._device = tensors, device
        self._names = {module: name for name, module in model.named_modules()}

    @contextlib.contextmanager
    def layer(self, module: nn.Module) -> Iterator[None]:
        """Load the weights of a decoder layer, in the dtype that the model runs in, and let them go at the end."""

        def load(wanted: tuple[nn.Module, str, nn.Parameter]) -> None:
            part, name, parameter = wanted
            values = self._tensors.on(f"{self._names[part]}.{name}", self._device)
            put(part, name, self._device, values, parameter.dtype)

        wanted = [(part, *named) for part in module.modules() for named in part.named_parameters(recurse=False)]
        try:
            for _ in in_threads(readers([self._device]), load, wanted):
                pass
            yield
        finally:
            for part, name, parameter in wanted:
                setattr(part, name, parameter)

    def rows(self, module: nn.Module, index: torch.Tensor | slice) -> torch.Tensor:
        """Read rows of the weight of an embedding or the output head, as stored, and no others."""
        weight = self._tensors[f"{self._names[module]}.weight"]
        rows = weight[index.cpu() if isinstance(index, torch.Tensor) else index]
        return rows.to(self._device)


Weights = ResidentWeights | StreamedWeights


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Put `forward(original, ...)` in the place of the module's forward pass."""
    own = module.__dict__.get("forward")
    module.forward = partial(forward, module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
