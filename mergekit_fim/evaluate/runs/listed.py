"""Merge configs -> what a sweep runs: the models as they are, and families of merges."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_fim.errors import FimError, reason, shown
from mergekit_fim.evaluate.runs.families import Family, Run, family_of
from mergekit_fim.evaluate.runs.settings import fine_tuned, parse_settings
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
        numbered = (f"{name} ({number})" for number in itertools.count(2))
        unique = next(its for its in itertools.chain([name], numbered) if its not in names)
        names.add(unique)
        yield unique, model


def families(
    configs: Mapping[str, MergeConfiguration],
    given: Sequence[str],
    compare: Sequence[str],
    default_density: Callable[[], float],
) -> list[Family]:
    """List the family of every config, which are by their files, and the first one's twins.

    A single config's family is called by its method, of several each by its file's name. `given` is every
    `NAME=V1,V2,...`. The density is asked for when runs are made.

    Raises:
        FimError: a setting or a twin can't be, two families have one name, or two configs have other models.
    """
    (path, config), *others = configs.items()
    base, tuned = config.base_model, fine_tuned(config)
    for other, its in others:
        if its.base_model not in (None, base) or set(fine_tuned(its, base)) != set(tuned):
            raise FimError(
                f"{other}: expected the models of {path}, the base {base} with {', '.join(map(str, tuned))}, found "
                f"{its.base_model or 'no base'} with {', '.join(map(str, fine_tuned(its, base))) or 'none'}; merge the "
                "same models in both"
            )
    varied = parse_settings([its.merge_method for its in configs.values()], given)
    names = [os.path.splitext(os.path.basename(its))[0] for its in configs] if others else [config.merge_method]
    for name in (every := [*names, *compare]):
        if every.count(name) > 1:
            raise FimError(
                f"expected configs and methods of --compare with different names, found {name} twice; leave one out, "
                "or rename its file"
            )
    own = [family_of(*its, base) for its in zip(configs.values(), names, varied, strict=True)]
    return [*own, *(twin(config, own[0], method, default_density) for method in compare)]
