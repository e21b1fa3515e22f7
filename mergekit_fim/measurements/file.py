"""Write and read a measurement's file: small JSON that says what was measured, how, and of which model."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.errors import FimError, brief, misfit
from mergekit_fim.files import read_json, write_json
from mergekit_fim.measurements.record import Experts, FisherMeasurement, LayerFisher, Measurement, ModelIdentity

FORMAT, VERSION = "mergekit-fim/fisher", 1
_AGAIN = "measure again with `mergekit-fim fisher`"


def layers_as_json(measurement: FisherMeasurement) -> list[dict[str, Any]]:
    """Write the layers as they stand in a measurement's file and in a merge's report."""
    return [
        {
            "index": layer.index,
            "parameters": layer.parameters,
            "fisher": layer.fisher,
            "fisher_stderr": layer.stderr,
            "squared_norms": list(layer.squared_norms),
        }
        | ({"experts": its.count, "experts_not_reached": list(its.not_reached)} if (its := layer.experts) else {})
        for layer in measurement.layers
    ]


def as_json(measurement: Measurement) -> dict[str, Any]:
    """Write a measurement, with a checksum that shows later changes."""
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


_Count = Annotated[int, Field(ge=1)]


class _Settings(BaseModel):
    samples: int
    seq_len: int
    seed: int
    labels: str
    dtype: str


class _Layer(BaseModel):
    index: int
    parameters: _Count
    squared_norms: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    experts: _Count | None = None
    experts_not_reached: list[Annotated[int, Field(ge=0)]] = []

    def record(self) -> LayerFisher:
        experts = None if self.experts is None else Experts(self.experts, tuple(self.experts_not_reached))
        return LayerFisher(self.index, self.parameters, tuple(self.squared_norms), experts)


class _File(BaseModel):
    version: Annotated[int, Field(ge=VERSION, le=VERSION)]
    model: ModelIdentity
    settings: _Settings
    layers: list[_Layer]
    warnings: list[str]
    versions: dict[str, str]
    checksum: str


def from_json(content: Any, where: str) -> Measurement:
    """Check the content of a measurement's file, whatever it is. Errors call it `where`.

    Raises:
        FimError: it isn't a measurement that this version can read, or it was changed after it was written.
    """
    its_format = content.get("format") if isinstance(content, dict) else type(content).__name__
    if its_format != FORMAT:
        raise FimError(f"{where}: expected a measurement (format {FORMAT}), found {brief(its_format)}; {_AGAIN}")
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise FimError(f"{where}: expected a measurement of version {VERSION}, found {version}; upgrade mergekit-fim")
    try:
        # As JSON, where no type is taken for another, and no number for an infinite one.
        file = _File.model_validate_json(json.dumps(content, allow_nan=False), strict=True)
        settings = FisherSettings(**file.settings.model_dump(exclude={"dtype"}))
    except ValidationError as error:
        raise FimError(f"{where}: {misfit(error, content)}; {_AGAIN}") from None
    except ValueError as error:
        raise FimError(f"{where}: expected finite numbers, found others ({error}); {_AGAIN}") from None
    except FimError as error:
        raise FimError(f"{where}: `settings`: {error}; {_AGAIN}") from None
    shapes = [(layer.index, len(layer.squared_norms)) for layer in file.layers]
    count = file.model.num_layers
    if not shapes or len(shapes) != count or shapes != [(index, settings.samples) for index in range(len(shapes))]:
        shown = brief(", ".join(f"layer {index} with {norms}" for index, norms in shapes))
        expected = f"{count} decoder layers in order, with {settings.samples} squared norms each"
        raise FimError(f"{where}: `layers`: expected {expected}, found {shown}; {_AGAIN}")
    if file.checksum != _checksum(content):
        raise FimError(f"{where}: the measurement was changed after it was written (its checksum differs); {_AGAIN}")
    layers = tuple(layer.record() for layer in file.layers)
    fisher = FisherMeasurement(file.model.vocab_size, file.settings.dtype, settings, layers, tuple(file.warnings))
    return Measurement(file.model, fisher, file.versions)


def write_measurement(measurement: Measurement, path: str | os.PathLike[str]) -> None:
    """Write a measurement at once: no reader ever sees half of it.

    Raises:
        FimError: it can't be written.
    """
    write_json(os.fspath(path), as_json(measurement))


def model_files(model: str) -> list[str]:
    """List the files in a model's folder, if it is one, that must stay there: all but measurements."""
    names = os.listdir(model) if os.path.isdir(model) else []
    return [path for name in names if not _is_measurement(path := os.path.join(model, name))]


def _is_measurement(path: str) -> bool:
    try:
        content = read_json(path) if path.endswith(".json") else None
    except FimError:
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT
