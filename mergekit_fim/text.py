"""Text on a terminal: how wide, how wrapped, in which characters."""

import shutil
import sys
import textwrap

import click


def width() -> int:
    """Columns that a table may take: those of the terminal, but 80 at least and 100 at most."""
    return min(100, max(80, shutil.get_terminal_size((100, 24)).columns))


def wrapped(text: str, columns: int | None = None) -> list[str]:
    """`text` in lines of at most `columns`, by default the `width`; names and paths stay whole."""
    return textwrap.wrap(
        text, columns or width(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def one_line(text: str) -> str:
    """`text` without line breaks, and without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else " " for c in text)


def brief(value: object) -> str:
    """A value from a file, short enough for a message."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # Python writes out no numbers of thousands of digits
        text = f"a huge {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def reason(error: BaseException) -> str:
    """Why something of another library's failed, in one short line."""
    text = " ".join(str(error).split())[:300]
    name = type(error).__name__
    return f"{name}: {text}" if text and isinstance(error, LookupError) else text or name


def echo(text: str) -> None:
    """Print, on any terminal: one without ‖δ‖ and α must not cost the merge."""
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding))


def size(count: float) -> str:
    """Bytes in GB or MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
