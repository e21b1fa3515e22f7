"""A pair and its problems -> the answers of base, long model and every variant, at strengths chosen as they come.

Whatever was answered is kept, answer by answer; a run that stops goes on where it was. The strengths are found, not
given: where a merge turns from one model to the other, and how fast, is different for every method, so each gets the
same number of merges, and each of these goes to the widest gap that is left on its way from base to long.
"""

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import tqdm
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM

from benchmarks.evidence.variants import Variant
from benchmarks.pairs.recipes import Kind, core_seconds, note, noted
from benchmarks.pairs.training import layer_of
from mergekit_fim.evaluate.answering import Decoding, Questions, by_model
from mergekit_fim.evaluate.findings import outcomes
from mergekit_fim.evaluate.folder import append_answer, file_name, read_answers
from mergekit_fim.evaluate.front import Outcomes
from mergekit_fim.evaluate.generation import load_model, load_tokenizer
from mergekit_fim.evaluate.problems import open_problems
from mergekit_fim.evaluate.prompts import chat_template
from mergekit_fim.evaluate.records import Answer, Key
from mergekit_fim.evaluate.refine import Point, next_strength
from mergekit_fim.norms import squared_distance, squared_norm
from mergekit_fim.prepass import measured_once
from mergekit_fim.tools.plan import merge_whole

RUNS = 8  # merges of a variant
ROWS = 128  # a small model's at once: 1.4 times as fast as 32
OPTIONS = MergeOptions(quiet=True, write_model_card=False)


class Pair:
    """A pair under test.

    Args:
        folder: where it is made; answers and signals are kept there too.
        kind: its recipe.
        n: problems, of all sources together.
    """

    def __init__(self, folder: Path, kind: Kind, n: int) -> None:
        self.folder, self.kind = folder, kind
        sources = kind.problems(folder, n)
        self.questions = Questions([open_problems(source, n=n // len(sources), seed=SEED) for source in sources], 1)
        self.answers = folder / "answers"
        self.answers.mkdir(exist_ok=True)
        with measured_once():
            self.base, self.long = (self._run(name, folder / name) for name in ("base", "long"))

    def ends(self) -> dict[str, Point]:
        """Where base and long came out."""
        return {"base": Point.of(0.0, self.base.values()), "long": Point.of(1.0, self.long.values())}

    def end_outcomes(self) -> tuple[Outcomes, Outcomes]:
        """Their answers."""
        return self.outcomes("base", None, None, self.base), self.outcomes("long", None, None, self.long)

    def front(self, name: str, variant: Variant, runs: int) -> list[Outcomes]:
        """The runs of a variant, by strength."""
        return self._front(name, variant, runs, known=False)

    def known(self, name: str, variant: Variant, runs: int) -> list[Outcomes]:
        """Those of a variant that has been run; none where it hasn't."""
        return self._front(name, variant, runs, known=True)

    def _front(self, name: str, variant: Variant, runs: int, known: bool) -> list[Outcomes]:
        found: dict[float, dict[Key, Answer]] = {}
        while len(found) < runs and (strength := self._next(variant, found)) is not None:
            run = f"{name} @{strength:.5f}"
            if known and len(self._answered(run)) < len(self.questions.keys):
                return []
            found[strength] = self._run(run, variant.config, strength)
        return [self.outcomes(f"{name} @{s:.5f}", name, s, answers) for s, answers in sorted(found.items())]

    def _answered(self, run: str) -> dict[Key, Answer]:
        return read_answers(str(self._path(run)), self.questions.keys)

    def _path(self, run: str) -> Path:
        return self.answers / f"{file_name(run)}.jsonl"

    def _next(self, variant: Variant, found: Mapping[float, Mapping[Key, Answer]]) -> float | None:
        if not variant.ends_long and variant.high not in found:
            return variant.high
        base, long = Point.of(0.0, self.base.values()), Point.of(variant.high, self.long.values())
        points = [base, *(Point.of(value, answers.values()) for value, answers in found.items())]
        return next_strength([*points, *([long] if variant.ends_long else [])], base, long)

    def _run(self, name: str, model, strength: float | None = None) -> dict[Key, Answer]:
        """The answers of a model's folder, or of a merge by a variant's config."""
        path, answers, began = self._path(name), self._answered(name), time.time()
        missing = [key for key in self.questions.keys if key not in answers]
        if not missing:
            return answers
        with contextlib.ExitStack() as stack:
            folder = model
            if strength is not None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=SCRATCH))) / "merged"
                with contextlib.redirect_stdout(io.StringIO()):
                    merge_whole(model(self.folder, strength), None, str(folder), OPTIONS)
            tokenizer = load_tokenizer(name, str(folder), None, False)
            loaded = load_model(name, str(folder), tokenizer, OPTIONS, torch.float32)
            decoding = Decoding(self.kind.max_tokens, 0.0, 0, ROWS)
            written = by_model(loaded, self.questions, missing, chat_template(name, tokenizer), decoding)
            bar = tqdm.tqdm(written, total=len(missing), desc=f"{self.folder.name}: {name}", leave=False)
            with open(path, "ab") as file:
                for its in bar:
                    answer = self.questions.graded(its, 0.0)
                    append_answer(file, answer)
                    answers[answer.source, answer.index, answer.sample] = answer
            nats = prose(loaded.model, tokenizer) if self.kind.prose else None
        note(self.folder, run=name, seconds=core_seconds(began), nats=nats)
        point = Point.of(strength or 0.0, answers.values())
        print(f"{self.folder.name}: {name}: {point.accuracy:.3f} @ {point.tokens:.1f}", flush=True)
        return answers

    def prose(self) -> dict[str, float]:
        """What an unrelated text costs every model that was asked, in nats a token."""
        return {line["run"]: line["nats"] for line in noted(self.folder) if line["nats"] is not None}

    def outcomes(
        self, name: str, method: str | None, strength: float | None, answers: Mapping[Key, Answer]
    ) -> Outcomes:
        """Answers as statistics take them."""
        settings = {} if strength is None else {"strength": strength}
        run = {"run": name, "method": method, "settings": settings}
        return outcomes(run, answers, self.questions.gradable())


def distance(pair: Path) -> float:
    """‖δ‖ / ‖θ0‖ of a pair's decoder layers."""
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
    """What an unrelated text costs a model, in nats a token: Verne's, which reasoning-gym carries."""
    import reasoning_gym

    path = Path(reasoning_gym.__file__).parent / "data" / "in_the_year_2889.txt"
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, 1000:1768]
    return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


SEED = 1_000_000  # of the problems of reasoning-gym
SCRATCH = "/dev/shm" if os.path.isdir("/dev/shm") else None
