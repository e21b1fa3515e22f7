"""What runs in the process that `grader` starts: making problems, and grading answers. It does so or dies of it."""

import contextlib
import dataclasses
import faulthandler
import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from mergekit_fim.errors import FimError, brief, reason
from mergekit_fim.evaluate.problems import grading, inspect_log, inspect_tasks
from mergekit_fim.evaluate.records import Grade

MAKING_SECONDS = 60  # for one problem
LOADING_SECONDS = 3600  # for a task of inspect_ai's, which may fetch its data, or for a log
MEMORY = 4 << 30  # bytes of address space, where the system knows such a limit

# What no scorer needs and code in an answer might, as Python's audit events have them.
_REFUSED = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "pty.", "signal.", "urllib.", "http.", "sqlite3.")
_IMPORTING = ("os.listdir", "os.scandir")


def serve() -> None:
    """Reply to requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides what becomes of Ctrl-C
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no reply
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    import math_verify  # noqa: F401  (no answer's seconds are for this)

    sys.dont_write_bytecode = True  # or an import while an answer is graded would be refused
    guard = _Guard()
    sys.addaudithook(guard.audit)
    print("ready", file=replies, flush=True)
    do: dict[str, Callable[..., Any]] = {
        "why_ungradable": _why_ungradable,
        "math": lambda guard, **asked: guard.graded(grading.grade_math, **asked),
        "problem": _problem,
        "score": _score,
        "inspect_samples": lambda _, **asked: inspect_tasks.samples(**asked),
        "inspect_problem": lambda _, **asked: inspect_tasks.problem(**asked),
        "inspect_score": _inspect_score,
        "inspect_log": lambda _, **asked: inspect_log.write(**asked),
    }
    for line in requests:
        request = json.loads(line)
        guard.seconds, name = request.pop("seconds"), request.pop("do")
        _limit(seconds_for(name))
        try:
            reply = {"is": do[name](guard, **request)}
        except FimError as error:
            reply = {"error": str(error)}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(reply), file=replies, flush=True)


def seconds_for(do: str) -> int:
    """Tell how many seconds a request may take; grading has fewer."""
    return LOADING_SECONDS if do.startswith("inspect_") else MAKING_SECONDS


def _limit(seconds: float) -> None:
    """End the process after so many seconds from now: a thread without Python's lock does, whatever the code is at."""
    faulthandler.dump_traceback_later(seconds, exit=True)  # its text goes nowhere, as all standard error


class _Guard:
    """Limits an answer in time, and in what code in it may do. No sandbox: what is meant to get out may get out."""

    def __init__(self) -> None:
        self.seconds = 0.0  # what grading may take
        self.refused = ""  # what code in the last answer was kept from
        self._is_on = False

    def graded(self, grade: Callable[..., Grade], **request: Any) -> dict[str, Any]:
        """Grade an answer under guard. One with code that was kept from something is wrong."""
        _limit(self.seconds)
        self.refused, self._is_on = "", True
        try:
            found = grade(**request)
        finally:
            self._is_on = False
        if self.refused:
            found = Grade(False, found.found, f"the answer is code, which was kept from `{self.refused}`")
        return dataclasses.asdict(found)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Refuse what code in an answer has no business with, as Python tells of it."""
        if not self._is_on:
            return
        writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes or (event.startswith(_REFUSED) and event not in _IMPORTING):
            self.refused = event
            raise PermissionError(f"an answer may not do this: {event}")


def _why_ungradable(guard: _Guard, expected: str) -> str | None:
    _limit(guard.seconds)
    return grading.why_ungradable(expected)


@functools.lru_cache(maxsize=8)
def _dataset(task: str, config: str, seed: int, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=seed, size=size, **json.loads(config))


@functools.lru_cache(maxsize=4096)
def _entry(task: str, config: str, seed: int, size: int, index: int) -> tuple[Any, Any, str | None]:
    """Make a problem: reasoning-gym's dataset and entry, and the expected answer, if there is one."""
    try:
        dataset = _dataset(task, config, seed, size)
        entry = dataset[index]
    except Exception as error:  # assertions, type errors and others, by task
        raise FimError(
            f"reasoning-gym:{task}: expected a task and a configuration of reasoning-gym's, found {brief(config)}; "
            f"problem {index} of {size} couldn't be made with seed {seed} ({reason(error)}); change the task, its "
            "configuration, or --seed"
        ) from error
    return dataset, entry, None if entry["answer"] is None else str(entry["answer"])


def _problem(guard: _Guard, **asked: Any) -> dict[str, Any]:
    """Make a problem: its question, its answer if it has one, and why answers can't be graded, if so."""
    _, entry, expected = _entry(**asked)
    why = None
    if expected is not None and not _score(guard, expected, **asked)["correct"]:
        why = "the expected answer isn't right for the task's own scorer"
    elif _score(guard, inspect_tasks.NO_ANSWER, **asked)["correct"]:
        why = "the task's own scorer takes anything for right"
    return {"question": str(entry["question"]), "answer": expected, "why": why}


def _score(guard: _Guard, answer: str, **asked: Any) -> dict[str, Any]:
    dataset, entry, expected = _entry(**asked)

    def score(text: str) -> float:
        return float(dataset.score_answer(text, entry))

    return guard.graded(grading.grade_by_scorer, score=score, expected=expected, answer=answer)


def _inspect_score(guard: _Guard, index: int, answer: str, **task: Any) -> dict[str, Any]:
    inspect_tasks.ready(**task)
    return guard.graded(inspect_tasks.grade, index=index, answer=answer, **task)
