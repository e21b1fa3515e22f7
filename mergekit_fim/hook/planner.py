"""mergekit's planner learns to run the pre-pass. The package's `__init__` imports this when the planner was imported.

A mergekit with the seams of docs/upstream/ calls `hook.methods` instead, and then nothing is wrapped here, nor in
`hook.run_merge`.

All that this package uses of mergekit 0.1.5 beyond its public names:

- `MergePlanner.normalize_config` and `.plan_to_disk` are wrapped, here, and act for this package's methods only. After
  the first, everything in the config is modules -> slices -> sources, with the options, the architecture and the
  output's config at hand, and no output folder made yet: the pre-pass runs there, and the planner's `arch_info` is
  exchanged for one that has every tensor of the models (`models.completion`). To the tasks of the second is added
  the one that keeps the report beside the merged model. Guard: `_PLANNER_ATTRIBUTES`.
- `mergekit.merge.run_merge` is wrapped, in `hook.run_merge`, and acts for these methods only: of several
  processes one merges, and the others have a part in the pre-pass; and mergekit writes the model's card when its tasks
  have run, and our section comes after it. Whoever took the function from there before this
  package was imported gets the card without it.
- `MultiGPUExecutor.__init__` is wrapped, in `merging.executor`, at the first merge by one of them with
  `--multi-gpu`, and acts for such merges only. Guard: there.
- `mergekit.merge._model_out_config`, in `tools.plan`, which plans a merge as `run_merge` does. Guard: there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from mergekit import plan
from mergekit.merge_methods import MergeMethod

from mergekit_fim.config.parameters import METHODS
from mergekit_fim.errors import FimError

_PLANNER_ATTRIBUTES = ("config", "arch_info", "options", "out_model_config")
# What docs/upstream/ proposes for mergekit's own `MergeMethod`.
HAS_SEAMS = all(hasattr(MergeMethod, name) for name in ("prepare", "adapt_tasks", "card_section"))


def prepare(planner: Any, out_path: str | None = None) -> None:
    """Do everything that comes before the first tensor is planned, for a mergekit with the seams.

    Args:
        planner: mergekit's, with the config as the user wrote it.
        out_path: the folder that is going to be written.
    """
    from mergekit_fim.processes import launched

    if out_path is not None and not _is_plan_only(planner):
        launched.check_shared()
        _check_output(planner, out_path)
    _normalize_and_run(planner, planner.normalize_config)


def adapt_tasks(planner: Any, tasks: Sequence[Any], out_path: str) -> list[Any]:
    """mergekit's tasks and the one that keeps the report beside the merged model; what was found is shown."""
    from mergekit_fim.merging.executor import deliver_all
    from mergekit_fim.report.record import with_report
    from mergekit_fim.report.table import show

    if _is_plan_only(planner):
        return list(tasks)
    if planner.options.multi_gpu:
        deliver_all()
    show(planner.fim_pre_pass, quiet=planner.options.quiet)
    return with_report(tasks, planner.fim_pre_pass, out_path)


def _is_plan_only(planner: Any) -> bool:
    """Whether `tools.plan` has said so: then no folder is checked or made, and nothing is shown."""
    return getattr(planner, "fim_plan_only", False)


def _check_output(planner: Any, out_path: str) -> None:
    from mergekit_fim.merging.output_folder import check_output
    from mergekit_fim.processes import launched

    if launched.is_main():
        check_output(out_path, planner.config)


def _hook_planner() -> None:
    planner = plan.MergePlanner
    if HAS_SEAMS or hasattr(planner.normalize_config, "mergekit_fim"):
        return
    normalize, to_disk = planner.normalize_config, planner.plan_to_disk

    @functools.wraps(normalize)
    def normalize_config(self: Any) -> None:
        if self.config.merge_method in METHODS:
            _normalize_and_run(self, functools.partial(normalize, self))
        else:
            normalize(self)

    @functools.wraps(to_disk)
    def plan_to_disk(self: Any, out_path: str) -> list[Any]:
        if self.config.merge_method not in METHODS or _is_plan_only(self):
            return to_disk(self, out_path)
        _check_output(self, out_path)
        return adapt_tasks(self, to_disk(self, out_path), out_path)

    normalize_config.mergekit_fim = True  # type: ignore[attr-defined]
    planner.normalize_config = normalize_config
    planner.plan_to_disk = plan_to_disk


def _normalize_and_run(planner: Any, normalize: Callable[[], None]) -> None:
    missing = [name for name in _PLANNER_ATTRIBUTES if not hasattr(planner, name)]
    if missing:
        raise FimError(
            f"mergekit-fim supports mergekit>=0.1.5,<0.2, whose planner has the attributes {', '.join(missing)}; "
            "this one lacks them: install a supported mergekit"
        )
    # Everything heavy: merges by other methods don't pay for it.
    from mergekit_fim.prepass.run import check, run
    from mergekit_fim.processes import launched

    launched.inputs_are_there()
    settings = check(planner.config, planner.arch_info, planner.options)
    # The caller's own config stays as it was: coefficients written into it would be taken for set by hand next time.
    planner.config = planner.config.model_copy(deep=True)
    normalize()
    # The executor brings every tensor to the device that merges it. With --read-to-gpu it would first be read to the
    # first one, or be brought back to the CPU in between.
    planner.options = planner.options.model_copy(update={"read_to_gpu": False})
    planner.fim_pre_pass = run(planner.config, settings, planner.arch_info, planner.options, planner.out_model_config)
    planner.arch_info = planner.fim_pre_pass.base.architecture  # with what mergekit's own leaves out
    launched.end_of_share()


_hook_planner()
