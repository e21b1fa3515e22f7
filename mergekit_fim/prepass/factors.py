"""One model's Kronecker factors: saved, kept from an earlier time, or recorded now."""

import atexit
import functools
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from accelerate import PartialState
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.errors import FimError
from mergekit_fim.fisher.factors import record_factors
from mergekit_fim.fisher.measure import check_measurable, dtypes
from mergekit_fim.fisher.samples import Samples, draw_samples
from mergekit_fim.measurements.factors import FactorsFile, FactorsSettings, write_factors
from mergekit_fim.measurements.store import CacheEntry
from mergekit_fim.models.identity import identity
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.processes.together import in_all

LOG = logging.getLogger("mergekit_fim")


@functools.cache
def _temporary_folder() -> str:
    """Where what isn't kept is for as long as this process lives."""
    folder = tempfile.TemporaryDirectory(prefix="mergekit-fim-")
    atexit.register(folder.cleanup)
    return folder.name


@dataclass(frozen=True)
class MeasuredFactors:
    """Factors, and where they come from in words; empty where they were recorded just now."""

    file: FactorsFile
    origin: str = ""


def measured_factors(
    open_model: Callable[[], InputModel],
    settings: FisherSettings,
    dtype: str | None,
    options: MergeOptions,
    *,
    kind: str = "inputs",
    text: str = "random",
    samples: Samples | None = None,
    saved: Iterable[FactorsFile] = (),
    cache: bool = True,
    state: PartialState | None = None,
) -> MeasuredFactors:
    """A model's factors, in every process the same file; the main process records them while the others wait.

    Args:
        open_model: opens the model; called once in each process, first in one of each machine.
        settings: how many tokens, which, and which labels; without gradients labels don't count.
        dtype: what its weights are read as, as a merge with this `dtype` does; None for the checkpoint's own.
        options: mergekit's, for the device and for loading.
        kind: `inputs`, or `both` inputs and gradients.
        text: what the tokens are: `random`.
        samples: the tokens, which all models of a merge must share; by default random ones of this model's vocabulary.
        saved: files of which the one that is of this model is taken.
        cache: use factors that were kept, and keep these; else they are in a temporary folder.
        state: the processes that share the work.

    Raises:
        FimError: the model can't be opened or run, or what is saved of it was recorded otherwise; a `SharedError` where
            all the processes know of it.
    """
    LoaderCache().setup(options)
    opened: list[InputModel] = []
    settings = settings if kind == "both" else replace(settings, labels="inputs")

    def find() -> tuple[str, str] | None:
        if state is None or state.is_local_main_process:
            opened.append(open_model())
            check_measurable(opened[0], settings)
        if state is not None and not state.is_main_process:
            return None
        known = opened[0].text_config.vocab_size
        drawn = samples or draw_samples(settings, known)
        if int(drawn.input_ids.max()) >= known:
            raise FimError(f"{opened[0]}: expected tokens of its vocabulary of {known}, found larger ones; lower it")
        reading, running = dtypes(opened[0], dtype, options)
        tokens = hashlib.sha256(str(drawn.input_ids.tolist()).encode()).hexdigest()[:16]
        wanted = FactorsSettings(
            **vars(settings), text=text, kind=kind, tokens=tokens, dtype=str(running).removeprefix("torch.")
        )
        own = identity(opened[0])
        for file in saved:
            if not file.identity.difference(own):
                _check_saved(file, wanted)
                return file.path, f"from {file.path}"
        entry = CacheEntry(own, wanted, (str(reading), str(running)))
        if cache and _is_kept(entry, wanted):
            return entry.path, f"kept from an earlier recording: {entry.path}"
        made = record_factors(opened[0], settings, drawn, kind, dtype, options, running=running)

        content = (own, replace(wanted, dtype=made.dtype), made.factors, made.lists)
        if cache:
            try:
                os.makedirs(os.path.dirname(entry.path), exist_ok=True)
                write_factors(entry.path, *content)
                return entry.path, ""
            except (OSError, FimError) as error:
                LOG.warning("the factors are not kept for the next merge: %s", error)
        path = os.path.join(_temporary_folder(), os.path.basename(entry.path))
        write_factors(path, *content)
        return path, ""

    # What the main process found holds for all of them.
    found = in_all(state, find)[0]
    assert found is not None
    path, origin = found
    files: list[FactorsFile] = []
    in_all(state, lambda: files.append(FactorsFile.open(path, check=False)))
    return MeasuredFactors(files[0], origin)


def _check_saved(file: FactorsFile, wanted: FactorsSettings) -> None:
    """Check that factors of the model serve for what is wanted.

    Raises:
        FimError: they were recorded of other tokens, labels or kind.
    """
    names = ("tokens", "text", "kind", "labels")[: 4 if wanted.kind == "both" else 2]
    differing = [name for name in names if getattr(file.settings, name) != getattr(wanted, name)]
    if differing:
        described = (
            f"{its.kind} of {its.samples} × {its.seq_len} {its.text} tokens, seed {its.seed}, labels {its.labels}"
            for its in (wanted, file.settings)
        )
        raise FimError(
            f"{file.path}: expected {next(described)}, the same for all models, found {next(described)} (other "
            f"{' and '.join(differing)}); record them again with `mergekit-fim fisher --factors`, and --vocab-size "
            "where the models' vocabularies differ"
        )


def _is_kept(entry: CacheEntry, wanted: FactorsSettings) -> bool:
    """Whether the cache has these factors, whole."""
    if not os.path.exists(entry.path):
        return False
    try:
        kept = FactorsFile.open(entry.path)
        if not kept.identity.difference(entry.model) and replace(kept.settings, dtype=wanted.dtype) == wanted:
            return True
        raise FimError(f"{entry.path} is of another model")
    except FimError as error:
        LOG.warning("the cache can't be used, the factors are recorded anew: %s", error)
        return False
