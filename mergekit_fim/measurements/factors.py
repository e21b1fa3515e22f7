"""Kronecker factors as a file: what the linear layers of a model's decoder layers are given, token by token.

A layer y = W x has the inputs X [token, d_in]. Its factor A = XᵀX / token (K-FAC, arXiv 1503.05671) is never formed.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from safetensors import SafetensorError, safe_open

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.errors import FimError, reason
from mergekit_fim.files import written_whole
from mergekit_fim.measurements.record import ModelIdentity

if TYPE_CHECKING:
    from torch import Tensor

FORMAT, VERSION = "mergekit-fim/factors", 1
_AGAIN = "record them again with `mergekit-fim fisher --factors`"


@dataclass(frozen=True)
class LinearFactors:
    """The factors of one matrix."""

    layer: int  # the decoder layer that it is in, from 0
    inputs: str  # which of the file's tensors has its inputs; matrices that are given the same share it
    transposed: bool  # whether the checkpoint stores the matrix as [d_in, d_out]


# Of a matrix one, of a stack of experts one for each; None for an expert that no token came to.
Linears = tuple[LinearFactors | None, ...]


@dataclass(frozen=True)
class FactorsSettings:
    """What determines factors, besides the model."""

    samples: int  # the number of sequences
    seq_len: int  # the tokens per sequence
    seed: int  # of the random tokens
    tokens: str  # a digest of the tokens: the same for models that saw the same
    dtype: str = field(compare=False)  # what the model ran in: a wider one than was wanted, where that overflows

    def __str__(self) -> str:
        return f"{self.samples} × {self.seq_len} random tokens, seed {self.seed}"


class FactorsFile(BaseModel, frozen=True):
    """What a file of factors says; the inputs are read when they are asked for."""

    path: str = ""  # empty before it is written
    origin: str = ""  # where it comes from, in words; empty where it was recorded just now
    model: ModelIdentity
    settings: FactorsSettings
    tensors: dict[str, Linears]  # by the names of the model's tensors
    not_reached: tuple[str, ...]  # experts' tensors that no token came to, in a stack as `experts.down_proj[3]`
    without: tuple[str, ...]  # the layers' other matrices that have no factors
    warnings: tuple[str, ...]  # what was out of the ordinary, a line each
    versions: dict[str, str]  # of the packages that recorded them

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True) -> "FactorsFile":
        """Open a file; with `check`, read all of it, to see that it is as it was written.

        Raises:
            FimError: there is none, or it isn't one that this version can use.
        """
        where = os.fspath(path)
        try:
            with safe_open(where, framework="pt") as file:
                text = (file.metadata() or {}).get(FORMAT)
                if text is None:
                    raise FimError(f"expected factors (format {FORMAT}), found another file; {_AGAIN}")
                content = json.loads(text)
                checksum = content.pop("checksum")
                if content["version"] > VERSION:
                    raise FimError(
                        f"expected factors of version {VERSION}, found {content['version']}, made by a newer "
                        "mergekit-fim; upgrade mergekit-fim"
                    )
                if check and checksum != _checksum(content, file.keys(), file.get_tensor):
                    raise FimError(f"changed after it was written (its checksum differs); {_AGAIN}")
                found = cls.model_validate_json(json.dumps({**content, "path": where}), strict=True)
                used = {linear.inputs for its in found.tensors.values() for linear in its if linear}
                if any(len(file.get_slice(name).get_shape()) != 2 for name in used):
                    raise FimError(f"expected inputs of two axes, token and feature, found others; {_AGAIN}")
                FisherSettings(found.settings.samples, found.settings.seq_len, found.settings.seed)
                for name in sorted(used) if check else ():
                    if not all(math.isfinite(end) for end in file.get_tensor(name).aminmax()):
                        raise FimError(f"expected finite numbers, found others in {name}; {_AGAIN}")
        except FimError as error:
            raise FimError(f"{where}: {error}") from None
        except Exception as error:  # safetensors, pydantic and torch have their own
            raise FimError(f"{where}: expected a file of factors, found none ({reason(error)}); {_AGAIN}") from error
        return found

    def write(self, path: str, inputs: Mapping[str, "Tensor"]) -> None:
        """Write it atomically, with the inputs that `tensors` names, [token, d_in].

        Raises:
            FimError: the file can't be written.
        """
        from safetensors.torch import save_file

        stored = {name: rows.contiguous() for name, rows in inputs.items()}
        content = {"version": VERSION, **self.model_dump(mode="json", exclude={"path", "origin"})}
        content["checksum"] = _checksum(content, stored, stored.__getitem__)
        with written_whole(path) as part:
            try:  # one entry: safetensors writes several in another order each time
                save_file(stored, part, {FORMAT: json.dumps(content)})
            except SafetensorError as error:
                raise OSError(reason(error)) from error

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return os.path.getsize(self.path)

    @cached_property
    def _file(self) -> Any:
        return safe_open(self.path, framework="pt")

    def inputs(self, name: str) -> "Tensor":
        """The inputs that a `LinearFactors` names, [token, d_in]."""
        found: Tensor = self._file.get_tensor(name)
        return found


def _checksum(content: Mapping[str, Any], names: Iterable[str], get: Callable[[str], "Tensor"]) -> str:
    """SHA-256 of the content but for itself, and by name of every tensor's dtype, shape and bytes."""
    import torch

    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(names):
        tensor = get(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_factors(path: str) -> bool:
    """Whether a file begins as safetensors do, not as JSON."""
    try:
        with open(path, "rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False
