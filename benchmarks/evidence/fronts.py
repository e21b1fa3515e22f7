"""A pair and its problems -> the answers of base, long model and every variant, at strengths chosen as they come.

A run's answers are kept once they are all there. After a stop the same command goes on at the next run.

The strengths are found, not given. Every method turns from one model to the other at another strength, and at another
pace. So each method gets the same number of merges, and each merge goes to the widest gap that is left on the way from
base to long.
"""

import contextlib
import functools
import io
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tqdm
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from benchmarks.evidence.answers import MODELS, Answers
from benchmarks.evidence.variants import Variant
from benchmarks.pairs.recipes import Kind, core_seconds, note, noted
from benchmarks.pairs.training import layer_of
from mergekit_fim.evaluate.answers.engine import Decoding
from mergekit_fim.evaluate.answers.generation import complete
from mergekit_fim.evaluate.answers.loading import LanguageModel, load_model
from mergekit_fim.evaluate.answers.prompts import chat_template, prompts
from mergekit_fim.evaluate.answers.tokens import load_tokenizer
from mergekit_fim.evaluate.folder import file_name, read_answers, write_answers
from mergekit_fim.evaluate.front.bootstrap import Outcomes
from mergekit_fim.evaluate.front.gathered import gather
from mergekit_fim.evaluate.problems.questions import Questions
from mergekit_fim.evaluate.problems.sources import open_problems
from mergekit_fim.evaluate.records import Answer, Grade, Key, Problem, row_of
from mergekit_fim.evaluate.runs.refine import Point, next_strength
from mergekit_fim.norms import squared_distance, squared_norm
from mergekit_fim.tools.whole import merge_whole

RUNS = 8  # merges of a variant
ROWS = 200  # answers at once: all of a small model's, in three quarters of the time of 128
WHOLE = re.compile(r"0|-?[1-9][0-9]{0,8}")  # a whole number that can be written in one way only
OPTIONS = MergeOptions(quiet=True, write_model_card=False)

ByKey = Mapping[Key, Answer]


class Pair:
    """A pair under test.

    Args:
        folder: where the pair is; answers and signals are kept there, too.
        kind: its recipe.
        n: how many problems, of all sources together.
    """

    def __init__(self, folder: Path, kind: Kind, n: int) -> None:
        self.folder, self.kind = folder, kind
        sources = kind.problems(folder, n)
        asked = [open_problems(source, n=n // len(sources), seed=SEED) for source in sources]
        self.questions = Questions([replace(its, grade=quickly(its.grade)) for its in asked], 1)
        self.folder_of_answers = folder / "answers"
        self.folder_of_answers.mkdir(exist_ok=True)
        self._known: dict[str, ByKey] = {}
        self.models = {
            name: self._run(name, functools.partial(self._loaded, name)) for name in MODELS if (folder / name).exists()
        }

    def front(self, name: str, variant: Variant, runs: int) -> list[Outcomes]:
        """Run a variant, and return its runs by strength."""
        return self._front(name, variant, runs, known=False)

    def known(self, name: str, variant: Variant, runs: int) -> list[Outcomes]:
        """Return the runs of a variant that has been run; none if it hasn't."""
        return self._front(name, variant, runs, known=True)

    def answers(self, fronts: Mapping[str, list[Outcomes]]) -> Answers:
        """Return all that statistics take: the answers of the models, and of some variants' runs."""
        models = {name: self._outcomes(name, None, None, its) for name, its in self.models.items()}
        prose = {line["run"]: line["nats"] for line in noted(self.folder) if line["nats"] is not None}
        return Answers(models, fronts, prose)

    def _front(self, name: str, variant: Variant, runs: int, known: bool) -> list[Outcomes]:
        found: dict[float, ByKey] = {}
        while len(found) < runs and (strength := self._next(variant, found)) is not None:
            run = f"{name} @{strength:.5f}"
            if known and len(self._answered(run)) < len(self.questions.keys):
                return []
            found[strength] = self._run(run, functools.partial(self._merged, run, variant, strength), strength)
        return [self._outcomes(f"{name} @{s:.5f}", name, s, answers) for s, answers in sorted(found.items())]

    def _next(self, variant: Variant, found: Mapping[float, ByKey]) -> float | None:
        if not variant.ends_long and variant.high not in found:
            return variant.high
        base = Point.of(0.0, self.models["base"].values())
        long = Point.of(variant.high, self.models["long"].values())
        points = [base, *(Point.of(value, answers.values()) for value, answers in found.items())]
        return next_strength([*points, *([long] if variant.ends_long else [])], base, long)

    def _path(self, run: str) -> Path:
        return self.folder_of_answers / f"{file_name(run)}.jsonl"

    def _answered(self, run: str) -> ByKey:
        if run not in self._known and (found := read_answers(str(self._path(run)), self.questions.keys)):
            self._known[run] = found
        return self._known.get(run, {})

    def _run(self, name: str, load: Callable[[], LanguageModel], strength: float | None = None) -> ByKey:
        """Return a model's answers, and keep them once they are all there."""
        if len(found := self._answered(name)) == len(self.questions.keys):
            return found
        began = time.time()
        loaded = load()
        asked = prompts(self.questions, self.questions.keys, chat_template(name, loaded.tokenizer))
        completions = complete(loaded, asked, Decoding(self.kind.max_tokens, batch=ROWS))
        bar = tqdm.tqdm(completions, total=len(self.questions.keys), desc=f"{self.folder.name}: {name}", leave=False)
        graded = [self.questions.graded((prompt.key, its, prompt.text), 0.0) for prompt, its in bar]
        nats = prose(loaded.model, loaded.tokenizer) if self.kind.prose else None
        write_answers(str(self._path(name)), graded)
        note(self.folder, run=name, seconds=core_seconds(began), nats=nats)
        point = Point.of(strength or 0.0, graded)
        print(f"{self.folder.name}: {name}: {point.accuracy:.3f} @ {point.tokens:.1f}", flush=True)
        self._known[name] = {(its.source, its.index, its.sample): its for its in graded}
        return self._known[name]

    def _loaded(self, name: str) -> LanguageModel:
        """Load one of the pair's models."""
        folder = str(self.folder / name)
        return load_model(name, folder, load_tokenizer(name, folder, None, False), OPTIONS, self.kind.dtype)

    def _merged(self, run: str, variant: Variant, strength: float) -> LanguageModel:
        """Make a merge. It takes its tokenizer from the base, as mergekit's merges do."""
        made = variant.merged(self.folder, strength)
        model = self._by_mergekit(run, made) if isinstance(made, MergeConfiguration) else made
        model.to(self.kind.dtype).eval()
        model.generation_config = GenerationConfig()
        return self._as_base(name=run, model=model)

    @functools.cached_property
    def _as_base(self) -> functools.partial[LanguageModel]:
        """Return how to run a model of the base's architecture, without holding the base's weights."""
        base = self._loaded("base")
        names = ("tokenizer", "stop", "context", "vocabulary", "joins", "pads", "row_bytes", "token_bytes")
        return functools.partial(LanguageModel, **{name: getattr(base, name) for name in names})

    def _by_mergekit(self, run: str, config: MergeConfiguration) -> PreTrainedModel:
        with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch, contextlib.redirect_stdout(io.StringIO()):
            folder = str(Path(scratch) / "merged")
            merge_whole(config, None, folder, OPTIONS)
            return load_model(run, folder, self._as_base.keywords["tokenizer"], OPTIONS, self.kind.dtype).model

    def _outcomes(self, name: str, method: str | None, strength: float | None, answers: ByKey) -> Outcomes:
        settings = {} if strength is None else {"strength": strength}
        run = {"run": name, "method": method, "settings": settings}
        rows = (row_of(run, answers[key]) for key in self.questions.gradable())
        return gather({name: rows}).outcomes[0]


def quickly(grade: Callable[[Problem, str], Grade]) -> Callable[[Problem, str], Grade]:
    """Give the same grades, but ask the process that grades less often.

    A front's merges give the same answers over and over. Most are whole numbers where a whole number is expected.
    """

    def found(problem: Problem, answer: str) -> Grade:
        its = answer.strip()
        # The tasks of reasoning-gym have scorers of their own.
        if problem.source.startswith("reasoning-gym:") or not (
            WHOLE.fullmatch(problem.answer) and WHOLE.fullmatch(its)
        ):
            return grade(problem, answer)
        return Grade(its == problem.answer, its)

    return functools.cache(found)


def distance(pair: Path) -> float:
    """Return ‖δ‖ / ‖θ0‖ of a pair's decoder layers."""
    base, long = (
        dict(AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.float32).named_parameters())
        for name in ("base", "long")
    )
    layers = [name for name in base if layer_of(name) is not None]
    with torch.no_grad():
        moved = sum(squared_distance(long[name], base[name]) for name in layers)
        size = sum(float(squared_norm(base[name])) for name in layers)
    return (moved / size) ** 0.5


@torch.inference_mode()
def prose(model: Any, tokenizer: Any) -> float:
    """Return what an unrelated text costs a model, in nats a token. The text is Verne's; reasoning-gym carries it."""
    import reasoning_gym

    path = Path(reasoning_gym.__file__).parent / "data" / "in_the_year_2889.txt"
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, 1000:1768]
    return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


SEED = 1_000_000  # the seed of the problems of reasoning-gym
SCRATCH = "/dev/shm" if os.path.isdir("/dev/shm") else None
