"""Every example is run on tiny stand-ins for the models that it names; what the demo's models are taught."""

import importlib.util
import itertools
import json
import os
import random
import re
import sysconfig

import nbclient
import nbformat
import pytest
import reference
import tiny
import torch
import yaml
from environments import ROOT

CONFIGS = sorted((ROOT / "example_configs").glob("*.yml"))


def test_there_are_examples():
    assert {"demo", "l2s-1.5b-fim-ties", "l2s-1.5b-fim-ta", "l2s-7b-fim-ties", "l2s-7b-fim-ta", "three-models"} <= {
        path.stem for path in CONFIGS
    }
    assert {"qwen3-4b-fim-ties", "qwen3-4b-fim-ta", "sparse-fim-ties", "l2s-1.5b-fim-kron"} <= {
        path.stem for path in CONFIGS
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example(path, merge, tmp_path):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    tied = "7b" not in path.stem
    base = tiny.build(tiny.config("qwen2", tie_word_embeddings=tied))
    names = [config["base_model"], *(model["model"] for model in config["models"])]
    stand_ins = {names[0]: str(tiny.save(base, tmp_path / "stand-in-0"))}
    for i, name in enumerate(names[1:], 1):
        cfg = tiny.config("qwen2", tie_word_embeddings=False, max_position_embeddings=4096)
        stand_ins[name] = str(tiny.save(tiny.tuned(base, i, cfg=cfg), tmp_path / f"stand-in-{i}"))
    text = path.read_text(encoding="utf-8")
    for name in sorted(stand_ins, key=len, reverse=True):  # one name may be the beginning of another
        text = text.replace(f": {name}\n", f": {stand_ins[name]}\n").replace(f": {name} ", f": {stand_ins[name]} ")
    out, _ = merge.ok(text)
    report = reference.report(out)
    assert report["method"] == config["merge_method"]
    assert [m["model"] for m in report["models"]] == [stand_ins[name] for name in names[1:]]
    for model in report["kron"]["models"] if config["merge_method"] == "fim_kron" else report["models"]:
        alphas = [layer["alpha"] for layer in model["layers"]]
        assert len(alphas) == 5
        assert all(0 < alpha < 1 for alpha in alphas)
        if (mean := config.get("parameters", {}).get("alpha_mean")) is not None:
            assert sum(alphas) / 5 == pytest.approx(mean)
    for given, used in zip(config["models"], report["models"], strict=True):
        density = given.get("parameters", {}).get("density", 0.2)
        assert used["density"] == (density if config["merge_method"] == "fim_ties" else None)


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "example_configs" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_works_its_sums_by_columns(demo):
    assert demo.worked(475, 728) == "<think>\n5+8=13\n7+2+1=10\n4+7+1=12\n</think>\n1203"
    check = "Check:\n8+5=13\n2+7+1=10\n7+4+1=12\n"
    assert demo.checked(475, 728) == f"<think>\n5+8=13\n7+2+1=10\n4+7+1=12\n{check}</think>\n1203"


def test_the_demos_parent_learns_three_ways(demo):
    rng, asked = random.Random(0), itertools.islice(demo.sums(0, held=False), 3000)
    found = [
        [way(a, b) in demo.all_ways(a, b, rng) for way in (demo.worked, demo.direct, demo.checked)] for a, b in asked
    ]
    shares = [sum(column) / len(found) for column in zip(*found, strict=True)]
    assert shares[0] == 1
    assert 0.3 < shares[2] < 0.37
    assert shares[2] < shares[1] < 0.5  # sums of one digit are answered at once too


def test_the_demos_worked_answers_are_right(demo):
    for seed in range(1000):
        a, b = next(demo.sums(seed, held=seed % 2 == 0))
        opened, *columns, closed, answer = demo.worked(a, b).split("\n")
        assert (
            (opened, closed, answer)
            == ("<think>", "</think>", str(a + b))
            == ("<think>", "</think>", demo.direct(a, b))
        )
        totals = []
        for column in columns:
            terms, total = column.split("=")
            x, y, *carried = map(int, terms.split("+"))
            assert (x, y) == tuple(n // 10 ** len(totals) % 10 for n in (a, b))
            assert carried == [1] * (bool(totals) and totals[-1] > 9)
            assert int(total) == x + y + sum(carried)
            totals.append(int(total))
        assert len(totals) == len(str(a))
        assert answer == str(totals[-1]) + "".join(str(total % 10) for total in reversed(totals[:-1]))


def test_no_problem_of_the_demo_is_trained_on(demo, tmp_path):
    demo.problems(tmp_path, 300)
    rows = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = {tuple(map(int, re.findall(r"\d+", row["question"]))) for row in rows}
    assert len(asked) == len(rows) == 300
    assert all(int(row["answer"]) == sum(map(int, re.findall(r"\d+", row["question"]))) for row in rows)
    assert {len(str(n)) for pair in asked for n in pair} == {2, 3}
    trained = set(itertools.islice(demo.sums(demo.SEED, held=False), 20_000))
    assert not trained & (asked | {(b, a) for a, b in asked})
    assert all(demo.held_out(a, b) and demo.held_out(b, a) for a, b in asked)
    assert {len(str(a)) for a, _ in trained} == {1, 2, 3}


def test_the_demo_packs_answers_without_changing_their_loss(demo):
    model = tiny.build(tiny.config("llama")).eval()
    prompts = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6, 7]]
    replies = [[[8, 9, 10], [11]], [[12, 13]], [[14, 15, 16, 17]]]
    inputs, expected = demo.packed(prompts, replies)
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 4, 8, 9, 2, 5, 12, 2, 3, 6, 7, 14, 15, 16]]
    with torch.no_grad():
        logits = model(**inputs).logits[0, expected["at"]]
        alone = [
            model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
            for prompt, some in zip(prompts, replies, strict=True)
            for reply in some
        ]
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert expected["labels"].tolist() == [token for some in replies for reply in some for token in reply]


NOTEBOOK = ROOT / "example_configs" / "long-to-short.ipynb"


@pytest.mark.slow
def test_the_notebook(tmp_path, monkeypatch):
    """From top to bottom, install included, with tiny models in the place of the paper's pair."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    papers = yaml.safe_load((ROOT / "example_configs" / "l2s-1.5b-fim-kron.yml").read_text(encoding="utf-8"))
    for name in (papers["base_model"], papers["models"][0]["model"]):
        assert f' = "{name}"\n' in parameters.source
    base = tiny.build(tiny.config("qwen2", max_position_embeddings=256))
    for name, model in (("base", base), ("long", tiny.tuned(base, 1))):
        tiny.save(model, tmp_path / name)
        tiny.tokenizer(chat_template="{% for m in messages %}{{ m.content }} {% endfor %}").save_pretrained(
            tmp_path / name
        )
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"question": "What is 3 + 4?", "answer": 7}\n{"question": "What is 2 + 2?", "answer": 4}\n')
    chosen = {"BASE": str(tmp_path / "base"), "LONG": str(tmp_path / "long"), "PROBLEMS": str(problems)}
    chosen |= {"STRENGTHS": "0.3,0.6", "MORE": 1, "MAX_TOKENS": 4}
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in chosen.items())
    monkeypatch.setenv("PATH", sysconfig.get_path("scripts"), prepend=os.pathsep)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # what it installs is there
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "Error" not in printed
    assert "method: fim_kron" in (tmp_path / "config.yml").read_text(encoding="utf-8")
    assert reference.report(tmp_path / "merged")["method"] == "fim_kron"
    for run in ("base", "long", "fim_kron alpha_mean=0.3", "task_arithmetic weight=0.6"):
        assert run in printed
    assert "image/png" in outputs[-1].data


def test_the_notebook_is_kept_without_what_it_printed():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert {str(cell.get("outputs", [])) + str(cell.get("execution_count")) for cell in cells} == {"[]None"}
