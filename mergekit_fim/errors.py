"""The one exception that users see, and the one that torch raises under several names."""

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
