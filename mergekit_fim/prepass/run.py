"""The street: checked config -> models -> task vectors -> measurements -> merge coefficients -> config.

It runs once, on the main thread, after mergekit has normalised the config to slices and before anything is merged or
written. The coefficients go back into the config as mergekit's own filtered per-model parameters, which mergekit
resolves with the names of the source layers: slices that drop, repeat or shift layers come out right.
"""

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import ConfigReader, MergeConfiguration, OutputSliceDefinition, evaluate_setting
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_fim.coefficients import importance_scores, merge_coefficients
from mergekit_fim.config.parameters import PARAMETERS, Scope
from mergekit_fim.config.settings import Settings, as_set, base_of, check_config, check_modules, settings_of
from mergekit_fim.fisher import loading
from mergekit_fim.fisher.measure import check_measurable
from mergekit_fim.merging.output_config import ConfigDifference, adapt_output_config
from mergekit_fim.models.checkpoint import model_config
from mergekit_fim.models.inputs import InputModel, check_compatible, check_tokenizer, open_models
from mergekit_fim.prepass.kron import run as by_direction
from mergekit_fim.prepass.measured import Measured, measured, once, saved_measurement
from mergekit_fim.prepass.result import BaseCoefficients, Kron, ModelCoefficients, ModelSettings, PrePass, SourceSlice
from mergekit_fim.prepass.slices import alphas_of, kept_tensors, merged_tensors, population, source_slices
from mergekit_fim.prepass.task_vectors import TaskVectorNorms, TaskVectorSweep
from mergekit_fim.prepass.written import (
    default_density,
    leave_unknown_gates,
    write_alphas,
    write_default_density,
    write_kept,
)
from mergekit_fim.processes import launched
from mergekit_fim.processes.together import in_all


def check(config: MergeConfiguration, architecture: ModelArchitecture, options: MergeOptions) -> Settings:
    """Check what can be checked of a merge before mergekit normalises its config, and read the pre-pass settings.

    Raises:
        FimError: a bad config, a module or a device that isn't there, or a tokenizer that can't be loaded, without
            which mergekit can't align the vocabularies: mergekit loads it when the merge has begun.
    """
    settings = check_config(config)
    loading.placement(options)
    check_modules(config, architecture, model_config(base_of(config), options.trust_remote_code))
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if source is not None:
        for reference in _distinct(m for m in (config.base_model, source) if isinstance(m, ModelReference)):
            check_tokenizer(reference, options.trust_remote_code)
    return settings


def run(
    config: MergeConfiguration,
    settings: Settings,
    architecture: ModelArchitecture,
    options: MergeOptions,
    output_config: PretrainedConfig,
) -> PrePass:
    """Run the pre-pass on a config that mergekit has normalised, and write its results into it.

    Args:
        config: changed in place: per-model `alpha`, and `density` where it isn't set.
        settings: from `check`.
        architecture: mergekit's definition of the models.
        options: the merge's options.
        output_config: the config that the merged model will get; corrected in place.

    Raises:
        FimError: the models can't be merged, or a measurement isn't finite.
    """
    modules = config.modules or {}
    every = [(name, module, out_slice) for name, module in modules.items() for out_slice in module.slices or []]
    references = [source.model for *_, out_slice in every for source in out_slice.sources]
    inputs = open_models(_distinct([base_of(config), *references]), architecture, options.trust_remote_code)
    base = inputs[base_of(config)]
    slices = modules[base.layout.stack].slices or []
    sources = tuple(s for name in modules for s in source_slices(name, config, inputs))
    kept = kept_tensors(config, base)
    warnings = [*_check_inputs(slices, sources, inputs, config, options)]

    density = default_density(base) if config.merge_method == "fim_ties" else None
    models = tuple(_model_settings(sources, inputs, density))
    readers = [ConfigReader(config=config, t=0, slice_out=out_slice, module=module) for _, module, out_slice in every]
    shared = {
        name: as_set(readers, name, parameter.default_for(config.merge_method))
        for name, parameter in PARAMETERS.items()
        if parameter.scope_in(config.merge_method) is Scope.TENSOR and config.merge_method in parameter.methods
    }
    kron: Kron | None = None
    coefficients: tuple[BaseCoefficients, ...] = ()
    if settings.damping is not None:
        settings, kron, more = by_direction(config, settings, inputs, sources, kept, options)
    else:
        settings, coefficients, more = _by_layer(config, settings, inputs, sources, kept, options)
    warnings += more
    leave_unknown_gates(config, base)
    write_kept(config, base, kept)
    if density is not None:
        write_default_density(config, density)
    differences = _adapt(output_config, inputs, slices, config, options)
    return PrePass(
        *(settings, config, inputs, coefficients, models, shared, kept, density, differences, tuple(warnings), kron)
    )


def _by_layer(
    config: MergeConfiguration,
    settings: Settings,
    inputs: Mapping[ModelReference, InputModel],
    sources: Sequence[SourceSlice],
    kept: Container[str],
    options: MergeOptions,
) -> tuple[Settings, tuple[BaseCoefficients, ...], list[str]]:
    """Measure the bases, weigh the layers, and write the coefficients into the config: a coefficient for each layer.

    Returns:
        The settings, with those of a measurement that was saved; the coefficients; what the user should know.
    """
    warnings: list[str] = []
    automatic = [s for s in sources if not _is_set_by_hand(s, inputs, kept)]
    # All slices of a model that needs the pre-pass in one of them, so that the report can say what each layer gets.
    needed = _distinct(s.ends for s in automatic)
    to_measure = [s for s in sources if s.ends in needed]
    bases = [inputs[reference] for reference in _distinct(s.base for s in to_measure)]
    saved = saved_measurement(settings, bases, options) if bases else None
    if saved is not None:
        settings = replace(settings, fisher=saved.measurement.fisher.settings)
    elif settings.saved is not None:
        warnings.append(f"fisher: {settings.saved} is not used, as every alpha is set by hand")
    for own in bases:
        check_measurable(own, settings.fisher)
    coefficients = []
    for own in bases:
        found, norms = _measured(own, to_measure, inputs, config.dtype, settings, saved, options)
        coefficients.append(_coefficients(own, found, norms, to_measure, settings))
    warnings += [warning for c in coefficients for warning in c.measurement.fisher.warnings]
    warnings += _without_information(coefficients)
    write_alphas(sources, automatic, coefficients)
    return settings, tuple(coefficients), warnings


def _check_inputs(
    slices: Sequence[OutputSliceDefinition],
    sources: Sequence[SourceSlice],
    inputs: Mapping[ModelReference, InputModel],
    config: MergeConfiguration,
    options: MergeOptions,
) -> Iterator[str]:
    """Check that the models can be merged: what the user may not know of them and of the config, a line each."""
    aligned = bool(config.tokenizer or config.tokenizer_source or options.unsafe_truncate_embeddings)
    for base, model in _distinct(s.ends for s in sources):
        yield from check_compatible(inputs[base], inputs[model], vocabulary_aligned=aligned)
    for model in inputs.values():
        if model.unknown:
            more = f" and {len(model.unknown) - 1} more" if len(model.unknown) > 1 else ""
            yield (
                f"{model} holds tensors that no model with its config.json has, and the merge leaves them out: "
                f"{model.unknown[0]}{more}"
            )
    if config.merge_method == "fim_ta" and any(s.settings("density") for s in sources):
        yield "density has no effect in fim_ta, which keeps every entry of the task vectors"
    if len(slices[0].sources) == 1:
        yield "the first and the last slice have no fine-tuned model: embeddings and head stay the base's"


def _is_set_by_hand(source: SourceSlice, inputs: Mapping[ModelReference, InputModel], kept: Container[str]) -> bool:
    """Whether the user's `alpha` settings cover every tensor of the slice that is merged."""
    by_hand = source.settings("alpha")
    names = (name for _, (name,) in merged_tensors([source], inputs, kept))
    return all(evaluate_setting(name, by_hand, validate=float) is not None for name in names)


def _measured(
    base: InputModel,
    sources: Sequence[SourceSlice],
    inputs: Mapping[ModelReference, InputModel],
    dtype: str | None,
    settings: Settings,
    saved: Measured | None,
    options: MergeOptions,
) -> tuple[Measured, dict[InputModel, TaskVectorNorms]]:
    """A base's measurement, and the task vectors of the models that are merged into it."""
    own = [s for s in sources if s.base == base.reference]
    pairs = {
        inputs[model]: population([s for s in own if s.source.model == model], len(base.layout.layers))
        for model in _distinct(s.source.model for s in own)
    }
    key = (base.reference, dtype, settings.fisher, settings.saved, *((m.reference, *p) for m, p in pairs.items()))

    def measure() -> tuple[Measured, dict[ModelReference, TaskVectorNorms]]:
        state, own_options = launched.together(), launched.options_of_process(options)
        devices = loading.placement(own_options).devices()
        sweep = TaskVectorSweep(base, pairs, dtype, devices) if launched.is_main() else None
        found = measured(
            lambda: base,
            settings.fisher,
            dtype,
            own_options,
            saved=saved,
            cache=settings.cache,
            beside=sweep,
            state=state,
        )

        def norms() -> dict[ModelReference, TaskVectorNorms]:
            its = {} if sweep is None else sweep.norms(quiet=own_options.quiet)
            return {model.reference: of_model for model, of_model in its.items()}

        kept = in_all(state, norms)[0]
        LoaderCache().flush_all()  # a pickled checkpoint is in memory as long as its loader is
        return found, kept

    found, kept = once(key, measure)
    return found, {model: kept[model.reference] for model in pairs}


def _coefficients(
    base: InputModel,
    found: Measured,
    norms: Mapping[InputModel, TaskVectorNorms],
    sources: Sequence[SourceSlice],
    settings: Settings,
) -> BaseCoefficients:
    layers = found.measurement.fisher.layers
    models = []
    for model, its in norms.items():
        pairs = list(its.layers)
        scores = importance_scores([layers[pair.base_layer].fisher for pair in pairs], list(its.layers.values()))
        alphas = merge_coefficients(scores, settings.mapping)
        own = [s for s in sources if s.ends == (base.reference, model.reference)]
        computed = dict(zip(pairs, alphas, strict=True))
        by_pair = dict(computed)
        for source in own:
            by_pair |= alphas_of(source, model, computed) if source.settings("alpha") else {}
        used = list(by_pair.values())
        # Layers without a score stay out of the mean: where they have no task vector, their α means nothing.
        scored = [alpha for alpha, score in zip(used, scores, strict=True) if score > 0] or used
        other = settings.alpha_other if settings.alpha_other is not None else math.fsum(scored) / len(scored)
        models.append(ModelCoefficients(model, tuple(pairs), its, tuple(scores), tuple(alphas), tuple(used), other))
    return BaseCoefficients(base, found.measurement, found.origin, tuple(models))


def _without_information(coefficients: Sequence[BaseCoefficients]) -> Iterator[str]:
    for found in coefficients:
        dead = [str(layer.index) for layer in found.measurement.fisher.layers if layer.fisher == 0]
        if dead:
            yield (
                f"{found.base} has no Fisher information in decoder layer {', '.join(dead)}: no gradient reaches "
                "its weights; it takes no part in the mapping, and gets alpha_max"
            )
    for model in (m for c in coefficients for m in c.models):
        if not any(model.scores):
            yield (
                f"{model.model} does not differ from the base in any decoder layer (or the base has no Fisher "
                "information in those that do): there is nothing to weigh, every layer gets alpha_max"
            )


def _model_settings(
    sources: Sequence[SourceSlice], inputs: Mapping[ModelReference, InputModel], density: float | None
) -> Iterator[ModelSettings]:
    for base, model in _distinct(s.ends for s in sources):
        readers = [s.reader for s in sources if s.ends == (base, model)]
        yield ModelSettings(
            inputs[base],
            inputs[model],
            as_set(readers, "weight", PARAMETERS["weight"].default, model),
            None if density is None else as_set(readers, "density", density, model),
            density is not None and not any(settings_of(reader, "density", model) for reader in readers),
            as_set(readers, "alpha", None, model),
        )


def _adapt(
    output_config: PretrainedConfig,
    inputs: Mapping[ModelReference, InputModel],
    slices: Sequence[OutputSliceDefinition],
    config: MergeConfiguration,
    options: MergeOptions,
) -> tuple[ConfigDifference, ...]:
    base_layers = [
        layer
        for out_slice in slices
        for source in out_slice.sources
        if source.model == base_of(config, out_slice)
        for layer in range(*source.layer_range)
    ]
    first, *others = inputs.values()
    by_tokenizer = bool(config.tokenizer or config.tokenizer_source)
    truncated = options.unsafe_truncate_embeddings and not by_tokenizer
    differences = adapt_output_config(output_config, first, others, base_layers, truncated=truncated)
    # By a tokenizer, mergekit sets the vocabulary's size when it has built that.
    return tuple(d for d in differences if not (by_tokenizer and d.key == "vocab_size"))


def _distinct(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))
