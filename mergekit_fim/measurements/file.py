"""A measurement as a file: small JSON that says what was measured, how, and of which model."""

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mergekit_fim
from mergekit_fim.config.parameters import PARAMETERS
from mergekit_fim.config.settings import FisherSettings
from mergekit_fim.errors import FimError
from mergekit_fim.files import written_whole
from mergekit_fim.fisher.measure import FisherMeasurement, LayerFisher
from mergekit_fim.models.identity import fingerprint
from mergekit_fim.models.inputs import InputModel
from mergekit_fim.text import brief

FORMAT, VERSION = "mergekit-fim/fisher", 1

# A measurement of 1,000 sequences on the 126 layers of a 405B model has 3 MB.
_LARGEST_FILE = 64 << 20
_AGAIN = "measure again with `mergekit-fim fisher`"


@dataclass(frozen=True)
class ModelIdentity:
    """Which model was measured.

    Attributes:
        id: its folder or its name on the Hub, with an adapter as in mergekit.
        revision: its branch, tag or commit, where one was given.
        architecture: the class in transformers.
        num_layers: its decoder layers.
        vocab_size: the random tokens were uniform over this many.
        fingerprint: see `fingerprint.fingerprint`.
    """

    id: str
    revision: str | None
    architecture: str | None
    num_layers: int
    vocab_size: int
    fingerprint: str

    @classmethod
    def of(cls, model: InputModel) -> "ModelIdentity":
        """The identity of a model that a merge uses."""
        return cls(
            str(model.reference),
            model.reference.model.revision,
            next(iter(model.config.architectures or ()), None),
            len(model.layout.layers),
            model.text_config.vocab_size,
            fingerprint(model),
        )

    def difference(self, other: "ModelIdentity") -> str | None:
        """In what two models that are not the same differ; None for two copies of one model."""
        if self.fingerprint == other.fingerprint:
            return None
        (weights, config), (other_weights, other_config) = (m.fingerprint.partition("-")[::2] for m in (self, other))
        parts = [("weights", weights, other_weights), ("config.json", config, other_config)]
        return " and ".join(name for name, a, b in parts if a != b)


@dataclass(frozen=True)
class Measurement:
    """A Fisher measurement with what it is of.

    Attributes:
        model: the model.
        fisher: the numbers, and the settings that they depend on.
        versions: the packages that it was made with.
    """

    model: ModelIdentity
    fisher: FisherMeasurement
    versions: Mapping[str, str]

    @classmethod
    def of(cls, fisher: FisherMeasurement, model: ModelIdentity) -> "Measurement":
        """A measurement that was just made."""
        return cls(model, fisher, versions())


def versions() -> dict[str, str]:
    """What a measurement or a merge was made with."""
    packages = {name: version(name) for name in ("mergekit", "torch", "transformers", "accelerate")}
    return {"mergekit-fim": mergekit_fim.__version__, **packages, "python": platform.python_version()}


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


def as_json(measurement: Measurement) -> dict[str, Any]:
    """A measurement as it is written, with a checksum that tells a changed one."""
    fisher = measurement.fisher
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": dict(vars(measurement.model)),
        "settings": {**vars(fisher.settings), "dtype": fisher.dtype},
        "layers": layers_as_json(fisher),
        "warnings": list(fisher.warnings),
        "versions": dict(measurement.versions),
    }
    return {**content, "checksum": _checksum(content)}


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def from_json(content: Any, where: str) -> Measurement:
    """Check the content of a measurement's file, whatever it is.

    Args:
        content: what JSON made of the file.
        where: what to call it in an error.

    Raises:
        FimError: it isn't a measurement that this version can read, or it was changed after it was written.
    """
    reader = _Reader(where)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise FimError(f"{where}: expected a measurement (format {FORMAT}), found {brief(found)}; {_AGAIN}")
    number = content.get("version")
    if isinstance(number, int) and number > VERSION:
        raise FimError(
            f"{where}: expected a measurement of version {VERSION}, found {number}, made by a newer mergekit-fim; "
            "upgrade mergekit-fim"
        )
    if number != VERSION or isinstance(number, bool):
        raise FimError(f"{where}: expected a measurement of version {VERSION}, found {brief(number)}; {_AGAIN}")
    model, settings = reader.get(content, "model", dict), reader.get(content, "settings", dict)
    identity = ModelIdentity(
        reader.get(model, "id", str, "model."),
        reader.get(model, "revision", str, "model.", optional=True),
        reader.get(model, "architecture", str, "model.", optional=True),
        reader.get(model, "num_layers", int, "model."),
        reader.get(model, "vocab_size", int, "model."),
        reader.get(model, "fingerprint", str, "model."),
    )
    given = {name: reader.get(settings, name, kind, "settings.") for name, kind in _SETTINGS.items()}
    for name, value in given.items():
        if not PARAMETERS[f"fisher_{name}"].accepts(value):
            raise reader.error(f"settings.{name}", PARAMETERS[f"fisher_{name}"].expected, value)
    layers = reader.get(content, "layers", list)
    if len(layers) != identity.num_layers or not layers:
        raise reader.error("layers", f"one entry for each of {identity.num_layers} decoder layers", len(layers))
    fisher = FisherMeasurement(
        identity.vocab_size,
        reader.get(settings, "dtype", str, "settings."),
        FisherSettings(**given),
        tuple(reader.layer(layer, index, given["samples"]) for index, layer in enumerate(layers)),
        tuple(str(warning) for warning in reader.get(content, "warnings", list)),
    )
    made_with = {str(k): str(v) for k, v in reader.get(content, "versions", dict).items()}
    if reader.get(content, "checksum", str) != _checksum(content):
        raise FimError(f"{where}: the measurement was changed after it was written (its checksum differs); {_AGAIN}")
    return Measurement(identity, fisher, made_with)


_SETTINGS = {"samples": int, "seq_len": int, "seed": int, "labels": str}


class _Reader:
    """Reads the parts of a measurement's file, and says what is wrong with them."""

    def __init__(self, where: str) -> None:
        self.where = where

    def error(self, name: str, expected: str, found: Any) -> FimError:
        return FimError(f"{self.where}: `{name}`: expected {expected}, found {brief(found)}; {_AGAIN}")

    def get(self, content: dict[str, Any], name: str, kind: type, prefix: str = "", *, optional: bool = False) -> Any:
        value = content.get(name)
        if value is None and optional:
            return None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(prefix + name, f"a JSON {_JSON_NAMES[kind]}", "nothing" if value is None else value)
        return value

    def layer(self, content: Any, index: int, samples: int) -> LayerFisher:
        prefix = f"layers[{index}]."
        if not isinstance(content, dict):
            raise self.error(prefix.rstrip("."), "a JSON object", content)
        if self.get(content, "index", int, prefix) != index:
            raise self.error(prefix + "index", str(index), content["index"])
        parameters = self.get(content, "parameters", int, prefix)
        if parameters < 1:
            raise self.error(prefix + "parameters", "at least 1", parameters)
        norms = self.get(content, "squared_norms", list, prefix)
        if len(norms) != samples:
            raise self.error(prefix + "squared_norms", f"one number for each of {samples} sequences", len(norms))
        for norm in norms:
            if not isinstance(norm, (int, float)) or isinstance(norm, bool) or not (norm >= 0 and math.isfinite(norm)):
                raise self.error(prefix + "squared_norms", "finite numbers of at least 0", norm)
        layer = LayerFisher(index, parameters, tuple(float(norm) for norm in norms))
        for name, value in (("fisher", layer.fisher), ("fisher_stderr", layer.stderr)):
            found = content.get(name)
            if value is None and found is None:
                continue
            if not isinstance(found, (int, float)) or not math.isclose(found, value or 0.0, rel_tol=1e-9, abs_tol=0.0):
                raise self.error(prefix + name, f"{value!r}, which follows from squared_norms", found)
        return layer


_JSON_NAMES = {dict: "object", list: "array", str: "string", int: "whole number"}


def read_measurement(path: str, name: str | None = None) -> Measurement:
    """Read and check a measurement's file.

    Args:
        path: the file.
        name: what to call it in an error; by default `path`.

    Raises:
        FimError: it can't be read, or isn't a measurement that this version can use.
    """
    return from_json(read_json(path, name or path), name or path)


def write_measurement(measurement: Measurement, path: str) -> None:
    """Write a measurement atomically: no reader ever sees half of it.

    Raises:
        FimError: it can't be written.
    """
    write_json(path, as_json(measurement))


def read_json(path: str, where: str) -> Any:
    """Read a JSON file of a size that one of ours can have, in which NaN and infinity are errors.

    Raises:
        FimError: it can't be read.
    """
    try:
        size = os.path.getsize(path)
        if os.path.isdir(path):
            raise FimError(f"{where}: expected a JSON file, found a folder; name the file in it")
        if size > _LARGEST_FILE:
            raise FimError(
                f"{where}: expected a JSON file of at most {_LARGEST_FILE >> 20} MB, found {size / 2**20:.0f} MB; "
                "name a file that mergekit-fim wrote"
            )
        with open(path, encoding="utf-8") as file:
            return json.load(file, parse_constant=_refuse)
    except OSError as error:
        raise FimError(f"{where}: can't be read ({error.strerror or error}); check the name") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FimError(f"{where}: expected a JSON file, found something else ({reason}); {_AGAIN}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"the value {constant}, which isn't finite")


def check_writable(path: str, *others: str) -> None:
    """Check that a file can be written, before the work that it is for.

    Args:
        path: the file.
        others: files that it must not take the place of.

    Raises:
        FimError: it is a folder, its folder is missing or read-only, or it is one of the others.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.basename(path):
        raise FimError(f"{path}: expected the name of a file to write, found a folder; add a file name")
    if path == "-":
        raise FimError(f"{path}: expected the name of a file to write; for the standard output, name /dev/stdout")
    for other in others:
        if os.path.realpath(path) == os.path.realpath(other):
            raise FimError(f"{path}: this would take the place of {other}, which the command needs; write elsewhere")
    if not os.path.isdir(folder):
        raise FimError(f"{path}: the folder {folder} doesn't exist; make it first, or write elsewhere")
    if not os.access(folder, os.W_OK):
        raise FimError(f"{path}: the folder {folder} can't be written to; write elsewhere")


def model_files(model: str) -> list[str]:
    """The files in a model's folder, if it is one, that aren't measurements: what must stay there."""
    names = os.listdir(model) if os.path.isdir(model) else []
    return [path for name in names if not _is_measurement(path := os.path.join(model, name))]


def _is_measurement(path: str) -> bool:
    try:
        content = read_json(path, path) if path.endswith(".json") else None
    except FimError:
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically: no reader ever sees half of it.

    Raises:
        FimError: it can't be written.
    """
    with written_whole(path) as part, open(part, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
