"""The merge methods, registered with mergekit when this is imported.

The hook imports this after mergekit's registry. A mergekit that loads entry points (docs/upstream/) imports it by the
one in pyproject.toml, with the hook or without.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from mergekit.merge_methods import registry

from mergekit_fim.config.parameters import METHODS
from mergekit_fim.merging.methods import FimKron, FimMerge


class _Seams:
    """What a mergekit with the seams of docs/upstream/ calls; `hook.planner` and `hook.run_merge` wrap any other.

    Everything heavy is imported when it is called: merges by other methods don't pay for it.
    """

    def prepare(self, planner: Any, out_path: str | None = None) -> None:
        """Run the pre-pass, before the planner plans a tensor."""
        from mergekit_fim.hook.planner import prepare

        prepare(planner, out_path)

    def adapt_tasks(self, planner: Any, tasks: Sequence[Any], out_path: str) -> list[Any]:
        """Add the task that writes the report."""
        from mergekit_fim.hook.planner import adapt_tasks

        return adapt_tasks(planner, tasks, out_path)

    def card_section(self, out_path: str) -> str:
        """Make our section of the model's card, once the report is written."""
        from mergekit_fim.report.card import new_section

        return new_section(out_path)


class _FimMerge(_Seams, FimMerge):
    pass


class _FimKron(_Seams, FimKron):
    pass


def _register() -> None:
    for name in METHODS:
        with contextlib.suppress(ValueError):  # mergekit's, of a name that is registered already
            registry.register(_FimKron(name) if name == "fim_kron" else _FimMerge(name))


_register()
