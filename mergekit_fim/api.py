"""The Python API, importable from `mergekit_fim` itself; docs/python.md has examples of all of it."""

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
from mergekit_fim.tools.delta import Delta, measure_names
from mergekit_fim.tools.plan import MergePlan, plan_fim_merge
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
    chosen = options or MergeOptions(quiet=True)
    found = measured(
        lambda: open_model(os.fspath(model), revision, chosen), settings or FisherSettings(), dtype, chosen, cache=cache
    )
    return found.measurement


def measure_delta(
    base: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    options: MergeOptions | None = None,
) -> Delta:
    """Measure what a task vector looks like: zeros, tails, and its first singular values beside those of noise.

    Args:
        base: the base model, a folder or a name on the Hub, with an adapter as in mergekit: `model+adapter`.
        model: the fine-tuned model, likewise.
        dtype: what the weights are read as, as a merge with this `dtype` does; by default the checkpoints' own.
        options: mergekit's, for the device and for loading; by default on the CPU.

    Raises:
        FimError: a model can't be opened, they are of different architectures, or a weight isn't finite.
    """
    return measure_names(os.fspath(base), os.fspath(model), dtype, options or MergeOptions(quiet=True))


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
    chosen, settings = options or MergeOptions(quiet=True), settings or FisherSettings(KRON_SAMPLES, KRON_SEQ_LEN)
    found = measured_factors(
        *(lambda: open_model(os.fspath(model), revision, chosen), settings, dtype, chosen),
        vocab_size=vocab_size,
        cache=cache,
    )
    copy_whole(found.file.path, os.fspath(path))
    return FactorsFile.open(path, check=False)


def resolve(config: MergeConfiguration | dict[str, Any], options: MergeOptions | None = None) -> MergePlan:
    """Run everything of a merge by one of this package's methods up to its coefficients, and merge nothing.

    Args:
        config: the merge config, left as it is.
        options: as for the merge.

    Returns:
        The plan: its `config` has the coefficients as mergekit's filtered per-model `alpha`, and its `pre_pass` the
        numbers that led to them.

    Raises:
        FimError: the merge would fail before its first tensor.
    """
    return plan_fim_merge(_validated(config), options or MergeOptions(quiet=True))[0]


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
    merge_whole(_validated(config), None, os.fspath(out_path), options or MergeOptions(quiet=True))


def _validated(config: Any) -> MergeConfiguration:
    return config if isinstance(config, MergeConfiguration) else validated(config, "the config")
