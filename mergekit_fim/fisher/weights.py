"""Where the engine finds a model's weights: in the model, or brought from the checkpoint when they are needed."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from mergekit_fim.models.parallel import in_threads, readers


def put(module: nn.Module, name: str, device: torch.device, value: torch.Tensor, dtype: torch.dtype) -> None:
    """Set a module's parameter or buffer; accelerate would empty the allocator's cache each time."""
    set_module_tensor_to_device(module, name, device, value=value, dtype=dtype, clear_cache=False)


class Tensors(Protocol):
    """A checkpoint's tensors by their names in a model's state dict."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """One of them, on the CPU."""
        ...

    def on(self, name: str, device: torch.device) -> torch.Tensor:
        """One of them, whole, on a device."""
        ...


class Weights(Protocol):
    """How the weights of a model's parts are had."""

    def layer(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """A context in which a decoder layer has its weights, in the dtype that the model runs in."""
        ...

    def rows(self, module: nn.Module, index: torch.Tensor | slice) -> torch.Tensor:
        """Rows of the weight of an embedding or the output head, as stored, on the device that the module runs on."""
        ...


class ResidentWeights:
    """The weights of a model that is in memory."""

    def layer(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Nothing to do."""
        return contextlib.nullcontext()

    def rows(self, module: nn.Module, index: torch.Tensor | slice) -> torch.Tensor:
        """Rows of the module's weight."""
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.detach()[index]


class StreamedWeights:
    """Weights that come from the checkpoint when needed and go when done: what is in memory is one decoder layer.

    On the CPU, tensors of safetensors files that need no conversion are mapped, not copied.
    """

    def __init__(self, tensors: Tensors, model: nn.Module, device: torch.device) -> None:
        """Stream weights.

        Args:
            tensors: the weights by their names in the model's state dict.
            model: the model.
            device: where it runs.
        """
        self._tensors, self._device = tensors, device
        self._names = {module: name for name, module in model.named_modules()}

    @contextlib.contextmanager
    def layer(self, module: nn.Module) -> Iterator[None]:
        """Load the weights of a decoder layer, and let them go at the end."""
        loaded: list[tuple[nn.Module, str, nn.Parameter]] = []

        def load(wanted: tuple[nn.Module, str, str, nn.Parameter]) -> None:
            part, name, whole_name, parameter = wanted
            put(part, name, self._device, self._tensors.on(whole_name, self._device), parameter.dtype)
            loaded.append((part, name, parameter))

        wanted = [
            (part, name, f"{prefix}.{name}", parameter)
            for prefix, part in module.named_modules(prefix=self._names[module])
            for name, parameter in part.named_parameters(recurse=False)
        ]
        try:
            for _ in in_threads(readers([self._device]), load, wanted):
                pass
            yield
        finally:
            for part, name, parameter in loaded:
                setattr(part, name, parameter)

    def rows(self, module: nn.Module, index: torch.Tensor | slice) -> torch.Tensor:
        """Rows of the module's weight, the only ones that are read."""
        weight = self._tensors[f"{self._names[module]}.weight"]
        rows = weight[index.cpu() if isinstance(index, torch.Tensor) else index]
        return rows.to(self._device)


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward(original, ...)` in place of the module's forward pass."""
    own = module.__dict__.get("forward")
    original = module.forward
    module.forward = partial(forward, original)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
