"""The street of `fim_kron`: opened models -> factors of all of them -> where the merge of each tensor finds its own.

As for the other methods, what the merge is told goes into the config as mergekit's own filtered per-model parameters,
by the names of the source layers: `alpha`, and which files of factors, and which layers in them, the tensors belong to.
"""

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration, evaluate_setting
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_fim.config.parameters import PARAMETERS, FisherSettings
from mergekit_fim.config.settings import Settings, settings_of
from mergekit_fim.errors import FimError, shown
from mergekit_fim.fisher import loading
from mergekit_fim.fisher.measure import check_measurable
from mergekit_fim.fisher.samples import draw_samples
from mergekit_fim.measurements.factors import FactorsFile
from mergekit_fim.measurements.store import DEFAULT_NAME_OF_FACTORS, local_file
from mergekit_fim.merging import directions
from mergekit_fim.merging.kron import Spread, check_betas, spread
from mergekit_fim.merging.methods import SOURCE, shares
from mergekit_fim.models.identity import identity
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.prepass.factors import MeasuredFactors, measured_factors
from mergekit_fim.prepass.measured import once
from mergekit_fim.prepass.result import Kron, KronLayer, KronModel, SourceSlice
from mergekit_fim.prepass.task_vectors import LayerPair, TaskVectorNorms, TaskVectorSweep
from mergekit_fim.processes import launched
from mergekit_fim.processes.together import in_all

# What mixes tokens, by the names that the architectures give it; all else that has factors counts as MLP.
_ATTENTION = re.compile(r"attn|attention|mixer|mamba|conv|recurrent|temporal")

# Of a stack of experts the report shows so many, evenly spaced.
_EXPERTS_OF_SPREAD = 8


def run(
    config: MergeConfiguration,
    settings: Settings,
    inputs: Mapping[ModelReference, InputModel],
    sources: Sequence[SourceSlice],
    kept: Container[str],
    options: MergeOptions,
) -> tuple[Settings, Kron, list[str]]:
    """Record or find the factors of all models, and write into the config what the merge needs of them.

    Args:
        config: normalised; changed in place: per-model `alpha`, and where the factors are.
        settings: of the pre-pass.
        inputs: every model.
        sources: the fine-tuned models' runs of layers.
        kept: the names of tensors outside the language model that aren't merged.
        options: the merge's options.

    Returns:
        The settings, with those of factors that were saved; what was found; what the user should know.

    Raises:
        FimError: layers that don't fit, coefficients out of range, or factors that can't be had or used.
    """
    kron, alpha = settings.kron, settings.mapping.alpha_mean
    assert kron is not None
    assert alpha is not None
    directions.forget()
    sweeps = {
        base: _sweep(inputs[base], sources, inputs, config, options) for base in _distinct(s.base for s in sources)
    }
    others = {(s.base, s.source.model): _outside(s, sources, inputs, settings) for s in sources}
    by_hand = {id(s): s.settings("alpha") for s in sources}
    for source in sources:
        model, other = inputs[source.source.model], others[source.base, source.source.model]
        layers = {p: alpha for pair in source.pairs() for p in model.layout.layers[pair.source_layer].prefixes}
        own = [*by_hand[id(source)], *source.filters(model, layers, other)]
        source.source.parameters = {**(source.source.parameters or {}), "alpha": own}
    groups = _groups(sources)
    for group in groups:
        _check_coefficients(group, inputs, kept)

    models = [inputs[reference] for reference in _distinct(r for s in sources for r in (s.base, s.source.model))]
    saved = _saved(settings, models, options)
    if saved:
        its = {name: getattr(saved[0].settings, name) for name in vars(settings.fisher)}
        settings = replace(settings, fisher=FisherSettings(**its))
    factors = _factors(models, saved, config.dtype, settings, options)
    for source in sources:
        base, model = inputs[source.base], inputs[source.source.model]
        told = {}
        for pair in source.pairs():
            prefixes = (m.layout.layers[i].prefixes for m, i in ((base, pair.base_layer), (model, pair.source_layer)))
            for of_base, of_model in zip(*prefixes, strict=False):
                ends = (factors[base][0].path, of_base), (factors[model][0].path, of_model)
                told[of_model] = str(directions.Source(*ends, kron.factors, kron.damping))
        source.source.parameters = {
            **(source.source.parameters or {}),
            SOURCE: source.filters(model, told, ""),
        }

    def weigh() -> list[KronModel]:
        norms = {base: _norms(base, sweep, config.dtype, options) for base, sweep in sweeps.items()}
        return list(_models(groups, inputs, norms, others, loading.placement(options).device))

    found = in_all(launched.together(), lambda: [_portable(m) for m in weigh()] if launched.is_main() else [])[0]
    result = tuple(KronModel(inputs[base], inputs[model], layers, others[base, model]) for base, model, layers in found)
    return settings, Kron(factors, result), list(_warnings(factors))


def _portable(model: KronModel) -> tuple[ModelReference, ModelReference, tuple[KronLayer, ...]]:
    """What processes can send one another."""
    return model.base.reference, model.model.reference, model.layers


def _distinct(items: Iterable[ModelReference]) -> list[ModelReference]:
    return list(dict.fromkeys(items))


def _groups(sources: Sequence[SourceSlice]) -> list[list[SourceSlice]]:
    """The sources of each output slice."""
    groups: dict[int, list[SourceSlice]] = {}
    for source in sources:
        groups.setdefault(id(source.reader), []).append(source)
    return list(groups.values())


def _outside(
    source: SourceSlice,
    sources: Sequence[SourceSlice],
    inputs: Mapping[ModelReference, InputModel],
    settings: Settings,
) -> float:
    """α outside the decoder layers: `alpha_other`, or the mean of the layers'."""
    if settings.alpha_other is not None:
        return settings.alpha_other
    own = [s for s in sources if (s.base, s.source.model) == (source.base, source.source.model)]
    default, model = settings.mapping.alpha_mean or 0.0, inputs[source.source.model]
    alphas = [_alpha(s, model, index, default) for s in own for index in range(len(s.pairs()))]
    return math.fsum(alphas) / len(alphas) if alphas else default


def _alpha(source: SourceSlice, model: InputModel, index: int, default: float | None = None) -> float:
    """The mean of α over the tensors of one of a slice's layers."""
    settings = source.settings("alpha")
    tensors = model.layout.layers[source.pairs()[index].source_layer].tensors
    values = [evaluate_setting(t.name, settings, _gradient(source, index), validate=float) for t in tensors]
    return math.fsum(default if v is None and default is not None else v for v in values) / len(values)


def _gradient(source: SourceSlice, index: int) -> float:
    """Where a layer of a slice stands on mergekit's gradients."""
    count = len(source.pairs())
    return index / (count - 1) if count > 1 else 1.0


def _betas(
    group: Sequence[SourceSlice], inputs: Mapping[ModelReference, InputModel], index: int | None, local: str
) -> list[float]:
    """β of each model of a slice for one tensor: of one of the layers by its local name, or outside them."""
    names, t = [local] * len(group), 0.0
    if index is not None:
        layers = [inputs[s.source.model].layout.layers[s.pairs()[index].source_layer] for s in group]
        names = [next(t.name for t in layer.tensors if layer.local(t.name) == local) for layer in layers]
        t = _gradient(group[0], index)

    def value(name: str, setting: list[ConditionalParameter], kind: type) -> float:
        found: float = evaluate_setting(name, setting, t, validate=kind)
        return found

    def default(name: str) -> ConditionalParameter:
        return ConditionalParameter(value=PARAMETERS[name].default_for("fim_kron"))

    weights = [
        value(name, [*s.settings("weight"), default("weight")], float) for s, name in zip(group, names, strict=True)
    ]
    alphas = [value(name, s.settings("alpha"), float) for s, name in zip(group, names, strict=True)]
    normalize = value(names[0], [*settings_of(group[0].reader, "normalize"), default("normalize")], bool)
    return [part * alpha for part, alpha in zip(shares(weights, bool(normalize)), alphas, strict=True)]


def _check_coefficients(
    group: Sequence[SourceSlice], inputs: Mapping[ModelReference, InputModel], kept: Container[str]
) -> None:
    """Check that the models' coefficients leave the base at least nothing, before anything is measured.

    Raises:
        FimError: they don't.
    """
    first = inputs[group[0].source.model]
    outside = [t.name for t in first.layout.modules[group[0].module] if t.name not in kept]
    named: list[tuple[int | None, str, str]] = [(None, name, name) for name in outside]
    for index, pair in enumerate(group[0].pairs()):
        layer = first.layout.layers[pair.source_layer]
        named += [(index, layer.local(t.name), t.name) for t in layer.tensors]
    for where, local, name in named:
        try:
            check_betas(_betas(group, inputs, where, local))
        except ValueError as error:
            raise FimError(
                f"{name}: {error}: alpha × weight of each model, the weights divided by their sum with `normalize: "
                "true`; change `alpha` or `weight`"
            ) from None


def _sweep(
    base: InputModel,
    sources: Sequence[SourceSlice],
    inputs: Mapping[ModelReference, InputModel],
    config: MergeConfiguration,
    options: MergeOptions,
) -> TaskVectorSweep:
    """What measures the task vectors, which checks that layers fit."""
    pairs: dict[InputModel, list[LayerPair]] = {}
    for source in sources:
        if source.base == base.reference:
            own = pairs.setdefault(inputs[source.source.model], [])
            own += [pair for pair in source.pairs() if pair not in own]
    return TaskVectorSweep(base, pairs, config.dtype, loading.placement(options).devices())


def _norms(
    base: ModelReference, sweep: TaskVectorSweep, dtype: str | None, options: MergeOptions
) -> Mapping[ModelReference, TaskVectorNorms]:
    def measure() -> Mapping[ModelReference, TaskVectorNorms]:
        found = sweep.norms(quiet=options.quiet)
        LoaderCache().flush_all()  # a pickled checkpoint is in memory as long as its loader is
        return {model.reference: norms for model, norms in found.items()}

    return once(("norms", base, dtype, sweep.pairs), measure)


def _saved(settings: Settings, models: Sequence[InputModel], options: MergeOptions) -> list[FactorsFile]:
    """The files of factors that the config names.

    Raises:
        FimError: one can't be used, is of none of the models, or was recorded with other settings than the config's.
    """
    names = [name.strip() for name in (settings.saved or "").split(",")]
    if settings.saved is not None and not all(names):
        raise FimError(f"fisher: expected files of factors, separated by commas, found {shown(settings.saved)}")
    where = {"kind": "factors", "default": DEFAULT_NAME_OF_FACTORS}
    saved = [FactorsFile.open(local_file(name, options.transformers_cache, **where)) for name in names if name]
    identities = [identity(model) for model in models] if saved else []
    for file in saved:
        if all(file.identity.difference(own) for own in identities):
            raise FimError(
                f"fisher: {file.path} has the factors of {file.identity.id}, which is none of the merge's models; "
                "record theirs with `mergekit-fim fisher --factors`, or leave `fisher` out"
            )
        for name in sorted(settings.given):
            wanted, has = getattr(settings.fisher, name), getattr(file.settings, name)
            if wanted != has:
                raise FimError(
                    f"fisher: {file.path} was recorded with {name} {has}, but the config sets fisher_{name} to "
                    f"{wanted}; leave out one of the two"
                )
    return saved


def _factors(
    models: Sequence[InputModel],
    saved: Sequence[FactorsFile],
    dtype: str | None,
    settings: Settings,
    options: MergeOptions,
) -> dict[InputModel, tuple[FactorsFile, str]]:
    """The factors of every model of the merge, all on the same tokens; and where each file comes from."""
    assert settings.kron is not None
    for model in models:
        check_measurable(model, settings.fisher)
    vocabulary = min(model.text_config.vocab_size for model in models)
    kind, samples = settings.kron.factors, draw_samples(settings.fisher, vocabulary)

    def measure(model: InputModel) -> MeasuredFactors:
        return measured_factors(
            lambda: model,
            settings.fisher,
            dtype,
            launched.options_of_process(options),
            kind=kind,
            samples=samples,
            saved=saved,
            cache=settings.cache,
            state=launched.together(),
        )

    found = {}
    for model in models:
        key = ("factors", model.reference, dtype, settings.fisher, settings.saved, kind, vocabulary)
        made = once(key, partial(measure, model))
        found[model] = made.file, made.origin
    return found


def _models(
    groups: Sequence[Sequence[SourceSlice]],
    inputs: Mapping[ModelReference, InputModel],
    norms: Mapping[ModelReference, Mapping[ModelReference, TaskVectorNorms]],
    others: Mapping[tuple[ModelReference, ModelReference], float],
    device: torch.device,
) -> Iterator[KronModel]:
    layers: dict[tuple[ModelReference, ModelReference], dict[LayerPair, KronLayer]] = {key: {} for key in others}
    for group in groups:
        first = inputs[group[0].source.model]
        for index in range(len(group[0].pairs())):
            spreads = _spreads(group, inputs, index, device)
            tensors = first.layout.layers[group[0].pairs()[index].source_layer]
            betas = [_betas(group, inputs, index, tensors.local(tensor.name)) for tensor in tensors.tensors]
            for number, source in enumerate(group):
                model, pair = inputs[source.source.model], source.pairs()[index]
                layers[source.base, source.source.model][pair] = KronLayer(
                    pair,
                    norms[source.base][model.reference].layers[pair],
                    _alpha(source, model, index),
                    math.fsum(of_tensor[number] for of_tensor in betas) / len(betas),
                    {part: _together(found[number]) for part, found in spreads.items()},
                )
    for (base, model), found in layers.items():
        ordered = sorted(found.values(), key=lambda layer: (layer.pair.base_layer, layer.pair.source_layer))
        yield KronModel(inputs[base], inputs[model], tuple(ordered), others[base, model])


def _spreads(
    group: Sequence[SourceSlice], inputs: Mapping[ModelReference, InputModel], index: int, device: torch.device
) -> dict[str, list[list[Spread]]]:
    """Of the attention and the MLP of a layer, for each model, the spreads of their matrices."""
    first = group[0]
    layer = inputs[first.source.model].layout.layers[first.pairs()[index].source_layer]
    found: dict[str, list[list[Spread]]] = {}
    known: dict[object, list[Spread]] = {}
    for tensor in layer.tensors:
        at = [place for place in _places(group, inputs, index, layer.local(tensor.name)) if place is not None]
        at = at[:: -(-len(at) // _EXPERTS_OF_SPREAD)] if at else []
        betas = _betas(group, inputs, index, layer.local(tensor.name))
        for place in at:
            key = place, tuple(betas)
            if key not in known:
                a, g = place.rows(device)
                try:
                    known[key] = [spread(m, a, g, betas, place.damping) for m in range(len(group))]
                except ValueError as error:
                    raise FimError(f"{tensor.name}: {error}; measure again, or raise `damping`") from error
            part = "attention" if _ATTENTION.search(layer.local(tensor.name)) else "mlp"
            for of_model, its in zip(found.setdefault(part, [[] for _ in group]), known[key], strict=True):
                of_model.append(its)
    return found


def _places(
    group: Sequence[SourceSlice], inputs: Mapping[ModelReference, InputModel], index: int, local: str
) -> list[directions.Place | None]:
    """Where the merge finds the factors of a tensor of one of a slice's layers, by its local name."""
    told, name = [], ""
    for source in group:
        layer = inputs[source.source.model].layout.layers[source.pairs()[index].source_layer]
        name = next(t.name for t in layer.tensors if layer.local(t.name) == local)
        text = evaluate_setting(name, source.settings(SOURCE), validate=str)
        if not text:
            return []
        told.append(directions.Source.parse(text))
    return directions.places(name, told)


def _together(spreads: Sequence[Spread]) -> Spread:
    """Several matrices' as one: their directions count alike, and of these there are as many as in the mean one."""
    count = len(spreads)
    mean = math.fsum(s.mean for s in spreads) / count
    square = math.fsum(s.std**2 + (s.mean - mean) ** 2 for s in spreads) / count
    directions_of = math.fsum(s.directions for s in spreads) / count
    return Spread(
        mean, math.sqrt(square), min(s.least for s in spreads), max(s.largest for s in spreads), directions_of
    )


def _warnings(factors: Mapping[InputModel, tuple[FactorsFile, str]]) -> Iterator[str]:
    for model, (file, _) in factors.items():
        yield from file.warnings
        idle = [*file.not_reached]
        for name in file.names:
            idle += [f"{name}[{i}]" for i, keys in enumerate(file.keys_of(name)) if keys is None]
        if idle:
            yield (
                f"{model}: no token came to the experts of {len(idle)} matrices such as {idle[0]}, which are merged by "
                "α alone; more fisher_samples reach more"
            )
