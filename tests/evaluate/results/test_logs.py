"""Logs of Inspect, written by it."""

import pytest

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.results.logs import read_log


def test_without_inspect(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FimError, match=r"inspect-ai isn't installed.*mergekit-fim\[inspect\]"):
        next(read_log(str(tmp_path / "a.eval")))


@pytest.fixture
def log(tmp_path):
    """Write a log of what a stand-in for a model answers: right on the first and third of three samples."""
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ModelOutput, ModelUsage, get_model
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate

    def answer(text: str, tokens: int) -> ModelOutput:
        output = ModelOutput.from_content("mockllm/model", text, stop_reason="max_tokens" if text == "no" else "stop")
        output.usage = ModelUsage(output_tokens=tokens)
        return output

    def write(answers=(("yes", 3), ("no", 40), ("yes", 5)) * 2, **options) -> str:
        model = get_model("mockllm/model", custom_outputs=[answer(*its) for its in answers], memoize=False)
        task = inspect_ai.Task(
            dataset=[Sample(id=f"q{i}", input="?", target="yes") for i in range(3)],
            solver=generate(),
            scorer=options.pop("scorer", includes()),
            epochs=2,
            name="sums",
        )
        options |= {"display": "none", "log_dir": str(tmp_path / "logs"), "max_samples": 1, "log_format": "eval"}
        return inspect_ai.eval(task, model=model, **options)[0].location.removeprefix("file://")

    return write


def test_a_plain_log(log):
    rows = sorted(read_log(log()), key=lambda row: (row.problem, row.sample))
    assert {(row.run, row.method, row.source) for row in rows} == {("mockllm/model", None, "sums")}
    assert [(row.problem, row.sample) for row in rows] == [(f"q{i}", epoch) for i in range(3) for epoch in (0, 1)]
    assert sorted((row.correct, row.tokens, row.truncated) for row in rows) == sorted(
        [(1, 3, False), (0, 40, True), (1, 5, False)] * 2
    )
    assert rows[0].settings == {}


def test_metadata_says_what_the_run_is(log):
    row = next(read_log(log(metadata={"run": "m 0.5", "family": "m", "strength": 0.5})))
    assert (row.run, row.method, row.settings) == ("m 0.5", "m", {"strength": 0.5})
    with pytest.raises(FimError, match="metadata `strength`, found 'much'"):
        next(read_log(log(metadata={"strength": "much"})))


def test_logs_that_cannot_be(log, tmp_path):
    with pytest.raises(FimError, match="complete log of Inspect"):
        list(read_log(log(answers=[("yes", 3)] * 4)))  # the model has no fifth answer
    with pytest.raises(FimError, match="expected a score from 0 to 1"):
        list(read_log(log(scorer=None)))
    path = tmp_path / "a.eval"
    for content in (b"", b"PK nothing"):
        path.write_bytes(content)
        with pytest.raises(FimError, match=r"a\.eval: expected a complete log"):
            list(read_log(str(path)))
