"""The street of `fim_kron`: opened models -> factors of all of them -> where the merge of each tensor finds its own.

As for the other methods, what the merge is told goes into the config as mergekit's own filtered per-model parameters,
by the names of the source layers: `alpha`, and which files of factors, and which layers in them, the tensors belong to.
"""

import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration, evaluate_setting
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_fim.config.parameters import PARAMETERS, FisherSettings
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
from mergekit_fim.prepass.factors import MeasuredFactors, measured_factors, settings_on
from mergekit_fim.prepass.measured import check_as_set, once
from mergekit_fim.prepass.result import Kron, KronLayer, KronModel, SourceSlice
from mergekit_fim.prepass.slices import alphas_of, merged_tensors
from mergekit_fim.prepass.task_vectors import LayerPair, TaskVectorNorms, TaskVectorSweep
from mergekit_fim.prepass.written import write_alpha
from mergekit_fim.processes import launched

Models = Mapping[ModelReference, InputModel]
_Merged = tuple[ModelReference, ModelReference]  # a base, and a fine-tuned model that is merged into it

# What mixes tokens, by the names that the architectures give it; all else that has factors counts as MLP.
_ATTENTION = re.compile(r"attn|attention|mixer|mamba|conv|recurrent|temporal")

# Of a stack of experts the report shows so many, evenly spaced.
_EXPERTS_OF_SPREAD = 8


@dataclass(frozen=True)
class _Tensor:
    """A tensor of one output slice.

    Attributes:
        index: which of the slice's layers it is in; None outside of them.
        names: in each of the slice's fine-tuned models.
        betas: their coefficients, α × the model's share of the weights.
    """

    index: int | None
    names: tuple[str, ...]
    betas: tuple[float, ...]


def run(
    config: MergeConfiguration,
    settings: Settings,
    inputs: Models,
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
    directions.forget()
    sweeps = _sweeps(inputs, sources, config.dtype, options)
    alphas, others = _write_alphas(sources, inputs, settings)
    groups = [list(its) for _, its in groupby(sources, key=lambda source: id(source.reader))]
    tensors = [list(_tensors(group, inputs, kept)) for group in groups]

    models = [inputs[reference] for reference in dict.fromkeys(r for s in sources for r in s.ends)]
    settings, factors = _factors(models, config.dtype, settings, options)
    _write_sources(sources, inputs, factors, settings)

    norms = {
        base: once(("norms", base, config.dtype, sweep.pairs), partial(_norms, sweep, options))
        for base, sweep in sweeps.items()
    }
    layers: dict[_Merged, dict[LayerPair, KronLayer]] = {key: {} for key in others}
    for group, its in zip(groups, tensors, strict=True):
        for index in range(len(group[0].pairs())):
            own = [tensor for tensor in its if tensor.index == index]
            parts = _spreads(group, own, loading.placement(options).device)
            for number, source in enumerate(group):
                pair, key = source.pairs()[index], source.ends
                beta = math.fsum(tensor.betas[number] for tensor in own) / len(own)
                norm, alpha = norms[key[0]][key[1]].layers[pair], alphas[id(source)][pair]
                layers[key][pair] = KronLayer(pair, norm, alpha, beta, parts[number])
    ordered = {key: sorted(found) for key, found in layers.items()}
    weighed = tuple(KronModel(*key, tuple(layers[key][p] for p in its), others[key]) for key, its in ordered.items())
    return settings, Kron(factors, weighed), list(_warnings(factors))


def _sweeps(
    inputs: Models, sources: Sequence[SourceSlice], dtype: str | None, options: MergeOptions
) -> dict[ModelReference, TaskVectorSweep]:
    """Make what measures the task vectors of each base, which checks that layers fit."""
    pairs: dict[ModelReference, dict[InputModel, dict[LayerPair, None]]] = {}
    for source in sources:
        its = pairs.setdefault(source.base, {}).setdefault(inputs[source.source.model], {})
        its.update(dict.fromkeys(source.pairs()))
    devices = loading.placement(options).devices()
    return {base: TaskVectorSweep(inputs[base], of_base, dtype, devices) for base, of_base in pairs.items()}


def _norms(sweep: TaskVectorSweep, options: MergeOptions) -> dict[ModelReference, TaskVectorNorms]:
    found = sweep.norms(quiet=options.quiet)
    LoaderCache().flush_all()  # a pickled checkpoint is in memory as long as its loader is
    return {model.reference: norms for model, norms in found.items()}


def _write_alphas(
    sources: Sequence[SourceSlice], inputs: Models, settings: Settings
) -> tuple[dict[int, dict[LayerPair, float]], dict[_Merged, float]]:
    """Put α into the config, behind what the user set by hand.

    Returns:
        By a source's id, what its layers get; by base and fine-tuned model, α outside the layers.
    """
    alpha = settings.mapping.alpha_mean
    assert alpha is not None
    alphas = {id(s): alphas_of(s, inputs[s.source.model], dict.fromkeys(s.pairs(), alpha)) for s in sources}
    others: dict[_Merged, float] = {}
    for key in dict.fromkeys(s.ends for s in sources):
        own = [a for s in sources if s.ends == key for a in alphas[id(s)].values()]
        mean = math.fsum(own) / len(own) if own else alpha
        others[key] = mean if settings.alpha_other is None else settings.alpha_other
    for source in sources:
        write_alpha(source, inputs[source.source.model], dict.fromkeys(source.pairs(), alpha), others[source.ends])
    return alphas, others


def _tensors(group: Sequence[SourceSlice], inputs: Models, kept: Container[str]) -> Iterator[_Tensor]:
    """List all tensors that one output slice merges, with their coefficients.

    Raises:
        FimError: coefficients that leave the base less than nothing.
    """
    for index, names in merged_tensors(group, inputs, kept):
        betas = _betas(group, names, 0.0 if index is None else group[0].gradient(index))
        try:
            check_betas(betas)
        except ValueError as error:
            raise FimError(
                f"{names[0]}: {error}: alpha × weight of each model, the weights divided by their sum with `normalize: "
                "true`; change `alpha` or `weight`"
            ) from None
        yield _Tensor(index, names, betas)


def _betas(group: Sequence[SourceSlice], names: Sequence[str], t: float) -> tuple[float, ...]:
    """Compute each fine-tuned model's β for one tensor, by its name in each; `t`: see `SourceSlice.gradient`."""

    def values(parameter: str, kind: type) -> list[Any]:
        default = PARAMETERS[parameter].default_for("fim_kron")
        found = [
            evaluate_setting(n, s.settings(parameter), t, validate=kind) for n, s in zip(names, group, strict=True)
        ]
        return [default if value is None else value for value in found]

    parts = shares(values("weight", float), values("normalize", bool)[0])
    return tuple(part * alpha for part, alpha in zip(parts, values("alpha", float), strict=True))


def _factors(
    models: Sequence[InputModel], dtype: str | None, settings: Settings, options: MergeOptions
) -> tuple[Settings, dict[InputModel, MeasuredFactors]]:
    """Find or record the factors of every model, all on the same tokens; the settings become those that were saved.

    Raises:
        FimError: a file can't be used, is of none of the models, or was recorded on other tokens than the merge's.
    """
    names = [name.strip() for name in settings.saved.split(",")] if settings.saved is not None else []
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
    found: dict[InputModel, MeasuredFactors] = {}
    for file in files:
        own = [model for model in models if not file.model.difference(identity(model))]
        wanted = settings_on(settings.fisher, draw_samples(settings.fisher, vocab_size))
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
        found |= dict.fromkeys(own, MeasuredFactors(file, f"from {file.path}"))

    def measure(model: InputModel) -> MeasuredFactors:
        return measured_factors(
            lambda: model,
            settings.fisher,
            dtype,
            launched.options_of_process(options),
            vocab_size=vocab_size,
            cache=settings.cache,
        )

    for model in models:
        key = ("factors", model.reference, dtype, settings.fisher, vocab_size)
        found[model] = found.get(model) or once(key, partial(measure, model))
    return settings, {model: found[model] for model in models}


def _write_sources(
    sources: Sequence[SourceSlice], inputs: Models, factors: Mapping[InputModel, MeasuredFactors], settings: Settings
) -> None:
    """Put into the config where the factors of each layer's tensors are."""
    assert settings.damping is not None
    for source in sources:
        base, model = inputs[source.base], inputs[source.source.model]
        told = {}
        for pair in source.pairs():
            prefixes = (m.layout.layers[i].prefixes for m, i in ((base, pair.base_layer), (model, pair.source_layer)))
            for of_base, of_model in zip(*prefixes, strict=False):
                ends = (factors[base].file.path, of_base), (factors[model].file.path, of_model)
                told[of_model] = directions.source(*ends, settings.damping)
        source.write(SOURCE, source.filters(model, told, ""))


def _spreads(group: Sequence[SourceSlice], tensors: Sequence[_Tensor], device: torch.device) -> list[dict[str, Spread]]:
    """Compute for each model of a slice the spreads of one layer's attention and MLP."""
    known: dict[object, list[Spread]] = {}
    parts: dict[str, list[list[Spread]]] = {}  # by matrix and model
    for tensor in tensors:
        told = [evaluate_setting(n, s.settings(SOURCE), validate=str) for n, s in zip(tensor.names, group, strict=True)]
        at = [place for place in directions.places(tensor.names[0], told) if place is not None]
        for place in at[:: -(-len(at) // _EXPERTS_OF_SPREAD) or 1]:
            key = place, tensor.betas
            try:
                known[key] = known.get(key) or spreads(place.rows(device), tensor.betas, place.damping)
            except ValueError as error:
                raise FimError(f"{tensor.names[0]}: {error}; measure again, or raise `damping`") from error
            local = local_name(tensor.names[0], group[0].pairs()[tensor.index or 0].source_layer)
            parts.setdefault("attention" if _ATTENTION.search(local) else "mlp", []).append(known[key])
    return [
        {part: _together([its[number] for its in found]) for part, found in parts.items()}
        for number in range(len(group))
    ]


def _together(spreads_: Sequence[Spread]) -> Spread:
    """Join several matrices' spreads: each matrix counts alike, and the number of directions is the mean one."""
    count = len(spreads_)
    mean = math.fsum(s.mean for s in spreads_) / count
    square = math.fsum(s.std**2 + (s.mean - mean) ** 2 for s in spreads_) / count
    number = math.fsum(s.directions for s in spreads_) / count
    return Spread(mean, math.sqrt(square), min(s.least for s in spreads_), max(s.largest for s in spreads_), number)


def _warnings(factors: Mapping[InputModel, MeasuredFactors]) -> Iterator[str]:
    for model, its in factors.items():
        yield from its.file.warnings
        if idle := its.file.not_reached:
            yield (
                f"{model}: no token came to the experts of {len(idle)} matrices such as {idle[0]}, which are merged by "
                "α alone; more fisher_samples reach more"
            )
