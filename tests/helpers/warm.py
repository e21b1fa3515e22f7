"""A process that has imported everything, and runs commands in forks of itself, with faults on order.

Importing torch and mergekit takes seconds, a command on a tiny model a fraction of one. `python warm.py` reads a list
of commands as a line of JSON, runs them at the same time, each in a fork, and answers with a line of JSON.
"""

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Calls that make, fill, name or remove files; and the modules from which our own files are written.
FILES = {"fsync", "replace", "rename", "mkdir", "remove", "unlink", "serialize_file", "open", "write"}
WRITERS = ("mergekit_fim/files.py", "mergekit_fim/report/record.py", "json/__init__.py")
ANSWERS = "evaluate/folder.py"  # from which answers are written
TIMEOUT = 180


@dataclass(frozen=True)
class Outcome:
    """How a command ended, by itself: `status` is negative where a signal ended it, `calls` counts kinds of calls."""

    status: int
    stdout: str
    stderr: str
    calls: dict[str, int]


class Warm:
    """The process, seen from the tests."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MERGEKIT_FIM_")}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**kept, "OMP_NUM_THREADS": "1", **environment},
        )

    def together(self, *jobs: dict[str, Any]) -> list[Outcome]:
        """Run commands at the same time. One that doesn't end is an error, whatever was to be seen of it."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        outcomes = json.loads(self.process.stdout.readline())
        assert not any(outcome.pop("timed_out") for outcome in outcomes), jobs
        return [Outcome(**outcome) for outcome in outcomes]

    def run(self, *arguments: str, **job: Any) -> Outcome:
        """Run one command: its name, its arguments, and keywords of `_child`."""
        return self.together({"arguments": [str(a) for a in arguments], **job})[0]

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=TIMEOUT)


def _main(folder: Path) -> None:
    import mergekit.scripts.run_yaml
    import torch
    import transformers

    import mergekit_fim.cli
    import mergekit_fim.evaluate.sweep
    import mergekit_fim.tools.export
    import mergekit_fim.tools.whole

    # What transformers prepares on first use, half a second of each fork's otherwise.
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    for name in ("transformers.models.llama.modeling_llama", "matplotlib.backends.backend_agg", "scipy.stats"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    gc.freeze()  # or every collection in a fork goes through all of it, and copies it
    commands = {"mergekit-yaml": mergekit.scripts.run_yaml.main, "mergekit-fim": mergekit_fim.cli.main}
    for line in sys.stdin:
        running = []
        for i, job in enumerate(json.loads(line)):
            name = folder / f"warm-{i}"
            pid = os.fork()
            if pid == 0:
                _child(name, commands, **job)
            running.append((name, pid))
        print(json.dumps([_outcome(name, pid) for name, pid in running]), flush=True)


def _outcome(name: Path, pid: int) -> dict[str, Any]:
    descriptor = os.pidfd_open(pid)
    timed_out = not select.select([descriptor], [], [], TIMEOUT)[0]
    if timed_out:
        os.kill(pid, signal.SIGKILL)
    os.close(descriptor)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = {s: name.with_suffix(f".{s}").read_text(encoding="utf-8") for s in ("stdout", "stderr")}
    counts = name.with_suffix(".calls")
    calls = json.loads(counts.read_text()) if counts.exists() else {}
    return {"status": status, **texts, "calls": calls, "timed_out": timed_out}


def _child(
    name: Path,
    commands: dict[str, Any],
    arguments: list[str],
    environment: dict[str, str] | None = None,
    count: bool = False,
    fault: tuple[str, int, int] | None = None,
    memory: int | None = None,
    file_size: int | None = None,
    code: str | None = None,
    offline: bool = False,
    folder: str | None = None,
) -> None:
    """Run a command and end.

    Args:
        name: of the files that take its output, without an ending.
        commands: what can be run.
        arguments: the command's name and its arguments.
        environment: variables to set.
        count: count the calls.
        fault: a kind of calls, a number and a signal, which the process sends itself before that call.
        memory: bytes of address space that it may take beyond what it has.
        file_size: bytes that a file may have.
        code: Python to run before the command.
        offline: end at the first attempt to reach another machine.
        folder: where to run it.
    """
    status = 70
    try:
        for stream, number in (("stdout", 1), ("stderr", 2)):
            opened = os.open(name.with_suffix(f".{stream}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, number)
        name.with_suffix(".calls").unlink(missing_ok=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(environment or {})
        os.chdir(folder or os.getcwd())
        if offline:
            _forbid_network()
        if memory is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        if code is not None:
            exec(compile(code, "<code>", "exec"), {})
        calls = {"all": 0, "file": 0, "own": 0, "answers": 0}
        if count or fault:
            sys.setprofile(_profiler(calls, fault))
        try:
            commands[arguments[0]].main(arguments[1:], prog_name=arguments[0])
        finally:
            sys.setprofile(None)
            if count:
                name.with_suffix(".calls").write_text(json.dumps(calls))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        status = 1  # first: where memory is short, printing fails, too
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _profiler(calls: dict[str, int], fault: tuple[str, int, int] | None) -> Any:
    kind, at, number = fault or ("", -1, 0)

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event not in ("call", "c_call"):
            return
        now = ["all"]
        if event == "c_call" and argument.__name__ in FILES:
            now.append("file")
            if frame.f_code.co_filename.endswith(WRITERS):
                now.append("own")
            if frame.f_code.co_filename.endswith(ANSWERS):
                now.append("answers")
        for name in now:
            calls[name] += 1
        if kind in now and calls[kind] == at:
            os.kill(os.getpid(), number)

    return profile


def _forbid_network() -> None:
    def refuse(*arguments: Any) -> None:
        os.write(2, f"NETWORK {arguments[1:]}\n".encode())
        os._exit(77)

    def refuse_lookup(*arguments: Any, **_options: Any) -> None:
        refuse(None, *arguments)

    for method in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, method, refuse)
    socket.getaddrinfo = refuse_lookup
    socket.create_connection = refuse_lookup


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
