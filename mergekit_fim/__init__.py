"""FIM-Merging for mergekit: merge coefficients set layer by layer by Fisher information on random tokens.

Importing this package makes mergekit accept the merge methods `fim_ties`, `fim_ta` and `fim_kron`. mergekit 0.1.5
discovers no plug-ins, so `mergekit_fim.pth` (or, from Python 3.15 on, `mergekit_fim.start`, PEP 829) in site-packages
does that at interpreter start-up. All that happens then is that one finder is put on `sys.meta_path`. When, much later,
mergekit's own modules named in `_TARGETS` have been imported, ours that build on them are imported too. Interpreters
that never import mergekit pay for this file only, so it imports nothing that Python has not loaded already.

Set the environment variable MERGEKIT_FIM_DISABLE to a non-empty value to switch the hook off.
"""

import os
import sys

__version__ = "0.2.0"

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, without importing typing
if TYPE_CHECKING:
    from typing import Any

    from mergekit_fim.api import *  # noqa: F403

# mergekit's module -> ours that is imported right after it, and does its work on being imported. (Not by a call from
# here: where ours is imported first, and in turn imports mergekit's, it isn't complete at that moment.)
_TARGETS = {
    "mergekit.merge_methods.registry": "mergekit_fim.hook.methods",
    # Where this is imported first, it imports the registry: what it is needed for has to wait until it is complete.
    "mergekit_fim.merging.methods": "mergekit_fim.hook.methods",
    "mergekit.plan": "mergekit_fim.hook.planner",
    "mergekit.merge": "mergekit_fim.hook.run_merge",
}
_warned = False
_under_way: "set[str]" = set()  # which of these are being imported

# The Python API, and where each name comes from when it is first asked for: records of numbers need no torch.
_API = {
    "FactorsFile": "measurements.factors",
    "FimError": "errors",
    "FisherSettings": "config.parameters",
    "Mapping": "coefficients",
    "Measurement": "measurements.record",
    "compare_factors": "measurements.compare",
    "importance_scores": "coefficients",
    "measure": "api",
    "measure_delta": "api",
    "measure_factors": "api",
    "merge": "api",
    "merge_coefficients": "coefficients",
    "read_measurement": "measurements.store",
    "resolve": "api",
    "write_measurement": "measurements.file",
}


def __getattr__(name: str) -> "Any":
    if name in _API:
        import importlib

        return getattr(importlib.import_module(f"mergekit_fim.{_API[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})


class _AfterImport:
    """A loader that runs mergekit's own loader, then our hook. It leaves the module as the original loader made it."""

    def __init__(self, loader: "Any") -> None:
        self.loader = loader

    def create_module(self, spec: "Any") -> "Any":
        return self.loader.create_module(spec)

    def exec_module(self, module: "Any") -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        _under_way.add(module.__name__)
        try:
            self.loader.exec_module(module)
        finally:
            _under_way.discard(module.__name__)
        if _TARGETS[module.__name__] != "mergekit_fim.hook.methods" or "mergekit_fim.merging.methods" not in _under_way:
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
    """Follow up the import of one of mergekit's modules; never let a failure of ours break mergekit."""
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
    if os.environ.get("MERGEKIT_FIM_DISABLE") and not always:
        return
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in _TARGETS:
        if name in sys.modules:
            _run_hook(name)


install()
