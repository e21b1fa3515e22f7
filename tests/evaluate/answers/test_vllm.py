"""Answers by vLLM: those of transformers, weights swapped in place, and a sweep that is killed and goes on.

`make test-vllm` runs these in an environment of their own; where vLLM isn't installed they are skipped.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from mergekit.options import MergeOptions

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.answers.engine import Decoding, ModelFiles
from mergekit_fim.evaluate.answers.generation import complete
from mergekit_fim.evaluate.answers.loading import LanguageModel, load_model
from mergekit_fim.evaluate.answers.prompts import Prompt
from mergekit_fim.evaluate.answers.tokens import load_tokenizer
from mergekit_fim.evaluate.records import LENGTH, STOP, Completion

pytest.importorskip("vllm")

from mergekit_fim.evaluate.answers.by_vllm import Vllm, is_known, parse_arguments

TEXTS = ["3 + 4 = ", "what?", "a", "The quick brown fox jumps", "x" * 20, "12 apples and 7", "zz top", " ~", "[]{}"]
PROMPTS = [Prompt("p", i, 0, text, False) for i, text in enumerate(TEXTS)]
COUNT = 24
DECODING = Decoding(COUNT)
# vLLM's attention on a CPU has no heads of eight.
SIZES = {"hidden_size": 128, "num_hidden_layers": 3}
KINDS = {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": 32}}


def made(folder: Path, kind: str = "llama", seed: int = 0, **changes) -> ModelFiles:
    """A model that ends some of its answers, and others not."""
    base = tiny.build(tiny.config(kind, **SIZES, **KINDS.get(kind, {}), **changes))
    model = tiny.tuned(base, seed, scale=0.05) if seed else base
    tiny.save(model, folder)
    tiny.tokenizer().save_pretrained(folder)
    return ModelFiles(kind, str(folder), None, load_tokenizer(kind, str(folder), None, False))


def loaded(files: ModelFiles) -> LanguageModel:
    return load_model(files.name, files.path, files.tokenizer, MergeOptions(), torch.float32)


def clear(model: LanguageModel, found: dict[Prompt, Completion]) -> dict[Prompt, Completion]:
    """Those of a model's answers that don't hang on rounding."""
    kept = {}
    for prompt, completion in found.items():
        start = model.tokenizer.encode(prompt.text, add_special_tokens=False)
        ids = [*start, *model.tokenizer.encode(completion.text, add_special_tokens=False)]
        with torch.no_grad():
            best = model.model(torch.tensor([ids])).logits[0, len(start) - 1 :].topk(2).values
        if float((best[:, 0] - best[:, 1]).min()) > 1e-3:
            kept[prompt] = completion
    assert len(kept) >= len(found) / 2
    return kept


@pytest.fixture(scope="module")
def engine() -> Vllm:
    return Vllm(MergeOptions(), torch.float32, 4, {"max_model_len": 96})


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_transformers(kind, engine, tmp_path):
    files = made(tmp_path, kind)
    model = loaded(files)
    written = complete(model, PROMPTS, DECODING)
    # Some answers end at a token that the model really writes.
    stop = {token for _, its in written for token in model.tokenizer.encode(its.text, add_special_tokens=False)[5:6]}
    files.tokenizer.eos_token = files.tokenizer.convert_ids_to_tokens(min(stop))
    record = engine.open(files)
    assert record["stop"] == [min(stop)]
    model = dataclasses.replace(model, stop=(min(stop),))
    right = clear(model, dict(complete(model, PROMPTS, DECODING)))
    found = dict(engine.answers(list(right), DECODING))
    assert found == right
    assert {its.ended for its in found.values()} == {STOP, LENGTH}


def test_weights_are_swapped_in_place(engine, tmp_path):
    """One engine for models of one shape, another where the shape differs; each answers as itself."""
    models = [made(tmp_path / "a"), made(tmp_path / "b", seed=1), made(tmp_path / "tied", tie_word_embeddings=True)]
    engines, answers = [], []
    for files in (models[0], models[1], models[0], models[2]):
        engine.open(files)
        engines.append(id(engine._llm))
        model = loaded(files)
        right = clear(model, dict(complete(model, PROMPTS, DECODING)))
        found = dict(engine.answers(PROMPTS, DECODING))
        assert {prompt: found[prompt] for prompt in right} == right
        answers.append(found)
    assert engines[0] == engines[1] == engines[2] != engines[3]
    assert answers[0] == answers[2] != answers[1]


def test_draws_depend_on_the_answer_alone(engine, tmp_path):
    engine.open(made(tmp_path))
    prompts = [dataclasses.replace(prompt, sample=sample) for prompt in PROMPTS for sample in (0, 1)]
    drawn = dict(engine.answers(prompts, Decoding(COUNT, 1.0, seed=3)))
    assert dict(engine.answers(prompts[::-1], Decoding(COUNT, 1.0, seed=3))) == drawn
    assert dict(engine.answers(prompts[:3], Decoding(COUNT, 1.0, seed=3))) == dict(list(sorted_by(drawn, prompts))[:3])
    assert dict(engine.answers(prompts, Decoding(COUNT, 1.0, seed=4))) != drawn
    assert any(drawn[a] != drawn[b] for a, b in zip(prompts[::2], prompts[1::2], strict=True))


def sorted_by(found: dict[Prompt, Completion], prompts: list[Prompt]) -> list[tuple[Prompt, Completion]]:
    return [(prompt, found[prompt]) for prompt in prompts]


def test_answers_that_are_given_up_leave_nothing_behind(engine, tmp_path):
    engine.open(made(tmp_path))
    answers = engine.answers(PROMPTS, DECODING)
    first = next(answers)
    answers.close()
    found = dict(engine.answers(PROMPTS, DECODING))
    assert set(found) == set(PROMPTS)
    assert found[first[0]] == first[1]


def test_prompts_are_checked_before_any_is_answered(engine, tmp_path):
    engine.open(made(tmp_path))
    with pytest.raises(FimError, match=r"p, problem 9: the prompt has 96 tokens, .* llama takes 96"):
        engine.answers([*PROMPTS, Prompt("p", 9, 0, "x" * 96, False)], DECODING)


def test_a_model_that_vllm_doesn_t_know(engine, tmp_path):
    files = made(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["OwnForCausalLM"]}), encoding="utf-8")
    with pytest.raises(FimError, match=r"llama: expected a model that vLLM has a class of its own for, .*transformers"):
        engine.open(files)


def test_options_of_vllm_s():
    assert parse_arguments("tensor_parallel_size=4,max-model-len=16384,enforce_eager=true") == {
        "tensor_parallel_size": 4,
        "max_model_len": 16384,
        "enforce_eager": True,
    }
    for text, message in (("tensor_parallel=4", "options of vLLM's"), ("4", "NAME=VALUE"), ("seed=1", "leave it out")):
        with pytest.raises(FimError, match=message):
            parse_arguments(text)


def test_an_option_that_vllm_can_t_use(tmp_path):
    with pytest.raises(FimError, match=r"llama: expected a model that vLLM can load .*change --engine-args"):
        Vllm(MergeOptions(), torch.float32, None, {"max_model_len": 10_000}).open(made(tmp_path))


def test_killed_and_resumed(tmp_path):
    """What was answered stays, the rest follows, all of it by vLLM; a launcher's variables don't mislead it."""
    base = tiny.build(tiny.config("llama", **SIZES))
    for name, model in (("base", base), ("long", tiny.tuned(base, 1))):
        tiny.save(model, tmp_path / name)
        tiny.tokenizer(chat_template="{{ messages[0].content }}").save_pretrained(tmp_path / name)
    problems = [{"question": f"{i} + {j} = ", "answer": str(i + j)} for i in range(10) for j in range(10)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    config = {"merge_method": "fim_ta", "base_model": str(tmp_path / "base"), "dtype": "float32"}
    config |= {"models": [{"model": str(tmp_path / "long")}], "parameters": {"fisher_samples": 2, "fisher_seq_len": 8}}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "mergekit_fim", "sweep", "config.yml", "out", "--problems", "problems.jsonl"]
    command += ["--set", "alpha_mean=0.5", "--max-tokens", "64", "--batch", "2", "--n", "0", "--quiet"]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1"}
    first = tmp_path / "out" / "answers" / "base.jsonl"
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as process:
        while process.poll() is None and not (first.exists() and first.read_bytes().count(b"\n") >= 5):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    kept = first.read_bytes().splitlines()[:5]
    assert len(kept) == 5
    assert first.read_bytes().count(b"\n") < len(problems)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "sweep.json").read_text(encoding="utf-8"))
    assert {run["engine"]["name"] for run in record["runs"]} == {"vllm"}
    assert len(record["runs"]) == 3
    for run in record["runs"]:
        rows = (tmp_path / "out" / run["answers"]).read_bytes().splitlines()
        assert len(rows) == len(problems)
    assert set(kept) <= set(first.read_bytes().splitlines())


def test_known_models_are_vllm_s_own():
    assert is_known(tiny.config("llama", architectures=["LlamaForCausalLM"]))
    assert not is_known(tiny.config("llama", architectures=["OwnForCausalLM"]))
