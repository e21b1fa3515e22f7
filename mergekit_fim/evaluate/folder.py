"""The folder of a sweep: what it is of, and every run's answers, each kept as soon as it is there.

Any number of processes, of one machine or of several, may be at a sweep. A run is its whose lock is held. The locks are
the kernel's (`flock`), so that they end with the process, however it ends.
"""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError

from mergekit_fim.errors import FimError, brief, misfit, require
from mergekit_fim.evaluate.records import Answer, Key
from mergekit_fim.files import PART, read_json, write_json, write_text, written_whole

FORMAT, VERSION = "mergekit-fim/sweep", 1
# Of what concludes, of what is written to sweep.json, of the runs; and what all models run in.
_LOCK, _RECORD_LOCK, _RUN_LOCKS, _DTYPE = ".lock", ".record.lock", ".locks", ".dtype"


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep's files are.

    Attributes:
        path: the folder.
        identity: what the sweep is of, in JSON's types: with other values the answers so far aren't its.
    """

    path: str
    identity: Mapping[str, Any] = field(default_factory=dict)

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


def open_folder(folder: SweepFolder) -> None:
    """Begin a sweep in its folder, or join or go on with what is there.

    Raises:
        FimError: it can't be made or written to, or is of something else or of another sweep.
    """
    require("filelock", "sweep")
    path = folder.path
    if not path:
        raise FimError("expected the name of a folder for the sweep, found an empty one; name one")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise FimError(f"{path}: expected a folder for the sweep, found a file; name another")
    with writing(path):
        os.makedirs(path, exist_ok=True)
        names = os.listdir(path)
        others = [n for n in names if n not in (_LOCK, _RECORD_LOCK) and not n.endswith(PART) and n != "sweep.json"]
        if others and not os.path.exists(folder.record):
            raise FimError(
                f"{path}: expected an empty folder or one of a sweep, found {brief(sorted(others)[0])} and no "
                "sweep.json; name another"
            )
        with _locked(folder, _RECORD_LOCK):
            if not os.path.exists(folder.record):
                _write_record(folder, {"runs": []})
            read_record(folder)
        for name in ("answers", _RUN_LOCKS):
            os.makedirs(os.path.join(path, name), exist_ok=True)


@contextlib.contextmanager
def _locked(folder: SweepFolder, name: str, patience: float = -1) -> Iterator[bool]:
    """Hold one of the locks, if it can be had within so many seconds; below 0, for as long as it takes."""
    import filelock

    lock = filelock.FileLock(os.path.join(folder.path, name))
    try:
        lock.acquire(timeout=patience)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def taken(folder: SweepFolder, run: str, patience: float = 0) -> contextlib.AbstractContextManager[bool]:
    """While this lasts a run is this process's, if no other process has it within so many seconds."""
    return _locked(folder, os.path.join(_RUN_LOCKS, f"{file_name(run)}.lock"), patience)


def concluding(folder: SweepFolder) -> contextlib.AbstractContextManager[bool]:
    """While this lasts no other process concludes."""
    return _locked(folder, _LOCK)


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


def _write_record(folder: SweepFolder, content: Mapping[str, Any]) -> None:
    write_json(folder.record, {"format": FORMAT, "version": VERSION, "identity": folder.identity, **content})


def note_run(folder: SweepFolder, entry: Mapping[str, Any], order: Sequence[str]) -> None:
    """Add a run to `sweep.json`, or replace it there.

    Args:
        folder: the sweep's.
        entry: what is to be said of it.
        order: the runs of this command. A new one stands before those that follow it, whichever process began them.

    Raises:
        FimError: it can't be read or written.
    """
    with _locked(folder, _RECORD_LOCK):
        runs = earlier_runs(folder)
        names = [run["run"] for run in runs]
        if entry["run"] in names:
            runs[names.index(entry["run"])] = dict(entry)
        else:
            later = order[order.index(entry["run"]) :]
            place = next((i for i, name in enumerate(names) if name in later), len(names))
            runs.insert(place, dict(entry))
        _write_record(folder, {"runs": runs})


def note_findings(folder: SweepFolder, versions: Mapping[str, str], findings: Mapping[str, Any]) -> None:
    """Write to `sweep.json` what came out.

    Raises:
        FimError: it can't be read or written.
    """
    with _locked(folder, _RECORD_LOCK):
        _write_record(folder, {"versions": versions, "runs": earlier_runs(folder), "findings": findings})


def agreed_dtype(folder: SweepFolder, choose: Callable[[], str]) -> str:
    """What all the models of a sweep run in: what the first process chose that had to."""
    path = os.path.join(folder.path, _DTYPE)
    with _locked(folder, _RECORD_LOCK):
        known = next((str(entry["dtype"]) for entry in earlier_runs(folder) if "dtype" in entry), None)
        if known is None and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                known = file.read()
        if known is None:
            known = choose()
            write_text(path, known)
    return known


def earlier_runs(folder: SweepFolder) -> list[dict[str, Any]]:
    """What `sweep.json` says of runs.

    Raises:
        FimError: it is of something else, or of another sweep.
    """
    return list(read_record(folder)["runs"])


def read_record(folder: SweepFolder) -> dict[str, Any]:
    """Read `sweep.json`.

    Raises:
        FimError: it is of something else, or of another sweep.
    """
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
    difference = _difference(its, folder.identity)
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
    return found


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
    """The answers in a run's file, without what a killed process left of a last line.

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
    with writing(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
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


@contextlib.contextmanager
def appended(path: str) -> Iterator[BinaryIO]:
    """A run's file, to which answers can be added: what a killed process left of a last line is cut off."""
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        yield file


def append_answer(file: BinaryIO, answer: Answer) -> None:
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
