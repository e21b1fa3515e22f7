"""A run -> its answers, each in its file as soon as it is there. Only the process that holds the run may do this."""

import contextlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import tqdm

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.answers.engine import Decoding, Engine
from mergekit_fim.evaluate.answers.prompts import Prompt, Template, prompts
from mergekit_fim.evaluate.answers.server import Server
from mergekit_fim.evaluate.folder import (
    SweepFolder,
    append_answer,
    appended,
    note_run,
    read_answers,
    read_record,
    taken,
    write_answers,
)
from mergekit_fim.evaluate.models import Models
from mergekit_fim.evaluate.problems.questions import Questions
from mergekit_fim.evaluate.records import Answer, Completion, Key
from mergekit_fim.evaluate.runs.families import Run
from mergekit_fim.files import write_text
from mergekit_fim.measurements.record import versions

Answers = dict[Key, Answer]


@dataclass(frozen=True, eq=False)
class Asked:
    """What all runs of a sweep are asked, how, and where their answers go; the servers are by run."""

    folder: SweepFolder
    questions: Questions
    decoding: Decoding
    models: Models
    servers: Mapping[str, Server]
    mixes_engines: bool


def answers_so_far(asked: Asked, run: str) -> Answers:
    """Read what a run has answered.

    Raises:
        FimError: its file holds something else, or answers of a run that `sweep.json` doesn't know.
    """
    path = asked.folder.answers(run)
    answers = read_answers(path, asked.questions.keys)
    if answers and run not in (entry["run"] for entry in read_record(asked.folder)["runs"]):
        raise FimError(
            f"{path}: expected answers of a run in {asked.folder.record}, found some of one that isn't there; "
            "remove the file, and the run is answered anew"
        )
    return answers


def whole_answers(asked: Asked, run: str, patience: float = 0) -> Answers:
    """Read a run's answers; none where another process keeps it for so many seconds, or where one is missing."""
    with taken(asked.folder, run, patience) as free:
        answers = answers_so_far(asked, run) if free else {}
    return answers if len(answers) == len(asked.questions.keys) else {}


def answer(asked: Asked, run: Run, order: Sequence[str]) -> Answers:
    """Let a run answer what it hasn't answered yet, and return all its answers; `order` names the command's runs."""
    folder, keys = asked.folder, asked.questions.keys
    if run.config is not None:
        os.makedirs(os.path.dirname(folder.config(run.name)), exist_ok=True)
        write_text(folder.config(run.name), run.config.to_yaml() + "\n")
    answers = answers_so_far(asked, run.name)
    missing = [key for key in keys if key not in answers]
    if missing:
        engine, template, entry = _opened(asked, run)
        with contextlib.closing(engine):
            asked_for = prompts(asked.questions, missing, template)
            with contextlib.closing(engine.answers(asked_for, asked.decoding)) as completions:
                _note(asked, run, entry, order, begun=bool(answers))
                _grade(asked, run.name, completions, answers)
    if list(answers) != keys:  # they are in the order in which they came
        answers = {key: answers[key] for key in keys}
        write_answers(folder.answers(run.name), list(answers.values()))
    return answers


def _opened(asked: Asked, run: Run) -> tuple[Engine, Template | None, dict[str, Any]]:
    """Open a run's model. Tell by which engine, how it is asked, and what the record is to have of it."""
    models, server = asked.models, asked.servers.get(run.name)
    if server is not None:
        of = {"server": server.url, "model": server.model}
        return server, models.template, {"of": of, "template": models.template and models.template.record}
    if run.config is not None:
        of = {"config": run.config.to_yaml()}
    else:
        of = {"model": str(run.model), "fingerprint": models.fingerprints[run.name]}
    template = models.template_of(run)
    opened = models.engine.open(models.files(run))
    return models.engine, template, {"of": of, "template": template.record, **opened}


def _note(asked: Asked, run: Run, entry: Mapping[str, Any], order: Sequence[str], *, begun: bool) -> None:
    """Write down what a run is of, before its first answer; its answers so far must be of the same."""
    folder, engine = asked.folder, entry.get("engine")
    earlier = read_record(folder)["runs"]
    # Servers have no engine here, and some runs have none written down.
    others = [its for its in earlier if its.get("engine", engine) != engine]
    if engine is not None and others and not asked.mixes_engines:
        raise FimError(
            f"{folder.record}: expected runs of one engine, found {others[0]['run']} by {others[0]['engine']}, "
            f"now {engine}; answer in another folder, or pass --mix-engines"
        )
    old: dict[str, Any] = next((its for its in earlier if its["run"] == run.name), {})
    for name, what in (("of", "model"), ("template", "template")):
        if begun and old.get(name) != entry[name]:
            raise FimError(
                f"{folder.answers(run.name)}: expected answers of the same model by the same template, found some "
                f"whose {what} was {old.get(name)}, now {entry[name]}; remove the file, and the run is answered anew"
            )
    own = {"run": run.name, "method": run.method, "settings": dict(run.settings)}
    own |= {"answers": os.path.relpath(folder.answers(run.name), folder.path), "versions": versions()}
    note_run(folder, {**old, **own, **entry}, order)


def _grade(asked: Asked, run: str, completions: Iterable[tuple[Prompt, Completion]], answers: Answers) -> None:
    """Grade what is written, add it to the run's file and to its answers, and show how far the run is."""
    total, quiet = len(asked.questions.keys), asked.models.options.quiet
    bar = tqdm.tqdm(total=total, initial=len(answers), desc=run, unit="answer", disable=quiet)
    with bar, appended(asked.folder.answers(run)) as file:
        started = time.perf_counter()
        for prompt, completion in completions:
            answer = asked.questions.graded((prompt.key, completion, prompt.text), time.perf_counter() - started)
            append_answer(file, answer)
            answers[answer.source, answer.index, answer.sample] = answer
            graded = [its.correct for its in answers.values() if its.correct is not None]
            accuracy = f"accuracy {fmean(graded):.2f}, " if graded else ""
            length = fmean(its.tokens for its in answers.values())
            bar.set_postfix_str(f"{accuracy}{length:.0f} tokens", refresh=False)
            bar.update()
            started = time.perf_counter()
