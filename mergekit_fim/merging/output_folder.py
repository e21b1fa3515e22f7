"""Write a merged model's folder so that it is never there in part."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.io.tasks import FinalizeModel
from mergekit.io.tensor_writer import TensorWriter

from mergekit_fim.errors import FimError
from mergekit_fim.files import REPORT_NAME, part_path, write_text

# Weights and the index of their files, under the names that a whole model has, and under those that mergekit gives the
# files of one that isn't complete.
_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_UNFINISHED = re.compile(r"(pytorch_)?model-\d+\.(safetensors|bin)")


def check_output(path: str, config: MergeConfiguration) -> None:
    """Check that a merged model can be written to a folder, before the work that this takes.

    Raises:
        FimError: there is no name, a file is in the way, the folder is read-only, or one of the merge's own inputs.
    """
    if not path:
        raise FimError("expected the name of a folder to write the merged model to, found an empty one; name one")
    there = _nearest(path)
    if not os.path.isdir(there):
        raise FimError(
            f"{path}: expected a folder to write the merged model to, found the file {there}; write elsewhere"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise FimError(f"{path}: the folder {there} can't be written to; write elsewhere")
    for reference in config.referenced_models() if os.path.isdir(path) else ():
        for part in (reference.model, reference.lora):
            if part is not None and os.path.isdir(part.path) and os.path.samefile(part.path, path):
                raise FimError(f"{path}: this is the folder of {part.path}, which the merge reads; write elsewhere")


@contextlib.contextmanager
def model_written_whole(path: str) -> Iterator[str]:
    """Name a folder for a model, which becomes `path` when all went well and vanishes when not.

    A model that is in `path` already is replaced. Other files there stay.

    Raises:
        FimError: it can't be written.
    """
    folder, name = os.path.split(os.path.realpath(path))
    part = part_path(_nearest(path), name)
    try:
        yield os.path.join(part, name)
        try:
            os.makedirs(folder, exist_ok=True)
            for made in os.listdir(part):  # for a few architectures mergekit makes a second one, of another name
                target = os.path.join(folder, made)
                if os.path.isdir(target):
                    _replace(os.path.join(part, made), target)
                else:
                    os.rename(os.path.join(part, made), target)
        except OSError as error:
            raise FimError(f"{path}: can't be written ({error.strerror or error}); write elsewhere") from error
    finally:
        for _ in range(100):  # threads of a merge that failed (`--async-write`) may still be writing into it
            shutil.rmtree(part, ignore_errors=True)
            if not os.path.lexists(part):
                break
            time.sleep(0.05)


def _replace(made: str, target: str) -> None:
    """Move a model over another one; its config.json comes last."""
    _remove_model(target)
    for name in filter(_UNFINISHED.fullmatch, os.listdir(target)):
        os.remove(os.path.join(target, name))
    for name in sorted(os.listdir(made), key=lambda name: name == "config.json"):
        os.replace(os.path.join(made, name), os.path.join(target, name))


def _remove_model(folder: str) -> None:
    """Remove a whole model's weights, config and report; other files stay.

    Nothing loads a model without its config.json, so that goes first: wherever this is cut off, what is left isn't one.
    """
    for name in sorted(os.listdir(folder), key=lambda name: name != "config.json"):
        if name in ("config.json", REPORT_NAME) or _WEIGHTS.fullmatch(name):
            os.remove(os.path.join(folder, name))


class ReplaceModel(FinalizeModel):
    """mergekit's `FinalizeModel`, which gives the model's files their names, after removing an older model's.

    mergekit leaves an older model's files that no new one has the name of: its single file beside new shards, which
    transformers would go on to load, or its shards beside a new single file, which mergekit would. Wherever a merge
    stops, a report lies only beside its own model, and a config.json, which mergekit writes last, beside its weights.
    """

    report: str

    def execute(self, writer: TensorWriter, **kwargs: Any) -> None:
        """Remove the older model and its report, name the new one's files, and write its report."""
        _remove_model(writer.out_path)
        super().execute(writer, **kwargs)
        write_text(os.path.join(writer.out_path, REPORT_NAME), self.report)


def _nearest(path: str) -> str:
    """`path`, or where there is nothing of that name, the nearest above it that exists."""
    path = os.path.realpath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path
