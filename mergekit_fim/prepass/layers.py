"""`fim_ties` and `fim_ta`: opened models -> measurements and task vectors -> a merge coefficient for each layer."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_fim.coefficients import importance_scores, merge_coefficients
from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.config.settings import Settings
from mergekit_fim.fisher import loading
from mergekit_fim.fisher.measure import check_measurable
from mergekit_fim.models.inputs import InputModel, open_model
from mergekit_fim.prepass.measured import Measured, measured, once, saved_measurement
from mergekit_fim.prepass.result import BaseCoefficients, ModelCoefficients, SourceSlice
from mergekit_fim.prepass.slices import alphas_of, by_model, merged_tensors, population
from mergekit_fim.prepass.task_vectors import LayerPair, TaskVectorNorms, TaskVectorSweep
from mergekit_fim.prepass.written import write_alphas
from mergekit_fim.processes import launched


def by_layer(
    config: MergeConfiguration,
    settings: Settings,
    inputs: Mapping[ModelReference, InputModel],
    sources: Sequence[SourceSlice],
    kept: Container[str],
    options: MergeOptions,
) -> tuple[Settings, tuple[BaseCoefficients, ...], list[str]]:
    """Measure the bases, weigh the layers, and write a coefficient for each layer into the config.

    Returns:
        The settings, with those of a saved measurement; the coefficients; what the user should know.
    """
    warnings: list[str] = []
    # Those whose `alpha` the user's settings don't give for every tensor that is merged.
    automatic = [
        s for s in sources if any(s.value("alpha", name) is None for _, (name,) in merged_tensors([s], inputs, kept))
    ]
    # All slices of a model that needs the pre-pass in one of them, so that the report can say what each layer gets.
    needed = {k: own for k, own in by_model(sources, inputs).items() if any(s in automatic for s in own)}
    bases = list(dict.fromkeys(base for base, _ in needed))
    saved = saved_measurement(settings, bases, options) if bases else None
    if saved is not None:
        settings = replace(settings, fisher=saved.measurement.fisher.settings)
    elif settings.saved is not None:
        warnings.append(f"fisher: {settings.saved} is not used, as every alpha is set by hand")
    for base in bases:
        check_measurable(base, settings.fisher)
    coefficients = []
    for base in bases:
        tuned = {model: own for (its_base, model), own in needed.items() if its_base is base}
        pairs = {model: population(own, len(base.layout.layers)) for model, own in tuned.items()}
        result, norms = _measure(base, pairs, config.dtype, settings, saved, options)
        fisher = [layer.fisher for layer in result.measurement.fisher.layers]
        models = tuple(_weigh(model, own, fisher, norms[model.reference], settings) for model, own in tuned.items())
        coefficients.append(BaseCoefficients(base, result.measurement, result.origin, models))
    warnings += [warning for c in coefficients for warning in c.fisher.warnings]
    warnings += _without_information(coefficients)
    write_alphas(sources, automatic, coefficients)
    return settings, tuple(coefficients), warnings


def _measure(
    base: InputModel,
    pairs: Mapping[InputModel, Sequence[LayerPair]],
    dtype: str | None,
    settings: Settings,
    saved: Measured | None,
    options: MergeOptions,
) -> tuple[Measured, Mapping[ModelReference, TaskVectorNorms]]:
    """Measure a base, and for some pairs of layers the task vectors of the models that are merged into it."""

    def measure() -> tuple[Measured, Mapping[ModelReference, TaskVectorNorms]]:
        own_options = launched.options_of_process(options)
        sweep = TaskVectorSweep(base, pairs, dtype, loading.placement(own_options).devices())
        result = None if saved is None else saved.of(base)
        if result is None:
            launched.give(partial(take_part, base.reference, dtype, settings.fisher, options))
            state = launched.sharing()
            result = measured(
                lambda: base, settings.fisher, dtype, own_options, cache=settings.cache, beside=sweep, state=state
            )
        return result, sweep.norms(quiet=own_options.quiet)

    key = (base.reference, dtype, settings.fisher, settings.saved, *((m.reference, *p) for m, p in pairs.items()))
    return once(key, measure)


def take_part(reference: ModelReference, dtype: str | None, settings: FisherSettings, options: MergeOptions) -> None:
    """Do the part of a process that isn't the main one in the measurement of a base."""
    own_options = launched.options_of_process(options)
    open_base = partial(open_model, str(reference), None, own_options)
    measured(open_base, settings, dtype, own_options, state=launched.sharing())


def _weigh(
    model: InputModel,
    sources: Sequence[SourceSlice],
    fisher: Sequence[float],
    norms: TaskVectorNorms,
    settings: Settings,
) -> ModelCoefficients:
    """Weigh a model's layers; `fisher` is [base layer], the Fisher information."""
    scores = importance_scores([fisher[pair.base_layer] for pair in norms.layers], list(norms.layers.values()))
    alphas = merge_coefficients(scores, settings.mapping)
    computed = dict(zip(norms.layers, alphas, strict=True))
    of_pairs = dict(computed)
    for source in sources:
        of_pairs |= alphas_of(source, model, computed) if source.settings("alpha") else {}
    used = list(of_pairs.values())
    # A layer without a score isn't part of the mean: without a task vector its α means nothing.
    scored = [alpha for alpha, score in zip(used, scores, strict=True) if score > 0] or used
    other = fmean(scored) if settings.alpha_other is None else settings.alpha_other
    return ModelCoefficients(model, norms, tuple(scores), tuple(alphas), tuple(used), other)


def _without_information(coefficients: Sequence[BaseCoefficients]) -> Iterator[str]:
    """Say which layers have no score."""
    for its in coefficients:
        if dead := [str(layer.index) for layer in its.fisher.layers if layer.fisher == 0]:
            yield (
                f"{its.base} has no Fisher information in decoder layer {', '.join(dead)}: no gradient reaches "
                "its weights; it takes no part in the mapping, and gets alpha_max"
            )
    for model in (m for c in coefficients for m in c.models):
        if not any(model.scores):
            yield (
                f"{model.model} does not differ from the base in any decoder layer (or the base has no Fisher "
                "information in those that do): there is nothing to weigh, every layer gets alpha_max"
            )
