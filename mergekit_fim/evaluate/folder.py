"""The folder of a sweep: what it is of, and every run's answers, each kept as soon as it is there."""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mergekit_fim.errors import FimError, brief, misfit, require
from mergekit_fim.evaluate.records import Answer, Key
from mergekit_fim.files import PART, read_json, write_json, written_whole

FORMAT, VERSION = "mergekit-fim/sweep", 1
_LOCK, _RECORD_LOCK = ".lock", ".record.lock"  # of a sweep, and of what is written to sweep.json


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep's files are."""

    path: str

    @property
    def record(self) -> str:
        """What the sweep is of, and what came out."""
        return os.path.join(self.path, "sweep.json")

    def answers(self, run: str) -> str:
        """A run's answers."""
        return os.path.join(self.path, "answers", f"{file_name(run)}.jsonl")

    def config(self, run: str) -> str:
        """A merge's config."""
        return os.path.join(self.path, "configs", f"{file_name(run)}.yml")

    def model(self, run: str) -> str:
        """A merged model."""
        return os.path.join(self.path, "models", file_name(run))


def file_name(run: str) -> str:
    """A run's name as a file's: the same where it can be, and never that of another run."""
    plain = run.replace(" ", "_")
    safe = re.sub(r"[^A-Za-z0-9._=,+-]", "-", plain).lstrip(".")[:100]
    return safe if safe == plain else f"{safe}-{zlib.crc32(run.encode('utf-8', 'replace')):08x}"


@contextlib.contextmanager
def opened(folder: SweepFolder, identity: Mapping[str, Any]) -> Iterator[None]:
    """A sweep's folder, new or gone on with, in which no other sweep is under way meanwhile.

    Args:
        folder: the folder.
        identity: what the sweep is of, in JSON's types: with other values the answers so far aren't its.

    Raises:
        FimError: it can't be made or written to, is of something else, of another sweep, or in use.
    """
    require("filelock", "sweep")
    import filelock

    path = folder.path
    if not path:
        raise FimError("expected the name of a folder for the sweep, found an empty one; name one")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise FimError(f"{path}: expected a folder for the sweep, found a file; name another")
    with writing(path):
        names = os.listdir(path) if os.path.isdir(path) else []
        others = [name for name in names if name not in (_LOCK, _RECORD_LOCK) and not name.endswith(PART)]
        if others and "sweep.json" not in others:
            raise FimError(
                f"{path}: expected an empty folder or one of a sweep, found {brief(sorted(others)[0])} and no "
                "sweep.json; name another"
            )
        os.makedirs(os.path.join(path, "answers"), exist_ok=True)
        lock = filelock.FileLock(os.path.join(path, _LOCK), timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise FimError(f"{path}: another process is at this sweep; wait until it has ended, or stop it") from None
    with lock:
        earlier_runs(folder, identity)
        if "sweep.json" not in others:
            write_record(folder, identity, {"runs": []})
        yield


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Whatever can't be written meanwhile, of `path` unless it says otherwise, in one line."""
    try:
        yield
    except OSError as error:
        raise FimError(
            f"{error.filename or path}: can't be written ({error.strerror or error}); free some space, or write "
            "elsewhere: the answers so far are kept, and the same command goes on"
        ) from error


def write_record(folder: SweepFolder, identity: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Write `sweep.json`.

    Raises:
        FimError: it can't be written.
    """
    write_json(folder.record, {"format": FORMAT, "version": VERSION, "identity": identity, **content})


def note_run(folder: SweepFolder, identity: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    """Add a run to `sweep.json`, or replace it there; other processes of the sweep may be at that too.

    Raises:
        FimError: it can't be read or written.
    """
    import filelock

    with filelock.FileLock(os.path.join(folder.path, _RECORD_LOCK)):
        runs = {run["run"]: run for run in earlier_runs(folder, identity)}
        write_record(folder, identity, {"runs": list((runs | {entry["run"]: dict(entry)}).values())})


def earlier_runs(folder: SweepFolder, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `sweep.json` says of runs.

    Raises:
        FimError: it is of something else, or of another sweep.
    """
    if not os.path.exists(folder.record):
        return []
    found = read_json(folder.record, folder.record)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FimError(f"{folder.record}: expected the record of a sweep, found something else; name another folder")
    if found.get("version") != VERSION:
        raise FimError(
            f"{folder.record}: expected version {VERSION} of the format, found {brief(found.get('version'))}; go on "
            "with the mergekit-fim that wrote it, or name another folder"
        )
    its = found.get("identity")
    if not isinstance(its, dict) or not isinstance(found.get("runs"), list):
        raise FimError(f"{folder.record}: expected the record of a sweep, found a part of one; name another folder")
    difference = _difference(its, identity)
    if difference is not None:
        where, old, new = difference
        raise FimError(
            f"{folder.path}: this folder is of another sweep, whose {where} is {brief(old)}, here {brief(new)}; name "
            "another folder, or give the same command"
        )
    for i, run in enumerate(found["runs"]):
        kinds: dict[str, Any] = {"run": str, "method": (str, type(None)), "settings": dict, "of": dict}
        if not isinstance(run, dict) or not all(k in run and isinstance(run[k], kind) for k, kind in kinds.items()):
            raise FimError(
                f"{folder.record}, runs[{i}]: expected a run with {', '.join(kinds)}, found {brief(run)}; remove it "
                "and its answers"
            )
    return list(found["runs"])


def _difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Where two records first differ, and what stands there."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*new, *old]):
            found = _difference(old.get(name), new.get(name), f"{where}.{name}".lstrip("."))
            if found is not None:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        differences = (_difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True)))
        return next(filter(None, differences), None)
    return None if old == new else (where, old, new)


# Answers

_ANSWER = TypeAdapter(Answer)


def read_answers(path: str, keys: Sequence[Key]) -> dict[Key, Answer]:
    """The answers in a run's file, of which what a killed process left of a last line is cut off.

    Args:
        path: the file.
        keys: the answers that may be in it.

    Raises:
        FimError: a line isn't one of them.
    """
    if not os.path.exists(path):
        return {}
    expected = set(keys)
    found: dict[Key, Answer] = {}
    with writing(path), open(path, "rb+") as file:
        kept = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                file.truncate(kept)
                break
            kept += len(line)
            answer = _answer(line, f"{path}, line {number}")
            key = (answer.source, answer.index, answer.sample)
            if key not in expected:
                raise FimError(
                    f"{path}, line {number}: expected an answer to a problem of this sweep, found one to problem "
                    f"{answer.index} of {brief(answer.source)}, sample {answer.sample}; remove the line"
                )
            found.setdefault(key, answer)
    return found


def _answer(line: bytes, where: str) -> Answer:
    remedy = "remove the file, and the run is answered anew"
    try:
        content = json.loads(line)
        if not isinstance(content, dict):
            raise ValueError
        return _ANSWER.validate_json(line, strict=True)  # as JSON, where no type is taken for another
    except ValidationError as error:
        raise FimError(f"{where}: not an answer: {misfit(error, content)}; {remedy}") from None
    except (ValueError, RecursionError):
        raise FimError(f"{where}: expected an answer as a JSON object, found {brief(line)}; {remedy}") from None


def append_answer(file: Any, answer: Answer) -> None:
    """Add an answer to a file opened for bytes; what is there is there if the process is killed right after.

    Raises:
        FimError: it can't be written.
    """
    with writing(file.name):
        file.write(_line(answer))
        file.flush()


def write_answers(path: str, answers: Sequence[Answer]) -> None:
    """Write all of a run's answers, in place of what is there.

    Raises:
        FimError: they can't be written.
    """
    with written_whole(path) as part, open(part, "wb") as file:
        file.writelines(map(_line, answers))


def _line(answer: Answer) -> bytes:
    return json.dumps(asdict(answer), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
