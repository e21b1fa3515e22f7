"""Rows that are written on together, and what becomes of them as some leave and others join."""

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
    """Rows that are generated together, padded on the left.

    Attributes:
        rows: what they are.
        ids: all their tokens, [row, position].
        mask: 0 where they are padding, likewise.
        cache: the model's, of all positions but the last; None where it has seen none.
    """

    rows: list[Row]
    ids: torch.Tensor
    mask: torch.Tensor
    cache: Any = None


def started(rows: list[Row], device: torch.device) -> Batch:
    """A batch of rows that the model hasn't seen."""
    width = max(row.length for row in rows)
    ids = [[0] * (width - row.length) + row.ids + row.written for row in rows]
    mask = [[0] * (width - row.length) + [1] * row.length for row in rows]
    return Batch(rows, torch.tensor(ids, device=device), torch.tensor(mask, device=device))


def kept(batch: Batch, rows: list[Row]) -> Batch:
    """A batch of some rows of another, without the padding that all of them have."""
    index = torch.tensor([batch.rows.index(row) for row in rows], device=batch.ids.device)
    begin = batch.ids.shape[1] - max(row.length for row in rows)
    for layer in batch.cache.layers:
        at = index.to(layer.keys.device)
        layer.keys = layer.keys[at][:, :, begin:]
        layer.values = layer.values[at][:, :, begin:]
    return Batch(rows, batch.ids[index, begin:], batch.mask[index, begin:], batch.cache)


def joined(first: Batch | None, second: Batch) -> Batch:
    """Two batches as one, padded to the longer one's length."""
    if first is None:
        return second
    width = max(first.ids.shape[1], second.ids.shape[1])
    short = [width - batch.ids.shape[1] for batch in (first, second)]

    def join(a: torch.Tensor, b: torch.Tensor, *after: int) -> torch.Tensor:
        return torch.cat([pad(a, (*after, short[0], 0)), pad(b, (*after, short[1], 0))])

    for layer, other in zip(first.cache.layers, second.cache.layers, strict=True):
        layer.keys, layer.values = join(layer.keys, other.keys, 0, 0), join(layer.values, other.values, 0, 0)
    rows = [*first.rows, *second.rows]
    return Batch(rows, join(first.ids, second.ids), join(first.mask, second.mask), first.cache)
