"""Measure what the task vector of two checkpoints looks like: zeros, tails, and what stands out of noise."""

import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import tqdm
from mergekit.architecture import WeightInfo
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_fim.fisher.loading import placement
from mergekit_fim.measurements.record import versions
from mergekit_fim.merging.trim import find_threshold, runs
from mergekit_fim.models.inputs import check_compatible, open_named
from mergekit_fim.models.parallel import in_threads, readers
from mergekit_fim.norms import squared_norm
from mergekit_fim.prepass.task_vectors import refuse
from mergekit_fim.text import width, wrapped

TOP = 0.02  # the density of the sparse preset, example_configs/sparse-fim-ties.yml

# Steps of Lanczos: k of them find the first singular value of independent entries to about 2.5/k² of it (the largest
# node of a Chebyshev quadrature on the spectrum's support), and one that stands far out to float32's precision.
_STEPS = 16


@dataclass(frozen=True)
class DeltaStatistics:
    """What a task vector δ = θ_model − θ_base looks like; None where there is nothing to divide by."""

    entries: int
    zeros: float | None  # the share of the entries that is exactly 0
    relative_norm: float | None  # ‖δ‖ / ‖θ_base‖
    excess_kurtosis: float | None  # mean over the tensors in which δ varies, weighted by their entries
    top_share: float | None  # of ‖δ‖² in the largest 2 % of each tensor's entries by magnitude, as TIES trims it
    gaussian_top_share: float | None  # the same of Gaussian tensors with the same zeros and norms
    edge_ratio: float | None  # median of `edge_ratio` over the decoder layers' matrices, each expert's on its own
    largest_edge_ratio: float | None


@dataclass(frozen=True)
class Delta:
    """What a fine-tuned model's task vector looks like."""

    base_model: str  # the base's name
    model: str  # the fine-tuned model's
    layers: DeltaStatistics  # of all decoder layers
    outside: DeltaStatistics  # without singular values: most rows of an embedding are hardly trained
    kinds: Mapping[str, DeltaStatistics]  # of the decoder layers, by names without layer, expert and `.weight`
    notes: tuple[str, ...]  # what was left out, in words

    def as_json(self) -> dict[str, Any]:
        """Write all of it as JSON."""
        return {"format": "mergekit-fim/delta", "version": 1, **asdict(self), "versions": versions()}


class TensorSums(NamedTuple):
    """What is added up over tensors; `summarize` makes `DeltaStatistics` of it."""

    ratios: tuple[float, ...] = ()  # `edge_ratio`s
    entries: float = 0.0
    zeros: float = 0.0
    squared: float = 0.0  # ‖δ‖²
    squared_base: float = 0.0  # ‖θ_base‖²
    top: float = 0.0  # the part of ‖δ‖² in the largest 2 % of the entries
    gaussian_top: float = 0.0
    varying: float = 0.0  # the entries, if δ varies
    kurtosis: float = 0.0  # times these


def measure_delta(
    base: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    options: MergeOptions | None = None,
) -> Delta:
    """Measure what a task vector looks like, tensor by tensor: zeros, tails, and first singular values beside noise's.

    Args:
        base: the base model, a folder or a name on the Hub, with an adapter as in mergekit: `model+adapter`.
        model: the fine-tuned model, likewise.
        dtype: what the weights are read as, as a merge with this `dtype` does; by default the checkpoints' own.
        options: mergekit's, for the devices, which share the work, and for loading; by default on the CPU.

    Raises:
        FimError: a model can't be opened, they are of different architectures, or a weight isn't finite.
    """
    options = options or MergeOptions(quiet=True)
    devices = placement(options).devices()
    LoaderCache().setup(options)
    old, new = open_named([os.fspath(base), os.fspath(model)], None, options)
    notes = check_compatible(old, new, vocabulary_aligned=True)
    items = [
        (re.sub(r"\.\d+\.", ".*.", layer.local(t.name)).removesuffix(".weight"), f"decoder layer {layer.index}", t)
        for layer in old.layout.layers
        for t in layer.tensors
    ]
    # Without a head that is tied in both: it is their embeddings.
    other = [t for t in old.layout.other if any(m.stored_name(t, tied=False) is not None for m in (old, new))]
    items += [("", "outside the decoder layers", tensor) for tensor in other]

    def read(numbered: tuple[int, tuple[str, str, WeightInfo]]) -> TensorSums:
        number, (kind, where, tensor) = numbered
        reference, tuned = old.load(tensor, dtype), new.load(tensor, dtype)
        if reference is None or tuned is None:
            return TensorSums()
        if reference.shape != tuned.shape:
            shapes = f"{list(reference.shape)} and {list(tuned.shape)}"
            notes.append(f"left out, as the vocabularies differ: {tensor.name} ({shapes})")
            return TensorSums()
        device = devices[number % len(devices)]
        sums = measure_tensor(reference.to(device), tuned.to(device), ratios=bool(kind))
        if not math.isfinite(sums.squared):
            refuse(old, reference, new, tuned, tensor, where)
        return sums

    bar = {"desc": "Measuring the task vector", "unit": "tensor", "total": len(items), "disable": options.quiet}
    parts: dict[str, list[TensorSums]] = {}
    measuring = tqdm.tqdm(in_threads(readers(devices), read, enumerate(items)), **bar)
    for (kind, *_), sums in zip(items, measuring, strict=True):
        if sums.entries:
            parts.setdefault(kind, []).append(sums)
    outside = summarize(parts.pop("", []))
    layers = summarize(sums for its in parts.values() for sums in its)
    kinds = {kind: summarize(its) for kind, its in parts.items()}
    return Delta(str(old), str(new), layers, outside, kinds, tuple(sorted(notes)))


def summarize(parts: Iterable[TensorSums]) -> DeltaStatistics:
    """Add up tensors."""
    of_each, *columns = zip(*(TensorSums(), *parts), strict=True)
    sums = TensorSums((), *map(math.fsum, columns))
    ratios = [ratio for its in of_each for ratio in its]

    def share(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    return DeltaStatistics(
        int(sums.entries),
        share(sums.zeros, sums.entries),
        share(math.sqrt(sums.squared), math.sqrt(sums.squared_base)),
        share(sums.kurtosis, sums.varying),
        share(sums.top, sums.squared),
        share(sums.gaussian_top, sums.squared),
        statistics.median(ratios) if ratios else None,
        max(ratios, default=None),
    )


def measure_tensor(base: torch.Tensor, model: torch.Tensor, *, ratios: bool) -> TensorSums:
    """Measure the task vector of one tensor, in float32 (of float64 tensors: float64) and sums in float64.

    Args:
        base: [*axes], [output, input] or [expert, output, input].
        model: likewise, on the same device.
        ratios: whether to find the `edge_ratio` of matrices, too.

    Returns:
        The sums. Where a tensor isn't finite, neither is the squared norm in them.
    """
    tuned, reference, entries = model.reshape(-1), base.reshape(-1), base.numel()
    wide = torch.promote_types(torch.promote_types(model.dtype, base.dtype), torch.float32)

    def part(run: slice) -> torch.Tensor:
        return tuned[run].to(wide) - reference[run].to(wide)

    threshold = find_threshold(part, entries, TOP, base.device)
    floor = threshold.magnitude**2 if threshold else 0.0
    totals = torch.zeros(6, dtype=torch.float64, device=base.device)
    for run in runs(entries, base.device):
        delta = part(run).double()
        square = delta * delta
        powers = (delta.sum(), square.sum(), delta.dot(square), square.dot(square))
        totals += torch.stack([delta.count_nonzero(), *powers, square.dot((square >= floor).double())])
    nonzero, first, second, third, fourth, top = totals.tolist()
    if not math.isfinite(second):
        return TensorSums(entries=entries, squared=second)
    if threshold:
        top -= len(threshold.dropped) * floor
    gaussian = second * gaussian_share(min(1.0, max(1, int(TOP * entries)) / nonzero)) if nonzero else 0.0
    kurtosis = excess_kurtosis(*(power / entries for power in (first, second, third, fourth)))
    shape = (0.0, 0.0) if kurtosis is None else (entries, entries * kurtosis)
    *experts, m, n = base.shape if base.ndim in (2, 3) else (1, 1)
    if not ratios or min(m, n) == 1:  # as of a convolution along the tokens, [channel, 1, position]
        experts = [0]
    matrices = (part(slice(i * m * n, (i + 1) * m * n)).view(m, n) for i in range(math.prod(experts)))
    its = tuple(ratio for matrix in matrices if (ratio := edge_ratio(matrix)) is not None)
    return TensorSums(its, entries, entries - nonzero, second, float(squared_norm(base)), top, gaussian, *shape)


def excess_kurtosis(first: float, second: float, third: float, fourth: float) -> float | None:
    """Compute it from the means of the first four powers of the entries; None where they don't vary."""
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return central / variance**2 - 3 if variance > 1e-12 * second else None


def gaussian_share(kept: float) -> float:
    """Compute the share of a Gaussian vector's squared norm in its fraction `kept` of largest entries: 14.4 % in 2 %.

    With z their smallest magnitude, 2 (1 − Φ(z)) = kept, it is E[x²; |x| > z] = kept + 2 z φ(z), by parts.
    """
    normal = statistics.NormalDist()
    z = -normal.inv_cdf(kept / 2)
    return kept + 2 * z * normal.pdf(z)


def edge_ratio(matrix: torch.Tensor) -> float | None:
    """Compare a matrix's first singular value with that of independent entries of the same mean square.

    For large [m, n] the latter is σ (√m + √n), if the entries' fourth moment is finite: the upper edge of Marchenko and
    Pastur's law (Yin, Bai and Krishnaiah 1988). A matrix of rank one has the largest ratio, √(mn) / (√m + √n).
    """
    norm = math.sqrt(float(squared_norm(matrix)))
    edge = sum(map(math.sqrt, matrix.shape)) / math.sqrt(matrix.numel())  # of a norm of 1
    return first_singular_value(matrix / norm) / edge if norm else None


def first_singular_value(matrix: torch.Tensor, seed: int = 0) -> float:
    """Find the first singular value of a matrix A, [m, n], from below, on a Krylov space of AᵀA with a random start."""
    vector = matrix.T @ torch.randn(matrix.shape[0], generator=torch.Generator().manual_seed(seed)).to(matrix)
    basis, images = matrix.new_empty(0, matrix.shape[1]), []
    for _ in range(min(_STEPS, *matrix.shape)):
        before = vector.norm()
        for _ in range(2):  # twice is enough
            vector = vector - basis.T @ (basis @ vector)
        if vector.norm() <= 1e-5 * before:  # the space is all that the matrix has
            break
        basis = torch.cat([basis, (vector / vector.norm())[None]])
        images.append(matrix @ basis[-1])
        vector = matrix.T @ images[-1]
    return float(torch.linalg.matrix_norm(torch.stack(images), 2))


_TITLES = ("zeros", "‖δ‖/‖θ‖", "kurtosis", "top 2%", "Gauss", "σ₁/edge", "largest")
_MEANINGS = (
    "zeros: share of entries that training left as they were; many mean that it rounded to few bits, or froze tensors",
    "kurtosis: excess, mean over tensors; 0 of a Gaussian, more where few entries are far larger than the rest or many "
    "are 0",
    "top 2%: share of ‖δ‖² in the largest 2 % of each tensor; Gauss: of a Gaussian with as many zeros (0.144 with "
    "none); far above that, trimming keeps more than the extremes of noise",
    "σ₁/edge: first singular value over that of independent entries (Marchenko-Pastur), median and largest of the "
    "matrices; near 1 δ is like noise, at many times it has a structure of low rank",
    "outside: embeddings, final norm, output head",
)


def render(delta: Delta) -> str:
    """Show the statistics as a table, and what each tells."""
    rows = {**delta.kinds, "all decoder layers": delta.layers, "outside": delta.outside}
    room = width() - 9 * len(_TITLES)
    lines = ["", *wrapped(f"task vector δ of {delta.model}, from {delta.base_model}")]
    lines.append(" " * room + "".join(f"{title:>9}" for title in _TITLES))
    for name, its in rows.items():
        _, *values = asdict(its).values()
        cells = "".join(" " * 9 if value is None else f"{value:>9.3g}" for value in values)
        lines.append(f"{name if len(name) <= room else '…' + name[1 - room :]:<{room}}{cells}".rstrip())
    return "\n".join([*lines, "", *(x for note in (*_MEANINGS, *delta.notes) for x in wrapped(f"- {note}"))]) + "\n"
