"""Base model + random tokens -> Fisher information per decoder layer. The only place with forward passes."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import tqdm
import transformers
from mergekit.common import dtype_from_name
from mergekit.options import MergeOptions
from transformers import PreTrainedModel

from mergekit_fim.errors import FimError
from mergekit_fim.inputs import InputModel
from mergekit_fim.norms import squared_norm
from mergekit_fim.settings import FisherSettings


@dataclass(frozen=True)
class LayerFisher:
    """The measurement of one decoder layer.

    Attributes:
        index: the layer, from 0.
        parameters: P, the number of parameters in the layer.
        squared_norms: [sequence], ‖∇_{θ^l} L_n‖², from which all else follows.
    """

    index: int
    parameters: int
    squared_norms: tuple[float, ...]

    @property
    def fisher(self) -> float:
        """F^l = 1/(N·P) · Σ_n ‖∇_{θ^l} L_n‖²: the mean diagonal Fisher information (arXiv 2603.21705)."""
        return math.fsum(self.squared_norms) / (len(self.squared_norms) * self.parameters)

    @property
    def stderr(self) -> float | None:
        """The standard error of `fisher` over the sequences; None for a single one."""
        n = len(self.squared_norms)
        if n < 2:
            return None
        mean = math.fsum(self.squared_norms) / n
        variance = math.fsum((s - mean) ** 2 for s in self.squared_norms) / (n - 1)
        return math.sqrt(variance / n) / self.parameters


@dataclass(frozen=True)
class FisherMeasurement:
    """Which Fisher: the diagonal one of the mean next-token loss per sequence, squared per sequence, then averaged.

    Attributes:
        vocab_size: the random tokens were uniform over this many.
        dtype: what the model ran in, such as "bfloat16"; squares and sums are wider.
        settings: samples, sequence length, seed and labels.
        layers: one entry per decoder layer, in order.
    """

    vocab_size: int
    dtype: str
    settings: FisherSettings
    layers: tuple[LayerFisher, ...]


@dataclass(frozen=True)
class Samples:
    """What the model is measured on.

    Attributes:
        input_ids: [sequence, position], int64, on the CPU.
        uniforms: [sequence, position − 1] in [0, 1), float64: where labels are sampled, the quantiles at which they are
            drawn from the model's own distribution. None where the next input token is the label.
    """

    input_ids: torch.Tensor
    uniforms: torch.Tensor | None


def draw_samples(settings: FisherSettings, vocab_size: int) -> Samples:
    """Draw the random tokens: each uniform over the vocabulary, from a generator of their own on the CPU.

    The tokens depend on nothing but `settings` and `vocab_size`; the quantiles for sampled labels come after them from
    the same generator.
    """
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    ids = torch.randint(0, vocab_size, (settings.samples, settings.seq_len), generator=generator)
    uniforms = None
    if settings.labels == "sampled":
        shape = (settings.samples, settings.seq_len - 1)
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)
    return Samples(ids, uniforms)


def sequence_loss(logits: torch.Tensor, input_ids: torch.Tensor, uniforms: torch.Tensor | None) -> torch.Tensor:
    """L_n, the mean negative log-likelihood of the T − 1 next tokens, in float32 or better.

    Args:
        logits: [position, vocabulary], all T positions.
        input_ids: [position].
        uniforms: [position − 1] quantiles at which labels are sampled, or None for the next input token as label.
    """
    logits = logits[:-1]
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if uniforms is None:
        labels = input_ids[1:]
    else:
        cumulative = logits.detach().double().softmax(-1).cumsum(-1)
        # The rounded total may fall short of 1, hence of a quantile next to it.
        labels = torch.searchsorted(cumulative, uniforms[:, None], right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    return F.cross_entropy(logits, labels.to(logits.device))


class FisherEngine(Protocol):
    """Measures squared gradient norms; every engine gives the same numbers as `autograd_engine`."""

    def __call__(
        self,
        model: PreTrainedModel,
        layers: Sequence[torch.nn.Module],
        samples: Samples,
        progress: Callable[[int], object],
    ) -> torch.Tensor:
        """Measure ‖∇_{θ^l} L_n‖² for every sequence n and layer l.

        Args:
            model: a causal language model in evaluation mode, with gradients on for the layers' parameters only.
            layers: its decoder layers.
            samples: the sequences.
            progress: called with a number of sequences when they are done.

        Returns:
            [sequence, layer], float64, on the CPU.
        """
        ...


def autograd_engine(
    model: PreTrainedModel,
    layers: Sequence[torch.nn.Module],
    samples: Samples,
    progress: Callable[[int], object],
) -> torch.Tensor:
    """The reference engine: one forward and one backward pass per sequence, as the paper does it (arXiv 2603.21705).

    Each parameter's gradient is reduced to its squared norm and freed as soon as it is complete, so that the gradients
    of about one layer exist at a time. See `FisherEngine` for arguments and result.
    """
    norms: list[list[torch.Tensor]] = [[] for _ in layers]

    def reduce(total: list[torch.Tensor]) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            total.append(squared_norm(parameter.grad))
            parameter.grad = None

        return hook

    handles = [
        parameter.register_post_accumulate_grad_hook(reduce(total))
        for layer, total in zip(layers, norms, strict=True)
        for parameter in layer.parameters()
        if parameter.requires_grad
    ]
    device = model.get_input_embeddings().weight.device
    result = torch.zeros(len(samples.input_ids), len(layers), dtype=torch.float64)
    try:
        for n, ids in enumerate(samples.input_ids):
            logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0]
            uniforms = None if samples.uniforms is None else samples.uniforms[n].to(logits.device)
            sequence_loss(logits, ids.to(logits.device), uniforms).backward()
            for layer, total in enumerate(norms):
                result[n, layer] = math.fsum(float(norm) for norm in total)
                total.clear()
            progress(1)
    finally:
        for handle in handles:
            handle.remove()
    return result


@contextlib.contextmanager
def _measuring(model: PreTrainedModel, layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Evaluation mode, gradients for the layers' parameters only; everything as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        model.eval()
        model.requires_grad_(False)
        for parameter in gradients:
            parameter.grad = None
        for layer in layers:
            for parameter in layer.parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
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
    layers: Sequence[torch.nn.Module],
    settings: FisherSettings,
    *,
    engine: FisherEngine = autograd_engine,
    name: str = "the base model",
    quiet: bool = False,
) -> FisherMeasurement:
    """Measure the Fisher information of every decoder layer on random tokens.

    Args:
        model: a causal language model; it is left as it was.
        layers: its decoder layers, in order.
        settings: how many tokens, which, and which labels.
        engine: how the gradient norms are computed.
        name: what to call the model in an error.
        quiet: no progress bar.

    Raises:
        FimError: a value that isn't finite, naming the layer.
    """
    vocab_size = model.config.get_text_config().vocab_size
    samples = draw_samples(settings, vocab_size)
    with (
        tqdm.tqdm(total=settings.samples, desc="Measuring Fisher information", unit="seq", disable=quiet) as progress,
        _measuring(model, layers),
    ):
        norms = engine(model, layers, samples, progress.update)
    measured = []
    for index, layer in enumerate(layers):
        column = tuple(norms[:, index].tolist())
        if not all(math.isfinite(norm) for norm in column):
            raise FimError(
                f"{name}: the Fisher information of decoder layer {index} isn't finite "
                f"(in {model.dtype}); check the checkpoint for NaN, or set a wider `dtype:` such as bfloat16 or float32"
            )
        measured.append(LayerFisher(index, sum(p.numel() for p in layer.parameters()), column))
    return FisherMeasurement(vocab_size, str(model.dtype).removeprefix("torch."), settings, tuple(measured))


def check_measurable(base: InputModel, settings: FisherSettings) -> None:
    """Check that the base can be run on such sequences.

    Raises:
        FimError: the sequences are longer than the model's positions.
    """
    limit = getattr(base.text_config, "max_position_embeddings", None)
    if isinstance(limit, int) and settings.seq_len > limit:
        raise FimError(f"fisher_seq_len must be at most the {limit} positions of {base}, found {settings.seq_len}")


def device_map(options: MergeOptions) -> dict[str, str] | str:
    """Where accelerate is to put the base model for the measurement, from what the user told mergekit.

    `--multi-gpu` (and `--gpu-rich`) spreads it over all accelerators, `--cuda` or `--device` puts it on that device,
    and without any of them it stays on the CPU, even where an accelerator exists.

    Raises:
        FimError: an accelerator was asked for that torch doesn't see.
    """
    wanted = str(options.device)
    try:
        kind = torch.device(wanted).type
    except RuntimeError:
        raise FimError(f"--device: expected a torch device such as cpu, cuda or cuda:1, found {wanted}") from None
    if (options.multi_gpu or kind == "cuda") and not _accelerator_exists(kind if kind != "cpu" else None):
        option = "--multi-gpu" if options.multi_gpu else f"--device {wanted}"
        raise FimError(f"{option} asks for an accelerator, but torch sees none; leave it out to merge on the CPU")
    return "auto" if options.multi_gpu else {"": wanted}


def _accelerator_exists(kind: str | None) -> bool:
    current = torch.accelerator.current_accelerator(check_available=True)
    return current is not None and (kind is None or current.type == kind)


def running_dtype(wanted: torch.dtype, placement: dict[str, str] | str) -> torch.dtype:
    """What to run the model in: `wanted`, or float32 on a CPU that has no fast arithmetic of that kind.

    Without hardware support torch multiplies 16-bit matrices on the CPU hundreds of times more slowly than float32 ones
    (pytorch/pytorch issue 146508), which would turn minutes into days.
    """
    if placement != {"": "cpu"} or torch.finfo(wanted).bits >= 32 or _cpu_multiplies(wanted):
        return wanted
    return torch.float32


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has fast matrix products in a 16-bit dtype, as far as torch tells."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    query = getattr(torch.ops.mkldnn, name, None) if torch.backends.mkldnn.is_available() else None
    return query is None or bool(query())


def load_model(base: InputModel, dtype: str | None, options: MergeOptions) -> PreTrainedModel:
    """Load the base for measuring, by transformers and accelerate, in the `running_dtype` for the merge's or its own.

    Raises:
        FimError: it can't be loaded, doesn't fit on the accelerator, or its checkpoint leaves parameters unset.
    """
    placement = device_map(options)
    path = base.reference.merged(
        cache_dir=options.lora_merge_cache,
        trust_remote_code=options.trust_remote_code,
        lora_merge_dtype=options.lora_merge_dtype,
    ).local_path(cache_dir=options.transformers_cache)
    try:
        with _transformers_progress(not options.quiet), torch.random.fork_rng(devices=[]):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                dtype=running_dtype(dtype_from_name(dtype) or base.stored_dtype(), placement),
                device_map=placement,
                trust_remote_code=options.trust_remote_code,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError:
        raise FimError(
            f"{base} doesn't fit on {options.device}; merge without --cuda and --device, or use --multi-gpu"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FimError(f"{base}: transformers can't load the model for the Fisher pre-pass ({reason})") from error
    model, info = loaded
    missing = info["missing_keys"]
    if missing:
        raise FimError(f"{base}: the checkpoint lacks the parameter {min(missing)}; download or save the model again")
    if placement == "auto" and {"cpu", "disk"} & {str(place) for place in model.hf_device_map.values()}:
        raise FimError(
            f"{base} doesn't fit on the visible accelerators; merge without --multi-gpu to measure on the CPU"
        )
    return model


def decoder_layers(model: PreTrainedModel, base: InputModel) -> list[torch.nn.Module]:
    """The modules of the base's decoder layers, found by the names that mergekit gives their tensors.

    Raises:
        FimError: transformers names its modules otherwise.
    """
    try:
        return [model.get_submodule(layer.prefix.rstrip(".")) for layer in base.layout.layers]
    except AttributeError:
        raise FimError(
            f"{base}: expected the decoder layer {base.layout.layers[0].prefix.rstrip('.')} in transformers' "
            f"{type(model).__name__}, found none of that name; this architecture isn't supported"
        ) from None


def measure_base(
    base: InputModel,
    settings: FisherSettings,
    dtype: str | None,
    options: MergeOptions,
    *,
    engine: FisherEngine = autograd_engine,
) -> FisherMeasurement:
    """Load the base model, measure it, and let it go."""
    model = load_model(base, dtype, options)
    layers = decoder_layers(model, base)
    try:
        return measure(model, layers, settings, engine=engine, name=str(base), quiet=options.quiet)
    except torch.OutOfMemoryError:
        raise FimError(
            f"{base}: {options.device} has too little memory for the Fisher pre-pass; lower fisher_seq_len, use "
            "--multi-gpu, or merge without --cuda and --device"
        ) from None


@contextlib.contextmanager
def _transformers_progress(enabled: bool) -> Iterator[None]:
    """transformers' own loading bar as mergekit's --quiet wants it."""
    logging = transformers.utils.logging
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
