"""One model's Kronecker factors: kept from an earlier time, or recorded now."""

import atexit
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable

from accelerate import PartialState
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.errors import FimError
from mergekit_fim.fisher.factors import record_factors
from mergekit_fim.fisher.measure import check_measurable, dtypes
from mergekit_fim.fisher.samples import Samples, draw_samples
from mergekit_fim.measurements.factors import FactorsFile, FactorsSettings
from mergekit_fim.measurements.store import CacheEntry
from mergekit_fim.models.identity import identity
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.processes.together import in_all


@functools.cache
def _temporary_folder() -> str:
    """Make a folder for what isn't kept; it goes when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="mergekit-fim-")
    atexit.register(folder.cleanup)
    return folder.name


def settings_on(settings: FisherSettings, samples: Samples, dtype: str = "") -> FactorsSettings:
    """Make the settings of factors on these tokens."""
    tokens = hashlib.sha256(str(samples.input_ids.tolist()).encode()).hexdigest()[:16]
    return FactorsSettings(settings.samples, settings.seq_len, settings.seed, tokens, dtype)


def measured_factors(
    open_model: Callable[[], InputModel],
    settings: FisherSettings,
    dtype: str | None,
    options: MergeOptions,
    *,
    vocab_size: int | None = None,
    cache: bool = True,
    state: PartialState | None = None,
) -> FactorsFile:
    """Find a model's factors, or record them: the main process does so while the others wait.

    See `measured` for the other arguments.

    Args:
        vocab_size: how many tokens the random ones are drawn from, which all models of a merge must share; by default
            this model's.
        cache: use factors that were kept, and keep these; else they are in a temporary folder.

    Raises:
        FimError: the model can't be opened or run; a `SharedError` where all the processes know of it.
    """

    def find() -> FactorsFile | None:
        if state is not None and not state.is_main_process:
            return None
        LoaderCache().setup(options)
        model = open_model()
        check_measurable(model, settings)
        known = model.text_config.vocab_size
        if vocab_size is not None and vocab_size > known:
            raise FimError(f"{model}: expected tokens of its vocabulary of {known}, found {vocab_size}; lower it")
        samples = draw_samples(settings, vocab_size or known)
        reading, running = dtypes(model, dtype, options)
        wanted = settings_on(settings, samples, str(running).removeprefix("torch."))
        entry = CacheEntry(identity(model), wanted, (str(reading), str(running)))
        path = entry.path
        if cache and (kept := entry.kept(FactorsFile.open)):
            return kept.model_copy(update={"origin": f"kept from an earlier recording: {path}"})
        made, inputs = record_factors(model, entry.model, wanted, samples, dtype, options, running=running)
        if not (cache and entry.write(lambda path: made.write(path, inputs))):
            path = os.path.join(_temporary_folder(), os.path.basename(path))
            made.write(path, inputs)
        return made.model_copy(update={"path": path})

    found = in_all(state, find)[0]
    assert found is not None
    return found
