"""Where a server is."""

import contextlib
import ipaddress
import re
from urllib.parse import unquote, urlsplit

from mergekit_fim.errors import FimError, brief


def address(url: str) -> tuple[str, tuple[str, str] | None]:
    """Split a URL into one without a slash at its end, and the name and password that were in it, if any.

    Raises:
        FimError: it isn't a server's.
    """
    try:
        parts = urlsplit(url.strip())
        host = (parts.hostname or "").encode("idna")
        good = parts.scheme in ("http", "https") and host and parts.port != 0 and not (parts.query or parts.fragment)
    except ValueError:
        good = False
    if not good:
        # Whatever is wrong, a password stands before the one, and a key behind the other.
        shown = re.sub(r"\?.*", "?...", url.rsplit("@", 1)[-1], flags=re.DOTALL)
        raise FimError(f"--server: expected a URL such as http://localhost:8000/v1, found {brief(shown)!r}; correct it")
    credentials = (unquote(parts.username or ""), unquote(parts.password or "")) if "@" in parts.netloc else None
    return f"{parts.scheme}://{parts.netloc.rsplit('@', 1)[-1]}{parts.path.rstrip('/')}", credentials


def is_here(url: str) -> bool:
    """Whether a URL is of this machine."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(host)
        return ip.is_loopback or ip.is_unspecified
    return host == "localhost" or host.endswith(".localhost")
