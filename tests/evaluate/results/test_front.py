"""`mergekit-fim front`: rows, and folders of sweeps made apart, become one front."""

import csv
import dataclasses
import json
import random
import subprocess
import sys

import pytest
from merges import ends_in_one_line, run, unwrapped

from mergekit_fim.evaluate.folder import SweepFolder, write_answers
from mergekit_fim.evaluate.front.findings import find
from mergekit_fim.evaluate.front.gathered import gather
from mergekit_fim.evaluate.records import Answer, row_of

COUNT = 40
STRENGTHS = {"base": 0.0, "long": 1.0, "ours 0.3": 0.3, "ours 0.6": 0.6, "theirs 0.5": 0.5}


def content(runs=tuple(STRENGTHS)):
    """Rows of runs: the further from the base, the longer and the more often right."""
    rows = []
    for name in runs:
        rng, strength = random.Random(name), STRENGTHS[name]
        family = name.split()[0] if " " in name else None
        told = {"run": name, "family": family, "strength": strength if family else None}
        for problem in range(COUNT):
            correct = int(rng.random() < 0.4 + 0.5 * strength**0.5)
            rows.append({**told, "problem": problem, "correct": correct, "tokens": 20 + int(100 * strength)})
    return rows


def write(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.csv", content())


def write_sweep(folder, runs, **identity):
    """Write the folder of a sweep that came to an end, whose last problem can't be graded."""
    entries = [
        {"run": name, "method": name.split()[0] if " " in name else None, "of": {},
         "settings": {"alpha_mean": STRENGTHS[name]} if " " in name else {}}
        for name in runs
    ]  # fmt: skip
    made = SweepFolder(str(folder))
    (folder / "answers").mkdir(parents=True)
    graded = []
    for entry in entries:
        answers = [
            Answer(source="p.jsonl", index=its["problem"], sample=0, prompt="", text="x", tokens=its["tokens"],
                   ended="stop", unclosed=False, correct=bool(its["correct"]), found=None, note=None, seconds=0.5)
            for its in content([entry["run"]])
        ]  # fmt: skip
        answers[-1] = dataclasses.replace(answers[-1], correct=None)
        write_answers(made.answers(entry["run"]), answers)
        graded += [row_of(entry, answer) for answer in answers[:-1]]
    found = find(
        gather({"": graded}), ("base", ["long"]), seed=0, margin=0.05, ungradable=[("p.jsonl", COUNT - 1, "why")]
    )
    asked = {"config": str(runs), "models": {}, "problems": [{"source": "p.jsonl", "sha256": "a"}], "seed": 0}
    record = {"format": "mergekit-fim/sweep", "version": 1, "identity": {**asked, **identity}, "runs": entries}
    (folder / "sweep.json").write_text(json.dumps({**record, "findings": found.as_json()}))
    return folder


def findings(*arguments, tmp_path):
    run("front", *arguments, "--json", tmp_path / "front.json")
    written = json.loads((tmp_path / "front.json").read_text())
    assert (written["format"], written["version"]) == ("mergekit-fim/front", 1)
    return written["findings"]


def test_rows_become_a_front(rows, tmp_path):
    result = run("front", rows, "-o", tmp_path / "front.png", "--json", tmp_path / "front.json")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "front.json").read_text())["findings"]["summary"]
    assert [its["run"] for its in summary["runs"]] == list(STRENGTHS)
    assert (summary["base"], summary["long"], summary["problems"]) == ("base", "long", COUNT)
    assert [its["method"] for its in summary["areas"]] == ["ours", "theirs", None]
    accuracy = {its["run"]: its["accuracy"]["value"] for its in summary["runs"]}
    assert accuracy["ours 0.6"] == sum(its["correct"] for its in content(["ours 0.6"])) / COUNT
    assert {its["truncated"] for its in summary["runs"]} == {None}
    text = unwrapped(result)
    assert "ours minus theirs" in text
    assert "the run to keep" in text or "is the shortest run" in text
    assert "%" not in result.output.partition("In brackets")[0]  # nothing is said of what isn't known


def test_files_add_up(rows, tmp_path):
    whole = findings(rows, tmp_path=tmp_path)
    halves = [write(tmp_path / "a.csv", content()[:70]), write(tmp_path / "b.csv", content()[60:])]
    assert findings(*halves, tmp_path=tmp_path) == whole


def test_ends_by_family_or_by_name(tmp_path):
    made = content()
    for its in made:
        if its["run"] in ("base", "long"):
            its |= {"family": its["run"], "run": f"{its['run']} model"}
    path = write(tmp_path / "rows.csv", made)
    summary = findings(path, tmp_path=tmp_path)["summary"]
    assert (summary["base"], summary["long"]) == ("base model", "long model")
    assert [its["method"] for its in summary["areas"]] == ["ours", "theirs", None]
    named = findings(path, "--base", "ours 0.3", "--long", "ours 0.6", tmp_path=tmp_path)["summary"]
    assert (named["base"], named["long"]) == ("ours 0.3", "ours 0.6")


def test_a_sweep_comes_out_as_it_did(tmp_path):
    folder = write_sweep(tmp_path / "one", list(STRENGTHS))
    found = findings(folder, tmp_path=tmp_path)
    assert found == json.loads((folder / "sweep.json").read_text())["findings"]
    assert found["summary"]["problems"] == COUNT - 1


def test_sweeps_made_apart_come_together(tmp_path):
    one = write_sweep(tmp_path / "one", ["base", "long", "ours 0.3", "ours 0.6"])
    other = write_sweep(tmp_path / "other", ["base", "long", "theirs 0.5"])
    whole = write_sweep(tmp_path / "whole", list(STRENGTHS))
    found = findings(one, other, tmp_path=tmp_path)
    assert found == findings(whole, tmp_path=tmp_path)
    kept = found["recommended"]["run"]
    (one / "configs").mkdir()
    config = SweepFolder(str(one)).config(kept)
    with open(config, "w") as file:
        file.write("merge_method: ours\n")
    assert f"To merge it: mergekit-fim merge {config} merged" in unwrapped(run("front", other, one))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows.append(rows[-1]), ["rows.csv", "found two of theirs 0.5 to problem 39", "`sample`"]),
        (lambda rows: rows.pop(), ["no answer of theirs 0.5 to problem 39", "1 of 200 are missing"]),
        (lambda rows: rows[50].update(tokens="NaN"), ["rows.csv", "row 51", "`tokens`", "NaN"]),
        (lambda rows: rows[50].update(strength=3), ["rows.csv", "run long", "one family and strength"]),
        (lambda rows: [its.update(run="b") for its in rows[:COUNT]], ["--base", "a run called base", "found b, long"]),
        (lambda rows: [its.update(run=its["run"][1:], family="base") for its in rows], ["--base", "found ase, ong,"]),
    ],
)  # fmt: skip
def test_rows_that_cannot_be(change, words, tmp_path):
    made = content()
    change(made)
    path = write(tmp_path / "rows.csv", made)
    ends_in_one_line(run("front", path, "-o", tmp_path / "f.png", ok=False), *words, absent=tmp_path / "f.png")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--base", "nobody"], ["--base: expected a run called nobody", "base, long, ours 0.3"]),
        (["--long", "base"], ["--long: expected another run than the base"]),
        (["--margin", "1"], ["--margin", "below 1"]),
        (["--margin", "nan"], ["--margin", "below 1"]),
        (["-o", "{t}/front.gif"], [".png or .svg"]),
        (["-o", "{t}/rows.csv"], ["take the place"]),
        (["-o", "{t}/a.png", "--json", "{t}/a.png"], ["take the place"]),
        (["{t}/rows.txt"], ["rows.txt", ".csv, .jsonl, .parquet"]),
        (["{t}/nowhere"], ["nowhere", "expected the folder of a sweep"]),
        (["{t}"], ["sweep.json"]),
    ],
)
def test_commands_that_cannot_be(options, words, rows, tmp_path):
    ends_in_one_line(run("front", rows, *(its.format(t=tmp_path) for its in options), ok=False), *words)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder, record: record.update(findings=None), ["came to an end", "finish it"]),
        (
            lambda folder, record: record["findings"].pop("summary"),
            ["sweep.json", "damaged ones (KeyError('summary'))"],
        ),
        (lambda folder, record: record.update(format="mergekit-fim/report"), ["record of a sweep"]),
        (lambda folder, record: record["identity"].update(seed=7), ["same problems", "seed is 7, there 0"]),
        (lambda folder, record: record["identity"]["problems"][0].update(sha256="b"), ["problems[0].sha256 is b"]),
        (lambda folder, record: (folder / "answers" / "base.jsonl").unlink(), []),
        (lambda folder, record: (folder / "answers" / "theirs_0.5.jsonl").unlink(), ["of theirs 0.5"]),
        (lambda folder, record: (folder / "answers" / "long.jsonl").write_text("{}\n"), ["long.jsonl, line 1"]),
    ],
)
def test_folders_that_cannot_be(damage, words, tmp_path):
    one = write_sweep(tmp_path / "one", ["base", "long", "ours 0.3"])
    other = write_sweep(tmp_path / "other", ["base", "long", "theirs 0.5"])
    record = json.loads((other / "sweep.json").read_text())
    damage(other, record)
    (other / "sweep.json").write_text(json.dumps(record))
    result = run("front", one, other, ok=not words)
    if words:
        ends_in_one_line(result, *words)


def test_the_same_run_with_other_answers(tmp_path):
    one = write_sweep(tmp_path / "one", ["base", "long", "ours 0.3"])
    other = write_sweep(tmp_path / "other", ["base", "long", "theirs 0.5"])
    path = other / "answers" / "long.jsonl"
    path.write_text(path.read_text().replace('"tokens": 120', '"tokens": 121', 1))
    ends_in_one_line(
        run("front", one, other, ok=False), str(other), f"has in {one}", "another one of long to problem 0"
    )


def test_the_command_needs_no_torch(rows):
    code = (
        "import sys\n"
        "from mergekit_fim.cli import main\n"
        f"main(['front', {str(rows)!r}], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'mergekit') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
