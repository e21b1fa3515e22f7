"""Plan a merge up to its first tensor, by mergekit's own planner."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit import merge as mergekit_merge
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import GatherTensors, LoaderCache, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from transformers import PretrainedConfig

from mergekit_fim.config.file import validated
from mergekit_fim.config.parameters import METHODS
from mergekit_fim.config.settings import check_config
from mergekit_fim.errors import FimError
from mergekit_fim.models.checkpoint import explained, model_config, tensor_index
from mergekit_fim.prepass.result import PrePass


@dataclass(frozen=True, eq=False)
class PlannedTensor:
    """One tensor of the merged model: its name there, and mergekit's task that merges it."""

    name: str
    task: ExecuteMergeMethodTask

    def parameter(self, name: str) -> Any:
        """Find a parameter of the whole tensor, as mergekit resolved it."""
        return self.task.parameters[name]

    def per_model(self, name: str) -> dict[ModelReference, Any]:
        """Find a parameter of each fine-tuned model, as mergekit resolved it, in the config's order."""
        own = self.task.input_parameters
        return {m: own[m][name] for m in self.task.model_order if m != self.task.base_model}

    def sources(self) -> Mapping[ModelReference, Any]:
        """Find what it is made of: mergekit's description of every model's tensor, the base's included."""
        gather: Any = self.task.gather_tensors
        while not isinstance(gather, GatherTensors):  # the vocabulary is permuted or truncated
            gather = gather.gather_tensors
        return dict(gather.weight_info.items())


@dataclass(frozen=True, eq=False)
class MergePlan:
    """A merge up to its first tensor."""

    config: MergeConfiguration  # normalised to modules, slices and sources; with the merge coefficients
    output_config: PretrainedConfig  # that the merged model will get
    tensors: tuple[PlannedTensor, ...]  # in order
    fim: PrePass | None  # None for mergekit's own methods

    @property
    def pre_pass(self) -> PrePass:
        """The pre-pass of a merge by this package's methods."""
        assert self.fim is not None
        return self.fim


def check_config_and_models(config: MergeConfiguration, options: MergeOptions) -> None:
    """Check a config, then open its models. mergekit's own errors don't say which model is wrong.

    The config comes first (mergekit's planner, hooked, has it checked again): a typo costs no download.
    """
    if config.merge_method in METHODS:
        check_config(config)
    LoaderCache().setup(options)
    for reference in sorted(config.referenced_models(), key=str):
        model_config(reference, options.trust_remote_code)
        tensor_index(reference)


def plan_merge(config: MergeConfiguration, options: MergeOptions) -> MergePlan:
    """Plan a merge of any method, its config left as it is; for this package's methods, run the pre-pass.

    Raises:
        FimError: the merge would fail before its first tensor.
    """
    check_config_and_models(config, options)
    output_config_of = getattr(mergekit_merge, "_model_out_config", None)
    if output_config_of is None:
        raise FimError("mergekit-fim supports mergekit>=0.1.5,<0.2, which this one isn't: install a supported mergekit")
    with explained("mergekit can't plan this merge", "change the config"):
        config = config.model_copy(deep=True)  # mergekit normalises it in place
        architecture = get_architecture_info(config, options)
        output_config = output_config_of(config, architecture, trust_remote_code=options.trust_remote_code)
        planner = MergePlanner(config, architecture, options=options, out_model_config=output_config)
        planner.fim_plan_only = True  # for `hook.methods`: no folder is checked or made, nothing is shown
        tasks = planner.plan_to_disk("")
    saved = [task for task in tasks if isinstance(task, SaveTensor)]
    tensors = tuple(PlannedTensor(task.tensor_name, task.tensor_task) for task in saved)
    return MergePlan(planner.config, output_config, tensors, getattr(planner, "fim_pre_pass", None))


def resolve(config: MergeConfiguration | dict[str, Any], options: MergeOptions | None = None) -> MergePlan:
    """Run everything of a merge by one of this package's methods up to its coefficients, and merge nothing.

    Returns:
        The plan: its `config` has the coefficients as mergekit's filtered per-model `alpha`, and its `pre_pass` the
        numbers that led to them.

    Raises:
        FimError: the merge would fail before its first tensor.
    """
    config = validated(config, "the config")
    if config.merge_method not in METHODS:
        raise FimError(f"merge_method: expected {' or '.join(METHODS)}, found {config.merge_method}; change the config")
    return plan_merge(config, options or MergeOptions(quiet=True))
