"""The one exception that users see."""

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
