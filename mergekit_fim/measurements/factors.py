"""Kronecker factors as a file: what the linear layers of a model's decoder layers are given, token by token.

A layer y = W x has the inputs X [token, d_in], so that A = XᵀX / token, and where they were recorded the gradients
B [token, d_out] at its outputs, so that G = BᵀB / token (K-FAC, arXiv 1503.05671). The gradients are those of the sum
of each sequence's next-token losses, not of their mean.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.errors import FimError, brief, misfit, reason, wrapped
from mergekit_fim.files import written_whole
from mergekit_fim.measurements.record import ModelIdentity, versions

if TYPE_CHECKING:
    from torch import Tensor

FORMAT, VERSION = "mergekit-fim/factors", 1
_AGAIN = "record them again with `mergekit-fim fisher --factors`"


@dataclass(frozen=True, eq=False)
class LinearFactors:
    """What one linear layer was given.

    Attributes:
        inputs: X, [token, d_in].
        gradients: B, [token, d_out], of the sum of each sequence's next-token losses; None where only the inputs were
            recorded.
        transposed: whether the checkpoint stores its weight as [d_in, d_out].
    """

    inputs: "Tensor"
    gradients: "Tensor | None"
    transposed: bool


# By the names of a model's tensors; of a stack of experts one for each, None for those that no token came to.
Factors = Mapping[str, LinearFactors | Sequence[LinearFactors | None]]


@dataclass(frozen=True)
class FactorsSettings:
    """What determines factors, besides the model.

    Attributes:
        samples: number of sequences.
        seq_len: tokens per sequence.
        seed: of the tokens.
        labels: what is predicted, `inputs` or `sampled`; without gradients nothing is.
        text: what the tokens are, `random` or `own`.
        kind: what was recorded, `inputs` or `both` inputs and gradients.
        tokens: a digest of the tokens, and of what decides on sampled labels: the same for models that saw the same.
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
    layer: Annotated[int, Field(ge=0)]
    linear: Keys | None = None
    experts: list[Keys | None] | None = None


class _Header(BaseModel):
    version: Annotated[int, Field(ge=VERSION, le=VERSION)]
    model: ModelIdentity
    settings: FactorsSettings
    tensors: dict[str, _Entry]
    not_reached: list[str]
    without: list[str]
    warnings: list[str]
    versions: dict[str, str]
    digests: dict[str, str]
    checksum: str


def write_factors(
    path: str | os.PathLike[str],
    model: ModelIdentity,
    settings: FactorsSettings,
    factors: Sequence[Factors],
    *,
    not_reached: Sequence[str] = (),
    without: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> None:
    """Write factors atomically: no reader ever sees half of them. A tensor that several layers share is written once.

    Args:
        path: the safetensors file.
        model: of which they are.
        settings: how they were recorded.
        factors: by decoder layer.
        not_reached: experts' tensors that no token came to, in a stack with their number: `experts.down_proj[3]`.
        without: the layers' other matrices that have no factors.
        warnings: what the user should know, a line each.

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
            linear = entry(one) if isinstance(one, LinearFactors) else None
            experts = None if isinstance(one, LinearFactors) else [entry(expert) for expert in one]
            tensors[name] = {"layer": layer, "linear": linear, "experts": experts}
    stored = dict(held.values())
    content = {
        **{"format": FORMAT, "version": VERSION, "model": vars(model), "settings": vars(settings)},
        **{"tensors": tensors, "not_reached": [*not_reached], "without": [*without], "warnings": [*warnings]},
        **{"versions": versions(), "digests": {name: _digest(tensor) for name, tensor in stored.items()}},
    }
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in content.items()}
    metadata["checksum"] = _checksum(metadata)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in stored.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[str(tensor.dtype)], "shape": [*tensor.shape], "data_offsets": [start, end]}
    # By hand: safetensors' own writer copies every tensor before it writes the first.
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(os.fspath(path)) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in stored.values():
            file.write(_bytes(tensor))


_DTYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def _bytes(tensor: "Tensor") -> memoryview:
    import torch

    values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def _digest(tensor: "Tensor") -> str:
    """Of a tensor with its dtype and shape."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def is_finite(tensor: "Tensor") -> bool:
    """Whether all numbers of a tensor are finite; several times as fast as by `isfinite` in 16 bits."""
    return all(math.isfinite(end) for end in tensor.aminmax())


def _checksum(metadata: Mapping[str, str]) -> str:
    rest = {key: value for key, value in metadata.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_factors(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as factors do, not as a measurement."""
    try:
        with open(path, "rb") as file:
            return file.read(9)[8:] == b"{" and os.path.getsize(path) > 8
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
        """Open a file.

        Args:
            path: of the file.
            check: read all of it, to see that it is as it was written.

        Raises:
            FimError: there is none, or it isn't one that this version can use.
        """
        import safetensors

        where = os.fspath(path)
        try:
            with safetensors.safe_open(where, framework="pt") as file:
                metadata, names = file.metadata() or {}, file.keys()
                header = _header(metadata, where)
                _check_entries(header, {n: tuple(file.get_slice(n).get_shape()) for n in names}, where)
                for name in names if check else ():
                    tensor = file.get_tensor(name)
                    if _digest(tensor) != header.digests.get(name):
                        raise FimError(f"{where}: changed after it was written (its checksum differs); {_AGAIN}")
                    if not is_finite(tensor):
                        raise FimError(f"{where}: expected finite numbers, found others in {name}; {_AGAIN}")
        except FimError:
            raise
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
        entry = self._entries.get(name)
        return None if entry is None or entry.linear is None else self._read(entry.linear)

    def experts_of(self, name: str) -> list[LinearFactors | None] | None:
        """The factors of a stack of experts' matrices, None for an expert that no token came to; None for others."""
        entry = self._entries.get(name)
        if entry is None or entry.experts is None:
            return None
        return [None if linear is None else self._read(linear) for linear in entry.experts]

    def linears(self, name: str) -> list[LinearFactors | None]:
        """The factors of a matrix, or of all experts' in a stack; of a tensor without, an empty list."""
        one = self.of(name)
        return [one] if one is not None else self.experts_of(name) or []

    def keys_of(self, name: str) -> list[Keys | None]:
        """The keys of a matrix' factors, or of all experts' in a stack; of a tensor without, an empty list."""
        entry = self._entries.get(name)
        if entry is None:
            return []
        return [entry.linear] if entry.experts is None else list(entry.experts)

    def tensor(self, key: str) -> "Tensor":
        """The inputs or gradients of one of the `Keys`, [token, feature]."""
        found: Tensor = self._file.get_tensor(key)
        return found

    def _read(self, linear: Keys) -> LinearFactors:
        gradients = None if linear.gradients is None else self._file.get_tensor(linear.gradients)
        return LinearFactors(self._file.get_tensor(linear.inputs), gradients, linear.transposed)


def _header(metadata: Mapping[str, str], where: str) -> _Header:
    if metadata.get("format") != FORMAT:
        raise FimError(
            f"{where}: expected factors (format {FORMAT}), found {brief(metadata.get('format') or 'another file')}; "
            f"{_AGAIN}"
        )
    try:
        content = {
            key: value if key in ("format", "checksum") else json.loads(value) for key, value in metadata.items()
        }
    except (ValueError, RecursionError) as error:
        raise FimError(f"{where}: damaged ({reason(error)}); {_AGAIN}") from None
    number = content.get("version")
    if isinstance(number, int) and number > VERSION:
        raise FimError(
            f"{where}: expected factors of version {VERSION}, found {number}, made by a newer mergekit-fim; upgrade "
            "mergekit-fim"
        )
    try:
        header = _Header.model_validate_json(json.dumps(content), strict=True)
        its = header.settings
        FisherSettings(its.samples, its.seq_len, its.seed, its.labels)
    except ValidationError as error:
        raise FimError(f"{where}: {misfit(error, content)}; {_AGAIN}") from None
    except FimError as error:
        raise FimError(f"{where}: `settings`: {error}; {_AGAIN}") from None
    if header.checksum != _checksum(metadata):
        raise FimError(f"{where}: changed after it was written (its checksum differs); {_AGAIN}")
    return header


def _check_entries(header: _Header, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    for name, entry in header.tensors.items():
        for linear in [entry.linear] if entry.experts is None else entry.experts:
            keys = [] if linear is None else [key for key in (linear.inputs, linear.gradients) if key is not None]
            found = [shapes.get(key, ()) for key in keys]
            if any(len(shape) != 2 or 0 in shape or shape[0] != found[0][0] for shape in found):
                raise FimError(
                    f"{where}: {name}: expected [token, feature] tensors of at least one token, found shapes "
                    f"{', '.join(str(list(shape)) for shape in found)}; {_AGAIN}"
                )


def compare_factors(first: FactorsFile, second: FactorsFile) -> dict[int, list[tuple[str, list[float]]]]:
    """How alike the factors of the same tensors are: the cosine ⟨A, A'⟩ / (‖A‖ ‖A'‖), and G's likewise.

    Only products of tokens with tokens are formed: ⟨A, A'⟩ is ‖X X'ᵀ‖² but for a factor.

    Returns:
        For each decoder layer (tensor, [A's, and where both files have it G's]), of a stack for each expert.

    Raises:
        FimError: they were recorded of different kinds, or have no tensor of one shape in common.
    """
    if first.settings.kind != second.settings.kind:
        raise FimError(
            f"these can't be compared: expected two files of one kind, found {first.path} of {first.settings.kind} and "
            f"{second.path} of {second.settings.kind}; record one of them again"
        )
    found: dict[int, list[tuple[str, list[float]]]] = {}
    for name in first.names:
        for a, b in zip(first.linears(name), second.linears(name), strict=False):
            sides = [] if a is None or b is None else [(a.inputs, b.inputs), (a.gradients, b.gradients)]
            pairs = [(x, y) for x, y in sides if x is not None and y is not None and x.shape[1] == y.shape[1]]
            if pairs:
                found.setdefault(first.layer_of(name), []).append((name, [_cosine(x, y) for x, y in pairs]))
    if not found:
        raise FimError(
            f"these can't be compared: {first.path} and {second.path} have no tensor of one shape in common; name the "
            "factors of models of one shape"
        )
    return found


def _cosine(x: "Tensor", y: "Tensor") -> float:
    x, y = x.float(), y.float()
    squares = [float((a @ b.T).square().sum(dtype=a.double().dtype)) for a, b in ((x, y), (x, x), (y, y))]
    return squares[0] / (math.sqrt(squares[1] * squares[2]) or 1.0)


def render_factors(first: FactorsFile, second: FactorsFile) -> str:
    """Two files of factors side by side: for each decoder layer the mean cosines, and the least alike tensor.

    Raises:
        FimError: they can't be compared.
    """
    found = compare_factors(first, second)
    lines = []
    for name, side in (("first", first), ("second", second)):
        its = side.settings
        lines += wrapped(
            f"{name}: {side.identity.id}, {its.samples} × {its.seq_len} tokens ({its.text}), seed {its.seed}, in "
            f"{its.dtype}"
        )
    if first.settings.tokens != second.settings.tokens:
        lines += wrapped("They are of different tokens.")
    lines += ["", f"{'layer':>8}{'inputs':>10}{'gradients':>12}   least alike"]
    for layer, tensors in sorted(found.items()):
        means = [
            f"{math.fsum(side) / len(side):.3f}" for side in zip(*(cosines for _, cosines in tensors), strict=True)
        ]
        least, name = min((min(cosines), name) for name, cosines in tensors)
        lines.append(f"{layer:>8}{means[0]:>10}{means[1] if len(means) > 1 else '':>12}   {least:.3f} {name}")
    return "\n".join(lines)
