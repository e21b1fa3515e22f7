"""Model + tokens -> what the linear layers of its decoder layers are given, and the gradients at their outputs.

Which modules a model is made of doesn't matter: while a decoder layer runs, every function of torch that is given one
of its matrices is looked at. A matrix that rows of inputs are multiplied by, alone or as one of a stack of experts, has
factors; one that anything else is done with has none.
"""

import contextlib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import tqdm
from mergekit.options import MergeOptions
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.errors import FimError
from mergekit_fim.fisher.batched import watch_layers
from mergekit_fim.fisher.engine import ForwardError, autograd_engine
from mergekit_fim.fisher.loading import LoadedModel
from mergekit_fim.fisher.measure import NotFiniteError, with_model
from mergekit_fim.fisher.samples import Samples
from mergekit_fim.fisher.weights import replaced
from mergekit_fim.measurements.factors import Factors, LinearFactors, is_finite
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.models.layout import local_name
from mergekit_fim.models.names import Place

# The functions that multiply x by a weight: which of their arguments are the two, and whether the weight is [in, out].
_PRODUCTS: dict[Any, tuple[int, int, bool]] = {F.linear: (0, 1, False)}
_PRODUCTS |= {f: (0, 1, True) for where in (torch, torch.Tensor) for f in (where.matmul, where.mm, where.bmm)}
_PRODUCTS |= {torch.Tensor.__matmul__: (0, 1, True), torch.addmm: (1, 2, True), torch.Tensor.addmm: (1, 2, True)}

# The weights that choose experts, by name; they have an output for each.
_ROUTER = re.compile(r"(^|\.)gate\.|router")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

# A matrix: its decoder layer, its parameter's name in that, and which one of a stack it is.
_Key = tuple[int, str, int | None]


@dataclass
class _Use:
    """Rows of inputs of a matrix, and the gradients at its outputs: [token, d_in] and [token, d_out]."""

    inputs: torch.Tensor
    transposed: bool
    gradients: torch.Tensor | None = None

    def keep(self, rows: Any, scale: float, gradient: torch.Tensor) -> None:
        self.gradients = gradient.detach()[rows].reshape(len(self.inputs), -1).to("cpu", copy=True).mul_(scale)


class _Part:
    """What is seen of a micro-batch: the `uses` of each matrix, and the `others` that something else is done with."""

    def __init__(self, matrices: Sequence[Mapping[str, Sequence[int]]], scale: float = 1.0) -> None:
        self._matrices, self.scale = matrices, scale
        self.uses: dict[_Key, list[_Use]] = {}
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
        self._copies: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = {r.untyped_storage().data_ptr() for r in tree_leaves(result) if isinstance(r, torch.Tensor)}
        if not storages:
            return result
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        owners = [(tensor, owner) for tensor in given if (owner := self._owner(tensor)) is not None]
        for weight, (name, parameter) in owners:
            if storages == {parameter.untyped_storage().data_ptr()}:
                continue  # a view, of which we hear when it is used
            at, own, turned = _PRODUCTS.get(func, (0, len(args), False))
            is_product = len(owners) == 1 and own < len(args) and args[own] is weight
            if not is_product or not self._note(name, parameter, weight, args[at], result, turned):
                self._part.others.add((self._index, name))
        return result

    def _owner(self, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """The parameter that a tensor is, or is a view of."""
        place = bisect_right(self._held, tensor.data_ptr(), key=lambda its: its[0]) - 1
        if place < 0 or not tensor.numel():
            return None
        start, name, parameter = self._held[place]
        inside = tensor.data_ptr() < start + parameter.nbytes and tensor.device == parameter.device
        return (name, parameter) if inside else None

    def _note(
        self, name: str, parameter: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor, turned: bool
    ) -> bool:
        """Note y = x · weight, [..., d_in] · [d_in, d_out] if `turned`; whether it is known what the weight is."""
        offset = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        matrix, number = parameter, None
        if parameter.ndim == 3 and weight.ndim == 2:
            matrix, (number, offset) = parameter[0], divmod(offset, parameter.stride(0))
        is_it = [(w.shape, w.stride()) == (weight.shape, weight.stride()) for w in (matrix, matrix.mT)]
        if not any(is_it) or offset or not parameter.dtype == weight.dtype == x.dtype:
            return False
        transposed = turned is is_it[0]
        if weight.ndim == 2:
            self._keep((self._index, name, number), x, y, transposed)
            return True
        if x.ndim != 3 or len(x) != len(weight):
            return False
        for expert in range(len(weight)):  # all tokens go to all experts, as zeros where they aren't for them
            rows = x[expert].any(-1)
            if bool(rows.any()):
                self._keep((self._index, name, expert), x[expert][rows], y, transposed, (expert, rows))
        return True

    def _keep(self, key: _Key, x: torch.Tensor, y: torch.Tensor, transposed: bool, rows: Any = ...) -> None:
        same = (x.data_ptr(), x.numel(), x.shape[-1], x.stride()[-1:], x._version)
        if same not in self._copies:  # x beside it, so that no other tensor gets its address
            self._copies[same] = x.detach().reshape(-1, x.shape[-1]).to("cpu", copy=True), x
        use = _Use(self._copies[same][0], transposed)
        self._part.uses.setdefault(key, []).append(use)
        if torch.is_grad_enabled():
            y.requires_grad_(True)
            y.register_hook(partial(use.keep, rows, self._part.scale))


def _whole(loaded: LoadedModel, samples: Samples, part: _Part, progress: Callable[[int], object]) -> list[_Part]:
    """As `watch_layers`, by the reference engine."""

    def watched(index: int, layer: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with part(index, layer):
            return original(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(loaded.layers):
            stack.enter_context(replaced(layer, partial(watched, index, layer)))
        autograd_engine(loaded.model, loaded.layers, samples, progress)
    return [part]


@dataclass(frozen=True, eq=False)
class RecordedFactors:
    """Factors that were recorded just now: what `measurements.factors.write_factors` is given, and the dtype."""

    factors: list[Factors]
    lists: dict[str, list[str]]
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
        model, layers, lines = loaded.model, loaded.layers, list[str]()
        matrices = _matrices(model, layers)
        for module in model.modules():  # transformers' mixtures then take one expert after the other
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_experts_implementation"):
                config._experts_implementation = "eager"
        steps = (1 + (backward or whole)) * len(layers) * len(samples.input_ids)
        title = f"Recording factors of {base}"
        with tqdm.tqdm(total=steps, desc=title, unit="step", disable=options.quiet) as progress, torch.enable_grad():
            if whole:
                parts = _whole(loaded, samples, _Part(matrices, samples.input_ids.shape[1] - 1.0), progress.update)
            else:
                given = (model, layers, samples, progress.update, loaded.weights, lines.append)
                parts = watch_layers(*given, lambda: _Part(matrices), backward=backward)
        factors, lists = _named(base, matrices, *_together(str(base), parts, backward))
        lists["warnings"] = [f"{base}: {line}" for line in lines]
        return RecordedFactors(factors, lists, str(model.dtype).removeprefix("torch."))

    try:
        found, warnings = with_model(base, settings, dtype, options, work, running=running)
    except ForwardError as error:
        raise FimError(f"{base}: {error}") from error
    found.lists["warnings"][:0] = warnings
    return found


def _matrices(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[dict[str, Sequence[int]]]:
    """The shapes of every decoder layer's matrices and stacks of them, by their names in it: none that is shared."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return [
        {n: p.shape for n, p in layer.named_parameters() if p.ndim in (2, 3) and owners[id(p)] == 1} for layer in layers
    ]


def _together(
    name: str, parts: Sequence[_Part], backward: bool
) -> tuple[dict[_Key, LinearFactors], set[tuple[int, str]]]:
    """The factors on all micro-batches, their rows stacked; and the parameters that have none for how they are used.

    Raises:
        NotFiniteError: a value that isn't finite.
    """
    seen: dict[_Key, LinearFactors] = {}
    others = set().union(*(part.others for part in parts))
    joined: dict[tuple[int, ...], torch.Tensor] = {}  # what several share, they go on sharing
    for key in dict.fromkeys(key for part in parts for key in part.uses):
        uses = [use for part in parts for use in part.uses.get(key, ())]
        sides = [[use.inputs for use in uses], [use.gradients for use in uses if use.gradients is not None]]
        if len({use.transposed for use in uses}) > 1 or (backward and len(sides[1]) < len(uses)):
            others.add(key[:2])
            continue
        stacked = []
        for side in sides[: 1 + backward]:
            own = tuple(map(id, side))
            if own not in joined:
                joined[own] = side[0] if len(side) == 1 else torch.cat(side)
                if not is_finite(joined[own]):
                    raise NotFiniteError(
                        f"{name}: what the tensor {key[1]} of decoder layer {key[0]} is given, or its gradient, isn't "
                        f"finite (in {str(side[0].dtype).removeprefix('torch.')}); check the checkpoint for NaN, or "
                        "set a wider `dtype:` such as bfloat16 or float32"
                    )
            stacked.append(joined[own])
        seen[key] = LinearFactors(stacked[0], stacked[1] if backward else None, uses[0].transposed)
    return {key: linear for key, linear in seen.items() if key[:2] not in others}, others


def _named(
    base: InputModel,
    matrices: Sequence[Mapping[str, Sequence[int]]],
    seen: Mapping[_Key, LinearFactors],
    others: set[tuple[int, str]],
) -> tuple[list[Factors], dict[str, list[str]]]:
    """By the names of mergekit's layout: the factors, for each decoder layer, and the lists of what has none."""
    shapes = {name: header.shape for name, header in base.headers.items()}
    factors, not_reached, without = list[Factors](), list[str](), list[str]()
    for layer in base.layout.layers:
        its: dict[str, Any] = {}
        own = matrices[layer.index]
        experts = {s[0] for s in own.values() if len(s) == 3} | {getattr(base.text_config, n, None) for n in _EXPERTS}
        for name in (tensor.name for tensor in layer.tensors if tensor.name not in base.absent):
            is_whole = base.loading.is_whole(name)
            place = None if is_whole else base.loading.place(name, shapes)
            keys = base.loading.keys_of(name) if is_whole else [place.key] if place else []
            local = local_name(keys[0], layer.index) if len(keys) == 1 else ""
            shape = own.get(local, ())
            numbers = range(shape[0]) if len(shape) == 3 else [None]
            linears = [seen.get((layer.index, local, number)) for number in numbers]
            is_router = len(shape) == 2 and _ROUTER.search(local) and not experts.isdisjoint(shape)
            is_used = (layer.index, local) in others or (len(shape) == 3 and not any(linears))  # in another way
            one = linears[place.expert or 0 if place else 0]
            part = _part(one, place) if one and place else one
            if not shape or is_router or is_used or (one and not part):
                without += [name] if len(shape or shapes.get(name, ())) > 1 else []
            elif len(shape) == 3 and not place:
                its[name] = linears
                not_reached += [f"{name}[{number}]" for number, linear in enumerate(linears) if not linear]
            elif part:
                its[name] = part
            else:
                not_reached.append(name)
        factors.append(its)
    return factors, {"not_reached": not_reached, "without": without}


def _part(linear: LinearFactors, place: Place) -> LinearFactors | None:
    """The factors of a part of a matrix; None where it doesn't have all inputs in their order."""
    inputs, outputs = (place.rows, place.columns) if linear.transposed else (place.columns, place.rows)
    if not torch.equal(inputs, torch.arange(linear.inputs.shape[1])):
        return None
    gradients = None if linear.gradients is None else linear.gradients[:, outputs]
    return LinearFactors(linear.inputs, gradients, linear.transposed ^ place.turned)
