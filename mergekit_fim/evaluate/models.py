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
    """The models of runs.

    Attributes:
        folder: the sweep's, where merges are that are kept, or have no room in memory.
        options: mergekit's.
        template: in place of the models' chat templates.
        fingerprints: of the models as they are, by run.
        engine: what runs them.
        memory: where merges are that aren't kept, if there is room.
    """

    folder: SweepFolder
    options: MergeOptions
    template: Template | None
    fingerprints: Mapping[str, str]
    engine: Engine
    memory: FolderInMemory | None = None
    _tokenizers: dict[str, Any] = field(default_factory=dict)  # those that were read, by run

    def tokenizer(self, run: Run) -> Any:
        """A run's tokenizer. Its merge has to be there for that; an adapter's is its base's."""
        if run.name not in self._tokenizers:
            its = run.model.model if run.model is not None else ModelPath(path=self.merged(run))
            trust = self.options.trust_remote_code
            self._tokenizers[run.name] = load_tokenizer(run.name, its.path, its.revision, trust)
        return self._tokenizers[run.name]

    def template_of(self, run: Run) -> Template:
        """By which a model gets its questions."""
        return self.template or chat_template(run.name, self.tokenizer(run))

    def files(self, run: Run) -> ModelFiles:
        """Where a run's model is. Its merge has to be there for that."""
        options, tokenizer = self.options, self.tokenizer(run)
        if run.model is None:
            path, revision = self.merged(run), None
        else:
            its = run.model.merged(options.lora_merge_cache, options.trust_remote_code, options.lora_merge_dtype).model
            path, revision = its.path, its.revision
        return ModelFiles(run.name, path, revision, tokenizer)

    def merged(self, run: Run, *, card: bool = False) -> str:
        """The folder of a merge, which is made unless it is there.

        Args:
            run: the merge; this process has to have it.
            card: write a model card, for which mergekit asks the Hub about names.
        """
        places = self._places(run.name)
        path = next((place for place in places if os.path.isfile(os.path.join(place, "config.json"))), None)
        if path is None:
            assert run.config is not None
            path = places[-1 if self.memory is not None and self.memory.has_room() else 0]
            card = card and self.options.write_model_card
            with contextlib.redirect_stdout(io.StringIO()):  # the table of coefficients is in the merge's report
                merge_whole(run.config, None, path, self.options.model_copy(update={"write_model_card": card}))
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
    """The dtype that a sweep's record names.

    Raises:
        FimError: there is none of that name.
    """
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise FimError(f"{folder.record}: expected the name of a torch dtype, found {name}; correct it")
    return found
