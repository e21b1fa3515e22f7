"""The fast engine: all sequences in one batch, no weight gradients, and the memory of one decoder layer.

One forward pass keeps nothing but the inputs of every decoder layer. One backward pass recomputes the layers one by one
from the last to the first, and takes each sequence's gradient norms from the inputs and the output gradients of the
layer's modules (`rules`). Where a layer holds a parameter without a rule, or where the rules don't agree with autograd
on the first layer of its kind, autograd runs the layers of that kind one sequence at a time.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from mergekit_fim.errors import FimError, is_out_of_memory
from mergekit_fim.fisher.engine import NotSupportedError
from mergekit_fim.fisher.head import Head, loss_gradient
from mergekit_fim.fisher.rules import Recorder, rule_for
from mergekit_fim.fisher.samples import Samples
from mergekit_fim.fisher.weights import ResidentWeights, Weights, replaced
from mergekit_fim.models.language import decoder
from mergekit_fim.norms import squared_norm

# (number of a decoder layer, the layer, which has its weights) -> a context for its forward pass
Watch = Callable[[int, nn.Module], contextlib.AbstractContextManager[object]]

T = TypeVar("T")
W = TypeVar("W", bound=Watch)

# Tokens in a micro-batch of more than one sequence: enough for matrix products at full speed.
_TOKENS = 1024
_TOKENS_ON_ACCELERATORS = 8192


def batched_engine(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    samples: Samples,
    progress: Callable[[int], object],
    weights: Weights | None = None,
    warn: Callable[[str], object] = lambda _line: None,
) -> torch.Tensor:
    """Measure as `autograd_engine` does, but fast. Where memory runs out, halve the micro-batches and tell `warn`.

    Raises:
        NotSupportedError: the decoder layers share parameters, pass on more than their arguments and results, or can't
            be run this way at all.
        RuntimeError, MemoryError: a single sequence is too large (torch.OutOfMemoryError on an accelerator).
    """
    run = _Run(model, layers, weights or ResidentWeights(), progress)
    try:
        return torch.cat(_by_micro_batches(model, run.weights, samples, run.measure, warn))
    finally:
        run.layers.clear()  # which refer to the run in turn, and would keep the model in memory for now


def watch_layers(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    samples: Samples,
    progress: Callable[[int], object],
    weights: Weights,
    warn: Callable[[str], object],
    watcher: Callable[[], W],
) -> list[W]:
    """Run the decoder layers forward, one by one, and have them watched.

    `watcher` makes what watches one micro-batch; it is entered around each layer's forward pass. See `FisherEngine` for
    the other arguments; a step is here one layer's forward pass for one sequence.

    Returns:
        The watchers of all micro-batches, in the order of the sequences.
    """
    embedding: Any = model.get_input_embeddings()
    head = model.get_output_embeddings()

    def work(part: Samples, device: torch.device) -> W:
        watch = watcher()

        def watched(index: int, layer: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with weights.layer(layer), watch(index, layer):
                results = original(*args, **kwargs)
            progress(len(part.input_ids))
            return results

        with torch.no_grad(), contextlib.ExitStack() as stack:
            for index, layer in enumerate(layers):
                stack.enter_context(replaced(layer, partial(watched, index, layer)))
            stack.enter_context(replaced(embedding, partial(_embed, embedding, weights)))
            if head is not None:  # which takes much and is not looked at
                stack.enter_context(replaced(head, lambda _original, hidden: hidden[..., :1]))
            model(input_ids=part.input_ids.to(device), use_cache=False)
        return watch

    return _by_micro_batches(model, weights, samples, work, warn)


def _by_micro_batches(
    model: PreTrainedModel,
    weights: Weights,
    samples: Samples,
    work: Callable[[Samples, torch.device], T],
    warn: Callable[[str], object],
) -> list[T]:
    """Do `work` on one micro-batch after the other, halved where memory runs out: its results."""
    count, length = samples.input_ids.shape
    device = weights.rows(model.get_input_embeddings(), slice(0, 1)).device
    size = wanted = micro_batch(count, length, device.type)
    model.requires_grad_(False)
    parts, start = list[T](), 0
    while start < count:
        try:
            parts.append(work(samples.part(start, start + size), device))
        except (FimError, NotSupportedError, OSError):
            raise
        except Exception as error:  # a model's own code raises anything
            if not is_out_of_memory(error):
                raise NotSupportedError from error
            if size == 1:
                raise
            size = (size + 1) // 2
        else:
            start += size
    if size < wanted:
        warn(
            f"memory ran short for {wanted} sequences at a time, {size} at a time were measured in the end: the last "
            "digits may differ from those with enough memory"
        )
    return parts


def micro_batch(sequences: int, length: int, device_type: str) -> int:
    """Count the sequences that share a forward and a backward pass."""
    tokens = _TOKENS if device_type == "cpu" else _TOKENS_ON_ACCELERATORS
    return min(sequences, max(1, tokens // length))


class _Run:
    """The measurement of one model, a micro-batch at a time."""

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[nn.Module], weights: Weights, progress: Callable[[int], object]
    ) -> None:
        self.model, self.weights, self.progress = model, weights, progress
        self.embedding: Any = model.get_input_embeddings()
        self.head: Any = model.get_output_embeddings()
        self.base = model.base_model if model.base_model is not model else decoder(model)[1]  # Llama 4's is itself
        if self.base is model or type(self.head).forward is not nn.Linear.forward:
            raise NotSupportedError
        ids = [id(parameter) for layer in layers for parameter in layer.parameters()]
        if len(set(ids)) < len(ids):
            raise NotSupportedError  # layers share a parameter
        # The layers write into these two.
        self.has_rules: dict[object, bool] = {}  # whether the rules hold for a kind of layer, once that was checked
        self.norms = torch.empty(0)  # [sequence, layer] of the micro-batch that is under way
        self.layers = [_Layer(self, index, layer) for index, layer in enumerate(layers)]

    def measure(self, samples: Samples, device: torch.device) -> torch.Tensor:
        """Measure one micro-batch: [sequence, layer], float64, on the CPU."""
        ids = samples.input_ids.to(device)
        self.norms = torch.full((len(ids), len(self.layers)), -1.0, dtype=torch.float64)
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(replaced(layer.module, partial(_checkpointed, layer)))
            stack.enter_context(replaced(self.embedding, partial(_embed, self.embedding, self.weights)))
            hidden, output = self._forward(ids)
            if not hidden.requires_grad:
                raise NotSupportedError
            head = Head(self.head, self.weights, hidden.dtype)
            labels = None if samples.uniforms is not None else ids[:, 1:].to(head.device)
            tail = partial(self._tail, ids, output)
            gradient = torch.zeros_like(hidden)
            # With a model over several devices the head may be on another one than what comes before it.
            before = hidden.detach()[:, :-1].to(head.device)
            gradient[:, :-1] = loss_gradient(head, tail, before, labels, samples.uniforms)
            hidden.backward(gradient)
        if (self.norms < 0).any():
            raise NotSupportedError  # no gradient came to some layer
        return self.norms / (ids.shape[1] - 1) ** 2  # the gradients were those of the sum over the positions

    def _forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Run the model: the hidden states that go into the head, and what the model without the head gave."""
        inputs, outputs = [], []

        def at_head(_original: Any, hidden: torch.Tensor) -> torch.Tensor:
            inputs.append(hidden)
            return hidden[..., :1]

        handle = self.base.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        try:
            with replaced(self.head, at_head):
                self.model(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        if len(inputs) != 1 or len(outputs) != 1 or inputs[0].shape[:2] != ids.shape:
            raise NotSupportedError
        return inputs[0], outputs[0]

    def _tail(self, ids: torch.Tensor, output: Any, head_output: torch.Tensor) -> torch.Tensor:
        """Let the model make logits of the head's output."""
        with (
            replaced(self.base, lambda _original, *_args, **_kwargs: output),
            replaced(self.head, lambda _original, *_args, **_kwargs: head_output),
        ):
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.to(head_output.device)  # accelerate's hooks bring results to where the ids are


def _embed(embedding: Any, weights: Weights, original: Callable[..., torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Embed the tokens, by the rows that occur, which alone are loaded; gradients go no further back."""
    if embedding.weight.device.type != "meta":
        return original(ids).detach().requires_grad_(True)
    unique, inverse = ids.unique(return_inverse=True)
    rows = weights.rows(embedding, unique).to(embedding.weight.dtype)
    padding, embedding.padding_idx = embedding.padding_idx, None  # a row of the whole table
    try:
        with replaced(embedding, lambda _original, *args: original(*args)):
            embedded: torch.Tensor = torch.func.functional_call(embedding, {"weight": rows}, (inverse,))
    finally:
        embedding.padding_idx = padding
    return embedded.detach().requires_grad_(True)


class _Slot(int):
    """Stands in arguments or results of a decoder layer for a tensor, by its number."""


def _split(nested: Any) -> tuple[Any, list[torch.Tensor]]:
    """Take the tensors out of arguments or results, and leave slots."""
    tensors: list[torch.Tensor] = []

    def take(tensor: torch.Tensor) -> _Slot:
        tensors.append(tensor)
        return _Slot(len(tensors) - 1)

    return tree_map_only(torch.Tensor, take, nested), tensors


def _filled(nested: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Put tensors into the slots."""
    return tree_map_only(_Slot, lambda slot: tensors[slot], nested)


@dataclass
class _LayerCall:
    """A call of a decoder layer without its tensors, which autograd keeps."""

    arguments: Any
    results: Any = None  # of the last time that it was run

    def run(self, forward: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Call `forward` with `tensors` put back: the tensors among its results."""
        args, kwargs = _filled(self.arguments, tensors)
        before = tree_leaves((args, kwargs))
        versions = [tensor._version for tensor in tensors]
        results = forward(*args, **kwargs)
        if [*map(id, tree_leaves((args, kwargs)))] != [*map(id, before)]:
            raise NotSupportedError  # something was handed on in a container
        if versions != [tensor._version for tensor in tensors]:
            raise NotSupportedError  # an input was overwritten, so that the layer can't be run again
        self.results, made = _split(results)
        return made


def _checkpointed(layer: "_Layer", _original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a decoder layer forward, and keep nothing but its inputs."""
    arguments, tensors = _split((args, kwargs))
    call = _LayerCall(arguments)
    results: Any = _Checkpoint.apply(layer, call, *tensors)
    return _filled(call.results, results)


@dataclass(frozen=True)
class _Return:
    """The way back through a decoder layer's call, with the gradients of its results, None where there are none."""

    call: _LayerCall
    inputs: list[torch.Tensor]
    gradients: Sequence[torch.Tensor | None]

    def backward(self, results: Sequence[torch.Tensor]) -> None:
        """Leave the gradients of the inputs in their `.grad`; `results` are the call's, run anew."""
        pairs = [(r, g) for r, g in zip(results, self.gradients, strict=True) if g is not None and r.requires_grad]
        if pairs:
            torch.autograd.backward([r for r, _ in pairs], [g for _, g in pairs])


class _Checkpoint(torch.autograd.Function):
    """A decoder layer as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, layer: "_Layer", call: _LayerCall, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.layer, ctx.call = layer, call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        with layer.run.weights.layer(layer.module):
            results = call.run(layer.forward, tensors)
        layer.run.progress(len(layer.run.norms))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        needed = ctx.needs_input_grad[2:]
        inputs = [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed, strict=True)]
        ctx.layer.backward(_Return(ctx.call, inputs, gradients))
        ctx.layer.run.progress(len(ctx.layer.run.norms))
        return None, None, *(tensor.grad for tensor in inputs)


class _Layer:
    """One decoder layer in the measurement."""

    def __init__(self, run: _Run, index: int, module: nn.Module) -> None:
        self.run, self.index, self.module = run, index, module
        self.forward = module.forward
        parts = [(name, part, dict(part.named_parameters(recurse=False))) for name, part in module.named_modules()]
        owners = [(name, part, own) for name, part, own in parts if own]
        self.kind = tuple((n, type(m), tuple((k, p.shape, p.dtype) for k, p in own.items())) for n, m, own in owners)
        self.rules = {part: rule for _, part, _ in owners if (rule := rule_for(part)) is not None}
        ids = [id(parameter) for _, _, own in owners for parameter in own.values()]
        if len(self.rules) < len(owners) or len(set(ids)) < len(ids):
            run.has_rules[self.kind] = False

    def backward(self, back: _Return) -> None:
        """Recompute the layer, take its gradient norms, and leave the inputs' gradients in their `.grad`."""
        has_rules = self.run.has_rules.get(self.kind)
        norms = None if has_rules is False else self._by_rules(back)
        if has_rules is None:  # the first layer of a kind is checked against autograd
            norms = norms if norms is not None and self._agrees(norms, back) else None
            self.run.has_rules[self.kind] = norms is not None
        if norms is None:
            for tensor in back.inputs:
                tensor.grad = None
            self._check_sequences(back)
            norms = self._by_autograd(back)
        self.run.norms[:, self.index] = norms.cpu()

    def _agrees(self, norms: torch.Tensor, back: _Return) -> bool:
        """Whether the norm of the first sequence is autograd's, or autograd's isn't finite."""
        first = self._by_autograd(back, first_only=True)[0]
        narrow = back.gradients[0] is not None and back.gradients[0].dtype.itemsize < 4
        tolerance = 0.05 if narrow else 1e-3
        return bool(abs(norms[0] - first) <= tolerance * first) or not bool(first.isfinite())

    def _by_rules(self, back: _Return) -> torch.Tensor | None:
        """Take the norms of all sequences at once, [sequence]; None where a module isn't used as its rule expects."""
        with torch.enable_grad(), self.run.weights.layer(self.module):
            with Recorder(self.rules, len(self.run.norms)) as recorder:
                results = back.call.run(self.forward, back.inputs)
            if not recorder.is_valid:
                return None
            back.backward(results)
        return recorder.norms

    def _by_autograd(self, back: _Return, *, first_only: bool = False) -> torch.Tensor:
        """Take the norms one sequence at a time: [sequence]. With `first_only`, leave the inputs without gradients."""
        norms = torch.zeros(1 if first_only else len(self.run.norms), dtype=torch.float64)
        with torch.enable_grad(), self.run.weights.layer(self.module), self._differentiable() as squares:
            for n in range(len(norms)):
                parts = [self._sequence(t, n).detach().requires_grad_(t.requires_grad) for t in back.inputs]
                try:
                    results = back.call.run(self.forward, parts)
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise
                    raise NotSupportedError from error  # an argument has the sequences elsewhere, as Bloom's alibi
                gradients = [None if g is None else self._sequence(g, n) for g in back.gradients]
                _Return(back.call, parts, gradients).backward(results)
                norms[n] = sum(float(square) for square in squares)
                squares.clear()
                for whole, part in zip(back.inputs, parts, strict=True):
                    if part.grad is not None and not first_only:
                        if whole.grad is None:
                            whole.grad = torch.zeros_like(whole)
                        self._sequence(whole.grad, n).add_(part.grad)
        return norms

    @contextlib.contextmanager
    def _differentiable(self) -> Iterator[list[torch.Tensor]]:
        """Have gradients taken of the layer's parameters, and each reduced to its squared norm when it is complete."""
        squares: list[torch.Tensor] = []

        def reduce(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            squares.append(squared_norm(parameter.grad))
            parameter.grad = None

        parameters = [p for p in self.module.parameters() if p.is_floating_point()]
        handles = [p.requires_grad_(True).register_post_accumulate_grad_hook(reduce) for p in parameters]
        try:
            yield squares
        finally:
            for handle, parameter in zip(handles, parameters, strict=True):
                handle.remove()
                parameter.requires_grad_(False)

    def _sequence(self, tensor: torch.Tensor, n: int) -> torch.Tensor:
        """Take the part of an argument or a result that belongs to one sequence, as `_check_sequences` checks."""
        count = len(self.run.norms)
        return tensor[n : n + 1] if count > 1 and tensor.ndim > 1 and tensor.shape[0] == count else tensor

    def _check_sequences(self, back: _Return) -> None:
        """Check that the layer treats every sequence by itself, and is given them along the first axis of its inputs.

        Raises:
            NotSupportedError: it doesn't, or isn't.
        """
        last = len(self.run.norms) - 1
        if last == 0:
            return
        with torch.no_grad(), self.run.weights.layer(self.module):
            together = back.call.run(self.forward, back.inputs)
            alone = back.call.run(self.forward, [self._sequence(t, last) for t in back.inputs])
        if any(t.requires_grad and t.shape[:1] != (len(self.run.norms),) for t in back.inputs):
            raise NotSupportedError  # positions come first, as in XLNet
        for whole, part in zip(together, alone, strict=True):
            expected = self._sequence(whole, last)
            if expected.shape != part.shape:
                raise NotSupportedError
            difference = float((expected - part).float().norm()) / (float(part.float().norm()) or 1.0)
            if difference > 0.1:  # rounding makes less, even where it sends tokens to other experts; a wrong split more
                raise NotSupportedError
