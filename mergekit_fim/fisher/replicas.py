"""One measurement by several accelerators of one process, each with a replica of the base and a thread of its own."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from mergekit_fim.fisher.engine import FisherEngine
from mergekit_fim.fisher.samples import Samples
from mergekit_fim.fisher.weights import ResidentWeights, Weights


@dataclass(frozen=True, eq=False)
class Replica:
    """A whole model on one device."""

    model: PreTrainedModel
    layers: list[nn.Module]
    device: torch.device


def over_replicas(replicas: Sequence[Replica], engine: FisherEngine) -> FisherEngine:
    """An engine that measures shares of the sequences on all replicas at once with `engine`.

    The first is the model that it is called with. Where there are no others it is `engine` itself.
    """
    if len(replicas) < 2:
        return engine

    def share(
        model: PreTrainedModel,
        layers: Sequence[nn.Module],
        samples: Samples,
        progress: Callable[[int], object],
        weights: Weights | None = None,
        warn: Callable[[str], object] = lambda _line: None,
    ) -> torch.Tensor:
        count = len(samples.input_ids)
        ends = [count * i // len(replicas) for i in range(len(replicas) + 1)]
        lock, lines = threading.Lock(), [list[str]() for _ in replicas]

        def step(done: int) -> None:
            with lock:
                progress(done)

        def measure(i: int) -> torch.Tensor:
            own, part = replicas[i], samples.part(ends[i], ends[i + 1])
            with _current(own.device), torch.enable_grad():  # both are each thread's own
                return engine(own.model, own.layers, part, step, ResidentWeights(), lines[i].append)

        with ThreadPoolExecutor(len(replicas)) as pool:
            norms = torch.cat(list(pool.map(measure, range(len(replicas)))))
        for line in dict.fromkeys(line for of_one in lines for line in of_one):
            warn(line)
        return norms

    return share


def _current(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context in which kernels that don't ask for a device, as some models' own, run on this one."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[None] = torch.get_device_module(device).device(device)
    return context
