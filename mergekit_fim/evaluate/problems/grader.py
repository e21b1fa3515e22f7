"""The process that makes reasoning-gym's problems and grades answers: what it is asked, it does or dies of.

A process of its own, because an answer is a model's, and may be `9^9^9^9^9`, which no signal stops in every library, or
code, which some of reasoning-gym's scorers evaluate; math-verify's own time limit works in the main thread only; and
some of reasoning-gym's problems depend on how Python hashes text, which is fixed when a process starts.

One line of JSON is a request, and one its reply.
"""

import atexit
import contextlib
import dataclasses
import faulthandler
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from mergekit_fim.errors import FimError, brief, reason
from mergekit_fim.evaluate.problems import grading
from mergekit_fim.evaluate.records import Grade

GRADING_SECONDS = 10  # for one answer, or one expected answer
MAKING_SECONDS = 60  # for one problem
MEMORY = 4 << 30  # bytes of address space, where the system knows such a limit

# What no scorer needs and code in an answer might, as Python's audit events have them.
_REFUSED = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "pty.", "signal.", "urllib.", "http.", "sqlite3.")
_IMPORTING = ("os.listdir", "os.scandir")


class EndedError(Exception):
    """The process ended instead of replying."""


class Grader:
    """A helper process, started when it is first asked. Threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, do: str, *, seconds: float, **request: Any) -> Any:
        """Have something done.

        Args:
            do: the name of a function in `_SERVED`.
            seconds: what grading in it may take.
            request: what it is given; values that JSON has.

        Returns:
            What it returns.

        Raises:
            EndedError: it took too long, or the process died of it. The next request starts another.
            FimError: it was refused.
        """
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps({"do": do, "seconds": seconds, **request}).encode() + b"\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = b""
            except BaseException:  # the reply that is still to come must not be taken for the next one's
                self._end()
                raise
            if not line.endswith(b"\n"):
                self._end()
                raise EndedError
        reply = json.loads(line)
        if "error" in reply:
            raise FimError(reply["error"])
        return reply["is"]

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
            environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # math-verify's and reasoning-gym's noise
                env=environment,
                start_new_session=True,  # what is sent to this process's group must not look like a bad answer
            )
            assert self._process.stdout is not None
            if not self._process.stdout.readline():
                self._end()
                raise FimError(
                    f"the process that grades answers couldn't be started ({sys.executable}); check that this Python "
                    "can be run and has memory left"
                )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError), process:  # closes its pipes, and waits for it
                pass


@functools.cache
def grader() -> Grader:
    """The one that this process has; it ends with it."""
    made = Grader()
    atexit.register(made.close)
    return made


def why_ungradable(expected: str) -> str | None:
    """As `grading.why_ungradable`, in a limited time."""
    try:
        return grader().ask("why_ungradable", seconds=GRADING_SECONDS, expected=expected)
    except EndedError:
        return f"the expected answer couldn't be read within {GRADING_SECONDS} seconds and {MEMORY >> 30} GB"


def grade(do: str, **request: Any) -> Grade:
    """Have the process grade an answer; what takes too long is wrong, and says so."""
    try:
        return Grade(**grader().ask(do, seconds=GRADING_SECONDS, **request))
    except EndedError:
        return Grade(
            False, note=f"the answer couldn't be graded within {GRADING_SECONDS} seconds and {MEMORY >> 30} GB"
        )


_seconds: float = GRADING_SECONDS  # what the request in hand may take of grading


def serve() -> None:
    """Be that process: reply to requests until there are no more."""
    global _seconds
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides what becomes of Ctrl-C
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the libraries print is no reply
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    sys.addaudithook(_audit)
    replies.write(b"ready\n")
    replies.flush()
    for line in requests:
        request = json.loads(line)
        _seconds = request.pop("seconds")
        try:
            reply = {"is": _SERVED[request.pop("do")](**request)}
        except FimError as error:
            reply = {"error": str(error)}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


_refusing = False
_refused = ""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Keep code in an answer from what it has no business with. No sandbox: what is meant to get out may get out."""
    global _refused
    if not _refusing:
        return
    writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if writes or (event.startswith(_REFUSED) and event not in _IMPORTING):
        _refused = event
        raise PermissionError(f"an answer may not do this: {event}")


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Let what takes longer end the process: a thread without Python's lock does, whatever the code is at."""
    faulthandler.dump_traceback_later(seconds, exit=True)  # its text goes nowhere, as all standard error
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """For an answer: limited in time, and in what code in it may do."""
    global _refusing, _refused
    sys.dont_write_bytecode = True
    with _limited(_seconds):
        _refusing, _refused = True, ""
        try:
            yield
        finally:
            _refusing = False


def _serve_why_ungradable(expected: str) -> str | None:
    import math_verify  # noqa: F401  (the limit is not for this)

    with _limited(_seconds):
        return grading.why_ungradable(expected)


def _serve_math(expected: str, answer: str) -> dict[str, Any]:
    import math_verify  # noqa: F401

    with _guarded():
        return dataclasses.asdict(grading.grade_math(expected, answer))


@functools.lru_cache(maxsize=8)
def _dataset(task: str, config: str, seed: int, size: int) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    where = f"reasoning-gym:{task}"
    if task not in DATASETS:
        import difflib

        close = difflib.get_close_matches(task, sorted(DATASETS)) or sorted(DATASETS)[:3]
        raise FimError(
            f"{where}: expected a task of reasoning-gym, found {brief(task)!r}; it has {len(DATASETS)}, such as "
            f"{', '.join(close)}"
        )
    with _limited(MAKING_SECONDS):
        try:
            return reasoning_gym.create_dataset(task, seed=seed, size=size, **json.loads(config))
        except Exception as error:  # assertions, type errors and others, by task
            raise FimError(
                f"{where}: expected a configuration that reasoning-gym takes, found {brief(config)} ({reason(error)}); "
                "see the task's Config class in reasoning-gym"
            ) from error


@functools.lru_cache(maxsize=4096)
def _entry(task: str, config: str, seed: int, size: int, index: int) -> Any:
    dataset = _dataset(task, config, seed, size)
    with _limited(MAKING_SECONDS):
        try:
            return dataset[index]
        except Exception as error:
            raise FimError(
                f"reasoning-gym:{task}: problem {index} of {size} couldn't be made with seed {seed} and "
                f"{brief(config)} ({reason(error)}); take another configuration, or another --seed"
            ) from error


def _serve_problem(index: int, **source: Any) -> dict[str, Any]:
    """A problem of reasoning-gym: its question, its answer if it has one, and why answers can't be graded, if so."""
    entry = _entry(**source, index=index)
    expected = entry["answer"]
    why = None
    if expected is not None and not _serve_score(str(expected), index, **source)["correct"]:
        why = "the expected answer isn't right for the task's own scorer"
    elif _serve_score(_NO_ANSWER, index, **source)["correct"]:
        why = "the task's own scorer takes anything for right"
    return {"question": str(entry["question"]), "answer": None if expected is None else str(expected), "why": why}


def _serve_score(answer: str, index: int, **source: Any) -> dict[str, Any]:
    import math_verify  # noqa: F401

    dataset, entry = _dataset(**source), _entry(**source, index=index)
    expected = entry["answer"]
    with _guarded():
        grade = grading.grade_by_scorer(
            lambda text: float(dataset.score_answer(text, entry)), None if expected is None else str(expected), answer
        )
    if _refused:
        grade = Grade(False, grade.found, f"the answer is code, which was kept from `{_refused}`")
    return dataclasses.asdict(grade)


_NO_ANSWER = "(no answer)"
_SERVED: dict[str, Callable[..., Any]] = {
    "why_ungradable": _serve_why_ungradable,
    "math": _serve_math,
    "problem": _serve_problem,
    "score": _serve_score,
}
