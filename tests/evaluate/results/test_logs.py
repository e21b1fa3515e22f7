"""Logs of Inspect, written by it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.results.logs import read_log

# Writes logs of what a stand-in for a model answers to three problems, twice each.
WRITE = """
import json, sys
folder, sys.path[:] = sys.argv[1], json.loads(sys.argv[2])
import inspect_ai
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

def answer(text, tokens):
    output = ModelOutput.from_content("mockllm/model", text, stop_reason="max_tokens" if text == "no" else "stop")
    output.usage = ModelUsage(output_tokens=tokens)
    return output

def write(count=6, scorer=includes(), **metadata):
    answers = [answer(*its) for its in (("yes", 3), ("no", 40), ("yes", 5)) * 2][:count]
    samples = [Sample(id=f"q{i}", input="?", target="yes") for i in range(3)]
    task = inspect_ai.Task(dataset=samples, solver=generate(), scorer=scorer, epochs=2, name="sums")
    options = {"display": "none", "log_dir": folder, "log_format": "eval", "max_samples": 1, "metadata": metadata}
    model = get_model("mockllm/model", custom_outputs=answers, memoize=False)
    return inspect_ai.eval(task, model=model, **options)[0].location.removeprefix("file://")

print(json.dumps({
    "plain": write(),
    "told": write(run="m 0.5", family="m", strength=0.5),
    "mistold": write(strength="much"),
    "broken off": write(count=4),
    "ungraded": write(scorer=None),
}))
"""


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> dict[str, str]:
    if importlib.util.find_spec("inspect_ai") is None:
        pytest.skip("inspect_ai isn't installed")
    # In a process of its own: warnings of Inspect's are no errors there.
    command = [sys.executable, "-c", WRITE, str(tmp_path_factory.mktemp("logs")), json.dumps(sys.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_inspect(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FimError, match=r"inspect-ai isn't installed.*mergekit-fim\[inspect\]"):
        next(read_log(str(tmp_path / "a.eval")))


def test_a_plain_log(logs):
    rows = list(read_log(logs["plain"]))
    assert {(row.run, row.method, row.source, row.empty) for row in rows} == {("mockllm/model", None, "sums", False)}
    assert sorted((row.problem, row.sample) for row in rows) == [(f"q{i}", epoch) for i in range(3) for epoch in (0, 1)]
    found = sorted((row.correct, row.tokens, row.truncated) for row in rows)
    assert found == sorted([(1, 3, False), (0, 40, True), (1, 5, False)] * 2)
    assert rows[0].settings == {}


def test_metadata_says_what_the_run_is(logs):
    row = next(read_log(logs["told"]))
    assert (row.run, row.method, row.settings) == ("m 0.5", "m", {"strength": 0.5})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mistold", "metadata `strength`, found 'much'"),
        ("broken off", "complete log of Inspect"),
        ("ungraded", "sample q0, epoch 1: expected a score from 0 to 1"),
    ],
)
def test_logs_that_cannot_be(name, words, logs):
    with pytest.raises(FimError, match=words):
        list(read_log(logs[name]))


@pytest.mark.parametrize("content", [b"", b"PK nothing"])
def test_files_that_are_no_logs(content, logs, tmp_path):
    (path := Path(tmp_path / "a.eval")).write_bytes(content)
    with pytest.raises(FimError, match=r"a\.eval: expected a complete log"):
        list(read_log(str(path)))
