"""Problems, and a model or a server -> completions."""

import zlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import cast

from mergekit_fim.evaluate.answers.generation import LanguageModel, Prompt
from mergekit_fim.evaluate.answers.generation import complete as complete_by_model
from mergekit_fim.evaluate.answers.prompts import Template, messages
from mergekit_fim.evaluate.answers.server import Request, Server
from mergekit_fim.evaluate.answers.server import complete as complete_by_server
from mergekit_fim.evaluate.problems.questions import Questions
from mergekit_fim.evaluate.records import Key, Written

# Requests that a server has at a time, where nothing is said.
_PARALLEL = 8


@dataclass(frozen=True)
class Decoding:
    """How answers are made: `batch` rows or requests at a time, None for as many as will do; the others as options."""

    max_tokens: int
    temperature: float
    seed: int
    batch: int | None


def prompts(questions: Questions, keys: Iterable[Key], template: Template) -> list[Prompt]:
    """What a model is given.

    Raises:
        FimError: the template fails on one of the problems.
    """
    special = template.kind == "file"
    return [Prompt(*key, text=template.prompt(questions.problem(key)), special=special) for key in keys]


def by_model(
    model: LanguageModel, questions: Questions, keys: Iterable[Key], template: Template, decoding: Decoding
) -> Generator[Written]:
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
) -> Generator[Written]:
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
    return cast(Generator[Written], found)
