"""Measurements that are kept for the next merge on the same base, in the user's cache folder.

Nothing in the cache is trusted: a file that is not whole, not of this model or not of these settings is measured anew,
with a warning. What can't be written is not kept, with a warning.
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass, replace

import torch

from mergekit_fim.config.settings import FisherSettings
from mergekit_fim.errors import FimError
from mergekit_fim.measurements.file import Measurement, ModelIdentity, read_measurement, versions, write_measurement

LOG = logging.getLogger("mergekit_fim")


def cache_folder() -> str:
    """Where measurements are kept: MERGEKIT_FIM_CACHE, or `mergekit-fim` in the user's cache folder (XDG)."""
    own = os.environ.get("MERGEKIT_FIM_CACHE")
    if own:
        return os.path.abspath(os.path.expanduser(own))
    general = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.join(os.path.abspath(os.path.expanduser(general)), "mergekit-fim")


@dataclass(frozen=True)
class CacheEntry:
    """The place of one measurement in the cache, which all depends on that can change its numbers.

    Attributes:
        model: what is measured.
        settings: on which tokens.
        reading: the dtype in which the weights are read.
        running: the dtype in which the model runs.
    """

    model: ModelIdentity
    settings: FisherSettings
    reading: torch.dtype
    running: torch.dtype

    @property
    def path(self) -> str:
        """The file."""
        made_with = versions()
        key = {
            "fingerprint": self.model.fingerprint,
            "settings": vars(self.settings),
            "dtypes": [str(self.reading), str(self.running)],
            "versions": [made_with["mergekit-fim"], made_with["transformers"]],
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        return os.path.join(cache_folder(), f"{name}.json")

    def read(self) -> Measurement | None:
        """The kept measurement, as one of this model, or None where there is none that can be used."""
        path = self.path
        if not os.path.exists(path):
            return None
        try:
            kept = read_measurement(path)
        except FimError as error:
            LOG.warning("the cache can't be used, the model is measured anew: %s", error)
            return None
        if kept.model.difference(self.model) or kept.fisher.settings != self.settings:
            LOG.warning("the cache can't be used, the model is measured anew: %s is of another model", path)
            return None
        return replace(kept, model=self.model)  # it may lie elsewhere by now

    def write(self, made: Measurement) -> None:
        """Keep a measurement that was just made, if that is possible."""
        path = self.path
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_measurement(made, path)
        except (OSError, FimError) as error:
            LOG.warning("the measurement is not kept for the next merge: %s", error)
