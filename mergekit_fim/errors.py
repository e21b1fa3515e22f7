"""The one exception that users see."""

import click


class FimError(click.ClickException):
    """Bad input, said in one line: what was expected, where, what was found, what to do.

    mergekit's commands print a `ClickException` as `Error: ...` and exit with status 1, without a traceback. In
    Python, `str(error)` is the same line.
    """
