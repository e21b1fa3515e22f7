"""Merge config -> everything up to the first merged tensor, by mergekit's own planner, and nothing merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import GatherTensors, LoaderCache, SaveTensor
from mergekit.merge import run_merge
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_fim.config.parameters import METHODS
from mergekit_fim.errors import FimError, check_own_code
from mergekit_fim.hook import Planned, plan_only
from mergekit_fim.models.inputs import model_config, tensor_index
from mergekit_fim.prepass import PrePass, check_config
from mergekit_fim.text import reason


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
