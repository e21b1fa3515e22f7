"""Files and folders that are there whole or not at all, and what killed processes left of them."""

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator

from mergekit_fim.errors import FimError

PART = ".mergekit-fim-part"  # how the names of what is unfinished end

# What is unfinished says which process is at it. A file of another machine is given up at this age, in seconds: none of
# ours takes as long to write. A folder isn't, as a large merge may.
_PART = re.compile(r"\..*\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}" + re.escape(PART))
_STALE = 3600.0


def part_path(folder: str, name: str) -> str:
    """A name in `folder`, of this process's own, for what will become `name`.

    What killed processes left unfinished in the folder is removed.
    """
    _remove_abandoned(folder)
    return os.path.join(folder, f".{name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}{PART}")


@contextlib.contextmanager
def written_whole(path: str) -> Iterator[str]:
    """The name of a file to write beside `path`, one of its own, which takes the place of `path` when all went well.

    What is there and isn't a file, such as a pipe or /dev/null, is written to as it is.

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
        reason = error.strerror or str(error)
        raise FimError(f"{path}: can't be written ({reason}); free some space, or write elsewhere") from error
    finally:
        if is_file:
            with contextlib.suppress(OSError):
                os.remove(part)


def _machine() -> str:
    """Where a process number means this process: containers may share a host's name, and have numbers of their own."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):  # there are none but on Linux
        parts.append(os.readlink("/proc/self/ns/pid"))
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            parts.append(file.read())
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def _remove_abandoned(folder: str) -> None:
    names: list[str] = []
    with contextlib.suppress(OSError):  # a folder that may be written to and not read
        names = os.listdir(folder)
    for name in (name for name in names if name.endswith(PART)):
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):  # another process was quicker
            is_folder = os.path.isdir(path)
            if _is_of_dead_process(name) or (not is_folder and time.time() - os.path.getmtime(path) > _STALE):
                shutil.rmtree(path) if is_folder else os.remove(path)


def _is_of_dead_process(part: str) -> bool:
    """Whether the process that was at it is known to have ended: on other machines, and on Windows, it isn't."""
    match = _PART.fullmatch(part)
    if match is None or match["machine"] != _machine() or os.name != "posix":
        return False
    try:
        os.kill(int(match["process"]), 0)  # sends nothing
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # of another user
        return False
    return False
