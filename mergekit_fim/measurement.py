"""A measurement as a file: small JSON, written whole or not at all."""

import json
import os
import platform
from importlib.metadata import version
from typing import Any

import mergekit_fim
from mergekit_fim.errors import FimError
from mergekit_fim.fisher import FisherMeasurement
from mergekit_fim.inputs import InputModel

FORMAT, VERSION = "mergekit-fim/fisher", 1


def layers_as_json(measurement: FisherMeasurement) -> list[dict[str, Any]]:
    """The layers, as they stand in a measurement's file and in a merge's report."""
    return [
        {
            "index": layer.index,
            "parameters": layer.parameters,
            "fisher": layer.fisher,
            "fisher_stderr": layer.stderr,
            "squared_norms": list(layer.squared_norms),
        }
        for layer in measurement.layers
    ]


def as_json(measurement: FisherMeasurement, base: InputModel) -> dict[str, Any]:
    """A measurement with what it is of: the model, the settings and the versions of the packages."""
    path = base.reference.model
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {
            "id": str(base.reference),
            "revision": path.revision,
            "architecture": next(iter(base.config.architectures or ()), None),
            "num_layers": len(measurement.layers),
            "vocab_size": measurement.vocab_size,
        },
        "settings": {**vars(measurement.settings), "dtype": measurement.dtype},
        "layers": layers_as_json(measurement),
        "warnings": list(measurement.warnings),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What a measurement or a merge was made with."""
    packages = {name: version(name) for name in ("mergekit", "torch", "transformers", "accelerate")}
    return {"mergekit-fim": mergekit_fim.__version__, **packages, "python": platform.python_version()}


def check_writable(path: str) -> None:
    """Check that a file can be written, before the work that it is for.

    Raises:
        FimError: it is a folder, or its folder is missing or read-only.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise FimError(f"{path}: expected the name of a file to write, found a folder; add a file name")
    if not os.path.isdir(folder):
        raise FimError(f"{path}: the folder {folder} doesn't exist; make it first, or write elsewhere")
    if not os.access(folder, os.W_OK):
        raise FimError(f"{path}: the folder {folder} can't be written to; write elsewhere")


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write a JSON file atomically: no reader ever sees half of it.

    Raises:
        FimError: it can't be written.
    """
    part = f"{path}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
        os.replace(part, path)
    except OSError as error:
        if os.path.exists(part):
            os.remove(part)
        raise FimError(f"{path}: can't be written ({error.strerror}); free some space, or write elsewhere") from error
