"""Kronecker factors as a file: what the linear layers of a model's decoder layers are given, token by token.

A layer y = W x has the inputs X [token, d_in], so that A = XᵀX / token, and where they were recorded the gradients
B [token, d_out] at its outputs, so that G = BᵀB / token (K-FAC, arXiv 1503.05671). The gradients are those of the sum
of each sequence's next-token losses, not of their mean.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.errors import FimError, brief, misfit, reason
from mergekit_fim.files import written_whole
from mergekit_fim.measurements.record import ModelIdentity, versions
from mergekit_fim.text import wrapped

if TYPE_CHECKING:
    from torch import Tensor

FORMAT, VERSION = "mergekit-fim/factors", 1
_AGAIN = "record them again with `mergekit-fim fisher --factors`"


@dataclass(frozen=True, eq=False)
class LinearFactors:
    """What one linear layer was given.

    Attributes:
        inputs: X, [token, d_in].
        gradients: B, [token, d_out]; None where only the inputs were recorded.
        transposed: whether the checkpoint stores its weight as [d_in, d_out].
    """

    inputs: "Tensor"
    gradients: "Tensor | None"
    transposed: bool


# By the names of a model's tensors; of a stack of experts one for each, None for those that no token came to.
Factors = Mapping[str, LinearFactors | Sequence[LinearFactors | None]]


@dataclass(frozen=True)
class FactorsSettings:
    """What determines factors, besides the model: number and length of the sequences, seed, labels, and these.

    Attributes:
        text: what the tokens are: `random`.
        kind: what was recorded, `inputs` or `both` inputs and gradients.
        tokens: a digest of the tokens: the same for models that saw the same.
        dtype: what the model ran in.
    """

    samples: int
    seq_len: int
    seed: int
    labels: str
    text: str
    kind: str
    tokens: str
    dtype: str


class Keys(BaseModel, frozen=True):
    """Which of a file's tensors are the factors of a matrix: the same for matrices that are given the same."""

    inputs: str
    gradients: str | None
    transposed: bool


class _Entry(BaseModel):
    layer: int
    stacked: bool
    linears: list[Keys | None]


class _Header(BaseModel):
    version: int
    model: ModelIdentity
    settings: FactorsSettings
    tensors: dict[str, _Entry]
    not_reached: list[str]
    without: list[str]
    warnings: list[str]
    versions: dict[str, str]
    checksum: str


def write_factors(
    path: str | os.PathLike[str],
    model: ModelIdentity,
    settings: FactorsSettings,
    factors: Sequence[Factors],
    lists: Mapping[str, Sequence[str]],
) -> None:
    """Write factors atomically: no reader ever sees half of them. A tensor that several layers share is written once.

    Args:
        path: the safetensors file.
        model: of which they are.
        settings: how they were recorded.
        factors: by decoder layer.
        lists: `not_reached`, `without` and `warnings`, as in a `FactorsFile`.

    Raises:
        FimError: it can't be written.
    """
    held: dict[int, tuple[str, Tensor]] = {}

    def key(tensor: "Tensor", kind: str) -> str:
        return held.setdefault(id(tensor), (f"{kind}.{len(held)}", tensor.contiguous()))[0]

    def entry(linear: LinearFactors | None) -> dict[str, Any] | None:
        if linear is None:
            return None
        gradients = None if linear.gradients is None else key(linear.gradients, "gradients")
        return {"inputs": key(linear.inputs, "inputs"), "gradients": gradients, "transposed": linear.transposed}

    tensors: dict[str, Any] = {}
    for layer, its in enumerate(factors):
        for name, one in its.items():
            linears = [one] if isinstance(one, LinearFactors) else one
            tensors[name] = {"layer": layer, "stacked": linears is one, "linears": [entry(part) for part in linears]}
    stored = dict(held.values())
    content = {"version": VERSION, "model": vars(model), "settings": vars(settings), "versions": versions()}
    metadata = {name: json.dumps(value) for name, value in {**content, "tensors": tensors, **lists}.items()}
    metadata["format"] = FORMAT
    metadata["checksum"] = _checksum(metadata, stored.items())
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in stored.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[str(tensor.dtype)], "shape": [*tensor.shape], "data_offsets": [start, end]}
    # By hand: safetensors' own writer copies every tensor before it writes the first.
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(os.fspath(path)) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in stored.values():
            file.write(_bytes(tensor))


_DTYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def _bytes(tensor: "Tensor") -> Any:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy()


def _checksum(metadata: Mapping[str, str], tensors: Iterable[tuple[str, "Tensor"]]) -> str:
    """SHA-256 of the rest of the metadata, and by name of every tensor's dtype, shape and bytes."""
    rest = {key: value for key, value in metadata.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors, key=lambda its: its[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def is_finite(tensor: "Tensor") -> bool:
    """Whether all numbers of a tensor are finite; several times as fast as by `isfinite` in 16 bits."""
    return all(math.isfinite(end) for end in tensor.aminmax())


def is_factors(path: str) -> bool:
    """Whether a file begins as safetensors do, not as JSON."""
    try:
        with open(path, "rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False


@dataclass(frozen=True, eq=False)
class FactorsFile:
    """Factors that were written, of which no more is in memory than what is asked for.

    Attributes:
        path: the file.
        identity: of which model.
        settings: how they were recorded.
        not_reached: experts' tensors that no token came to, in a stack with their number: `experts.down_proj[3]`.
        without: the layers' other matrices that have no factors.
        warnings: what was out of the ordinary, a line each.
    """

    path: str
    identity: ModelIdentity
    settings: FactorsSettings
    not_reached: tuple[str, ...]
    without: tuple[str, ...]
    warnings: tuple[str, ...]
    _entries: Mapping[str, _Entry] = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True) -> "FactorsFile":
        """Open a file; with `check`, read all of it, to see that it is as it was written.

        Raises:
            FimError: there is none, or it isn't one that this version can use.
        """
        import safetensors

        where = os.fspath(path)
        try:
            with safetensors.safe_open(where, framework="pt") as file:
                metadata, names = file.metadata() or {}, file.keys()
                header = _header(metadata, {name: file.get_slice(name).get_shape() for name in names})
                tensors = ((name, file.get_tensor(name)) for name in names)
                if check and header.checksum != _checksum(metadata, tensors):
                    raise FimError(f"changed after it was written (its checksum differs); {_AGAIN}")
                for name in names if check else ():
                    if not is_finite(file.get_tensor(name)):
                        raise FimError(f"expected finite numbers, found others in {name}; {_AGAIN}")
        except FimError as error:
            raise FimError(f"{where}: {error}") from None
        except Exception as error:  # safetensors and torch have their own
            raise FimError(f"{where}: expected a file of factors, found none ({reason(error)}); {_AGAIN}") from error
        not_reached, without, warnings = map(tuple, (header.not_reached, header.without, header.warnings))
        return cls(where, header.model, header.settings, not_reached, without, warnings, header.tensors)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return os.path.getsize(self.path)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors of the model that have factors."""
        return tuple(self._entries)

    @cached_property
    def _file(self) -> Any:
        import safetensors

        return safetensors.safe_open(self.path, framework="pt")

    def layer_of(self, name: str) -> int:
        """The decoder layer that a tensor with factors is in, from 0."""
        return self._entries[name].layer

    def of(self, name: str) -> LinearFactors | None:
        """The factors of a matrix, by its name in mergekit's layout; None where it has none, or is a stack of them."""
        return self.linears(name)[0] if name in self._entries and not self._entries[name].stacked else None

    def experts_of(self, name: str) -> list[LinearFactors | None] | None:
        """The factors of a stack of experts' matrices, None for an expert that no token came to; None for others."""
        return self.linears(name) if name in self._entries and self._entries[name].stacked else None

    def linears(self, name: str) -> list[LinearFactors | None]:
        """The factors of a matrix, or of all experts' in a stack; an empty list of a tensor that has none."""

        def read(linear: Keys) -> LinearFactors:
            gradients = None if linear.gradients is None else self._file.get_tensor(linear.gradients)
            return LinearFactors(self._file.get_tensor(linear.inputs), gradients, linear.transposed)

        return [None if linear is None else read(linear) for linear in self.keys_of(name)]

    def keys_of(self, name: str) -> list[Keys | None]:
        """The keys of a matrix' factors, or of all experts' in a stack; an empty list of a tensor that has none."""
        return self._entries[name].linears if name in self._entries else []

    def tensor(self, key: str) -> "Tensor":
        """The inputs or gradients of one of the `Keys`, [token, feature]."""
        found: Tensor = self._file.get_tensor(key)
        return found


def _header(metadata: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> _Header:
    """Check what a file says of itself, whatever it is.

    Raises:
        FimError: it isn't what this version can use.
    """
    if metadata.get("format") != FORMAT:
        found = brief(metadata.get("format") or "another file")
        raise FimError(f"expected factors (format {FORMAT}), found {found}; {_AGAIN}")
    content: dict[str, Any] = {}
    try:
        content = {k: v if k in ("format", "checksum") else json.loads(v) for k, v in metadata.items()}
        number = content.get("version")
        if isinstance(number, int) and number > VERSION:
            raise FimError(
                f"expected factors of version {VERSION}, found {number}, made by a newer mergekit-fim; upgrade "
                "mergekit-fim"
            )
        header = _Header.model_validate_json(json.dumps(content), strict=True)
        FisherSettings(*(getattr(header.settings, name) for name in ("samples", "seq_len", "seed", "labels")))
    except ValidationError as error:
        raise FimError(f"{misfit(error, content)}; {_AGAIN}") from None
    except (ValueError, RecursionError) as error:
        raise FimError(f"damaged ({reason(error)}); {_AGAIN}") from None
    for name, linear in (
        (name, linear) for name, entry in header.tensors.items() for linear in entry.linears if linear
    ):
        its = [shapes.get(key, ()) for key in (linear.inputs, linear.gradients) if key is not None]
        if any(len(shape) != 2 or 0 in shape or shape[0] != its[0][0] for shape in its):
            raise FimError(f"{name}: expected two axes, token and feature, and as many tokens in each; {_AGAIN}")
    return header


def compare_factors(first: FactorsFile, second: FactorsFile) -> dict[int, list[tuple[str, list[float]]]]:
    """How alike the factors of the same tensors are: the cosine ⟨A, A'⟩ / (‖A‖ ‖A'‖), and G's likewise.

    Only products of tokens with tokens are formed: ⟨A, A'⟩ is ‖X X'ᵀ‖² but for a factor.

    Returns:
        For each decoder layer (tensor, [A's, and where both files have it G's]), of a stack for each expert.

    Raises:
        FimError: they were recorded of different kinds, or have no tensor of one shape in common.
    """
    found: dict[int, list[tuple[str, list[float]]]] = {}
    for name in first.names:
        for a, b in zip(first.linears(name), second.linears(name), strict=False):
            sides = [] if a is None or b is None else [(a.inputs, b.inputs), (a.gradients, b.gradients)]
            pairs = [(x, y) for x, y in sides if x is not None and y is not None and x.shape[1] == y.shape[1]]
            if pairs:
                found.setdefault(first.layer_of(name), []).append((name, [_cosine(x, y) for x, y in pairs]))
    kinds = (first.settings.kind, second.settings.kind)
    if kinds[0] != kinds[1] or not found:
        raise FimError(
            f"these can't be compared: expected factors of one kind and of tensors of one shape, found {first.path} "
            f"with {kinds[0]} and {second.path} with {kinds[1]}, {len(found)} layers alike; name two of models of one "
            "shape"
        )
    return found


def _cosine(x: "Tensor", y: "Tensor") -> float:
    squares = [float((a.float() @ b.float().T).square().sum()) for a, b in ((x, y), (x, x), (y, y))]
    return squares[0] / (math.sqrt(squares[1] * squares[2]) or 1.0)


def render_factors(first: FactorsFile, second: FactorsFile) -> str:
    """Two files of factors side by side: for each decoder layer the mean cosines, and the least alike tensor.

    Raises:
        FimError: they can't be compared.
    """
    found, lines = compare_factors(first, second), []
    for name, side in (("first", first), ("second", second)):
        its = side.settings
        tokens = f"{its.samples} × {its.seq_len} {its.text} tokens, seed {its.seed}"
        lines += wrapped(f"{name}: {side.identity.id}, {tokens}, in {its.dtype}")
    lines += wrapped("They are of different tokens.") if first.settings.tokens != second.settings.tokens else []
    lines += ["", f"{'layer':>8}{'inputs':>10}{'gradients':>12}   least alike"]
    for layer, tensors in sorted(found.items()):
        means = [f"{math.fsum(its) / len(its):.3f}" for its in zip(*(cosines for _, cosines in tensors), strict=True)]
        least, name = min((min(cosines), name) for name, cosines in tensors)
        lines.append(f"{layer:>8}{means[0]:>10}{''.join(means[1:]):>12}   {least:.3f} {name}")
    return "\n".join(lines)
