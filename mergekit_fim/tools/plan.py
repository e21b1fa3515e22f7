"""Merge config -> everything up to the first merged tensor, by mergekit's own planner."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit import merge as mergekit_merge
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration, OutputSliceDefinition
from mergekit.io.tasks import GatherTensors, LoaderCache, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from transformers import PretrainedConfig

from mergekit_fim.config.parameters import METHODS
from mergekit_fim.config.settings import check_config
from mergekit_fim.errors import FimError, check_own_code, reason
from mergekit_fim.models.checkpoint import model_config, tensor_index
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.prepass.result import PrePass


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

    @property
    def inputs(self) -> Mapping[ModelReference, InputModel]:
        """The models of a merge by this package's methods, the base first."""
        assert self.pre_pass is not None
        return self.pre_pass.inputs

    @property
    def slices(self) -> list[OutputSliceDefinition]:
        """The slices of the module that has the decoder layers, of a merge by this package's methods."""
        return (self.config.modules or {})[next(iter(self.inputs.values())).layout.stack].slices or []


def check_config_and_models(config: MergeConfiguration, options: MergeOptions) -> None:
    """Check a config, and open its models, before mergekit does, which says what is wrong but not with which model.

    The config comes first (mergekit's planner, hooked, has it checked again): a typo costs no download.
    """
    if config.merge_method in METHODS:
        check_config(config)
    LoaderCache().setup(options)
    for reference in sorted(config.referenced_models(), key=str):
        model_config(reference, options.trust_remote_code)
        tensor_index(reference)


def plan_merge(config: MergeConfiguration, options: MergeOptions) -> MergePlan:
    """Plan a merge of any method, its config left as it is; for this package's that runs the pre-pass.

    Raises:
        FimError: the merge would fail before its first tensor.
    """
    check_config_and_models(config, options)
    output_config_of = getattr(mergekit_merge, "_model_out_config", None)
    if output_config_of is None:
        raise FimError("mergekit-fim supports mergekit>=0.1.5,<0.2, which this one isn't: install a supported mergekit")
    try:
        config = config.model_copy(deep=True)  # mergekit normalises it in place
        architecture = get_architecture_info(config, options)
        output_config = output_config_of(config, architecture, trust_remote_code=options.trust_remote_code)
        planner = MergePlanner(config, architecture, options=options, out_model_config=output_config)
        planner.fim_plan_only = True  # for `hook.methods`: no folder is checked or made, nothing is shown
        tasks = planner.plan_to_disk("")
    except FimError:
        raise
    except Exception as error:  # mergekit, transformers and huggingface_hub each have their own
        check_own_code(error)
        raise FimError(f"mergekit can't plan this merge ({reason(error)}); change the config") from error
    saved = [task for task in tasks if isinstance(task, SaveTensor)]
    tensors = tuple(PlannedTensor(task.tensor_name, task.tensor_task) for task in saved)
    return MergePlan(planner.config, output_config, tensors, getattr(planner, "fim_pre_pass", None))


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
