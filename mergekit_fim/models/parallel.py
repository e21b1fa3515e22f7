"""Reading checkpoints in several threads at once, which is what keeps accelerators' buses busy."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from mergekit.io.tasks import LoaderCache

T = TypeVar("T")
R = TypeVar("R")

# Threads that read tensors for one accelerator. One spends most of its time on the pages of the mapped files; with as
# many transformers loads a model.
_READERS = 4


def readers(devices: Iterable[torch.device]) -> int:
    """How many threads are to read tensors for these devices at once.

    One for the CPU, whose arithmetic has threads of its own, and where a checkpoint is pickled: mergekit's loader holds
    one file of it at a time, and reads it anew for whoever wants another.
    """
    mapped = all(loader.index.is_safetensors for loader in LoaderCache.loaders.values())
    return max(1, _READERS * sum(device.type != "cpu" for device in devices)) if mapped else 1


def in_threads(threads: int, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The results of `work`, in order. In threads, mergekit's loaders are set up as in this one.

    Raises:
        Exception: what `work` raised first, by the order of the items; what hasn't begun is left.
    """
    if threads == 1:
        yield from map(work, items)
        return
    settings = vars(LoaderCache())
    with ThreadPoolExecutor(threads, initializer=partial(_set_up, settings)) as pool:
        yield from pool.map(work, items)


def _set_up(settings: dict[str, Any]) -> None:
    vars(LoaderCache()).update(settings)
