"""The merge methods, registered with mergekit when this is imported.

The package's `__init__` imports this after mergekit's registry. A mergekit that loads entry points (docs/upstream/)
imports it by the one in pyproject.toml.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from mergekit.merge_methods import registry

from mergekit_fim.config.parameters import METHODS
from mergekit_fim.errors import FimError
from mergekit_fim.merging.methods import FimKron, FimMerge

_PLANNER_ATTRIBUTES = ("config", "arch_info", "options", "out_model_config")


class _Seams:
    """The seams that docs/upstream/ proposes for mergekit. For any other mergekit `hook.planner` calls them.

    Each function imports what it calls, which is heavy: merges by other methods don't pay for it.
    """

    def prepare(self, planner: Any, out_path: str | None = None) -> None:
        """Do all that comes before the first tensor is planned.

        Args:
            planner: mergekit's, with the config as the user wrote it.
            out_path: the folder that will be written; None for a merge in memory.

        Raises:
            FimError: the merge can't be done.
        """
        from mergekit_fim.merging.output_folder import check_output
        from mergekit_fim.prepass.run import check, run
        from mergekit_fim.processes import launched

        if out_path is not None and not _is_plan_only(planner):
            launched.check_shared()
            check_output(out_path, planner.config)
        missing = [name for name in _PLANNER_ATTRIBUTES if not hasattr(planner, name)]
        if missing:
            raise FimError(
                f"mergekit-fim supports mergekit>=0.1.5,<0.2, whose planner has the attributes {', '.join(missing)}; "
                "this one lacks them: install a supported mergekit"
            )
        settings = check(planner.config, planner.arch_info, planner.options)
        # The caller's config stays as it is: the next merge would take coefficients in it for set by hand.
        planner.config = planner.config.model_copy(deep=True)
        planner.normalize_config()
        # The executor brings each tensor to the device that merges it. --read-to-gpu would read all to the first one.
        planner.options = planner.options.model_copy(update={"read_to_gpu": False})
        found = run(planner.config, settings, planner.arch_info, planner.options, planner.out_model_config)
        planner.fim_pre_pass = found
        planner.arch_info = found.base.architecture  # with the tensors that mergekit's own leaves out

    def adapt_tasks(self, planner: Any, tasks: Sequence[Any], out_path: str) -> list[Any]:
        """Show what the pre-pass found, and make the last of mergekit's tasks write the report."""
        from mergekit_fim.merging.executor import deliver_all
        from mergekit_fim.report.record import with_report
        from mergekit_fim.report.table import show

        if _is_plan_only(planner):
            return list(tasks)
        if planner.options.multi_gpu:
            deliver_all()
        show(planner.fim_pre_pass, quiet=planner.options.quiet)
        return with_report(tasks, planner.fim_pre_pass)

    def card_section(self, out_path: str) -> str:
        """Make our section of the model's card, once the report is written."""
        from mergekit_fim.report.card import new_section

        return new_section(out_path)


def _is_plan_only(planner: Any) -> bool:
    """Tell whether `tools.plan` plans, for which no folder is checked or made, and nothing is shown."""
    return getattr(planner, "fim_plan_only", False)


class _FimMerge(_Seams, FimMerge):
    pass


class _FimKron(_Seams, FimKron):
    pass


for _name in METHODS:
    with contextlib.suppress(ValueError):  # mergekit's, for a name that is registered already
        registry.register(_FimKron(_name) if _name == "fim_kron" else _FimMerge(_name))
