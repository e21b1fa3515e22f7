"""mergekit's `run_merge` learns to share the pre-pass among processes, and to write our section of the card.

The package's `__init__` imports this after mergekit's. `hook.planner` says what else of mergekit is changed.
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
        config, options = given.get("merge_config"), given.get("options")
        if getattr(config, "merge_method", None) not in METHODS:
            return original(*args, **kwargs)
        from mergekit_fim.processes import launched

        def whole() -> Any:
            result = original(*args, **kwargs)
            if getattr(options, "write_model_card", False):
                write_section(given["out_path"])
            return result

        def share() -> None:
            original(**(given | {"options": launched.options_of_process(given["options"])}))

        return launched.by_all(whole, share)

    run_merge.mergekit_fim = True  # type: ignore[attr-defined]
    merge.run_merge = run_merge


_hook_run_merge()
