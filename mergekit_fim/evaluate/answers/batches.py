"""Rows that are written on together, and what becomes of the model's cache as some leave and others join."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from mergekit_fim.evaluate.answers.prompts import Prompt


@dataclass(eq=False)
class Row:
    """A prompt and what was written after it so far; `limit` is how many tokens that may be."""

    prompt: Prompt
    ids: list[int]
    limit: int
    written: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.ids) + len(self.written)

    def take(self, tokens: Sequence[int], stop: Sequence[int]) -> None:
        """Write on, up to the end of the answer."""
        for token in tokens:
            self.written.append(token)
            self.ended = token in stop or len(self.written) == self.limit
            if self.ended:
                return


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows, and the model's cache of all their tokens but the last, padded on the left; None where it has seen none."""

    rows: list[Row]
    cache: Any = None


def padded(rows: Sequence[Row], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Put rows side by side, padded on the left: their tokens, and 0 where they are padding; both [row, position]."""
    width = max(row.length for row in rows)
    ids = [[0] * (width - row.length) + row.ids + row.written for row in rows]
    mask = [[0] * (width - row.length) + [1] * row.length for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def kept(batch: Batch, rows: list[Row]) -> Batch:
    """Leave some rows of a batch, without the padding that all of them have."""
    index = torch.tensor([batch.rows.index(row) for row in rows])
    seen = max(row.length for row in rows) - 1
    for layer in batch.cache.layers:
        at = index.to(layer.keys.device)
        layer.keys, layer.values = layer.keys[at][:, :, -seen:], layer.values[at][:, :, -seen:]
    return Batch(rows, batch.cache)


def joined(first: Batch | None, second: Batch) -> Batch:
    """Make one batch of two, padded to the longer one's length."""
    if first is None:
        return second
    rows = [*first.rows, *second.rows]
    seen = max(row.length for row in rows) - 1

    def join(*parts: torch.Tensor) -> torch.Tensor:
        return torch.cat([pad(part, (0, 0, seen - part.shape[2], 0)) for part in parts])

    for layer, other in zip(first.cache.layers, second.cache.layers, strict=True):
        layer.keys, layer.values = join(layer.keys, other.keys), join(layer.values, other.values)
    return Batch(rows, first.cache)
