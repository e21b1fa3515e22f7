"""Model + tokens -> what the linear layers of its decoder layers are given, and the gradients at their outputs.

Which modules a model is made of doesn't matter: while a decoder layer runs, every function of torch that is given one
of its matrices is looked at. A matrix that rows of inputs are multiplied by, alone or as one of a stack of experts, has
factors; one that anything else is done with has none.
"""

import contextlib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import tqdm
from mergekit.options import MergeOptions
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.errors import FimError, is_out_of_memory, reason
from mergekit_fim.fisher.batched import watch_layers
from mergekit_fim.fisher.loading import LoadedModel
from mergekit_fim.fisher.measure import NotFiniteError, prepared, with_model
from mergekit_fim.fisher.samples import Samples, sequence_loss
from mergekit_fim.fisher.weights import replaced
from mergekit_fim.measurements.factors import Factors, LinearFactors, is_finite
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.models.layout import local_name
from mergekit_fim.models.names import Place

# What a weight is to x: x Wᵀ, or x W; with which arguments.
_LINEAR: dict[Any, tuple[int, int, bool]] = {F.linear: (0, 1, False)}
_PRODUCTS: Any = (torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm)
_LINEAR |= dict.fromkeys((*_PRODUCTS, torch.Tensor.__matmul__), (0, 1, True))
_LINEAR |= dict.fromkeys((torch.addmm, torch.Tensor.addmm), (1, 2, True))

# Tensors that say which experts a token goes to: by their names, as far as they have an output for each expert.
_ROUTER = re.compile(r"(^|\.)gate\.|router")


@dataclass
class _Use:
    """Rows of inputs of a matrix, and the gradients at its outputs: [token, d_in] and [token, d_out]."""

    inputs: torch.Tensor
    transposed: bool
    gradients: torch.Tensor | None = None


class _Part:
    """What is seen of a micro-batch.

    Attributes:
        uses: of each matrix, by its decoder layer, its parameter's name in that, and its number in a stack or None.
        others: parameters that something else is done with.
    """

    def __init__(self, matrices: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
        self._matrices = matrices
        self.uses: dict[tuple[int, str, int | None], list[_Use]] = {}
        self.others: set[tuple[int, str]] = set()

    def __call__(self, index: int, layer: nn.Module) -> "_Watching":
        """To be entered while a layer runs forward."""
        own = dict(layer.named_parameters())
        return _Watching(index, {name: own[name] for name in self._matrices[index]}, self)


class _Watching(TorchFunctionMode):
    """What the matrices of one decoder layer are multiplied by, while this lasts."""

    def __init__(self, index: int, matrices: Mapping[str, torch.Tensor], part: _Part) -> None:
        super().__init__()
        self._index, self._part = index, part
        self._held = sorted(((p.data_ptr(), name, p) for name, p in matrices.items()), key=lambda its: its[:2])
        self._starts = [start for start, _, _ in self._held]
        self._copies: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        results = [
            r for r in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(r, torch.Tensor)
        ]
        if not results:
            return result
        given = [a for a in _flat((*args, *kwargs.values())) if isinstance(a, torch.Tensor)]
        owners = [(a, owner) for a in given if (owner := self._owner(a)) is not None]
        for weight, (name, parameter) in owners:
            storage = parameter.untyped_storage().data_ptr()
            if all(r.untyped_storage().data_ptr() == storage for r in results):
                continue  # a view, of which we hear when it is used
            place, own, turned = _LINEAR.get(func, (0, 0, False))
            is_product = len(owners) == 1 and place != own and len(args) > own and args[own] is weight
            if not is_product or not self._note(name, parameter, weight, args[place], result, turned=turned):
                self._part.others.add((self._index, name))
        return result

    def _owner(self, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """The parameter that a tensor is, or is a view of."""
        place = bisect_right(self._starts, tensor.data_ptr()) - 1
        if place < 0 or not tensor.numel():
            return None
        start, name, parameter = self._held[place]
        inside = tensor.data_ptr() < start + parameter.nbytes and tensor.device == parameter.device
        return (name, parameter) if inside else None

    def _note(
        self,
        name: str,
        parameter: torch.Tensor,
        weight: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        turned: bool,
    ) -> bool:
        """Note what a weight is multiplied by, if it is a matrix of the parameter, or all of a stack.

        Args:
            name: of the parameter.
            parameter: [d_out, d_in] or, as `transposed` then says, [d_in, d_out]; or a stack of such.
            weight: what is multiplied: the parameter, one of its matrices, or either of them transposed.
            x: [..., d_in]; for a stack [expert, token, d_in].
            y: the product.
            turned: whether the weight is [d_in, d_out] as it is used.
        """
        offset = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        matrix = parameter[0] if parameter.ndim == 3 and weight.ndim == 2 else parameter
        number, rest = divmod(offset, parameter.stride(0)) if matrix is not parameter else (None, offset)
        mirrored = matrix.mT
        if weight.shape == matrix.shape and weight.stride() == matrix.stride():
            transposed = turned
        elif weight.shape == mirrored.shape and weight.stride() == mirrored.stride():
            transposed = not turned
        else:
            return False
        if rest or weight.dtype != parameter.dtype or x.dtype != weight.dtype:
            return False
        if weight.ndim == 2:
            self._keep((self._index, name, number), x, y, transposed)
            return True
        if x.ndim != 3 or len(x) != len(weight):
            return False
        for expert in range(len(x)):  # all tokens to all experts, as zeros where they aren't for them
            mine = x[expert].any(-1)
            if bool(mine.any()):
                self._keep((self._index, name, expert), x[expert][mine], y, transposed, (expert, mine))
        return True

    def _keep(
        self, key: tuple[int, str, int | None], x: torch.Tensor, y: torch.Tensor, transposed: bool, of: Any = ...
    ) -> None:
        same = (x.data_ptr(), x.numel(), x.shape[-1], x.stride()[-1:], x._version)
        if same not in self._copies:  # x beside it, so that no other tensor gets its address
            self._copies[same] = x.detach().reshape(-1, x.shape[-1]).to("cpu", copy=True), x
        use = _Use(self._copies[same][0], transposed)
        self._part.uses.setdefault(key, []).append(use)
        if torch.is_grad_enabled():
            if not y.requires_grad:
                y.requires_grad_(True)
            y.register_hook(partial(_keep_gradient, use, of))


def _keep_gradient(use: _Use, of: Any, gradient: torch.Tensor) -> None:
    use.gradients = gradient.detach()[of].reshape(len(use.inputs), -1).to("cpu", copy=True)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


def _matrices(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of every decoder layer's matrices and stacks of them, by their names in it: none that is shared."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return [
        {n: tuple(p.shape) for n, p in layer.named_parameters() if p.ndim in (2, 3) and owners[id(p)] == 1}
        for layer in layers
    ]


@contextlib.contextmanager
def _eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """transformers' mixtures multiply each expert's matrices by its own tokens, one expert after the other."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, c._experts_implementation) for c in configs.values() if hasattr(c, "_experts_implementation")]
    try:
        for config, _ in before:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, value in before:
            config._experts_implementation = value


def _whole(
    name: str,
    loaded: LoadedModel,
    samples: Samples,
    matrices: Sequence[Mapping[str, tuple[int, ...]]],
    progress: Callable[[int], object],
    *,
    backward: bool,
) -> list[_Part]:
    """As `watch_layers`, with all of the model in memory, a sequence at a time, by autograd alone."""
    model = loaded.model
    parts: list[_Part] = []

    def watched(index: int, layer: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with parts[-1](index, layer):
            return original(*args, **kwargs)

    def embed(original: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        return original(*args).detach().requires_grad_(backward).clone()  # which some models write to

    embedding: Any = model.get_input_embeddings()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(backward))
        stack.enter_context(replaced(embedding, embed))
        for index, layer in enumerate(loaded.layers):
            stack.enter_context(replaced(layer, partial(watched, index, layer)))
        for n, ids in enumerate(samples.input_ids.to(embedding.weight.device)):
            parts.append(_Part(matrices))
            try:
                logits = model(input_ids=ids[None], use_cache=False).logits[0]
                if backward:
                    uniforms = None if samples.uniforms is None else samples.uniforms[n].to(logits.device)
                    (sequence_loss(logits, ids.to(logits.device), uniforms) * (len(ids) - 1)).backward()
            except Exception as error:  # a model's own code raises anything
                if isinstance(error, (FimError, OSError)) or is_out_of_memory(error):
                    raise
                raise FimError(
                    f"{name}: {type(model).__name__} of transformers can't be run on random tokens "
                    f"({type(error).__name__}: {reason(error)}); check its config.json"
                ) from error
            progress((1 + backward) * len(loaded.layers))
    return parts


@dataclass(frozen=True, eq=False)
class RecordedFactors:
    """Factors that were recorded just now; see `measurements.factors.write_factors`."""

    factors: list[Factors]
    not_reached: list[str]
    without: list[str]
    warnings: list[str]
    dtype: str


def record_factors(
    base: InputModel,
    settings: FisherSettings,
    samples: Samples,
    kind: str,
    dtype: str | None,
    options: MergeOptions,
    *,
    running: torch.dtype | None = None,
) -> RecordedFactors:
    """Load a model, record what its linear layers are given on tokens, and let it go.

    Args:
        base: the model.
        settings: how many tokens, and which labels.
        samples: the tokens.
        kind: `inputs`, or `both` inputs and gradients: those of the sum of each sequence's next-token losses.
        dtype: the merge's dtype, or None for the checkpoint's own.
        options: the merge's options, which say where it runs.
        running: what to run it in.

    Raises:
        FimError: it can't be loaded, doesn't fit, or a value isn't finite.
    """
    backward = kind == "both"

    def work(loaded: LoadedModel, whole: bool) -> RecordedFactors:
        lines: list[str] = []
        matrices = _matrices(loaded.model, loaded.layers)
        steps = (1 + backward) * len(loaded.layers) * len(samples.input_ids)
        title = f"Recording factors of {base}"
        with (
            tqdm.tqdm(total=steps, desc=title, unit="step", disable=options.quiet) as progress,
            prepared(loaded.model),
            _eager_experts(loaded.model),
        ):
            if whole:
                parts = _whole(str(base), loaded, samples, matrices, progress.update, backward=backward)
            else:
                parts = watch_layers(
                    *(loaded.model, loaded.layers, samples, progress.update, loaded.weights, lines.append),
                    lambda: _Part(matrices),
                    backward=backward,
                )
        seen, others = _together(str(base), parts, backward)
        ran_in = str(loaded.model.dtype).removeprefix("torch.")
        return RecordedFactors(*_named(base, seen, others, matrices), [f"{base}: {line}" for line in lines], ran_in)

    found, warnings = with_model(base, settings, dtype, options, work, running=running)
    found.warnings[:0] = warnings
    return found


# By (decoder layer, parameter's name in it, number in a stack or None).
_Seen = dict[tuple[int, str, int | None], LinearFactors]


def _together(name: str, parts: Sequence[_Part], backward: bool) -> tuple[_Seen, set[tuple[int, str]]]:
    """The factors on all micro-batches, their rows stacked; and the parameters that have none for how they are used.

    Raises:
        NotFiniteError: a value that isn't finite.
    """
    seen: _Seen = {}
    others = set().union(*(part.others for part in parts))
    joined: dict[tuple[int, ...], torch.Tensor] = {}  # what several share, they go on sharing

    def join(tensors: Sequence[torch.Tensor], index: int, own: str) -> torch.Tensor:
        key = tuple(map(id, tensors))
        if key not in joined:
            joined[key] = tensors[0] if len(tensors) == 1 else torch.cat([*tensors])
            if not is_finite(joined[key]):
                raise NotFiniteError(
                    f"{name}: what the tensor {own} of decoder layer {index} is given, or its gradient, isn't finite "
                    f"(in {str(tensors[0].dtype).removeprefix('torch.')}); check the checkpoint for NaN, or set a "
                    "wider `dtype:` such as bfloat16 or float32"
                )
        return joined[key]

    for key in dict.fromkeys(key for part in parts for key in part.uses):
        uses = [use for part in parts for use in part.uses.get(key, ())]
        index, own, _ = key
        gradients = [use.gradients for use in uses if use.gradients is not None]
        if len({use.transposed for use in uses}) > 1 or (backward and len(gradients) < len(uses)):
            others.add((index, own))
            continue
        inputs = join([use.inputs for use in uses], index, own)
        seen[key] = LinearFactors(inputs, join(gradients, index, own) if backward else None, uses[0].transposed)
    return {key: linear for key, linear in seen.items() if key[:2] not in others}, others


def _named(
    base: InputModel, seen: _Seen, others: set[tuple[int, str]], matrices: Sequence[Mapping[str, tuple[int, ...]]]
) -> tuple[list[Factors], list[str], list[str]]:
    """The factors by the names of mergekit's layout, for each decoder layer; what wasn't reached; what has none."""
    shapes = {name: header.shape for name, header in base.headers.items()}
    factors: list[Factors] = []
    not_reached: list[str] = []
    without: list[str] = []
    counts = {getattr(base.text_config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")}
    for layer in base.layout.layers:
        its: dict[str, Any] = {}
        numbers = {shape[0] for shape in matrices[layer.index].values() if len(shape) == 3} | counts
        for name in (tensor.name for tensor in layer.tensors if tensor.name not in base.absent):
            place = None if base.loading.is_whole(name) else base.loading.place(name, shapes)
            keys = [place.key] if place is not None else base.loading.keys_of(name)
            own = local_name(keys[0], layer.index) if keys else ""
            shape = matrices[layer.index].get(own, ())
            is_known = len(keys) == 1 and shape and (place is not None or base.loading.is_whole(name))
            if is_known and _ROUTER.search(own) and len(shape) == 2 and not numbers.isdisjoint(shape):
                is_known = False
            stack = [seen.get((layer.index, own, number)) for number in range(shape[0] if len(shape) == 3 else 0)]
            one = seen.get((layer.index, own, None if place is None else place.expert))
            if not is_known or (layer.index, own) in others or (stack and not any(stack)):
                if len(shape) > 1 or len(shapes.get(name, ())) > 1:
                    without.append(name)
            elif stack and place is None:
                its[name] = stack
                not_reached += [f"{name}[{number}]" for number, expert in enumerate(stack) if expert is None]
            elif one is None:
                not_reached.append(name)
            else:
                part = one if place is None else _part(one, place)
                its |= {name: part} if part is not None else {}
                without += [name] if part is None else []
        factors.append(its)
    return factors, not_reached, without


def _part(linear: LinearFactors, place: Place) -> LinearFactors | None:
    """The factors of a part of a matrix; None where it doesn't have all inputs in their order."""
    inputs, outputs = (place.rows, place.columns) if linear.transposed else (place.columns, place.rows)
    if not torch.equal(inputs, torch.arange(linear.inputs.shape[1])):
        return None
    gradients = None if linear.gradients is None else linear.gradients[:, outputs]
    return LinearFactors(linear.inputs, gradients, linear.transposed ^ place.turned)
