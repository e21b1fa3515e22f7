"""A merge config -> what a sweep runs: the models as they are, and families of merges."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_fim.errors import FimError, reason, shown
from mergekit_fim.evaluate.runs.families import Family, Run, family_of
from mergekit_fim.evaluate.runs.settings import fine_tuned
from mergekit_fim.evaluate.runs.twins import twin

BASE, LONG = "base", "long"


def models_as_they_are(config: MergeConfiguration, also: Sequence[str] = ()) -> list[Run]:
    """List the base, every fine-tuned model in the config's order, and what else was named.

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
    return [Run(name, model) for name, model in named.items()]


def _reference(name: str) -> ModelReference:
    try:
        return ModelReference.parse(name)
    except Exception as error:  # pydantic's, and mergekit's RuntimeErrors
        raise FimError(
            f"--also: expected a model's folder or its name on the Hub, found {shown(name)} ({reason(error)})"
        ) from None


def _named(models: Iterable[ModelReference], taken: Iterable[str]) -> Iterator[tuple[str, ModelReference]]:
    """Name models by the last part of their path, or their adapter's, with a number where that is taken."""
    names = set(taken)
    for model in models:
        name = os.path.basename(os.path.normpath((model.lora or model.model).path)) or "model"
        candidates = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
        unique = next(candidate for candidate in candidates if candidate not in names)
        names.add(unique)
        yield unique, model


def families(
    config: MergeConfiguration,
    varied: Mapping[str, Sequence[Any]],
    compare: Sequence[str],
    default_density: Callable[[], float],
) -> list[Family]:
    """List the family of a config, and its twins.

    Args:
        config: the merge config.
        varied: names and values, as `parse_settings` gives them.
        compare: the methods of the twins.
        default_density: see `twin`; it is called when a twin makes its runs.

    Raises:
        FimError: a twin can't be, or two methods are the same.
    """
    for method in (methods := [config.merge_method, *compare]):
        if methods.count(method) > 1:
            raise FimError(f"--compare: expected methods that differ, found {method} twice, or as the config's own")
    family = family_of(config, config.merge_method, varied)
    return [family, *(twin(config, family, method, default_density) for method in compare)]
