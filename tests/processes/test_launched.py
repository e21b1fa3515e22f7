"""Merges that a launcher starts several times over."""

import os
from pathlib import Path

import pytest
import reference
import tiny
import yaml
from environments import MERGEKIT_YAML
from launching import FAILING, MAIN, launch, together
from merges import config_for
from warm import Outcome

pytestmark = pytest.mark.slow

WEIGHTS = "model.safetensors"


def written(config: dict, folder: Path) -> str:
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def errors(outcome: Outcome) -> str:
    """What is on standard error, but for what mergekit has transformers complain of, twice where CI is set."""
    lines = outcome.stderr.splitlines(keepends=True)
    return "".join(line for line in lines if "`torch_dtype` is deprecated!" not in line)


def uncached(pair, method="fim_ties", **parameters):
    return config_for(pair, method, parameters={"fisher_cache": False, **parameters})


@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
@pytest.mark.parametrize(("processes", "command"), [(2, "mergekit-fim"), (3, "mergekit-yaml")])
def test_the_same_merge_as_one_process_makes(processes, command, method, pair, warm, tmp_path):
    config = written(uncached(pair, method, fisher_samples=5), tmp_path)
    arguments = [] if command == "mergekit-yaml" else ["merge"]
    options = ["--no-copy-tokenizer", "--quiet"]
    one = warm.run(command, *arguments, config, str(tmp_path / "one"), *options)
    assert one.status == 0, one.stderr
    done = together(warm, processes, *arguments, config, str(tmp_path / "many"), *options, command=command)
    assert [(its.status, errors(its)) for its in done] == [(0, "")] * processes
    assert [bool(its.stdout) for its in done] == [bool(one.stdout)] + [False] * (processes - 1)
    assert (tmp_path / "many" / WEIGHTS).read_bytes() == (tmp_path / "one" / WEIGHTS).read_bytes()
    found, expected = (reference.report(tmp_path / name) for name in ("many", "one"))
    alphas = [[layer["alpha"] for layer in its["models"][0]["layers"]] for its in (found, expected)]
    assert alphas[0] == pytest.approx(alphas[1], abs=1e-6)
    assert sorted(os.listdir(tmp_path)) == ["config.yml", "many", "one"]


def test_the_same_merge_by_directions(pair, warm, tmp_path):
    """The main process records the factors, and the others wait for its end."""
    config = written(uncached(pair, "fim_kron"), tmp_path)
    one = warm.run("mergekit-fim", "merge", config, str(tmp_path / "one"), "--no-copy-tokenizer", "--quiet")
    assert one.status == 0, one.stderr
    done = together(warm, 2, "merge", config, str(tmp_path / "many"), "--no-copy-tokenizer", "--quiet")
    assert [(its.status, errors(its)) for its in done] == [(0, "")] * 2
    for name in (WEIGHTS, "fim_report.json"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


SHARED = """
import mergekit_fim.fisher.batched as batched
import mergekit_fim.prepass.task_vectors as task_vectors
original, step = batched._Run.measure, task_vectors.TaskVectorSweep.__call__
def measure(self, samples, *args):
    print(len(samples.input_ids), "sequences")
    return original(self, samples, *args)
def call(self, tensor, values):
    is_new = tensor.name not in self._found
    step(self, tensor, values)
    if is_new and tensor.name.endswith("q_proj.weight"):
        print("a layer's task vectors")
batched._Run.measure, task_vectors.TaskVectorSweep.__call__ = measure, call
"""


def test_the_sequences_are_shared_and_the_main_process_alone_prints(pair, warm, tmp_path):
    config = written(uncached(pair, fisher_samples=5), tmp_path)
    arguments = ["merge", config, str(tmp_path / "out"), "--no-copy-tokenizer"]
    main, other = together(warm, 2, *arguments, code=SHARED)
    assert (main.status, other.status) == (0, 0), (main, other)
    assert "Measuring" in main.stderr
    assert "Executing graph" in main.stderr
    assert "‖δ‖" in main.stdout
    assert "3 sequences" in main.stdout
    assert main.stdout.count("task vectors\n") == 5
    assert (other.stdout, other.stderr) == ("2 sequences\n", "")


def test_a_stock_method_is_merged_by_the_main_process(pair, warm, tmp_path):
    config = config_for(pair, "task_arithmetic", models=[{"model": str(pair.long), "parameters": {"weight": 0.4}}])
    path = written(config, tmp_path)
    done = together(warm, 3, "merge", path, str(tmp_path / "out"), "--no-copy-tokenizer", "--quiet")
    assert [(its.status, its.stdout, errors(its)) for its in done] == [(0, "", "")] * 3
    theta0, theta1 = reference.load(pair.base), reference.load(pair.long)
    for name, value in reference.load(tmp_path / "out").items():
        assert value == pytest.approx(theta0[name] + 0.4 * (theta1[name] - theta0[name]), abs=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft with transformers 5
def test_an_adapter_is_merged_by_one_of_the_processes(pair, warm, tmp_path):
    adapter = tiny.adapter(pair.base, tmp_path / "adapter")
    config = uncached(pair) | {"models": [{"model": f"{pair.base}+{adapter}"}]}
    path, options = written(config, tmp_path), ["--no-copy-tokenizer", "--quiet"]
    for name, processes in (("one", 1), ("many", 3)):
        own = [path, str(tmp_path / name), "--lora-merge-cache", str(tmp_path / f"cache-{name}"), *options]
        done = together(warm, processes, "merge", *own)
        assert [its.status for its in done] == [0] * processes, done
    assert (tmp_path / "many" / WEIGHTS).read_bytes() == (tmp_path / "one" / WEIGHTS).read_bytes()


def test_an_error_is_said_once(pair, warm, tmp_path):
    arguments = [str(tmp_path / "out"), "--no-copy-tokenizer", "--quiet"]
    path = written(uncached(pair, sharpnes=2), tmp_path)
    done = together(warm, 2, "merge", path, *arguments)
    assert [its.status for its in done] == [1, 1]
    assert [errors(its).count("\n") for its in done] == [1, 0]
    assert "did you mean `sharpness`?" in done[0].stderr
    path = written(uncached(pair), tmp_path)
    code = FAILING.format(action="raise OSError('no such luck')")
    for command, more in (("mergekit-fim", ["merge"]), ("mergekit-yaml", [])):
        done = together(warm, 2, *more, path, *arguments, command=command, code=code)
        assert [its.status for its in done] == [1, 1]
        assert [errors(its) for its in done] == ["Error: process 1 of 2: no such luck\n", ""]
    assert os.listdir(tmp_path) == ["config.yml"]


def test_a_merge_that_fails_after_the_pre_pass_ends_all(pair, warm, tmp_path):
    code = """
import os, mergekit.graph
if os.environ["RANK"] == "0":
    def run(self, **_options):
        raise RuntimeError("the disk is on strike")
    mergekit.graph.Executor.run = run
"""
    path = written(uncached(pair), tmp_path)
    done = together(warm, 2, "merge", path, str(tmp_path / "out"), "--no-copy-tokenizer", "--quiet", code=code)
    assert [its.status for its in done] == [1, 1]
    assert "the disk is on strike" in done[0].stderr
    assert done[1].stderr == ""
    assert os.listdir(tmp_path) == ["config.yml"]


def test_one_process_ending_ends_all(pair, loaded, tmp_path):
    """By torchrun, with the stock command and with ours: in the pre-pass, and while the main process merges."""
    path = written(uncached(pair), tmp_path)
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(action="os._exit(9)") + MAIN)
    options = ["--no-copy-tokenizer", "--quiet"]
    done = launch(loaded, 2, str(script), "merge", path, str(tmp_path / "out"), *options)
    assert done.returncode != 0
    script.write_text(DIES_WHILE_MERGING + MAIN)
    done = launch(loaded, 2, str(script), "merge", path, str(tmp_path / "out"), *options)
    assert done.returncode != 0
    assert sorted(os.listdir(tmp_path)) == ["config.yml", "failing.py"]


DIES_WHILE_MERGING = """
import os, time
import mergekit.graph
import mergekit_fim.prepass.layers as prepass
original = prepass.take_part
if os.environ["RANK"] == "0":
    def run(self, **_options):
        time.sleep(60)
    mergekit.graph.Executor.run = run
else:
    def take_part(*arguments):
        original(*arguments)
        os._exit(9)
    prepass.take_part = take_part
"""


def test_the_stock_command_by_torchrun(pair, loaded, tmp_path):
    path = written(uncached(pair), tmp_path)
    done = launch(loaded, 2, MERGEKIT_YAML, path, str(tmp_path / "out"), "--no-copy-tokenizer")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Fisher information of") == 1
    assert done.stderr.count("Executing graph") >= 1
    assert (tmp_path / "out" / WEIGHTS).exists()


def test_every_process_has_an_accelerator_of_its_own(monkeypatch):
    """`--multi-gpu` is for the merge by the main process: in the pre-pass the others' accelerators are theirs."""
    from types import SimpleNamespace

    import torch
    from mergekit.options import MergeOptions

    from mergekit_fim.processes import launched

    options = MergeOptions(multi_gpu=True)
    for device, expected in (("cuda:1", ("cuda:1", False, True)), ("cpu", ("cpu", True, True))):
        state = SimpleNamespace(device=torch.device(device), is_main_process=False)
        monkeypatch.setattr(launched, "sharing", lambda state=state: state)
        own = launched.options_of_process(options)
        assert (own.device, own.multi_gpu, own.quiet) == expected
    monkeypatch.setattr(launched, "sharing", lambda: None)
    assert launched.options_of_process(options) is options


def test_apart_every_process_has_its_accelerator_and_the_first_logs(monkeypatch, caplog):
    import logging

    import torch
    from mergekit.options import MergeOptions

    from mergekit_fim.processes import launched

    options = MergeOptions(multi_gpu=True)
    with launched.apart(options) as own:
        assert own == options
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, local in (("0", "0"), ("3", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        with launched.apart(options) as own:
            assert (own.device, own.multi_gpu, own.quiet) == (f"cuda:{local}", False, rank != "0")
            assert launched.sharing() is None
            logging.getLogger("mergekit_fim").warning("by %s", rank)
    assert [record.getMessage() for record in caplog.records] == ["by 0"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with launched.apart(options) as own:
        assert (own.device, own.multi_gpu) == (options.device, True)
