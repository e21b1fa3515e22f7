"""Sources of problems: what each gives, what is the same each time, and what is refused."""

import csv
import hashlib
import json
import random
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.problems import grader
from mergekit_fim.evaluate.problems.questions import Questions
from mergekit_fim.evaluate.problems.sources import FORMS, open_problems, warnings_of
from mergekit_fim.evaluate.records import STOP, Completion, Grade, Problem, ProblemSet

ROWS = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(9)]


def refused(source: str, *words: str, **options) -> str:
    with pytest.raises(FimError) as error:
        open_problems(source, **{"n": 0, "seed": 0} | options)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 1000
    for word in words:
        assert word in message, message
    return message


def jsonl(path: Path, rows: list, end: str = "\n") -> str:
    path.write_text(end.join(json.dumps(row) for row in rows) + end, encoding="utf-8", newline="")
    return str(path)


def indices(problems: ProblemSet) -> list[int]:
    return [problem.index for problem in problems.problems]


def graded(problem_set: ProblemSet, index: int, text: str) -> Grade:
    key = (problem_set.source, index, 0)
    answer = Questions([problem_set], 1).graded((key, Completion(text, 1, STOP), ""), 1.0)
    return Grade(answer.correct, answer.found, answer.note)


# JSONL files


def test_a_file(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    found = open_problems(path, n=0, seed=0)
    assert found.source == path
    assert found.problems == tuple(Problem(path, i, f"{i} + {i}?", str(2 * i)) for i in range(9))
    checksum = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert found.description == {"kind": "file", "path": path, "sha256": checksum, "rows": 9}
    assert (found.ungradable, warnings_of(found)) == ({}, [])
    assert found.grade(found.problems[4], "It is 8.") == Grade(True, "8")
    assert found.grade(found.problems[4], "It is 9.") == Grade(False, "9")


def test_a_sample_is_seeded_and_in_order(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    assert indices(open_problems(path, n=4, seed=5)) == sorted(random.Random(5).sample(range(9), 4))
    assert indices(open_problems(path, n=4, seed=5)) != indices(open_problems(path, n=4, seed=6))
    assert indices(open_problems(path, n=9, seed=5)) == indices(open_problems(path, n=99, seed=5)) == list(range(9))


def test_rows_are_numbered_without_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps(row) for row in ROWS[:3]]
    path.write_bytes(f"\ufeff{rows[0]}\r\n\r\n  \n{rows[1]}\n\n{rows[2]}".encode())
    found = open_problems(str(path), n=0, seed=0)
    assert [(p.index, p.answer) for p in found.problems] == [(0, "0"), (1, "2"), (2, "4")]
    assert found.description["rows"] == 3


def test_the_fields_of_a_row(tmp_path):
    rows = [
        {"q": "1?", "a": 10**30, "question": 5, "nested": {"a": 1}},
        {"q": "2?", "a": 1.5e-7, "system": None},
        {"q": "3?", "a": -2.0, "system": "Say it in French."},
        {"q": "4?", "a": "4", "system": ""},
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    found = open_problems(path, n=0, seed=0, question_field="q", answer_field="a", system="Be brief.").problems
    assert [problem.answer for problem in found] == ["1" + "0" * 30, "0.00000015", "-2.0", "4"]
    assert [problem.system for problem in found] == ["Be brief.", "Be brief.", "Say it in French.", "Be brief."]


def test_what_cannot_be_graded_is_listed(tmp_path):
    rows = [*ROWS[:2], {"question": "Capital of France?", "answer": "Paris"}, {"question": "Why?", "answer": ""}]
    found = open_problems(jsonl(tmp_path / "a.jsonl", rows), n=0, seed=0)
    assert found.ungradable.keys() == {2, 3}
    assert graded(found, 2, "Paris") == Grade(None, note=found.ungradable[2])
    assert graded(found, 3, "5").correct is None
    assert graded(found, 1, "2").correct is True
    assert "2 of 4 problems can't be graded, the first being problem 2: the expected answer has words" in " ".join(
        warnings_of(found)
    )


def test_questions_that_are_there_twice(tmp_path):
    found = open_problems(jsonl(tmp_path / "a.jsonl", [*ROWS, ROWS[0], ROWS[0], ROWS[1]]), n=0, seed=0)
    assert len(found.problems) == 12
    assert "3 of 12 questions are there before" in " ".join(warnings_of(found))


def test_many_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f'{{"question": "{i} + 1?", "answer": {i + 1}}}\n' for i in range(100_000))
    found = open_problems(str(path), n=5, seed=0)
    assert indices(found) == sorted(random.Random(0).sample(range(100_000), 5))
    assert all(problem.question == f"{problem.index} + 1?" for problem in found.problems)


GOOD = '{"question": "1?", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["expected a problem in each line or row, found none"]),
        (b"\n  \n\r\n", ["found none; add problems"]),
        (GOOD.encode() + b"\n\xff\xfe\n", ["line 3: expected a JSON object", "in UTF-8"]),
        (GOOD.encode("utf-16"), ["line 1: expected a JSON object", "in UTF-8"]),
        (GOOD.encode() + b"1 + 1?,2\n", ["line 2: expected a JSON object, found '1 + 1?,2'"]),
        (GOOD.encode() + b"\n\n[1, 2]\n", ["line 4: expected a JSON object, found '[1, 2]'"]),
        (b'"a"\n', ["line 1: expected a JSON object, found '\"a\"'"]),
        (b"null\n", ["line 1: expected a JSON object, found 'null'"]),
        (b'[\n{"question": "1?", "answer": "1"}\n]\n', ["line 1", "write one object a line"]),
        (b'{\n"question": "1?"\n}\n', ["line 1", "write one object a line"]),
        (b'{"question": "1?"}\n', ["line 1: expected the field `answer`, found question"]),
        (b"{}\n", ["line 1: expected the field `question`, found none"]),
        (b'{"question": 1, "answer": "1"}\n', ["line 1, `question`: expected text, found 1"]),
        (b'{"question": " \\n", "answer": "1"}\n', ["line 1, `question`: expected a question"]),
        (b'{"question": "1?", "answer": null}\n', ["line 1, `answer`: expected text or a number, found None"]),
        (b'{"question": "1?", "answer": true}\n', ["line 1, `answer`: expected text or a number, found True"]),
        (b'{"question": "1?", "answer": ["1"]}\n', ["line 1, `answer`: expected text or a number, found ['1']"]),
        (b'{"question": "1?", "answer": NaN}\n', ["line 1, `answer`: expected text or a number, found nan"]),
        (b'{"question": "1?", "answer": 1e999}\n', ["line 1, `answer`: expected text or a number, found inf"]),
        (b'{"question": "1?", "answer": "1", "system": 5}\n', ["line 1, `system`: expected text, found 5"]),
        (b'{"question": "\\ud800", "answer": "1"}\n', ["line 1: expected a JSON object"]),
        (b'{"question": "1?", "answer": ' + b"9" * 9000 + b"}\n", ["line 1", "expected a JSON object"]),
        (b'{"question": "1?", "answer": ' + b"[" * 99999 + b"}\n", ["line 1", "expected a JSON object"]),
    ],
)
def test_bad_files(content, words, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    for n in (0, 1):  # also where the row wouldn't be in the sample
        refused(str(path), str(path), *words, n=n)


def test_a_line_without_end_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.truncate(100 << 30)  # more than memory: a hole, which takes no room
    refused(str(path), "line 1", "a longer line")


@pytest.mark.parametrize("source", ["", "missing.jsonl", "reasoning_gym:chain_sum", "gsm8k", "HF:gsm8k", "a\nb"])
def test_what_is_no_source(source):
    refused(source, FORMS)


def test_a_folder_is_no_file(tmp_path):
    refused(str(tmp_path), FORMS, "found a folder")
    refused("/dev/null", FORMS)


def test_a_negative_number_of_problems(tmp_path):
    refused(jsonl(tmp_path / "a.jsonl", ROWS), "found -1", n=-1)


# reasoning-gym


def test_reasoning_gym():
    source = 'reasoning-gym:chain_sum:{"max_terms": 3, "min_terms": 2}'
    found = open_problems(source, n=5, seed=3, system="Be brief.")
    assert indices(found) == list(range(5))
    assert {(problem.source, problem.system) for problem in found.problems} == {(source, "Be brief.")}
    fingerprint = found.description.pop("fingerprint")
    assert found.description == {
        "kind": "reasoning-gym",
        "task": "chain_sum",
        "config": '{"max_terms": 3, "min_terms": 2}',
        "seed": 3,
        "version": version("reasoning-gym"),
    }
    for problem in found.problems:
        sum_of = problem.question.rpartition(":")[2].strip(" =").split()
        signs = ["+", *sum_of[1::2]]
        terms = [int(("-" if sign == "-" else "") + term) for sign, term in zip(signs, sum_of[::2], strict=True)]
        assert len(terms) in (2, 3)
        assert problem.answer == str(sum(terms))
        assert found.grade(problem, f"<answer>{sum(terms)}</answer>") == Grade(True, problem.answer)
        assert not found.grade(problem, f"<answer>{sum(terms) + 1}</answer>").correct
    other = open_problems(source, n=5, seed=1000)  # a task's problem i of seed s is its problem 0 of seed s + i
    assert other.description["fingerprint"] != fingerprint
    assert {p.question for p in other.problems}.isdisjoint(p.question for p in found.problems)


# Their problems depend on the order of sets, and so on how Python hashes text.
def test_problems_are_the_same_in_every_process():
    tasks = ["ransom_note", "isomorphic_strings", "word_ladder", "polynomial_multiplication"]
    code = (
        "import sys\n"
        "from mergekit_fim.evaluate.problems.sources import open_problems\n"
        "for task in sys.argv[1:]:\n"
        "    print(open_problems(f'reasoning-gym:{task}', n=4, seed=1).description['fingerprint'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *tasks], capture_output=True, text=True, timeout=120)
    opened = [open_problems(f"reasoning-gym:{task}", n=4, seed=1) for task in tasks]
    assert done.stdout.split() == [found.description["fingerprint"] for found in opened], done.stderr
    grader.GRADER.close()  # a new process makes the problems again, to grade the answers
    for found in opened:
        assert found.grade(found.problems[2], found.problems[2].answer).correct


def test_a_task_without_one_expected_answer():
    found = open_problems("reasoning-gym:graph_color", n=2, seed=0)
    assert [problem.answer for problem in found.problems] == ["", ""]
    assert found.ungradable == {}
    assert found.grade(found.problems[0], "{}").correct is False


def test_a_task_whose_scorer_takes_anything():
    found = open_problems("reasoning-gym:game_of_life_halting", n=2, seed=0)
    assert found.ungradable.keys() == {0, 1}
    assert graded(found, 0, "True").correct is None


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("chainsum", ["chainsum", "expected a task"]),
        ("", ["expected a task"]),
        ("chain_sum:{", ["expected a JSON object", "after the task", "'{'"]),
        ("chain_sum:[1]", ["expected a JSON object", "'[1]'"]),
        ("chain_sum:5", ["expected a JSON object", "found '5'"]),
        ('chain_sum:{"terms": 1}', ["a configuration of reasoning-gym's", "'terms'"]),
        ('chain_sum:{"min_terms": -1}', ["min_terms must be positive"]),
        ('chain_sum:{"min_terms": "two"}', ["a configuration of reasoning-gym's", '"two"']),
        ('chain_sum:{"seed": 1}', ["`seed` is set by"]),
        ('chain_sum:{"size": 1}', ["`size` is set by"]),
        ("composite", ["Must specify at least one dataset"]),
    ],
)
def test_bad_tasks(task, words):
    refused(f"reasoning-gym:{task}", *words, n=2)


def test_procedural_sources_have_no_end():
    refused("reasoning-gym:chain_sum", "found 0 (all)")


@pytest.mark.parametrize(
    ("module", "package", "source"),
    [
        ("math_verify", "math-verify", "a.jsonl"),
        ("math_verify", "math-verify", "reasoning-gym:chain_sum"),
        ("reasoning_gym", "reasoning-gym", "reasoning-gym:chain_sum"),
        ("datasets", "datasets", "hf:a"),
    ],
)
def test_a_library_that_is_not_there(module, package, source, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    refused(source, f"{package} isn't installed", "pip install 'mergekit-fim[sweep]'", n=1)


# Datasets


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    offline(monkeypatch, True)


def offline(monkeypatch, value: bool) -> None:
    """They look at the environment when they are imported, which may be before conftest.py has set it."""
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", value)


@pytest.fixture
def saved(tmp_path) -> dict[str, str]:
    """The same problems, in the forms that datasets has."""
    import datasets

    datasets.disable_progress_bars()
    made = datasets.Dataset.from_list(ROWS)
    folder, parquet, two = tmp_path / "folder", tmp_path / "parquet" / "data", tmp_path / "two"
    for path in (folder, parquet, two):
        path.mkdir(parents=True)
    for split in ("train", "test", "validation"):
        jsonl(folder / f"{split}.jsonl", [{**row, "answer": f"{row['answer']}{split}"} for row in ROWS])
    made.to_parquet(parquet / "validation-00000-of-00001.parquet")
    made.save_to_disk(tmp_path / "one split")
    datasets.DatasetDict({"train": made.select(range(3)), "test": made}).save_to_disk(tmp_path / "splits")
    jsonl(two / "main.jsonl", ROWS)
    jsonl(two / "other.jsonl", ROWS[:4])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "other"))
    (two / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    jsonl(tmp_path / "a.jsonl", ROWS)
    names = {path.name: str(path) for path in tmp_path.iterdir()}
    datasets.enable_progress_bars()
    return names


@pytest.mark.parametrize(
    ("name", "parts", "config", "split", "rows"),
    [
        ("parquet", "", "", "validation", 9),
        ("parquet", ":validation", "", "validation", 9),
        ("one split", "", "", "all", 9),
        ("splits", "", "", "test", 9),
        ("splits", ":train", "", "train", 3),
        ("splits", "::train", "", "train", 3),
        ("two", ":main", "main", "train", 9),
        ("two", ":other", "other", "train", 4),
        ("two", ":other:train", "other", "train", 4),
        ("a.json", "", "", "all", 9),
        ("a.jsonl", "", "", "all", 9),
        ("a.csv", "", "", "all", 9),
    ],
)
def test_datasets(name, parts, config, split, rows, saved):
    source = f"hf:{saved[name]}{parts}"
    found = open_problems(source, n=3, seed=2)
    chosen = sorted(random.Random(2).sample(range(rows), 3)) if rows > 3 else [0, 1, 2]
    assert found.problems == tuple(Problem(source, i, f"{i} + {i}?", str(2 * i)) for i in chosen)
    assert len(str(found.description.pop("fingerprint"))) == 64
    assert found.description == {
        "kind": "hf",
        "dataset": saved[name],
        "config": config,
        "split": split,
        "version": version("datasets"),
        "rows": rows,
    }
    assert found.grade(found.problems[1], str(2 * chosen[1])).correct


@pytest.mark.parametrize(("parts", "split"), [("", "test"), (":train", "train"), ("::validation", "validation")])
def test_the_split_of_a_folder(parts, split, saved):
    found = open_problems(f"hf:{saved['folder']}{parts}", n=0, seed=0)
    assert found.problems[1].answer == f"2{split}"
    assert found.description["split"] == split


def test_the_fields_of_a_dataset(tmp_path):
    rows = [{"problem": "1 + 1?", "solution": r"so \boxed{2}", "answer": 5, "system": "Be brief."}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    assert open_problems(f"hf:{path}", n=0, seed=0, system="Be slow.").problems == (
        Problem(f"hf:{path}", 0, "1 + 1?", "5", "Be brief."),
    )
    found = open_problems(f"hf:{path}", n=0, seed=0, answer_field="solution")
    assert found.grade(found.problems[0], "2").correct
    refused(f"hf:{path}", "expected the column `x`", "problem, solution, answer", "system", question_field="x")


@pytest.mark.parametrize(
    ("name", "parts", "words"),
    [
        ("folder", ":nothing", ["expected a configuration or one of the splits", "train", "test", "'nothing'"]),
        ("splits", ":dev", ["one of the splits train, test", "'dev'"]),
        ("splits", ":main:test", ["has no configurations", "'main'"]),
        ("a.json", ":main:test", ["has no configurations", "'main'"]),
        ("two", "", ["main", "other"]),
        ("two", ":third:train", ["'third'", "main", "other"]),
        ("two", ":main:test", ["one of the splits train, found 'test'"]),
        ("two", ":a:b:c", ["expected hf:DATASET[:CONFIG][:SPLIT]"]),
    ],
)
def test_bad_parts(name, parts, words, saved):
    refused(f"hf:{saved[name]}{parts}", *words)


def test_a_dataset_without_test_or_a_single_split(tmp_path):
    jsonl(tmp_path / "train.jsonl", ROWS)
    jsonl(tmp_path / "validation.jsonl", ROWS)
    refused(f"hf:{tmp_path}", "no split `test`", "train, validation", f"hf:{tmp_path}:train")


@pytest.mark.parametrize("name", ["user/no-such-dataset", "./no-such-folder", ""])
def test_a_dataset_that_is_not_there(name):
    refused(f"hf:{name}", f"hf:{name}")


def test_bad_datasets(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(f"hf:{tmp_path / 'empty'}", "can't be loaded as a dataset")
    (tmp_path / "a.txt").write_text("1", encoding="utf-8")
    refused(f"hf:{tmp_path / 'a.txt'}", "expected a file that ends in jsonl, json, parquet, csv")
    (tmp_path / "a.json").write_text("nothing", encoding="utf-8")
    refused(f"hf:{tmp_path / 'a.json'}", "can't be loaded as a dataset")
    path = jsonl(tmp_path / "b.jsonl", [ROWS[0], {"question": "1?", "answer": None}])
    refused(f"hf:{path}", "row 1, `answer`: expected text or a number, found None")
    jsonl(tmp_path / "c.jsonl", [{"question": "1?", "answer": ["1"]}])
    refused(f"hf:{tmp_path / 'c.jsonl'}", "row 0, `answer`: expected text or a number, found ['1']")


def test_local_datasets_need_no_network(saved, monkeypatch):
    asked = []

    def refuse(*arguments, **options):
        asked.append(arguments)
        raise OSError("no network here")

    offline(monkeypatch, False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("folder", "parquet", "one split", "splits", "two", "a.json"):
        parts = ":main" if name == "two" else ""
        assert open_problems(f"hf:{saved[name]}{parts}", n=1, seed=0).problems
    assert asked == []
