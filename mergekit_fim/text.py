"""Text for people: lines of a width, on any terminal, sizes, and tables in Markdown."""

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable

import click


def width() -> int:
    """Count the columns that a table may take: the terminal's, but at least 80 and at most 100."""
    return min(100, max(80, shutil.get_terminal_size((100, 24)).columns))


def wrapped(text: str, columns: int | None = None) -> list[str]:
    """Break `text` into lines of at most `columns`, by default the `width`. Names and paths stay whole."""
    return textwrap.wrap(
        text, columns or width(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def echo(text: str) -> None:
    """Print on any terminal. One that can't show ‖δ‖ and α must not end the merge."""
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding))


def size(count: float) -> str:
    """Write a number of bytes in GB or MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]], align: str = "---") -> str:
    """Make a table in Markdown. Its cells must be escaped already."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, [align] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Escape text, on one line, so that nothing in it is taken for Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~$&])", r"\\\1", " ".join(text.split()))
