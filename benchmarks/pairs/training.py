"""Fine-tune on answers alone, on a CPU or an accelerator."""

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tqdm

from example_configs.demo import narrow_products_pay, packed

Batch = Iterator[tuple[list[int], list[list[int]]]]  # a prompt's tokens, and its replies' tokens


@dataclass(frozen=True)
class Training:
    """How long and how hard to train.

    Attributes:
        steps: steps of the optimizer.
        batch: questions in each step.
        rate: the highest learning rate. A short warm-up leads to it, a linear decay follows.
        scratch: whether the model is untrained. The layers' matrices then learn by Muon at this rate, in a third of
            AdamW's time. All else learns by AdamW at 3e-3.
        layers_alone: whether only the decoder layers learn: embeddings and head stay as they are, and take no memory.
    """

    steps: int
    batch: int
    rate: float
    scratch: bool = False
    layers_alone: bool = False


def train(model: Any, name: str, questions: Batch, how: Training, *, pack: bool) -> None:
    """Train on the replies. Weights and optimizer stay float32.

    Args:
        model: a causal language model of transformers, trained in place.
        name: the name in the progress bar.
        questions: endless questions.
        how: how long and how hard to train.
        pack: whether the model takes masks of four axes. Each prompt is then read once for all of its replies.
    """
    for tensor, parameter in model.named_parameters():
        parameter.requires_grad_(not how.layers_alone or layer_of(tensor) is not None)
    optimizers = _optimizers(model, how)
    warm = min(50, how.steps // 10 + 1)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda i: min(1.0, (i + 1) / warm) * (1 - i / how.steps))
        for each in optimizers
    ]
    device = next(model.parameters()).device
    narrow = contextlib.nullcontext()
    if device.type != "cpu" or narrow_products_pay():
        narrow = torch.autocast(device.type, torch.bfloat16)
    if how.scratch:  # with so few dimensions it takes 0.7 of the processor's time of torch's fused attention
        model.set_attn_implementation("eager")
    model.train()
    for _ in (progress := tqdm.trange(how.steps, desc=f"Training {name}", unit="step")):
        some = list(itertools.islice(questions, how.batch))
        inputs, at, labels = (_packed if pack else _padded)(some)
        with narrow:
            hidden = model.base_model(**{k: v.to(device) for k, v in inputs.items()}, use_cache=False)
            logits = model.lm_head(hidden.last_hidden_state[at].to(model.lm_head.weight.dtype))
        loss = torch.nn.functional.cross_entropy(logits.float(), labels.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def layer_of(tensor: str) -> int | None:
    """Return the decoder layer of a tensor; None outside of them."""
    found = re.search(r"\.(?:layers|h)\.(\d+)\.", tensor)
    return int(found[1]) if found else None


def _optimizers(model: Any, how: Training) -> list[torch.optim.Optimizer]:
    matrices = {id(p) for n, p in model.named_parameters() if how.scratch and p.ndim == 2 and layer_of(n) is not None}
    others = [p for p in model.parameters() if id(p) not in matrices and p.requires_grad]
    rate = 3e-3 if how.scratch else how.rate
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    ]
    if matrices:
        own = [p for p in model.parameters() if id(p) in matrices]
        found.append(torch.optim.Muon(own, lr=how.rate, weight_decay=0.0))
    return found


def _packed(some: Sequence[tuple[list[int], list[list[int]]]]) -> tuple[dict[str, torch.Tensor], Any, torch.Tensor]:
    inputs, expected = packed([prompt for prompt, _ in some], [replies for _, replies in some])
    return inputs, (0, expected["at"]), expected["labels"]


def _padded(some: Sequence[tuple[list[int], list[list[int]]]]) -> tuple[dict[str, torch.Tensor], Any, torch.Tensor]:
    """Make a row for each reply, padded on the right, where no token that counts sees the padding."""
    rows = [(prompt, reply) for prompt, replies in some for reply in replies]
    ids = torch.zeros(len(rows), max(len(prompt) + len(reply) for prompt, reply in rows), dtype=torch.long)
    mask = torch.zeros_like(ids)
    at: list[tuple[int, int]] = []
    for row, (prompt, reply) in enumerate(rows):
        ids[row, : len(prompt) + len(reply)] = torch.tensor([*prompt, *reply])
        mask[row, : len(prompt) + len(reply)] = 1
        at += [(row, len(prompt) + i - 1) for i in range(len(reply))]
    where = torch.tensor(at).T
    labels = torch.tensor([token for _, reply in rows for token in reply])
    return {"input_ids": ids, "attention_mask": mask}, (where[0], where[1]), labels
