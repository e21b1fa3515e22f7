"""What processes of one launcher do together: they meet, they fail together, and they share a measurement's sequences.

`accelerate launch` starts the processes or, on CPUs, `torchrun`; accelerate sets up their communication.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from torch import nn
from transformers import PreTrainedModel

from mergekit_fim.errors import FimError, reason
from mergekit_fim.fisher.batched import batched_engine
from mergekit_fim.fisher.engine import FisherEngine, NotSupportedError
from mergekit_fim.fisher.samples import Samples
from mergekit_fim.fisher.weights import ResidentWeights, Weights

T = TypeVar("T")

# How long a process waits for the others. If one ends, the launcher notices and ends them all.
_PATIENCE = timedelta(days=30)


def several() -> bool:
    """Tell whether a launcher started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def accelerator() -> str | None:
    """Name the kind of accelerator that the processes use, such as `cuda`; None for the CPU."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None or parse_flag_from_env("ACCELERATE_USE_CPU") else device.type


@contextlib.contextmanager
def processes() -> Iterator[PartialState | None]:
    """Connect to the processes that this one was started with; None where it is alone.

    Raises:
        FimError: they can't reach each other.
    """
    if not several():
        yield None
        return
    try:
        state = PartialState(cpu=accelerator() is None, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise FimError(
            f"the processes can't reach each other ({reason(error)}); check the launcher's options"
        ) from error
    try:
        yield state
    finally:
        state.destroy_process_group()  # without it a process sometimes aborts at exit


class SharedError(FimError):
    """An error that all the processes know of, so that only the main one reports it."""


def in_all(state: PartialState | None, work: Callable[[], T]) -> list[T]:
    """Do `work` in every process, or without `state` in this one, and give all of them every result, [process].

    `work` may itself call `in_all`. A process that fails before that call tells the others there.

    Raises:
        SharedError: `work` failed. The message names the process, unless all failed in the same way.
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
    except Exception as error:  # of any kind: the other processes must not wait for this one
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


def in_turn(state: PartialState | None, work: Callable[[], T]) -> T:
    """Do `work` in every process, first in one of each machine: it may write to a folder that they share."""
    done: list[T] = []
    is_first = state is None or state.is_local_main_process
    in_all(state, lambda: done.append(work()) if is_first else None)
    in_all(state, lambda: None if is_first else done.append(work()))
    return done[0]


def shared_engine(state: PartialState | None, engine: FisherEngine = batched_engine) -> FisherEngine:
    """Make an engine that measures this process's share of the sequences, and returns the norms of all of them."""
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
