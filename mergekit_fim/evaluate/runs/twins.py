"""A merge by one method -> the same merge by another: what a method is compared with."""

from collections.abc import Callable, Mapping
from typing import Any

from mergekit.config import ConditionalParameter, InputModelDefinition, MergeConfiguration
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import BasePolicy

from mergekit_fim.config.parameters import METHODS, PARAMETERS
from mergekit_fim.errors import FimError, shown
from mergekit_fim.evaluate.runs.varied import (
    blocks,
    fine_tuned,
    keep,
    parameter_names,
    placed,
    spec_of,
    strength_of,
    with_settings,
)


def twin(
    config: MergeConfiguration, method: str, settings: Mapping[str, Any], default_density: Callable[[], float]
) -> tuple[str | None, dict[str, Any], MergeConfiguration]:
    """The merge of the same models by another method, at the same strength.

    What `alpha_mean` is to this package's methods, `t` is to slerp and `weight` to mergekit's other methods: each
    model's weight of the config times that, with `normalize: false`, as the weight of a single model means nothing
    otherwise. Where a config normalises the weights of several models, its twin does so too, and has its strength in
    `lambda`, the factor of what they come to. A method that takes no base as such, as `linear`, gets it as one model
    more, with what the others leave of 1.

    Args:
        config: the merge.
        method: of the twin.
        settings: what the merge has in place of the config's, its strength first; what the twin knows too, it gets.
        default_density: for a method that trims, where the config has no density.

    Returns:
        The name of the strength, if there is one; what is set, the strength first; and the config.

    Raises:
        FimError: there is no such method, it can't merge these models, or it lacks the strength.
    """
    with_base = _takes_base_as_a_model(config, method)
    trims = method == "fim_ties" or getattr(registry.get(method), "sparsification_method", None) is not None
    names = _names(config.merge_method, method, trims)
    own, its = strength_of(config.merge_method, settings), strength_of(method)
    strength = settings.get(own or "", (config.parameters or {}).get(own or ""))
    if its is not None and (isinstance(strength, bool) or not isinstance(strength, (int, float))):
        raise FimError(
            f"--compare: {method} gets its `{its}` from the value of `{own}`, found "
            f"{'none' if strength is None else shown(strength)}; add --set {own}=..."
        )
    made = with_settings(config, settings).model_copy(update={"merge_method": method})
    for block in blocks(made):
        keep(block, names - {own})
    shared = {name: value for name, value in settings.items() if name in names - {own, its}}
    if its is None:
        return None, shared, made
    if method in METHODS or its == "t":
        made = with_settings(made, {its: strength})
    elif len(fine_tuned(config)) > 1 and {"lambda", "normalize"} <= names and _normalizes(config):
        its, made = "lambda", _in_all(made, strength, with_base=with_base)
    else:
        made = with_settings(made, dict.fromkeys({"normalize", "normalize_weights"} & names, False))
        _weigh(made, strength, with_base=with_base)
    if trims and method not in METHODS and not _has_densities(made):
        made.parameters = {**(made.parameters or {}), "density": default_density()}
    return its, {its: strength, **shared}, made


def _names(own: str, method: str, trims: bool) -> set[str]:
    """The parameters that a twin takes from a merge by the method `own`."""
    names = parameter_names(method)
    if not trims:
        names -= {"density"}  # some know it that have no use for it
    if "fim_kron" in (method, own) and method != own:
        names -= {"fisher"}  # files of another kind
    return names


def _takes_base_as_a_model(config: MergeConfiguration, method: str) -> bool:
    """Whether a method takes the base as one model more.

    Raises:
        FimError: it can't merge these models.
    """
    contract = spec_of(method).contract
    ignored = contract.base is BasePolicy.IGNORED
    try:
        contract.validate_ids([config.base_model, *fine_tuned(config)], None if ignored else config.base_model)
    except ValueError as error:
        raise FimError(f"--compare: {method} can't merge these models ({error}); leave it out") from None
    return ignored


def _in_all(config: MergeConfiguration, strength: float, *, with_base: bool) -> MergeConfiguration:
    """A merge whose weights are normalised, with its strength in `lambda`."""
    made = with_settings(config, {"normalize": True})
    made.parameters = {"lambda": 1.0, **(made.parameters or {})}
    for block in (block for block in blocks(made) if "lambda" in (block.parameters or {})):
        block.parameters = {**block.parameters, "lambda": _times(block.parameters["lambda"], strength)}
    _weigh(made, 1.0, with_base=with_base)
    return made


def _has_densities(config: MergeConfiguration) -> bool:
    """Whether every fine-tuned model has a density of its own."""
    tuned = fine_tuned(config)
    return all(
        any("density" in (block.parameters or {}) for block in scopes)
        for scopes in placed(config)
        if scopes[0].model in tuned
    )


def _normalizes(config: MergeConfiguration) -> bool:
    """Whether a merge divides by the sum of the models' weights."""
    default = PARAMETERS["normalize"].default_for(config.merge_method) if config.merge_method in METHODS else False
    return bool((config.parameters or {}).get("normalize", default))


def _times(setting: Any, factor: float) -> Any:
    """A setting of a number, a gradient or filters, with all its values multiplied."""
    if isinstance(setting, ConditionalParameter):
        return setting.model_copy(update={"value": _times(setting.value, factor)})
    return [_times(item, factor) for item in setting] if isinstance(setting, list) else float(setting) * factor


def _weigh(config: MergeConfiguration, strength: float, *, with_base: bool) -> None:
    """Give every fine-tuned model its weight of the config, 1 where it has none, times the strength."""
    tuned = fine_tuned(config)
    own = [scopes for scopes in placed(config) if scopes[0].model in tuned]
    for entry, *above in own:
        given = [block.parameters["weight"] for block in (entry, *above) if "weight" in (block.parameters or {})]
        entry.parameters = {**(entry.parameters or {}), "weight": _times((given or [1.0])[0], strength)}
    for block in (block for _, *above in own for block in above):
        keep(block, (block.parameters or {}).keys() - {"weight"})
    if with_base:
        weights = [entry.parameters["weight"] for entry, *_ in own]
        if not config.models or not all(isinstance(weight, float) for weight in weights):
            raise FimError(
                f"--compare: {config.merge_method} takes the base as one model more, which needs `models:` and one "
                "number as the weight of each; leave it out"
            )
        assert config.base_model is not None
        base = InputModelDefinition(model=config.base_model, parameters={"weight": 1.0 - sum(weights)})
        config.models = [base, *(entry for entry in config.models if entry.model in tuned)]
