"""The reference engine: obviously right, slow, and with the whole model in memory. Every engine gives its numbers."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from mergekit_fim.errors import FimError, is_out_of_memory, reason
from mergekit_fim.fisher.samples import Samples, sequence_loss
from mergekit_fim.fisher.weights import ResidentWeights, Weights
from mergekit_fim.norms import squared_norm

# (a causal language model in evaluation mode, its decoder layers, the sequences, `progress`, its weights, `warn`) ->
# ‖∇_{θ^l} L_n‖² for every sequence n and layer l: [sequence, layer], float64, on the CPU. `progress` is called with the
# number of steps that are done, a step being one layer's forward or backward pass for one sequence. `warn` is called
# with what the user should know about the measurement, a line each. Every engine gives `autograd_engine`'s numbers.
FisherEngine = Callable[
    [PreTrainedModel, Sequence[nn.Module], Samples, Callable[[int], object], Weights, Callable[[str], object]],
    torch.Tensor,
]


class NotSupportedError(Exception):
    """The model's forward pass isn't of the form that the batched engine needs; the reference engine must run it."""


class ForwardError(FimError):
    """A model's own code fails."""


def autograd_engine(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    samples: Samples,
    progress: Callable[[int], object],
    weights: Weights | None = None,
    warn: Callable[[str], object] = lambda _line: None,
) -> torch.Tensor:
    """Run one forward and one backward pass per sequence, as the paper does (arXiv 2603.21705). See `FisherEngine`.

    Each parameter's gradient is reduced to its squared norm and freed as soon as it is complete, so that the gradients
    of about one layer exist at a time.

    Raises:
        ForwardError: the model can't be run, naming the decoder layer.
    """
    if not isinstance(weights, ResidentWeights | None):
        raise ValueError("the reference engine needs a model whose weights are in memory")
    norms: list[list[torch.Tensor]] = [[] for _ in layers]

    def reduce(totals: list[list[torch.Tensor]]) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            norm = squared_norm(parameter.grad)
            for total in totals:
                total.append(norm)
            parameter.grad = None

        return hook

    owners: dict[nn.Parameter, list[list[torch.Tensor]]] = {}  # several where layers share a parameter
    for layer, total in zip(layers, norms, strict=True):
        for parameter in layer.parameters():
            if parameter.is_floating_point():
                owners.setdefault(parameter, []).append(total)
    handles = [
        parameter.requires_grad_(True).register_post_accumulate_grad_hook(reduce(totals))
        for parameter, totals in owners.items()
    ]
    where = ["before the decoder layers"]
    for index, layer in enumerate(layers):
        for register, place in (
            (layer.register_forward_pre_hook, f"in decoder layer {index}"),
            (layer.register_forward_hook, f"after decoder layer {index}"),
        ):
            handles.append(register(lambda *_args, place=place: where.__setitem__(0, place)))
    device = model.get_input_embeddings().weight.device
    result = torch.zeros(len(samples.input_ids), len(layers), dtype=torch.float64)
    try:
        for n, ids in enumerate(samples.input_ids):
            logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0]
            uniforms = None if samples.uniforms is None else samples.uniforms[n].to(logits.device)
            sequence_loss(logits, ids.to(logits.device), uniforms).backward()
            for index, total in enumerate(norms):
                result[n, index] = math.fsum(float(norm) for norm in total)
                total.clear()
            progress(2 * len(layers))
    except Exception as error:  # a model's own code raises anything
        if isinstance(error, (FimError, OSError)) or is_out_of_memory(error):
            raise
        raise ForwardError(
            f"{type(model).__name__} of transformers can't be run on random tokens: it fails {where[0]} "
            f"({type(error).__name__}: {reason(error)}); check its config.json, or set every `alpha` by hand, which "
            "needs no measurement"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return result
