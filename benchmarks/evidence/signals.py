"""Measure what both models of a pair say of each tensor, on tokens that need no data. Every mapping starts from it.

It runs plain autograd, a sequence at a time. The models are small, and so only torch has to be trusted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE, LONG = 0, 1


@dataclass(frozen=True)
class Inputs:
    """The tokens on which gradients are taken.

    Attributes:
        text: "random" is uniform over the vocabulary, as in the paper. "own" is text that the two models write
            themselves, half of the sequences each, at a temperature of 1 from a single random token.
        labels: "inputs", the next token; or "sampled" from the model's own distribution.
        samples: how many sequences.
        length: tokens of each sequence.
    """

    text: str = "random"
    labels: str = "inputs"
    samples: int = 8
    length: int = 64

    def __str__(self) -> str:
        return f"{self.text}-{self.labels}-{self.samples}x{self.length}"


@dataclass(frozen=True, eq=False)
class Signals:
    """The signals of one pair, on one kind of inputs.

    Attributes:
        tensors: the names of the task vector's tensors.
        squares: ‖∇L‖² at the base and at the long model [2, sequence, tensor].
        dots: ⟨∇L, δ⟩ at the base and at the long model [2, sequence, tensor].
        sizes: entries of each tensor [tensor].
        moved: ‖δ‖² [tensor].
    """

    tensors: tuple[str, ...]
    squares: np.ndarray
    dots: np.ndarray
    sizes: np.ndarray
    moved: np.ndarray

    def grouped(self, groups: list[list[int]]) -> "Signals":
        """Sum over groups of tensors. Each group then stands for a tensor."""
        member = np.zeros((len(self.tensors), len(groups)))
        for group, tensors in enumerate(groups):
            member[tensors, group] = 1
        names = tuple(self.tensors[group[0]] for group in groups)
        return Signals(names, self.squares @ member, self.dots @ member, self.sizes @ member, self.moved @ member)

    def fisher(self, at: int) -> np.ndarray:
        """Return the mean diagonal Fisher information per entry [tensor]."""
        return self.squares[at].mean(axis=0) / self.sizes

    def quadratic(self, at: int) -> np.ndarray:
        """Return q = E[⟨∇L, δ⟩²] [tensor]."""
        return np.square(self.dots[at]).mean(axis=0)


def signals(pair: Path, inputs: Inputs) -> Signals:
    """Measure a pair, or read its earlier measurement."""
    kept = pair / "signals" / f"{inputs}.npz"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        found = _measure(pair, inputs)
        part = kept.with_suffix(".part.npz")
        np.savez(part, **found)
        part.rename(kept)
    with np.load(kept) as file:
        return Signals(tuple(map(str, file["tensors"])), *(file[x] for x in ("squares", "dots", "sizes", "moved")))


def _measure(pair: Path, inputs: Inputs) -> dict[str, Any]:
    models = [AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.float32) for name in ("base", "long")]
    weights = [dict(model.named_parameters()) for model in models]
    names = list(weights[BASE])
    with torch.no_grad():
        deltas = {name: weights[LONG][name] - weights[BASE][name] for name in names}
    texts = list(sequences(pair, models, inputs))
    squares, dots = np.zeros((2, 2, len(texts), len(names)))
    for at, model in enumerate(models):
        model.eval()
        drawn = torch.Generator().manual_seed(1)
        for row, ids in enumerate(tqdm.tqdm(texts, desc=f"{pair.name}: {inputs} at {('base', 'long')[at]}")):
            backward(model, ids, inputs.labels, drawn)
            for column, name in enumerate(names):
                gradient = weights[at][name].grad
                if gradient is not None:
                    squares[at, row, column] = gradient.double().square().sum()
                    dots[at, row, column] = (gradient.double() * deltas[name]).sum()
    return {
        "tensors": np.array(names),
        "squares": squares,
        "dots": dots,
        "sizes": np.array([deltas[name].numel() for name in names]),
        "moved": np.array([float(deltas[name].double().square().sum()) for name in names]),
    }


def backward(model: Any, ids: torch.Tensor, labels: str, drawn: torch.Generator) -> None:
    """Leave the gradients of a sequence's mean loss in the model. `drawn` draws sampled labels; see `Inputs`."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    expected = ids[1:]
    if labels == "sampled":
        expected = torch.multinomial(logits.detach().softmax(-1), 1, generator=drawn)[:, 0]
    torch.nn.functional.cross_entropy(logits, expected).backward()


def sequences(pair: Path, models: list[Any], inputs: Inputs) -> Iterator[torch.Tensor]:
    """Return the tokens [position] of each sequence. Both models are shown them."""
    vocabulary = models[BASE].config.vocab_size
    if inputs.text == "random":
        generator = torch.Generator().manual_seed(0)
        yield from torch.randint(0, vocabulary, (inputs.samples, inputs.length), generator=generator)
        return
    known = len(AutoTokenizer.from_pretrained(pair / "base"))
    torch.manual_seed(0)
    for model in models:
        started = torch.randint(0, known, (inputs.samples // 2, 1))
        written = model.generate(
            started,
            attention_mask=torch.ones_like(started),
            do_sample=True,
            top_k=0,
            temperature=1.0,
            max_new_tokens=inputs.length - 1,
            min_new_tokens=inputs.length - 1,
            pad_token_id=0,
        )
        yield from written
