"""Make merges that treat single entries or directions of the task vector apart, as others propose.

All of it is in memory: the models are small. Everything outside the decoder layers' matrices moves uniformly.
"""

import contextlib
import functools
import io
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import tqdm
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.evidence.signals import BASE, LONG, Inputs, backward, sequences
from benchmarks.pairs.training import layer_of
from mergekit_fim.tools.whole import merge_whole

Weights = dict[str, torch.Tensor]


@functools.lru_cache(maxsize=2)
def weights(pair: Path) -> tuple[Weights, Weights]:
    """Return the base's weights, and the task vector δ."""
    base, long = (dict(load(pair, name).named_parameters()) for name in ("base", "long"))
    own = {name: tensor.detach() for name, tensor in base.items()}
    return own, {name: long[name].detach() - own[name] for name in own}


def model_of(pair: Path, task_vector: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Move the base by a task vector."""
    model = load(pair, "base")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor += task_vector[name]
    return model


def scaled(make: Callable[[Path], Weights]) -> Callable[[Path, float], PreTrainedModel]:
    """Make a family of merges: what `make` leaves of δ, times the strength."""
    made = functools.lru_cache(maxsize=1)(make)
    return lambda pair, strength: model_of(pair, {name: strength * tensor for name, tensor in made(pair).items()})


def top_singular_pair(pair: Path, density: float | None = None) -> Weights:
    """Keep the first singular pair u₁σ₁v₁ᵀ of every matrix of δ. With a density keep its largest entries only."""
    _, deltas = weights(pair)

    def first(delta: torch.Tensor) -> torch.Tensor:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)  # a mixture's experts are one tensor
        found = u[..., :1] * s[..., None, :1] @ vh[..., :1, :]
        return found if density is None else largest(found, found.abs(), density)

    return {name: first(d) if _is_matrix(name, d) else d for name, d in deltas.items()}


def arcee_fusion(pair: Path) -> Weights:
    """Return what mergekit's method of that name leaves of δ. It has its own density, and no strength."""
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "arcee_fusion",
            "base_model": str(pair / "base"),
            "models": [{"model": str(pair / "long")}],
            "dtype": "float32",
        }
    )
    base, _ = weights(pair)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        merge_whole(config, None, f"{folder}/merged", MergeOptions(quiet=True, write_model_card=False))
        merged = dict(load(Path(folder), "merged").named_parameters())
    return {name: merged[name].detach() - base[name] for name in base}


def by_saliency(pair: Path, inputs: Inputs, density: float) -> Weights:
    """Keep each tensor's entries with the largest δ²/(F + mean F). F is the base's diagonal Fisher information."""
    _, deltas = weights(pair)
    fisher = diagonal_fisher(pair, inputs)[BASE]
    return {
        name: largest(delta, delta.square() / (fisher[name] + fisher[name].mean() + _LEAST), density)
        for name, delta in deltas.items()
    }


def diagonal_fisher_merge(pair: Path, strength: float, inputs: Inputs, damping: float = 1e-3) -> PreTrainedModel:
    """Merge both ends by Fisher merging (arXiv 2111.09832) with weights: α = βF1/((1 − β)F0 + βF1), entry by entry.

    Damping adds a part of its own tensor's mean to each F.
    """
    _, deltas = weights(pair)
    ends = diagonal_fisher(pair, inputs)
    low, high = ({name: f + damping * f.mean() + _LEAST for name, f in ends[at].items()} for at in (BASE, LONG))
    alphas = {name: strength * high[name] / ((1 - strength) * low[name] + strength * high[name]) for name in deltas}
    return model_of(pair, {name: alphas[name] * delta for name, delta in deltas.items()})


_LEAST = 1e-30  # for a tensor without any Fisher information


@functools.lru_cache(maxsize=2)
def diagonal_fisher(pair: Path, inputs: Inputs) -> tuple[Weights, Weights]:
    """Return E[(∂L/∂θ)²] of every entry, at base and long model, a sequence at a time."""
    models = [load(pair, name) for name in ("base", "long")]
    ids = list(sequences(pair, models, inputs))
    found = []
    for model in models:
        squares = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}
        drawn = torch.Generator().manual_seed(1)
        for sequence in tqdm.tqdm(ids, desc=f"{pair.name}: diagonal Fisher, {inputs}", leave=False):
            backward(model, sequence, inputs.labels, drawn)
            for name, tensor in model.named_parameters():
                if tensor.grad is not None:
                    squares[name] += tensor.grad.square() / len(ids)
        found.append(squares)
    return found[0], found[1]


def largest(values: torch.Tensor, by: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the entries of a tensor for which `by` is largest, and set the others to 0."""
    count = max(1, int(density * values.numel()))
    kept = torch.zeros(values.numel(), dtype=torch.bool)
    kept[by.flatten().topk(count).indices] = True
    return torch.where(kept.view(values.shape), values, 0.0)


def _is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim >= 2 and layer_of(name) is not None


def load(pair: Path, name: str) -> PreTrainedModel:
    """Load a model of a pair, in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.float32)
    return model.eval()
