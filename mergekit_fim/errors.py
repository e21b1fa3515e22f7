"""What users see when something is wrong: the one exception, and helpers for its line."""

import contextlib
import importlib.util
import re
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pydantic import ValidationError


class FimError(click.ClickException):
    """Say in one line what was expected, where, what was found, and what to do.

    mergekit's commands print a `ClickException` as `Error: ...` and exit with status 1, without a traceback. In
    Python, `str(error)` is the same line.
    """

    def __init__(self, message: str) -> None:
        """Take out line breaks and control characters, which names, values and other libraries' messages may have."""
        super().__init__("".join(c if c.isprintable() else " " for c in message))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out. torch has a class for that on accelerators; on the CPU only a message says it."""
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError"):
        return True
    # torch's allocator and its mapping of files, and the C++ library under them; then what CUDA's libraries ask for
    # beside torch's allocator.
    messages = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "std::bad_alloc")
    cuda = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (RuntimeError, OSError)) and any(message in str(error) for message in messages + cuda)


def check_own_code(error: Exception) -> None:
    """Say so if transformers' `error` is about a model that comes with code of its own."""
    if "trust_remote_code" in str(error):
        named = re.search(r"repository (\S+)", str(error))
        raise FimError(
            f"{named[1] if named else 'a model'}: expected a model that transformers can load, found one with code of "
            "its own, which isn't run unasked; look at that code, and if you trust it pass --trust-remote-code"
        ) from error


def require(module: str, extra: str) -> None:
    """Check, without importing it, that an optional library is installed, as it is by an extra of this package.

    Raises:
        FimError: it isn't.
    """
    package = module.partition(".")[0].replace("_", "-")
    with contextlib.suppress(ModuleNotFoundError):  # the package of a module in it
        if importlib.util.find_spec(module) is not None:
            return
    raise FimError(f"{package} isn't installed, and is needed for this; run: pip install 'mergekit-fim[{extra}]'")


def brief(value: object) -> str:
    """Shorten a value from a file for a message."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # Python writes out no numbers of thousands of digits
        text = f"a huge {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def shown(value: Any) -> str:
    """Write a value for an error, text in quotes."""
    return repr(brief(value)) if isinstance(value, str) else brief(value)


def reason(error: BaseException) -> str:
    """Say in one short line why another library failed."""
    text = " ".join(str(error).split())[:300]
    name = type(error).__name__
    return f"{name}: {text}" if text and isinstance(error, LookupError) else text or name


def misfit(error: "ValidationError", content: Any) -> str:
    """Say which part of a file's content pydantic refused first, by its place there, and why."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ""
    for part in first["loc"]:
        if isinstance(content, dict) and part in content:
            where += f".{part}" if where else str(part)
        elif isinstance(content, list) and isinstance(part, int) and part < len(content):
            where += f"[{part}]"
        elif first["type"] == "missing" and part == first["loc"][-1]:
            return f"`{brief(where)}`: {part} is missing" if where else f"`{part}` is missing"
        else:  # the name of a type among several that would do
            return f"`{brief(where)}`: found {brief(content)}, which has no meaning there"
        content = content[part]
    return f"`{brief(where)}`: {first['msg'][:1].lower()}{first['msg'][1:]}, found {shown(content)}"
