"""Make what a package index shows of README.md, whose links and pictures are relative to the repository."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# Not the headings of the page itself (#...), which an index names as the forge does.
_RELATIVE = r"\((?!#|https?:)([^()\s]+)\)"
_PICTURE = re.compile(rf"!\[([^\]]*)\]{_RELATIVE}")
_LINK = re.compile(rf"(?<!!)\[([^\[\]]*)\]{_RELATIVE}")


def describe(readme: str, repository: str) -> str:
    """Make pictures and links absolute; without an address, drop pictures and keep only the words of links."""
    picture, link = r"", r"\1"
    if repository:
        picture, link = rf"![\1]({repository}/raw/HEAD/\2)", rf"[\1]({repository}/blob/HEAD/\2)"
    return _LINK.sub(link, _PICTURE.sub(picture, readme))


class Description(MetadataHookInterface):
    """Set the fields that depend on the repository's address."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the fields of `[project]`."""
        repository = self.config["repository"].rstrip("/")
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": describe(readme, repository)}
        metadata["urls"] = {}
        if repository:
            changes = f"{repository}/blob/HEAD/CHANGELOG.md"
            metadata["urls"] = {"Repository": repository, "Changelog": changes, "Issues": f"{repository}/issues"}
