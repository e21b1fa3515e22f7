"""Make mergekit's executor for `--multi-gpu` lose nothing of a merge by this package's methods.

In mergekit 0.1.5 its workers put their results into a queue, from which a thread takes them as long as the workers run.
What is in the queue when the last worker ends is lost, and made once more afterwards, on the CPU. Then tensors are
written twice. Or, where what they are made of is gone, the merge ends in an error ("Base input is not present"), or
goes on without a tensor that is optional.
"""

import functools
import queue
import threading
from collections.abc import Sequence
from typing import Any

from mergekit.multigpu_executor import MultiGPUExecutor

from mergekit_fim.errors import FimError
from mergekit_fim.merging.output_folder import ReplaceModel


class _AllTaken(threading.Event):
    """An event that isn't seen to have happened as long as something is in a queue."""

    def __init__(self, results: "queue.Queue[Any]") -> None:
        super().__init__()
        self._results = results

    def is_set(self) -> bool:
        """Whether it was set, and all the results are taken."""
        return super().is_set() and self._results.empty()


def deliver_all() -> None:
    """Make the executors of our merges take all the results; those of other merges stay as they are."""
    original = MultiGPUExecutor.__init__
    if hasattr(original, "mergekit_fim"):
        return

    @functools.wraps(original)
    def init(self: Any, targets: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        original(self, targets, *args, **kwargs)
        if any(isinstance(target, ReplaceModel) for target in targets):
            results, done = (getattr(self, name, None) for name in ("task_completion_queue", "done_event"))
            if not isinstance(results, queue.Queue) or not isinstance(done, threading.Event):
                raise FimError(
                    "--multi-gpu: expected the executor of mergekit 0.1.5, found another one, which may lose tensors; "
                    "merge with --cuda, or on the CPU"
                )
            self.done_event = _AllTaken(results)

    init.mergekit_fim = True  # type: ignore[attr-defined]
    MultiGPUExecutor.__init__ = init
