"""A family -> its twin: the same models at the same strengths, by a method of mergekit's."""

from collections.abc import Callable, Mapping
from typing import Any

from mergekit.config import InputModelDefinition, MergeConfiguration

from mergekit_fim.config.parameters import METHODS, PARAMETERS
from mergekit_fim.errors import FimError, shown
from mergekit_fim.evaluate.runs.families import Family
from mergekit_fim.evaluate.runs.settings import (
    blocks,
    fine_tuned,
    leave_only,
    parameter_names,
    placed,
    strength_of,
    with_settings,
)

TWINS = ("task_arithmetic", "ties", "linear")


def twin(config: MergeConfiguration, family: Family, method: str, default_density: Callable[[], float]) -> Family:
    """Make the twin of a config's family.

    Its strength is `weight`: each model's weight of the config times the strength, with `normalize: false`, as a single
    model's weight means nothing otherwise. Where a config normalises the weights of several models, its twin does so
    too, and its strength is `lambda`, the factor of their sum. `linear` takes no base as such: it gets the base as one
    model more, whose weight is what the others leave of 1. What varies in the family, and the method knows, varies in
    the twin. `ties` gets the default density where the config has none.

    Raises:
        FimError: the method isn't one of `TWINS`, or has no use for the config's strength or weights.
    """
    if method not in TWINS:
        raise FimError(f"--compare: expected one of {', '.join(TWINS)}, found {shown(method)}; name one of these")
    names = parameter_names(method) - (set() if method == "ties" else {"density"})  # the others have no use for it
    own, parameters = strength_of(config.merge_method, family.values), config.parameters or {}
    values = family.values.get(own, [parameters.get(own)])
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FimError(
                f"--compare: {method} gets its `weight` from the value of `{own}`, found "
                f"{'none' if value is None else shown(value)}; add --set {own}=..."
            )
    ours = config.merge_method in METHODS
    default = ours and PARAMETERS["normalize"].default_for(config.merge_method)
    normalizes = len(fine_tuned(config)) > 1 and method != "linear" and bool(parameters.get("normalize", default))
    strength = "lambda" if normalizes else "weight"
    shared = {name: its for name, its in family.values.items() if name in names - {own, strength}}

    def config_of(settings: Mapping[str, Any]) -> MergeConfiguration:
        made = with_settings(config, {name: settings[name] for name in shared})
        made = made.model_copy(update={"merge_method": method})
        for block in blocks(made):
            leave_only(block, names - {own})
        made = with_settings(made, {"normalize": normalizes})
        _weigh(made, 1.0 if normalizes else settings[strength])
        if normalizes:
            made.parameters = {"lambda": 1.0, **(made.parameters or {})}
            for block in (block for block in blocks(made) if "lambda" in (block.parameters or {})):
                block.parameters["lambda"] = _number(made, "lambda", [block]) * settings[strength]
        if method == "linear":
            _add_base(made)
        if method == "ties":
            made.parameters = {"density": default_density(), **(made.parameters or {})}
        return made

    return Family(method, strength, {strength: values, **shared}, config_of)


def _number(config: MergeConfiguration, name: str, scopes: list[Any]) -> float:
    """Read a parameter that must be one number, 1 where it isn't set, in the scopes' order of precedence."""
    value = next((block.parameters[name] for block in scopes if name in (block.parameters or {})), 1.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FimError(
            f"--compare: {config.merge_method} multiplies `{name}` by the strength, expected one number for each "
            f"model, found {shown(value)}; leave --compare out"
        )
    return float(value)


def _weigh(config: MergeConfiguration, strength: float) -> None:
    """Multiply the weight of every fine-tuned model by the strength."""
    tuned = fine_tuned(config)
    weights = [
        (entry, _number(config, "weight", [entry, *above])) for entry, *above in placed(config) if entry.model in tuned
    ]
    for block in blocks(config):
        leave_only(block, (block.parameters or {}).keys() - {"weight"})
    for entry, weight in weights:
        entry.parameters = {**(entry.parameters or {}), "weight": weight * strength}


def _add_base(config: MergeConfiguration) -> None:
    """Make the base one model more, with what the weights of the others leave of 1."""
    if not config.models:
        raise FimError("--compare: linear takes the base as one model more, which needs `models:`; leave it out")
    assert config.base_model is not None
    tuned = fine_tuned(config)
    entries = [entry for entry in config.models if entry.model in tuned]
    weight = 1.0 - sum((entry.parameters or {})["weight"] for entry in entries)
    config.models = [InputModelDefinition(model=config.base_model, parameters={"weight": weight}), *entries]
