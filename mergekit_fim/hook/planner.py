"""mergekit's planner runs the pre-pass. The package's `__init__` imports this after `mergekit.plan`.

This lists all that the package uses of mergekit 0.1.5 beyond its public names. Each part acts for our methods only. A
mergekit with the seams of docs/upstream/ calls `hook.methods` itself, and then nothing is wrapped here.

- `MergePlanner.plan_to_disk` is wrapped, here. Before it, when no output folder is made yet, the config is normalised
  to modules, slices and sources, the pre-pass runs on it, and the planner's `arch_info` is exchanged for one that has
  every tensor of the models (`models.completion`). After it, the last task is made to write the report, too. Guard:
  `_PLANNER_ATTRIBUTES` in `hook.methods`, which does all this. (Plans in memory fail in mergekit 0.1.5.)
- `mergekit.merge.run_merge` is wrapped, in `hook.run_merge`: of several processes one merges, and the others help it to
  measure; and our section is added to the card that mergekit writes last. A caller that imported the function before
  this package gets the card without it.
- `MultiGPUExecutor.__init__` is wrapped, in `merging.executor`, at the first merge with `--multi-gpu`. Guard: there.
- `mergekit.merge._model_out_config` is called, in `tools.plan`, which plans a merge as `run_merge` does. Guard: there.
"""

import functools
from typing import Any

from mergekit import merge_methods, plan
from mergekit.merge_methods import MergeMethod

from mergekit_fim.config.parameters import METHODS

# What docs/upstream/ proposes for mergekit's own `MergeMethod`.
HAS_SEAMS = all(hasattr(MergeMethod, name) for name in ("prepare", "adapt_tasks", "card_section"))


def _hook_planner() -> None:
    planner = plan.MergePlanner
    if HAS_SEAMS or hasattr(planner.plan_to_disk, "mergekit_fim"):
        return
    to_disk = planner.plan_to_disk

    @functools.wraps(to_disk)
    def plan_to_disk(self: Any, out_path: str) -> list[Any]:
        if self.config.merge_method not in METHODS:
            return to_disk(self, out_path)
        ours: Any = merge_methods.get(self.config.merge_method)
        ours.prepare(self, out_path)
        return ours.adapt_tasks(self, to_disk(self, out_path), out_path)

    plan_to_disk.mergekit_fim = True  # type: ignore[attr-defined]
    planner.plan_to_disk = plan_to_disk


_hook_planner()
