"""One base's measurement: saved, kept from an earlier time, or made now. No other module decides which of the three."""

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.config.settings import Settings
from mergekit_fim.errors import FimError
from mergekit_fim.fisher.engine import autograd_engine
from mergekit_fim.fisher.measure import check_measurable, dtypes, measure_checkpoint
from mergekit_fim.fisher.weights import Beside
from mergekit_fim.measurements.record import Experts, FisherMeasurement, Measurement
from mergekit_fim.measurements.store import CacheEntry, read_measurement
from mergekit_fim.models.identity import identity
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.processes.together import in_all, shared_engine

T = TypeVar("T")

# What merges of the same models share within `measured_once`: by all that it hangs on, what was measured.
_SHARED: ContextVar[dict[Hashable, Any] | None] = ContextVar("shared", default=None)


@contextlib.contextmanager
def measured_once() -> Iterator[None]:
    """While this lasts, merges of the same models take measurements and task vectors from the first of them.

    The models are not to change meanwhile.
    """
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def once(key: Hashable, measure: Callable[[], T]) -> T:
    """What `measure` finds, within `measured_once` that of the first call with this key."""
    shared = _SHARED.get()
    if shared is None:
        return measure()
    if key not in shared:
        shared[key] = measure()
    found: T = shared[key]
    return found


@dataclass(frozen=True)
class Measured:
    """A measurement, and where it comes from in words; empty where it was made just now."""

    measurement: Measurement
    origin: str = ""


def saved_measurement(settings: Settings, bases: Iterable[InputModel], options: MergeOptions) -> Measured | None:
    """What the config's `fisher` names, if it is a measurement of one of the bases and as the config wants it.

    Raises:
        FimError: it can't be read, is of another model, or was made with other settings.
    """
    if settings.saved is None:
        return None
    found = read_measurement(settings.saved, options.transformers_cache)
    for name in sorted(settings.given):
        wanted, has = getattr(settings.fisher, name), getattr(found.fisher.settings, name)
        if wanted != has:
            raise FimError(
                f"fisher: {settings.saved} was measured with {name} {has}, but the config sets fisher_{name} to "
                f"{wanted}; leave out one of the two"
            )
    differences = {str(base): found.model.difference(identity(base)) for base in bases}
    if all(differences.values()):
        base, difference = next(iter(differences.items()))
        raise FimError(
            f"fisher: {settings.saved} is a measurement of {found.model.id}, which differs from the base {base} in its "
            f"{difference}; measure the base with `mergekit-fim fisher`, or leave `fisher` out"
        )
    return Measured(found, f"from {settings.saved}")


def measured(
    open_base: Callable[[], InputModel],
    settings: FisherSettings,
    dtype: str | None,
    options: MergeOptions,
    *,
    saved: Measured | None = None,
    cache: bool = True,
    beside: Beside | None = None,
    state: PartialState | None = None,
) -> Measured:
    """A base model's measurement on random tokens, in every process the same.

    Args:
        open_base: opens the base model; called once in each process, first in one of each machine, because opening a
            model may merge an adapter into a folder that they share.
        settings: how many tokens, which, and which labels.
        dtype: what its weights are read as, as a merge with this `dtype` does; None for the checkpoint's own.
        options: mergekit's, for the device and for loading.
        saved: taken where it is of this base.
        cache: use a measurement that was kept, and keep this one.
        beside: is shown every tensor that is read whole, if the base is measured now; from several threads.
        state: the processes that share the work.

    Raises:
        FimError: the model can't be opened or measured; a `SharedError` where all the processes know of it.
    """
    LoaderCache().setup(options)
    opened: list[InputModel] = []

    def look() -> tuple[CacheEntry, torch.dtype, Measured | None] | None:
        if state is None or state.is_local_main_process:
            opened.append(open_base())
            check_measurable(opened[0], settings)
        if state is not None and not state.is_main_process:
            return None
        own = identity(opened[0])
        reading, running = dtypes(opened[0], dtype, options)
        entry = CacheEntry(own, settings, (str(reading), str(running)))
        if saved is not None and not saved.measurement.model.difference(own):
            return entry, running, replace(saved, measurement=replace(saved.measurement, model=own))
        kept = entry.read() if cache else None
        known = None if kept is None else Measured(kept, f"kept from an earlier measurement: {entry.path}")
        return entry, running, known

    # What the main process found holds for all of them: the dtype is timed, and the cache is its machine's.
    found = in_all(state, look)[0]
    assert found is not None
    entry, running, known = found
    in_all(state, lambda: None if opened else opened.append(open_base()))
    if known is not None:
        return known

    def measure() -> FisherMeasurement:
        return measure_checkpoint(
            opened[0],
            settings,
            dtype,
            options,
            engine=shared_engine(state),
            reference=shared_engine(state, autograd_engine),
            running=running,
            beside=beside,
        )

    made = Measured(Measurement.of(_together(in_all(state, measure)), entry.model))
    if cache and (state is None or state.is_main_process):
        entry.write(made.measurement)
    return made


def _together(found: Sequence[FisherMeasurement]) -> FisherMeasurement:
    """What several processes measured, each with the norms of all and the experts that its own sequences reached."""
    layers = (
        replace(layer, experts=Experts.together(its.layers[index].experts for its in found))
        for index, layer in enumerate(found[0].layers)
    )
    return replace(found[0], layers=tuple(layers))
