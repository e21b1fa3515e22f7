"""Merge config -> everything up to the first merged tensor, by mergekit's own planner, and nothing merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import GatherTensors, LoaderCache, SaveTensor
from mergekit.merge import run_merge
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from pydantic import ValidationError
from transformers import PretrainedConfig

from mergekit_fim.errors import FimError, check_own_code
from mergekit_fim.inputs import model_config, tensor_index
from mergekit_fim.integration import Planned, plan_only
from mergekit_fim.parameters import METHODS
from mergekit_fim.prepass import PrePass, check_config
from mergekit_fim.text import brief, reason


@dataclass(frozen=True, eq=False)
class PlannedTensor:
    """One tensor of the merged model, as mergekit will make it.

    Attributes:
        name: its name in the merged model.
        task: mergekit's task that merges it.
    """

    name: str
    task: ExecuteMergeMethodTask

    def parameter(self, name: str) -> Any:
        """A parameter of the whole tensor, as mergekit resolved it."""
        return self.task.parameters[name]

    def per_model(self, name: str) -> dict[ModelReference, Any]:
        """A parameter of each fine-tuned model, as mergekit resolved it, in the config's order."""
        own = self.task.input_parameters
        return {m: own[m][name] for m in self.task.model_order if m != self.task.base_model}

    def sources(self) -> Mapping[ModelReference, Any]:
        """What it is made of: mergekit's description of the tensor of every model, the base included."""
        gather: Any = self.task.gather_tensors
        while not isinstance(gather, GatherTensors):  # the vocabulary is permuted or truncated
            gather = gather.gather_tensors
        return dict(gather.weight_info.items())


@dataclass(frozen=True, eq=False)
class MergePlan:
    """A merge up to its first tensor.

    Attributes:
        config: the config, normalised to modules, slices and sources; with the merge coefficients.
        output_config: the transformers config that the merged model will get.
        tensors: the merged model's tensors, in order.
        pre_pass: the Fisher pre-pass; None for mergekit's own methods.
    """

    config: MergeConfiguration
    output_config: PretrainedConfig
    tensors: tuple[PlannedTensor, ...]
    pre_pass: PrePass | None


def read_config(path: str) -> tuple[MergeConfiguration, str]:
    """Read a merge config as `mergekit-yaml` does: the config, and its text.

    Raises:
        FimError: it can't be read, isn't YAML, or isn't a merge config.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LARGEST_CONFIG + 1)
        if len(text) > _LARGEST_CONFIG:
            raise FimError(
                f"{path}: expected a merge config of at most {_LARGEST_CONFIG >> 20} MB, found more; check the name"
            )
        content = _parse(text)
    except OSError as error:
        raise FimError(f"{path}: can't be read ({error.strerror or error}); check the name") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # of odd tags, numbers
        raise FimError(
            f"{path}: expected a merge config in YAML, found something else ({reason(error)}); correct it"
        ) from error
    if not isinstance(content, dict):
        raise FimError(f"{path}: expected a merge config in YAML, found {type(content).__name__}; check the name")
    try:
        return MergeConfiguration.model_validate(content), text
    except ValidationError as error:
        raise FimError(f"{path}: not a merge config: {_misfit(error, content)}; change it") from error
    except Exception as error:  # the RuntimeErrors of mergekit's own checks
        raise FimError(f"{path}: not a merge config that mergekit can use ({reason(error)}); change it") from error


# What `export` writes for 126 layers has some 20 kB, and PyYAML takes seconds for a megabyte.
_LARGEST_CONFIG = 1 << 20
_MOST_VALUES = 1_000_000


def _parse(text: str) -> Any:
    """What YAML makes of a text, unless its aliases, which repeat a part without a copy, stand for far more than that.

    A few lines can stand for billions of values, which the first to go through them, or to print them, would make.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > _MOST_VALUES:
            raise ValueError(f"its aliases (`*name`) make it more than {_MOST_VALUES:,} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, aliases included.

    Raises:
        ValueError: it contains itself.
    """
    if id(node) not in known:
        known[id(node)] = -1
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        inner = parts if isinstance(node, yaml.CollectionNode) else []
        known[id(node)] = 1 + sum(_values(part, known) for part in inner)
    if known[id(node)] < 0:
        raise ValueError("an alias (`*name`) within what it stands for")
    return known[id(node)]


def _misfit(error: ValidationError, content: Any) -> str:
    """The first thing in a config that mergekit's definition of it has no place for, by where it stands."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ""
    for part in first["loc"]:
        if isinstance(content, dict) and part in content:
            where += f".{part}" if where else str(part)
        elif isinstance(content, list) and isinstance(part, int) and part < len(content):
            where += f"[{part}]"
        elif first["type"] == "missing" and part == first["loc"][-1]:
            return f"`{brief(where)}`: {part} is missing" if where else f"`{part}` is missing"
        else:  # the name of a type among several that would do
            return f"`{brief(where)}`: found {brief(content)}, which has no meaning there"
        content = content[part]
    return f"`{brief(where)}`: {first['msg'][:1].lower()}{first['msg'][1:]}, found {brief(content)}"


def check(config: MergeConfiguration, options: MergeOptions) -> None:
    """Check a config, and open its models, before mergekit does, which says what is wrong but not with which model.

    Raises:
        FimError: a bad config, or a model that isn't there or is damaged.
    """
    if config.merge_method in METHODS:
        check_config(config, options)
    LoaderCache().setup(options)
    for reference in sorted(config.referenced_models(), key=str):
        model_config(reference, options.trust_remote_code)
        tensor_index(reference)


def plan_merge(config: MergeConfiguration, options: MergeOptions) -> MergePlan:
    """Plan a merge of any method; for `fim_ties` and `fim_ta` that runs the Fisher pre-pass.

    Args:
        config: the merge config, left as it is.
        options: as for the merge.

    Raises:
        FimError: the merge would fail before its first tensor.
    """
    check(config, options)
    try:
        with plan_only():
            run_merge(config.model_copy(deep=True), "", options)  # mergekit normalises it in place
    except Planned as planned:
        saved = [task for task in planned.tasks if isinstance(task, SaveTensor)]
        return MergePlan(
            planned.planner.config,
            planned.planner.out_model_config,
            tuple(PlannedTensor(task.tensor_name, task.tensor_task) for task in saved),
            getattr(planned.planner, "fim_pre_pass", None),
        )
    except FimError:
        raise
    except Exception as error:  # mergekit, transformers and huggingface_hub each have their own
        check_own_code(error)
        raise FimError(f"mergekit can't plan this merge ({reason(error)}); change the config") from error
    raise FimError("this mergekit merges without a plan; install mergekit>=0.1.5,<0.2")


def plan_fim_merge(config: MergeConfiguration, options: MergeOptions) -> tuple[MergePlan, PrePass]:
    """Plan a merge by one of this package's methods.

    Raises:
        FimError: it is of another method, or would fail before its first tensor.
    """
    if config.merge_method not in METHODS:
        raise FimError(f"merge_method: expected {' or '.join(METHODS)}, found {config.merge_method}; change the config")
    plan = plan_merge(config, options)
    assert plan.pre_pass is not None
    return plan, plan.pre_pass
