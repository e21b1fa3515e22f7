"""Base model + random tokens -> Fisher information per decoder layer."""

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

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
from mergekit_fim.fisher.loading import LoadedModel, Placement, load_to_run
from mergekit_fim.fisher.samples import draw_samples
from mergekit_fim.fisher.weights import Beside, ResidentWeights, Weights
from mergekit_fim.measurements.record import FisherMeasurement, LayerFisher
from mergekit_fim.models.inputs import InputModel

T = TypeVar("T")

# Far beyond any use: so many tokens take a model of 1.5 billion parameters weeks on a CPU.
_MOST_TOKENS = 1 << 24


class NotFiniteError(FimError):
    """A gradient that is NaN or infinite."""


@contextlib.contextmanager
def _prepared(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Set evaluation mode, without gradients but those that the engine asks for, and undo it at the end."""
    training = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False).grad = None
        with torch.enable_grad():
            yield
    except ForwardError as error:
        raise FimError(f"{name}: {error}") from error
    finally:
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required).grad = gradient
        for module, mode in training:
            module.training = mode


def measure_model(
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
    """Measure the Fisher information of every decoder layer of a causal language model on random tokens.

    The model is left as it was. `engine` computes the gradient norms, or `reference` if `engine` can't run the model.
    The weights are by default in the model. Errors call it by its `name`.

    Raises:
        NotFiniteError: a value that isn't finite, naming the layer.
        NotSupportedError: the engine can't run this model, and its weights are not in memory for `reference`.
        FimError: the model's own code fails.
    """
    vocab_size = model.config.get_text_config().vocab_size
    weights = weights or ResidentWeights()
    samples = draw_samples(settings, vocab_size)
    warnings, experts = list[str](), ReachedExperts(layers)
    steps = 2 * len(layers) * len(samples.input_ids)
    with (
        tqdm.tqdm(total=steps, desc="Measuring Fisher information", unit="step", disable=quiet) as progress,
        _prepared(model, name),
        experts.watching(),
    ):
        given = (model, layers, samples, progress.update, weights, warnings.append)
        try:
            norms = engine(*given)
        except NotSupportedError:
            if not isinstance(weights, ResidentWeights):
                raise
            progress.reset()
            norms = reference(*given)
    measured = []
    for index, layer in enumerate(layers):
        column = tuple(norms[:, index].tolist())
        if not all(map(math.isfinite, column)):
            raise NotFiniteError(
                f"{name}: the Fisher information of decoder layer {index} isn't finite "
                f"(in {model.dtype}); check the checkpoint for NaN, or set a wider `dtype:` such as bfloat16 or float32"
            )
        parameters = sum(p.numel() for p in layer.parameters())
        measured.append(LayerFisher(index, parameters, column, experts.of_layer(index)))
    lines = tuple(f"{name}: {line}" for line in warnings)
    return FisherMeasurement(vocab_size, str(model.dtype).removeprefix("torch."), settings, tuple(measured), lines)


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
    """Say what most of the weights are read as, the merge's dtype or the checkpoint's own, and what the model runs in.

    Which is the faster on a CPU is timed, so two machines may choose differently.

    Raises:
        FimError: `dtype` isn't one of floating-point numbers that a model can be run in.
    """
    if dtype is not None and dtype.removeprefix("torch.") not in FLOAT_DTYPES:
        raise FimError(f"dtype: expected one of {', '.join(FLOAT_DTYPES)}, found {dtype}")
    device = loading.placement(options).device
    return dtype_from_name(dtype) or base.stored_dtype(), loading.default_dtype(base, dtype, device)


def measure_checkpoint(
    base: InputModel,
    settings: FisherSettings,
    dtype: str | None,
    options: MergeOptions,
    *,
    engine: FisherEngine = batched_engine,
    reference: FisherEngine = autograd_engine,
    running: torch.dtype | None = None,
    beside: Beside | None = None,
) -> FisherMeasurement:
    """Load the base model, measure it, and let it go; see `measure_model` and, for the rest, `with_model`."""
    measure = partial(measure_model, reference=reference, name=str(base), quiet=options.quiet)

    def work(its: LoadedModel, whole: bool) -> FisherMeasurement:
        return measure(its.model, its.layers, settings, engine=reference if whole else engine, weights=its.weights)

    measured, warnings = with_model(base, settings.seq_len, dtype, options, work, running=running, beside=beside)
    return replace(measured, warnings=(*warnings, *measured.warnings))


@dataclass(frozen=True)
class _Attempt:
    """One way to run a model."""

    where: Placement
    running: torch.dtype | None  # what it runs in; by default as `dtypes` has it
    rows: bool = True  # whether its input embeddings needn't be in memory
    whole: bool = False  # whether all of it must be
    why: str | None = None  # what the user should know about why it is tried

    def after(self, error: Exception, loaded: LoadedModel | None, base: InputModel, dtype: str | None) -> "_Attempt":
        """Choose what to try after this failed, with the model `loaded` or not yet; itself where nothing is left."""
        on_cpu = self.where.device.type == "cpu"
        streamed = self.where.streamed if loaded is None else loaded.placement.streamed
        if isinstance(error, NotFiniteError) and loaded is not None and loaded.model.dtype is torch.float16:
            wider = torch.float32 if on_cpu else torch.bfloat16
            why = (
                f"the Fisher pre-pass of {base} overflows in float16 and was run in "
                f"{str(wider).removeprefix('torch.')}; a `dtype:` of bfloat16 or float32 merges it more safely"
            )
            return replace(self, running=wider, why=why)
        if isinstance(error, NotSupportedError) and self.whole:
            why = reason(error.__cause__ or error)
            raise FimError(f"{base}: it can't be run on random tokens ({why}); check its config.json") from error
        if isinstance(error, NotSupportedError) and self.rows and streamed:  # Gemma 4's code looks into them
            return replace(self, rows=False, why=None)
        if isinstance(error, NotSupportedError):
            cause = f" ({reason(error.__cause__)})" if error.__cause__ is not None else ""
            why = f"{base} can't be run layer by layer{cause}: it was measured with all of it in memory"
            return replace(self, where=replace(self.where, streamed=False), whole=True, why=why)
        if is_out_of_memory(error) and self.whole and not on_cpu:
            cpu = Placement(torch.device("cpu"), spread=False, streamed=False)
            why = f"{base} doesn't fit on {self.where.device}, and was measured on the CPU"
            return replace(self, where=cpu, running=loading.default_dtype(base, dtype, cpu.device), why=why)
        if is_out_of_memory(error) and not streamed and not on_cpu:
            return replace(self, where=replace(self.where, streamed=True, spread=False), why=None)
        return self


def with_model(
    base: InputModel,
    seq_len: int,
    dtype: str | None,
    options: MergeOptions,
    work: Callable[[LoadedModel, bool], T],
    *,
    running: torch.dtype | None = None,
    beside: Beside | None = None,
) -> tuple[T, list[str]]:
    """Load a model, do something with it, and let it go; again in another way where memory or digits don't suffice.

    See `load_to_run` for the other arguments.

    Args:
        seq_len: how many tokens it is run on at a time.
        work: is given the model, and whether it is all in memory as it can't be run layer by layer; raises
            `NotSupportedError` where it can't be, and `NotFiniteError`.

    Returns:
        What `work` returned, and what the user should know about how it was run, a line each.

    Raises:
        FimError: it can't be loaded, doesn't fit, or a value isn't finite.
    """
    first, loaded = loading.placement(options), None
    attempts = [_Attempt(first, running)]
    try:
        for this in attempts:  # one that fails adds the next
            try:
                loaded = load_to_run(
                    base, dtype, options, this.where, running=this.running, rows=this.rows, beside=beside
                )
                if this.whole and loaded.placement.streamed:
                    raise torch.OutOfMemoryError
                return work(loaded, this.whole), [attempt.why for attempt in attempts if attempt.why]
            except (NotFiniteError, NotSupportedError, RuntimeError, MemoryError) as error:
                attempts.append(this.after(error, loaded, base, dtype))
                if attempts[-1] is this:
                    raise
            loaded = None
            _free_memory(first)
        raise AssertionError("an attempt neither returned nor failed")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "free some memory" if first.device.type == "cpu" else "merge without --cuda, --device and --multi-gpu"
        raise FimError(
            f"{base}: {first.device} has too little memory for the Fisher pre-pass, which needs that of one decoder "
            f"layer and one sequence of {seq_len} tokens; lower fisher_seq_len (--seq-len), or {remedy}"
        ) from None
    finally:
        loaded = None  # or its memory couldn't be given back
        _free_memory(first)


def _free_memory(where: Placement) -> None:
    """Give back the accelerators' memory that nothing refers to any more, before the next needs it."""
    if where.device.type != "cpu":
        gc.collect()
        for device in where.devices():
            torch.get_device_module(device).empty_cache()
