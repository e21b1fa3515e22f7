"""A reference to a saved measurement, as in `fisher:` -> the file, downloaded from the Hub where it lies there."""

import os
import re

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mergekit_fim.errors import FimError
from mergekit_fim.measurements.file import Measurement, read_measurement
from mergekit_fim.text import reason

# What `user/repo` stands for.
DEFAULT_NAME = "fisher.json"

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@\\]+))?(?:@(?P<revision>[^@]+))?")


def load_measurement(reference: str, cache_dir: str | None = None) -> Measurement:
    """Read a measurement from a file or from the Hub.

    Args:
        reference: a file, relative to the working folder; or `user/repo` for its `fisher.json`, or `user/repo/FILE`,
            either of them with `@revision`.
        cache_dir: where files of the Hub are kept; by default the Hub's own cache.

    Raises:
        FimError: there is no such file, or it isn't a measurement.
    """
    return read_measurement(_file(reference, cache_dir), reference)


def _file(reference: str, cache_dir: str | None) -> str:
    path = os.path.expanduser(reference)
    if os.path.exists(path):
        return path
    match = _HUB.fullmatch(reference)
    # `folder/fisher.json` is a file that is missing; repositories aren't named so.
    if match is None or reference.startswith(".") or (match["file"] is None and match["repo"].endswith(".json")):
        raise FimError(
            f"{reference}: expected the file of a saved measurement, or user/repo or user/repo/FILE on the Hub; "
            "found no such file; check the name"
        )
    name = match["file"] or DEFAULT_NAME
    try:
        return huggingface_hub.hf_hub_download(match["repo"], name, revision=match["revision"], cache_dir=cache_dir)
    except RemoteEntryNotFoundError as error:
        raise FimError(
            f"{reference}: the repository {match['repo']} on the Hub has no file {name}; name the file as "
            f"{match['repo']}/FILE"
        ) from error
    except GatedRepoError as error:
        raise FimError(
            f"{reference}: the repository {match['repo']} on the Hub is gated; ask for access on its page, and log in "
            "with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise FimError(
            f"{reference}: no file of that name here, and on the Hub no repository {match['repo']}, or a private one; "
            "check the name, or log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise FimError(
            f"{reference}: the repository {match['repo']} on the Hub has no revision {match['revision']}; check it"
        ) from error
    except Exception as error:  # of the Hub's, and of what it connects by
        raise FimError(
            f"{reference}: neither a file here nor to be had from the Hub ({reason(error)}); check the name and the "
            "connection"
        ) from error
