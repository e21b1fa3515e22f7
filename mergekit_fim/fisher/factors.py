"""Model + tokens -> what the linear layers of its decoder layers are given.

Which modules a model is made of doesn't matter: while a decoder layer runs, every function of torch that is given one
of its matrices is looked at. A matrix that rows of inputs are multiplied by, alone or as one of a stack of experts, has
factors; one that is used in any other way has none.
"""

import contextlib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import tqdm
from mergekit.options import MergeOptions
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mergekit_fim.fisher.batched import watch_layers
from mergekit_fim.fisher.loading import LoadedModel
from mergekit_fim.fisher.measure import NotFiniteError, with_model
from mergekit_fim.fisher.samples import Samples
from mergekit_fim.measurements.factors import FactorsFile, FactorsSettings, LinearFactors, Linears
from mergekit_fim.measurements.record import ModelIdentity, versions
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.models.layout import local_name
from mergekit_fim.models.names import Place
from mergekit_fim.text import size

# The functions that multiply x by a weight: which of their arguments are the two, and whether the weight is [in, out].
_PRODUCTS: dict[Any, tuple[int, int, bool]] = {F.linear: (0, 1, False)}
_PRODUCTS |= {f: (0, 1, True) for where in (torch, torch.Tensor) for f in (where.matmul, where.mm, where.bmm)}
_PRODUCTS |= {torch.Tensor.__matmul__: (0, 1, True), torch.addmm: (1, 2, True), torch.Tensor.addmm: (1, 2, True)}

# The weights that choose experts, by name; they have an output for each.
_ROUTER = re.compile(r"(^|\.)gate\.|router")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

# A matrix: its decoder layer, its parameter's name in that, and which one of a stack it is.
_Key = tuple[int, str, int | None]


class _Watch(TorchFunctionMode):
    """What is seen of one micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        # By matrix, the inputs [token, d_in] of each use, and whether the weight is [d_in, d_out] in it.
        self.uses: dict[_Key, list[tuple[torch.Tensor, bool]]] = {}
        self.others: set[tuple[int, str]] = set()  # the parameters that are used in another way, by layer and name
        self._copies: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextlib.contextmanager
    def __call__(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Watch a decoder layer while it runs forward."""
        matrices = [(p.data_ptr(), name, p) for name, p in layer.named_parameters() if p.ndim in (2, 3)]
        self._index, self._held = index, sorted(matrices, key=lambda its: its[:2])
        with self:
            yield
        self._copies.clear()

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
            if not is_product or not self._note(name, parameter, weight, args[at], turned):
                self.others.add((self._index, name))
        return result

    def _owner(self, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """The parameter that a tensor is, or is a view of."""
        place = bisect_right(self._held, tensor.data_ptr(), key=lambda its: its[0]) - 1
        if place < 0 or not tensor.numel():
            return None
        start, name, parameter = self._held[place]
        inside = tensor.data_ptr() < start + parameter.nbytes and tensor.device == parameter.device
        return (name, parameter) if inside else None

    def _note(self, name: str, parameter: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, turned: bool) -> bool:
        """Note x · weight, [..., d_in] · [d_in, d_out] if `turned`; say whether the weight is known to be a matrix."""
        offset = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        matrix, number = parameter, None
        if parameter.ndim == 3 and weight.ndim == 2:
            matrix, (number, offset) = parameter[0], divmod(offset, parameter.stride(0))
        is_it = [(w.shape, w.stride()) == (weight.shape, weight.stride()) for w in (matrix, matrix.mT)]
        if not any(is_it) or offset or not parameter.dtype == weight.dtype == x.dtype:
            return False
        if weight.ndim == 3 and (x.ndim != 3 or len(x) != len(weight)):
            return False
        rows: dict[int | None, torch.Tensor] = {number: x}
        if weight.ndim == 3:  # all tokens go to all experts, as zeros where they aren't for them
            rows = {expert: x[expert][its] for expert in range(len(x)) if (its := x[expert].any(-1)).any()}
        transposed = turned is is_it[0]
        for which, its_rows in rows.items():
            uses = self.uses.setdefault((self._index, name, which), [])
            uses.append((self._copy(its_rows), transposed))
            if uses[0][1] is not transposed:
                return False
        return True

    def _copy(self, x: torch.Tensor) -> torch.Tensor:
        """Copy inputs to the CPU, [token, d_in]; make one copy for all matrices that are given the same."""
        same = (x.data_ptr(), x.numel(), x.shape[-1], x.stride()[-1:], x._version)
        if same not in self._copies:  # x beside it, so that no other tensor gets its address
            self._copies[same] = x.detach().reshape(-1, x.shape[-1]).to("cpu", copy=True), x
        return self._copies[same][0]


def record_factors(
    base: InputModel,
    identity: ModelIdentity,
    settings: FactorsSettings,
    samples: Samples,
    dtype: str | None,
    options: MergeOptions,
    *,
    running: torch.dtype | None = None,
) -> tuple[FactorsFile, dict[str, torch.Tensor]]:
    """Load a model, record what its linear layers are given on tokens, and let it go; see `with_model`.

    Returns:
        What to write, and the inputs that it names.
    """

    def work(loaded: LoadedModel, _whole: bool) -> tuple[FactorsFile, dict[str, torch.Tensor]]:
        model, lines = loaded.model, list[str]()
        for module in model.modules():  # transformers' mixtures then take one expert after the other
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_experts_implementation"):
                config._experts_implementation = "eager"
        steps = len(loaded.layers) * len(samples.input_ids)
        title = f"Recording factors of {base}, about {size(_expected_size(base, samples, model.dtype))}"
        with tqdm.tqdm(total=steps, desc=title, unit="step", disable=options.quiet) as progress:
            given = (model, loaded.layers, samples, progress.update, loaded.weights, lines.append)
            watches = watch_layers(*given, _Watch)
        inputs, named = _named(base, loaded, watches)
        ran_as = replace(settings, dtype=str(model.dtype).removeprefix("torch."))
        warnings = tuple(f"{base}: {line}" for line in lines)
        return FactorsFile(model=identity, settings=ran_as, warnings=warnings, versions=versions(), **named), inputs

    (found, inputs), warnings = with_model(base, settings.seq_len, dtype, options, work, running=running)
    return found.model_copy(update={"warnings": (*warnings, *found.warnings)}), inputs


def _expected_size(base: InputModel, samples: Samples, dtype: torch.dtype) -> int:
    """Estimate the bytes of factors by the layers' widths: attention and MLP each have a first and a last input."""
    text = base.text_config
    inner = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None)
    experts = getattr(text, "num_experts_per_tok", None) or 1
    width = 2 * text.hidden_size + experts * (text.hidden_size + (inner or 4 * text.hidden_size))
    return dtype.itemsize * samples.input_ids.numel() * len(base.layout.layers) * width


def _named(
    base: InputModel, loaded: LoadedModel, watches: Sequence[_Watch]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Find the inputs, and by mergekit's names what `FactorsFile` says of tensors."""
    stored = {name: header.shape for name, header in base.headers.items()}
    owners = Counter(id(parameter) for _, parameter in loaded.model.named_parameters(remove_duplicate=False))
    others = set().union(*(watch.others for watch in watches))
    inputs: dict[tuple[int, ...], tuple[str, torch.Tensor]] = {}  # by the ids of its parts: name, [token, d_in]
    found, not_reached, without = dict[str, Linears](), list[str](), list[str]()
    for index, (layer, module) in enumerate(zip(base.layout.layers, loaded.layers, strict=True)):
        shapes = {n: p.shape for n, p in module.named_parameters() if p.ndim in (2, 3) and owners[id(p)] == 1}
        counts: set[Any] = {shape[0] for shape in shapes.values() if len(shape) == 3}
        counts |= {getattr(base.text_config, name, None) for name in _EXPERTS}
        for name in (tensor.name for tensor in layer.tensors if tensor.name not in base.absent):
            is_whole = base.loading.is_whole(name)
            place = None if is_whole else base.loading.place(name, stored)
            keys = base.loading.keys_of(name) if is_whole else [place.key] if place else []
            local = local_name(keys[0], index) if len(keys) == 1 else ""
            shape: Sequence[int] = shapes.get(local, ())
            is_router = len(shape) == 2 and _ROUTER.search(local) and not counts.isdisjoint(shape)
            numbers: Sequence[int | None] = range(shape[0]) if len(shape) == 3 else [None]
            linears: Linears = ()
            if shape and not is_router and (index, local) not in others:
                linears = tuple(_linear(str(base), (index, local, n), watches, inputs) for n in numbers)
            if len(shape) == 3 and not any(linears):
                linears = ()  # the model uses the stack in another way
            if place and linears:
                linears = _of_part(linears[place.expert or 0], place, shape)
            if not linears and len(shape or stored.get(name, ())) > 1:
                without.append(name)
            if any(linears):
                found[name] = linears
            idle = [number for number, linear in enumerate(linears) if linear is None]
            not_reached += [name if len(linears) == 1 else f"{name}[{number}]" for number in idle]
    return dict(inputs.values()), {"tensors": found, "not_reached": tuple(not_reached), "without": tuple(without)}


def _linear(
    model: str, key: _Key, watches: Sequence[_Watch], inputs: dict[tuple[int, ...], tuple[str, torch.Tensor]]
) -> LinearFactors | None:
    """Join the factors of a matrix on all micro-batches; None for one that no token came to."""
    uses = [use for watch in watches for use in watch.uses.get(key, ())]
    if not uses:
        return None
    parts = [rows for rows, _ in uses]
    ids = tuple(map(id, parts))
    if ids not in inputs:
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not all(end.isfinite() for end in whole.aminmax()):  # in 16 bits much faster than to look at all
            raise NotFiniteError(
                f"{model}: what the tensor {key[1]} of decoder layer {key[0]} is given isn't finite (in "
                f"{str(whole.dtype).removeprefix('torch.')}); check the checkpoint for NaN, or set a wider `dtype:` "
                "such as bfloat16 or float32"
            )
        inputs[ids] = f"inputs.{len(inputs)}", whole
    return LinearFactors(key[0], inputs[ids][0], uses[0][1])


def _of_part(linear: LinearFactors | None, place: Place, shape: Sequence[int]) -> Linears:
    """The factors of a part of a parameter of this shape; none where it doesn't have all inputs in their order."""
    if linear is None:
        return (None,)
    own, width = (place.rows, shape[-2]) if linear.transposed else (place.columns, shape[-1])
    has_all = torch.equal(own, torch.arange(width))
    return (replace(linear, transposed=linear.transposed ^ place.turned),) if has_all else ()
