"""What is asked of a sweep, checked and read: options -> problems, servers, and what its answers are of."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.config import MergeConfiguration

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.answers.prompts import Template
from mergekit_fim.evaluate.answers.server import Server, connect
from mergekit_fim.evaluate.problems.questions import Questions
from mergekit_fim.evaluate.problems.sources import open_problems
from mergekit_fim.evaluate.records import ProblemSet
from mergekit_fim.evaluate.runs.families import Run

LOG = logging.getLogger("mergekit_fim")


@dataclass(frozen=True)
class Wanted:
    """What a sweep is to be of, beside the merge config.

    Attributes:
        problems: the sources.
        n: how many problems of each; 0 for all.
        seed: of the problems that are drawn or made, of sampling, and of the bootstrap.
        system: what the models are told before the question.
        question_field: see `open_problems`; likewise `answer_field`.
        varied: each as NAME=V1,V2,...
        refine: further merges of each method and setting, of strengths that are found.
        compare: other merge methods.
        also: further models as they are.
        template: a file in Jinja, in place of the models' chat templates.
        max_tokens: that an answer may have.
        temperature: 0 for greedy decoding.
        samples: answers to each problem.
        batch: rows, or requests to a server, at a time; None for as many as will do.
        servers: each as RUN=URL, or URL for a run more.
        server_model: the model's name there; None for the only one.
        keep: which merges to keep: none, front or all.
        engine: auto, transformers or vllm.
        engine_args: vLLM's options, as NAME=VALUE,...
        mix_engines: whether a folder may have answers of several engines.
        margin: how much less accurate than the long model the run to keep may be.
    """

    problems: tuple[str, ...]
    n: int
    seed: int
    system: str | None
    question_field: str | None
    answer_field: str | None
    varied: tuple[str, ...]
    refine: int
    compare: tuple[str, ...]
    also: tuple[str, ...]
    template: str | None
    max_tokens: int
    temperature: float
    samples: int
    batch: int | None
    servers: tuple[str, ...]
    server_model: str | None
    keep: str
    engine: str
    engine_args: str | None
    mix_engines: bool
    margin: float


def check_options(wanted: Wanted) -> None:
    """Check what doesn't need the models.

    Raises:
        FimError: an option can't be what it is.
    """
    if not wanted.problems:
        raise FimError("--problems: expected a source of problems, found none; name one")
    for name, least in (("max_tokens", 1), ("samples", 1), ("seed", 0), ("batch", 1), ("refine", 0)):
        value = getattr(wanted, name)
        if value is not None and value < least:
            option = name.replace("_", "-")
            raise FimError(f"--{option}: expected a whole number of at least {least}, found {value}; change it")
    if not 0 <= wanted.temperature < float("inf"):
        raise FimError(f"--temperature: expected a finite number of at least 0, found {wanted.temperature}; change it")
    if not 0 <= wanted.margin < 1:
        raise FimError(f"--margin: expected a number of at least 0 and below 1, found {wanted.margin}; change it")
    if wanted.samples > 1 and wanted.temperature == 0:
        raise FimError(
            f"--samples: {wanted.samples} answers by greedy decoding would be the same; set a --temperature above 0"
        )


def read_questions(wanted: Wanted) -> Questions:
    """Read the problems, and warn of what a user should know of them.

    Raises:
        FimError: they can't be read, or none of a source can be graded.
    """
    return Questions([_problems(source, wanted) for source in dict.fromkeys(wanted.problems)], wanted.samples)


def _problems(source: str, wanted: Wanted) -> ProblemSet:
    found = open_problems(
        source,
        n=wanted.n,
        seed=wanted.seed,
        system=wanted.system,
        question_field=wanted.question_field,
        answer_field=wanted.answer_field,
    )
    for warning in found.warnings:
        LOG.warning("%s", warning)
    if len(found.ungradable) == len(found.problems):
        why = next(iter(found.ungradable.values()))
        raise FimError(f"{source}: expected problems that can be graded, found none ({why}); change their answers")
    return found


def connected(wanted: Wanted, runs: Sequence[str]) -> dict[str, Server]:
    """The servers, by the runs that they answer for, or are.

    Raises:
        FimError: one can't be reached, or is no run's.
    """
    found: dict[str, Server] = {}
    for text in wanted.servers:
        match = re.fullmatch(r"(?:(?P<run>.*?)=)?(?P<url>[A-Za-z]+://.*)", text, re.DOTALL)
        run, url = (match["run"], match["url"]) if match else (None, text)
        if run is not None and run not in runs:
            raise FimError(f"--server: expected one of the runs {', '.join(runs)}, found {run}; correct it")
        server = connect(url, wanted.server_model)
        name = run if run is not None else os.path.basename(server.model) or server.model
        if name in found or (run is None and name in runs):
            raise FimError(f"--server: {name} is answered by another already; write RUN={server.url} with another run")
        found[name] = server
    return found


def identity_of(
    config: MergeConfiguration,
    wanted: Wanted,
    questions: Questions,
    template: Template | None,
    as_they_are: Sequence[Run],
    fingerprints: Mapping[str, str],
) -> dict[str, Any]:
    """What must be the same for answers to be of the same sweep."""
    own = config.referenced_models()
    parameters = {name: value for name, value in (config.parameters or {}).items() if name != "fisher_cache"}
    return {
        "config": config.model_copy(update={"parameters": parameters or None}).to_yaml(),
        "models": {str(run.model): fingerprints[run.name] for run in as_they_are if run.model in own},
        "problems": [
            {"source": s.source, "problems": len(s.problems), "n": wanted.n, **s.description}
            for s in questions.problem_sets
        ],
        "system": wanted.system,
        "question_field": wanted.question_field,
        "answer_field": wanted.answer_field,
        "template": None if template is None else template.record | {"text": template.text},
        "seed": wanted.seed,
        "max_tokens": wanted.max_tokens,
        "temperature": wanted.temperature,
        "samples": wanted.samples,
    }
