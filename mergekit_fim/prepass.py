"""The Fisher pre-pass of one merge: checked config -> measurements -> merge coefficients in the config.

It runs once, on the main thread, after mergekit has normalised the config to slices and before anything is merged or
written. The coefficients go back into the config as mergekit's own filtered per-model parameters, which mergekit
resolves with the names of the source layers: slices that drop, repeat or shift layers come out right.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import (
    ConditionalParameter,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
    evaluate_setting,
)
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_fim import fisher, task_vectors
from mergekit_fim.coefficients import importance_scores, merge_coefficients
from mergekit_fim.errors import FimError
from mergekit_fim.fisher import FisherMeasurement
from mergekit_fim.inputs import InputModel, check_compatible, open_models
from mergekit_fim.output_config import ConfigDifference, adapt_output_config
from mergekit_fim.parameters import PARAMETERS
from mergekit_fim.settings import Settings, conditions, read_settings
from mergekit_fim.task_vectors import LayerPair, TaskVectorNorms

_DTYPES = ("bfloat16", "float16", "float32", "float64")

# Below this many base parameters `density` is the paper's value for 1.5B, from there on its value for 7B. Where between
# the two the change lies is this project's choice.
_LARGE_MODEL = 3_000_000_000


@dataclass(frozen=True)
class ModelCoefficients:
    """What the pre-pass found for one fine-tuned model.

    Attributes:
        model: the fine-tuned model.
        pairs: the layers, by the base's and then the model's index.
        norms: its squared task-vector norms.
        scores: [pair], s = F · ‖δ‖².
        alphas: [pair], the merge coefficients.
        alpha_other: the merge coefficient outside the decoder layers.
    """

    model: InputModel
    pairs: tuple[LayerPair, ...]
    norms: TaskVectorNorms
    scores: tuple[float, ...]
    alphas: tuple[float, ...]
    alpha_other: float


@dataclass(frozen=True)
class BaseCoefficients:
    """The measurement of one base model, and what followed for the models that are merged into it."""

    base: InputModel
    fisher: FisherMeasurement
    models: tuple[ModelCoefficients, ...]


@dataclass(frozen=True)
class ModelSettings:
    """A fine-tuned model's own parameters, as mergekit will resolve them in the model's first slice.

    Attributes:
        model: the fine-tuned model.
        weight: a number; or a gradient or filters, as in the config.
        density: likewise; None for fim_ta.
        density_is_default: whether the config leaves it to the default for the size of the base.
        alpha: what the user set by hand, likewise; None where all is left to the pre-pass.
    """

    model: InputModel
    weight: Any
    density: Any
    density_is_default: bool
    alpha: Any


@dataclass(frozen=True)
class PrePass:
    """All that is known about a merge before its first tensor.

    Attributes:
        method: the merge method.
        settings: the pre-pass settings.
        config: the normalised merge config, coefficients included.
        inputs: every model, by reference.
        coefficients: per base; empty where every `alpha` was set by hand.
        models: the fine-tuned models' own parameters.
        default_density: what `density` is where the config doesn't set it; None for fim_ta.
        differences: the config keys in which the inputs differ.
        warnings: what the user should know, a line each.
    """

    method: str
    settings: Settings
    config: MergeConfiguration
    inputs: Mapping[ModelReference, InputModel]
    coefficients: tuple[BaseCoefficients, ...]
    models: tuple[ModelSettings, ...]
    default_density: float | None
    differences: tuple[ConfigDifference, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class SourceSlice:
    """A run of layers of one fine-tuned model in the config, with the base's run that it is merged into."""

    base: ModelReference
    base_start: int
    source: InputSliceDefinition
    scopes: tuple[Mapping[str, Any], ...]  # the parameters that mergekit looks up, from highest to lowest precedence

    def pairs(self) -> list[LayerPair]:
        """The pairs of layers, in order."""
        start, end = self.source.layer_range
        return [LayerPair(self.base_start + i, start + i) for i in range(end - start)]


def check_config(config: MergeConfiguration, options: MergeOptions) -> Settings:
    """Check what can be checked of a config as the user wrote it, before mergekit normalises it.

    Raises:
        FimError: no base model or no fine-tuned model, a bad parameter, an unusable dtype or device.
    """
    settings = read_settings(config)
    method = config.merge_method
    groups = list(_model_groups(config))
    for where, base, _models in groups:
        if base is None:
            raise FimError(f"{method} needs a base model{where}; add `base_model:` to the config")
    if not any(model != base for _where, base, models in groups for model in models):
        raise FimError(
            f"{method} needs at least one fine-tuned model beside the base {groups[0][1]}; list one under `models:`"
        )
    for name in ("dtype", "out_dtype"):
        value = getattr(config, name)
        if value is not None and value.removeprefix("torch.") not in _DTYPES:
            raise FimError(f"{name}: expected one of {', '.join(_DTYPES)}, found {value}")
    fisher.device_map(options)
    return settings


def _model_groups(
    config: MergeConfiguration,
) -> Iterator[tuple[str, ModelReference | None, list[ModelReference]]]:
    """(where, base, models) of every list of models or slice in a config as the user wrote it."""
    modules: Iterable[tuple[str, MergeConfiguration | OutputModuleDefinition]] = [("", config)]
    if config.modules:
        modules = [(f" in modules.{name}", module) for name, module in config.modules.items()]
    for where, module in modules:
        if module.models:
            yield where, config.base_model, [model.model for model in module.models]
        for i, out_slice in enumerate(module.slices or []):
            base = out_slice.base_model or config.base_model
            yield f"{where} for slices[{i}]", base, [source.model for source in out_slice.sources]


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
        settings: from `check_config`.
        architecture: mergekit's description of the models.
        options: the merge's options.
        output_config: the config that the merged model will get; corrected in place.

    Raises:
        FimError: the models can't be merged, or a measurement isn't finite.
    """
    (module,) = _only_module(config, architecture)
    slices = module.slices or []
    inputs = _open_inputs(slices, config, architecture, options)
    sources = list(_source_slices(slices, module, config, inputs))
    warnings = _check_inputs(sources, inputs, config, options)
    if config.merge_method == "fim_ta" and any("density" in scope for s in sources for scope in s.scopes):
        warnings.append("density has no effect in fim_ta, which keeps every entry of the task vectors")

    by_hand = {id(s.source) for s in sources if _is_set_by_hand(s, inputs[s.source.model])}
    automatic = [s for s in sources if id(s.source) not in by_hand]
    if automatic:
        for base in _distinct(s.base for s in automatic):
            fisher.check_measurable(inputs[base], settings.fisher)
    coefficients = tuple(
        _measure(inputs[base], [s for s in automatic if s.base == base], inputs, settings, config.dtype, options)
        for base in _distinct(s.base for s in automatic)
    )
    for found in (m for c in coefficients for m in c.models):
        if not any(found.scores):
            warnings.append(
                f"{found.model} does not differ from the base in any decoder layer (or the base has no Fisher "
                "information in those that do): there is nothing to weigh, every layer gets alpha_max"
            )

    density = default_density(inputs[sources[0].base]) if config.merge_method == "fim_ties" else None
    models = tuple(_model_settings(sources, inputs, density))
    _write_alphas(automatic, coefficients)
    if density is not None:
        _write_default_density(config, density)
    base_layers = [
        layer
        for out_slice in slices
        for source in out_slice.sources
        if source.model == (out_slice.base_model or config.base_model)
        for layer in range(*source.layer_range)
    ]
    first = inputs[config.base_model or sources[0].base]
    others = [model for model in inputs.values() if model is not first]
    differences = adapt_output_config(output_config, first, others, base_layers)
    return PrePass(
        config.merge_method,
        settings,
        config,
        inputs,
        coefficients,
        models,
        density,
        tuple(differences),
        tuple(warnings),
    )


def _only_module(config: MergeConfiguration, architecture: ModelArchitecture) -> list[OutputModuleDefinition]:
    modules = config.modules or {}
    if len(modules) != 1 or len(architecture.modules) != 1:
        raise FimError(
            f"expected models with one stack of decoder layers, found the modules {', '.join(architecture.modules)}; "
            f"{config.merge_method} merges text-only causal language models"
        )
    return list(modules.values())


def _open_inputs(
    slices: Sequence[OutputSliceDefinition],
    config: MergeConfiguration,
    architecture: ModelArchitecture,
    options: MergeOptions,
) -> dict[ModelReference, InputModel]:
    references = _distinct(source.model for out_slice in slices for source in out_slice.sources)
    if config.base_model is not None:  # first, as in every table
        references = _distinct([config.base_model, *references])
    return open_models(references, architecture, options.trust_remote_code)


def _source_slices(
    slices: Sequence[OutputSliceDefinition],
    module: OutputModuleDefinition,
    config: MergeConfiguration,
    inputs: Mapping[ModelReference, InputModel],
) -> Iterator[SourceSlice]:
    for i, out_slice in enumerate(slices):
        base = out_slice.base_model or config.base_model
        assert base is not None
        for source in out_slice.sources:
            start, end = source.layer_range
            count = len(inputs[source.model].layout.layers)
            if not 0 <= start < end <= count:
                raise FimError(
                    f"slices[{i}]: expected a layer_range within [0, {count}] for {source.model}, found "
                    f"[{start}, {end}]; change it"
                )
        lengths = {source.layer_range[1] - source.layer_range[0] for source in out_slice.sources}
        if len(lengths) > 1:
            raise FimError(f"slices[{i}]: its sources must all have the same number of layers, found {sorted(lengths)}")
        base_start = next(source.layer_range[0] for source in out_slice.sources if source.model == base)
        for source in out_slice.sources:
            if source.model != base:
                scopes = (source.parameters, out_slice.parameters, module.parameters, config.parameters)
                yield SourceSlice(base, base_start, source, tuple(scope or {} for scope in scopes))


def _check_inputs(
    sources: Sequence[SourceSlice],
    inputs: Mapping[ModelReference, InputModel],
    config: MergeConfiguration,
    options: MergeOptions,
) -> list[str]:
    aligned = bool(config.tokenizer or config.tokenizer_source or options.unsafe_truncate_embeddings)
    warnings = []
    for base, model in _distinct((s.base, s.source.model) for s in sources):
        warnings += check_compatible(inputs[base], inputs[model], vocabulary_aligned=aligned)
    return warnings


def _is_set_by_hand(source: SourceSlice, model: InputModel) -> bool:
    """Whether the user's `alpha` settings cover every tensor of the slice."""
    layers = [model.layout.layers[pair.source_layer] for pair in source.pairs()]
    names = [tensor.name for layer in layers for tensor in layer.tensors] + [t.name for t in model.layout.other]
    settings = [scope["alpha"] for scope in source.scopes if "alpha" in scope]
    return all(any(evaluate_setting(name, s, validate=float) is not None for s in settings) for name in names)


def _measure(
    base: InputModel,
    sources: Sequence[SourceSlice],
    inputs: Mapping[ModelReference, InputModel],
    settings: Settings,
    dtype: str | None,
    options: MergeOptions,
) -> BaseCoefficients:
    references = _distinct(source.source.model for source in sources)
    pairs = {
        inputs[reference]: _population([s for s in sources if s.source.model == reference], len(base.layout.layers))
        for reference in references
    }
    # The cheap pass first: it also finds broken weights before the costly one begins.
    norms = task_vectors.task_vector_norms(base, pairs, dtype, quiet=options.quiet)
    measurement = fisher.measure_base(base, settings.fisher, dtype, options)
    models = []
    for model, layer_pairs in pairs.items():
        scores = importance_scores(
            [measurement.layers[pair.base_layer].fisher for pair in layer_pairs],
            [norms[model].layers[pair] for pair in layer_pairs],
        )
        alphas = merge_coefficients(scores, settings.mapping)
        other = settings.alpha_other if settings.alpha_other is not None else sum(alphas) / len(alphas)
        models.append(ModelCoefficients(model, tuple(layer_pairs), norms[model], tuple(scores), tuple(alphas), other))
    return BaseCoefficients(base, measurement, tuple(models))


def _population(sources: Sequence[SourceSlice], num_layers: int) -> list[LayerPair]:
    """The pairs of layers over which scores are normalised.

    Every layer of the base counts, merged or not, so that a layer's coefficient is the same in a merge of the whole
    model and in one of some slices. A layer is paired as the slices pair it, one that no slice uses with its own index.
    """
    pairs = {pair for source in sources for pair in source.pairs()}
    used = {pair.base_layer for pair in pairs}
    pairs |= {LayerPair(layer, layer) for layer in range(num_layers) if layer not in used}
    return sorted(pairs, key=lambda pair: (pair.base_layer, pair.source_layer))


def _model_settings(
    sources: Sequence[SourceSlice], inputs: Mapping[ModelReference, InputModel], density: float | None
) -> Iterator[ModelSettings]:
    for model in _distinct(s.source.model for s in sources):
        source = next(s for s in sources if s.source.model == model)
        given = {
            name: [c for scope in source.scopes if name in scope for c in conditions(scope[name])]
            for name in ("weight", "density", "alpha")
        }
        yield ModelSettings(
            inputs[model],
            _effective(given["weight"], PARAMETERS["weight"].default),
            None if density is None else _effective(given["density"], density),
            density is not None and not given["density"],
            _effective(given["alpha"], None) if given["alpha"] else None,
        )


def _effective(given: list[ConditionalParameter], default: Any) -> Any:
    """A setting, from the highest to the lowest precedence: its value where it is one everywhere, else the filters."""
    if default is not None:
        given = [*given, ConditionalParameter(value=default)]
    return given[0].value if given[0].filter in (None, "*") else given


def _write_alphas(sources: Sequence[SourceSlice], coefficients: Sequence[BaseCoefficients]) -> None:
    """Put the coefficients into the sources' parameters, behind what the user set by hand for some of the tensors."""
    found = {(c.base.reference, m.model.reference): m for c in coefficients for m in c.models}
    for source in sources:
        result = found[source.base, source.source.model]
        alphas = dict(zip(result.pairs, result.alphas, strict=True))
        by_hand = [c for scope in source.scopes if "alpha" in scope for c in conditions(scope["alpha"])]
        # A prefix ends in a dot, so that `model.layers.1.` doesn't match layer 12.
        computed = [
            ConditionalParameter(filter=result.model.layout.layers[pair.source_layer].prefix, value=alphas[pair])
            for pair in source.pairs()
        ]
        outside = ConditionalParameter(value=result.alpha_other)
        source.source.parameters = {**(source.source.parameters or {}), "alpha": [*by_hand, *computed, outside]}


def default_density(base: InputModel) -> float:
    """The paper's density for a base of this size: 0.2 at 1.5B, 0.4 at 7B (arXiv 2603.21705, as summarised)."""
    parameters = sum(math.prod(header.shape) for header in base.headers.values())
    return 0.2 if parameters < _LARGE_MODEL else 0.4


def _write_default_density(config: MergeConfiguration, density: float) -> None:
    """Set `density` at the lowest precedence, where the user hasn't."""
    parameters = dict(config.parameters or {})
    given = parameters.get("density")
    default = ConditionalParameter(value=density)
    parameters["density"] = density if given is None else [*conditions(given), default]
    config.parameters = parameters


def _distinct(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))
