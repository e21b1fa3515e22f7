"""Write tables into pages of docs/, each between the two comments that name its command."""

from collections.abc import Sequence
from pathlib import Path


def line(*cells: str) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


def head(*cells: str) -> list[str]:
    """Return the first two lines of a table."""
    return [line(*cells), line(*["---"] * len(cells))]


def put(page: Path, command: str, lines: Sequence[str]) -> None:
    """Replace the text between `<!-- command: begin -->` and `<!-- command: end -->`.

    Raises:
        ValueError: the page lacks one of the two comments.
    """
    begin, end = f"<!-- {command}: begin -->", f"<!-- {command}: end -->"
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page}: expected {begin} and {end}")
    page.write_text("\n".join([f"{before}{begin}", *lines, f"{end}{after}"]), encoding="utf-8")
