"""Note which experts of a mixture the random tokens reach: the others have no Fisher information of their own."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from mergekit_fim.measurements.record import Experts


class ReachedExperts:
    """Watches the experts of decoder layers while these run, by any engine and however often.

    It sees transformers' mixtures, in which one module holds all experts of a layer as tensors of three axes, and is
    told which of them each token goes to. Where it isn't told so (Llama 4, JetMoE), nothing is known of the experts.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Watch the decoder layers of a model."""
        self._counts = [{part: count for part in layer.modules() if (count := _experts(part))} for layer in layers]
        self._chosen: dict[nn.Module, set[int]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note every choice while this lasts."""
        with contextlib.ExitStack() as stack:
            for part, count in ((part, count) for counts in self._counts for part, count in counts.items()):
                handle = part.register_forward_pre_hook(partial(self._note, count), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _note(self, count: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32):
                self._chosen.setdefault(module, set()).update(i for i in value.unique().tolist() if 0 <= i < count)
                return

    def of_layer(self, index: int) -> Experts | None:
        """Say what was seen of one layer; None where that is nothing."""
        count, idle = 0, []
        for part, own in self._counts[index].items():
            if part in self._chosen:
                idle += [count + i for i in range(own) if i not in self._chosen[part]]
                count += own
        return Experts(count, tuple(idle)) if count else None


def _experts(module: nn.Module) -> int:
    """Count the experts that a module holds; 0 where it doesn't seem to be one of experts."""
    counts = {len(parameter) for parameter in module.parameters(recurse=False) if parameter.ndim == 3}
    return counts.pop() if len(counts) == 1 and "Experts" in type(module).__name__ else 0
