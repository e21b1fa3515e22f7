"""The Python API, importable from `mergekit_fim` itself; docs/python.md has examples of all of it."""

import functools
import os
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_fim.coefficients import Mapping, importance_scores, merge_coefficients
from mergekit_fim.config.file import validated
from mergekit_fim.config.parameters import KRON_SAMPLES, KRON_SEQ_LEN, FisherSettings
from mergekit_fim.errors import FimError
from mergekit_fim.files import copy_whole
from mergekit_fim.measurements.compare import compare_factors
from mergekit_fim.measurements.factors import FactorsFile
from mergekit_fim.measurements.file import write_measurement
from mergekit_fim.measurements.record import Measurement
from mergekit_fim.measurements.store import read_measurement
from mergekit_fim.models.inputs import open_model
from mergekit_fim.prepass.factors import measured_factors
from mergekit_fim.prepass.measured import measured
from mergekit_fim.tools.delta import measure_delta
from mergekit_fim.tools.plan import resolve
from mergekit_fim.tools.whole import merge_whole

__all__ = [
    "FactorsFile",
    "FimError",
    "FisherSettings",
    "Mapping",
    "Measurement",
    "compare_factors",
    "importance_scores",
    "measure",
    "measure_delta",
    "measure_factors",
    "merge",
    "merge_coefficients",
    "read_measurement",
    "resolve",
    "write_measurement",
]


def measure(
    model: str | os.PathLike[str],
    settings: FisherSettings | None = None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    options: MergeOptions | None = None,
    cache: bool = True,
) -> Measurement:
    """Measure the Fisher information of a model's decoder layers on random tokens (arXiv 2603.21705).

    Args:
        model: a folder or a name on the Hub, with an adapter as in mergekit: `model+adapter`.
        settings: number and length of the sequences, seed and labels.
        dtype: what its weights are read as, as a merge with this `dtype` does; by default the checkpoint's own.
        revision: branch, tag or commit of a model on the Hub.
        options: mergekit's, for the device and for loading; by default on the CPU.
        cache: use a measurement that was kept, and keep this one.

    Raises:
        FimError: the model can't be opened or measured.
    """
    options = options or MergeOptions(quiet=True)
    opened = functools.partial(open_model, os.fspath(model), revision, options)
    return measured(opened, settings or FisherSettings(), dtype, options, cache=cache).measurement


def measure_factors(
    model: str | os.PathLike[str],
    path: str | os.PathLike[str],
    settings: FisherSettings | None = None,
    *,
    vocab_size: int | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    options: MergeOptions | None = None,
    cache: bool = True,
) -> FactorsFile:
    """Record the Kronecker factors of a model's linear layers on random tokens in a file, `path`.

    `settings` are by default fim_kron's own; labels have no effect. `vocab_size` is how many tokens they are drawn
    from: the smallest of a merge's models, where these differ; by default this model's. The rest is as for `measure`.

    Raises:
        FimError: the model can't be opened or run, or the file not be written.
    """
    if vocab_size is not None and vocab_size < 1:
        raise FimError(f"vocab_size: expected a whole number of at least 1, found {vocab_size}")
    options, settings = options or MergeOptions(quiet=True), settings or FisherSettings(KRON_SAMPLES, KRON_SEQ_LEN)
    opened = functools.partial(open_model, os.fspath(model), revision, options)
    factors = measured_factors(opened, settings, dtype, options, vocab_size=vocab_size, cache=cache)
    copy_whole(factors.path, os.fspath(path))
    return FactorsFile.open(path, check=False)


def merge(
    config: MergeConfiguration | dict[str, Any], out_path: str | os.PathLike[str], options: MergeOptions | None = None
) -> None:
    """Merge, by mergekit's own `run_merge`; what is written is a whole model or nothing.

    Args:
        config: the merge config.
        out_path: the folder that the merged model is written to; a model that is there already is replaced at the end.
        options: mergekit's.

    Raises:
        FimError: the models can't be merged.
    """
    merge_whole(validated(config, "the config"), None, os.fspath(out_path), options or MergeOptions(quiet=True))
