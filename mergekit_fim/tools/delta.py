"""Two checkpoints -> what the task vector looks like, before any merge: zeros, tails, what stands out of noise."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

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
    """What a task vector δ = θ_model − θ_base looks like, in one tensor or in several.

    Attributes:
        entries: how many.
        zeros: the share of them that is exactly 0.
        relative_norm: ‖δ‖ / ‖θ_base‖; here and below, None where there is nothing to divide by.
        excess_kurtosis: mean over the tensors in which δ varies, weighted by their entries.
        top_share: the share of ‖δ‖² in the largest 2 % of each tensor's entries by magnitude, as TIES trims it.
        gaussian_top_share: the same of Gaussian tensors with the same zeros and norms.
        edge_ratio: median of `edge_ratio` over the decoder layers' matrices, of every expert apart.
        largest_edge_ratio: the largest of these.
    """

    entries: int
    zeros: float | None
    relative_norm: float | None
    excess_kurtosis: float | None
    top_share: float | None
    gaussian_top_share: float | None
    edge_ratio: float | None
    largest_edge_ratio: float | None


@dataclass(frozen=True)
class Delta:
    """What a fine-tuned model's task vector looks like.

    Attributes:
        base_model: the base's name.
        model: the fine-tuned model's.
        layers: of all decoder layers.
        outside: of the tensors outside them, without singular values: most rows of an embedding are hardly trained.
        kinds: of the decoder layers, by the tensors' names without layer, expert and `.weight`.
        notes: what was left out, in words.
    """

    base_model: str
    model: str
    layers: DeltaStatistics
    outside: DeltaStatistics
    kinds: Mapping[str, DeltaStatistics]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it for programs."""
        return {"format": "mergekit-fim/delta", "version": 1, **asdict(self), "versions": versions()}


@dataclass(frozen=True)
class TensorSums:
    """What is added up of a tensor: `values` become `DeltaStatistics` by `summarize`, `ratios` are `edge_ratio`s."""

    values: tuple[float, ...] = (0.0,) * 8
    ratios: tuple[float, ...] = ()


def measure_names(base_name: str, model_name: str, dtype: str | None, options: MergeOptions) -> Delta:
    """Measure a fine-tuned model's task vector, tensor by tensor.

    Args:
        base_name: the base model's, as in a merge config.
        model_name: the fine-tuned model's.
        dtype: what every tensor is cast to when it is read, or None for the checkpoints' own.
        options: mergekit's, for the devices, which share the work, and for loading.

    Raises:
        FimError: a model can't be opened, they have other tensors, or one isn't finite.
    """
    devices = placement(options).devices()
    LoaderCache().setup(options)
    base, model = open_named([base_name, model_name], None, options)
    notes = check_compatible(base, model, vocabulary_aligned=True)
    items = [
        (re.sub(r"\.\d+\.", ".*.", layer.local(t.name)).removesuffix(".weight"), f"decoder layer {layer.index}", t)
        for layer in base.layout.layers
        for t in layer.tensors
    ]
    # Without a head that is tied in both: it is their embeddings.
    other = [t for t in base.layout.other if any(m.stored_name(t, tied=False) is not None for m in (base, model))]
    items += [("", "outside the decoder layers", tensor) for tensor in other]

    def read(numbered: tuple[int, tuple[str, str, WeightInfo]]) -> TensorSums:
        share, (kind, where, tensor) = numbered
        reference, tuned = base.load(tensor, dtype), model.load(tensor, dtype)
        if reference is None or tuned is None:
            return TensorSums()
        if reference.shape != tuned.shape:
            shapes = f"{list(reference.shape)} and {list(tuned.shape)}"
            notes.append(f"left out, as the vocabularies differ: {tensor.name} ({shapes})")
            return TensorSums()
        reference, tuned = (values.to(devices[share % len(devices)]) for values in (reference, tuned))
        sums = measure_tensor(reference, tuned, ratios=bool(kind))
        if not math.isfinite(sums.values[2]):
            refuse(base, reference, model, tuned, tensor, where)
        return sums

    bar = {"desc": "Measuring the task vector", "unit": "tensor", "total": len(items), "disable": options.quiet}
    parts: dict[str, list[TensorSums]] = {}
    measuring = tqdm.tqdm(in_threads(readers(devices), read, enumerate(items)), **bar)
    for (kind, *_), sums in zip(items, measuring, strict=True):
        if sums.values[0]:
            parts.setdefault(kind, []).append(sums)
    outside = summarize(parts.pop("", []))
    layers = summarize(sums for its in parts.values() for sums in its)
    kinds = {kind: summarize(its) for kind, its in parts.items()}
    return Delta(str(base), str(model), layers, outside, kinds, tuple(sorted(notes)))


def summarize(parts: Iterable[TensorSums]) -> DeltaStatistics:
    """Add up tensors."""
    parts = [TensorSums(), *parts]
    columns = (math.fsum(column) for column in zip(*(part.values for part in parts), strict=True))
    entries, zeros, squared, of_base, top, gaussian, varying, kurtosis = columns
    ratios = [ratio for part in parts for ratio in part.ratios]

    def share(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    return DeltaStatistics(
        int(entries),
        share(zeros, entries),
        share(math.sqrt(squared), math.sqrt(of_base)),
        share(kurtosis, varying),
        share(top, squared),
        share(gaussian, squared),
        statistics.median(ratios) if ratios else None,
        max(ratios, default=None),
    )


def measure_tensor(base: torch.Tensor, model: torch.Tensor, *, ratios: bool) -> TensorSums:
    """Measure the task vector of one tensor, in float32 (of float64 tensors: float64) and sums in float64.

    Args:
        base: [*axes], [output, input] or [expert, output, input].
        model: likewise, on the same device.
        ratios: whether the `edge_ratio` of matrices is wanted, too.

    Returns:
        The sums; where a tensor isn't finite, neither is the squared norm in them.
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
        return TensorSums((entries, 0.0, second, *(0.0,) * 5))
    if threshold:
        top -= len(threshold.dropped) * floor
    gaussian = second * gaussian_share(min(1.0, max(1, int(TOP * entries)) / nonzero)) if nonzero else 0.0
    kurtosis = excess_kurtosis(*(power / entries for power in (first, second, third, fourth)))
    *experts, m, n = base.shape if base.ndim in (2, 3) else (1, 1)
    if not ratios or min(m, n) == 1:  # as of a convolution along the tokens, [channel, 1, position]
        experts = [0]
    matrices = (part(slice(i * m * n, (i + 1) * m * n)).view(m, n) for i in range(math.prod(experts)))
    found = tuple(ratio for matrix in matrices if (ratio := edge_ratio(matrix)) is not None)
    shape = (0.0, 0.0) if kurtosis is None else (entries, entries * kurtosis)
    return TensorSums((entries, entries - nonzero, second, float(squared_norm(base)), top, gaussian, *shape), found)


def excess_kurtosis(first: float, second: float, third: float, fourth: float) -> float | None:
    """From the means of the first four powers of the entries; None where they don't vary."""
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return central / variance**2 - 3 if variance > 1e-12 * second else None


def gaussian_share(kept: float) -> float:
    """The share of a Gaussian vector's squared norm in its fraction `kept` of largest entries: 14.4 % in 2 %.

    With z their smallest magnitude, 2 (1 − Φ(z)) = kept, it is E[x²; |x| > z] = kept + 2 z φ(z), by parts.
    """
    normal = statistics.NormalDist()
    z = -normal.inv_cdf(kept / 2)
    return kept + 2 * z * normal.pdf(z)


def edge_ratio(matrix: torch.Tensor) -> float | None:
    """A matrix's first singular value over where that of independent entries of the same mean square lies.

    For large [m, n] that is σ (√m + √n), if the entries' fourth moment is finite: the upper edge of Marchenko and
    Pastur's law (Yin, Bai and Krishnaiah 1988). A matrix of rank one has the largest ratio, √(mn) / (√m + √n).
    """
    norm = math.sqrt(float(squared_norm(matrix)))
    edge = sum(map(math.sqrt, matrix.shape)) / math.sqrt(matrix.numel())  # of a norm of 1
    return first_singular_value(matrix / norm) / edge if norm else None


def first_singular_value(matrix: torch.Tensor, seed: int = 0) -> float:
    """The first singular value of a matrix A, [m, n], from below: on a Krylov space of AᵀA, from a random start."""
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
    """The statistics as a table, and what each tells."""
    rows = {**delta.kinds, "all decoder layers": delta.layers, "outside": delta.outside}
    room = width() - 9 * len(_TITLES)
    lines = ["", *wrapped(f"task vector δ of {delta.model}, from {delta.base_model}")]
    lines.append(" " * room + "".join(f"{title:>9}" for title in _TITLES))
    for name, its in rows.items():
        _, *values = asdict(its).values()
        cells = "".join(" " * 9 if value is None else f"{value:>9.3g}" for value in values)
        lines.append(f"{name if len(name) <= room else '…' + name[1 - room :]:<{room}}{cells}".rstrip())
    return "\n".join([*lines, "", *(x for note in (*_MEANINGS, *delta.notes) for x in wrapped(f"- {note}"))]) + "\n"
