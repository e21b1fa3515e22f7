"""Normalised config -> which layers are merged into which, and which tensors stay as they are."""

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from statistics import fmean

from mergekit.common import ModelReference
from mergekit.config import ConfigReader, MergeConfiguration, OutputSliceDefinition, evaluate_setting

from mergekit_fim.config.settings import base_of, settings_of
from mergekit_fim.errors import FimError
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.prepass.result import SourceSlice
from mergekit_fim.prepass.task_vectors import LayerPair


def output_slices(config: MergeConfiguration) -> Iterator[tuple[str, OutputSliceDefinition, ConfigReader]]:
    """Every slice of a normalised config, with its module's name and mergekit's reader of its parameters."""
    for name, module in (config.modules or {}).items():
        for out_slice in module.slices or []:
            yield name, out_slice, ConfigReader(config=config, t=0, slice_out=out_slice, module=module)


def source_slices(
    name: str, config: MergeConfiguration, inputs: Mapping[ModelReference, InputModel]
) -> Iterator[SourceSlice]:
    """Check the slices of a module, and find the layers of every fine-tuned model in them.

    Raises:
        FimError: mergekit can't merge such slices.
    """
    module = (config.modules or {})[name]
    slices = module.slices or []
    layout = inputs[base_of(config)].layout
    where = f"modules.{name}.slices" if len(layout.modules) > 1 else "slices"
    if len(slices[0].sources) != len(slices[-1].sources):
        raise FimError(
            f"{where}: the first and the last must have the same number of sources, because mergekit takes the tensors "
            f"outside the layers from both; found {len(slices[0].sources)} and {len(slices[-1].sources)}"
        )
    for i, out_slice in enumerate(slices):
        base = base_of(config, out_slice)
        for source in out_slice.sources:
            start, end = source.layer_range
            count = inputs[source.model].num_layers(name)
            if not 0 <= start <= end <= count or (start == end and count):
                raise FimError(
                    f"{where}[{i}]: expected a layer_range within [0, {count}] for {source.model}, found "
                    f"[{start}, {end}]; change it"
                )
            if name != layout.stack and (len(slices) > 1 or (start, end) != (0, count)):
                raise FimError(
                    f"{where}[{i}]: expected all {count} layers of {source.model} in one slice, found "
                    f"[{start}, {end}]: only the language model's decoder layers can be sliced; use `models:` in this "
                    "module"
                )
        lengths = {source.layer_range[1] - source.layer_range[0] for source in out_slice.sources}
        if len(lengths) > 1:
            raise FimError(
                f"{where}[{i}]: its sources must all have the same number of layers, found {sorted(lengths)}"
            )
        base_start = next(source.layer_range[0] for source in out_slice.sources if source.model == base)
        reader = ConfigReader(config=config, t=0, slice_out=out_slice, module=module)
        its = base_start if name == layout.stack else None
        yield from (SourceSlice(name, base, its, s, reader) for s in out_slice.sources if s.model != base)


def by_model(
    sources: Sequence[SourceSlice], inputs: Mapping[ModelReference, InputModel]
) -> dict[tuple[InputModel, InputModel], list[SourceSlice]]:
    """The slices of each fine-tuned model, by (base, model)."""
    slices = defaultdict(list)
    for source in sources:
        slices[inputs[source.base], inputs[source.source.model]].append(source)
    return slices


def kept_tensors(config: MergeConfiguration, base: InputModel) -> dict[str, str]:
    """The tensors outside the language model that aren't merged, and whose they stay: `base` or `tuned`.

    Raises:
        FimError: there are several fine-tuned models to keep one from.
    """
    kept: dict[str, str] = {}
    for name, out_slice, reader in output_slices(config):
        given = settings_of(reader, "other_modules")
        names = [tensor.name for tensor in base.layout.modules[name]]
        others = [tensor for tensor in names if tensor in base.other_modules - base.absent]
        values = {tensor: evaluate_setting(tensor, given, validate=str) or "merge" for tensor in others}
        tuned = [source.model for source in out_slice.sources if source.model != base_of(config, out_slice)]
        if len(tuned) > 1 and "tuned" in values.values():
            raise FimError(
                f"other_modules: expected one fine-tuned model to keep {others[0]} from, found {len(tuned)}; set it to "
                "merge or base, or name one model for this module under `modules:`"
            )
        kept |= {tensor: value for tensor, value in values.items() if value != "merge"}
    return kept


def population(sources: Sequence[SourceSlice], num_layers: int) -> list[LayerPair]:
    """The pairs of layers whose scores are normalised together, in the base's order.

    They have every layer of the base, merged or not, so that a layer gets the same coefficient in a merge of the whole
    model and in one of some slices. A layer that no slice uses is paired with the model's layer of the same index.
    """
    pairs = {pair for source in sources for pair in source.pairs()}
    used = {pair.base_layer for pair in pairs}
    pairs |= {LayerPair(layer, layer) for layer in range(num_layers) if layer not in used}
    return sorted(pairs)


def alphas_of(source: SourceSlice, model: InputModel, computed: Mapping[LayerPair, float]) -> dict[LayerPair, float]:
    """What a slice's layers get: α or, where the user set it by hand, the mean over the layer's tensors."""
    used = {}
    for index, pair in enumerate(source.pairs()):
        names = [tensor.name for tensor in model.layout.layers[pair.source_layer].tensors]
        values = [source.value("alpha", name, source.gradient(index)) for name in names]
        used[pair] = fmean(computed[pair] if value is None else value for value in values)
    return used


def merged_tensors(
    group: Sequence[SourceSlice], inputs: Mapping[ModelReference, InputModel], kept: Container[str]
) -> Iterator[tuple[int | None, tuple[str, ...]]]:
    """List the tensors that an output slice merges: which of its layers each is in, its name in each fine-tuned model.

    Those outside the layers come first, with None for the layer. `kept` has the names of tensors that aren't merged.
    """
    models = [inputs[source.source.model] for source in group]
    for tensor in models[0].layout.modules[group[0].module]:
        if tensor.name not in kept:
            yield None, (tensor.name,) * len(group)
    for index, pairs in enumerate(zip(*(source.pairs() for source in group), strict=True)):
        layers = [model.layout.layers[pair.source_layer] for model, pair in zip(models, pairs, strict=True)]
        for tensors in zip(*(layer.tensors for layer in layers), strict=True):
            yield index, tuple(tensor.name for tensor in tensors)
