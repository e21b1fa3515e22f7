"""Get a measurement without measuring: from a file, from the Hub, or from the user's cache folder.

Nothing in the cache is trusted. If a file is broken, of another model or of other settings, the model is measured anew,
with a warning. If a measurement can't be written, it is not kept, with a warning.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.errors import FimError, reason
from mergekit_fim.files import read_json
from mergekit_fim.measurements.factors import FactorsFile, FactorsSettings
from mergekit_fim.measurements.file import from_json
from mergekit_fim.measurements.record import Measurement, ModelIdentity, versions

LOG = logging.getLogger("mergekit_fim")

K = TypeVar("K", Measurement, FactorsFile)

# What `user/repo` stands for.
DEFAULT_NAME, DEFAULT_NAME_OF_FACTORS = "fisher.json", "factors.safetensors"

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@\\]+))?(?:@(?P<revision>[^@]+))?")


def read_measurement(reference: str | os.PathLike[str], cache_dir: str | None = None) -> Measurement:
    """Read a measurement from a file or from the Hub.

    Args:
        reference: a file, relative to the working folder; or `user/repo` for its `fisher.json`, or `user/repo/FILE`,
            either of them with `@revision`.
        cache_dir: where files of the Hub are kept; by default the Hub's own cache.

    Raises:
        FimError: there is no such file, or it isn't a measurement that this version can use.
    """
    name = os.fspath(reference)
    return from_json(read_json(local_file(name, cache_dir), name), name)


def local_file(
    reference: str, cache_dir: str | None, *, kind: str = "a saved measurement", default: str = DEFAULT_NAME
) -> str:
    """Find a file here, or download it from the Hub: `default` of `user/repo`. Errors say that it holds `kind`.

    Raises:
        FimError: there is no such file.
    """
    path = os.path.expanduser(reference)
    if os.path.exists(path):
        return path
    match = _HUB.fullmatch(reference)
    # `folder/fisher.json` is a file that is missing; repositories aren't named so.
    extension = os.path.splitext(default)[1]
    if match is None or reference.startswith(".") or (match["file"] is None and match["repo"].endswith(extension)):
        expected = f"the file of {kind}, or user/repo or user/repo/FILE on the Hub"
        raise FimError(f"{reference}: expected {expected}; found no such file; check the name")
    repo, name = match["repo"], match["file"] or default
    on_hub = f"the repository {repo} on the Hub"
    try:
        return huggingface_hub.hf_hub_download(repo, name, revision=match["revision"], cache_dir=cache_dir)
    except RemoteEntryNotFoundError:
        problem = f"{on_hub} has no file {name}; name the file as {repo}/FILE"
    except GatedRepoError:
        problem = f"{on_hub} is gated; ask for access on its page, and log in with `hf auth login`"
    except RepositoryNotFoundError:
        where = f"no file of that name here, and on the Hub no repository {repo}, or a private one"
        problem = f"{where}; check the name, or log in with `hf auth login`"
    except RevisionNotFoundError:
        problem = f"{on_hub} has no revision {match['revision']}; check it"
    except Exception as error:  # of the Hub's, and of what it connects by
        problem = f"neither a file here nor to be had from the Hub ({reason(error)}); check the name and the connection"
    raise FimError(f"{reference}: {problem}")


def cache_folder() -> str:
    """Find where measurements are kept: MERGEKIT_FIM_CACHE, or `mergekit-fim` in the user's cache folder (XDG)."""
    general = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    folder = os.environ.get("MERGEKIT_FIM_CACHE") or os.path.join(general, "mergekit-fim")
    return os.path.abspath(os.path.expanduser(folder))


@dataclass(frozen=True)
class CacheEntry:
    """The place in the cache of one measurement, or of one file of factors. All that changes the numbers names it."""

    model: ModelIdentity  # that is measured
    settings: FisherSettings | FactorsSettings
    dtypes: tuple[str, str]  # what the weights are read as, and what the model runs in

    @property
    def path(self) -> str:
        """The file."""
        made_with = versions()
        key = {
            "fingerprint": self.model.fingerprint,
            "settings": vars(self.settings),
            "dtypes": list(self.dtypes),
            "versions": [made_with["mergekit-fim"], made_with["transformers"]],
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        extension = "json" if isinstance(self.settings, FisherSettings) else "safetensors"
        return os.path.join(cache_folder(), f"{name}.{extension}")

    def read(self) -> Measurement | None:
        """Read the kept measurement, as one of this model; None where there is none that can be used."""
        kept = self.kept(lambda path: from_json(read_json(path), path))
        return kept and replace(kept, model=self.model)  # it may lie elsewhere by now

    def kept(self, read: Callable[[str], K]) -> K | None:
        """Read the file by `read`; None where there is none that can be used."""
        if not os.path.exists(self.path):
            return None
        try:
            kept = read(self.path)
            if kept.model.difference(self.model) or kept.settings != self.settings:
                raise FimError(f"{self.path} is of another model")
        except FimError as error:
            LOG.warning("the cache can't be used, the model is measured anew: %s", error)
            return None
        return kept

    def write(self, write: Callable[[str], object]) -> bool:
        """Keep what was just made by `write`, if that is possible; say whether it was."""
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            write(self.path)
        except (OSError, FimError) as error:
            LOG.warning("the measurement is not kept for the next merge: %s", error)
            return False
        return True
