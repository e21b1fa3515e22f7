"""Where the factors of a tensor are, and its merge by them.

The merge of a tensor sees the name that it gets, and its parameters. One of these, a string that the pre-pass sets for
every fine-tuned model and source layer, says which files have the factors of base and model, and what the names of the
two layers' tensors begin with.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergekit_fim.measurements.factors import FactorsFile
from mergekit_fim.merging.kron import InputMap, check_betas, weighted


@dataclass(frozen=True)
class Place:
    """Where the factors of one matrix of all models are."""

    inputs: tuple[tuple[str, str], ...]  # of each model, the base first: a file, and which tensor in it
    transposed: bool  # whether the checkpoints store the matrix as [input, output]
    damping: float  # a part of the mean diagonal
    sharpness: float

    def rows(self, device: torch.device) -> list[torch.Tensor]:
        """The inputs of each model, [token, input]."""
        return [_opened(path).inputs(name).to(device) for path, name in self.inputs]


def source(base: tuple[str, str], model: tuple[str, str], damping: float, sharpness: float) -> str:
    """What the merge of a layer's tensors is told for one fine-tuned model: of each of the two a file and a prefix."""
    return json.dumps([base, model, damping, sharpness])


def places(name: str, sources: Sequence[str]) -> list[Place | None]:
    """Find the factors of a tensor by its name in the merged model, or in any other one.

    Args:
        name: the name.
        sources: of each fine-tuned model, see `source`; empty ones for a tensor outside the decoder layers.

    Returns:
        One for a matrix, one for each of a stack; None where a model has no factors of it. Empty where none has any.
    """
    if not all(sources):
        return []
    told = [json.loads(text) for text in sources]
    base, (_, prefix), damping, sharpness = told[0]
    stem = re.escape(re.sub(r"\d+\.$", "", prefix))
    local = re.sub(rf"^{stem}\d+\.", "", name)
    ends = [base, *(model for _, model, *_ in told)]
    made: list[Place | None] = []
    for linears in zip(*(_opened(path).tensors.get(start + local, ()) for path, start in ends), strict=False):
        known = [(path, linear) for (path, _), linear in zip(ends, linears, strict=True) if linear is not None]
        turned = {linear.transposed for _, linear in known}
        is_complete = len(known) == len(ends) and len(turned) == 1
        inputs = tuple((path, linear.inputs) for path, linear in known)
        made.append(Place(inputs, turned.pop(), damping, sharpness) if is_complete else None)
    return made


def merged(place: Place | None, deltas: Sequence[torch.Tensor], betas: Sequence[float]) -> torch.Tensor:
    """The merged task vector of one matrix, as the checkpoints store it.

    Args:
        place: of its factors; None where it has none, and β is its coefficient.
        deltas: the task vectors, float32 or float64.
        betas: β_m, not negative, their sum at most 1.

    Raises:
        ValueError: β out of range, or factors that are singular or not finite.
    """
    if place is None or max(check_betas(betas)) == 1:
        return weighted(deltas, betas)
    made = _input_map(place, tuple(betas), deltas[0].dtype, deltas[0].device)
    return made([delta.T for delta in deltas]).T if place.transposed else made(deltas)


# Files that the pre-pass has checked.
@functools.lru_cache(maxsize=16)
def _opened(path: str) -> FactorsFile:
    return FactorsFile.open(path, check=False)


# Query, key and value projection have the same inputs, and so have gate and up projection.
@functools.lru_cache(maxsize=2)
def _input_map(place: Place, betas: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> InputMap:
    return InputMap(place.rows(device), betas, place.damping, place.sharpness, dtype)


def forget() -> None:
    """Let go of what is kept from one tensor to the next."""
    _input_map.cache_clear()
    _opened.cache_clear()
