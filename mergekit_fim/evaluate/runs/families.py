"""A family is all the merges of one config: they differ in the values of some parameters."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_fim.evaluate.runs.settings import strength_of, with_settings

STRENGTHS = (0.2, 0.35, 0.5, 0.65, 0.8)


@dataclass(frozen=True, eq=False)
class Family:
    """Merges that differ in their settings."""

    name: str  # what the table, the figure and the names of its runs call it
    strength: str  # the parameter that says how far a merge goes; empty where that doesn't vary
    values: Mapping[str, Sequence[Any]]  # of every parameter that varies, the strength first
    config_of: Callable[[Mapping[str, Any]], MergeConfiguration]  # settings -> the whole config of that merge

    def runs(self) -> list["Run"]:
        """Make a run of every combination of values."""
        return [self.run(dict(zip(self.values, its, strict=True))) for its in itertools.product(*self.values.values())]

    def run(self, settings: Mapping[str, Any]) -> "Run":
        """Make one run."""
        as_yaml = {name: str(its).lower() if isinstance(its, bool) else its for name, its in settings.items()}
        name = " ".join([self.name, *(f"{name}={its}" for name, its in as_yaml.items())])
        return Run(name, None, self, settings, self.config_of(settings))


@dataclass(frozen=True, eq=False)
class Run:
    """What answers the problems: a model as it is, or a merge such as "fim_ties alpha_mean=0.35"."""

    name: str
    model: ModelReference | None = None  # None for a merge, and for a model that only a server has
    family: Family | None = None  # None for a model as it is
    settings: Mapping[str, Any] = field(default_factory=dict)  # what is set for this merge, the strength first
    config: MergeConfiguration | None = None  # a merge's whole config; None for a model as it is

    @property
    def method(self) -> str | None:
        """What the table calls its family; None for a model as it is."""
        return None if self.family is None else self.family.name

    @property
    def strength(self) -> float | None:
        """How far a merge goes, where that is one number."""
        value = self.settings.get(self.family.strength) if self.family is not None else None
        return None if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)


def family_of(
    config: MergeConfiguration, name: str, varied: Mapping[str, Sequence[Any]], base: ModelReference | None = None
) -> Family:
    """Make a config's family, with these names and values, else with `STRENGTHS`; `base` is as in `with_settings`."""
    own = strength_of(config.merge_method, varied)
    values = dict(varied) or ({own: STRENGTHS} if own else {})
    if own not in values:
        own = "lambda" if "lambda" in values else ""
    if own:
        values = {own: values[own], **values}
    return Family(name, own, values, lambda settings: with_settings(config, settings, base))


def series(runs: Sequence[Run]) -> list[list[Run]]:
    """Put merges together that differ in their strength alone."""
    alike: dict[Any, list[Run]] = {}
    for run in runs:
        if run.family is not None and run.strength is not None:
            others = {name: value for name, value in run.settings.items() if name != run.family.strength}
            alike.setdefault((run.family.name, *others.items()), []).append(run)
    return list(alike.values())
