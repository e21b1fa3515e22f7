"""A file of rows, as CSV, JSONL or Parquet -> the rows, one at a time, however many there are."""

import csv
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from mergekit_fim.errors import FimError, brief, misfit, reason
from mergekit_fim.evaluate.records import Row

_LONGEST_LINE = 1 << 24  # bytes; a file without line ends would fill the memory
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Count = Annotated[float, Field(ge=0, le=1 << 53, allow_inf_nan=False)]


@dataclass(frozen=True)
class _Columns:
    """The columns of a file; others are ignored."""

    run: str
    problem: str
    correct: _Share | bool
    tokens: _Count
    family: str | None = None
    strength: Annotated[float, Field(allow_inf_nan=False)] | None = None
    source: str = ""
    sample: int = 0
    truncated: bool | None = None

    __pydantic_config__ = ConfigDict(coerce_numbers_to_str=True)


_COLUMNS = TypeAdapter(_Columns)
_Reader = Callable[[str], Iterator[Mapping[str, Any]]]


def read_rows(path: str) -> Iterator[Row]:
    """Read the rows of a file, by how its name ends.

    Raises:
        FimError: it can't be read, a row isn't one, or there are none.
    """
    number = 0
    try:
        for content in READERS[os.path.splitext(path)[1]](path):
            number += 1
            its = _COLUMNS.validate_python(content)
            settings = {} if its.strength is None else {"strength": its.strength}
            answer = its.source, its.problem, its.sample
            yield Row(its.run, its.family, settings, *answer, its.correct, its.tokens, its.truncated)
    except ValidationError as error:
        raise FimError(
            f"{path}, row {number}: expected run, problem, correct (0 to 1) and tokens (0 or more), found a row in "
            f"which {misfit(error, content)}; correct it"
        ) from None
    except (ValueError, NotImplementedError, csv.Error) as error:  # of UTF-8, JSON, CSV and Parquet
        raise FimError(
            f"{path}: expected CSV in UTF-8, JSONL or Parquet, as the name ends, found something else after "
            f"{number:,} rows ({reason(error)}); write it anew"
        ) from error
    except OSError as error:
        raise FimError(f"{path}: can't be read ({error.strerror or reason(error)}); check the file") from error
    if not number:
        raise FimError(f"{path}: expected a row for each answer, found none; add rows")


def _csv(path: str) -> Iterator[Mapping[str, Any]]:
    """Read CSV; what is empty counts as not given."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, strict=True):
            yield {name: value for name, value in row.items() if name and value}


def _jsonl(path: str) -> Iterator[Mapping[str, Any]]:
    with open(path, "rb") as file:
        for line in iter(lambda: file.readline(_LONGEST_LINE), b""):
            if line.strip():
                row = from_json(line)
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object a line, found {brief(row)}")
                yield row


def _parquet(path: str) -> Iterator[Mapping[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if name in _Columns.__dataclass_fields__]
        for batch in file.iter_batches(columns=names):
            yield from batch.to_pylist()


READERS: Mapping[str, _Reader] = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
