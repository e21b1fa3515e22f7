"""Where the factors of a tensor are, as the pre-pass of `fim_kron` says it tensor by tensor, and the merge by them.

The merge of a tensor sees the name that it gets, and its parameters. One of these, a string per model and source layer,
says which files have the factors of base and model, and what the names of the two layers' tensors begin with.
"""

import functools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from mergekit_fim.errors import FimError, reason
from mergekit_fim.measurements.factors import FactorsFile
from mergekit_fim.merging.kron import InputMap, Side, check_betas, merge_by_both, weighted


@dataclass(frozen=True)
class Source:
    """What the merge of a layer's tensors is told for one fine-tuned model.

    Attributes:
        base: the file of the base's factors, and what the names of the base layer's tensors begin with.
        model: likewise of the fine-tuned model.
        factors: `inputs` or `both`.
        damping: a part of the mean diagonal.
    """

    base: tuple[str, str]
    model: tuple[str, str]
    factors: str
    damping: float

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> "Source":
        """The inverse of `str`."""
        content = json.loads(text)
        return cls(tuple(content["base"]), tuple(content["model"]), content["factors"], content["damping"])


@dataclass(frozen=True)
class Place:
    """Where the factors of one matrix of all models are, the base's first.

    Attributes:
        files: of each model.
        inputs: which tensor in it.
        gradients: likewise; empty by inputs alone.
        transposed: whether the checkpoints store the matrix as [input, output].
        damping: see `Source`.
    """

    files: tuple[str, ...]
    inputs: tuple[str, ...]
    gradients: tuple[str, ...]
    transposed: bool
    damping: float

    def rows(self, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """The inputs [token, input] and, if they count, the gradients [token, output] of each model."""
        inputs = _rows(self.files, self.inputs, device)
        return inputs, _rows(self.files, self.gradients, device) if self.gradients else None


def places(name: str, sources: Sequence[Source]) -> list[Place | None]:
    """Where the factors of a tensor are.

    Args:
        name: in the merged model, or in any other one.
        sources: of each fine-tuned model.

    Returns:
        One for a matrix, one for each expert's of a stack; None for one of which a model has no factors. Empty where
        the tensor has none at all.
    """
    stem = re.escape(re.sub(r"\d+\.$", "", sources[0].model[1]))
    match = re.match(rf"{stem}\d+\.(?P<local>.*)", name)
    if match is None:
        return []
    ends = [sources[0].base, *(source.model for source in sources)]
    found = [opened(path).keys_of(prefix + match["local"]) for path, prefix in ends]
    if len({len(keys) for keys in found}) > 1:
        return []
    files, first = tuple(path for path, _ in ends), sources[0]
    made: list[Place | None] = []
    for keys in zip(*found, strict=True):
        its = [key for key in keys if key is not None]
        gradients = tuple(key.gradients for key in its if key.gradients is not None) if first.factors == "both" else ()
        complete = len(its) == len(keys) and len({key.transposed for key in its}) == 1
        complete = complete and len(gradients) in (0, len(keys))
        inputs = tuple(key.inputs for key in its)
        made.append(Place(files, inputs, gradients, its[0].transposed, first.damping) if complete else None)
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
    its = [delta.T for delta in deltas] if place.transposed else list(deltas)
    device, dtype = deltas[0].device, deltas[0].dtype
    if place.gradients:
        a, g = (_side(place.files, keys, place.damping, device) for keys in (place.inputs, place.gradients))
        found = merge_by_both(its, a, g, betas)
    else:
        found = _input_map(place.files, place.inputs, tuple(betas), place.damping, dtype, device)(its)
    return found.T if place.transposed else found


def opened(path: str) -> FactorsFile:
    """A file of factors, which the pre-pass has checked."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise FimError(
            f"{path}: the factors that the pre-pass found can't be read ({reason(error)}); merge again"
        ) from None
    return _opened(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=16)
def _opened(path: str, _changed: int, _size: int) -> FactorsFile:
    return FactorsFile.open(path, check=False)


# Query, key and value projection have the same inputs, and so have gate and up projection.
@functools.lru_cache(maxsize=2)
def _input_map(
    files: tuple[str, ...],
    keys: tuple[str, ...],
    betas: tuple[float, ...],
    damping: float,
    dtype: torch.dtype,
    device: torch.device,
) -> InputMap:
    return InputMap(_rows(files, keys, device), betas, damping, dtype)


@functools.lru_cache(maxsize=3)
def _side(files: tuple[str, ...], keys: tuple[str, ...], damping: float, device: torch.device) -> Side:
    return Side(_rows(files, keys, device), damping)


def _rows(files: tuple[str, ...], keys: tuple[str, ...], device: torch.device) -> list[torch.Tensor]:
    return [opened(path).tensor(key).to(device) for path, key in zip(files, keys, strict=True)]


def forget() -> None:
    """Let go of what is kept from one tensor to the next."""
    for kept in (_input_map, _side, _opened):
        kept.cache_clear()
