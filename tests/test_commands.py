"""The other commands: plan, export, merge, plot, compare; help and completion."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import reference
import tiny
import torch
import yaml
from click.testing import CliRunner
from loaded import Loaded
from measured import measurement
from mergekit.scripts.run_yaml import main as mergekit_yaml
from merges import config_for, ends_in_one_line, run

import mergekit_fim
from mergekit_fim.cli import main
from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.errors import FimError
from mergekit_fim.measurements.compare import compare_fisher
from mergekit_fim.measurements.file import write_measurement
from mergekit_fim.measurements.record import FisherMeasurement, LayerFisher
from mergekit_fim.tools.export import summary

COMMANDS = ["compare", "delta", "export", "fisher", "front", "merge", "plan", "plot"]


# plan


def test_plan_prints_what_the_merge_prints_and_merges_nothing(pair, merge, config, tmp_path, monkeypatch):
    before = set(os.listdir(tmp_path))
    path = config(config_for(pair))
    result = run("plan", path, "--json", tmp_path / "plan.json", "--plot", tmp_path / "plan.svg", "--quiet")
    assert set(os.listdir(tmp_path)) - before == {"config.yml", "plan.json", "plan.svg"}
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")
    out, merged = merge.ok(config_for(pair, parameters={"fisher_cache": False}))
    assert (out / "fim_report.json").read_text() == (tmp_path / "plan.json").read_text()
    table = [line for line in merged.output.splitlines() if re.match(r" {6,}\d+ | outside ", line)]
    assert len(table) == 6
    assert all(line in result.output for line in table)


def test_plan_says_what_the_config_does_not_show(merge, config, tmp_path, monkeypatch):
    # It is timed, so that on a busy machine the second plan may choose otherwise, and measure anew.
    monkeypatch.setattr("mergekit_fim.fisher.loading.running_dtype", lambda dtype, device: torch.float32)
    base = tiny.build(tiny.config("qwen2", tie_word_embeddings=True))
    long = tiny.tuned(base, 1, cfg=tiny.config("qwen2", tie_word_embeddings=False))
    paths = [tiny.save(base, tmp_path / "base", torch.bfloat16), tiny.save(long, tmp_path / "long", torch.bfloat16)]
    content = {
        "merge_method": "fim_ties",
        "base_model": str(paths[0]),
        "models": [{"model": str(paths[1]), "parameters": {"density": [0.3, 0.5]}}],
    }
    text = " ".join(run("plan", config(content), "--quiet").stdout.split())
    assert f"of each tensor of {paths[1]}'s task vector, the fraction 0.3 to 0.5 is kept" in text
    assert "config key tie_word_embeddings differs" in text
    assert "output head of" not in text  # that says it
    sizes = [sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in paths]
    reads = re.search(r"reads ([\d.]+) MB in the pre-pass and ([\d.]+) MB in the merge .* writes ([\d.]+) MB", text)
    in_pre_pass, in_merge, written = (float(number) * 1e6 for number in reads.groups())
    assert in_merge == pytest.approx(sum(sizes), rel=0.2)  # the files have headers
    assert sum(sizes) < in_pre_pass < sum(sizes) + sizes[0]
    assert written == pytest.approx(sizes[1], rel=0.2)
    again = " ".join(run("plan", config(content), "--quiet").stdout.split())
    kept = re.search(r"reads ([\d.]+) MB in the pre-pass", again)
    assert float(kept[1]) * 1e6 == pytest.approx(in_merge, rel=0.02)


@pytest.mark.parametrize(("tied", "says"), [(True, "tied to its embeddings"), (False, "of its own")])
def test_plan_says_whose_the_output_head_is(tied, says, merge, config, tmp_path):
    base = tiny.build(tiny.config("qwen2", tie_word_embeddings=tied))
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(tiny.tuned(base, 1), tmp_path / "long")]
    content = {"merge_method": "fim_ta", "base_model": str(paths[0]), "models": [{"model": str(paths[1])}]}
    text = " ".join(run("plan", config(content), "--quiet").stdout.split())
    assert f"output head of the merged model: {says}" in text
    assert "is kept" not in text  # fim_ta keeps everything


def test_plan_says_what_an_accelerator_holds(pair, monkeypatch):
    from mergekit.options import MergeOptions

    from mergekit_fim.fisher import loading
    from mergekit_fim.tools.explain import explain

    plan = mergekit_fim.resolve(config_for(pair))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.setattr(loading, "_free", lambda devices: [80 << 30, 1 << 30, 80 << 30][: len(devices)])
    on_cpu, on_gpu = (" ".join(explain(plan, MergeOptions(device=device)).split()) for device in ("cpu", "cuda"))
    assert "accelerator" not in on_cpu
    assert "accelerator 0 holds the base whole and measures all sequences" in on_gpu
    on_several = " ".join(explain(plan, MergeOptions(multi_gpu=True)).split())
    assert "accelerators 0, 2 hold the base together, by a device map" in on_several
    kept = mergekit_fim.resolve(config_for(pair))  # measured before
    assert "device map" not in explain(kept, MergeOptions(multi_gpu=True))
    assert f"accelerator: the base's {(pair.base / 'model.safetensors').stat().st_size / 1e6:.1f}"[:-1] in on_gpu


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_tables_fit_the_terminal(columns, pair, config, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    models = [{"model": str(pair.long)}, {"model": str(pair.third)}]
    output = run("plan", config(config_for(pair, models=models)), "--quiet").stdout
    limit = min(100, max(80, columns))
    for line in output.splitlines():
        words = [word for word in line.split() if len(word) < limit]  # paths stay whole
        assert len(" ".join(words)) <= limit or len(line) <= limit, line
    per_block = 2 if limit == 100 else 1
    assert len([line for line in output.splitlines() if line.split()[:1] == ["0"]]) == 2 // per_block


@pytest.mark.parametrize("command", [["plan"], ["export", "-o", "{t}/plain.yml"]])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"merge_method": "ties"}, ["expected fim_ties or fim_ta", "found ties"]),
        ({"merge_method": "nothing"}, ["expected fim_ties or fim_ta", "found nothing"]),
        ({"base_model": "{t}/nowhere"}, ["nowhere"]),
        ({"models": []}, ["models"]),
        ({"parameters": {"sharpnes": 1}}, ["did you mean `sharpness`?"]),
        ({"models": 7}, ["not a merge config"]),
    ],
)
def test_bad_configs_end_in_one_line(command, change, words, pair, config, tmp_path):
    changed = {k: v.format(t=tmp_path) if isinstance(v, str) else v for k, v in change.items()}
    path = config(config_for(pair) | changed)
    ends_in_one_line(run(*(part.format(t=tmp_path) for part in command), path, "--quiet", ok=False), *words)
    assert os.listdir(tmp_path) == ["config.yml"]


def test_bad_files_end_in_one_line(tmp_path):
    (tmp_path / "broken.yml").write_text("models: [")
    (tmp_path / "list.yml").write_text("- 1")
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00\x81")
    for name, word in {"none": "can't be read", "broken": "YAML", "list": "found list", "binary": "YAML"}.items():
        for command in (["plan"], ["merge"]):
            more = [tmp_path / "out"] if command == ["merge"] else []
            ends_in_one_line(run(*command, tmp_path / f"{name}.yml", *more, ok=False), f"{name}.yml", word)
    assert not (tmp_path / "out").exists()


def test_plan_checks_its_files_first(pair, config, tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_fim.tools.plan.plan_merge", lambda *_: pytest.fail("planned"))
    path = config(config_for(pair))
    ends_in_one_line(run("plan", path, "--json", tmp_path / "no" / "f.json", ok=False), "doesn't exist")
    ends_in_one_line(run("plan", path, "--plot", tmp_path / "f.pdf", ok=False), ".png or .svg")


# export


def stock_merge(merge, plain: Path, out: str):
    text = plain.read_text(encoding="utf-8")
    assert "fim" not in yaml.safe_load(text)["merge_method"]
    return merge.ok(text, out=out)[0]


def models_of(pair, *parameters):
    return [{"model": str(m), "parameters": p} for m, p in zip((pair.long, pair.third), parameters, strict=False)]


EXACT = {
    "fim_ta": ("fim_ta", lambda p: {}),
    "fim_ta with gate protection": ("fim_ta", lambda p: {"parameters": {"gate_scale": 0.5}}),
    "fim_ta of two": ("fim_ta", lambda p: {"models": models_of(p, {"weight": 0.7}, {"weight": -0.2})}),
    "fim_ta of two, normalised": (
        "fim_ta",
        lambda p: {"models": models_of(p, {"weight": 0.7}, {"weight": 0.4}), "parameters": {"normalize": True}},
    ),
    "fim_ta with lambda": ("fim_ta", lambda p: {"parameters": {"lambda": 0.8, "alpha_mean": 0.4}}),
    "fim_ties": ("fim_ties", lambda p: {"parameters": {"norm_tolerance": 0}}),
    "fim_ties of two": (
        "fim_ties",
        lambda p: {
            "models": models_of(p, {"weight": 0.7, "density": [0.2, 0.6]}, {"density": 0.4}),
            "parameters": {"norm_tolerance": 0, "normalize": False, "gate_scale": 0.6},
        },
    ),
    "fim_ties with weights by filter and hand": (
        "fim_ties",
        lambda p: {
            "models": models_of(
                p,
                {
                    "weight": [{"filter": "mlp", "value": 0.5}, {"value": 1.5}],
                    "alpha": [{"filter": "norm", "value": 0.1}],
                },
            ),
            "parameters": {"norm_tolerance": 0, "normalize": False},
        },
    ),
    "slices": (
        "fim_ta",
        lambda p: {
            "models": None,
            "slices": [
                {"sources": [{"model": str(m), "layer_range": r} for m in (p.base, p.long)]}
                for r in ([0, 2], [1, 3], [1, 5])
            ],
        },
    ),
    "slices with parameters of their own": (
        "fim_ties",
        lambda p: {
            "models": None,
            "slices": [
                {
                    "sources": [
                        {"model": str(p.base), "layer_range": [start, end]},
                        {"model": str(p.long), "layer_range": [start, end], "parameters": {"weight": weight}},
                    ],
                    "parameters": {"lambda": weight},
                }
                for start, end, weight in ((0, 3, 0.5), (2, 5, 0.9))
            ],
            "parameters": {"norm_tolerance": 0, "normalize": False},
        },
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_the_exported_config_gives_the_same_weights(case, pair, merge, config, tmp_path):
    method, changes = EXACT[case]
    content = {k: v for k, v in (config_for(pair, method) | changes(pair)).items() if v is not None}
    ours, _ = merge.ok(content, out="ours")
    result = run("export", config(content), "-o", tmp_path / "plain.yml", "--quiet")
    assert "not the same" not in result.output
    found = reference.load(stock_merge(merge, tmp_path / "plain.yml", "stock"))
    expected = reference.load(ours)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    difference = re.search(
        r"largest relative difference of a merged tensor: (\S+) of its norm", " ".join(result.output.split())
    )
    assert float(difference[1]) < 1e-6
    plain = yaml.safe_load((tmp_path / "plain.yml").read_text())
    assert ("models" in plain) is ("slices" not in content)


def test_the_exported_config_in_16_bits(merge, config, tmp_path):
    base = tiny.build(tiny.config("llama"))
    paths = [tiny.save(m, tmp_path / n, torch.bfloat16) for n, m in (("base", base), ("long", tiny.tuned(base, 1)))]
    content = {"merge_method": "fim_ta", "base_model": str(paths[0]), "models": [{"model": str(paths[1])}]}
    ours = reference.load(merge.ok(content, out="ours")[0])
    run("export", config(content), "-o", tmp_path / "plain.yml", "--quiet")
    for name, value in reference.load(stock_merge(merge, tmp_path / "plain.yml", "stock")).items():
        np.testing.assert_allclose(value, ours[name], rtol=2**-7, atol=2**-7 * np.abs(ours[name]).max(), err_msg=name)
    content["merge_method"] = "fim_ties"
    result = run("export", config(content), "-o", tmp_path / "plain.yml", "--quiet")
    assert "not the same as fim_ties: trimming in 16 bits" in " ".join(result.output.split())


LOSSY = {
    "calibration": (lambda p: {}, "norm calibration: ties doesn't rescale"),
    "agreeing weights": (
        lambda p: {"models": models_of(p, {}, {}), "parameters": {"norm_tolerance": 0}},
        "by the weights of the models that agree",
    ),
}


@pytest.mark.parametrize("case", LOSSY)
def test_what_the_exported_config_cannot_do_is_said_and_measured(case, pair, merge, config, tmp_path):
    changes, words = LOSSY[case]
    content = config_for(pair) | changes(pair)
    ours = reference.load(merge.ok(content, out="ours")[0])
    result = run("export", config(content), "-o", tmp_path / "plain.yml", "--quiet")
    said = " ".join(result.stderr.split())
    assert words in said
    comments = " ".join(
        line.lstrip("# ") for line in (tmp_path / "plain.yml").read_text().splitlines() if line[0] == "#"
    )
    assert words in " ".join(comments.split())
    theirs = reference.load(stock_merge(merge, tmp_path / "plain.yml", "stock"))
    base = reference.load(pair.base)
    norm = np.linalg.norm
    relative = max(norm(theirs[n] - v) / norm(v) for n, v in ours.items())
    of_change = max(norm(theirs[n] - v) / norm(v - base[n]) for n, v in ours.items())
    found = re.search(r"merged tensor: (\S+) of its norm \(\S+\), or (\S+) of what the merge changes", said)
    assert [float(x) for x in found.groups()] == pytest.approx([relative, of_change], rel=0.05)
    assert relative > 1e-3


def test_what_stock_mergekit_writes_otherwise(merge, config, tmp_path):
    base = tiny.build(tiny.config("qwen2", tie_word_embeddings=True))
    long = tiny.tuned(base, 1, cfg=tiny.config("qwen2", tie_word_embeddings=False, max_position_embeddings=512))
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(long, tmp_path / "long")]
    content = {
        "merge_method": "fim_ta",
        "base_model": str(paths[0]),
        "models": [{"model": str(paths[1])}],
        "dtype": "float32",
    }
    said = run("export", config(content), "-o", tmp_path / "plain.yml", "--quiet").stderr
    assert "config key tie_word_embeddings: stock mergekit writes true, fim_ta writes false" in " ".join(said.split())
    assert "config key max_position_embeddings: stock mergekit writes 128, fim_ta writes 512" in " ".join(said.split())
    sliced = {k: v for k, v in content.items() if k != "models"}
    sliced["slices"] = [{"sources": [{"model": str(p), "layer_range": [1, 4]} for p in paths]}]
    said = run("export", config(sliced), "-o", tmp_path / "plain.yml", "--quiet", "--no-check").stderr
    assert "stock mergekit can't save the merged model's config" in " ".join(said.split())
    assert "was not measured" in said


def test_summary_of_differences():
    from mergekit_fim.tools.export import Difference

    text = summary([Difference("a", 0.1, 0.2), Difference("b", 0.05, 0.9)])
    assert text.endswith("1.0e-01 of its norm (a), or 9.0e-01 of what the merge changes in it (b)")


# merge


def test_merge_is_mergekit_yaml(pair, merge, config, tmp_path):
    expected, _ = merge.ok(config_for(pair))
    path = config(config_for(pair))
    run("merge", path, tmp_path / "merged", "--no-copy-tokenizer", "--no-write-model-card", "--quiet")
    assert sorted(os.listdir(expected)) == sorted(os.listdir(tmp_path / "merged"))
    for name in os.listdir(expected):
        assert (expected / name).read_bytes() == (tmp_path / "merged" / name).read_bytes(), name
    # And of any of mergekit's own methods.
    stock = config_for(pair, "linear", models=[{"model": str(pair.long), "parameters": {"weight": 1.0}}])
    del stock["base_model"]
    run("merge", config(stock), tmp_path / "linear", "--no-copy-tokenizer", "--no-write-model-card", "--quiet")
    assert (tmp_path / "linear" / "model.safetensors").exists()


@pytest.mark.slow
def test_merge_where_python_reads_no_start_up_files(pair, config, tmp_path):
    """`python -S`: neither site-packages' .pth files nor site-packages; the packages are found by PYTHONPATH."""
    import sysconfig

    path = config(config_for(pair))
    source = Path(mergekit_fim.__file__).parents[1]
    folders = f"{source}{os.pathsep}{sysconfig.get_path('purelib')}"
    options = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    with contextlib.closing(Loaded(sys.executable, tmp_path, "-S", PYTHONPATH=folders)) as python:
        stock = ["-m", "mergekit.scripts.run_yaml", str(path), str(tmp_path / "stock"), *options]
        done = python.run(*stock, check=False)
        assert "fim_ties" in done.stderr
        assert done.returncode != 0
        python.run("-m", "mergekit_fim", "merge", str(path), str(tmp_path / "ours"), *options)
    assert (tmp_path / "ours" / "fim_report.json").exists()


def test_a_model_card_that_cannot_be_made_costs_no_merge(pair, config, tmp_path, monkeypatch, caplog):
    """mergekit asks the Hub about a relative path of two parts; without a connection that fails."""
    for path in (pair.base, pair.long):
        shutil.copytree(path, tmp_path / "models" / path.name)
    monkeypatch.chdir(tmp_path)
    path = config(config_for(pair, base_model="models/base", models=[{"model": "models/long"}]))
    run("merge", path, tmp_path / "merged", "--no-copy-tokenizer", "--quiet")
    assert "the merged model is whole, but its model card can't be made" in caplog.text
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert (tmp_path / "merged" / "mergekit_config.yml").read_text() == Path(path).read_text()
    assert not (tmp_path / "merged" / "README.md").exists()


def test_a_model_card_is_mergekits(pair, merge, config, tmp_path):
    path = config(config_for(pair))
    expected = tmp_path / "stock" / "merged"
    result = CliRunner().invoke(mergekit_yaml, [str(path), str(expected), "--no-copy-tokenizer", "--quiet"])
    assert result.exit_code == 0, result.output
    run("merge", path, tmp_path / "merged", "--no-copy-tokenizer", "--quiet")
    for name in ("README.md", "mergekit_config.yml"):
        assert (expected / name).read_text() == (tmp_path / "merged" / name).read_text()


@pytest.mark.slow
def test_our_commands_work_where_the_hook_is_off(unhooked, pair, config):
    unhooked.run("-m", "mergekit_fim", "plan", str(config(config_for(pair))), "--quiet")


def test_merge_with_an_error_of_mergekits(pair, config, tmp_path):
    stock = config_for(pair, "linear")  # no weight
    result = run("merge", config(stock), tmp_path / "out", "--no-copy-tokenizer", "--quiet", ok=False)
    ends_in_one_line(result, "weight")
    assert not (tmp_path / "out").exists()


# plot


def test_plot_of_a_report_and_of_a_measurement(pair, merge, tmp_path):
    models = [{"model": str(pair.long)}, {"model": str(pair.third)}]
    out, _ = merge.ok(config_for(pair, models=models))
    write_measurement(measurement(), str(tmp_path / "f.json"))
    for source, panels in ((out / "fim_report.json", 3), (tmp_path / "f.json", 1)):
        for ending in ("png", "svg"):
            figure = tmp_path / f"{source.stem}.{ending}"
            result = run("plot", source, "-o", figure)
            assert str(figure) in result.output
            first = figure.read_bytes()
            assert first.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
            run("plot", source, "-o", figure)
            assert figure.read_bytes() == first  # the same bytes every time
        assert first.decode().count('<g id="axes_') == panels
    assert not [name for name in os.listdir(tmp_path) if "part" in name]


def test_what_a_figure_shows(pair, merge, tmp_path):
    """Every value of the report stands where it belongs, told apart without colour."""
    from mergekit_fim.report.figure import draw, read_report

    models = [{"model": str(pair.long)}, {"model": str(pair.third)}]
    out, _ = merge.ok(config_for(pair, models=models))
    report = reference.report(out)
    figure = draw(read_report(str(out / "fim_report.json")))
    fisher, norms, alphas = figure.axes
    assert fisher.get_yscale() == "log"
    (bars,) = fisher.containers
    np.testing.assert_allclose(
        np.asarray(bars.lines[0].get_ydata(), float), [layer["fisher"] for layer in report["fisher"]["layers"]]
    )
    ends = np.array([np.asarray(segment, float)[:, 1] for segment in bars.lines[2][0].get_segments()])
    stderr = np.array([layer["fisher_stderr"] for layer in report["fisher"]["layers"]])
    np.testing.assert_allclose(ends[:, 1] - ends[:, 0], 2 * stderr, rtol=1e-6)
    for model, norm, alpha in zip(report["models"], norms.lines, alphas.lines[:2], strict=True):
        np.testing.assert_allclose(norm.get_ydata() ** 2, [x["task_vector_sq_norm"] for x in model["layers"]])
        np.testing.assert_allclose(alpha.get_ydata(), [x["alpha"] for x in model["layers"]])
    assert [line.get_ydata() for line in alphas.lines[2:]] == [[model["alpha_other"]] for model in report["models"]]
    styles = {(line.get_marker(), line.get_linestyle()) for line in norms.lines}
    assert len(styles) == 2
    assert [text.get_text() for text in norms.get_legend().get_texts()] == ["long", "third"]


def test_models_of_one_name_are_told_apart_by_their_folders():
    from mergekit_fim.report.figure import _short_names

    assert _short_names(["runs/a/last", "runs/b/last"]) == ["a/last", "b/last"]
    assert _short_names(["/x/a/one/last", "/x/b/one/last", "/x/b/two"]) == ["a/one/last", "b/one/last", "x/b/two"]
    assert _short_names(["user/model", "/x/long"]) == ["user/model", "long"]
    assert _short_names(["same", "same"]) == ["same", "same"]


def test_a_report_of_slices_is_drawn_by_the_bases_layers(pair, merge, tmp_path):
    from mergekit_fim.report.figure import draw, read_report

    sources = [{"model": str(pair.base), "layer_range": [2, 5]}, {"model": str(pair.long), "layer_range": [1, 4]}]
    content = {k: v for k, v in config_for(pair, slices=[{"sources": sources}]).items() if k != "models"}
    out, _ = merge.ok(content)
    _, norms, alphas = draw(read_report(str(out / "fim_report.json"))).axes
    for panel in (norms, alphas):
        assert list(panel.lines[0].get_xdata()) == [0, 1, 2, 3, 4]


def test_plot_refuses(pair, merge, tmp_path, monkeypatch):
    hand = [{"model": str(pair.long), "parameters": {"alpha": 0.5}}]
    out, _ = merge.ok(config_for(pair, models=hand))
    write_measurement(measurement(), str(tmp_path / "f.json"))
    (tmp_path / "damaged.json").write_text('{"format": "mergekit-fim/report", "models": 3}')
    (tmp_path / "config.json").write_text("{}")
    for source, figure, word in (
        (out / "fim_report.json", "f.png", "set by hand"),
        (tmp_path / "damaged.json", "f.png", "damaged"),
        (tmp_path / "config.json", "f.png", "expected a report"),
        (tmp_path / "none.json", "f.png", "can't be read"),
        (tmp_path / "f.json", "f.jpg", ".png or .svg"),
        (tmp_path / "f.json", "no/f.png", "doesn't exist"),
    ):
        ends_in_one_line(run("plot", source, "-o", tmp_path / figure, ok=False), word)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ends_in_one_line(
        run("plot", tmp_path / "f.json", "-o", tmp_path / "f.png", ok=False), "pip install 'mergekit-fim[plot]'"
    )
    assert not list(tmp_path.glob("*.png"))


# compare


def layers_with(fisher, relative=None) -> FisherMeasurement:
    """A measurement of these values of F, and (relative) standard errors."""
    rows = [[x] if relative is None else [x * (1 - relative), x * (1 + relative)] for x in map(float, fisher)]
    layers = tuple(LayerFisher(i, 1, tuple(row)) for i, row in enumerate(rows))
    return FisherMeasurement(97, "float32", FisherSettings(len(rows[0]), 64), layers)


def test_comparison_against_numpy():
    rng = np.random.default_rng(0)
    a, b = np.exp(rng.normal(size=30)), np.exp(rng.normal(size=30))
    found = compare_fisher(layers_with(a, 0.1), layers_with(b, 0.2))
    ranks = [x.argsort().argsort() for x in (a, b)]
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found.log_pearson == pytest.approx(np.corrcoef(np.log(a), np.log(b))[0, 1])
    assert found.factor == pytest.approx(np.exp(np.mean(np.log(b / a))))
    assert [abs(x.shift) for x in found.layers] == sorted((abs(x.shift) for x in found.layers), reverse=True)
    for layer in found.layers:
        assert layer.shift == pytest.approx(np.log(b / a)[layer.first.index] - np.log(b / a).mean())
        assert layer.stderr == pytest.approx(np.hypot(0.1, 0.2))
        assert layer.is_beyond is bool(abs(layer.shift) > 2 * np.hypot(0.1, 0.2))
    scaled = compare_fisher(layers_with(a), layers_with(7 * a))
    assert (scaled.spearman, scaled.log_pearson) == (pytest.approx(1), pytest.approx(1))
    assert max(abs(layer.shift) for layer in scaled.layers) < 1e-12


def test_comparison_of_ties_zeros_and_little():
    found = compare_fisher(layers_with([1, 1, 2, 0]), layers_with([3, 3, 1, 5], 0.1))
    assert found.spearman == pytest.approx(-1)
    assert {layer.first.index for layer in found.layers} == {0, 1, 2}
    assert found.layers[0].is_beyond is None
    assert compare_fisher(layers_with([1, 1]), layers_with([1, 2])).spearman is None
    for bad in (([1, 2], [1, 2, 3]), ([1, 0], [1, 1])):
        with pytest.raises(FimError, match="expected the same layers"):
            compare_fisher(*map(layers_with, bad))


def fisher_file(path: Path, norms, seed=0):
    layers = tuple(LayerFisher(i, 10, tuple(row)) for i, row in enumerate(norms))
    fisher = FisherMeasurement(97, "float32", FisherSettings(len(norms[0]), 64, seed), layers)
    model = measurement().model
    write_measurement(
        measurement(fisher=fisher, model=type(model)(**vars(model) | {"num_layers": len(norms)})), str(path)
    )
    return path


def test_compare_prints_what_moved(tmp_path):
    rows = [[10.0**-i, 1.1 * 10.0**-i] for i in range(6)]
    first = fisher_file(tmp_path / "a.json", rows)
    rows[4] = [9 * value for value in rows[4]]
    second = fisher_file(tmp_path / "b.json", rows, seed=1)
    output = run("compare", first, second, "--layers", "2").output
    assert "first: user/model, 2 × 64 tokens, seed 0" in output
    assert "Spearman 1.000" in output
    assert "share tokens" not in output
    assert "share tokens" in run("compare", first, first).output
    assert "6 of 6 layers moved by more than 2 standard errors" in output
    rows = [line.split() for line in output.splitlines() if line.split()[:1] == ["4"]]
    assert rows[0][-1] == "beyond"
    assert len([line for line in output.splitlines() if line.endswith(("beyond", "within"))]) == 2
    ends_in_one_line(
        run("compare", first, fisher_file(tmp_path / "c.json", rows and [[1.0, 2.0]] * 3), ok=False), "6 and 3"
    )
    ends_in_one_line(run("compare", first, tmp_path / "none.json", ok=False), "none.json", "no such file")


# help


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command):
    result = run(*command, "--help")
    assert max(len(line) for line in result.output.splitlines()) <= 100
    for name in COMMANDS if not command else []:
        assert re.search(rf"^  {name}  +\w", result.output, re.M)
    # Every option is there and says what it does; lines may break at spaces and hyphens.
    parameters = (main.commands[command[0]] if command else main).params
    shown = "".join(result.output.split())
    for option in (p for p in parameters if isinstance(p, click.Option)):
        assert option.help, option.name
        assert "".join(option.help.split()) in shown, option.name
        assert re.search(rf"^  .*{option.opts[-1]}\b", result.output, re.M), option.name


@pytest.mark.parametrize("command", ["plan", "export", "merge"])
def test_mergekits_options_are_all_there(command):
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    found = run(command, "--help").output
    for parameter in mergekit_yaml.params:
        for option in parameter.opts if parameter.name not in ("config_file", "out_path") else []:
            assert option in found, option


def test_help_and_completion_import_nothing_heavy():
    code = (
        "import sys\n"
        "from mergekit_fim.cli import main\n"
        "try: main(['--help'], prog_name='mergekit-fim')\n"
        "except SystemExit: pass\n"
        "from click.shell_completion import BashComplete\n"
        "found = BashComplete(main, {}, 'mergekit-fim', '_X').get_completions([], 'pl')\n"
        "assert [item.value for item in found] == ['plan', 'plot'], found\n"
        "found = BashComplete(main, {}, 'mergekit-fim', '_X').get_completions(['fisher', '--labels'], 's')\n"
        "assert [item.value for item in found] == ['sampled'], found\n"
        "assert not {'torch', 'mergekit', 'transformers', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_completion_of_files(command):
    arguments = [parameter for parameter in main.commands[command].params if isinstance(parameter, click.Argument)]
    assert arguments
    for argument in arguments:
        assert [item.type for item in argument.type.shell_complete(None, argument, "c")] in (["file"], ["dir"])


def test_completion_of_mergekits_options():
    from click.shell_completion import BashComplete

    found = BashComplete(main, {}, "mergekit-fim", "_X").get_completions(["plan"], "--trust")
    assert "--trust-remote-code" in [item.value for item in found]


def test_usage_errors_have_status_2():
    assert run("plan", ok=False).exit_code == 2
    assert run("nothing", ok=False).exit_code == 2
    assert run("fisher", "x", "-o", "y", "--labels", "z", ok=False).exit_code == 2


def test_the_console_script_and_the_module_are_the_same():
    import sysconfig

    script = Path(sysconfig.get_path("scripts")) / "mergekit-fim"
    outputs = [
        subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60).stdout
        for command in ([script], [sys.executable, "-m", "mergekit_fim"])
    ]
    assert outputs[0] == outputs[1] == f"mergekit-fim, version {mergekit_fim.__version__}\n"
