"""`python -m mergekit_fim fisher`, alone and by several processes."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner
from launching import FAILING, MAIN, launch, together
from merges import ends_in_one_line

from mergekit_fim.cli import main
from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.fisher.engine import autograd_engine
from mergekit_fim.fisher.measure import measure_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save(tiny.build(tiny.config("llama")), tmp_path_factory.mktemp("command") / "model")


def norms(path: Path) -> list[float]:
    return [norm for layer in json.loads(path.read_text())["layers"] for norm in layer["squared_norms"]]


def test_one_process(model, tmp_path):
    out = tmp_path / "fisher.json"
    options = ["--samples", "3", "--seq-len", "12", "--seed", "4", "--labels", "sampled", "--dtype", "float32"]
    result = CliRunner().invoke(main, ["fisher", str(model), "-o", str(out), *options])
    assert result.exit_code == 0, result.output
    assert f"{out}: 5 decoder layers of {model}, in float32" in result.output
    found = json.loads(out.read_text())
    assert (found["format"], found["version"]) == ("mergekit-fim/fisher", 1)
    assert re.fullmatch(r"[0-9a-f]{32}-[0-9a-f]{16}", found["model"].pop("fingerprint"))
    assert found["model"] == {
        "id": str(model),
        "revision": None,
        "architecture": "LlamaForCausalLM",
        "num_layers": 5,
        "vocab_size": tiny.VOCAB,
    }
    assert found["settings"] == {"samples": 3, "seq_len": 12, "seed": 4, "labels": "sampled", "dtype": "float32"}
    built = tiny.build(tiny.config("llama"))
    settings = FisherSettings(3, 12, 4, "sampled")
    expected = measure_model(built, list(built.model.layers), settings, engine=autograd_engine, quiet=True)
    assert norms(out) == pytest.approx([n for layer in expected.layers for n in layer.squared_norms], rel=1e-4)
    assert [layer["fisher"] for layer in found["layers"]] == pytest.approx(
        [x.fisher for x in expected.layers], rel=1e-5
    )
    assert os.listdir(tmp_path) == ["fisher.json"]


@pytest.mark.parametrize(("processes", "samples"), [(2, 5), (3, 2)])
def test_several_processes_measure_the_same(processes, samples, model, warm, loaded, tmp_path):
    """By torchrun, and where there are more processes than sequences."""
    options = ["fisher", str(model), "--samples", str(samples)]
    result = CliRunner().invoke(main, [*options, "-q", "--no-cache", "-o", str(tmp_path / "one.json")])
    assert result.exit_code == 0, result.output
    many = [*options, "-q", "-o", str(tmp_path / "many.json")]
    if processes == 2:
        done = launch(loaded, processes, "-m", "mergekit_fim", *many)
        assert done.returncode == 0, done.stderr
    else:
        assert [(one.status, one.stderr) for one in together(warm, processes, *many)] == [(0, "")] * processes
    assert norms(tmp_path / "many.json") == pytest.approx(norms(tmp_path / "one.json"), rel=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["many.json", "one.json"]
    # The main process has kept it for one that comes after.
    result = CliRunner().invoke(main, [*options, "-o", str(tmp_path / "kept.json")])
    assert "kept from an earlier measurement" in result.output
    assert (tmp_path / "kept.json").read_bytes() == (tmp_path / "many.json").read_bytes()


UNSUPPORTED = """
import mergekit_fim.fisher.batched as batched
import mergekit_fim.fisher.engine as engines
def measure(self, *args):
    raise engines.NotSupportedError
batched._Run.measure = measure
original = engines.sequence_loss
def counted(*args):
    print("sequence")
    return original(*args)
engines.sequence_loss = counted
"""


def test_the_reference_engine_is_shared_too(model, warm, tmp_path):
    options = ["fisher", str(model), "-q", "--samples", "5", "--seq-len", "8"]
    result = CliRunner().invoke(main, [*options, "--no-cache", "-o", str(tmp_path / "one.json")])
    assert result.exit_code == 0, result.output
    done = together(warm, 2, *options, "-o", str(tmp_path / "many.json"), code=UNSUPPORTED)
    assert [one.status for one in done] == [0, 0], done
    assert sorted(one.stdout.count("sequence") for one in done) == [2, 3]
    assert norms(tmp_path / "many.json") == pytest.approx(norms(tmp_path / "one.json"), rel=1e-4)


def test_an_error_of_all_processes_is_said_once(warm, tmp_path):
    built = tiny.build(tiny.config("llama"))
    built.model.layers[2].mlp.up_proj.weight.data[0, 0] = math.nan
    broken = tiny.save(built, tmp_path / "broken")
    done = together(warm, 2, "fisher", str(broken), "-q", "-o", str(tmp_path / "f.json"))
    assert [one.status for one in done] == [1, 1]
    (line,) = (line for one in done for line in one.stderr.splitlines())
    assert line.startswith(f"Error: {broken}: the Fisher information of decoder layer")
    assert not (tmp_path / "f.json").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft with transformers 5
def test_an_adapter_is_merged_by_one_of_the_processes(warm, tmp_path):
    base = tiny.save(tiny.build(tiny.config("llama")), tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter")
    options = ["fisher", f"{base}+{adapter}", "-q", "--samples", "2", "--seq-len", "8", "--no-cache"]
    for name, run in {
        "many": lambda arguments: max(one.status for one in together(warm, 3, *arguments)),
        "one": lambda arguments: CliRunner().invoke(main, arguments).exit_code,
    }.items():
        places = ["--lora-merge-cache", str(tmp_path / f"cache-{name}"), "-o", str(tmp_path / f"{name}.json")]
        assert run([*options, *places]) == 0
    assert norms(tmp_path / "many.json") == pytest.approx(norms(tmp_path / "one.json"), rel=1e-5)


def test_one_process_failing_ends_all(model, warm, tmp_path):
    code = FAILING.format(action="raise OSError('no such luck')")
    done = together(warm, 2, "fisher", str(model), "-o", str(tmp_path / "fisher.json"), "-q", code=code)
    assert [one.status for one in done] == [1, 1]
    assert [one.stderr for one in done] == ["Error: process 1 of 2: no such luck\n", ""]
    assert os.listdir(tmp_path) == []


def test_one_process_ending_ends_all(model, loaded, tmp_path):
    """By the launcher, which ends the others."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(action="os._exit(9)") + MAIN)
    out = tmp_path / "out" / "fisher.json"
    out.parent.mkdir()
    done = launch(loaded, 2, str(script), "fisher", str(model), "-o", str(out), "-q")
    assert done.returncode != 0
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{m}", "-o", "{t}/missing/f.json"], ["missing", "doesn't exist"]),
        (["{m}", "-o", "{t}"], ["found a folder"]),
        (["{t}/nothing", "-o", "{t}/f.json"], ["nothing", "folder of a model"]),
        (["{m}", "-o", "{t}/f.json", "--seq-len", "1000"], ["128 positions"]),
        (["{m}", "-o", "{t}/f.json", "--device", "warp"], ["--device", "warp"]),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, words, model, tmp_path):
    arguments = [argument.format(m=model, t=tmp_path) for argument in arguments]
    result = CliRunner().invoke(main, ["fisher", *arguments])
    assert result.stderr == ends_in_one_line(result, *words) + "\n"
    assert os.listdir(tmp_path) == []
