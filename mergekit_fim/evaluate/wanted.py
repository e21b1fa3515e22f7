"""What a sweep is asked for: its options, checked, with the problems, the servers, and the identity that they make."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.config import MergeConfiguration

from mergekit_fim.errors import FimError, require
from mergekit_fim.evaluate.answers.prompts import Template
from mergekit_fim.evaluate.answers.server import Server, connect
from mergekit_fim.evaluate.front.recommended import check_margin
from mergekit_fim.evaluate.problems.questions import Questions
from mergekit_fim.evaluate.problems.sources import open_problems, warnings_of

LOG = logging.getLogger("mergekit_fim")


@dataclass(frozen=True)
class Wanted:
    """The options of `mergekit-fim sweep`, whose help says what each is; `varied` is --set."""

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
    log: str | None


def check_options(wanted: Wanted) -> None:
    """Check what doesn't need the models.

    Raises:
        FimError: an option can't be what it is.
    """
    for name, least in (("max_tokens", 1), ("samples", 1), ("seed", 0), ("batch", 1), ("refine", 0)):
        value = getattr(wanted, name)
        if value is not None and value < least:
            option = name.replace("_", "-")
            raise FimError(f"--{option}: expected a whole number of at least {least}, found {value}; change it")
    if not 0 <= wanted.temperature < float("inf"):
        raise FimError(f"--temperature: expected a finite number of at least 0, found {wanted.temperature}; change it")
    if wanted.log is not None:
        require("inspect_ai", "inspect")
    check_margin(wanted.margin)
    if wanted.samples > 1 and wanted.temperature == 0:
        raise FimError(
            f"--samples: {wanted.samples} answers by greedy decoding would be the same; set a --temperature above 0"
        )


def read_questions(wanted: Wanted) -> Questions:
    """Read the problems, and warn of what a user should know of them.

    Raises:
        FimError: they can't be read, or none of a source can be graded.
    """
    options = {name: getattr(wanted, name) for name in ("n", "seed", "system", "question_field", "answer_field")}
    problem_sets = [open_problems(source, **options) for source in dict.fromkeys(wanted.problems)]
    for its in problem_sets:
        for warning in warnings_of(its):
            LOG.warning("%s", warning)
        if len(its.ungradable) == len(its.problems):
            raise FimError(
                f"{its.source}: expected problems that can be graded, found none "
                f"({next(iter(its.ungradable.values()))}); change their answers"
            )
    return Questions(problem_sets, wanted.samples)


def connected(wanted: Wanted, runs: Sequence[str]) -> dict[str, Server]:
    """Connect to the servers, each by the run that it answers for, or is.

    Raises:
        FimError: one can't be reached, or is no run's.
    """
    servers: dict[str, Server] = {}
    for text in wanted.servers:
        match = re.fullmatch(r"(?:(?P<run>.*?)=)?(?P<url>[A-Za-z]+://.*)", text, re.DOTALL)
        run, url = (match["run"], match["url"]) if match else (None, text)
        if run is not None and run not in runs:
            raise FimError(f"--server: expected one of the runs {', '.join(runs)}, found {run}; correct it")
        server = connect(url, wanted.server_model)
        name = run if run is not None else os.path.basename(server.model) or server.model
        if name in servers or (run is None and name in runs):
            raise FimError(f"--server: {name} is answered by another already; write RUN={server.url} with another run")
        servers[name] = server
    return servers


def identity_of(
    configs: Mapping[str, MergeConfiguration],
    wanted: Wanted,
    questions: Questions,
    template: Template | None,
    fingerprints: Mapping[str, str],
) -> dict[str, Any]:
    """Gather what must be the same for answers to be of the same sweep; the fingerprints are of the config's models."""
    texts = {}
    for path, config in configs.items():
        parameters = {name: value for name, value in (config.parameters or {}).items() if name != "fisher_cache"}
        texts[os.path.basename(path)] = config.model_copy(update={"parameters": parameters or None}).to_yaml()
    options = ("system", "question_field", "answer_field", "seed", "max_tokens", "temperature", "samples")
    return {
        **({"configs": texts} if len(texts) > 1 else {"config": next(iter(texts.values()))}),
        "models": dict(fingerprints),
        "problems": [
            {"source": s.source, "problems": len(s.problems), "n": wanted.n, **s.description}
            for s in questions.problem_sets
        ],
        "template": None if template is None else template.record | {"text": template.text},
        **{name: getattr(wanted, name) for name in options},
    }
