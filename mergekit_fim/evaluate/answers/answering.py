"""Problems, and a model or a server -> completions, and graded answers."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from mergekit_fim.evaluate.answers.generation import LanguageModel, Prompt
from mergekit_fim.evaluate.answers.generation import complete as complete_by_model
from mergekit_fim.evaluate.answers.prompts import Template, messages
from mergekit_fim.evaluate.answers.server import Request, Server
from mergekit_fim.evaluate.answers.server import complete as complete_by_server
from mergekit_fim.evaluate.problems.grading import final_answer
from mergekit_fim.evaluate.records import Answer, Completion, Grade, Key, Problem, ProblemSet

# Requests that a server has at a time, where nothing is said.
_PARALLEL = 8

# Of which answer, what was written, and what the model was given.
Written = tuple[Key, Completion, str]


@dataclass(frozen=True)
class Decoding:
    """How answers are made: `batch` rows or requests at a time, None for as many as will do; the others as options."""

    max_tokens: int
    temperature: float
    seed: int
    batch: int | None


@dataclass(frozen=True, eq=False)
class Questions:
    """All the problems of a sweep, each to be answered `samples` times."""

    problem_sets: Sequence[ProblemSet]
    samples: int

    @cached_property
    def keys(self) -> list[Key]:
        """Every answer that a run is to give, in order."""
        problems = (problem for problem_set in self.problem_sets for problem in problem_set.problems)
        return [(problem.source, problem.index, sample) for problem in problems for sample in range(self.samples)]

    @cached_property
    def _problems(self) -> dict[tuple[str, int], tuple[ProblemSet, Problem]]:
        return {
            (p.source, p.index): (problem_set, p) for problem_set in self.problem_sets for p in problem_set.problems
        }

    def problem(self, key: Key) -> Problem:
        """The problem that an answer is to."""
        return self._problems[key[:2]][1]

    def gradable(self, source: str | None = None) -> list[list[Key]]:
        """The problems of a source, or of all, whose answers can be graded: the keys [problem, sample]."""
        return [
            [(problem.source, problem.index, sample) for sample in range(self.samples)]
            for problem_set, problem in self._problems.values()
            if source in (None, problem.source) and problem.index not in problem_set.ungradable
        ]

    def graded(self, written: Written, seconds: float) -> Answer:
        """The answer in a completion that took so long."""
        key, completion, prompt = written
        problem_set, problem = self._problems[key[:2]]
        final, unclosed = final_answer(prompt, completion.text)
        if final is not None or problem.index in problem_set.ungradable:
            grade = problem_set.grade(problem, final or "")
        else:
            grade = Grade(False, note="it didn't end its thinking")
        return Answer(
            *key,
            prompt=prompt,
            text=completion.text,
            tokens=completion.tokens,
            ended=completion.ended,
            unclosed=unclosed,
            correct=grade.correct,
            found=grade.found,
            note=grade.note,
            seconds=round(seconds, 3),
        )


def prompts(questions: Questions, keys: Iterable[Key], template: Template) -> list[Prompt]:
    """What a model is given.

    Raises:
        FimError: the template fails on one of the problems.
    """
    special = template.kind == "file"
    return [Prompt(*key, text=template.prompt(questions.problem(key)), special=special) for key in keys]


def by_model(
    model: LanguageModel, questions: Questions, keys: Iterable[Key], template: Template, decoding: Decoding
) -> Iterator[Written]:
    """Have a model answer.

    Raises:
        FimError: see `generation.complete`.
    """
    for prompt, completion in complete_by_model(
        model,
        prompts(questions, keys, template),
        max_tokens=decoding.max_tokens,
        temperature=decoding.temperature,
        seed=decoding.seed,
        batch=decoding.batch,
    ):
        yield (prompt.source, prompt.index, prompt.sample), completion, prompt.text


def by_server(
    server: Server, questions: Questions, keys: Iterable[Key], template: Template | None, decoding: Decoding
) -> Iterator[Written]:
    """Have a server answer, by its own chat template where none is given.

    Raises:
        FimError: see `server.complete`.
    """

    def request(key: Key) -> Request:
        problem = questions.problem(key)
        seed = zlib.crc32(repr((decoding.seed, *key)).encode()) >> 1  # servers take 31 bits
        if template is not None:
            return Request(key, prompt=template.prompt(problem), seed=seed)
        return Request(key, messages=messages(problem), seed=seed)

    found = complete_by_server(
        server,
        map(request, keys),
        max_tokens=decoding.max_tokens,
        temperature=decoding.temperature,
        parallel=decoding.batch or _PARALLEL,
    )
    return cast(Iterator[Written], found)
