"""`mergekit-fim sweep`, from a merge config to the run to keep: what is written, kept, gone on with, and refused."""

import contextlib
import dataclasses
import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard
from inspecting import inspect
from launching import together
from mergekit.options import MergeOptions
from merges import ends_in_one_line, unwrapped
from stub import good, say
from warm import Outcome, Warm

from mergekit_fim.cli import main
from mergekit_fim.errors import FimError
from mergekit_fim.evaluate import folder as folder_module
from mergekit_fim.evaluate import models as models_module
from mergekit_fim.evaluate import one_run
from mergekit_fim.evaluate import sweep as module
from mergekit_fim.evaluate.answers import generation
from mergekit_fim.evaluate.answers.engine import Decoding
from mergekit_fim.evaluate.answers.generation import complete
from mergekit_fim.evaluate.answers.loading import load_model
from mergekit_fim.evaluate.answers.prompts import Prompt
from mergekit_fim.evaluate.answers.tokens import load_tokenizer
from mergekit_fim.evaluate.folder import SweepFolder, file_name, read_answers, taken, write_answers
from mergekit_fim.evaluate.problems.grader import GRADER
from mergekit_fim.evaluate.problems.grading import final_answer, grade_math
from mergekit_fim.evaluate.records import Answer
from mergekit_fim.evaluate.runs.refine import Point, between_ends, next_strength
from mergekit_fim.files import PART
from mergekit_fim.prepass import factors as measured_factors
from mergekit_fim.prepass import layers as prepass
from mergekit_fim.prepass.task_vectors import TaskVectorSweep

TEMPLATE = "{{ messages[0].content }}{% if messages|length > 1 %} {{ messages[1].content }}{% endif %}"
TOKENS = 16
COUNT = 12
SMALL = {"fisher_samples": 2, "fisher_seq_len": 8}


@dataclass(frozen=True)
class Talkers:
    """A pair that answers, of which one is longer, and problems of which either solves some."""

    folder: Path
    base: Path
    long: Path
    problems: Path

    def config(self, **changes) -> dict:
        models = [{"model": str(self.long)}]
        content = {"merge_method": "fim_ta", "base_model": str(self.base), "models": models, "parameters": SMALL}
        return content | {"dtype": "float32"} | changes


@pytest.fixture(scope="module")
def talkers(tmp_path_factory) -> Talkers:
    folder = tmp_path_factory.mktemp("talkers")
    base = tiny.build(tiny.config("llama", num_hidden_layers=3))
    models = {"base": base, "long": tiny.tuned(base, 1, scale=0.05)}
    questions = [f"What is {i} + {7 * i % 11}?" for i in range(COUNT)]
    found: dict[str, list[str | None]] = {}
    for seed, (name, model) in enumerate(models.items()):
        with torch.no_grad():  # how often an answer ends is left to chance, and more often in the base
            rows = model.lm_head.weight
            random = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(3 + seed))
            rows[tiny.CHARACTERS.index("<end>")] = random * rows.std() * (3 if name == "base" else 1.5)
            for digit in "0123456789":
                rows[tiny.CHARACTERS.index(digit)] *= 1.5
        tiny.save(model, folder / name)
        tiny.tokenizer(chat_template=TEMPLATE).save_pretrained(folder / name)
        tokenizer = load_tokenizer(name, str(folder / name), None, False)
        loaded = load_model(name, str(folder / name), tokenizer, MergeOptions(), None)
        prompts = [Prompt("", i, 0, question, False) for i, question in enumerate(questions)]
        written = {prompt.index: its.text for prompt, its in complete(loaded, prompts, Decoding(TOKENS))}
        found[name] = [grade_math("7", written[i]).found for i in range(COUNT)]
    with open(folder / "problems.jsonl", "w", encoding="utf-8") as file:
        for i, question in enumerate(questions):
            answer = found["base" if i % 3 else "long"][i] or "7"
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")
    return Talkers(folder, folder / "base", folder / "long", folder / "problems.jsonl")


@dataclass(frozen=True)
class Sweep:
    """A sweep by the command, in this process."""

    talkers: Talkers
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def arguments(self, *options: str, config: dict | None = None, out: str = "out") -> list[str]:
        path = self.folder / "config.yml"
        path.write_text(yaml.safe_dump(config or self.talkers.config()), encoding="utf-8")
        arguments = ["sweep", str(path), str(self.folder / out), "--max-tokens", str(TOKENS), "--quiet"]
        problems = [] if "--problems" in options else ["--problems", str(self.talkers.problems)]
        varied = [] if "--set" in options else ["--set", "alpha_mean=0.3,0.6"]
        return [*arguments, *problems, *varied, *options]

    def __call__(self, *options: str, config: dict | None = None, out: str = "out") -> Result:
        return CliRunner().invoke(main, self.arguments(*options, config=config, out=out))

    def ok(self, *options: str, config: dict | None = None, out: str = "out") -> Result:
        result = self(*options, config=config, out=out)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result

    def record(self, out: str = "out") -> dict[str, Any]:
        return json.loads((self.folder / out / "sweep.json").read_text(encoding="utf-8"))

    def answers(self, out: str = "out") -> dict[str, list[dict]]:
        """Every run's answers, without what isn't the same twice."""
        found = {}
        for path in sorted((self.folder / out / "answers").iterdir()):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[path.stem] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        return found


@pytest.fixture
def sweep(talkers, tmp_path) -> Sweep:
    return Sweep(talkers, tmp_path)


RUNS = ["base", "long", "fim_ta alpha_mean=0.3", "fim_ta alpha_mean=0.6"]
TWINS = ["task_arithmetic weight=0.3", "task_arithmetic weight=0.6"]


@pytest.fixture(scope="module")
def whole(talkers, tmp_path_factory) -> Sweep:
    """A finished sweep, of two methods."""
    made = Sweep(talkers, tmp_path_factory.mktemp("whole"))
    made.ok("--compare", "task_arithmetic")
    return made


def names(record: dict) -> list[str]:
    return [run["run"] for run in record["findings"]["summary"]["runs"]]


def test_what_is_written(whole):
    record = whole.record()
    assert (record["format"], record["version"]) == ("mergekit-fim/sweep", 1)
    assert names(record) == RUNS + TWINS
    found = {str(p.relative_to(whole.out)) for p in whole.out.rglob("*") if p.is_file()}
    assert found == {
        *("sweep.json", "sweep.md", "sweep.png", "sweep.svg", ".lock", ".record.lock", ".dtype"),
        *(f".locks/{file_name(run)}.lock" for run in RUNS + TWINS),
        *(f"answers/{file_name(run)}.jsonl" for run in RUNS + TWINS),
        *(f"configs/{file_name(run)}.yml" for run in RUNS[2:] + TWINS),
    }
    problems = whole.talkers.problems.read_text().splitlines()
    for run in record["runs"]:
        rows = [json.loads(line) for line in (whole.out / run["answers"]).read_text().splitlines()]
        assert [(row["source"], row["index"], row["sample"]) for row in rows] == [
            (str(whole.talkers.problems), i, 0) for i in range(COUNT)
        ]
        assert list(rows[0]) == [field.name for field in dataclasses.fields(Answer)]
        assert [row["prompt_tokens"] for row in rows] == [len(row["prompt"]) for row in rows]
        assert [row["expected"] for row in rows] == [json.loads(line)["answer"] for line in problems]
        (its,) = (r for r in record["findings"]["summary"]["runs"] if r["run"] == run["run"])
        assert its["accuracy"]["value"] == sum(row["correct"] for row in rows) / COUNT
        assert its["tokens_mean"] == pytest.approx(sum(row["tokens"] for row in rows) / COUNT)
        assert its["truncated"] == sum(row["ended"] == "length" for row in rows) / COUNT
        assert run["dtype"] == "torch.float32"
        assert run["engine"] == {"name": "transformers", "version": transformers.__version__, "options": {}}
    assert record["findings"]["summary"]["base"] == "base"
    assert record["findings"]["summary"]["long"] == "long"
    assert (whole.out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    page = (whole.out / "sweep.md").read_text(encoding="utf-8")
    assert all(f"| {run} |" in page for run in RUNS + TWINS)
    assert "merge_method: fim_ta" in page
    assert "![Accuracy against mean tokens of every run, and the front](sweep.png)" in page


def test_the_front_of_a_sweep_is_what_it_found(whole, tmp_path):
    CliRunner().invoke(main, ["front", str(whole.out), "--json", str(tmp_path / "front.json")])
    assert json.loads((tmp_path / "front.json").read_text())["findings"] == whole.record()["findings"]


def test_the_pair_is_fit_for_these_tests(whole):
    """Or some tests here would be of less than they say."""
    runs = {run["run"]: run for run in whole.record()["findings"]["summary"]["runs"]}
    assert runs["long"]["tokens_mean"] > runs["base"]["tokens_mean"]
    assert 0 < runs["base"]["accuracy"]["value"] < 1
    assert runs["long"]["accuracy"]["value"] > 0
    assert len({(run["tokens_mean"], run["accuracy"]["value"]) for run in runs.values()}) > 2
    assert any(row["ended"] == "stop" for rows in whole.answers().values() for row in rows)


def test_answers_are_those_of_the_models(whole, tmp_path):
    """The merge that the page says how to make gives the answers that it is said to give."""
    run = RUNS[3]
    (entry,) = (entry for entry in whole.record()["runs"] if entry["run"] == run)
    config = whole.out / "configs" / f"{file_name(run)}.yml"
    assert yaml.safe_load(config.read_text()) == yaml.safe_load(entry["of"]["config"])
    assert CliRunner().invoke(main, ["merge", str(config), str(tmp_path / "m"), "--quiet"]).exit_code == 0
    tokenizer = load_tokenizer("m", str(tmp_path / "m"), None, False)
    model = load_model("m", str(tmp_path / "m"), tokenizer, MergeOptions(), None)
    rows = whole.answers()[file_name(run)]
    prompts = [Prompt("", row["index"], 0, row["prompt"], False) for row in rows]
    found = {prompt.index: its for prompt, its in complete(model, prompts, Decoding(TOKENS))}
    assert [(row["text"], row["tokens"], row["ended"]) for row in rows] == [
        (found[i].text, found[i].tokens, found[i].ended) for i in range(COUNT)
    ]
    assert rows != whole.answers()["base"]
    assert rows != whole.answers()["long"]


def test_what_is_printed(whole):
    result = whole.ok("--compare", "task_arithmetic")
    sentence = whole.record()["findings"]["recommended"]["sentence"]
    assert " ".join(sentence.split()) in " ".join(unwrapped(result).split())
    assert "area under the front" in result.stdout
    recommended = whole.record()["findings"]["recommended"]["run"]
    assert ("To merge it: mergekit-fim merge " in result.stdout) is (recommended not in ("base", "long"))


def test_a_finished_sweep_runs_nothing_again(whole, monkeypatch):
    before = {p: p.read_bytes() for p in (whole.out / "answers").iterdir()}
    for where, name in ((generation, "load_model"), (models_module, "merge_whole"), (module, "plan_merge")):
        monkeypatch.delattr(where, name)
    whole.ok("--compare", "task_arithmetic")
    assert {p: p.read_bytes() for p in (whole.out / "answers").iterdir()} == before


@pytest.mark.slow
def test_measured_once(sweep, monkeypatch):
    counts = dict.fromkeys(("TaskVectorSweep", "measured"), 0)

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(prepass, name)

        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **options)

        return call

    for name in counts:
        monkeypatch.setattr(prepass, name, counted(name))
    sweep.ok("--set", "alpha_mean=0.2,0.4,0.6", "--no-cache", "--n", "2")
    assert counts == {"TaskVectorSweep": 1, "measured": 1}
    sweep.ok("--set", "alpha_mean=0.3", "--set", "fisher_seed=0,1", "--no-cache", "--n", "2", out="two")
    assert counts == {"TaskVectorSweep": 3, "measured": 3}


@pytest.mark.slow
def test_factors_are_recorded_once(talkers, sweep, monkeypatch):
    recorded, read = [], []
    original, norms = measured_factors.record_factors, TaskVectorSweep.norms
    monkeypatch.setattr(measured_factors, "record_factors", lambda *a, **k: recorded.append(a[0]) or original(*a, **k))
    monkeypatch.setattr(TaskVectorSweep, "norms", lambda self, **k: read.append(self) or norms(self, **k))
    config = talkers.config() | {"merge_method": "fim_kron"}
    sweep.ok("--set", "alpha_mean=0.2,0.4,0.6", "--no-cache", "--n", "2", config=config)
    assert [len(set(map(str, recorded))), len(recorded), len(read)] == [2, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--batch", "1"], ["--batch", "5"], ["--num-threads", "1"]])
def test_answers_do_not_depend_on_the_batch(options, whole, sweep):
    sweep.ok("--compare", "task_arithmetic", *options)
    assert sweep.answers() == whole.answers()


@pytest.mark.slow
def test_gone_on_with(whole, sweep):
    """Lines that are lost are answered again, half a line is cut off, and other values are added."""
    shutil.copytree(whole.out, sweep.out)
    lines = {}
    for i, run in enumerate(RUNS + TWINS):
        path = sweep.out / "answers" / f"{file_name(run)}.jsonl"
        content = path.read_bytes().splitlines(keepends=True)
        lines[path] = content[: 2 * i]
        path.write_bytes(b"".join(content[: 2 * i]) + content[2 * i][: 20 * i])
    sweep.ok("--compare", "task_arithmetic")
    assert sweep.answers() == whole.answers()
    for path, kept in lines.items():
        assert path.read_bytes().splitlines(keepends=True)[: len(kept)] == kept
    sweep.ok("--set", "sharpness=0", "--set", "alpha_mean=0.45", "--compare", "ties")
    sweep.ok("--set", "alpha_mean=0.45", "--compare", "ties")
    assert names(sweep.record()) == [
        *("base", "long", "fim_ta alpha_mean=0.3", "fim_ta alpha_mean=0.45", "fim_ta alpha_mean=0.6"),
        *("fim_ta alpha_mean=0.45 sharpness=0.0", *TWINS, "ties weight=0.45"),
    ]


def test_another_margin_changes_the_conclusion_alone(whole, sweep):
    shutil.copytree(whole.out, sweep.out)
    before = whole.record()
    assert before["findings"]["recommended"]["margin"] == 0.05
    assert "| margin | 0.05 |" in (whole.out / "sweep.md").read_text(encoding="utf-8")
    result = sweep.ok("--compare", "task_arithmetic", "--margin", "0.99")
    after = sweep.record()
    assert after["findings"]["recommended"]["margin"] == 0.99
    assert after["findings"]["recommended"]["run"] != before["findings"]["recommended"]["run"]
    assert "at most 0.99 less accurate" in " ".join(unwrapped(result).split())
    assert "| margin | 0.99 |" in (sweep.out / "sweep.md").read_text(encoding="utf-8")
    assert (after["identity"], after["runs"]) == (before["identity"], before["runs"])
    assert after["findings"]["summary"] == before["findings"]["summary"]


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["none", "front", "all"])
def test_which_merges_are_kept(keep, whole, sweep):
    if keep == "front":  # also of a sweep that kept none
        shutil.copytree(whole.out, sweep.out)
    result = sweep.ok("--compare", "task_arithmetic", "--keep", keep)
    runs = sweep.record()["findings"]["summary"]["runs"]
    merged = [run["run"] for run in runs if run["method"] is not None]
    on_front = [run["run"] for run in runs if run["method"] is not None and run["pareto"]]
    expected = {"none": [], "front": on_front, "all": merged}[keep]
    folder = sweep.out / "models"
    assert sorted(os.listdir(folder) if folder.exists() else []) == sorted(map(file_name, expected))
    for run in expected:
        card = (folder / file_name(run) / "README.md").read_text(encoding="utf-8")
        assert "### Measured" in card
        assert re.search(rf"^\| {re.escape(run)} \|", card, re.M)
        assert re.search(r"^\| long \|", card, re.M)
        assert ("## Merge coefficients" in card) is run.startswith("fim")
        (its,) = (shown for shown in runs if shown["run"] == run)
        results = ModelCard.load(folder / file_name(run) / "README.md").data.eval_results
        assert [result.metric_value for result in results] == [its["accuracy"]["value"], its["tokens_mean"]]
        assert results[0].dataset_name == "problems.jsonl"
        assert (folder / file_name(run) / "model.safetensors").exists()
    recommended = sweep.record()["findings"]["recommended"]["run"]
    assert ("It is in " in result.stdout) is (recommended in expected)
    assert sweep.answers() == whole.answers()


@pytest.fixture
def merged(monkeypatch) -> list[Path]:
    """Where merges are written, as they are."""
    seen: list[Path] = []
    merge_whole = models_module.merge_whole

    def watched(config: Any, text: Any, out_path: str, options: Any) -> None:
        seen.append(Path(out_path))
        merge_whole(config, text, out_path, options)

    monkeypatch.setattr(models_module, "merge_whole", watched)
    return seen


IN_MEMORY = Path("/dev/shm")
linux = pytest.mark.skipif(not IN_MEMORY.is_dir(), reason="no folder in memory")


@linux
@pytest.mark.parametrize(
    ("keep", "free", "memory", "in_memory"),
    [("none", 1e12, 1e12, True), ("none", 1e12, 1e4, False), ("none", 1e4, 1e12, False), ("all", 1e12, 1e12, False)],
)
def test_merges_that_aren_t_kept_are_in_memory(keep, free, memory, in_memory, whole, sweep, merged, monkeypatch):
    """Where both the memory and the folder in it have the room: a merge here has about 200 kB."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=memory))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    sweep.ok("--keep", keep)
    assert len(merged) == 2
    for path in merged:
        assert path.is_relative_to(IN_MEMORY if in_memory else sweep.out / "models")
        assert path.exists() == (keep == "all")
        assert not in_memory or not path.parent.exists()
    assert {run: whole.answers()[run] for run in sweep.answers()} == sweep.answers()


@linux
def test_what_a_killed_sweep_left_in_memory(whole, sweep, warm, tmp_path):
    """The next start removes it, whatever it does."""
    code = """
import os, pathlib
import mergekit_fim.evaluate.models as models
merge_whole = models.merge_whole
def dying(config, text, out_path, options):
    merge_whole(config, text, out_path, options)
    pathlib.Path("left").write_text(out_path * pathlib.Path(out_path, "config.json").exists())
    os.kill(os.getpid(), 9)
models.merge_whole = dying
"""
    outcome = warm.run("mergekit-fim", *sweep.arguments(), code=code, folder=str(tmp_path))
    assert outcome.status == -signal.SIGKILL, outcome
    left = Path((tmp_path / "left").read_text())
    assert left.is_relative_to(IN_MEMORY)
    sweep.ok("--keep", "none", out="other")
    assert not left.parent.exists()
    sweep.ok()
    assert {run: whole.answers()[run] for run in sweep.answers()} == sweep.answers()


def test_several_sources_and_ungradable_answers(sweep):
    more = sweep.folder / "more.jsonl"
    rows = [{"question": "a?", "answer": "Paris"}, {"question": "b?", "answer": 3, "system": "s"}]
    more.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = sweep.ok("--problems", str(sweep.talkers.problems), "--problems", str(more), "--set", "alpha_mean=0.5")
    record = sweep.record()
    assert record["findings"]["summary"]["problems"] == COUNT + 1
    assert {k: v["problems"] for k, v in record["findings"]["by_source"].items()} == {
        str(sweep.talkers.problems): COUNT,
        str(more): 1,
    }
    (ungradable,) = record["findings"]["ungradable"]
    assert (ungradable["source"], ungradable["index"]) == (str(more), 0)
    assert "Not graded, and in none of these figures: 1 problem" in unwrapped(result)
    assert "## Not graded" in (sweep.out / "sweep.md").read_text()
    rows = sweep.answers()["base"]
    assert [(row["prompt"], row["correct"] is None) for row in rows[-2:]] == [("a?", True), ("s b?", False)]


@pytest.mark.slow
def test_samples(sweep):
    options = ("--temperature", "0.8", "--samples", "3", "--n", "4")
    sweep.ok(*options, "--batch", "2")
    rows = sweep.answers()["long"]
    assert [row["sample"] for row in rows] == [0, 1, 2] * 4
    assert len({row["index"] for row in rows}) == 4
    assert len({row["text"] for row in rows[:3]}) > 1
    assert sweep.record()["findings"]["summary"]["samples"] == 3
    sweep.ok(*options, "--batch", "7", out="again")
    assert sweep.answers("again") == sweep.answers()
    sweep.ok(*options, "--seed", "1", out="other")
    assert [row["text"] for row in sweep.answers("other")["long"]] != [row["text"] for row in rows]


def test_a_template_and_a_system_prompt(sweep):
    template = sweep.folder / "t.jinja"
    template.write_text("{{ system }}|Q: {{ question }}\nA:")
    sweep.ok("--template", str(template), "--system", "Be brief.", "--n", "2")
    rows = sweep.answers()["fim_ta_alpha_mean=0.3"]
    assert all(row["prompt"].startswith("Be brief.|Q: What is ") for row in rows)
    assert all(row["prompt"].endswith("?\nA:") for row in rows)
    record = sweep.record()
    assert record["identity"]["template"]["text"] == template.read_text()
    assert {run["template"]["kind"] for run in record["runs"]} == {"file"}


@pytest.mark.slow
def test_further_models_and_several_fine_tuned(sweep):
    config = sweep.talkers.config()
    third = sweep.folder / "third"
    shutil.copytree(sweep.talkers.base, third)
    config["models"].append({"model": str(third)})
    sweep.ok("--also", str(sweep.talkers.base), "--set", "alpha_mean=0.5", "--n", "3", config=config)
    record = sweep.record()
    assert names(record) == ["base", "long", "third", "base (2)", "fim_ta alpha_mean=0.5"]
    answers = sweep.answers()
    assert answers["base"] == answers["third"] == answers[file_name("base (2)")]
    assert record["findings"]["summary"]["long"] == "long"  # the longer of the two
    assert record["identity"]["models"].keys() == {str(sweep.talkers.base), str(sweep.talkers.long), str(third)}


def test_a_config_of_mergekits_own_method(sweep):
    config = sweep.talkers.config(merge_method="slerp", parameters={"t": 0.9})
    sweep.ok("--set", "t=0.25", "--compare", "linear", "--n", "3", config=config)
    assert names(sweep.record()) == ["base", "long", "slerp t=0.25", "linear weight=0.25"]


def test_several_configs_none_of_which_is_measured_for(sweep, monkeypatch):
    for name in ("measured", "TaskVectorSweep"):
        monkeypatch.delattr(prepass, name)
    own = {"merge_method": "task_arithmetic", "parameters": {"normalize": False}}
    for name, changes in (("ta", own), ("between", {"merge_method": "slerp", "parameters": {}})):
        (sweep.folder / f"{name}.yml").write_text(yaml.safe_dump(sweep.talkers.config(**changes)))
    _, out, *rest = sweep.arguments("--set", "t=0.25", "--set", "weight=0.5", "--n", "3")[1:]
    paths = [str(sweep.folder / f"{name}.yml") for name in ("ta", "between")]
    result = CliRunner().invoke(main, ["sweep", *paths, out, *rest])
    assert result.exit_code == 0, result.output
    record = sweep.record()
    assert names(record) == ["base", "long", "ta weight=0.5", "between t=0.25"]
    assert [area["method"] for area in record["findings"]["summary"]["areas"]] == ["ta", "between", None]
    assert record["identity"]["configs"].keys() == {"ta.yml", "between.yml"}
    page = (sweep.out / "sweep.md").read_text(encoding="utf-8")
    assert "In ta.yml the runs set" in page
    assert "merge_method: slerp" in page
    assert "ta minus between" in result.stdout
    assert "between" in (sweep.out / "sweep.svg").read_text()
    changed = sweep.talkers.config(merge_method="slerp", parameters={}, dtype="bfloat16")
    (sweep.folder / "between.yml").write_text(yaml.safe_dump(changed))
    ends_in_one_line(CliRunner().invoke(main, ["sweep", *paths, out, *rest]), "another sweep", "configs.between.yml is")


@pytest.mark.parametrize("tokenizer", [None, "long"])
def test_thoughts_that_a_merge_has_no_tags_for(tokenizer, sweep, tmp_path, caplog):
    """As Qwen2.5-Math has none, into which one merges a distillation of DeepSeek-R1's."""
    base = tmp_path / "base"
    shutil.copytree(sweep.talkers.base, base)
    made = json.loads((base / "tokenizer.json").read_text())
    text = json.dumps(made).replace('"<think>"', '"<box>"')
    (base / "tokenizer.json").write_text(text)
    for path in (base / "tokenizer_config.json", base / "special_tokens_map.json"):
        if path.exists():
            path.write_text(path.read_text().replace("<think>", "<box>"))
    source = {"tokenizer": {"source": str(sweep.talkers.long)}} if tokenizer else {}
    sweep.ok("--set", "alpha_mean=0.5", "--n", "1", config=sweep.talkers.config(base_model=str(base), **source))
    warned = [record.getMessage() for record in caplog.records if "thoughts" in record.getMessage()]
    assert len(warned) == (0 if tokenizer else 1)
    assert all("long writes as <think> is <box>" in text and "tokenizer: {source: " in text for text in warned)


def test_progress(sweep):
    arguments = [argument for argument in sweep.arguments("--n", "3") if argument != "--quiet"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    for run in RUNS:
        bars = [line for line in re.split(r"[\r\n]", result.stderr) if line.startswith(f"{run}: ")]
        assert re.search(r"3/3 .*accuracy [01]\.\d\d, \d+ tokens", bars[-1])
    assert "Fisher" not in result.stdout  # the table of coefficients, once a merge


# inspect_ai

TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import json_dataset
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, multiple_choice, prompt_template, system_message


@task
def short():
    data = json_dataset("short.jsonl")
    solvers = [system_message("Sum:"), prompt_template("{prompt}!"), generate()]
    return Task(dataset=data, solver=solvers, scorer=includes())


@task
def failing():
    return Task(dataset=json_dataset("short.jsonl"), solver=multiple_choice(), scorer=includes())
"""
READ = """
import json, sys
from inspect_ai.log import list_eval_logs, read_eval_log
found = {}
for log in map(read_eval_log, list_eval_logs(sys.argv[1])):
    assert log.status == "success"
    samples = []
    for its in log.samples:
        score = its.scores["correct"].value if its.scores else None
        tokens = [its.output.usage.input_tokens, its.output.usage.output_tokens]
        samples.append([its.id, its.epoch - 1, its.input, its.target, score, *tokens, its.output.stop_reason])
    (score,) = log.results.scores
    total = log.stats.model_usage[log.eval.model].output_tokens
    found[log.eval.model] = [samples, score.metrics["accuracy"].value, total]
print(json.dumps(found))
"""


@pytest.fixture
def short(sweep) -> str:
    (sweep.folder / "task.py").write_text(TASK)
    with open(sweep.folder / "short.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"input": f"{i} + {i}", "target": str(2 * i)}) + "\n" for i in range(5))
    return f"inspect:{sweep.folder}/task.py@short"


def test_a_task_of_inspects(short, sweep, monkeypatch):
    """It is answered, gone on with and logged as other problems are."""
    file = str(sweep.talkers.problems)
    more = sweep.folder / "more.jsonl"
    more.write_text('{"question": "a?", "answer": "Paris"}\n{"question": "b?", "answer": 3}\n')
    options = ["--problems", short, "--problems", file, "--problems", str(more), "--set", "alpha_mean=0.5"]
    options += ["--n", "5", "--temperature", "0.9", "--samples", "2"]
    sweep.ok(*options)
    answers = sweep.answers()
    rows = [row for rows in answers.values() for row in rows if row["source"] == short]
    assert len(rows) == 3 * 5 * 2
    assert all(row["prompt"] == f"Sum: {row['index']} + {row['index']}!" for row in rows)
    finals = [final_answer(row["prompt"], row["text"]) or "" for row in rows]
    assert [row["correct"] for row in rows] == [
        row["expected"] in final for row, final in zip(rows, finals, strict=True)
    ]
    assert {row["correct"] for row in rows} == {True, False}
    path = sweep.out / "answers" / "long.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    sweep.ok(*options)
    assert sweep.answers() == answers
    assert not (sweep.out / "inspect").exists()
    monkeypatch.delattr(generation, "load_model")  # all is answered
    sweep.ok(*options, "--log", "inspect")
    logs = inspect(READ, str(sweep.out / "inspect"), folder=sweep.folder)
    assert {file_name(run) for run in logs} == answers.keys()
    for run, (samples, accuracy, tokens) in logs.items():
        its = answers[file_name(run)]
        score = {True: "C", False: "I", None: None}
        ended = {"stop": "stop", "length": "max_tokens"}
        expected = [
            [
                *(f"{row['source']}, {row['index']}", row["sample"], row["prompt"], row["expected"]),
                *(score[row["correct"]], row["prompt_tokens"], row["tokens"], ended[row["ended"]]),
            ]
            for row in its
        ]
        assert sorted(samples, key=str) == sorted(expected, key=str)
        graded = [row["correct"] for row in its if row["correct"] is not None]
        assert accuracy == sum(graded) / len(graded)
        assert tokens == sum(row["tokens"] for row in its)


def test_a_task_that_changes_or_fails(short, sweep):
    options = ["--problems", short, "--set", "alpha_mean=0.5", "--n", "2"]
    ends_in_one_line(sweep("--problems", short.replace("short", "failing")), "whose solver fails", absent=sweep.out)
    sweep.ok(*options)
    (sweep.folder / "task.py").write_text(TASK.replace("Sum:", "Add:"))
    GRADER.close()
    ends_in_one_line(sweep(*options), "another sweep", "problems[0].fingerprint")


def test_a_log_without_inspect_ai(sweep, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "inspect_ai" else find(name))
    ends_in_one_line(sweep("--log", "inspect"), "pip install 'mergekit-fim[inspect]'", absent=sweep.out)


# Servers


def test_servers(sweep, stub):
    started = stub(models=["org/other"])
    run = "fim_ta alpha_mean=0.3"
    sweep.ok("--server", started.url, "--server", f"{run}={started.url}", "--n", "2", "--batch", "2")
    record = sweep.record()
    assert names(record) == ["base", "long", "other", *RUNS[2:]]
    rows = sweep.answers()
    assert [row["text"] for row in rows["other"]] == [row["prompt"].split('"')[-2] for row in rows["other"]]
    assert [(row["tokens"], row["prompt_tokens"]) for row in rows[file_name(run)]] == [(3, 5), (3, 5)]
    of = {entry["run"]: entry["of"] for entry in record["runs"]}
    assert of["other"] == of[run] == {"server": started.url, "model": "org/other"}
    assert all(body["max_tokens"] == TOKENS and not body["stream"] for _, body, _ in started.seen)


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back(sweep, stub):
    def dying(handler, path, body):
        if len(started.seen) > 3:
            return say(handler, {"error": "gone"}, 500)
        return good(handler, path, body)

    started = stub(dying)
    options = ("--server", f"base={started.url}", "--batch", "1", "--set", "alpha_mean=0.5")
    ends_in_one_line(sweep(*options), "500", "the answers so far are kept")
    assert len(sweep.answers()["base"]) == 3
    started.answer = good
    seen = len(started.seen)
    sweep.ok(*options)
    assert len(started.seen) - seen == COUNT - 3
    assert len(sweep.answers()["base"]) == COUNT
    path = sweep.out / "answers" / "base.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    ends_in_one_line(sweep("--set", "alpha_mean=0.5"), str(path), "same model", started.url, "remove the file")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["nobody={url}"], ["--server", "nobody", "base, long, fim_ta alpha_mean=0.3"]),
        (["{url}", "{url}"], ["--server", "m is answered by another"]),
        (["base={url}", "base={url}"], ["--server", "base is answered by another"]),
        (["localhost:80"], ["--server", "http://localhost:8000/v1"]),
    ],
)
def test_servers_that_cannot_be(given, words, sweep, stub):
    url = stub().url
    options = [part for text in given for part in ("--server", text.format(url=url))]
    ends_in_one_line(sweep(*options), *words, absent=sweep.out)


# Faults


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "alpha_maen=0.2"], ["alpha_maen", "did you mean `alpha_mean`"]),
        (["--compare", "tise"], ["--compare", "tise", "task_arithmetic, ties, linear"]),
        (["--problems", "none.jsonl"], ["none.jsonl", "no file of this name"]),
        (["--samples", "2"], ["--samples", "--temperature"]),
        (["--samples", "0"], ["--samples", "at least 1"]),
        (["--max-tokens", "0"], ["--max-tokens", "at least 1"]),
        (["--seed", "-1"], ["--seed", "at least 0"]),
        (["--batch", "0"], ["--batch", "at least 1"]),
        (["--refine", "-1"], ["--refine", "at least 0"]),
        (["--temperature", "-1"], ["--temperature", "at least 0"]),
        (["--temperature", "nan"], ["--temperature", "at least 0"]),
        (["--margin", "-0.1"], ["--margin", "at least 0 and below 1"]),
        (["--margin", "1"], ["--margin", "at least 0 and below 1"]),
        (["--margin", "nan"], ["--margin", "at least 0 and below 1"]),
        (["--n", "-1"], ["0 (all) or more", "-1"]),
        (["--also", "no/such/model"], ["no/such/model"]),
        (["--template", "none.jinja"], ["none.jinja", "can't be read"]),
        (["--device", "cuda:7"], ["--device"]),
    ],
)
def test_options_that_cannot_be(options, words, sweep):
    ends_in_one_line(sweep(*options), *words)
    assert not (sweep.out / "answers").exists() or not os.listdir(sweep.out / "answers")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["{{ question }}"]),
        ("What is it?", ["{{ question }}"]),
        ("{{ question", ["Jinja"]),
        ("{{ question }}{{ x.y }}", ["t.jinja", "fails on problem 0", "'x' is undefined"]),
        ("{{ question }}{{ raise('no') }}", ["t.jinja", "fails on problem 0"]),
        ("{{ question }}{{ ''.__class__.__mro__[1].__subclasses__() }}", ["t.jinja", "fails on problem 0"]),
        ("{% if question %}{% endif %}", ["prompt", "empty"]),
    ],
)
def test_templates_that_cannot_be(content, words, sweep):
    path = sweep.folder / "t.jinja"
    path.write_text(content)
    ends_in_one_line(sweep("--template", str(path)), *words)
    path.write_bytes(b"\xff{{ question }}")
    ends_in_one_line(sweep("--template", str(path)), "UTF-8")


def test_chat_templates_that_cannot_be(sweep, tmp_path):
    base = tmp_path / "silent"
    shutil.copytree(sweep.talkers.base, base)
    for path in base.glob("*.jinja"):
        path.unlink()
    tiny.tokenizer().save_pretrained(base)
    config = sweep.talkers.config(base_model=str(base))
    ends_in_one_line(sweep(config=config), "base: expected a model with a chat template, found none", "--template")
    tiny.tokenizer(chat_template="{{ raise_exception('no system') }}").save_pretrained(base)
    ends_in_one_line(sweep(config=config, out="two"), "base: its chat template fails on problem 0", "no system")
    shutil.rmtree(base / "tokenizer.json", ignore_errors=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    ends_in_one_line(sweep(config=config, out="three"), "base", "tokenizer")


def test_problems_none_of_which_can_be_graded(sweep):
    path = sweep.folder / "p.jsonl"
    path.write_text('{"question": "a?", "answer": "Paris"}\n')
    ends_in_one_line(sweep("--problems", str(path)), "can be graded", "words", absent=sweep.out)


def test_the_folder_of_another_sweep(whole, sweep):
    shutil.copytree(whole.out, sweep.out)
    before = {p: p.read_bytes() for p in sweep.out.rglob("*") if p.is_file()}
    for options, words in [
        (["--seed", "1"], ["another sweep", "seed is 0, here 1"]),
        (["--n", "3"], ["another sweep", "problems[0].problems is 12, here 3"]),
        (["--max-tokens", "9"], ["another sweep", "max_tokens is 16, here 9"]),
        (["--system", "s"], ["another sweep", "system is None, here s"]),
    ]:
        ends_in_one_line(sweep(*options), *words)
    config = sweep.talkers.config(dtype="bfloat16")
    ends_in_one_line(sweep(config=config), "another sweep", "config is")
    assert {p: p.read_bytes() for p in sweep.out.rglob("*") if p.is_file()} == before
    sweep.ok("--no-cache", "--compare", "task_arithmetic")  # says nothing of the answers


def test_other_models_under_the_same_names(whole, talkers, tmp_path):
    models = tmp_path / "models"
    for name in ("base", "long"):
        shutil.copytree(talkers.folder / name, models / name)
    moved = dataclasses.replace(talkers, base=models / "base", long=models / "long")
    sweep = Sweep(moved, tmp_path)
    sweep.ok("--n", "1")
    tiny.save(tiny.build(tiny.config("llama", num_hidden_layers=3), seed=5), models / "long")
    ends_in_one_line(sweep("--n", "1"), "another sweep", str(models / "long"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("sweep.json", "{", ["sweep.json", "JSON"]),
        ("sweep.json", "[]", ["sweep.json", "record of a sweep"]),
        ("sweep.json", '{"format": "mergekit-fim/report"}', ["sweep.json", "record of a sweep"]),
        ("sweep.json", '{"format": "mergekit-fim/sweep", "version": 2}', ["version 1", "found 2"]),
        ("sweep.json", '{"format": "mergekit-fim/sweep", "version": 1}', ["sweep.json", "`identity` is missing"]),
        ("notes.txt", "mine", ["empty folder", "notes.txt"]),
        ("answers", None, ["empty folder", "answers"]),
    ],
)
def test_folders_that_are_not_a_sweeps(name, content, words, sweep):
    sweep.out.mkdir()
    (sweep.out / name).mkdir() if content is None else (sweep.out / name).write_text(content)
    ends_in_one_line(sweep(), *words)
    assert content is None or (sweep.out / name).read_text() == content


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda record: record["runs"].clear(), ["base.jsonl", "isn't there", "remove the file"]),
        (lambda record: record["runs"][0].pop("settings"), ["sweep.json", "runs[0]", "settings"]),
        (lambda record: record["runs"][1].update(of="me"), ["sweep.json", "runs[1]"]),
        (lambda record: record["runs"].append(3), ["sweep.json", "runs[6]", "found 3"]),
    ],
)
def test_records_that_were_damaged(damage, words, whole, sweep):
    shutil.copytree(whole.out, sweep.out)
    record = sweep.record()
    damage(record)
    (sweep.out / "sweep.json").write_text(json.dumps(record))
    ends_in_one_line(sweep("--compare", "task_arithmetic"), *words)


def test_what_is_in_the_way(whole, sweep):
    shutil.copytree(whole.out, sweep.out)
    shutil.rmtree(sweep.out / "configs")
    (sweep.out / "configs").write_text("")
    ends_in_one_line(sweep("--compare", "task_arithmetic"), str(sweep.out / "configs"), "can't be written")
    (sweep.out / "configs").unlink()
    path = sweep.out / "answers" / "base.jsonl"
    path.unlink()
    path.mkdir()
    ends_in_one_line(sweep("--compare", "task_arithmetic"), str(path), "Is a directory")


def test_no_folder(sweep):
    (sweep.folder / "file").write_text("")
    ends_in_one_line(sweep(out="file"), "expected a folder", "found a file")
    arguments = sweep.arguments()
    arguments[2] = ""
    ends_in_one_line(CliRunner().invoke(main, arguments), "expected the name of a folder")
    ends_in_one_line(sweep(out="file/out"), "can't be written")


ROW = {"source": "s", "index": 0, "sample": 0, "prompt": "p", "text": "t", "tokens": 1, "ended": "stop"}
ROW |= {"unclosed": False, "correct": True, "found": None, "note": None, "seconds": 1}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{}\n", ["line 2", "`source`"]),
        (b"[]\n", ["line 2", "JSON object"]),
        (b"\xff\n", ["line 2", "JSON object"]),
        (json.dumps(ROW | {"tokens": "1"}).encode() + b"\n", ["line 2", "`tokens`"]),
        (json.dumps(ROW | {"index": 7}).encode() + b"\n", ["line 2", "problem 7 of s"]),
        (b"\x00" * 100 + b"\n", ["line 2", "JSON object"]),
    ],
)
def test_answers_that_are_none(line, words, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n" + line)
    with pytest.raises(FimError) as error:
        read_answers(str(path), [("s", 0, 0)])
    assert all(word in str(error.value) for word in [str(path), *words])


def test_answers_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "a.jsonl"
    answers = [
        Answer("s", 0, 0, "é\n", "<think>\u2028 \x00", 3, "length", True, None, None, "why", 0.5),
        Answer("s", 1, 0, "", "", 0, "stop", False, False, "7", None, 1.25),
    ]
    write_answers(str(path), answers)
    keys = [("s", 0, 0), ("s", 1, 0)]
    assert read_answers(str(path), keys) == dict(zip(keys, answers, strict=True))
    path.write_bytes(path.read_bytes() + b'{"source": "s"')
    assert list(read_answers(str(path), keys).values()) == answers
    write_answers(str(path), [*answers, dataclasses.replace(answers[0], text="again")])
    assert list(read_answers(str(path), keys).values()) == answers


def test_rows_of_earlier_versions(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    (answer,) = read_answers(str(path), [("s", 0, 0)]).values()
    assert (answer.text, answer.prompt_tokens, answer.expected) == ("t", None, None)


def test_names_of_files():
    runs = ["a b", "a_b", "a/b", "a:b", "../x", "..", "é", ".b", "x" * 300, "x" * 299, "CON=1, 2", "a|b"]
    names = [file_name(run) for run in runs]
    assert len(set(names)) == len(names) - 1  # "a b" and "a_b": no two runs differ in that alone
    assert all(re.fullmatch(r"[A-Za-z0-9_=,+-][A-Za-z0-9._=,+-]{0,110}", name) for name in names)
    assert file_name("fim_ties alpha_mean=0.35") == "fim_ties_alpha_mean=0.35"


@pytest.mark.slow
def test_the_disk_is_full(sweep, monkeypatch):
    def full(file, answer):
        nonlocal left
        left -= 1
        if left < 0:
            file.write(b'{"sou')
            file.flush()
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file = _Full(file.name, error)
        original(file, answer)

    left, original = 5, folder_module.append_answer
    monkeypatch.setattr(one_run, "append_answer", full)
    ends_in_one_line(sweep(), "base.jsonl", "No space left", "the answers so far are kept")
    monkeypatch.undo()
    path = sweep.out / "answers" / "base.jsonl"
    assert path.read_bytes().count(b"\n") == 5
    assert path.read_bytes().endswith(b'{"sou')
    sweep.ok()
    assert len(sweep.answers()["base"]) == COUNT


@dataclass
class _Full:
    name: str
    error: OSError

    def write(self, _: bytes) -> None:
        raise self.error


def test_an_engine_that_isn_t_installed(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    for options in (("--engine", "vllm"), ("--engine-args", "max_model_len=9")):
        ends_in_one_line(sweep(*options), "pip install 'mergekit-fim[vllm]'")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("__version__ = '0.9.2'", "vllm: expected version 0.32 or newer, found 0.9.2"),
        ("raise RuntimeError('operator torchvision::nms is missing')", "(operator torchvision::nms is missing)"),
    ],
)
def test_an_engine_that_doesn_t_fit(code, words, sweep, monkeypatch, tmp_path, caplog):
    """Unless told to answer by it, the sweep says so and answers by transformers."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    del sys.modules["vllm"]
    ends_in_one_line(sweep("--engine", "vllm"), words, "--engine transformers")
    sweep.ok("--set", "alpha_mean=0.3")
    assert "transformers answers, though vLLM is installed" in caplog.text
    assert {run["engine"]["name"] for run in sweep.record()["runs"]} == {"transformers"}


@pytest.mark.slow
def test_engines_are_mixed_only_if_told(sweep):
    sweep.ok("--set", "alpha_mean=0.3")
    record = sweep.record()
    for run in record["runs"]:
        run["engine"]["version"] = "0.1"
    (sweep.out / "sweep.json").write_text(json.dumps(record), encoding="utf-8")
    ends_in_one_line(sweep("--set", "alpha_mean=0.4"), "expected runs of one engine, found base by", "--mix-engines")
    sweep.ok("--set", "alpha_mean=0.4", "--mix-engines")
    assert len({run["engine"]["version"] for run in sweep.record()["runs"]}) == 2


def test_interrupted(sweep, monkeypatch):
    def interrupt(*_: Any, **__: Any) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(generation.Transformers, "answers", interrupt)
    ends_in_one_line(sweep(), "stopped; the answers so far are kept, and the same command goes on")


def contents(sweep: Sweep) -> dict[str, Any]:
    """What is the same of two runs of a sweep: all but times, and figures in which they are."""
    record = sweep.record()
    record["findings"]["summary"]["runs"] = [
        {k: v for k, v in run.items() if k != "tokens_per_second"} for run in record["findings"]["summary"]["runs"]
    ]
    files = {str(p.relative_to(sweep.out)) for p in sweep.out.rglob("*")}
    return {"answers": sweep.answers(), "record": record, "files": files, "svg": (sweep.out / "sweep.svg").read_text()}


# Each of its 41 sweeps would start a process that grades, half a second of a core.
GRADED_HERE = """
import mergekit_fim.evaluate.problems.grader as grader
from mergekit_fim.evaluate.records import Grade
grader.why_ungradable = lambda expected: None
grader.grade = lambda do, expected, answer: Grade(expected in answer, expected)
"""


@pytest.mark.slow
def test_killed_at_any_moment(warm: Warm, talkers, tmp_path):
    """20 moments, spread over all calls, those that touch files, and, every other one, those that keep answers."""
    problems = tmp_path / "three.jsonl"
    problems.write_text("".join(talkers.problems.read_text().splitlines(keepends=True)[:3]))
    options = ("--problems", str(problems), "--set", "alpha_mean=0.5", "--keep", "all", "--batch", "2")
    sweeps = [Sweep(talkers, tmp_path / str(i)) for i in range(2)]
    for sweep in sweeps:
        sweep.folder.mkdir()

    def run(*faults: tuple[str, int, int] | None, count: bool = False) -> list[Outcome]:
        """One in each folder, at the same time."""
        jobs = []
        for sweep, fault in zip(sweeps, faults, strict=False):
            cache = {"MERGEKIT_FIM_CACHE": str(sweep.folder / "cache")}
            arguments = ["mergekit-fim", *sweep.arguments(*options)]
            faulty = {"fault": fault, "count": count, "code": GRADED_HERE}
            jobs.append({"arguments": arguments, "environment": cache, **faulty})
        return warm.together(*jobs)

    (done,) = run(None, count=True)
    assert done.status == 0, done.stderr
    expected = contents(sweeps[0])
    assert not any(name.endswith(PART) for name in expected["files"])
    parts = {"all": 4, "file": 4, "answers": 12}
    moments = [(kind, 1 + done.calls[kind] * (2 * i + 1) // (2 * n)) for kind, n in parts.items() for i in range(n)]
    begun = 0
    for i in range(0, len(moments), 2):
        for sweep in sweeps:
            for name in ("out", "cache"):
                shutil.rmtree(sweep.folder / name, ignore_errors=True)
        now = moments[i : i + 2]
        stopped = run(*((kind, at, signal.SIGKILL) for kind, at in now))
        assert [outcome.status for outcome in stopped] == [-signal.SIGKILL] * 2, (now, stopped)
        for sweep in sweeps:
            with contextlib.suppress(OSError):
                rows = [path.read_bytes().count(b"\n") for path in (sweep.out / "answers").glob("*.jsonl")]
                begun += any(0 < count < 3 for count in rows)
        for sweep, outcome in zip(sweeps, run(None, None), strict=True):
            assert outcome.status == 0, (now, outcome.stderr)
            assert contents(sweep) == expected, now
    assert begun  # or no moment was between two answers


# Strengths that are found


def test_refining_goes_to_the_widest_gap():
    base, long = Point(0, 0.2, 10), Point(1, 0.8, 110)
    points = [base, Point(0.4, 0.2, 12), Point(0.6, 0.7, 100), long]
    assert next_strength(points, base, long) == pytest.approx(0.5)
    assert next_strength(points[::-1], base, long) == pytest.approx(0.5)
    flat = [Point(0.2, 0.5, 50), Point(0.4, 0.5, 50), Point(0.9, 0.5, 50)]
    assert next_strength(flat, base, long) == pytest.approx(0.65)  # nothing differs: the widest in strength
    by_accuracy = [Point(0.2, 0.3, 50), Point(0.4, 0.6, 50), Point(0.9, 0.6, 50)]
    assert next_strength(by_accuracy, base, long) == pytest.approx(0.3)
    assert next_strength([Point(0.5, 0.2, 10), Point(0.504, 0.8, 110)], base, long) is None
    assert next_strength([long], base, long) is None
    # 0.4 of the way in tokens is less than all of it in accuracy, which counts half.
    by_parts = [Point(0.2, 0.2, 10), Point(0.4, 0.2, 50), Point(0.6, 0.8, 50)]
    assert next_strength(by_parts, base, long) == pytest.approx(0.5)
    as_long = Point(0, 0.2, 110)  # base and long model write as much
    assert next_strength([as_long, Point(0.5, 0.3, 110), long], as_long, long) == pytest.approx(0.75)


def test_a_family_lies_between_the_models_that_it_leads_from_and_to():
    base, long = Point(0.5, 0.2, 10), Point(0.5, 0.8, 110)
    ends = Point(0, 0.2, 10), Point(1, 0.8, 110)
    inside = [Point(0.3, 0.2, 12), Point(0.9, 0.3, 20)]
    assert between_ends("alpha_mean", inside, base, long) == [ends[0], *inside, ends[1]]
    assert next_strength(between_ends("alpha_mean", inside, base, long), base, long) == pytest.approx(0.95)
    assert between_ends("lambda", inside, base, long) == [ends[0], *inside]
    assert between_ends("weight", inside, base, None) == [ends[0], *inside]
    beyond = [Point(0, 0.2, 10), Point(1.0, 0.7, 90)]
    assert between_ends("weight", beyond, base, long) == beyond


def strengths(record: dict, method: str) -> list[float]:
    return [next(iter(run["settings"].values())) for run in record["runs"] if run["method"] == method]


def test_refined(whole, sweep):
    shutil.copytree(whole.out, sweep.out)
    sweep.ok("--compare", "task_arithmetic", "--refine", "2")
    record = sweep.record()
    ends = {run: whole.record()["findings"]["summary"]["runs"][i] for i, run in enumerate(("base", "long"))}
    assert sweep.answers().items() >= whole.answers().items()
    for method in ("fim_ta", "task_arithmetic"):
        found = {
            next(iter(run["settings"].values())): Point(
                next(iter(run["settings"].values())), run["accuracy"]["value"], run["tokens_mean"]
            )
            for run in record["findings"]["summary"]["runs"]
            if run["method"] == method
        }
        assert len(found) == 4
        base, long = (
            Point(strength, end["accuracy"]["value"], end["tokens_mean"]) for strength, end in enumerate(ends.values())
        )
        known = [0.3, 0.6]
        for _ in range(2):
            known.append(round(next_strength([base, *(found[x] for x in known), long], base, long), 4))
            assert known[-1] in found
    (twin,) = (run for run in record["runs"] if run["run"] == "task_arithmetic weight=0.3")
    assert twin["method"] == "task_arithmetic"
    # The same command finds everything there, and one that refines further goes on from it.
    before = sweep.answers()
    sweep.ok("--compare", "task_arithmetic", "--refine", "2")
    assert sweep.answers() == before
    assert strengths(record, "fim_ta")[:2] == [0.3, 0.6]


# Several processes

SHOWN = """
import os, time
import mergekit_fim.evaluate.answers.generation as generation
import mergekit_fim.evaluate.one_run as one_run
from mergekit_fim.errors import FimError
load, append = generation.load_model, one_run.append_answer
def load_model(name, *args):
    print("answers:", name, flush=True)
    {loads}
    return load(name, *args)
def append_answer(file, answer):
    append(file, answer)
    print("answer:", os.path.basename(file.name), answer.index, flush=True)
    {answers}
generation.load_model, one_run.append_answer = load_model, append_answer
"""


def answered(done: list[Outcome]) -> list[str]:
    """Which answers were given, by all of the processes."""
    return sorted(line for its in done for line in re.findall(r"answer: (.*)", its.stdout))


def shown(done: list[Outcome]) -> list[int]:
    """Which of the processes said what came out."""
    return [i for i, its in enumerate(done) if "area under the front" in its.stdout]


def every_answer(sweep: Sweep) -> list[str]:
    return sorted(f"{run}.jsonl {row['index']}" for run, rows in sweep.answers().items() for row in rows)


@pytest.mark.slow
def test_several_processes_share_the_runs(whole, sweep, warm):
    """A launcher's: each answers some of the runs, the first alone logs, and the one that concludes prints."""
    code = SHOWN.format(loads="pass", answers="time.sleep(0.05)")
    done = together(warm, 2, *sweep.arguments("--compare", "task_arithmetic"), code=code)
    assert [its.status for its in done] == [0, 0], done
    loaded = [re.findall(r"answers: (.*)", its.stdout) for its in done]
    assert sorted(loaded[0] + loaded[1]) == sorted([*RUNS, *TWINS])
    assert all(loaded)
    assert answered(done) == every_answer(sweep)
    assert len(shown(done)) == 1
    assert done[1].stderr == ""
    assert sweep.answers() == whole.answers()
    assert sweep.record()["findings"]["summary"]["runs"] == without_speed(sweep, whole)
    assert [run["run"] for run in sweep.record()["runs"]] == [run["run"] for run in whole.record()["runs"]]
    assert not (sweep.out / "models").exists()


def without_speed(own: Sweep, other: Sweep) -> list[dict]:
    """Another sweep's runs, with how fast they were taken from one's own."""
    speeds = {run["run"]: run["tokens_per_second"] for run in own.record()["findings"]["summary"]["runs"]}
    runs = other.record()["findings"]["summary"]["runs"]
    return [run | {"tokens_per_second": speeds[run["run"]]} for run in runs]


@pytest.mark.slow
def test_three_commands_one_of_them_killed(whole, sweep, warm):
    """The run of the one that is killed goes on where it was, and no answer is given twice."""
    arguments = ["mergekit-fim", *sweep.arguments("--compare", "task_arithmetic")]
    patient = SHOWN.format(loads="pass", answers="time.sleep(0.1)")
    killed = SHOWN.format(loads="pass", answers="answer.index >= 4 and os.kill(os.getpid(), 9)")
    codes = [patient, killed, patient]
    environment = {"MERGEKIT_FIM_CACHE": str(sweep.folder / "cache")}
    done = warm.together(*({"arguments": arguments, "code": code, "environment": environment} for code in codes))
    assert [its.status for its in done] == [0, -signal.SIGKILL, 0], done
    assert len(answered(done[1:2])) < COUNT
    assert answered(done) == every_answer(sweep)
    assert len(shown(done)) == 1
    assert sweep.answers() == whole.answers()
    assert sweep.record()["findings"]["summary"]["runs"] == without_speed(sweep, whole)
    assert not (sweep.out / "models").exists()


@pytest.mark.slow
def test_one_of_several_processes_failing(whole, sweep, warm):
    """It ends in one line, and the others take over what it leaves."""
    loads = "if os.environ['RANK'] == '1': raise FimError('no such luck')\n    time.sleep(1)"
    done = together(warm, 2, *sweep.arguments(), code=SHOWN.format(loads=loads, answers="pass"))
    assert [its.status for its in done] == [0, 1]
    assert done[1].stderr == "Error: no such luck\n"
    assert shown(done) == [0]
    sweep.ok("--compare", "task_arithmetic")
    assert sweep.answers() == whole.answers()


def test_one_that_asks_for_something_else_while_another_is_at_it(whole, sweep):
    shutil.copytree(whole.out, sweep.out)
    with taken(SweepFolder(str(sweep.out)), "base") as free:
        assert free
        ends_in_one_line(sweep("--seed", "1"), "another sweep", "seed is 0, here 1")


def test_a_run_that_another_command_adds_is_left_to_it(whole, sweep):
    """What others are at isn't read: it may be half-written."""
    shutil.copytree(whole.out, sweep.out)
    path = sweep.out / "answers" / f"{file_name(TWINS[1])}.jsonl"
    path.write_bytes(b"\0" * 100 + b"\n")
    with taken(SweepFolder(str(sweep.out)), TWINS[1]):
        sweep.ok()
    assert names(sweep.record()) == [*RUNS, TWINS[0]]
