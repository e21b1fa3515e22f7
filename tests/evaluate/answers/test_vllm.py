"""Answers by vLLM: those of transformers, weights swapped in place, sweeps that are killed and go on, and its server.

`make test-vllm` runs these in an environment of their own; where vLLM isn't installed they are skipped. Starting an
engine takes seconds, so most of them share one. What kills a process, or breaks an engine, runs in a fork.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.options import MergeOptions
from merges import ends_in_one_line

from mergekit_fim.cli import main
from mergekit_fim.errors import FimError
from mergekit_fim.evaluate import models as models_module
from mergekit_fim.evaluate import one_run
from mergekit_fim.evaluate import sweep as sweep_module
from mergekit_fim.evaluate.answers.by_vllm import Vllm, check_known, parse_arguments
from mergekit_fim.evaluate.answers.engine import Decoding, ModelFiles
from mergekit_fim.evaluate.answers.generation import complete
from mergekit_fim.evaluate.answers.loading import LanguageModel, load_model
from mergekit_fim.evaluate.answers.prompts import Prompt
from mergekit_fim.evaluate.answers.tokens import load_tokenizer
from mergekit_fim.evaluate.problems import grader, grading
from mergekit_fim.evaluate.records import LENGTH, STOP, Completion

os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # or a fork would wait for threads that it doesn't have
vllm = pytest.importorskip("vllm")

TEXTS = ["3 + 4 = ", "what?", "a", "The quick brown fox jumps", "x" * 20, "12 apples and 7", "zz top", " ~", "[]{}"]
PROMPTS = [Prompt("p", i, 0, text, False) for i, text in enumerate(TEXTS)]
COUNT = 24
DECODING = Decoding(COUNT)
MEMORY = 64 << 20  # bytes for what an engine remembers of its answers
# vLLM's attention on a CPU has no heads of eight.
SIZES = {"hidden_size": 128, "num_hidden_layers": 3}
KINDS = {"qwen2": {}, "qwen3": {"head_dim": 32}, "llama": {}}


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
    return Vllm(MergeOptions(), torch.float32, 4, {"max_model_len": 96, "kv_cache_memory_bytes": MEMORY})


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


def test_options_of_vllm_s():
    assert parse_arguments("tensor_parallel_size=4,max-model-len=16384,enforce_eager=true") == {
        "tensor_parallel_size": 4,
        "max_model_len": 16384,
        "enforce_eager": True,
    }
    for text, message in (
        ("tensor_parallel=4", "options of vLLM's"),
        ("4", "NAME=VALUE"),
        ("max_model_len=[", r"found 'max_model_len=\['"),
        ("seed=1", "leave it out"),
        ("trust_remote_code=true", "leave it out"),
    ):
        with pytest.raises(FimError, match=message):
            parse_arguments(text)


# Forks


def started(run: Callable[[], object]) -> int:
    """Run something in a fork of this process, which has an engine already, and return the fork's number."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            run()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def ended(pid: int) -> int:
    """How a fork ended: 0 where nothing was raised, and below that the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# Sweeps

PROBLEMS = 16
TOKENS = 8
RUNS = ["base", "long", "task_arithmetic weight=0.5"]


@dataclass(frozen=True)
class Sweep:
    """Sweeps of a tiny pair, by the command."""

    folder: Path

    def __call__(self, *options: str, out: str = "out", config: str = "config.yml") -> Result:
        arguments = ["sweep", str(self.folder / config), str(self.folder / out), "--max-tokens", str(TOKENS)]
        arguments += ["--problems", str(self.folder / "problems.jsonl"), "--n", "0", "--batch", "4", "--quiet"]
        varied = [] if "--set" in options else ["--set", "weight=0.5"]
        return CliRunner().invoke(main, [*arguments, *varied, *options])

    def ok(self, *options: str, out: str = "out", config: str = "config.yml") -> Result:
        result = self(*options, out=out, config=config)
        if result.exception is not None:
            raise result.exception
        return result

    def record(self, out: str = "out") -> dict[str, Any]:
        return json.loads((self.folder / out / "sweep.json").read_text(encoding="utf-8"))

    def rows(self, out: str = "out") -> dict[str, list[dict]]:
        """Every run's answers that are whole, without what isn't the same twice."""
        found = {}
        for path in sorted((self.folder / out / "answers").iterdir()):
            rows = [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            found[path.stem] = [{name: row[name] for name in row if name != "seconds"} for row in rows]
        return found


def written(folder: Path, method: str, **changes: Any) -> Sweep:
    """A pair and its config; `changes` are of the base's config, and the long model's head is its own."""
    base = tiny.build(tiny.config("llama", **SIZES, **changes))
    cfg = tiny.config("llama", **SIZES)
    for name, model in (("base", base), ("long", tiny.tuned(base, 1, cfg=cfg, scale=0.05))):
        tiny.save(model, folder / name)
        tiny.tokenizer(chat_template="{{ messages[0].content }}").save_pretrained(folder / name)
    problems = [{"question": f"{i} + {i * 7 % 10} = ", "answer": str(i + i * 7 % 10)} for i in range(PROBLEMS)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    config = {"merge_method": method, "base_model": str(folder / "base"), "dtype": "float32"}
    config |= {"models": [{"model": str(folder / "long")}]}
    if method == "fim_ta":
        config["parameters"] = {"fisher_samples": 2, "fisher_seq_len": 8}
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    return Sweep(folder)


@pytest.fixture
def sweep(tmp_path, engine, monkeypatch) -> Sweep:
    """Sweeps by the engine that is there, graded here: a fork would start a process for that, which takes seconds."""
    monkeypatch.setattr(sweep_module, "Vllm", lambda *_: engine)
    monkeypatch.setattr(grader, "why_ungradable", grading.why_ungradable)
    monkeypatch.setattr(grader, "grade", lambda _, expected, answer: grading.grade_math(expected, answer))
    return written(tmp_path, "task_arithmetic")


def test_killed_at_twenty_moments(sweep, monkeypatch):
    """The same command goes on: after a step of the engine, within an answer's line, and between two of them."""
    sweep.ok(out="whole")
    appended, step = one_run.append_answer, vllm.LLMEngine.step
    left = 0

    def passed() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def append_answer(file: Any, answer: Any) -> None:
        if passed():
            file.write(b'{"sou')
            file.flush()
            die()
        appended(file, answer)
        if passed():
            die()

    def dying_step(self: Any) -> Any:
        outputs = step(self)
        if passed():
            die()
        return outputs

    monkeypatch.setattr(one_run, "append_answer", append_answer)
    monkeypatch.setattr(vllm.LLMEngine, "step", dying_step)
    kept: dict[str, list[dict]] = {}
    at = set()
    for moment in range(20):
        left = 2 + 5 * moment % 17
        assert ended(started(sweep.ok)) == -signal.SIGKILL, moment
        now = sweep.rows()
        assert all(row in now[run] for run, rows in kept.items() for row in rows)
        kept = now
        at.add((len(kept), sum(map(len, kept.values()))))
    assert len(at) >= 6  # or the moments were the same ones
    left = 0
    sweep.ok()
    assert sweep.rows() == sweep.rows("whole")
    assert {run["engine"]["name"] for run in sweep.record()["runs"]} == {"vllm"}
    assert [run["run"] for run in sweep.record()["runs"]] == RUNS


def test_two_commands_on_one_folder(sweep):
    sweep.ok(out="whole")
    assert [ended(pid) for pid in (started(sweep.ok), started(sweep.ok))] == [0, 0]
    assert sweep.rows() == sweep.rows("whole")


def test_an_engine_that_dies_in_the_middle(sweep, monkeypatch):
    sweep.ok(out="whole")
    step, steps = vllm.LLMEngine.step, 0

    def dying(self: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 10:
            raise vllm.v1.engine.exceptions.EngineDeadError
        return step(self)

    def dies() -> None:
        monkeypatch.setattr(vllm.LLMEngine, "step", dying)
        ends_in_one_line(sweep(), "base: expected answers by vLLM", "EngineCore", "the same command goes on")

    assert ended(started(dies)) == 0
    assert 0 < len(sweep.rows()["base"]) < PROBLEMS
    sweep.ok()
    assert sweep.rows() == sweep.rows("whole")


def test_a_merge_that_isn_t_finite(sweep):
    def ends() -> None:
        result = sweep("--set", "weight=1e39")
        ends_in_one_line(result, "task_arithmetic weight=1e+39: expected answers by vLLM", "NaN", "check the model's")

    assert ended(started(ends)) == 0
    found = sweep.rows()
    assert [len(found[run]) for run in ("base", "long")] == [PROBLEMS] * 2
    assert sum(map(len, found.values())) == 2 * PROBLEMS


def test_a_model_that_vllm_doesn_t_know(sweep, monkeypatch, caplog):
    known = vllm.ModelRegistry.get_supported_archs()
    check_known("llama", tiny.config("llama", architectures=["LlamaForCausalLM"]))
    monkeypatch.setattr(vllm.ModelRegistry, "get_supported_archs", lambda: set(known) - {"LlamaForCausalLM"})
    words = "base: expected a model that vLLM has a class of its own for, found ['LlamaForCausalLM']"
    ends_in_one_line(sweep("--engine", "vllm"), words, "--engine transformers")
    sweep.ok()
    assert f"transformers answers, though vLLM is installed: {words}" in caplog.text
    assert {run["engine"]["name"] for run in sweep.record()["runs"]} == {"transformers"}


@pytest.mark.parametrize("options", [(), ("--engine-args", "distributed_executor_backend=uni")])
def test_merges_are_swapped_in_from_memory(options, sweep, monkeypatch):
    """Unless an option may bring in other machines, which don't see this one's memory."""
    seen, merge_whole = [], models_module.merge_whole

    def watched(config: Any, text: Any, out_path: str, options: Any) -> None:
        seen.append(out_path)
        merge_whole(config, text, out_path, options)

    monkeypatch.setattr(models_module, "merge_whole", watched)
    monkeypatch.setattr("mergekit_fim.files.available_memory", lambda: 1 << 40)
    sweep.ok("--set", "weight=0.3,0.6", *options)
    assert len(seen) == 2
    for path in seen:
        assert path.startswith("/dev/shm/" if not options else str(sweep.folder / "out" / "models"))
        assert not os.path.exists(path)


# vLLM's own server


@contextlib.contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--generation-config", "vllm", "--enforce-eager"]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command += ["--kv-cache-memory-bytes", str(MEMORY)]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            deadline = time.monotonic() + 400
            while time.monotonic() < deadline and process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.2)
            else:
                pytest.fail(f"vLLM's server didn't start: {log.read_text()[-2000:]}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def read(rows: list[dict]) -> dict[Prompt, Completion]:
    """Rows of a sweep as prompts and what was written."""
    return {
        Prompt("p", row["index"], 0, row["prompt"], False): Completion(row["text"], row["tokens"], row["ended"])
        for row in rows
    }


def test_vllm_s_server(sweep, tmp_path):
    """Its answers are those of the engine, without special tokens, which it leaves out."""
    sweep.ok(out="whole")
    with served(tmp_path / "base", tmp_path / "log") as url:
        sweep.ok("--server", f"base={url}")
    assert sweep.record()["runs"][0]["of"]["server"] == f"{url}/v1"
    path = str(tmp_path / "base")
    model = loaded(ModelFiles("base", path, None, load_tokenizer("base", path, None, False)))
    own = read(sweep.rows("whole")["base"])
    places = {prompt.index: prompt for prompt in own}
    found = {places[row["index"]]: (row["text"], row["tokens"], row["ended"]) for row in sweep.rows()["base"]}
    assert len(found) == PROBLEMS
    for prompt, its in clear(model, own).items():
        text = its.text.replace("<think>", "").replace("<end>", "")
        assert found[prompt] == (text, its.tokens, its.ended)


# What changes the engine's shape comes last: each change takes a start.


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


def test_a_tied_base_beside_an_untied_long_model(engine, tmp_path, monkeypatch):
    """As of the paper's pair of 1.5B: a sweep takes two engines, and its answers are those of transformers."""
    opened = []
    start = Vllm._started
    monkeypatch.setattr(Vllm, "_started", lambda self, path: opened.append(path) or start(self, path))
    monkeypatch.setattr(sweep_module, "Vllm", lambda *_: engine)
    sweep = written(tmp_path, "fim_ta", tie_word_embeddings=True)
    options = ("--set", "alpha_mean=0.3,0.6", "--keep", "all")
    sweep.ok(*options)
    assert len(opened) <= 2
    sweep.ok(*options, "--engine", "transformers", out="by-transformers")
    found, right = sweep.rows(), sweep.rows("by-transformers")
    assert len(found) == len(right) == 4
    for run, rows in found.items():
        path = tmp_path / run if run in ("base", "long") else tmp_path / "out" / "models" / run
        model = loaded(ModelFiles(run, str(path), None, load_tokenizer(run, str(path), None, False)))
        expected = read(right[run])
        assert {prompt: read(rows)[prompt] for prompt in clear(model, expected)} == clear(model, expected)
    config = json.loads((tmp_path / "out" / "models" / "fim_ta_alpha_mean=0.3" / "config.json").read_text())
    assert not config["tie_word_embeddings"]


def test_by_the_command_alone(tmp_path):
    """A process of its own, which loads its own engine; a launcher's variables don't mislead it."""
    sweep = written(tmp_path, "fim_ta")
    command = [sys.executable, "-m", "mergekit_fim", "sweep", "config.yml", "out", "--problems", "problems.jsonl"]
    command += ["--set", "alpha_mean=0.5", "--max-tokens", "8", "--n", "0", "--quiet"]
    command += ["--engine-args", f"max_model_len=96,kv_cache_memory_bytes={MEMORY}"]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = sweep.record()["runs"]
    assert [run["engine"]["options"] for run in runs] == [{"max_model_len": 96, "kv_cache_memory_bytes": MEMORY}] * 3
    assert [len(rows) for rows in sweep.rows().values()] == [PROBLEMS] * 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_model_len": 10_000}, "max_model_len"),
        ({"max_model_len": "many"}, "max_model_len"),
        ({"kv_cache_memory_bytes": 1 << 50}, "memory"),
        ({"kv_cache_memory_bytes": 1}, "memory"),
        ({"load_format": "none of these"}, "none of these"),
    ],
    ids=str,
)
def test_options_that_vllm_can_t_use(arguments, words, tmp_path):
    """Among them more memory than there is, and too little for one answer. They end what engine there is."""
    own = {"kv_cache_memory_bytes": MEMORY} | arguments
    with pytest.raises(FimError, match=f"llama: expected a model that vLLM can load .*{words}.*--engine-args"):
        Vllm(MergeOptions(), torch.float32, None, own).open(made(tmp_path))
