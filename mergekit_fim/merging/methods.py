"""The merge methods, on mergekit's `GroupMergeMethod`; `hook.methods` registers them.

The merge coefficients arrive as mergekit's per-model parameter `alpha`, which has no default: whatever bypasses the
Fisher pre-pass ends in mergekit's "Missing required parameter alpha" instead of an unweighted merge.
"""

import math
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)

from mergekit_fim.config.parameters import PARAMETERS, Scope
from mergekit_fim.errors import FimError
from mergekit_fim.merging import directions
from mergekit_fim.merging.gates import gate_parts
from mergekit_fim.merging.trim import Threshold, find_threshold, runs, trim_run
from mergekit_fim.norms import squared_norm

PAPER = "https://arxiv.org/abs/2603.21705"
SOURCE = "kron_source"  # fim_kron's: `directions.source`, which only the pre-pass sets
_PRETTY_NAMES = {"fim_ties": "FIM-TIES", "fim_ta": "FIM Task Arithmetic", "fim_kron": "FIM-Kronecker"}


class FimMerge(GroupMergeMethod):
    """`fim_ta`: θ0 + Σ_m α_m w_m δ_m per layer; `fim_ties`: TIES with the α_m, gate protection, norm calibration."""

    def __init__(self, name: str) -> None:
        """Make one of `parameters.METHODS`."""
        self.trims = name == "fim_ties"
        self.spec = MergeMethodSpec(
            name=name,
            pretty_name=_PRETTY_NAMES[name],
            reference_url=PAPER,
            parameters=tuple(_parameter_specs(name)),
            contract=InputContract(base=BasePolicy.REQUIRED),
        )

    def validate_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None = None, *, group_name: str | None = None
    ) -> None:
        """mergekit's structural check, after refusing the loose files that `mergekit-pytorch` passes."""
        for model in input_ids:
            if isinstance(model, ModelReference) and os.path.isfile(model.model.path):
                raise FimError(
                    f"{self.spec.name} needs whole models with a config to measure, found the file {model.model.path}; "
                    "use mergekit-yaml with model folders instead of mergekit-pytorch"
                )
        try:
            super().validate_inputs(input_ids, base_id, group_name=group_name)
        except ValueError as error:
            raise FimError(
                f"{self.spec.name}: {error}; expected the base model and at least one fine-tuned model, each once"
            ) from None

    @torch.no_grad()
    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Merge one tensor of all models, which have it in one shape and dtype.

        Arithmetic is in float32 (float64 for float64 inputs), the result in the inputs' dtype. The `parameters` are
        those of `spec`, per-model ones as mappings from the models' ids.

        Raises:
            FimError: the result isn't finite.
        """
        assert group.base is not None
        base, entries, name = group.base.tensor, group.non_base, group.metadata.name
        if not entries or parameters["other_modules"] == "base":
            return base
        if parameters["other_modules"] == "tuned":  # the pre-pass has left it to no tensor of several models
            return entries[0].tensor
        dtype = torch.promote_types(base.dtype, torch.float32)
        theta0, tuned = base.reshape(-1), [entry.tensor.reshape(-1) for entry in entries]
        densities = [parameters["density"][entry.id] if self.trims else 1.0 for entry in entries]
        thresholds = [_threshold(theta0, t, d, dtype) for t, d in zip(tuned, densities, strict=True)]
        weights = [parameters["weight"][entry.id] for entry in entries]
        alphas = [parameters["alpha"][entry.id] for entry in entries]
        merging = _Merging(theta0, tuned, thresholds, weights, self.trims, parameters)
        merged = torch.empty_like(theta0)
        scale = parameters["gate_scale"]
        gate, others = gate_parts((name or "") if scale != 1 else "", base.shape)
        try:
            merging.write(merged, gate, [scale * alpha for alpha in alphas])
            merging.write(merged, others, alphas)
        except RuntimeError as error:
            if "without overflow" not in str(error):  # torch's, of a factor beyond the working dtype
                raise
            merged.fill_(math.inf)
        _check_finite(merged, name)
        return merged.view(base.shape)


@dataclass(frozen=True)
class _Merging:
    """The merge of one tensor by `fim_ta` or `fim_ties`, run by run. Tensors are flat: [entry]."""

    theta0: torch.Tensor
    tuned: Sequence[torch.Tensor]
    thresholds: Sequence[Threshold | None]
    weights: list[float]
    trims: bool
    parameters: Mapping[str, Any]

    def deltas(self, run: slice) -> list[torch.Tensor]:
        """A run of every task vector, trimmed, in the working dtype."""
        start = self.theta0[run].to(torch.promote_types(self.theta0.dtype, torch.float32))
        pairs = zip(self.tuned, self.thresholds, strict=True)
        return [trim_run(tuned[run].to(start.dtype).sub(start), run, threshold) for tuned, threshold in pairs]

    def merged(self, run: slice, deltas: list[torch.Tensor], alphas: Sequence[float]) -> torch.Tensor:
        """A run of the merged tensor. Overwrites `deltas`."""
        combine = _disjoint_merge if self.trims else _sum
        task_vector = combine(deltas, alphas, self.weights, self.parameters["normalize"])
        return task_vector.mul_(self.parameters["lambda"]).add_(self.theta0[run].to(task_vector.dtype))

    def write(self, merged: torch.Tensor, spans: Sequence[slice], alphas: Sequence[float]) -> None:
        """Merge those entries, and calibrate their norm: all of a tensor, unless a part of it is a gate projection."""
        calibrate = self.parameters["norm_tolerance"] > 0
        moves_any = [not self.trims] * len(self.tuned)
        norm = torch.zeros((), dtype=torch.float64, device=merged.device)
        for run in _runs(spans, merged.device):
            deltas = self.deltas(run)
            moves_any = [moves or bool(delta.any()) for moves, delta in zip(moves_any, deltas, strict=True)]
            values = self.merged(run, deltas, alphas)
            if calibrate:
                norm += squared_norm(values)
            merged[run] = values
        if not calibrate:
            return
        # The disjoint merge passes over a model that has nothing to add; so must the target.
        enters = [moves and (alpha != 0 or not self.trims) for moves, alpha in zip(moves_any, alphas, strict=True)]
        entering = [weight if enter else 0.0 for weight, enter in zip(self.weights, enters, strict=True)]
        parts = shares(entering, self.parameters["normalize"])
        moves = [self.parameters["lambda"] * share * alpha for share, alpha in zip(parts, alphas, strict=True)]
        factor = _norm_factor(norm, (self.theta0, *self.tuned), spans, moves, self.parameters["norm_tolerance"])
        for run in _runs(spans, merged.device) if factor != 1 else ():
            merged[run] = self.merged(run, self.deltas(run), alphas).mul_(factor)


class FimKron(FimMerge):
    """`fim_kron`: every direction of a matrix has a coefficient of its own; see `mergekit_fim.merging.kron`."""

    @torch.no_grad()
    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Merge one tensor of all models, as `FimMerge` does where it has no factors.

        Raises:
            FimError: the result isn't finite, or the factors are not usable.
        """
        assert group.base is not None
        base, entries, name = group.base.tensor, group.non_base, group.metadata.name or ""
        merges = parameters["other_modules"] == "merge" and bool(entries)
        told = [parameters[SOURCE][entry.id] for entry in entries]
        places = directions.places(name, told) if merges and base.ndim > 1 else []
        if not any(places) and (parameters["density"] == 1 or not merges):
            return super().merge_group(group, **parameters)
        parts = shares([parameters["weight"][entry.id] for entry in entries], parameters["normalize"])
        betas = [part * parameters["alpha"][entry.id] for part, entry in zip(parts, entries, strict=True)]
        theta0 = base.to(torch.promote_types(base.dtype, torch.float32))
        deltas = [entry.tensor.to(theta0.dtype) - theta0 for entry in entries]
        try:
            if base.ndim == 3 and places:
                matrices = [directions.merged(at, [d[i] for d in deltas], betas) for i, at in enumerate(places)]
                delta = torch.stack(matrices).reshape(-1)
            else:
                delta = directions.merged(places[0] if places else None, deltas, betas).reshape(-1)
        except ValueError as error:
            raise FimError(
                f"{name}: {error}; measure again, raise `damping`, lower `sharpness`, or change `alpha`"
            ) from error
        threshold = find_threshold(lambda run: delta[run].clone(), len(delta), parameters["density"], base.device)
        start = theta0.reshape(-1)  # a pickled checkpoint may hold a matrix that lies transposed
        merged = torch.empty_like(start, dtype=base.dtype)
        gate, others = gate_parts(name if parameters["gate_scale"] != 1 else "", base.shape)
        for spans, scale in ((gate, parameters["gate_scale"]), (others, 1.0)):
            norm = torch.zeros((), dtype=torch.float64, device=base.device)
            for run in _runs(spans, base.device):
                values = trim_run(delta[run], run, threshold).mul_(scale * parameters["lambda"])
                values += start[run]
                norm += squared_norm(values)
                merged[run] = values
            if parameters["norm_tolerance"] > 0:
                inputs = [tensor.reshape(-1) for tensor in (base, *(entry.tensor for entry in entries))]
                moves = [parameters["lambda"] * scale * beta for beta in betas]
                factor = _norm_factor(norm, inputs, spans, moves, parameters["norm_tolerance"])
                for run in _runs(spans, base.device) if factor != 1 else ():
                    merged[run] *= factor
        _check_finite(merged, name)
        return merged.view(base.shape)


def _runs(spans: Sequence[slice], device: torch.device) -> Iterator[slice]:
    for span in spans:
        for run in runs(span.stop - span.start, device):
            yield slice(span.start + run.start, span.start + run.stop)


def _check_finite(merged: torch.Tensor, name: str | None) -> None:
    ends = torch.aminmax(merged) if merged.numel() else ()
    if not all(torch.isfinite(end) for end in ends):
        raise FimError(
            f"{name}: the merged tensor isn't finite in {str(merged.dtype).removeprefix('torch.')}; lower `weight`, "
            "`alpha` and `lambda`, set a wider `dtype:`, or look for NaN and infinity in the models"
        )


def _threshold(theta0: torch.Tensor, tuned: torch.Tensor, density: float, dtype: torch.dtype) -> Threshold | None:
    return find_threshold(lambda run: tuned[run].to(dtype).sub(theta0[run]), len(theta0), density, theta0.device)


def _parameter_specs(method: str) -> list[ParameterSpec]:
    """The parameters that the merge of a tensor gets, as mergekit wants them; the others are the pre-pass's."""
    specs = []
    for parameter in PARAMETERS.values():
        where = parameter.scope_in(method)
        if where is Scope.MERGE:
            continue
        scope = ParameterScope.NON_BASE if where is Scope.MODEL else ParameterScope.SHARED
        default = parameter.default_for(method)
        if parameter.name == "density" and method == "fim_ta":
            default = 1.0  # accepted, without effect, as in stock task_arithmetic
        optional = {} if default is None else {"default": default}
        specs.append(ParameterSpec(parameter.name, parameter.type, scope, description=parameter.meaning, **optional))
    if method == "fim_kron":
        specs.append(ParameterSpec(SOURCE, str, ParameterScope.NON_BASE, description="set by the pre-pass"))
    return specs


def _sum(deltas: list[torch.Tensor], alphas: Sequence[float], weights: list[float], normalize: bool) -> torch.Tensor:
    """Σ_m w_m α_m δ_m, divided by Σ_m w_m if `normalize`. Overwrites `deltas`."""
    parts = shares(weights, normalize)
    total = deltas[0].mul_(parts[0] * alphas[0])
    for delta, share, alpha in zip(deltas[1:], parts[1:], alphas[1:], strict=True):
        total.add_(delta, alpha=share * alpha)
    return total


def _disjoint_merge(
    deltas: list[torch.Tensor], alphas: Sequence[float], weights: list[float], normalize: bool
) -> torch.Tensor:
    """TIES' sign election and disjoint merge (arXiv 2306.01708, section 4, steps 2 and 3). Overwrites `deltas`.

    The sign of Σ_m w_m α_m trim(δ_m) is elected entry by entry (a zero sum elects plus, as in mergekit); the entries
    w_m α_m trim(δ_m) of that sign are summed and, if `normalize`, divided by Σ w_m over the models whose entry has it.
    The divisor leaves α out: dividing by it would cancel it. An α of 0 leaves its model out. A divisor of 0 divides by
    nothing, as in mergekit, and so does one that is 0 but for rounding, by which mergekit's `ties` divides.
    """
    if len(deltas) == 1:  # a single model always agrees with itself
        share = 1.0 if normalize and weights[0] != 0 else weights[0]
        return deltas[0].mul_(share * alphas[0])
    for delta, weight, alpha in zip(deltas, weights, alphas, strict=True):
        delta.mul_(weight * alpha)
    elected = deltas[0].clone()
    for delta in deltas[1:]:
        elected.add_(delta)
    elected = torch.where(elected >= 0, 1.0, -1.0).to(elected.dtype)

    total = torch.zeros_like(elected)
    divisor = torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = delta.sign().eq_(elected)  # 1 or 0, in the working dtype
        total.addcmul_(delta, agrees)
        divisor.add_(agrees, alpha=weight)
    if normalize:
        rounding = 1e-6 * sum(abs(weight) for weight in weights)
        total.div_(divisor.masked_fill_(divisor.abs() <= rounding, 1.0))
    return total


def shares(weights: list[float], normalize: bool) -> list[float]:
    """The users' weights, divided by their sum if `normalize` (unless it is zero, as in mergekit)."""
    total = sum(weights)
    if not normalize or abs(total) < 1e-8:
        return weights
    return [weight / total for weight in weights]


def _norm_factor(
    norm: torch.Tensor, inputs: Sequence[torch.Tensor], spans: Sequence[slice], moves: Sequence[float], tolerance: float
) -> float:
    """By what to multiply the spans of a merged tensor if their norm is off by more than `tolerance`, else 1.

    The target is ‖θ0‖ + Σ_m c_m (‖θ_m‖ − ‖θ0‖), c_m the coefficient by which the merge moves to model m: for one model
    (1 − α)‖θ0‖ + α‖θ1‖. That a merged tensor off by more than 5 % is rescaled is the paper's (arXiv 2603.21705, as
    summarised). The target, and that it is per tensor, are this project's. A target that isn't positive is left alone.

    `norm` is the squared norm of the merged tensor's spans, `inputs` are θ0 and every θ_m, [entry], `moves` is [model],
    c_m, and `tolerance` a part of the target.
    """
    root = float(norm) ** 0.5
    norm0, *tuned = (math.fsum(float(squared_norm(tensor[span])) for span in spans) ** 0.5 for tensor in inputs)
    target = norm0 + sum(move * (other - norm0) for move, other in zip(moves, tuned, strict=True))
    return target / root if target > 0 and root > 0 and abs(root / target - 1) > tolerance else 1.0
