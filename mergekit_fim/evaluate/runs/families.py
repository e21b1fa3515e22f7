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
    """Merges that differ in their settings.

    Attributes:
        name: what the table, the figure and the names of its runs call it.
        strength: the parameter that says how far a merge goes; None where that doesn't vary.
        values: of every parameter that varies, the strength first.
        config_of: settings -> the whole config of that merge.
    """

    name: str
    strength: str | None
    values: Mapping[str, Sequence[Any]]
    config_of: Callable[[Mapping[str, Any]], MergeConfiguration]

    def runs(self) -> list["Run"]:
        """Make a run of every combination of values."""
        return [self.run(dict(zip(self.values, its, strict=True))) for its in itertools.product(*self.values.values())]

    def run(self, settings: Mapping[str, Any]) -> "Run":
        """Make one run."""
        said = [f"{name}={_written(value)}" for name, value in settings.items()]
        return Run(" ".join([self.name, *said]), None, self, settings, self.config_of(settings))


@dataclass(frozen=True, eq=False)
class Run:
    """What answers the problems: a model as it is, or a merge such as "fim_ties alpha_mean=0.35".

    Attributes:
        model: the model as it is; None for a merge, and for a model that only a server has.
        family: None for a model as it is; likewise `config`, a merge's whole config.
        settings: what is set in the config for this merge, the strength first.
    """

    name: str
    model: ModelReference | None = None
    family: Family | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: MergeConfiguration | None = None

    @property
    def method(self) -> str | None:
        """What the table calls its family; None for a model as it is."""
        return None if self.family is None else self.family.name

    @property
    def strength(self) -> float | None:
        """How far a merge goes, where that is one number."""
        value = self.settings.get(self.family.strength) if self.family and self.family.strength else None
        return None if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)

    def at(self, strength: float) -> "Run":
        """Make a run like this one but for its strength."""
        assert self.family is not None
        assert self.family.strength is not None
        return self.family.run({**self.settings, self.family.strength: strength})


def family_of(
    config: MergeConfiguration, name: str, varied: Mapping[str, Sequence[Any]], base: ModelReference | None = None
) -> Family:
    """Make a config's family, with these names and values, else with `STRENGTHS`; `base` is as in `with_settings`."""
    own = strength_of(config.merge_method, varied)
    values = dict(varied) or ({own: STRENGTHS} if own else {})
    if own not in values:
        own = "lambda" if "lambda" in values else None
    if own is not None:
        values = {own: values[own], **values}
    return Family(name, own, values, lambda settings: with_settings(config, settings, base))


def _written(value: Any) -> str:
    """Write a value as in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def series(runs: Sequence[Run]) -> list[list[Run]]:
    """Put merges together that differ in their strength alone."""
    alike: dict[Any, list[Run]] = {}
    for run in runs:
        if run.family is not None and run.strength is not None:
            others = {name: value for name, value in run.settings.items() if name != run.family.strength}
            alike.setdefault((run.family.name, *others.items()), []).append(run)
    return list(alike.values())
