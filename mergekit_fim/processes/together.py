"""One measurement by several processes, on one machine or many: each takes some of the sequences.

The processes are started by `accelerate launch` or, on CPUs, by `torchrun`; accelerate sets up their communication.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel

from mergekit_fim.errors import FimError, reason
from mergekit_fim.fisher.batched import batched_engine
from mergekit_fim.fisher.engine import FisherEngine, NotSupportedError
from mergekit_fim.fisher.samples import Samples
from mergekit_fim.fisher.weights import ResidentWeights, Weights

T = TypeVar("T")

# How long a process waits for the others' shares. One that has ended is noticed by the launcher, which ends them all.
_PATIENCE = timedelta(days=30)


def several() -> bool:
    """Whether a launcher has started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def processes() -> Iterator[PartialState | None]:
    """The processes that this one was started with, or None where it is alone.

    Raises:
        FimError: they can't reach each other.
    """
    if not several():
        yield None
        return
    no_accelerator = torch.accelerator.current_accelerator(check_available=True) is None
    try:
        cpu = no_accelerator or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
        state = PartialState(cpu=cpu, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise FimError(
            f"the processes can't reach each other ({reason(error)}); check the launcher's options"
        ) from error
    try:
        yield state
    finally:
        state.destroy_process_group()  # without it a process aborts at exit now and then


class SharedError(FimError):
    """An error that all the processes know of, so that the main one alone reports it."""


def in_all(state: PartialState | None, work: Callable[[], T]) -> list[T]:
    """Do `work` in every process: the results of all, in their order, which are sent between them.

    `work` may itself do something `in_all`: a process that fails before it comes to that tells the others there.

    Raises:
        SharedError: it failed in one of them, which is named, or in all of them in the same way.
        NotSupportedError: raised by one of them.
        torch.OutOfMemoryError: likewise.
    """
    if state is None:
        return [work()]
    outcome: tuple[T | None, str, str]
    try:
        outcome = work(), "", ""
    except SharedError:
        raise
    except Exception as error:  # whatever it is, the other processes must not wait for this one
        outcome = None, type(error).__name__, reason(error)
    try:
        outcomes = gather_object([outcome])
    except RuntimeError as error:
        raise FimError(f"another process ended before it was done ({reason(error)}); nothing was written") from error
    for rank, (_, name, line) in enumerate(outcomes):
        if name == NotSupportedError.__name__:
            raise NotSupportedError
        if name == torch.OutOfMemoryError.__name__:
            raise torch.OutOfMemoryError(line)
        if name:
            everywhere = all(outcome[1:] == (name, line) for outcome in outcomes)
            raise SharedError(line if everywhere else f"process {rank} of {state.num_processes}: {line}")
    return [result for result, _, _ in outcomes]


def shared_engine(state: PartialState | None, engine: FisherEngine = batched_engine) -> FisherEngine:
    """An engine that measures its process's share of the sequences with `engine` and returns those of all."""
    if state is None:
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
        with state.split_between_processes(list(range(count))) as mine:
            part = samples.part(mine[0], mine[-1] + 1) if mine else None

        def measure() -> tuple[torch.Tensor, list[str]]:
            lines: list[str] = []
            if part is None:
                return torch.zeros(0, len(layers), dtype=torch.float64), lines
            scale = count / len(mine)
            steps, where = lambda n: progress(round(n * scale)), weights or ResidentWeights()
            return engine(model, layers, part, steps, where, lines.append), lines

        results = in_all(state, measure)
        for line in dict.fromkeys(line for _, lines in results for line in lines):
            warn(line)
        return torch.cat([norms for norms, _ in results])

    return share
