"""Base model + random tokens -> Fisher information per decoder layer."""

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import tqdm
from mergekit.common import dtype_from_name
from mergekit.options import MergeOptions
from torch import nn
from transformers import PreTrainedModel

from mergekit_fim.config.parameters import FLOAT_DTYPES, FisherSettings
from mergekit_fim.errors import FimError, is_out_of_memory, reason
from mergekit_fim.fisher import loading
from mergekit_fim.fisher.batched import batched_engine
from mergekit_fim.fisher.engine import FisherEngine, ForwardError, NotSupportedError, autograd_engine
from mergekit_fim.fisher.experts import ReachedExperts
from mergekit_fim.fisher.loading import LoadedModel, Placement, load_model
from mergekit_fim.fisher.samples import draw_samples
from mergekit_fim.fisher.weights import ResidentWeights, Weights
from mergekit_fim.measurements.record import FisherMeasurement, LayerFisher
from mergekit_fim.models.inputs import InputModel

T = TypeVar("T")

# Far beyond any use: as many take a model of 1.5 billion parameters weeks on a CPU.
_MOST_TOKENS = 1 << 24


class NotFiniteError(FimError):
    """A gradient that is NaN or infinite."""


@contextlib.contextmanager
def _prepared(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients but those that the engine asks for; everything as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        model.eval()
        model.requires_grad_(False)
        for parameter in gradients:
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, value in required.items():
            parameter.requires_grad_(value)
            parameter.grad = gradients[parameter]
        for module, mode in training.items():
            module.training = mode


def measure(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    settings: FisherSettings,
    *,
    engine: FisherEngine = batched_engine,
    reference: FisherEngine = autograd_engine,
    weights: Weights | None = None,
    name: str = "the base model",
    quiet: bool = False,
) -> FisherMeasurement:
    """Measure the Fisher information of every decoder layer on random tokens.

    Args:
        model: a causal language model; it is left as it was.
        layers: its decoder layers, in order.
        settings: how many tokens, which, and which labels.
        engine: how the gradient norms are computed.
        reference: how they are computed of a model that `engine` can't run.
        weights: where the model's weights are; by default in the model.
        name: what to call the model in an error.
        quiet: no progress bar.

    Raises:
        NotFiniteError: a value that isn't finite, naming the layer.
        NotSupportedError: the engine can't run this model, and its weights are not in memory for `reference`.
    """
    vocab_size = model.config.get_text_config().vocab_size
    weights = weights or ResidentWeights()
    samples = draw_samples(settings, vocab_size)
    warnings: list[str] = []
    experts = ReachedExperts(layers)
    steps = 2 * len(layers) * len(samples.input_ids)
    with (
        tqdm.tqdm(total=steps, desc="Measuring Fisher information", unit="step", disable=quiet) as progress,
        _prepared(model),
        experts.watching(),
    ):
        try:
            norms = _by(engine, name, model, layers, samples, progress.update, weights, warnings.append)
        except NotSupportedError:
            if not isinstance(weights, ResidentWeights):
                raise
            progress.reset()
            norms = _by(reference, name, model, layers, samples, progress.update, weights, warnings.append)
    measured = []
    for index, layer in enumerate(layers):
        column = tuple(norms[:, index].tolist())
        if not all(math.isfinite(norm) for norm in column):
            raise NotFiniteError(
                f"{name}: the Fisher information of decoder layer {index} isn't finite "
                f"(in {model.dtype}); check the checkpoint for NaN, or set a wider `dtype:` such as bfloat16 or float32"
            )
        parameters = sum(p.numel() for p in layer.parameters())
        measured.append(LayerFisher(index, parameters, column, experts.of_layer(index)))
    lines = tuple(f"{name}: {line}" for line in warnings)
    return FisherMeasurement(vocab_size, str(model.dtype).removeprefix("torch."), settings, tuple(measured), lines)


def _by(engine: FisherEngine, name: str, *arguments: Any) -> torch.Tensor:
    """What the engine finds; an error of the model's code with the model's name."""
    try:
        return engine(*arguments)
    except ForwardError as error:
        raise FimError(f"{name}: {error}") from error


def check_measurable(base: InputModel, settings: FisherSettings) -> None:
    """Check that the base can be run on such sequences.

    Raises:
        FimError: the sequences are longer than the model's positions, or far too many.
    """
    if settings.samples * settings.seq_len > _MOST_TOKENS:
        raise FimError(
            f"fisher_samples × fisher_seq_len must be at most {_MOST_TOKENS:,} tokens, found {settings.samples:,} × "
            f"{settings.seq_len:,}; 8 × 64 is what the paper takes"
        )
    limit = getattr(base.text_config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < settings.seq_len:  # XLNet's is -1
        raise FimError(f"fisher_seq_len must be at most the {limit} positions of {base}, found {settings.seq_len}")


def dtypes(base: InputModel, dtype: str | None, options: MergeOptions) -> tuple[torch.dtype, torch.dtype]:
    """What most of the weights are read as, the merge's dtype or the checkpoint's own, and what the model runs in.

    Which is the faster on a CPU is timed, so that two machines might choose differently.

    Raises:
        FimError: `dtype` isn't one of floating-point numbers that a model can be run in.
    """
    if dtype is not None and dtype.removeprefix("torch.") not in FLOAT_DTYPES:
        raise FimError(f"dtype: expected one of {', '.join(FLOAT_DTYPES)}, found {dtype}")
    reading = dtype_from_name(dtype) or base.stored_dtype()
    return reading, loading.running_dtype(reading, loading.placement(options).device)


def measure_checkpoint(
    base: InputModel,
    settings: FisherSettings,
    dtype: str | None,
    options: MergeOptions,
    *,
    engine: FisherEngine = batched_engine,
    reference: FisherEngine = autograd_engine,
    running: torch.dtype | None = None,
    beside: loading.Beside | None = None,
) -> FisherMeasurement:
    """Load the base model, measure it, and let it go.

    Args:
        base: the model.
        settings: how many tokens, which, and which labels.
        dtype: the merge's dtype, or None for the checkpoint's own.
        options: the merge's options, which say where it runs.
        engine: see `measure`; likewise `reference`, with all of the model in memory.
        running: what to run it in; by default as `dtypes` has it.
        beside: is shown every tensor that is read whole, on the device that it is for; from several threads.

    Raises:
        FimError: it can't be loaded, doesn't fit, or a value isn't finite.
    """

    def work(loaded: LoadedModel, whole: bool) -> FisherMeasurement:
        return measure(
            loaded.model,
            loaded.layers,
            settings,
            engine=reference if whole else engine,
            reference=reference,
            weights=loaded.weights,
            name=str(base),
            quiet=options.quiet,
        )

    found, warnings = with_model(base, settings, dtype, options, work, running=running, beside=beside)
    return replace(found, warnings=(*warnings, *found.warnings))


def with_model(
    base: InputModel,
    settings: FisherSettings,
    dtype: str | None,
    options: MergeOptions,
    work: Callable[[LoadedModel, bool], T],
    *,
    running: torch.dtype | None = None,
    beside: loading.Beside | None = None,
) -> tuple[T, list[str]]:
    """Load a model, do something with it, and let it go; again in another way where memory or digits don't suffice.

    Args:
        base: the model.
        settings: how long its sequences are.
        dtype: the merge's dtype, or None for the checkpoint's own.
        options: the merge's options, which say where it runs.
        work: is given the model, and whether all of it is in memory because it can't be run layer by layer; raises
            `NotSupportedError` where it can't be, and `NotFiniteError`.
        running: what to run it in; by default as `dtypes` has it.
        beside: is shown every tensor that is read whole, on the device that it is for; from several threads.

    Returns:
        What `work` returned, and what the user should know about how it was run, a line each.

    Raises:
        FimError: it can't be loaded, doesn't fit, or a value isn't finite.
    """
    where = first = loading.placement(options)
    warnings: list[str] = []
    whole = False  # whether all of the model must be in memory
    rows = True  # whether its input embeddings needn't be
    loaded = None
    try:
        while True:
            try:
                loaded = load_model(base, dtype, options, where, running=running, rows=rows, beside=beside)
                if whole and loaded.placement.streamed:
                    raise torch.OutOfMemoryError
                return work(loaded, whole), warnings
            except NotFiniteError:
                assert loaded is not None
                if loaded.model.dtype is not torch.float16:
                    raise
                running = torch.float32 if where.device.type == "cpu" else torch.bfloat16
                warnings.append(
                    f"the Fisher pre-pass of {base} overflows in float16 and was run in "
                    f"{str(running).removeprefix('torch.')}; a `dtype:` of bfloat16 or float32 merges it more safely"
                )
            except NotSupportedError as error:
                if rows and loaded is not None and loaded.placement.streamed:  # Gemma 4's code looks into them
                    rows = False
                else:
                    why = f" ({reason(error.__cause__)})" if error.__cause__ is not None else ""
                    where, whole = replace(where, streamed=False), True
                    warnings.append(
                        f"{base} can't be run layer by layer{why}: it was measured with all of it in memory"
                    )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if whole and where.device.type != "cpu":
                    warnings.append(f"{base} doesn't fit on {where.device}, and was measured on the CPU")
                    where = Placement(torch.device("cpu"), spread=False, streamed=False)
                    running = loading.running_dtype(dtype_from_name(dtype) or base.stored_dtype(), where.device)
                elif (loaded.placement if loaded else where).streamed or where.device.type == "cpu":
                    raise
                else:
                    where = replace(where, streamed=True, spread=False)
            loaded = None
            for device in first.devices():
                _free_memory(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        on_cpu = first.device.type == "cpu"
        remedy = "free some memory" if on_cpu else "merge without --cuda, --device and --multi-gpu"
        raise FimError(
            f"{base}: {first.device} has too little memory for the Fisher pre-pass, which needs that of one decoder "
            f"layer and one sequence of {settings.seq_len} tokens; lower fisher_seq_len (--seq-len), or {remedy}"
        ) from None
    finally:
        loaded = None  # or its memory couldn't be given back
        for device in first.devices():
            _free_memory(device)


def _free_memory(device: torch.device) -> None:
    """Give back an accelerator's memory that nothing refers to any more, before the next needs it."""
    if device.type != "cpu":
        gc.collect()
        torch.get_device_module(device).empty_cache()
