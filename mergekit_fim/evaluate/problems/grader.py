"""Another process makes reasoning-gym's problems and grades answers; `served` is what runs there.

An answer is a model's text. It may be `9^9^9^9^9`, which no signal stops in every library, or code, which some scorers
of reasoning-gym evaluate. math-verify's own time limit works in the main thread only. And some of reasoning-gym's
problems depend on how Python hashes text, which is fixed when a process starts. A request is a line of JSON, and so is
its reply.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from typing import Any

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.problems import served
from mergekit_fim.evaluate.records import Grade

GRADING_SECONDS = 10  # for one answer, or one expected answer


class Grader:
    """The process, started when it is first asked, and again after it died. Threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, do: str, **request: Any) -> Any:
        """Have something done by the function of `served` that is called `do`; JSON carries request and result.

        Raises:
            EOFError: it took too long, or the process died of it, and so ended without a reply.
            FimError: it was refused, or the process can't be started.
        """
        line = b""
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with contextlib.suppress(OSError):
                    process.stdin.write(json.dumps({"do": do, "seconds": GRADING_SECONDS, **request}).encode() + b"\n")
                    process.stdin.flush()
                    line = process.stdout.readline()
            finally:  # also after Ctrl-C: the reply that is still to come must not be taken for the next one's
                if not line.endswith(b"\n"):
                    self.close()
        if not line.endswith(b"\n"):
            raise EOFError
        reply = json.loads(line)
        if "error" in reply:
            raise FimError(reply["error"])
        return reply["is"]

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                process.kill()
                with contextlib.suppress(OSError), process:  # closes its pipes, and waits for it
                    pass

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            code = f"import sys; sys.path[:] = {sys.path!r}; from {served.__name__} import serve; serve()"
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # math-verify's and reasoning-gym's noise
                env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # what is sent to this process's group must not look like a bad answer
            )
            assert self._process.stdout is not None
            if not self._process.stdout.readline():
                self.close()
                raise FimError(
                    f"the process that grades answers couldn't be started ({sys.executable}); check that this Python "
                    "can be run and has memory left"
                )
        return self._process


# One for the whole process: starting it takes seconds, and it remembers reasoning-gym's problems. It ends with us.
GRADER = Grader()
atexit.register(GRADER.close)


def why_ungradable(expected: str) -> str | None:
    """Say why math-verify can't grade answers against this one; None where it can."""
    try:
        return GRADER.ask("why_ungradable", expected=expected)
    except EOFError:
        return f"the expected answer couldn't be read within {_limits()}"


def carried_out(do: str, where: str, **request: Any) -> Any:
    """Have a problem made, or something done with inspect_ai; messages call it `where`.

    Raises:
        FimError: it was refused, takes too long, or needs too much memory.
    """
    try:
        return GRADER.ask(do, **request)
    except EOFError as error:
        raise FimError(
            f"{where}: expected to take at most {served.seconds_for(do)} seconds and {served.MEMORY >> 30} GB, found "
            "that it took more, or ended its process; free some memory, or take another task or configuration"
        ) from error


def grade(do: str, **request: Any) -> Grade:
    """Grade an answer; one that takes too long is wrong, and the note says so."""
    try:
        return Grade(**GRADER.ask(do, **request))
    except EOFError:
        return Grade(False, note=f"the answer couldn't be graded within {_limits()}")


def _limits() -> str:
    return f"{GRADING_SECONDS} seconds and {served.MEMORY >> 30} GB"
