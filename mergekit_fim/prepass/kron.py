"""The street of `fim_kron`: opened models -> factors of all of them -> where the merge of each tensor finds its own.

As for the other methods, what the merge is told goes into the config as mergekit's own filtered per-model parameters,
by the names of the source layers: `alpha`, and which files of factors, and which layers in them, the tensors belong to.
"""

import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from statistics import fmean

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration, evaluate_setting
from mergekit.options import MergeOptions

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.config.settings import Settings
from mergekit_fim.errors import FimError, shown
from mergekit_fim.fisher import loading
from mergekit_fim.fisher.measure import check_measurable
from mergekit_fim.fisher.samples import draw_samples
from mergekit_fim.measurements.factors import FactorsFile
from mergekit_fim.measurements.store import DEFAULT_NAME_OF_FACTORS, local_file
from mergekit_fim.merging import directions
from mergekit_fim.merging.kron import Spread, check_betas, spreads
from mergekit_fim.merging.methods import SOURCE, shares
from mergekit_fim.models.identity import identity
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.models.layout import local_name
from mergekit_fim.prepass.factors import measured_factors, settings_on
from mergekit_fim.prepass.measured import check_as_set, once
from mergekit_fim.prepass.result import Kron, KronLayer, KronModel, SourceSlice
from mergekit_fim.prepass.slices import alphas_of, by_model, merged_tensors
from mergekit_fim.prepass.task_vectors import LayerPair, TaskVectorSweep
from mergekit_fim.prepass.written import write_alpha
from mergekit_fim.processes import launched

Models = Mapping[ModelReference, InputModel]
_Ends = tuple[ModelReference, ModelReference]  # a base, and a fine-tuned model that is merged into it
# A tensor of an output slice: which of the slice's layers it is in, None outside of them; its name in each fine-tuned
# model; and their β, α × the model's share of the weights.
_Tensor = tuple[int | None, tuple[str, ...], tuple[float, ...]]

# What mixes tokens, by the names that the architectures give it; all else that has factors counts as MLP.
_ATTENTION = re.compile(r"attn|attention|mixer|mamba|conv|recurrent|temporal")

# Of a stack of experts the report shows so many, evenly spaced.
_EXPERTS_OF_SPREAD = 8


def run(
    config: MergeConfiguration,
    settings: Settings,
    inputs: Models,
    sources: Sequence[SourceSlice],
    kept: Container[str],
    options: MergeOptions,
) -> tuple[Settings, Kron, list[str]]:
    """Record or find the factors of all models, and write into the config what the merge needs of them.

    Returns:
        The settings, with those of factors that were saved; what was found; what the user should know.

    Raises:
        FimError: layers that don't fit, coefficients out of range, or factors that can't be had or used.
    """
    directions.forget()
    where, dtype = loading.placement(options), config.dtype
    pairs: dict[ModelReference, dict[InputModel, list[LayerPair]]] = {}
    for (base, model), own in by_model(sources, inputs).items():
        pairs.setdefault(base.reference, {})[model] = sorted({pair for source in own for pair in source.pairs()})
    sweeps = {base: TaskVectorSweep(inputs[base], its, dtype, where.devices()) for base, its in pairs.items()}
    alphas, others = _write_alphas(sources, inputs, settings)
    groups = [list(its) for _, its in groupby(sources, key=lambda source: id(source.reader))]
    tensors = [list(_tensors(group, inputs, kept)) for group in groups]

    models = [inputs[reference] for reference in dict.fromkeys(r for s in sources for r in s.ends)]
    settings, factors = _factors(models, dtype, settings, options)
    _write_sources(sources, inputs, factors, settings)

    norms = {}
    for base, sweep in sweeps.items():
        key = ("norms", base, dtype, *((model.reference, *its) for model, its in pairs[base].items()))
        norms[base] = once(key, partial(sweep.norms, quiet=options.quiet))
    layers: dict[_Ends, dict[LayerPair, KronLayer]] = {ends: {} for ends in others}
    for group, its in zip(groups, tensors, strict=True):
        for index in range(len(group[0].pairs())):
            here = [tensor for tensor in its if tensor[0] == index]
            parts = _spreads(group, here, where.device)
            for number, source in enumerate(group):
                pair, (base, model) = source.pairs()[index], source.ends
                beta = fmean(betas[number] for _, _, betas in here)
                norm, alpha = norms[base][model].layers[pair], alphas[id(source)][pair]
                layers[base, model][pair] = KronLayer(pair, norm, alpha, beta, parts[number])
    weighed = (KronModel(*ends, tuple(its[p] for p in sorted(its)), others[ends]) for ends, its in layers.items())
    return settings, Kron(factors, tuple(weighed)), list(_warnings(factors))


def _write_alphas(
    sources: Sequence[SourceSlice], inputs: Models, settings: Settings
) -> tuple[dict[int, dict[LayerPair, float]], dict[_Ends, float]]:
    """Put α into the config, behind what the user set by hand.

    Returns:
        By a source's id, what its layers get; by base and fine-tuned model, α outside the layers.
    """
    alpha = settings.mapping.alpha_mean
    assert alpha is not None
    alphas = {id(s): alphas_of(s, inputs[s.source.model], dict.fromkeys(s.pairs(), alpha)) for s in sources}
    others = {}
    for ends in dict.fromkeys(s.ends for s in sources):
        own = [a for s in sources if s.ends == ends for a in alphas[id(s)].values()] or [alpha]
        others[ends] = fmean(own) if settings.alpha_other is None else settings.alpha_other
    for source in sources:
        write_alpha(source, inputs[source.source.model], dict.fromkeys(source.pairs(), alpha), others[source.ends])
    return alphas, others


def _tensors(group: Sequence[SourceSlice], inputs: Models, kept: Container[str]) -> Iterator[_Tensor]:
    """List all tensors that one output slice merges.

    Raises:
        FimError: coefficients that leave the base less than nothing.
    """
    for index, names in merged_tensors(group, inputs, kept):
        t = 0.0 if index is None else group[0].gradient(index)
        weights = [source.value("weight", name, t) for source, name in zip(group, names, strict=True)]
        parts = shares(weights, group[0].value("normalize", names[0], t))
        betas = tuple(p * s.value("alpha", n, t) for p, s, n in zip(parts, group, names, strict=True))
        try:
            check_betas(betas)
        except ValueError as error:
            raise FimError(
                f"{names[0]}: {error}: alpha × weight of each model, the weights divided by their sum with `normalize: "
                "true`; change `alpha` or `weight`"
            ) from None
        yield index, names, betas


def _factors(
    models: Sequence[InputModel], dtype: str | None, settings: Settings, options: MergeOptions
) -> tuple[Settings, dict[InputModel, FactorsFile]]:
    """Find or record the factors of every model, all on the same tokens; the settings become those that were saved.

    Raises:
        FimError: a file can't be used, is of none of the models, or was recorded on other tokens than the merge's.
    """
    names = [name.strip() for name in settings.saved.split(",")] if settings.saved else []
    if not all(names):
        raise FimError(f"fisher: expected files of factors, separated by commas, found {shown(settings.saved)}")
    where = {"kind": "factors", "default": DEFAULT_NAME_OF_FACTORS}
    files = [FactorsFile.open(local_file(name, options.transformers_cache, **where)) for name in names]
    if files:
        its = files[0].settings
        check_as_set(settings, its, files[0].path)
        settings = replace(settings, fisher=FisherSettings(its.samples, its.seq_len, its.seed))
    for model in models:
        check_measurable(model, settings.fisher)
    vocab_size = min(model.text_config.vocab_size for model in models)
    wanted = settings_on(settings.fisher, draw_samples(settings.fisher, vocab_size))
    found: dict[InputModel, FactorsFile] = {}
    for file in files:
        own = [model for model in models if not file.model.difference(identity(model))]
        if not own:
            raise FimError(
                f"fisher: {file.path} has the factors of {file.model.id}, which is none of the merge's models; record "
                "theirs with `mergekit-fim fisher --factors`, or leave `fisher` out"
            )
        if file.settings != wanted:
            raise FimError(
                f"fisher: {file.path} is of {file.settings}, expected the same tokens for all models, {wanted}; record "
                "it again with `mergekit-fim fisher --factors`, and --vocab-size where the vocabularies differ"
            )
        found |= dict.fromkeys(own, file.model_copy(update={"origin": f"from {file.path}"}))

    def record(model: InputModel) -> FactorsFile:
        asked = settings.fisher, dtype, launched.options_of_process(options)
        return measured_factors(lambda: model, *asked, vocab_size=vocab_size, cache=settings.cache)

    for model in models:
        key = ("factors", model.reference, dtype, settings.fisher, vocab_size)
        found[model] = found.get(model) or once(key, partial(record, model))
    return settings, {model: found[model] for model in models}


def _write_sources(
    sources: Sequence[SourceSlice], inputs: Models, factors: Mapping[InputModel, FactorsFile], settings: Settings
) -> None:
    """Put into the config where the factors of each layer's tensors are."""
    assert settings.damping is not None
    for source in sources:
        base, model = inputs[source.base], inputs[source.source.model]
        told = {}
        for pair in source.pairs():
            layers = base.layout.layers[pair.base_layer], model.layout.layers[pair.source_layer]
            for of_base, of_model in zip(*(layer.prefixes for layer in layers), strict=False):
                ends = (factors[base].path, of_base), (factors[model].path, of_model)
                told[of_model] = directions.source(*ends, settings.damping, settings.mapping.sharpness)
        source.write(SOURCE, source.filters(model, told, ""))


def _spreads(group: Sequence[SourceSlice], tensors: Sequence[_Tensor], device: torch.device) -> list[dict[str, Spread]]:
    """Compute for each model of a slice the spreads of one layer's attention and MLP."""
    known: dict[object, list[Spread]] = {}
    parts: dict[str, list[list[Spread]]] = {}  # by matrix and model
    for index, names, betas in tensors:
        told = [evaluate_setting(n, s.settings(SOURCE), validate=str) for n, s in zip(names, group, strict=True)]
        at = [place for place in directions.places(names[0], told) if place is not None]
        for place in at[:: -(-len(at) // _EXPERTS_OF_SPREAD) or 1]:
            key = place, betas
            try:
                known[key] = known.get(key) or spreads(place.rows(device), betas, place.damping, place.sharpness)
            except ValueError as error:
                raise FimError(f"{names[0]}: {error}; measure again, raise `damping`, or lower `sharpness`") from error
            local = local_name(names[0], group[0].pairs()[index or 0].source_layer)
            parts.setdefault("attention" if _ATTENTION.search(local) else "mlp", []).append(known[key])
    return [
        {part: _together([its[number] for its in found]) for part, found in parts.items()}
        for number in range(len(group))
    ]


def _together(spreads_: Sequence[Spread]) -> Spread:
    """Join several matrices' spreads: each matrix counts alike, and the number of directions is the mean one."""
    mean = fmean(s.mean for s in spreads_)
    square = fmean(s.std**2 + (s.mean - mean) ** 2 for s in spreads_)
    ends = min(s.least for s in spreads_), max(s.largest for s in spreads_)
    return Spread(mean, math.sqrt(square), *ends, fmean(s.directions for s in spreads_))


def _warnings(factors: Mapping[InputModel, FactorsFile]) -> Iterator[str]:
    for model, its in factors.items():
        yield from its.warnings
        if idle := its.not_reached:
            yield (
                f"{model}: no token came to the experts of {len(idle)} matrices such as {idle[0]}, which are merged by "
                "α alone; more fisher_samples reach more"
            )
