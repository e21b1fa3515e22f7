"""The variants that are compared. Each is a family of merges by one strength."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from transformers import PreTrainedModel

from benchmarks.evidence import directions, entries, mappings
from benchmarks.evidence.directions import Directions, power, share
from benchmarks.evidence.signals import Inputs, signals
from benchmarks.evidence.subspace import without_top_directions
from benchmarks.pairs.training import layer_of

LARGEST_MEAN = 0.9999  # the largest mean of coefficients: it must be below 1
Merged = Callable[[Path, float], MergeConfiguration | PreTrainedModel]


@dataclass(frozen=True)
class Variant:
    """A method with all its settings but the strength.

    Attributes:
        merged: makes the merge of a pair's folder at a strength: a config for mergekit, or the merge, in float32.
        high: the largest strength.
        ends_long: whether the largest strength gives the long model itself, and so needs no run.
    """

    merged: Merged
    high: float = 1.0
    ends_long: bool = True


def _merge(method: str, pair: Path, model: Mapping[str, Any], shared: Mapping[str, Any], long: str = "long") -> Any:
    return MergeConfiguration.model_validate(
        {
            "merge_method": method,
            "base_model": str(pair / "base"),
            "models": [{"model": str(pair / long), "parameters": dict(model)}],
            "parameters": dict(shared),
            "dtype": "float32",
        }
    )


def stock(method: str, strength: str = "weight", high: float = 1.6, **parameters: Any) -> Variant:
    """Vary a method of mergekit's by `weight`. With `normalize` the weight of a single model would change nothing."""

    def config(pair: Path, value: float) -> MergeConfiguration:
        model = {"weight": value, **{k: v for k, v in parameters.items() if k in ("density", "gamma", "epsilon")}}
        return _merge(method, pair, model, {"normalize": False})

    return Variant(config, high, high == 1.0)


def _slerp(pair: Path, value: float) -> MergeConfiguration:
    return MergeConfiguration.model_validate(
        {
            "merge_method": "slerp",
            "base_model": str(pair / "base"),
            "models": [{"model": str(pair / name)} for name in ("base", "long")],
            "parameters": {"t": value},
            "dtype": "float32",
        }
    )


def ours(method: str, high: float = 1.0, ends_long: bool = True, **parameters: Any) -> Variant:
    """Vary a method of this package by `alpha_mean`. `lambda` lets trimmed task vectors go beyond 1."""

    def config(pair: Path, value: float) -> MergeConfiguration:
        model = {k: v for k, v in parameters.items() if k == "density"}
        shared = {k: v for k, v in parameters.items() if k != "density"}
        return _merge(method, pair, model, {"alpha_mean": min(value / high, LARGEST_MEAN), "lambda": high, **shared})

    return Variant(config, high, ends_long)


def by_hand(
    found: mappings.Coefficients,
    inputs: Inputs = Inputs(),  # noqa: B008 (it is frozen)
    part: Callable[[str], object] = mappings.whole,
    outside: str = "mean",
    method: str = "fim_ta",
    high: float = 1.0,
    ends_long: bool = True,
    **parameters: Any,
) -> Variant:
    """Set the coefficients of a mapping by hand in a config for this package.

    Args:
        found: the mapping.
        inputs: the inputs of the signals.
        part: which parts of a decoder layer have their own coefficients.
        outside: the coefficient outside of the layers: "mean" of the groups, "base", "long" or "own", by its score.
        method: fim_ta or fim_ties.
        high: the largest strength.
        ends_long: whether the largest strength gives the long model.
        parameters: the method's parameters.
    """

    def config(pair: Path, value: float) -> MergeConfiguration:
        measured = signals(pair, inputs)
        groups = mappings.groups_by(measured.tensors, part)
        others = [i for i, name in enumerate(measured.tensors) if layer_of(name) is None]
        scored = [*groups, others] if outside == "own" else groups
        alphas = found(min(value, LARGEST_MEAN) if ends_long or high == 1 else value, measured.grouped(scored))
        rest = {"mean": alphas.mean(), "base": 0.0, "long": 1.0, "own": alphas[-1]}[outside]
        by_tensor = {measured.tensors[i]: float(a) for g, a in zip(groups, alphas, strict=False) for i in g}
        model = {"alpha": _filters(by_tensor, float(rest)), **{k: v for k, v in parameters.items() if k == "density"}}
        return _merge(method, pair, model, {k: v for k, v in parameters.items() if k != "density"})

    return Variant(config, high, ends_long)


def _filters(alphas: Mapping[str, float], outside: float) -> Any:
    """Write a coefficient for every tensor as mergekit's filters: a gradient for each name after the layer's number."""
    by_name: dict[str, list[float]] = {}
    for tensor, alpha in alphas.items():
        layers, _, name = re.split(r"\.(\d+)\.", tensor, maxsplit=1)
        by_name.setdefault(name, []).append(alpha)
    inside = f"{layers.rpartition('.')[2]}."
    if len({tuple(values) for values in by_name.values()}) == 1:
        return [{"filter": inside, "value": next(iter(by_name.values()))}, {"value": outside}]
    # A checkpoint may name a mixture's experts one by one. They take the mean of what isn't attention.
    others = [values for name, values in by_name.items() if mappings.block(name) == "mlp"]
    rest = [sum(values) / len(values) for values in zip(*others, strict=True)]
    named = [{"filter": name, "value": values} for name, values in by_name.items()]
    return [*named, {"filter": inside, "value": rest}, {"value": outside}]


def _subspace(pair: Path, value: float) -> MergeConfiguration:
    """Make S³ with ρ = 1 − strength. It is a model of its own, and replaces the long one."""
    return _merge("task_arithmetic", pair, {"weight": 1.0}, {}, without_top_directions(pair, 1 - value))


def _subspace_then(pair: Path, value: float, method: str, **parameters: Any) -> MergeConfiguration:
    long = without_top_directions(pair, 0.8)
    model = {"weight": value} if method == "task_arithmetic" else {}
    shared = parameters if method == "task_arithmetic" else {"alpha_mean": min(value, LARGEST_MEAN), **parameters}
    return _merge(method, pair, model, shared, long)


# Variants whose answers are kept, and which can't be answered any more: why.
GONE = {"fim_kron both factors": "it was answered at commit 3019a90, before `factors: both` was dropped"}


def _gone(_pair: Path, _value: float) -> Any:
    raise ValueError(", ".join(GONE.values()))


PAPER = Inputs()
MANY = Inputs(labels="sampled", samples=64)
OWN = Inputs(text="own", labels="sampled", samples=64)

VARIANTS: dict[str, Variant] = {
    # What mergekit has
    "task_arithmetic": stock("task_arithmetic", high=1.0),
    "slerp": Variant(_slerp),
    "ties density 0.02": stock("ties", density=0.02, high=6.0),
    "ties density 0.05": stock("ties", density=0.05, high=4.0),
    "ties density 0.1": stock("ties", density=0.1, high=3.0),
    "ties density 0.2": stock("ties", density=0.2, high=2.0),
    "ties density 0.4": stock("ties", density=0.4),
    "ties density 1": stock("ties", density=1.0, high=1.0),
    "dare_ties density 0.5": stock("dare_ties", density=0.5, high=1.2),
    "della density 0.5": stock("della", density=0.5, epsilon=0.15, high=1.2),
    "breadcrumbs density 0.9": stock("breadcrumbs", density=0.9, gamma=0.01),
    # What others propose
    "S3": Variant(_subspace, ends_long=True),
    "S3 0.8, then task_arithmetic": Variant(
        lambda pair, value: _subspace_then(pair, value, "task_arithmetic"), ends_long=False
    ),
    "S3 0.8, then fim_ta": Variant(
        lambda pair, value: _subspace_then(pair, value, "fim_ta"), high=1.0, ends_long=False
    ),
    "arcee_fusion, scaled": Variant(entries.scaled(entries.arcee_fusion), 6.0, False),
    "top singular pair": Variant(entries.scaled(entries.top_singular_pair), 4.0, False),
    "top singular pair, density 0.05": Variant(
        entries.scaled(functools.partial(entries.top_singular_pair, density=0.05)), 8.0, False
    ),
    "δ² / (F + mean F), density 0.02": Variant(
        entries.scaled(functools.partial(entries.by_saliency, inputs=PAPER, density=0.02)), 6.0, False
    ),
    "Fisher merging, both ends": Variant(functools.partial(entries.diagonal_fisher_merge, inputs=PAPER)),
    # This package's
    "fim_kron": ours("fim_kron"),
    "fim_kron both factors": Variant(_gone),
    "fim_kron damping 0.001, sharpness 1": ours("fim_kron", damping=0.001, sharpness=1.0),
    "fim_kron damping 0.1, sharpness 1": ours("fim_kron", damping=0.1, sharpness=1.0),
    "fim_ta": ours("fim_ta"),
    "fim_ta sharpness -1": ours("fim_ta", sharpness=-1.0),
    "fim_ta sharpness 0": ours("fim_ta", sharpness=0.0),
    "fim_ta anchored 0.7": by_hand(mappings.anchored(0.7, adapted=False), high=1.6, ends_long=False),
    "fim_ta anchored, adapted": by_hand(mappings.anchored(1.0, adapted=True), high=1.6, ends_long=False),
    "fim_ties": ours("fim_ties", 2.0, False, density=0.2),
    "fim_ties no gates": ours("fim_ties", 2.0, False, density=0.2, gate_scale=1.0),
    "fim_ties no calibration": ours("fim_ties", 2.0, False, density=0.2, norm_tolerance=0.0),
    "fim_ties neither": ours("fim_ties", 2.0, False, density=0.2, gate_scale=1.0, norm_tolerance=0.0),
    "fim_ties sharpness 0": ours("fim_ties", 2.0, False, density=0.2, sharpness=0.0),
    "fim_ties sharpness -1": ours("fim_ties", 2.0, False, density=0.2, sharpness=-1.0),
    "fim_ties density 0.01": ours("fim_ties", 8.0, False, density=0.01),
    "fim_ties density 0.02": ours("fim_ties", 6.0, False, density=0.02),
    "fim_ties density 0.02, sharpness 0": ours("fim_ties", 6.0, False, density=0.02, sharpness=0.0),
    "fim_ties density 0.05": ours("fim_ties", 4.0, False, density=0.05),
    "fim_ties density 0.1": ours("fim_ties", 3.0, False, density=0.1),
    "fim_ties density 0.4": ours("fim_ties", 1.6, False, density=0.4),
    "fim_ties density 1": ours("fim_ties", 1.2, False, density=1.0),
    "fim_ties anchored 0.7": by_hand(
        mappings.anchored(0.7, adapted=False), method="fim_ties", high=2.0, ends_long=False, density=0.2
    ),
    # What is tried
    "two endpoints, F": by_hand(mappings.two_endpoints(quadratic=False), MANY),
    "two endpoints, q": by_hand(mappings.two_endpoints(quadratic=True), MANY),
    "together": by_hand(mappings.together, MANY),
    "together, own text": by_hand(mappings.together, OWN),
    "fim_ties density 0.05, together, own text": by_hand(
        mappings.together, OWN, method="fim_ties", ends_long=False, density=0.05, **{"lambda": 3.0}
    ),
    "two endpoints, q, own text": by_hand(mappings.two_endpoints(quadratic=True), OWN),
    "fim_ta own text": by_hand(mappings.sigmoid_of(1.0), OWN),
    "fim_ta sampled 64": by_hand(mappings.sigmoid_of(1.0), MANY),
    "fim_ta sampled 4": by_hand(mappings.sigmoid_of(1.0), Inputs(labels="sampled", samples=4)),
    "fim_ta 128x128": by_hand(mappings.sigmoid_of(1.0), Inputs(samples=128, length=128)),
    "fim_ta attention and MLP": by_hand(mappings.sigmoid_of(1.0), part=mappings.block),
    "fim_ta attention and MLP, sharpness -1": by_hand(mappings.sigmoid_of(-1.0), part=mappings.block),
    "fim_ta per tensor": by_hand(mappings.sigmoid_of(1.0), part=mappings.itself),
    "fim_ta outside base": by_hand(mappings.sigmoid_of(1.0), outside="base", ends_long=False),
    "fim_ta outside long": by_hand(mappings.sigmoid_of(1.0), outside="long"),
    "fim_ta outside own": by_hand(mappings.sigmoid_of(1.0), outside="own"),
}


def _explored() -> dict[str, Variant]:
    """Return what is tried of merging by inputs alone, on seeds of development. It isn't in the fixed list's tables."""
    few = Inputs(samples=2)
    made = {
        f"directions {n}x64, sharpness {s:g}": Directions(Inputs(samples=n), power(s))
        for n in (1, 2, 8, 32)
        for s in (1, 4)
    }
    made |= {f"directions {n}x64, share": Directions(Inputs(samples=n), share) for n in (2, 8, 32)}
    made |= {f"directions 8x64, damping {d:g}": Directions(damping=d) for d in (1e-5, 1e-2, 1e-1)}
    made |= {f"directions 8x64, share, damping {d:g}": Directions(moved=share, damping=d) for d in (1e-5, 1e-2, 1e-1)}
    made |= {
        f"directions 2x64, damping {d:g}, sharpness {s}": Directions(few, power(s), d)
        for d in (0.03, 0.1, 0.3, 1.0)
        for s in (1, 2, 4, 8)
    }
    made |= {f"directions 8x64, damping 0.1, sharpness {s}": Directions(moved=power(s), damping=0.1) for s in (4, 8)}
    made |= {
        f"directions 2x64, damping {d:g} by {by}, sharpness {s}": Directions(few, power(s), d, by)
        for d, by, s in [
            (0.01, "input", 1),
            (0.1, "input", 1),
            (0.1, "input", 4),
            (0.1, "drift", 1),
            (1.0, "drift", 1),
            (1.0, "drift", 4),
        ]
    }
    made |= {
        f"directions 2x64, damping 0.01, orthonormal, sharpness {s}": Directions(few, power(s), 0.01, basis="sum")
        for s in (1, 4)
    }
    made |= {
        f"directions own {n}x64, {name}": Directions(Inputs(text="own", samples=n), moved)
        for n in (8, 32)
        for name, moved in (("sharpness 1", power(1)), ("share", share))
    }
    parts = {
        "attention": "attn",
        "MLP": "mlp",
        "MLP's inputs": r"gate_proj|up_proj|c_fc",
        "MLP's outputs": "down_proj|mlp.c_proj",
    }
    made |= {f"directions 8x64, {name} only": Directions(part=part) for name, part in parts.items()}
    made |= {
        "directions 8x64, permuted": Directions(moved=directions.changed(directions.permuted)),
        "directions 8x64, random basis": Directions(basis="random"),
        "directions 8x64, reversed": Directions(rows=directions.reversed_),
        "directions 8x64, only ratios above 1": Directions(moved=directions.changed(lambda r: r.clamp(min=1))),
        "directions 8x64, only ratios below 1": Directions(moved=directions.changed(lambda r: r.clamp(max=1))),
        "directions 8x64, the long model's alone": Directions(rows=directions.even_base),
        "directions 8x64, the base's alone": Directions(rows=directions.even_long),
        "directions 8x64, centred": Directions(rows=directions.centred),
        "directions 8x64, drift doubled": Directions(rows=directions.drifted(2.0)),
        "directions 16x64, unpaired": Directions(Inputs(samples=16), rows=directions.unpaired),
        "directions 16x64, of the base alone": Directions(Inputs(samples=16), rows=directions.of_base_alone),
        "directions 8x64, single inputs": Directions(basis="inputs"),
        "directions 8x64, single inputs, share": Directions(moved=share, basis="inputs"),
        "directions 2x64, single inputs, share": Directions(few, share, basis="inputs"),
    }
    return {name: Variant(merged) for name, merged in made.items()}


EXPLORED = _explored()

# These are compared over pairs, with a correction for their number. The list was fixed before its pairs were answered.
LISTED = (
    "task_arithmetic",
    "ties density 0.02",
    "ties density 0.05",
    "ties density 0.2",
    "fim_ta",
    "fim_ties",
    "arcee_fusion, scaled",
    "S3",
    "top singular pair",
    "top singular pair, density 0.05",
    "δ² / (F + mean F), density 0.02",
    "Fisher merging, both ends",
    "fim_kron damping 0.001, sharpness 1",
    "fim_kron both factors",
    "fim_kron",  # its defaults changed after the list was fixed, and twelve of its pairs had been answered
)


def _ties_of(name: str) -> str:
    """Return the name of mergekit's `ties` with the density in a variant's name."""
    found = re.search(r"density ([\d.]+)", name)
    return f"ties density {found[1] if found else 0.2}"


# Compare each trimmed variant with this one, to see what its coefficients add.
TRIMMED = {name: _ties_of(name) for name in VARIANTS if name.startswith("fim_ties") and _ties_of(name) in VARIANTS}
