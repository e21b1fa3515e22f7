"""Files of rows: the same rows in every format, and one line where a file has something else."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.records import Row
from mergekit_fim.evaluate.results.rows import read_rows

CONTENT = [
    {"run": "base", "family": None, "strength": None, "problem": 1, "correct": True, "tokens": 12, "text": "ä"},
    {"run": "m 0.5", "family": "m", "strength": 0.5, "problem": 1, "correct": False, "tokens": 7, "text": "b"},
]
EXPECTED = [Row("base", None, {}, "", "1", 0, True, 12.0), Row("m 0.5", "m", {"strength": 0.5}, "", "1", 0, False, 7.0)]


def write(path, content):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in content))
    else:
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, content[0])
            writer.writeheader()
            writer.writerows(content)
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_every_format_has_the_same_rows(ending, tmp_path):
    assert list(read_rows(write(tmp_path / f"r.{ending}", CONTENT))) == EXPECTED


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_all_columns(ending, tmp_path):
    more = {"source": "gsm8k", "sample": 2, "truncated": True}
    (found,) = read_rows(write(tmp_path / f"r.{ending}", [{**CONTENT[0], **more, "correct": 0.25}]))
    assert found == Row("base", None, {}, "gsm8k", "1", 2, 0.25, 12.0, truncated=True)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": float("nan")}, ["`tokens`", "nan"]),
        ({"tokens": -1}, ["`tokens`", "-1"]),
        ({"tokens": 1e300}, ["`tokens`", "1e+300"]),
        ({"correct": 2}, ["`correct`", "2"]),
        ({"correct": -0.5}, ["`correct`", "-0.5"]),
        ({"correct": float("nan")}, ["`correct`", "nan"]),
        ({"correct": "C"}, ["`correct`", "C"]),
        ({"strength": "much"}, ["`strength`", "much"]),
        ({"sample": 0.5}, ["`sample`", "0.5"]),
    ],
)
def test_a_row_that_is_none(ending, change, words, tmp_path):
    path = write(tmp_path / f"r.{ending}", [{**CONTENT[0], **change}])
    with pytest.raises(FimError, match="row 1: expected run, problem, correct") as error:
        list(read_rows(path))
    assert path in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["run", "problem", "correct", "tokens"])
def test_a_column_that_is_missing(ending, column, tmp_path):
    path = write(tmp_path / f"r.{ending}", [{name: value for name, value in CONTENT[0].items() if name != column}])
    with pytest.raises(FimError, match=f"row 1.*`{column}` is missing"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("r.csv", b"", "expected a row"),
        ("r.csv", b"run,problem,correct,tokens\n", "expected a row"),
        ("r.csv", b"run,problem,correct,tokens\nm\xe9,1,1,1\n", "utf-8"),
        ("r.csv", b'run,problem,correct,tokens\na,1,1,1\na,2,1,"1', "after 1 rows (unexpected end of data)"),
        ("r.csv", b"run,problem,correct,tokens\n" + b"x" * 200_000 + b",1,1,1\n", "field larger than field limit"),
        ("r.jsonl", b"", "expected a row"),
        ("r.jsonl", b'{"run": "a"', "JSONL"),
        ("r.jsonl", b"[1]", "an object a line, found [1]"),
        ("r.jsonl", b'{"run": "\xe9"}', "JSONL"),
        ("r.parquet", b"", "Parquet"),
        ("r.parquet", b"PAR1 and what follows", "Parquet"),
    ],
)
def test_a_file_of_something_else(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FimError) as error:
        list(read_rows(str(tmp_path / name)))
    assert name in str(error.value)
    assert words in str(error.value)
    assert str(error.value).isprintable()


def test_a_truncated_parquet(tmp_path):
    path = write(tmp_path / "r.parquet", CONTENT)
    whole = (tmp_path / "r.parquet").read_bytes()
    for size in (len(whole) // 2, len(whole) - 1):
        (tmp_path / "r.parquet").write_bytes(whole[:size])
        with pytest.raises(FimError, match=r"r\.parquet"):
            list(read_rows(path))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_no_file(ending, tmp_path):
    with pytest.raises(FimError, match=rf"nowhere\.{ending}: can't be read"):
        list(read_rows(str(tmp_path / f"nowhere.{ending}")))
