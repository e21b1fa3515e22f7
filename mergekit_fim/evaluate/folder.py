"""The folder of a sweep: what the sweep is of, and every run's answers, each kept as soon as it is there.

Any number of processes, of one machine or of several, may work in it. A run belongs to the process that holds its lock.
The locks are the kernel's (`flock`): they end with the process, however it ends.
"""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import filelock
from pydantic import BaseModel, TypeAdapter, ValidationError

from mergekit_fim.errors import FimError, brief, misfit
from mergekit_fim.evaluate.records import Answer, Key
from mergekit_fim.files import PART, read_json, write_json, write_text, written_whole

FORMAT, VERSION = "mergekit-fim/sweep", 1
# Locks of the one that concludes, of sweep.json, and of the runs; and the file that names what all models run in.
_LOCK, _RECORD_LOCK, _RUN_LOCKS, _DTYPE = ".lock", ".record.lock", ".locks", ".dtype"


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep's files are.

    The identity says what the sweep is of, in JSON's types. Answers in the folder belong to this identity alone. It is
    empty where a sweep of anything is only read.
    """

    path: str
    identity: Mapping[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> str:
        """`sweep.json`: what the sweep is of, and what came out."""
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

    def remedy(self, run: str) -> str:
        """Say how to get a run's merge; empty where it has none."""
        if os.path.isdir(self.model(run)):
            return f"It is in {self.model(run)}."
        if os.path.isfile(self.config(run)):
            return f"To merge it: mergekit-fim merge {self.config(run)} merged"
        return ""


def file_name(run: str) -> str:
    """Turn a run's name into a file's: the same where it can be, and never that of another run."""
    plain = run.replace(" ", "_")
    safe = re.sub(r"[^A-Za-z0-9._=,+-]", "-", plain).lstrip(".")[:100]
    return safe if safe == plain else f"{safe}-{zlib.crc32(run.encode('utf-8', 'replace')):08x}"


def open_folder(folder: SweepFolder) -> None:
    """Begin a sweep in its folder, or join or go on with the one that is there.

    Raises:
        FimError: it can't be made or written to, or is of something else or of another sweep.
    """
    path = folder.path
    if not path:
        raise FimError("expected the name of a folder for the sweep, found an empty one; name one")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise FimError(f"{path}: expected a folder for the sweep, found a file; name another")
    with writing(path):
        os.makedirs(path, exist_ok=True)
        others = sorted(n for n in os.listdir(path) if n not in (_LOCK, _RECORD_LOCK) and not n.endswith(PART))
        if others and not os.path.exists(folder.record):
            raise FimError(
                f"{path}: expected an empty folder or one of a sweep, found {brief(others[0])} and no sweep.json; name "
                "another"
            )
        with _locked(folder, _RECORD_LOCK):
            if not os.path.exists(folder.record):
                _write_record(folder, {"runs": []})
            read_record(folder)
        for name in ("answers", _RUN_LOCKS):
            os.makedirs(os.path.join(path, name), exist_ok=True)


@contextlib.contextmanager
def _locked(folder: SweepFolder, name: str, patience: float = -1) -> Iterator[bool]:
    """Hold a lock, if it is free within so many seconds; below 0, wait for as long as it takes."""
    lock = filelock.FileLock(os.path.join(folder.path, name))
    with contextlib.suppress(filelock.Timeout):
        lock.acquire(timeout=patience)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def taken(folder: SweepFolder, run: str, patience: float = 0) -> contextlib.AbstractContextManager[bool]:
    """Take a run for this process, if no other process has it within so many seconds."""
    return _locked(folder, os.path.join(_RUN_LOCKS, f"{file_name(run)}.lock"), patience)


def concluding(folder: SweepFolder) -> contextlib.AbstractContextManager[bool]:
    """Keep other processes from concluding."""
    return _locked(folder, _LOCK)


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Say in one line what can't be written: `path`, unless the system's error names another file."""
    try:
        yield
    except OSError as error:
        raise FimError(
            f"{error.filename or path}: can't be written ({error.strerror or error}); free some space, or write "
            "elsewhere: the answers so far are kept, and the same command goes on"
        ) from error


# sweep.json


class _Run(BaseModel):
    run: str
    method: str | None
    settings: dict[str, Any]
    of: dict[str, Any]


class _Record(BaseModel):
    identity: dict[str, Any]
    runs: list[_Run]


def read_record(folder: SweepFolder) -> dict[str, Any]:
    """Read `sweep.json`.

    Raises:
        FimError: it is of something else, or of another sweep.
    """
    content = read_json(folder.record, folder.record)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FimError(f"{folder.record}: expected the record of a sweep, found something else; name another folder")
    if content.get("version") != VERSION:
        raise FimError(
            f"{folder.record}: expected version {VERSION} of the format, found {brief(content.get('version'))}; go on "
            "with the mergekit-fim that wrote it, or name another folder"
        )
    try:
        _Record.model_validate(content)
    except ValidationError as error:
        raise FimError(
            f"{folder.record}: expected the record of a sweep, found a damaged one: {misfit(error, content)}; correct "
            "that, or name another folder"
        ) from None
    if folder.identity and (found := difference(content["identity"], folder.identity)):
        where, old, new = found
        raise FimError(
            f"{folder.path}: this folder is of another sweep, whose {where} is {brief(old)}, here {brief(new)}; name "
            "another folder, or give the same command"
        )
    return content


def difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Find where two records first differ, and what stands there."""
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = [(f"{where}.{name}".lstrip("."), old.get(name), new.get(name)) for name in {**new, **old}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{where}[{i}]", *both) for i, both in enumerate(zip(old, new, strict=True))]
    elif old != new:
        return where, old, new
    return next(filter(None, (difference(a, b, at) for at, a, b in pairs)), None)


def _write_record(folder: SweepFolder, content: Mapping[str, Any]) -> None:
    write_json(folder.record, {"format": FORMAT, "version": VERSION, "identity": folder.identity, **content})


def note_run(folder: SweepFolder, entry: Mapping[str, Any], order: Sequence[str]) -> None:
    """Add a run to `sweep.json`, or replace it there. A new run goes before those that follow it in `order`."""
    with _locked(folder, _RECORD_LOCK):
        runs = read_record(folder)["runs"]
        names = [run["run"] for run in runs]
        if entry["run"] in names:
            runs[names.index(entry["run"])] = entry
        else:
            later = order[order.index(entry["run"]) :]
            runs.insert(next((i for i, name in enumerate(names) if name in later), len(names)), entry)
        _write_record(folder, {"runs": runs})


def note_findings(folder: SweepFolder, versions: Mapping[str, str], findings: Mapping[str, Any]) -> None:
    """Write to `sweep.json` what came out."""
    with _locked(folder, _RECORD_LOCK):
        _write_record(folder, {"versions": versions, "runs": read_record(folder)["runs"], "findings": findings})


def agreed_dtype(folder: SweepFolder, choose: Callable[[], str]) -> str:
    """Tell what all models of a sweep run in: what the first process chose."""
    path = os.path.join(folder.path, _DTYPE)
    with _locked(folder, _RECORD_LOCK):
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                return file.read()
        dtypes = [str(entry["dtype"]) for entry in read_record(folder)["runs"] if "dtype" in entry]
        dtype = dtypes[0] if dtypes else choose()
        write_text(path, dtype)
    return dtype


# Answers

_ANSWER = TypeAdapter(Answer)


def read_answers(path: str, keys: Sequence[Key] | None = None) -> dict[Key, Answer]:
    """Read a run's answers, by default with any keys, without what a killed process left of a last line.

    Raises:
        FimError: a line isn't an answer with one of these keys.
    """
    if not os.path.exists(path):
        return {}
    answers: dict[Key, Answer] = {}
    expected = None if keys is None else set(keys)
    with writing(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            answer = _answer(line, f"{path}, line {number}")
            key = (answer.source, answer.index, answer.sample)
            if expected is not None and key not in expected:
                raise FimError(
                    f"{path}, line {number}: expected an answer to a problem of this sweep, found one to problem "
                    f"{answer.index} of {brief(answer.source)}, sample {answer.sample}; remove the line"
                )
            answers.setdefault(key, answer)
    return answers


def _answer(line: bytes, where: str) -> Answer:
    try:
        return _ANSWER.validate_json(line, strict=True)  # no type is taken for another
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"`{part}`: " for part in first["loc"])
        raise FimError(
            f"{where}: expected an answer as a JSON object, found {brief(line)} ({place}{first['msg']}); remove the "
            "file, and the run is answered anew"
        ) from None


@contextlib.contextmanager
def appended(path: str) -> Iterator[BinaryIO]:
    """Open a run's file to add answers, and cut off what a killed process left of a last line."""
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        yield file


def append_answer(file: BinaryIO, answer: Answer) -> None:
    """Add an answer to a file opened for bytes. It stays there if the process is killed right after."""
    with writing(file.name):
        file.write(_line(answer))
        file.flush()


def write_answers(path: str, answers: Sequence[Answer]) -> None:
    """Write all of a run's answers, and replace what is there."""
    with written_whole(path) as part, open(part, "wb") as file:
        file.writelines(map(_line, answers))


def _line(answer: Answer) -> bytes:
    return json.dumps(asdict(answer), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
