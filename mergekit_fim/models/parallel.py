"""Read checkpoints in several threads at once, which keeps the buses of accelerators busy."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from mergekit.io.tasks import LoaderCache

T = TypeVar("T")
R = TypeVar("R")

# Threads that read tensors for one accelerator, as many as transformers has. One thread spends most of its time on the
# pages of the mapped files.
_READERS = 4


def readers(devices: Iterable[torch.device]) -> int:
    """Count the threads that read tensors for these devices at once.

    The CPU gets one, because its arithmetic has its own threads. A pickled checkpoint gets one, because mergekit's
    loader holds one file of it at a time, and reads it again when another file is wanted.
    """
    mapped = all(loader.index.is_safetensors for loader in LoaderCache.loaders.values())
    return max(1, _READERS * sum(device.type != "cpu" for device in devices)) if mapped else 1


def in_threads(threads: int, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield the results of `work`, in order. Each thread's `LoaderCache` is set up as this thread's is.

    Raises:
        Exception: what `work` raised for the first item that failed. Work that hasn't begun is dropped.
    """
    if threads == 1:
        yield from map(work, items)
        return
    settings = vars(LoaderCache())
    with ThreadPoolExecutor(threads, initializer=lambda: vars(LoaderCache()).update(settings)) as pool:
        yield from pool.map(work, items)
