"""FIM-Merging for mergekit: merge coefficients set layer by layer by Fisher information on random tokens.

Importing this package makes mergekit accept the merge methods `fim_ties`, `fim_ta` and `fim_kron`. mergekit 0.1.5
discovers no plug-ins, so `mergekit_fim.pth` (or, from Python 3.15 on, `mergekit_fim.start`, PEP 829) in site-packages
imports it when the interpreter starts. That only puts a finder on `sys.meta_path`. Later, after a module named in
`_TARGETS` is imported, ours that builds on it is imported too. Interpreters that never import mergekit pay for this
file only, so it imports nothing that Python has not loaded already.

Set the environment variable MERGEKIT_FIM_DISABLE to a non-empty value to switch the hook off.
"""

import os
import sys

__version__ = "0.2.0"

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, without importing typing
if TYPE_CHECKING:
    from typing import Any

    from mergekit_fim.api import *  # noqa: F403

_REGISTRY = "mergekit.merge_methods.registry"
# A module -> ours that is imported right after it, and does its work on being imported. (Not by a call from here: where
# ours is imported first, and in turn imports mergekit's, it isn't complete at that moment.)
_TARGETS = {
    _REGISTRY: "mergekit_fim.hook.methods",
    "mergekit_fim.merging.methods": "mergekit_fim.hook.methods",
    "mergekit.plan": "mergekit_fim.hook.planner",
    "mergekit.merge": "mergekit_fim.hook.run_merge",
}
_warned = False  # one warning is enough

# The Python API, and where each name comes from when it is first asked for: records of numbers need no torch.
_MODULES = {
    "api": ("measure", "measure_factors", "merge"),
    "coefficients": ("Mapping", "importance_scores", "merge_coefficients"),
    "config.parameters": ("FisherSettings",),
    "errors": ("FimError",),
    "measurements.compare": ("compare_factors",),
    "measurements.factors": ("FactorsFile",),
    "measurements.file": ("write_measurement",),
    "measurements.record": ("Measurement",),
    "measurements.store": ("read_measurement",),
    "tools.delta": ("measure_delta",),
    "tools.plan": ("resolve",),
}
_API = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> "Any":
    if name in _API:
        import importlib

        return getattr(importlib.import_module(f"mergekit_fim.{_API[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})


class _AfterImport:
    """Run a module's own loader, then our hook. The module stays as its own loader made it."""

    def __init__(self, loader: "Any") -> None:
        self.loader = loader

    def create_module(self, spec: "Any") -> "Any":
        return self.loader.create_module(spec)

    def exec_module(self, module: "Any") -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        # Where our methods are there before the registry, they are importing it, and the hook waits for them.
        if module.__name__ != _REGISTRY or "mergekit_fim.merging.methods" not in sys.modules:
            _run_hook(module.__name__)


class _Finder:
    def find_spec(self, fullname: str, path: "Any" = None, target: "Any" = None) -> "Any":
        if fullname not in _TARGETS:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec: Any = finder.find_spec(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _AfterImport(spec.loader)
                return spec
        return None


def _run_hook(name: str) -> None:
    """Import what follows a module in `_TARGETS`. A failure of ours never breaks mergekit."""
    try:
        __import__(_TARGETS[name])
    except Exception as error:
        global _warned
        if not _warned:
            _warned = True
            import logging

            logging.getLogger("mergekit_fim").warning(
                "fim_ties, fim_ta and fim_kron are not available: this mergekit is not one that mergekit-fim supports "
                "(>=0.1.5,<0.2); install such a version, or uninstall mergekit-fim (%s: %s)",
                type(error).__name__,
                error,
            )


def install(*, always: bool = False) -> None:
    """Hook mergekit's modules, now if they are imported already, else when they are. Calling it again does nothing.

    MERGEKIT_FIM_DISABLE is about what happens by itself: our own commands hook `always`.
    """
    is_off = os.environ.get("MERGEKIT_FIM_DISABLE") and not always
    if is_off or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in _TARGETS:
        if name in sys.modules:
            _run_hook(name)


install()
