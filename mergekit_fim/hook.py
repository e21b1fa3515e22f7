"""The one touch point with mergekit that isn't its public surface: the planner learns to run the pre-pass.

The package's `__init__` imports this module when mergekit's planner has been imported. Two methods of `MergePlanner`
are wrapped, and act for `fim_ties` and `fim_ta` only:

- `normalize_config`: afterwards everything in the config is modules -> slices -> sources, with the options, the
  architecture and the output's config at hand, and no output folder made yet. The pre-pass runs there.
- `plan_to_disk`: adds the tasks that keep the report beside the merged model. Within `plan_only`, where merges of
  every method end, it hands over the finished plan instead.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from mergekit import plan

from mergekit_fim.config.parameters import METHODS
from mergekit_fim.errors import FimError

_planning_only: ContextVar[bool] = ContextVar("planning_only", default=False)
_PLANNER_ATTRIBUTES = ("config", "arch_info", "options", "out_model_config")


class Planned(Exception):
    """Ends a merge within `plan_only`: mergekit's planner when its plan was complete, and its tasks."""

    def __init__(self, planner: Any, tasks: list[Any]) -> None:
        super().__init__("planned")
        self.planner = planner
        self.tasks = tasks


@contextlib.contextmanager
def plan_only() -> Iterator[None]:
    """Within this, a merge raises `Planned` where its first tensor would be merged; no output folder is made."""
    token = _planning_only.set(True)
    try:
        yield
    finally:
        _planning_only.reset(token)


def _hook_planner() -> None:
    planner = plan.MergePlanner
    if hasattr(planner.normalize_config, "mergekit_fim"):
        return
    normalize, to_disk = planner.normalize_config, planner.plan_to_disk

    @functools.wraps(normalize)
    def normalize_config(self: Any) -> None:
        if self.config.merge_method in METHODS:
            _normalize_and_measure(self, normalize)
        else:
            normalize(self)

    @functools.wraps(to_disk)
    def plan_to_disk(self: Any, out_path: str) -> list[Any]:
        if self.config.merge_method in METHODS and not _planning_only.get():
            from mergekit_fim.merging.output_folder import check_output

            check_output(out_path, self.config)
        targets: list[Any] = to_disk(self, out_path)
        if self.config.merge_method in METHODS:
            from mergekit_fim.report import with_report

            targets = with_report(targets, self.fim_pre_pass, out_path)
        if _planning_only.get():
            raise Planned(self, targets)
        return targets

    normalize_config.mergekit_fim = True  # type: ignore[attr-defined]
    planner.normalize_config = normalize_config
    planner.plan_to_disk = plan_to_disk


def _normalize_and_measure(planner: Any, normalize: Any) -> None:
    missing = [name for name in _PLANNER_ATTRIBUTES if not hasattr(planner, name)]
    if missing:
        raise FimError(
            f"mergekit-fim supports mergekit>=0.1.5,<0.2, whose planner has the attributes {', '.join(missing)}; "
            "this one lacks them: install a supported mergekit"
        )
    # Everything heavy is imported here, so that merges by other methods don't pay for it.
    from mergekit_fim import prepass, report

    settings = prepass.check_config(planner.config, planner.options)
    prepass.check_modules(planner.config, planner.arch_info)
    prepass.check_tokenizers(planner.config, planner.options)
    # The caller's own config stays as it was: coefficients written into it would be taken for set by hand next time.
    planner.config = planner.config.model_copy(deep=True)
    normalize(planner)
    planner.fim_pre_pass = prepass.run(
        planner.config, settings, planner.arch_info, planner.options, planner.out_model_config
    )
    if not _planning_only.get():
        report.show(planner.fim_pre_pass, quiet=planner.options.quiet)


_hook_planner()
