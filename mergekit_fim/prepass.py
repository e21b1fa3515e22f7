"""The Fisher pre-pass of one merge: checked config -> measurements -> merge coefficients in the config.

It runs once, on the main thread, after mergekit has normalised the config to slices and before anything is merged or
written. The coefficients go back into the config as mergekit's own filtered per-model parameters, which mergekit
resolves with the names of the source layers: slices that drop, repeat or shift layers come out right.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tqdm
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
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import AutoTokenizer, PretrainedConfig

from mergekit_fim import task_vectors
from mergekit_fim.coefficients import importance_scores, merge_coefficients
from mergekit_fim.config.parameters import FLOAT_DTYPES, PARAMETERS, Scope
from mergekit_fim.config.settings import Settings, conditions, read_settings
from mergekit_fim.errors import FimError
from mergekit_fim.fisher import loading
from mergekit_fim.fisher import measure as fisher
from mergekit_fim.fisher.measure import FisherMeasurement
from mergekit_fim.measurements.file import Measurement, ModelIdentity
from mergekit_fim.measurements.saved import load_measurement
from mergekit_fim.measurements.store import CacheEntry
from mergekit_fim.merging.gates import is_fused, is_layout_known
from mergekit_fim.merging.output_config import ConfigDifference, adapt_output_config
from mergekit_fim.models.inputs import InputModel, check_compatible, open_models
from mergekit_fim.task_vectors import LayerPair, TaskVectorNorms
from mergekit_fim.text import reason

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
        used_alphas: [pair], what the layer gets: α, or where the user set it by hand, the mean over its tensors.
        alpha_other: the merge coefficient outside the decoder layers, where the user didn't set it by hand.
    """

    model: InputModel
    pairs: tuple[LayerPair, ...]
    norms: TaskVectorNorms
    scores: tuple[float, ...]
    alphas: tuple[float, ...]
    used_alphas: tuple[float, ...]
    alpha_other: float


@dataclass(frozen=True)
class BaseCoefficients:
    """The measurement of one base model, and what followed for the models that are merged into it.

    Attributes:
        base: the base model.
        identity: which model that is, wherever it lies.
        fisher: its measurement.
        origin: where that comes from, in words; empty where it was measured just now.
        models: the coefficients of each fine-tuned model.
    """

    base: InputModel
    identity: ModelIdentity
    fisher: FisherMeasurement
    origin: str
    models: tuple[ModelCoefficients, ...]


@dataclass(frozen=True)
class ModelSettings:
    """A fine-tuned model's own parameters, as mergekit will resolve them.

    Attributes:
        base: what the model is merged into.
        model: the fine-tuned model.
        weight: a number; or a gradient or filters, as in the config; or, where slices differ, a list of one per slice.
        density: likewise; None for fim_ta.
        density_is_default: whether the config leaves it to the default for the size of the base.
        alpha: what the user set by hand, likewise; None where all is left to the pre-pass.
    """

    base: InputModel
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
        shared: the parameters that are neither per model nor the pre-pass's, likewise a list where slices differ.
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
    shared: Mapping[str, Any]
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

    def settings(self, name: str) -> list[ConditionalParameter]:
        """The user's settings of a parameter, from the highest to the lowest precedence, as one list of filters."""
        return [c for scope in self.scopes if name in scope for c in conditions(scope[name])]


def check_config(config: MergeConfiguration, options: MergeOptions) -> Settings:
    """Check what can be checked of a config as the user wrote it, before mergekit normalises it.

    Raises:
        FimError: no base model or no fine-tuned model, a bad parameter, an unusable dtype or device.
    """
    settings = read_settings(config)
    method = config.merge_method
    if config.base_model is None:  # not only per slice: mergekit would take the merged model's config from any model
        raise FimError(f"{method} needs a base model; add `base_model:` to the config, at the top")
    for module in (config, *(config.modules or {}).values()):
        for i, out_slice in enumerate(module.slices or []):
            if not out_slice.sources:
                raise FimError(
                    f"slices[{i}]: expected the base and a fine-tuned model in `sources`, found none; add them"
                )
    if not any(model != base for base, models in _model_groups(config) for model in models):
        raise FimError(
            f"{method} needs at least one fine-tuned model beside the base {config.base_model}; list one in `models:`"
        )
    for name in ("dtype", "out_dtype"):
        value = getattr(config, name)
        if value is not None and value.removeprefix("torch.") not in FLOAT_DTYPES:
            raise FimError(f"{name}: expected one of {', '.join(FLOAT_DTYPES)}, found {value}")
    loading.placement(options)
    return settings


def check_tokenizers(config: MergeConfiguration, options: MergeOptions) -> None:
    """Load the tokenizers without which mergekit can't align the vocabularies; it does when the merge has begun.

    Raises:
        FimError: one that can't be loaded.
    """
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if source is None:
        return
    for reference in _distinct(m for m in (config.base_model, source) if isinstance(m, ModelReference)):
        try:
            AutoTokenizer.from_pretrained(
                reference.model.path,
                revision=reference.model.revision,
                trust_remote_code=options.trust_remote_code,
            )
        except Exception as error:  # each kind of tokenizer has its own
            raise FimError(
                f"{reference}: the config's tokenizer setting needs a tokenizer from it, which can't be loaded "
                f"({reason(error)}); put one into its folder, name another model, or leave the setting out"
            ) from error


def check_modules(config: MergeConfiguration, architecture: ModelArchitecture) -> None:
    """Check that the models have the modules that a config names.

    Raises:
        FimError: one that they don't have.
    """
    for name in config.modules or {}:
        if name not in architecture.modules:
            raise FimError(
                f"modules: expected {' or '.join(architecture.modules)}, found {name}; rename it, or use `models:`"
            )


def _model_groups(config: MergeConfiguration) -> Iterator[tuple[ModelReference, list[ModelReference]]]:
    """(base, models) of every list of models or slice in a config as the user wrote it."""
    modules: list[MergeConfiguration | OutputModuleDefinition] = [config, *(config.modules or {}).values()]
    for module in modules:
        if module.models:
            yield _base_of(config), [model.model for model in module.models]
        for out_slice in module.slices or []:
            yield _base_of(config, out_slice), [source.model for source in out_slice.sources]


def _base_of(config: MergeConfiguration, out_slice: OutputSliceDefinition | None = None) -> ModelReference:
    base = (out_slice.base_model if out_slice else None) or config.base_model
    assert base is not None  # `check_config` has seen to it
    return base


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
    for model in inputs.values():
        if model.unknown:
            more = f" and {len(model.unknown) - 1} more" if len(model.unknown) > 1 else ""
            warnings.append(
                f"{model} holds tensors that no model with its config.json has, and the merge leaves them out: "
                f"{model.unknown[0]}{more}"
            )
    if config.merge_method == "fim_ta" and any("density" in scope for s in sources for scope in s.scopes):
        warnings.append("density has no effect in fim_ta, which keeps every entry of the task vectors")

    if len(slices[0].sources) == 1:
        warnings.append("the first and the last slice have no fine-tuned model: embeddings and head stay the base's")

    by_hand = {id(s.source) for s in sources if _is_set_by_hand(s, inputs[s.source.model])}
    automatic = [s for s in sources if id(s.source) not in by_hand]
    # All slices of a model that needs the pre-pass in one of them, so that the report can say what each layer gets.
    needed = _distinct((s.base, s.source.model) for s in automatic)
    measured = [s for s in sources if (s.base, s.source.model) in needed]
    bases = _distinct(s.base for s in measured)
    identities = {base: ModelIdentity.of(inputs[base]) for base in bases}
    saved = _saved_measurement(settings, identities, options) if bases else None
    if not bases and settings.saved is not None:
        warnings.append(f"fisher: {settings.saved} is not used, as every alpha is set by hand")
    if saved is not None:
        settings = replace(settings, fisher=saved.fisher.settings)
    for base in bases:
        fisher.check_measurable(inputs[base], settings.fisher)
    coefficients = tuple(
        _measure(
            inputs[base],
            identity,
            [s for s in measured if s.base == base],
            inputs,
            settings,
            saved if saved is not None and not saved.model.difference(identity) else None,
            config.dtype,
            options,
        )
        for base, identity in identities.items()
    )
    warnings += [warning for found in coefficients for warning in found.fisher.warnings]
    for coefficient in coefficients:
        dead = [str(layer.index) for layer in coefficient.fisher.layers if layer.fisher == 0]
        if dead:
            warnings.append(
                f"{coefficient.base} has no Fisher information in decoder layer {', '.join(dead)}: no gradient reaches "
                "its weights; it takes no part in the mapping, and gets alpha_max"
            )
    for found in (m for c in coefficients for m in c.models):
        if not any(found.scores):
            warnings.append(
                f"{found.model} does not differ from the base in any decoder layer (or the base has no Fisher "
                "information in those that do): there is nothing to weigh, every layer gets alpha_max"
            )

    density = default_density(inputs[_base_of(config)]) if config.merge_method == "fim_ties" else None
    models = tuple(_model_settings(sources, inputs, density))
    shared = _shared_settings(slices, module, config)
    _leave_unknown_gates(config, module, slices, inputs[_base_of(config)])
    _write_alphas(automatic, coefficients)
    if density is not None:
        _write_default_density(config, density)
    base_layers = [
        layer
        for out_slice in slices
        for source in out_slice.sources
        if source.model == _base_of(config, out_slice)
        for layer in range(*source.layer_range)
    ]
    first, *others = inputs.values()
    by_tokenizer = bool(config.tokenizer or config.tokenizer_source)
    truncated = options.unsafe_truncate_embeddings and not by_tokenizer
    differences = adapt_output_config(output_config, first, others, base_layers, truncated=truncated)
    if by_tokenizer:  # mergekit sets the vocabulary's size when it has built the tokenizer
        differences = [d for d in differences if d.key != "vocab_size"]
    return PrePass(
        config.merge_method,
        settings,
        config,
        inputs,
        coefficients,
        models,
        density,
        shared,
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
    references = [source.model for out_slice in slices for source in out_slice.sources]
    references = _distinct([_base_of(config), *references])
    return open_models(references, architecture, options.trust_remote_code)


def _source_slices(
    slices: Sequence[OutputSliceDefinition],
    module: OutputModuleDefinition,
    config: MergeConfiguration,
    inputs: Mapping[ModelReference, InputModel],
) -> Iterator[SourceSlice]:
    if len(slices[0].sources) != len(slices[-1].sources):
        raise FimError(
            "slices: the first and the last must have the same number of sources, because mergekit takes the tensors "
            f"outside the layers from both; found {len(slices[0].sources)} and {len(slices[-1].sources)}"
        )
    for i, out_slice in enumerate(slices):
        base = _base_of(config, out_slice)
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
    by_hand = source.settings("alpha")
    return all(evaluate_setting(name, by_hand, validate=float) is not None for name in names)


def _saved_measurement(
    settings: Settings, bases: Mapping[ModelReference, ModelIdentity], options: MergeOptions
) -> Measurement | None:
    """What the config's `fisher` names, if it is a measurement of one of the bases and as the config wants it."""
    if settings.saved is None:
        return None
    found = load_measurement(settings.saved, options.transformers_cache)
    for name in sorted(settings.given):
        wanted, has = getattr(settings.fisher, name), getattr(found.fisher.settings, name)
        if wanted != has:
            raise FimError(
                f"fisher: {settings.saved} was measured with {name} {has}, but the config sets fisher_{name} to "
                f"{wanted}; leave out one of the two"
            )
    differences = [found.model.difference(identity) for identity in bases.values()]
    if all(differences):
        raise FimError(
            f"fisher: {settings.saved} is a measurement of {found.model.id}, which differs from the base "
            f"{next(iter(bases))} in its {differences[0]}; measure the base with `mergekit-fim fisher`, or leave "
            "`fisher` out"
        )
    return found


def _measure(
    base: InputModel,
    identity: ModelIdentity,
    sources: Sequence[SourceSlice],
    inputs: Mapping[ModelReference, InputModel],
    settings: Settings,
    saved: Measurement | None,
    dtype: str | None,
    options: MergeOptions,
) -> BaseCoefficients:
    references = _distinct(source.source.model for source in sources)
    pairs = {
        inputs[reference]: _population([s for s in sources if s.source.model == reference], len(base.layout.layers))
        for reference in references
    }
    sweep = task_vectors.TaskVectorSweep(base, pairs, dtype)
    sweep.outside()
    measurement, origin = _fisher(base, identity, settings, saved, dtype, options, sweep)
    norms = sweep.norms()
    LoaderCache().flush_all()  # a pickled checkpoint is in memory as long as its loader is
    models = []
    for model, layer_pairs in pairs.items():
        scores = importance_scores(
            [measurement.layers[pair.base_layer].fisher for pair in layer_pairs],
            [norms[model].layers[pair] for pair in layer_pairs],
        )
        alphas = merge_coefficients(scores, settings.mapping)
        used = _used_alphas([s for s in sources if s.source.model == model.reference], model, layer_pairs, alphas)
        # Layers without a score stay out of the mean: where they have no task vector, their α means nothing.
        scored = [alpha for alpha, score in zip(used, scores, strict=True) if score > 0] or used
        other = settings.alpha_other if settings.alpha_other is not None else math.fsum(scored) / len(scored)
        models.append(
            ModelCoefficients(model, tuple(layer_pairs), norms[model], tuple(scores), tuple(alphas), tuple(used), other)
        )
    return BaseCoefficients(base, identity, measurement, origin, tuple(models))


def _fisher(
    base: InputModel,
    identity: ModelIdentity,
    settings: Settings,
    saved: Measurement | None,
    dtype: str | None,
    options: MergeOptions,
    sweep: task_vectors.TaskVectorSweep,
) -> tuple[FisherMeasurement, str]:
    """The base's measurement and where it comes from; in any case the sweep over its layers is made."""
    reading, running = fisher.dtypes(base, dtype, options)
    entry = CacheEntry(identity, settings.fisher, reading, running)
    known, origin = saved, f"from {settings.saved}"
    if known is None and settings.cache:
        known, origin = entry.read(), f"kept from an earlier measurement: {entry.path}"
    if known is not None:
        layers = tqdm.trange(
            len(base.layout.layers), desc="Measuring task vectors", unit="layer", disable=options.quiet
        )
        for layer in layers:
            sweep.layer(layer)
        return known.fisher, origin
    # Along with the forward pass, so that the base's layers are read once for both. Broken weights end it there, before
    # the costlier backward pass.
    found = fisher.measure_base(base, settings.fisher, dtype, options, running=running, each_layer=sweep.layer)
    if settings.cache:
        entry.write(Measurement.of(found, identity))
    return found, ""


def _used_alphas(
    sources: Sequence[SourceSlice], model: InputModel, pairs: Sequence[LayerPair], alphas: Sequence[float]
) -> list[float]:
    computed = dict(zip(pairs, alphas, strict=True))
    used = dict(computed)
    for source in sources:
        by_hand = source.settings("alpha")
        for i, pair in enumerate(source.pairs() if by_hand else []):
            t = i / (len(source.pairs()) - 1) if len(source.pairs()) > 1 else 1.0  # as mergekit places gradients
            tensors = model.layout.layers[pair.source_layer].tensors
            values = [evaluate_setting(tensor.name, by_hand, t, validate=float) for tensor in tensors]
            used[pair] = math.fsum(computed[pair] if v is None else v for v in values) / len(values)
    return [used[pair] for pair in pairs]


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
    for base, model in _distinct((s.base, s.source.model) for s in sources):
        own = [s for s in sources if (s.base, s.source.model) == (base, model)]
        by_hand = [_effective(s.settings("alpha"), None) if s.settings("alpha") else None for s in own]
        yield ModelSettings(
            inputs[base],
            inputs[model],
            _common([_effective(s.settings("weight"), PARAMETERS["weight"].default) for s in own]),
            None if density is None else _common([_effective(s.settings("density"), density) for s in own]),
            density is not None and not any(s.settings("density") for s in own),
            _common(by_hand),
        )


def _shared_settings(
    slices: Sequence[OutputSliceDefinition], module: OutputModuleDefinition, config: MergeConfiguration
) -> dict[str, Any]:
    shared = {}
    for parameter in PARAMETERS.values():
        if parameter.scope is Scope.TENSOR:
            values = []
            for out_slice in slices:
                scopes = [out_slice.parameters or {}, module.parameters or {}, config.parameters or {}]
                given = [c for scope in scopes if parameter.name in scope for c in conditions(scope[parameter.name])]
                values.append(_effective(given, parameter.default_for(config.merge_method)))
            shared[parameter.name] = _common(values)
    return shared


def _common(values: list[Any]) -> Any:
    """One value if all are the same, else one per slice."""
    return values[0] if all(value == values[0] for value in values) else values


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
        by_hand = source.settings("alpha")
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


def _leave_unknown_gates(
    config: MergeConfiguration,
    module: OutputModuleDefinition,
    slices: Sequence[OutputSliceDefinition],
    base: InputModel,
) -> None:
    """Set `gate_scale` to 1, at the highest precedence, for fused tensors of which nobody knows the gate's part."""
    names = {
        tensor.name.removeprefix(layer.prefix)
        for layer in base.layout.layers
        for tensor in layer.tensors
        if is_fused(tensor.name) and not is_layout_known(tensor.name, base.config.model_type)
    }
    if not names:
        return
    exceptions = [ConditionalParameter(filter=name, value=1.0) for name in sorted(names)]
    default = PARAMETERS["gate_scale"].default_for(config.merge_method)
    config.parameters = {"gate_scale": default} | (config.parameters or {})
    for scope in (config, module, *slices):
        if scope.parameters and "gate_scale" in scope.parameters:
            given = conditions(scope.parameters["gate_scale"])
            scope.parameters = {**scope.parameters, "gate_scale": [*exceptions, *given]}


def _distinct(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))
