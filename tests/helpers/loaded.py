"""A process that has imported the libraries that mergekit builds on, and runs command lines of Python in its forks.

Importing these takes five seconds, and running one of our commands on a tiny model takes one. What runs in a fork is as
in a process of its own but for these imports: mergekit isn't imported yet, nor is this package, but for the hook.
What is read when Python starts, or by these libraries, is the process's: flags, PYTHONHASHSEED, MERGEKIT_FIM_DISABLE.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "transformers.models.llama.modeling_llama")
TIMEOUT = 600


class Loaded:
    """The process, seen from the tests."""

    def __init__(self, python: str | Path, folder: Path, *flags: str, **environment: str) -> None:
        self.folder = folder
        self.variables = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            [str(python), *flags, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment({}),
        )

    def run(
        self, *arguments: str, check: bool = True, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess:
        """Run what `python` would with these arguments: `-c` and code, `-m` and a module, or a script.

        Args:
            arguments: of the command line, without Python's flags.
            check: expect that it succeeds.
            env: variables to set.
            cwd: where to run it.
        """
        assert self.process.stdin
        assert self.process.stdout
        streams = {name: str(self.folder / name) for name in ("stdout", "stderr")}
        job = {"variables": self._environment(env or {}), "folder": str(cwd or Path.cwd()), "streams": streams}
        self.process.stdin.write(json.dumps(job | {"arguments": arguments}) + "\n")
        self.process.stdin.flush()
        status = json.loads(self.process.stdout.readline())
        done = subprocess.CompletedProcess(
            arguments, status, *(Path(path).read_text(encoding="utf-8") for path in streams.values())
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def _environment(self, variables: dict[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return kept | self.variables | variables

    def close(self) -> None:
        self.process.communicate(timeout=TIMEOUT)


def _forked() -> dict[str, Any] | None:
    """Answer jobs by forks until there are no more: in a fork its job, in the end nothing."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def _become(arguments: list[str], variables: dict[str, str], folder: str, streams: dict[str, str]) -> None:
    """Go on as Python does with a command line."""
    signal.alarm(TIMEOUT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(streams.values(), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    kind = arguments[0] if arguments[0] in ("-c", "-m") else ""
    what, *rest = arguments[1:] if kind else arguments
    sys.argv = [kind or what, *rest]
    sys.path[0] = "" if kind == "-c" else folder if kind else os.path.dirname(os.path.abspath(what))
    if kind == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(main))
    elif kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    # What transformers prepares on first use.
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    gc.freeze()  # or every collection in a fork goes through all of it, and copies it
    if (job := _forked()) is not None:
        _become(**job)
