"""A merge config and what is to vary in it -> the runs of a sweep: the models as they are, merges, and their twins."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_fim.errors import FimError, reason, shown
from mergekit_fim.evaluate.runs.twins import twin
from mergekit_fim.evaluate.runs.varied import fine_tuned, strength_of, with_settings

BASE, LONG = "base", "long"
STRENGTHS = (0.2, 0.35, 0.5, 0.65, 0.8)


@dataclass(frozen=True, eq=False)
class Run:
    """What answers the problems: a model as it is, or a merge.

    Attributes:
        name: such as "base" or "fim_ties alpha_mean=0.35".
        method: the merge method; None for a model as it is.
        settings: what is set in the config for this run, the strength first.
        by: the name of the setting that is the strength; None for a merge without one.
        model: the model as it is; None for a merge, and for a model that only a server has.
        config: the merge's whole config.
    """

    name: str
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    by: str | None = None
    model: ModelReference | None = None
    config: MergeConfiguration | None = None

    @property
    def strength(self) -> float | None:
        """How far a merge goes, where that is one number."""
        value = self.settings.get(self.by) if self.by is not None else None
        return None if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)

    @property
    def others(self) -> dict[str, Any]:
        """What is set beside the strength."""
        return {name: value for name, value in self.settings.items() if name != self.by}


def models_as_they_are(config: MergeConfiguration, also: Sequence[str] = ()) -> list[Run]:
    """The base, every fine-tuned model in the config's order, and what else was named.

    A single fine-tuned model is called "long", others by the last part of their names.

    Raises:
        FimError: the config has no base model or no fine-tuned model, or a name isn't one.
    """
    base, tuned = config.base_model, fine_tuned(config)
    if base is None:
        raise FimError("expected a merge with a base model, found none; add `base_model:` to the config, at the top")
    if not tuned:
        raise FimError(f"expected a fine-tuned model beside the base {base}, found none; list one in `models:`")
    named = {BASE: base}
    named |= {LONG: tuned[0]} if len(tuned) == 1 else dict(_named(tuned, named))
    named |= _named(map(_reference, also), named)
    return [Run(name, model=model) for name, model in named.items()]


def _reference(name: str) -> ModelReference:
    try:
        return ModelReference.parse(name)
    except Exception as error:  # pydantic's, and mergekit's RuntimeErrors
        raise FimError(
            f"--also: expected a model's folder or its name on the Hub, found {shown(name)} ({reason(error)})"
        ) from None


def _named(models: Iterable[ModelReference], taken: Iterable[str]) -> Iterator[tuple[str, ModelReference]]:
    """Models by the last part of their path, or their adapter's, with a number where that is taken."""
    names = set(taken)
    for model in models:
        name = os.path.basename(os.path.normpath((model.lora or model.model).path)) or "model"
        candidates = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
        unique = next(candidate for candidate in candidates if candidate not in names)
        names.add(unique)
        yield unique, model


def merges(
    config: MergeConfiguration,
    varied: Mapping[str, Sequence[Any]],
    compare: Sequence[str],
    default_density: Callable[[], float],
) -> list[Run]:
    """A merge for every combination of settings, then their twins by other methods, each once.

    Args:
        config: the merge config.
        varied: names and values, as `parse_settings` gives them; where empty, `STRENGTHS` for the method's strength.
        compare: the methods of the twins.
        default_density: see `twin`.

    Raises:
        FimError: a twin can't be, or two methods are the same.
    """
    own = strength_of(config.merge_method, varied)
    varied = dict(varied) or ({own: STRENGTHS} if own else {})
    if own in varied:
        varied = {own: varied[own], **varied}
    for method in (methods := [config.merge_method, *compare]):
        if methods.count(method) > 1:
            raise FimError(f"--compare: expected methods that differ, found {method} twice, or as the config's own")
    combinations = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
    by = own if own in varied else None
    runs = [_merge(config.merge_method, by, settings, with_settings(config, settings)) for settings in combinations]
    for method in compare:
        runs += [_merge(method, *twin(config, method, settings, default_density)) for settings in combinations]
    return list({run.name: run for run in runs}.values())


def series(runs: Sequence[Run]) -> list[list[Run]]:
    """The merges that have a strength, together where they differ in nothing else."""
    found: dict[Any, list[Run]] = {}
    for run in runs:
        if run.strength is not None:
            found.setdefault((run.method, *run.others.items()), []).append(run)
    return list(found.values())


def at_strength(config: MergeConfiguration, run: Run, value: float, default_density: Callable[[], float]) -> Run:
    """A merge like another but for its strength.

    Args:
        config: the merge config.
        run: one of those that `merges` made of it.
        value: the strength.
        default_density: see `twin`.
    """
    own = strength_of(config.merge_method, run.settings)
    assert own is not None
    assert run.method is not None
    settings = {own: value, **run.others}
    if run.method == config.merge_method:
        return _merge(run.method, own, settings, with_settings(config, settings))
    return _merge(run.method, *twin(config, run.method, settings, default_density))


def _merge(method: str, by: str | None, settings: Mapping[str, Any], config: MergeConfiguration) -> Run:
    said = [f"{name}={_shown(value)}" for name, value in settings.items()]
    return Run(" ".join([method, *said]), method, settings, by, config=config)


def _shown(value: Any) -> str:
    """A value as one writes it in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)
