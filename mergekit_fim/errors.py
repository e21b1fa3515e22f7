"""The one exception that users see, and the one that torch raises under several names."""

import re

import click

from mergekit_fim.text import one_line


class FimError(click.ClickException):
    """Bad input, said in one line: what was expected, where, what was found, what to do.

    mergekit's commands print a `ClickException` as `Error: ...` and exit with status 1, without a traceback. In
    Python, `str(error)` is the same line.
    """

    def __init__(self, message: str) -> None:
        """Names, values and other libraries' messages may bring line breaks and control characters: not in here."""
        super().__init__(one_line(message))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has a class for that on accelerators only, and on the CPU nothing but a message."""
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError"):
        return True
    # torch's allocator and its mapping of files, and the C++ library under them
    messages = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "std::bad_alloc")
    return isinstance(error, (RuntimeError, OSError)) and any(message in str(error) for message in messages)


def check_own_code(error: Exception) -> None:
    """See whether transformers' `error` is about a model that can't be loaded without the code that comes with it.

    Raises:
        FimError: it is.
    """
    if "trust_remote_code" in str(error):
        named = re.search(r"repository (\S+)", str(error))
        raise FimError(
            f"{named[1] if named else 'a model'}: expected a model that transformers can load, found one with code of "
            "its own, which isn't run unasked; look at that code, and if you trust it pass --trust-remote-code"
        ) from error
