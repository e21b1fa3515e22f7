"""A measurement as a file: small JSON that says what was measured, how, and of which model."""

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
    """The layers, as they stand in a measurement's file and in a merge's report."""
    return [
        {
            "index": layer.index,
            "parameters": layer.parameters,
            "fisher": layer.fisher,
            "fisher_stderr": layer.stderr,
            "squared_norms": list(layer.squared_norms),
            **_experts_as_json(layer.experts),
        }
        for layer in measurement.layers
    ]


def _experts_as_json(experts: Experts | None) -> dict[str, Any]:
    return {} if experts is None else {"experts": experts.count, "experts_not_reached": list(experts.not_reached)}


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
    """Check the content of a measurement's file, whatever it is; `where` is what to call it in an error.

    Raises:
        FimError: it isn't a measurement that this version can read, or it was changed after it was written.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise FimError(f"{where}: expected a measurement (format {FORMAT}), found {brief(found)}; {_AGAIN}")
    number = content.get("version")
    if isinstance(number, int) and number > VERSION:
        raise FimError(
            f"{where}: expected a measurement of version {VERSION}, found {number}, made by a newer mergekit-fim; "
            "upgrade mergekit-fim"
        )
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
    count, expected = file.model.num_layers, [(index, settings.samples) for index in range(len(shapes))]
    if not shapes or len(shapes) != count or shapes != expected:
        raise FimError(
            f"{where}: `layers`: expected {count} decoder layers in order, with {settings.samples} squared "
            f"norms each, found {brief(', '.join(f'layer {index} with {count}' for index, count in shapes))}; {_AGAIN}"
        )
    if file.checksum != _checksum(content):
        raise FimError(f"{where}: the measurement was changed after it was written (its checksum differs); {_AGAIN}")
    layers = tuple(layer.record() for layer in file.layers)
    fisher = FisherMeasurement(file.model.vocab_size, file.settings.dtype, settings, layers, tuple(file.warnings))
    return Measurement(file.model, fisher, file.versions)


def write_measurement(measurement: Measurement, path: str | os.PathLike[str]) -> None:
    """Write a measurement atomically: no reader ever sees half of it.

    Raises:
        FimError: it can't be written.
    """
    write_json(os.fspath(path), as_json(measurement))


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
