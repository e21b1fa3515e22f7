"""The examples of the documentation run, and its numbers are those of the package."""

import contextlib
import dataclasses
import importlib.util
import re
import shutil
import sys

import pytest
import torch
from environments import ROOT, blocks

import mergekit_fim


def test_the_python_examples(pair, tmp_path, monkeypatch, capsys):
    shutil.copytree(pair.base, tmp_path / "base")
    shutil.copytree(pair.long, tmp_path / "long")
    monkeypatch.chdir(tmp_path)
    examples = blocks("python.md", "python")
    assert len(examples) == 7
    namespace: dict = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), namespace)
    assert (tmp_path / "merged" / "fim_report.json").exists()
    promised = re.search(r"print\(error\)  # (.*)", examples[-1])[1]
    assert capsys.readouterr().out.splitlines()[-1] == promised


def test_the_python_interface_is_what_the_docs_name():
    from mergekit_fim import api

    assert sorted(mergekit_fim._API) == sorted(api.__all__)
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for name in api.__all__:
        assert getattr(mergekit_fim, name) is getattr(api, name)
        assert name in dir(mergekit_fim)
        assert name in text
    with pytest.raises(AttributeError, match="nothing"):
        mergekit_fim.nothing()


@contextlib.contextmanager
def benchmark(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def scale():
    with benchmark("scale") as module:
        yield module


SCALE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_table_of_costs_is_what_the_script_prints(scale):
    assert scale.table() in SCALE
    assert scale.sweep_table() in SCALE


def test_the_sweep_on_paper_is_that_by_hand(scale):
    """From the models' shapes and the rates that docs/scale.md names, written out."""
    large = scale.SHAPES[0]
    size, cached = 15.23e9, 2 * 2 * 28 * 512  # bytes of the 7B model, and of a token's keys and values
    rows = (0.9 * 24e9 - size) // (3000 * cached)
    assert large.size == pytest.approx(size, rel=1e-3)
    assert rows == 37
    assert f"only {rows:.0f} answers of the 7B model fit at once" in SCALE
    step = (size + rows * 1500 * cached) / 900e9  # reading; the arithmetic takes 37 × 2 × 7.6e9 / 70e12 = 0.008 s
    merges, answers = scale.sweep(large, scale.SMALL_GPU)
    assert answers == pytest.approx(14 * 500 * 3000 / rows * step, rel=1e-3)
    its = scale.estimate(large, scale.SMALL_GPU)
    assert merges == pytest.approx(12 * (its.pre_pass + its.merge))
    # Where all problems fit at once, more memory gains nothing.
    few = scale.Sweep(merges=1, problems=10, tokens=100)
    roomy = dataclasses.replace(scale.LARGE_GPU, gpu=2 * scale.LARGE_GPU.gpu)
    assert scale.sweep(large, roomy, few)[1] == scale.sweep(large, scale.LARGE_GPU, few)[1]


def test_the_costs_on_paper_are_those_by_hand(scale):
    """From the models' shapes and the rates that docs/scale.md names, written out."""
    shapes = {shape.name: shape for shape in scale.SHAPES}
    one_gpu, eight_gpus = scale.MACHINES
    # 70B, which eight GPUs of 80 GB hold: 80 layers of 8192 × (2 × 8192 + 2 × 1024 + 3 × 28672), 2 × 128256 × 8192.
    layers, head = 68.451e9, 1.0507e9
    size = 2 * (layers + 2 * head)  # bytes
    assert shapes["70B"].size == pytest.approx(size, rel=1e-3)
    found = scale.estimate(shapes["70B"], eight_gpus)
    # disk, the buses of all eight, arithmetic of one after the other
    seconds = 2 * size / 5e9 + 2 * size / 40e9 / 8 + 1.4 * 512 * (6 * layers + 4 * head) / 350e12
    assert seconds == pytest.approx(58.2, rel=1e-3)
    assert found.pre_pass == pytest.approx(seconds, rel=1e-3)
    seconds = 3 * size / 5e9 + 8 * size / 1e9 / 64  # disk, cores
    assert seconds == pytest.approx(102.3, rel=1e-3)
    assert found.merge == pytest.approx(seconds, rel=1e-3)
    assert found.gpu_memory == pytest.approx(size / 8 + 1e9, rel=0.1)
    # 7B, of which the eight hold a part each, too: the disk and the buses take 73 times as long as the arithmetic.
    layers, head = 6.525e9, 0.545e9
    size = 2 * (layers + 2 * head)
    found = scale.estimate(shapes["7B"], eight_gpus)
    seconds = 2 * size / 5e9 + 2 * size / 40e9 / 8 + 1.4 * 512 * (6 * layers + 4 * head) / 350e12
    assert found.pre_pass == pytest.approx(seconds, rel=1e-3)
    assert size / 8 < found.gpu_memory < size / 8 + 1e9
    # 405B, which one GPU of 24 GB doesn't hold: the base is read twice, the fine-tuned model once, over the one bus.
    layers, head = 401.65e9, 2.1013e9
    size = 2 * (layers + 2 * head)
    found = scale.estimate(shapes["405B"], one_gpu)
    seconds = 3 * size / 3e9 + 3 * size / 20e9 + 1.4 * 512 * (6 * layers + 4 * head) / 70e12
    assert seconds == pytest.approx(958.2, rel=1e-3)
    assert found.pre_pass == pytest.approx(seconds, rel=1e-3)
    seconds = 3 * size / 3e9 + 8 * size / 1e9 / 16
    assert seconds == pytest.approx(1217.6, rel=1e-3)
    assert found.merge == pytest.approx(seconds, rel=1e-3)
    assert found.gpu_memory < 24e9
    assert "| 70B, 141 GB | eight 80 GB GPUs, 64 cores | 58 s | 2 min |" in SCALE
    assert "| 405B, 812 GB | one 24 GB GPU, 16 cores | 16 min | 20 min |" in SCALE


def test_the_cost_model_gives_what_was_measured(scale):
    """The one pair of 7B that was merged, on two cores; the rate of its arithmetic is taken from the pair of 1.5B."""

    def measured(row: str) -> list[float]:
        (cells,) = re.findall(rf"^\| {row} \|(.*)\|$", SCALE, re.M)
        return [float(cell) if cell.strip() else 0.0 for cell in cells.split("|")]

    arithmetic = measured("arithmetic of one forward.*rate")
    (large,) = (shape for shape in scale.SHAPES if shape.name == "7B")
    rate = scale.SMALL.operations / arithmetic[0]
    assert large.operations / rate == pytest.approx(arithmetic[2], rel=0.1)
    disk = float(re.search(r"waits for the disk \(([\d.]+) GB/s\)", SCALE)[1]) * 1e9
    assert (scale.AS_MEASURED.rate, scale.AS_MEASURED.disk) == (rate, disk)
    found = scale.estimate(large, scale.AS_MEASURED)
    pre_pass, whole = measured("pre-pass, with imports")[2], measured("whole `fim_ties`")[2]
    assert scale.MEASURED["7B"] == (pre_pass, whole - pre_pass)
    assert pre_pass / 1.3 < found.pre_pass < pre_pass * 1.3
    assert (whole - pre_pass) / 2 < found.merge < (whole - pre_pass) * 2  # it takes reading and writing for no overlap
    assert large.size == pytest.approx(15.2e9, rel=0.01)


def test_figures_on_an_accelerator_stand_beside_the_bars_of_the_page(monkeypatch):
    bars = re.findall(r"^\| (?:measurement|whole pre-pass).* \| ([\d.]+) (?:s|times) \|$", SCALE, re.M)
    assert bars == ["2", "1.5", "2"]
    with benchmark("cost") as cost:
        measured = {"run": 1.0, "measure": 7.0, "streamed": False}
        results = {"load": {"load": 5.0}, "fast": measured}
        results["streamed"] = {"run": 3.0, "measure": 11.0, "streamed": True}
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in cost.bars(results)[2:]]
        held = [row[1:] for row in rows if row[2]]
        assert held == [
            ["1.00 s", "2 s", "yes"],
            ["1.40", "1.5", "yes"],
            ["2.20", "2", "**no**"],
        ]
        assert len(rows) == 4
        assert cost.bars({"ties": {"whole": 3.0}}) == []
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
        with pytest.raises(SystemExit, match="--device cuda: torch sees no accelerator"):
            cost.sides("cuda")
        assert cost.sides("cpu") == cost.SIDES
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")
        )
        assert sorted(cost.sides("cuda")) == sorted([*cost.SIDES, *cost.ON_ACCELERATORS])
