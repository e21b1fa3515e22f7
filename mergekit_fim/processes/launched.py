"""Work that a launcher started several times over: the processes share the pre-pass, and the main one merges.

`accelerate launch` or `torchrun` starts them, as with `mergekit-fim fisher`; alone, nothing here has any effect.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from mergekit.options import MergeOptions

from mergekit_fim.errors import FimError
from mergekit_fim.processes.together import SharedError, in_all, processes, several

T = TypeVar("T")


@dataclass
class _Launch:
    """What is under way: among which processes, and whether the others of this machine still wait for its first one."""

    state: PartialState | None
    others_wait: bool = False


_UNDER_WAY: ContextVar[_Launch | None] = ContextVar("under_way", default=None)


class _ShareIsDone(BaseException):
    """A process that isn't the main one has nothing left to do; no handler of exceptions on the way is to see it."""


def together() -> PartialState | None:
    """The processes that share what is under way; None where this one is alone with it."""
    launch = _UNDER_WAY.get()
    return None if launch is None else launch.state


def is_main() -> bool:
    """Whether this process merges, prints and writes."""
    state = together()
    return state is None or state.is_main_process


def by_all(whole: Callable[[], T], share: Callable[[], object]) -> T | None:
    """Do something in the main process, and what the others have to do for it in them. All end with its status.

    Args:
        whole: such as a merge.
        share: such as the same merge, of which nothing is to be seen: it is left at `end_of_share`.

    Returns:
        What `whole` returns; None in the other processes.

    Raises:
        FimError: in the main process alone, whichever of them it came from.
        SystemExit: in the others, with status 1, where something failed.
    """
    if _UNDER_WAY.get() is not None:
        if is_main():
            return whole()
        until_shared(share)
        return None
    with processes() as state:
        if state is None:
            return whole()
        token = _UNDER_WAY.set(_Launch(state, others_wait=state.is_local_main_process))

        found: list[T] = []

        def work() -> None:
            if state.is_main_process:
                found.append(whole())
            else:
                until_shared(share)
            inputs_are_there()

        try:
            with _ends_in_order(), contextlib.nullcontext() if state.is_main_process else _silence():
                if not state.is_local_main_process:
                    meet()  # `inputs_are_there`
                in_all(state, work)
                return found[0] if found else None
        except SharedError:
            if state.is_main_process:
                raise
            sys.exit(1)
        finally:
            _UNDER_WAY.reset(token)


def check_shared() -> None:
    """Check that no other process does the same whole merge beside this one.

    Raises:
        FimError: a launcher started several, and nothing has made them share the work.
    """
    if _UNDER_WAY.get() is None and several():
        raise FimError(
            "several processes were started, and each would write the whole merge to the same folder; expected "
            "mergekit-fim merge, which shares the work, or one process"
        )


def inputs_are_there() -> None:
    """To be called when a machine's first process has opened the models, adapters merged: its others may start."""
    launch = _UNDER_WAY.get()
    if launch is not None and launch.others_wait:
        launch.others_wait = False
        meet()


def meet() -> None:
    """Wait for all processes.

    Raises:
        SharedError: one of them has failed.
    """
    in_all(together(), lambda: None)


def end_of_share() -> None:
    """To be called when the pre-pass is done: the processes that aren't the main one leave the merge here."""
    if not is_main():
        raise _ShareIsDone


def until_shared(work: Callable[[], object]) -> None:
    """Do something, up to `end_of_share`."""
    with contextlib.suppress(_ShareIsDone):
        work()


@contextlib.contextmanager
def apart(options: MergeOptions) -> Iterator[MergeOptions]:
    """While this lasts each process of a launcher works for itself, on its own accelerator; the first alone logs.

    Returns:
        mergekit's options for this process.
    """
    rank = os.environ.get("RANK", "0") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    own: dict[str, Any] = {}
    if rank is not None:
        own["quiet"] = options.quiet or rank != "0"
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true"):
            own |= {"device": f"{accelerator.type}:{os.environ.get('LOCAL_RANK', '0')}", "multi_gpu": False}
    token = _UNDER_WAY.set(_Launch(None))
    try:
        with contextlib.nullcontext() if rank in (None, "0") else _silence():
            yield options.model_copy(update=own)
    finally:
        _UNDER_WAY.reset(token)


def options_of_process(options: MergeOptions) -> MergeOptions:
    """mergekit's options for what processes share: each has its own accelerator, and the main one alone prints."""
    state = together()
    if state is None:
        return options
    own: dict[str, Any] = {"quiet": options.quiet or not state.is_main_process}
    if state.device.type != "cpu":
        own |= {"device": str(state.device), "multi_gpu": False}  # the others' accelerators are theirs
    return options.model_copy(update=own)


@contextlib.contextmanager
def _ends_in_order() -> Iterator[None]:
    """A launcher that lost one process sends SIGTERM to the others, on which Python would leave all as it is."""
    if threading.current_thread() is not threading.main_thread():  # Python allows it there alone
        yield
        return

    def leave(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What mergekit, transformers and this package log is said by the main process."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
