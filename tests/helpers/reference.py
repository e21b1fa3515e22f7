"""METHOD, from scratch: NumPy on whole state dicts, and autograd that keeps every gradient. Slow and obviously correct.

Nothing here imports mergekit_fim.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def load(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a saved model, as float64."""
    tensors = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        tensors |= {name: t.to(torch.float64).numpy() for name, t in load_file(file).items()}
    return tensors


def layer_of(name: str) -> int | None:
    """The decoder layer is the first number in a tensor's name; experts and the like come after it."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def decoder_layer_of(name: str) -> int | None:
    """Of a model that sees, too: the vision tower has numbered layers as well."""
    match = re.search(r"\b(?:language_model|text_model)\.(?:model\.)?layers\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def fisher(
    path: Path,
    samples=8,
    seq_len=64,
    seed=0,
    uniforms=False,
    dtype=torch.float32,
    auto=AutoModelForCausalLM,
    layer_of=layer_of,
):
    """Per layer: (parameters, [squared gradient norm per sequence]), by `.grad` squared, sequence by sequence."""
    model = auto.from_pretrained(path, dtype=dtype)
    model.eval()
    generator = torch.Generator("cpu").manual_seed(seed)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (samples, seq_len), generator=generator)
    u = torch.rand((samples, seq_len - 1), generator=generator, dtype=torch.float64) if uniforms else None
    result: dict[int, tuple[int, list[float]]] = {}
    for n in range(samples):
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=ids[n : n + 1], use_cache=False).logits[0].float()
        log_p = torch.log_softmax(logits, dim=-1)
        loss = 0.0
        for t in range(seq_len - 1):
            if u is None:
                label = int(ids[n, t + 1])
            else:
                cdf = np.cumsum(np.exp(log_p[t].detach().double().numpy()))
                label = min(int(np.sum(cdf <= u[n, t].item())), len(cdf) - 1)
            loss = loss - log_p[t, label] / (seq_len - 1)
        loss.backward()
        sums: dict[int, float] = {}
        counts: dict[int, int] = {}
        for name, parameter in model.named_parameters():
            layer = layer_of(name)
            if layer is not None:
                counts[layer] = counts.get(layer, 0) + parameter.numel()
                if parameter.grad is not None:
                    grad = parameter.grad.double().numpy()
                    sums[layer] = sums.get(layer, 0.0) + float((grad**2).sum())
        for layer, count in counts.items():
            result.setdefault(layer, (count, []))[1].append(sums[layer])
    return [result[layer] for layer in sorted(result)]


def coefficients(scores, sharpness=1.0, low=0.0, high=1.0, anchored=False):
    logs = np.log(np.array(scores))
    z = (logs - (logs.max() if anchored else logs.mean())) / max(1.0, logs.std())
    return low + (high - low) / (1 + np.exp(sharpness * z))


def layer_coefficients(
    base: Path, long: Path, layer_of=layer_of, **options
) -> tuple[list[float], list[float], list[float]]:
    """(F, ‖δ‖², α) per layer, for a whole-model merge with the default mapping."""
    measured = fisher(base, layer_of=layer_of, **options)
    F = [np.mean(squared) / count for count, squared in measured]
    theta0, theta1 = load(base), load(long)
    norms = [0.0] * len(F)
    for name in theta0:
        if layer_of(name) is not None:
            norms[layer_of(name)] += float(((theta1[name] - theta0[name]) ** 2).sum())
    alphas = coefficients([f * d for f, d in zip(F, norms, strict=True)])
    return F, norms, list(alphas)


def trim(delta: np.ndarray, density: float) -> np.ndarray:
    keep = max(1, int(density * delta.size))
    threshold = np.sort(np.abs(delta), axis=None)[delta.size - keep]
    return np.where(np.abs(delta) >= threshold, delta, 0.0)


def merge_tensor(method, theta0, thetas, alphas, weights, densities, gate, tolerance, normalize, lam=1.0):
    """One tensor by METHOD: `gate` is the factor on α (1 for everything but gate projections)."""
    alphas = [gate * a for a in alphas]
    # mergekit reads tensors in the config's dtype, so task vectors are differences of float32 numbers.
    deltas = [(t.astype(np.float32) - theta0.astype(np.float32)).astype(np.float64) for t in thetas]
    if method == "fim_ta":
        total = sum(w * a * d for w, a, d in zip(weights, alphas, deltas, strict=True))
        if normalize:
            total = total / sum(weights)
    else:
        parts = [w * a * trim(d, rho) for w, a, d, rho in zip(weights, alphas, deltas, densities, strict=True)]
        sign = np.where(sum(parts) >= 0, 1.0, -1.0)
        agree = [np.sign(p) == sign for p in parts]
        total = sum(p * m for p, m in zip(parts, agree, strict=True))
        if normalize:
            divisor = sum(w * m for w, m in zip(weights, agree, strict=True))
            total = total / np.where(divisor == 0, 1.0, divisor)
    merged = theta0 + lam * total
    if tolerance > 0:
        shares = np.array(weights) / (sum(weights) if normalize else 1.0)
        norm0 = np.linalg.norm(theta0)
        target = norm0 + sum(
            lam * s * a * (np.linalg.norm(t) - norm0) for s, a, t in zip(shares, alphas, thetas, strict=True)
        )
        norm = np.linalg.norm(merged)
        if abs(norm / target - 1) > tolerance:
            merged = merged * target / norm
    return merged


def linear_rows(path: Path, samples=2, seq_len=64, seed=0, vocab=None, dtype=torch.float32) -> dict:
    """By weight name, what a linear layer is given, [token, input]."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model.eval()
    generator = torch.Generator("cpu").manual_seed(seed)
    vocab = vocab or model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (samples, seq_len), generator=generator)
    found: dict[str, list] = {}

    def hook(name: str):
        def note(_module, args, _output):
            x = args[0].detach().reshape(-1, args[0].shape[-1]).double().numpy()
            found.setdefault(f"{name}.weight", []).append(x)

        return note

    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        for row in ids:
            model(input_ids=row[None], use_cache=False)
    return {name: np.concatenate(rows) for name, rows in found.items()}


def kron(deltas, rows, betas, damping=0.1, sharpness=4.0):
    """A merged task vector [output, input] by inputs alone: the whole system, solved. `rows`: the base's first."""

    def power(matrix, exponent):
        values, vectors = np.linalg.eigh(matrix)
        return vectors * values**exponent @ vectors.T

    def factor(x):
        made = x.T @ x / len(x)
        return made + damping * np.trace(made) / len(made) * np.eye(len(made))

    a, weights = [factor(x) for x in rows], [1 - sum(betas), *betas]
    mean = sum(w * x for w, x in zip(weights, a, strict=True))
    root, inverse = power(mean, 0.5), power(mean, -0.5)
    a = [root @ power(inverse @ x @ inverse, sharpness) @ root for x in a]
    right = sum(b * d @ x for b, d, x in zip(betas, deltas, a[1:], strict=True))
    return np.linalg.solve(sum(w * x for w, x in zip(weights, a, strict=True)), right.T).T


def report(path: Path) -> dict:
    return json.loads((Path(path) / "fim_report.json").read_text(encoding="utf-8"))
