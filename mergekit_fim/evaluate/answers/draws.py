"""Scores -> tokens, drawn so that a draw depends on the seed, the prompt and the step alone."""

import hashlib
import math
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from mergekit_fim.evaluate.records import Key


class Chooser(LogitsProcessor):
    """Draws the next token of every row, and leaves nothing else to choose from; at a temperature of 0 it only looks.

    A row's draw is the inverse of its cumulative distribution at a number in [0, 1) that follows from the seed, the
    row and the step alone, so that it is the same in any batch.
    """

    def __init__(self, rows: Sequence[tuple[Key, int]], temperature: float, seed: int) -> None:
        """Take each row's answer, and how many tokens of it are written."""
        self._rows, self._temperature, self._seed = rows, temperature, seed
        self._step = 0
        self.unusable: torch.Tensor | bool = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave of the scores [row, token] those of the tokens that are drawn."""
        self.unusable = scores.isnan().any() | self.unusable  # looked at later, in order not to wait for the device
        if not self._temperature:
            return scores
        numbers = [uniform(self._seed, key, written + self._step) for key, written in self._rows]
        self._step += 1
        dtype = torch.float32 if scores.device.type == "mps" else torch.float64
        scaled = (scores - scores.amax(dim=-1, keepdim=True)).to(dtype) / self._temperature
        cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
        at = torch.tensor(numbers, dtype=dtype, device=scores.device)[:, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, at, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -math.inf).scatter(-1, drawn, 0.0)


def uniform(seed: int, key: Key, step: int) -> float:
    """A number in [0, 1) for a step of an answer."""
    text = repr((seed, *key, step)).encode()
    return (int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 11) / 2**53
