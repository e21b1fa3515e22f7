"""The models of a sweep's runs: those as they are, and merges, which are made when they are to answer."""

import contextlib
import io
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.common import ModelPath
from mergekit.options import MergeOptions

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.answers.engine import Engine, ModelFiles
from mergekit_fim.evaluate.answers.prompts import Template, chat_template
from mergekit_fim.evaluate.answers.tokens import load_tokenizer
from mergekit_fim.evaluate.folder import SweepFolder, file_name, taken
from mergekit_fim.evaluate.runs.families import Run
from mergekit_fim.files import FolderInMemory
from mergekit_fim.tools.whole import merge_whole


@dataclass(frozen=True, eq=False)
class Models:
    """The models of runs."""

    folder: SweepFolder  # where merges are that are kept, or have no room in memory
    options: MergeOptions
    template: Template | None  # in place of the models' chat templates
    fingerprints: Mapping[str, str]  # of the models as they are, by run
    engine: Engine
    memory: FolderInMemory | None = None  # where merges are that aren't kept, if there is room
    _tokenizers: dict[str, Any] = field(default_factory=dict)  # those that were read, by run

    def tokenizer(self, run: Run) -> Any:
        """A run's tokenizer. Its merge has to be there for that; an adapter's is its base's."""
        if run.name not in self._tokenizers:
            its = run.model.model if run.model is not None else ModelPath(path=self.merged(run))
            read = load_tokenizer(run.name, its.path, its.revision, self.options.trust_remote_code)
            self._tokenizers[run.name] = read
        return self._tokenizers[run.name]

    def template_of(self, run: Run) -> Template:
        """By which a model gets its questions."""
        return self.template or chat_template(run.name, self.tokenizer(run))

    def files(self, run: Run) -> ModelFiles:
        """Where a run's model is. Its merge has to be there for that."""
        own = self.options
        adapted = (own.lora_merge_cache, own.trust_remote_code, own.lora_merge_dtype)
        its = ModelPath(path=self.merged(run)) if run.model is None else run.model.merged(*adapted).model
        return ModelFiles(run.name, its.path, its.revision, self.tokenizer(run))

    def merged(self, run: Run) -> str:
        """The folder of a merge, which is made unless it is there; this process has to have the run."""
        places = self._places(run.name)
        path = next((place for place in places if os.path.isfile(os.path.join(place, "config.json"))), None)
        if path is None:
            assert run.config is not None
            path = places[-1 if self.memory is not None and self.memory.has_room() else 0]
            with contextlib.redirect_stdout(io.StringIO()):  # the table of coefficients is in the merge's report
                merge_whole(run.config, None, path, self.options)
        return path

    def drop(self, run: str) -> None:
        """Remove a merge, unless another process is at it."""
        for path in filter(os.path.isdir, self._places(run)):
            with taken(self.folder, run) as free:
                if free:
                    shutil.rmtree(path)

    def _places(self, run: str) -> list[str]:
        """Where a merge may be: in the sweep's folder, and in memory."""
        in_memory = [] if self.memory is None else [os.path.join(self.memory.path, file_name(run))]
        return [self.folder.model(run), *in_memory]


def dtype_named(folder: SweepFolder, name: str) -> torch.dtype:
    """The dtype that a sweep's record names."""
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise FimError(f"{folder.record}: expected the name of a torch dtype, found {name}; correct it")
    return found
