"""The pre-pass: checked config -> models -> task vectors -> measurements -> merge coefficients -> config.

It runs once, on the main thread, after mergekit has normalised the config to slices and before anything is merged or
written. It writes the coefficients into the config as mergekit's own filtered parameters of each model. mergekit looks
these up by the names of the source layers, so that slices may drop, repeat or shift layers.
"""

from collections.abc import Iterator, Mapping, Sequence

from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration, OutputSliceDefinition
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_fim.config.parameters import PARAMETERS, Scope
from mergekit_fim.config.settings import Settings, as_set, base_of, check_config, check_modules
from mergekit_fim.fisher import loading
from mergekit_fim.merging.output_config import ConfigDifference, adapt_output_config
from mergekit_fim.models.checkpoint import model_config
from mergekit_fim.models.inputs import InputModel, check_compatible, check_tokenizer, open_models
from mergekit_fim.prepass.kron import run as by_direction
from mergekit_fim.prepass.layers import by_layer
from mergekit_fim.prepass.result import BaseCoefficients, Kron, ModelSettings, PrePass, SourceSlice
from mergekit_fim.prepass.slices import by_model, kept_tensors, output_slices, source_slices
from mergekit_fim.prepass.written import default_density, leave_unknown_gates, write_default_density, write_kept


def check(config: MergeConfiguration, architecture: ModelArchitecture, options: MergeOptions) -> Settings:
    """Check a merge before mergekit normalises its config, and read the pre-pass settings.

    Raises:
        FimError: a bad config, a module or a device that doesn't exist, or a tokenizer that can't be loaded, which
            mergekit would load only when the merge has begun.
    """
    settings = check_config(config)
    loading.placement(options)
    check_modules(config, architecture, model_config(base_of(config), options.trust_remote_code))
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if source is not None:
        for reference in dict.fromkeys((config.base_model, source)):
            if isinstance(reference, ModelReference):
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

    It also corrects `output_config`, the config that the merged model will get, in place.

    Raises:
        FimError: the models can't be merged, or a measurement isn't finite.
    """
    references = [source.model for _, out_slice, _ in output_slices(config) for source in out_slice.sources]
    distinct = list(dict.fromkeys([base_of(config), *references]))
    inputs = open_models(distinct, architecture, options.trust_remote_code)
    base = inputs[base_of(config)]
    slices = [out_slice for name, out_slice, _ in output_slices(config) if name == base.layout.stack]
    sources = tuple(source for name in config.modules or {} for source in source_slices(name, config, inputs))
    kept = kept_tensors(config, base)
    warnings = [*_check_inputs(slices, sources, inputs, config, options)]

    # As the user set them, before anything is written into the config.
    density = default_density(base) if config.merge_method == "fim_ties" else None
    models = tuple(_model_settings(sources, inputs, density))
    readers = [reader for _, _, reader in output_slices(config)]
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
        settings, coefficients, more = by_layer(config, settings, inputs, sources, kept, options)
    leave_unknown_gates(config, base)
    write_kept(config, base, kept)
    if density is not None:
        write_default_density(config, density)
    return PrePass(
        settings=settings,
        config=config,
        inputs=inputs,
        coefficients=coefficients,
        models=models,
        shared=shared,
        kept=kept,
        default_density=density,
        differences=_adapt(output_config, inputs, slices, config, options),
        warnings=(*warnings, *more),
        kron=kron,
    )


def _check_inputs(
    slices: Sequence[OutputSliceDefinition],
    sources: Sequence[SourceSlice],
    inputs: Mapping[ModelReference, InputModel],
    config: MergeConfiguration,
    options: MergeOptions,
) -> Iterator[str]:
    """Check that the models can be merged, and say what the user may not know of them and of the config."""
    aligned = bool(config.tokenizer or config.tokenizer_source or options.unsafe_truncate_embeddings)
    for base, model in by_model(sources, inputs):
        yield from check_compatible(base, model, vocabulary_aligned=aligned)
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


def _model_settings(
    sources: Sequence[SourceSlice], inputs: Mapping[ModelReference, InputModel], density: float | None
) -> Iterator[ModelSettings]:
    """The fine-tuned models' own parameters, as the user set them; `density` is the default."""
    for (base, model), own in by_model(sources, inputs).items():
        reference, readers = model.reference, [s.reader for s in own]
        yield ModelSettings(
            base,
            model,
            weight=as_set(readers, "weight", PARAMETERS["weight"].default, reference),
            density=None if density is None else as_set(readers, "density", density, reference),
            density_is_default=density is not None and not any(s.settings("density") for s in own),
            alpha=as_set(readers, "alpha", None, reference),
        )


def _adapt(
    output_config: PretrainedConfig,
    inputs: Mapping[ModelReference, InputModel],
    slices: Sequence[OutputSliceDefinition],
    config: MergeConfiguration,
    options: MergeOptions,
) -> tuple[ConfigDifference, ...]:
    """Correct the output's config, and return the keys in which the models' configs differ."""
    base_layers = [
        layer
        for out_slice in slices
        for source in out_slice.sources
        if source.model == base_of(config, out_slice)
        for layer in range(*source.layer_range)
    ]
    by_tokenizer = bool(config.tokenizer or config.tokenizer_source)
    truncated = options.unsafe_truncate_embeddings and not by_tokenizer
    differences = adapt_output_config(output_config, list(inputs.values()), base_layers, truncated=truncated)
    # mergekit sets the vocabulary's size when it has built the tokenizer.
    return tuple(d for d in differences if not (by_tokenizer and d.key == "vocab_size"))
