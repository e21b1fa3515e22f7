"""mergekit's `run_merge` shares the measurement among processes, and adds our section to the card.

The package's `__init__` imports this after `mergekit.merge`. `hook.planner` says what else of mergekit is changed.
"""

import functools
import inspect
from typing import Any

from mergekit import merge

from mergekit_fim.config.parameters import METHODS
from mergekit_fim.hook.planner import HAS_SEAMS
from mergekit_fim.report.card import write_section


def _hook_run_merge() -> None:
    original = merge.run_merge
    if HAS_SEAMS or hasattr(original, "mergekit_fim"):
        return

    @functools.wraps(original)
    def run_merge(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        if getattr(given.get("merge_config"), "merge_method", None) not in METHODS:
            return original(*args, **kwargs)
        from mergekit_fim.processes import launched  # heavy: merges by other methods don't pay for it

        def whole() -> None:
            original(*args, **kwargs)
            if given["options"].write_model_card:
                write_section(given["out_path"])

        return launched.by_all(whole)

    run_merge.mergekit_fim = True  # type: ignore[attr-defined]
    merge.run_merge = run_merge


_hook_run_merge()
