"""Read and write files: JSON of ours, and whatever must be there whole or not at all."""

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_fim.errors import FimError, reason

REPORT_FORMAT = "mergekit-fim/report"  # of a merge's report
REPORT_NAME = "fim_report.json"

PART = ".mergekit-fim-part"  # the name of an unfinished file or folder ends like this

# The name says which process is at it. Give up a file of another machine at this age, in seconds: none of ours takes as
# long to write. Never give up a folder of another machine: a large merge may take longer.
_PART = re.compile(r"\..*\.(?P<machine>[0-9a-f]{8})-(?P<process>\d{1,9})-[0-9a-f]{8}" + re.escape(PART))
_STALE = 3600.0

_IN_MEMORY = "/dev/shm"  # Linux's: other systems have none

# A measurement of 1,000 sequences on the 126 layers of a 405B model has 3 MB.
_LARGEST_FILE = 64 << 20


def part_path(folder: str, name: str) -> str:
    """Choose a unique name in `folder` for the unfinished `name`, and remove what killed processes left there."""
    _remove_abandoned(folder)
    return os.path.join(folder, f".{name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}{PART}")


@contextlib.contextmanager
def written_whole(path: str) -> Iterator[str]:
    """Yield the name of an unfinished file beside `path`, and move it to `path` when all went well.

    If `path` is a pipe or a device, such as /dev/null, yield `path` itself.

    Raises:
        FimError: it can't be written.
    """
    is_file = os.path.isfile(path) or not os.path.exists(path)
    target = os.path.realpath(path) if is_file else path  # a link stays one
    part = part_path(*os.path.split(target)) if is_file else target
    try:
        yield part
        if is_file:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, target)
    except OSError as error:
        problem = error.strerror or error
        raise FimError(f"{path}: can't be written ({problem}); free some space, or write elsewhere") from error
    finally:
        if is_file:
            with contextlib.suppress(OSError):
                os.remove(part)


def _machine() -> str:
    """Tell where a process number means this process. Containers may share a host's name, and count for themselves."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):  # only Linux has these
        parts.append(os.readlink("/proc/self/ns/pid"))
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            parts.append(file.read())
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def _remove_abandoned(folder: str) -> None:
    """Remove what processes that have ended here left unfinished, and old files of other machines."""
    import psutil  # not needed to read measurements

    names: list[str] = []
    with contextlib.suppress(OSError):  # of a folder that may be written to and not read
        names = os.listdir(folder)
    for match in filter(None, map(_PART.fullmatch, names)):
        path = os.path.join(folder, match.string)
        has_ended = match["machine"] == _machine() and not psutil.pid_exists(int(match["process"]))
        with contextlib.suppress(OSError):  # another process was quicker
            is_folder = os.path.isdir(path)
            if has_ended or (not is_folder and time.time() - os.path.getmtime(path) > _STALE):
                shutil.rmtree(path) if is_folder else os.remove(path)


@dataclass(frozen=True)
class FolderInMemory:
    """A folder whose files are in memory."""

    path: str
    needed: int  # the bytes that have to be free before something more is written there

    def has_room(self) -> bool:
        """Tell whether that much is free, of its file system and of the memory."""
        with contextlib.suppress(OSError):  # systemd may remove it when its user logs out
            return self.needed <= min(shutil.disk_usage(self.path).free, available_memory())
        return False


@contextlib.contextmanager
def folder_in_memory(needed: int) -> Iterator[FolderInMemory]:
    """Make a folder in memory and remove it at the end."""
    path = part_path(_IN_MEMORY, "folder")
    with contextlib.suppress(OSError):  # where there is none, it has no room
        os.mkdir(path, 0o700)
    try:
        yield FolderInMemory(path, needed)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def available_memory() -> int:
    """Count the bytes that this process may still take, by the system and, on Linux, by its control groups."""
    import psutil  # not needed to read measurements

    free = int(psutil.virtual_memory().available)
    own = ""
    with contextlib.suppress(OSError):
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("0::/")[2].strip()
    group = Path("/sys/fs/cgroup", own)
    for place in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # this one has no limit, or "max"
            limit = int((place / "memory.max").read_text(encoding="ascii"))
            free = min(free, limit - int((place / "memory.current").read_text(encoding="ascii")))
    return free


def read_json(path: str, where: str | None = None) -> Any:
    """Read a JSON file, which errors call `where`, no larger than one of ours can be. NaN and infinity are errors.

    Raises:
        FimError: it can't be read.
    """
    where = where or path
    try:
        if os.path.isdir(path):
            raise FimError(f"{where}: expected a JSON file, found a folder; name the file in it")
        size, most = os.path.getsize(path) >> 20, _LARGEST_FILE >> 20
        if size > most:
            raise FimError(f"{where}: expected a JSON file of at most {most} MB, found {size} MB; check the name")
        with open(path, encoding="utf-8") as file:
            return json.load(file, parse_constant=_refuse)
    except OSError as error:
        raise FimError(f"{where}: can't be read ({error.strerror or error}); check the name") from error
    except (ValueError, RecursionError) as error:
        raise FimError(f"{where}: expected a JSON file, found no JSON ({reason(error)}); check the name") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"the value {constant}, which isn't finite")


def check_writable(path: str | None, *others: str | None) -> None:
    """Check, before the work, that a file, if any is wanted, can be written and is none of the `others`.

    Raises:
        FimError: it is a folder, its folder is missing or read-only, or it is one of the others.
    """
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.basename(path):
        raise FimError(f"{path}: expected the name of a file to write, found a folder; add a file name")
    if path == "-":
        raise FimError(f"{path}: expected the name of a file to write; for the standard output, name /dev/stdout")
    for other in others:
        if other is not None and os.path.realpath(path) == os.path.realpath(other):
            raise FimError(f"{path}: this would take the place of {other}, which the command needs; write elsewhere")
    if not os.path.isdir(folder):
        raise FimError(f"{path}: the folder {folder} doesn't exist; make it first, or write elsewhere")
    if not os.access(folder, os.W_OK):
        raise FimError(f"{path}: the folder {folder} can't be written to; write elsewhere")


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Write a JSON file as `write_text` does."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str, text: str) -> None:
    """Write a file at once: no reader ever sees half of it.

    Raises:
        FimError: it can't be written.
    """
    with written_whole(path) as part, open(part, "w", encoding="utf-8") as file:
        file.write(text)


def copy_whole(source: str, path: str) -> None:
    """Copy a file as `write_text` writes one."""
    with written_whole(path) as part:
        shutil.copyfile(source, part)
