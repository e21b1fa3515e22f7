"""Does a signal predict what moving a part of the model does? Compare the measured KL with each signal, on a pair.

    python -m benchmarks.fidelity KIND SEED FOLDER [--texts 24]

FOLDER is a pair that `python -m benchmarks.evidence` has answered. The result joins what that kept of the pair.

- A move takes one layer all the way to the other model, or one block of a layer (attention or MLP), or all layers at
  once by coefficients drawn at random.
- The mean KL divergence of the next token's distribution from the unmoved model's is measured, on the answers of base
  and long to the problems.
- A cell has the correlation of ln KL with ln signal, of layers / of blocks / of all at once. It is the mean of the
  correlations at the base and at the long model.
- The ceiling is the correlation between ln KL on base's answers and ln KL on long's.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tqdm
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.evidence import mappings
from benchmarks.evidence.signals import BASE, LONG, Inputs, Signals, signals
from benchmarks.evidence.summary import KEPT, file_of, load, save
from benchmarks.pairs.recipes import KINDS

INPUTS = (
    Inputs(),
    Inputs(labels="sampled"),
    Inputs(labels="sampled", samples=64),
    Inputs(text="own", labels="sampled", samples=64),
)
DRAWS = 24  # draws of coefficients for all layers at once


def texts(pair: Path, name: str, count: int) -> list[torch.Tensor]:
    """Return prompts with what base or long answered [text] [token]."""
    tokenizer = AutoTokenizer.from_pretrained(pair / name)
    lines = (pair / "answers" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    some = [json.loads(line) for line in lines[:: max(1, len(lines) // count)]]
    return [
        tokenizer(answer["prompt"] + answer["text"], add_special_tokens=False, return_tensors="pt").input_ids
        for answer in some
    ]


@torch.inference_mode()
def divergence(model: Any, expected: Sequence[torch.Tensor], some: Sequence[torch.Tensor]) -> float:
    """Return the mean KL of a model's next-token distributions from another's, which are log-probabilities."""
    total, count = 0.0, 0
    for ids, logs in zip(some, expected, strict=True):
        found = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        total += float((logs.exp() * (logs - found)).sum())
        count += len(logs)
    return total / count


def measured(pair: Path, at: int, moves: Sequence[dict[str, float]], count: int) -> np.ndarray:
    """Measure KL [text of base or long, move] from the model at one end. A move is the coefficients of tensors."""
    models = [
        AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.float32).eval() for name in ("base", "long")
    ]
    own, other = (dict(model.named_parameters()) for model in (models[at], models[1 - at]))
    some = [texts(pair, name, count) for name in ("base", "long")]
    with torch.inference_mode():
        expected = [[models[at](input_ids=ids).logits[0].log_softmax(-1) for ids in its] for its in some]
        moved = copy.deepcopy(models[at])
        weights = dict(moved.named_parameters())
        found = np.zeros((2, len(moves)))
        for column, move in enumerate(tqdm.tqdm(moves, desc=f"{pair.name} at {('base', 'long')[at]}", leave=False)):
            for name, alpha in move.items():
                weights[name].copy_(own[name] + alpha * (other[name] - own[name]))
            found[:, column] = [divergence(moved, e, its) for e, its in zip(expected, some, strict=True)]
            for name in move:
                weights[name].copy_(own[name])
    return np.maximum(found, 1e-12)


def predicted(its: Signals, at: int) -> Iterator[tuple[str, np.ndarray]]:
    """Return every signal [group]."""
    yield "F · ‖δ‖²", its.fisher(at) * its.moved
    yield "E[⟨∇L, δ⟩²]", its.quadratic(at)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(np.log(np.maximum(x, 1e-30)), np.log(y))[0, 1])


def rows(pair: Path, count: int) -> dict[str, dict[str, list[float]]]:
    """Return correlations [signal] [what is moved] [end], at base and at long."""
    first = signals(pair, INPUTS[0])
    parts: dict[str, Callable[[str], object]] = {"layers": mappings.whole, "blocks": mappings.block}
    grouped = {name: mappings.groups_by(first.tensors, part) for name, part in parts.items()}
    layers = grouped["layers"]
    draws = np.random.default_rng(0).uniform(size=(DRAWS, len(layers)))
    moves = {name: [{first.tensors[i]: 1.0 for i in group} for group in groups] for name, groups in grouped.items()} | {
        "all at once": [{first.tensors[i]: a for a, g in zip(draw, layers, strict=True) for i in g} for draw in draws]
    }
    found: dict[str, dict[str, list[float]]] = {}

    def note(signal: str, what: str, value: float) -> None:
        found.setdefault(signal, {}).setdefault(what, []).append(round(value, 4))

    for at in (BASE, LONG):
        for what, some in moves.items():
            kl = measured(pair, at, some, count)
            note("ceiling", what, correlation(kl[0], kl[1]))
            mean = kl.mean(axis=0)
            for inputs in INPUTS:
                its = signals(pair, inputs).grouped(grouped.get(what, layers))
                if what != "all at once":
                    for signal, values in predicted(its, at):
                        note(f"{signal}, {inputs}", what, correlation(values, mean))
                    continue
                note(f"F · ‖δ‖², {inputs}", what, correlation(np.square(draws) @ (its.fisher(at) * its.moved), mean))
                along = np.square(draws @ its.dots[at].T).mean(axis=1)
                note(f"E[⟨∇L, δ⟩²], {inputs}", what, correlation(along, mean))
            if what != "all at once":
                note("‖δ‖²", what, correlation(first.grouped(grouped[what]).moved, mean))
            else:
                note("‖δ‖²", what, correlation(np.square(draws) @ first.grouped(layers).moved, mean))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--one-sided", type=int, metavar="STEPS", help="the pair is one-sided, made with so many steps")
    parser.add_argument("--texts", type=int, default=24, help="how many answers of each of the two models (24)")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    kept = KEPT / f"{file_of(arguments.kind, arguments.seed, arguments.one_sided)}.json"
    save(kept, replace(load(kept), fidelity=rows(arguments.folder, arguments.texts)))


if __name__ == "__main__":
    main()
