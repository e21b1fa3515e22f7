"""The folder of a merged model, which is never to be found there in part."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator

from mergekit_fim.atomic import part_path
from mergekit_fim.errors import FimError

# Weights, whole or left by a merge that failed, and the index of their files.
_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+(-of-\d+)?)?\.(safetensors|bin)(\.index\.json)?")


def check_output(path: str) -> None:
    """Check that a merged model can be written to a folder, before the work that this takes.

    Raises:
        FimError: there is no name, a file is in the way, or the folder is read-only.
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


@contextlib.contextmanager
def model_written_whole(path: str) -> Iterator[str]:
    """The name of a folder for a model, which becomes `path` when all went well and vanishes when not.

    A model that is in `path` already is replaced, other files there stay as they are.

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
        shutil.rmtree(part, ignore_errors=True)


def _replace(made: str, target: str) -> None:
    """Move a model over another one. Nothing loads a model without its config.json: it goes first and comes last."""
    files = sorted(os.listdir(made), key=lambda name: name == "config.json")
    for name in sorted(os.listdir(target), key=lambda name: name != "config.json"):
        if name == "config.json" or _WEIGHTS.fullmatch(name):
            os.remove(os.path.join(target, name))
    for name in files:
        os.replace(os.path.join(made, name), os.path.join(target, name))


def _nearest(path: str) -> str:
    """`path`, or where there is nothing of that name, the nearest above it that exists."""
    path = os.path.realpath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path
