"""A merge that a launcher started in several processes: the main one merges, and the others do jobs for it.

`accelerate launch` or `torchrun` starts them. A process that is alone is the main one.
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
from functools import partial
from typing import Any

from accelerate import PartialState
from mergekit.options import MergeOptions

from mergekit_fim.errors import FimError
from mergekit_fim.processes.together import SharedError, accelerator, in_all, processes, several

Job = Callable[[], object]


@dataclass(frozen=True)
class _Launch:
    """The processes that share a merge, in `state`; None where each works for itself."""

    state: PartialState | None


# Kept here because mergekit's `run_merge` and planner, which call the pre-pass, take no argument of ours. It is set
# while `by_all` or `apart` lasts.
_LAUNCH: ContextVar[_Launch | None] = ContextVar("launch", default=None)


def sharing() -> PartialState | None:
    """Find the processes that share the merge under way; None where this one is alone with it."""
    launch = _LAUNCH.get()
    return None if launch is None else launch.state


def by_all(merge: Callable[[], None]) -> None:
    """Merge in the main process, while the others do the jobs that it gives them. All end with the same status.

    Raises:
        FimError: in the main process only, whichever process failed.
        SystemExit: in the others, with status 1, where one failed.
    """
    if _LAUNCH.get() is not None:  # a merge within a merge: `run_merge` within ours
        merge()
        return
    with processes() as state:
        if state is None:
            merge()
            return
        with _under_way(_Launch(state), logs=state.is_main_process), _ends_in_order():
            if state.is_main_process:
                _lead(merge)
            else:
                _follow(state)


def _lead(merge: Callable[[], None]) -> None:
    try:
        merge()
    except SharedError:  # the others know of it
        raise
    except Exception:
        with contextlib.suppress(FimError):  # they have ended
            give(partial(sys.exit, 1))
        raise
    give(None)


def _follow(state: PartialState) -> None:
    """Do the main process's jobs until it gives None."""
    try:
        while (job := in_all(state, _no_job)[0]) is not None:
            job()
    except SharedError:
        sys.exit(1)


def _no_job() -> Job | None:
    return None


def give(job: Job | None) -> None:
    """Give the other processes a job, which must be picklable: it is something that this process does with them."""
    state = sharing()
    if state is not None:
        in_all(state, lambda: job)


def check_shared() -> None:
    """Check that no other process does the same whole merge.

    Raises:
        FimError: a launcher started several, and nothing has made them share the work.
    """
    if _LAUNCH.get() is None and several():
        raise FimError(
            "several processes were started, and each would write the whole merge to the same folder; expected "
            "mergekit-fim merge, which shares the work, or one process"
        )


@contextlib.contextmanager
def apart(options: MergeOptions) -> Iterator[MergeOptions]:
    """Let each process work for itself, on its own accelerator, by the options that it gets. Only the first logs."""
    is_first = not several() or os.environ.get("RANK", "0") == "0"
    kind = accelerator() if several() else None
    device = None if kind is None else f"{kind}:{os.environ.get('LOCAL_RANK', '0')}"
    with _under_way(_Launch(None), logs=is_first):
        yield _own_options(options, is_first, device)


def options_of_process(options: MergeOptions) -> MergeOptions:
    """Make mergekit's options for this process's part of the pre-pass."""
    state = sharing()
    if state is None:
        return options
    return _own_options(options, state.is_main_process, None if state.device.type == "cpu" else str(state.device))


def _own_options(options: MergeOptions, is_first: bool, device: str | None) -> MergeOptions:
    """Make one process's options: only the first one prints, and each keeps to its own accelerator, if it has one."""
    own: dict[str, Any] = {"quiet": options.quiet or not is_first}
    if device is not None:
        own |= {"device": device, "multi_gpu": False}
    return options.model_copy(update=own)


@contextlib.contextmanager
def _under_way(launch: _Launch, *, logs: bool) -> Iterator[None]:
    """Keep the launch while this lasts, and log nothing in a process that isn't to."""
    # The loggers of mergekit, transformers and this package have handlers of their own: this switch is for all of them.
    token, level = _LAUNCH.set(launch), logging.root.manager.disable
    if not logs:
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)
        _LAUNCH.reset(token)


@contextlib.contextmanager
def _ends_in_order() -> Iterator[None]:
    """Clean up on SIGTERM, which a launcher that lost one process sends to the others. Python alone would not."""
    if threading.current_thread() is not threading.main_thread():  # only there Python allows it
        yield
        return

    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
