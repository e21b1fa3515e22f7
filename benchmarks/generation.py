"""Compare the speed of completions with plain `generate` of transformers, on a model of random weights.

    python benchmarks/generation.py                     # the shape of SmolLM2-135M: 1 GB of disk, about 10 minutes
    python benchmarks/generation.py --shape small --rows 8
    python benchmarks/generation.py --sides ours,vllm,swept    # beside vLLM, where that is installed
    python benchmarks/generation.py --device cuda --dtype bfloat16 --rows 64 --problems 512

There are two tasks. `equal` has one full batch of prompts and answers of one length. It shows what it costs to look at
the rows. `mixed` has prompts of 40 to 120 tokens. Their answers take 20 to 400, log-normal, as those of a
short-answering and of a long-reasoning model do. The plain loop takes the prompts in the given order, batch after
batch. Each batch runs until its last answer ends. The length of each answer is fixed, and all sides end it in the same
way; vLLM has it as a limit. The sides run by turns.

`vllm` is `vllm.LLM.generate` alone. `swept` is a sweep's run by the same
engine: it swaps the weights in, makes prompts of problems, answers, grades, and writes. What it takes longer is the
sweep's own share.
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import tokenizers
import torch
import transformers
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_fim.evaluate.answers.by_vllm import Vllm
from mergekit_fim.evaluate.answers.engine import Decoding, ModelFiles
from mergekit_fim.evaluate.answers.generation import complete
from mergekit_fim.evaluate.answers.loading import LanguageModel, load_model
from mergekit_fim.evaluate.answers.prompts import Prompt, file_template
from mergekit_fim.evaluate.answers.tokens import Reader, load_tokenizer
from mergekit_fim.evaluate.folder import SweepFolder, open_folder
from mergekit_fim.evaluate.models import Models
from mergekit_fim.evaluate.one_run import Asked, answer
from mergekit_fim.evaluate.problems.questions import Questions
from mergekit_fim.evaluate.problems.sources import open_problems
from mergekit_fim.evaluate.runs.families import Run

SHAPES = {
    "tiny": {"vocab": 1000, "hidden": 64, "inter": 192, "layers": 4, "heads": 4, "kv": 2},
    "small": {"vocab": 8192, "hidden": 256, "inter": 768, "layers": 12, "heads": 4, "kv": 2},
    "135m": {"vocab": 49152, "hidden": 576, "inter": 1536, "layers": 30, "heads": 9, "kv": 3},
}
PAD, END = 0, 1  # tokens that no prompt has; `complete` pads with 0, too
EQUAL_PROMPT, EQUAL_ANSWER = 80, 128


def make_model(folder: Path, shape: dict) -> None:
    """Write a Llama model of random weights, and a tokenizer whose words are w0, w1, ..."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inter"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=END,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(shape["vocab"]) if i != END} | {"</s>": END}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(folder)


class Task:
    """Prompts, and how many tokens their answers take. The first token of a prompt says which one it is.

    A task is also the logits processor that ends the answers there.
    """

    def __init__(self, lengths: list[tuple[int, int]], vocabulary: int, device: torch.device) -> None:
        pick = random.Random(1)
        ids = [[number + 2, *pick.choices(range(2, vocabulary), k=n - 1)] for number, (n, _) in enumerate(lengths)]
        self.ids, self.answers = ids, [answer for _, answer in lengths]
        self.prompts = [Prompt("b", i, 0, " ".join(f"w{t}" for t in row), False) for i, row in enumerate(ids)]
        self._ends = torch.tensor([PAD, PAD, *(sum(pair) for pair in lengths)], device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        begin = (input_ids != PAD).int().argmax(dim=1)
        number = input_ids.gather(1, begin[:, None])[:, 0]
        at_end = input_ids.shape[1] - begin + 1 == self._ends[number]
        scores[:, END] = torch.where(at_end, torch.inf, -torch.inf)
        return scores


def plain(model: LanguageModel, task: Task, rows: int) -> list[int]:
    """Run fixed batches, each until all its answers have ended. Return how many tokens the answers take."""
    counts = []
    for at in range(0, len(task.ids), rows):
        ids = task.ids[at : at + rows]
        width = max(map(len, ids))
        batch = torch.tensor([[PAD] * (width - len(row)) + row for row in ids], device=model.model.device)
        done = model.model.generate(
            batch,
            attention_mask=(batch != PAD).long(),
            max_new_tokens=max(task.answers),
            do_sample=False,
            eos_token_id=END,
            pad_token_id=PAD,
        )
        counts += [row.index(END) + 1 for row in done[:, width:].tolist()]
    return counts


def ours(model: LanguageModel, task: Task, rows: int | None) -> list[int]:
    found = complete(model, task.prompts, Decoding(max(task.answers), batch=rows))
    return [completion.tokens for _, completion in sorted(found, key=lambda pair: pair[0].index)]


@dataclasses.dataclass(frozen=True, eq=False)
class Limited(Reader):
    """Ends answers where a task says, by the prompt."""

    limits: dict[tuple[int, ...], int] = dataclasses.field(default_factory=dict)

    def room(self, ids: list[int], max_tokens: int) -> int:
        return self.limits[tuple(ids)]


class Ending(Vllm):
    """vLLM whose answers end where `task` says."""

    task: "Task"

    def open(self, files: ModelFiles) -> dict:
        record = super().open(files)
        limits = {tuple(ids): count for ids, count in zip(self.task.ids, self.task.answers, strict=True)}
        own = {field.name: getattr(self._reader, field.name) for field in dataclasses.fields(Reader)}
        self._reader = Limited(**own | {"stop": ()}, limits=limits)
        return record


def by_vllm(engine: Ending, task: Task) -> list[int]:
    from vllm import SamplingParams

    engine._llm.reset_prefix_cache()
    limits = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False) for n in task.answers]
    found = engine._llm.generate([{"prompt_token_ids": ids} for ids in task.ids], limits, use_tqdm=False)
    return [len(output.outputs[0].token_ids) for output in found]


def swept(engine: Ending, task: Task, folder: Path, options: MergeOptions) -> list[int]:
    """Let a sweep's run answer, in a folder of its own."""
    with tempfile.TemporaryDirectory() as out:
        problems, template = Path(out, "problems.jsonl"), Path(out, "template")
        rows = [{"question": prompt.text, "answer": 1} for prompt in task.prompts]
        problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
        template.write_text("{{ question }}")
        sets = [open_problems(str(problems), n=0, seed=0, system=None, question_field=None, answer_field=None)]
        own = SweepFolder(str(Path(out, "sweep")))
        open_folder(own)
        models = Models(own, options, file_template(str(template)), {"base": ""}, engine)
        asked = Asked(own, Questions(sets, 1), Decoding(max(task.answers)), models, {}, False)
        run = Run("base", ModelReference.parse(str(folder)))
        return [its.tokens for its in answer(asked, run, ["base"]).values()]


def ended_by(model: LanguageModel, task: Task) -> None:
    """Let `task` end all answers that the model generates from now on."""
    generate = type(model.model).generate

    def ending(*arguments: object, logits_processor: list | None = None, **options: object) -> object:
        processors = transformers.LogitsProcessorList([task, *(logits_processor or [])])
        return generate(model.model, *arguments, logits_processor=processors, **options)

    model.model.generate = ending


def lengths(count: int) -> Iterator[tuple[int, int]]:
    pick = random.Random(0)
    for _ in range(count):
        yield pick.randint(40, 120), min(400, max(20, round(pick.lognormvariate(4.4, 0.8))))


def cpu_seconds() -> float:
    """The time on the CPU of this process and of those that it started: one grades."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(its.user + its.system for its in times)


def measure(
    model: LanguageModel, engine: Ending | None, task: Task, args: argparse.Namespace, folder: Path
) -> dict[str, list[float]]:
    ended_by(model, task)
    options = MergeOptions(device=args.device, quiet=True)
    sides = {
        "plain": lambda: plain(model, task, args.rows),
        "ours": lambda: ours(model, task, args.rows),
        "vllm": lambda: by_vllm(engine, task),
        "swept": lambda: swept(engine, task, folder, options),
    }
    if engine is not None:
        engine.task = task
        sides["swept"]()  # the engine starts, and so does the process that grades
    sides = {side: sides[side] for side in args.sides.split(",")}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    clock = cpu_seconds if args.busy else time.perf_counter
    for _ in range(args.rounds):
        for side, run in sides.items():
            begin = clock()
            counts = run()
            seconds[side].append(clock() - begin)
            if counts != task.answers:
                raise SystemExit(f"{side}: expected answers of the lengths that the task sets, found others")
            print(f"{side}: {seconds[side][-1]:.1f} s", file=sys.stderr)
    return seconds


def compare(
    model: LanguageModel, engine: Ending | None, args: argparse.Namespace, folder: Path
) -> dict[str, dict[str, list[float]]]:
    """Measure all sides at all tasks, and print what they took."""
    tasks = {"equal": [(EQUAL_PROMPT, EQUAL_ANSWER)] * args.rows, "mixed": list(lengths(args.problems))}
    results = {}
    print("| task | answers | tokens | side | seconds | times the first one's speed | tokens a second |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for which in args.only.split(","):
        task = Task(tasks[which], SHAPES[args.shape]["vocab"], model.model.device)
        results[which] = measure(model, engine, task, args, folder)
        taken = {side: statistics.median(seconds) for side, seconds in results[which].items()}
        tokens, first = sum(task.answers), next(iter(taken.values()))
        for side, seconds in taken.items():
            print(
                f"| {which} | {len(task.ids)} | {tokens} | {side} | {seconds:.1f} s | {first / seconds:.2f} | "
                f"{tokens / seconds:.0f} |",
                flush=True,
            )
        if {"vllm", "swept"} <= taken.keys():
            print(f"\n{which}: the sweep's own share is {taken['swept'] / taken['vllm'] - 1:.1%} of vLLM's time\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=16, help="how many run at once, on both sides (16)")
    parser.add_argument("--problems", type=int, default=64, help="how many the mixed task has (64)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--busy", action="store_true", help="use one thread and its time on the CPU: for a machine that others use, too"
    )
    parser.add_argument("--sides", default="plain,ours", help="some of plain,ours,vllm,swept (plain,ours)")
    parser.add_argument("--only", default="equal,mixed", help="some of equal,mixed")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.utils.logging.disable_progress_bar()
    if args.busy:
        torch.set_num_threads(1)
    shape, name = SHAPES[args.shape], f"random {args.shape}"
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), shape)
        tokenizer = load_tokenizer(name, folder, None, False)
        dtype = getattr(torch, args.dtype)
        model = load_model(name, folder, tokenizer, MergeOptions(device=args.device), dtype)
        engine = Ending(MergeOptions(), dtype, args.rows, {}) if {"vllm", "swept"} & {*args.sides.split(",")} else None
        results = compare(model, engine, args, Path(folder))
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args) | {"json": str(args.json)}, "seconds": results}))


if __name__ == "__main__":
    main()
