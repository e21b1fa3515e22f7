"""One base's measurement: saved, kept or made now."""

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

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
from mergekit_fim.measurements.factors import FactorsSettings
from mergekit_fim.measurements.file import write_measurement
from mergekit_fim.measurements.record import Experts, Measurement
from mergekit_fim.measurements.store import CacheEntry, read_measurement
from mergekit_fim.models.identity import identity
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.processes.together import in_all, in_turn, shared_engine

T = TypeVar("T")

# What was measured within `measured_once`, by all that it depends on. It is kept here because the sweep, which merges
# the same models many times, reaches the pre-pass through mergekit's planner, which takes no argument of ours.
_MEASURED_ONCE: ContextVar[dict[Hashable, Any] | None] = ContextVar("measured_once", default=None)


@contextlib.contextmanager
def measured_once() -> Iterator[None]:
    """While this lasts, measure a model and its task vectors in the first merge only. The models must not change."""
    token = _MEASURED_ONCE.set({})
    try:
        yield
    finally:
        _MEASURED_ONCE.reset(token)


def once(key: Hashable, measure: Callable[[], T]) -> T:
    """Call `measure`, or within `measured_once` return the result of the first call with this key."""
    results = _MEASURED_ONCE.get()
    if results is None:
        return measure()
    if key not in results:
        results[key] = measure()
    return cast(T, results[key])


@dataclass(frozen=True)
class Measured:
    """A measurement, and where it comes from, in words; empty if it was made now."""

    measurement: Measurement
    origin: str = ""

    def of(self, base: InputModel) -> "Measured | None":
        """This measurement, if it is of this base; a copy of the base may lie elsewhere."""
        own, its = identity(base), self.measurement
        return None if its.model.difference(own) else replace(self, measurement=replace(its, model=own))


def saved_measurement(settings: Settings, bases: Iterable[InputModel], options: MergeOptions) -> Measured | None:
    """Read the measurement that the config's `fisher` names; None if it names none.

    Raises:
        FimError: it can't be read, is of none of the bases, or was made with other settings than the config's.
    """
    if settings.saved is None:
        return None
    saved = read_measurement(settings.saved, options.transformers_cache)
    check_as_set(settings, saved.settings, settings.saved)
    differences = {str(base): saved.model.difference(identity(base)) for base in bases}
    if all(differences.values()):
        base, difference = next(iter(differences.items()))
        raise FimError(
            f"fisher: {settings.saved} is a measurement of {saved.model.id}, which differs from the base {base} in its "
            f"{difference}; measure the base with `mergekit-fim fisher`, or leave `fisher` out"
        )
    return Measured(saved, f"from {settings.saved}")


def check_as_set(settings: Settings, saved: FisherSettings | FactorsSettings, where: str) -> None:
    """Check that what is saved was measured with what the config sets; `where` is its file.

    Raises:
        FimError: it wasn't.
    """
    for name in sorted(settings.given):
        wanted, has = getattr(settings.fisher, name), getattr(saved, name)
        if wanted != has:
            raise FimError(
                f"fisher: {where} was measured with {name} {has}, but the config sets fisher_{name} to {wanted}; leave "
                "out one of the two"
            )


def measured(
    open_base: Callable[[], InputModel],
    settings: FisherSettings,
    dtype: str | None,
    options: MergeOptions,
    *,
    cache: bool = True,
    beside: Beside | None = None,
    state: PartialState | None = None,
) -> Measured:
    """Get a base's measurement on random tokens, kept or made now, the same in every process.

    Args:
        open_base: opens the base; called once in each process, first in one of each machine, because it may merge an
            adapter into a folder that they share.
        settings: how many tokens, which, and which labels.
        dtype: what its weights are read as, like in a merge with this `dtype`; None for the checkpoint's own.
        options: mergekit's, for the device and for loading.
        cache: take a measurement that was kept, and keep one that is made.
        beside: see `load_to_run`; only called if the base is measured now.
        state: the processes that share the work.

    Raises:
        FimError: the model can't be opened or measured; a `SharedError` if all the processes know of it.
    """
    LoaderCache().setup(options)
    base = in_turn(state, open_base)
    is_main = state is None or state.is_main_process

    def look() -> tuple[CacheEntry, torch.dtype, Measurement | None] | None:
        check_measurable(base, settings)
        if not is_main:  # the cache is on the main process's machine, and it chooses the dtype by timing
            return None
        reading, running = dtypes(base, dtype, options)
        entry = CacheEntry(identity(base), settings, (str(reading), str(running)))
        return entry, running, entry.read() if cache else None

    looked = in_all(state, look)[0]
    assert looked is not None
    entry, running, kept = looked
    if kept is not None:
        return Measured(kept, f"kept from an earlier measurement: {entry.path}")

    engine, reference = shared_engine(state), shared_engine(state, autograd_engine)
    measure = partial(measure_checkpoint, engine=engine, reference=reference, running=running, beside=beside)
    parts = in_all(state, lambda: measure(base, settings, dtype, options))
    # Each has the norms of all, but only the experts that it reached itself.
    layers = (
        replace(layer, experts=Experts.together(its.layers[index].experts for its in parts))
        for index, layer in enumerate(parts[0].layers)
    )
    made = Measurement.of(replace(parts[0], layers=tuple(layers)), entry.model)
    if cache and is_main:
        entry.write(partial(write_measurement, made))
    return Measured(made)
