"""Text for people: lines of a width, on any terminal, sizes, and tables in Markdown."""

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable

import click


def width() -> int:
    """Columns that a table may take: those of the terminal, but 80 at least and 100 at most."""
    return min(100, max(80, shutil.get_terminal_size((100, 24)).columns))


def wrapped(text: str, columns: int | None = None) -> list[str]:
    """`text` in lines of at most `columns`, by default the `width`; names and paths stay whole."""
    return textwrap.wrap(
        text, columns or width(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def echo(text: str) -> None:
    """Print, on any terminal: one without ‖δ‖ and α must not cost the merge."""
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding))


def size(count: float) -> str:
    """Bytes in GB or MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]], align: str = "---") -> str:
    """A table in Markdown, of cells in which nothing needs escaping any more."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, [align] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Text on one line of which nothing is taken for Markdown or HTML: names may have any characters."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~$&])", r"\\\1", " ".join(text.split()))
