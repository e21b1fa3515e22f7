"""Whole merges by the stock command, every tensor against a from-scratch NumPy computation."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import tiny
import torch
import transformers
import yaml
from environments import MERGEKIT_YAML, SCRIPTS
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from merges import config_for
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mergekit_fim.config.parameters import PARAMETERS, Scope
from mergekit_fim.models.inputs import InputModel, open_model
from mergekit_fim.models.layout import layer_prefix
from mergekit_fim.prepass import layers as prepass
from mergekit_fim.prepass.task_vectors import LayerPair, TaskVectorSweep
from mergekit_fim.prepass.written import default_density


def expect(base: Path, models: list[Path], method: str, alphas: list[list[float]], densities=None, weights=None):
    """The merged model by METHOD with the method's defaults, given the layers' α per model."""
    theta0, thetas = reference.load(base), [reference.load(model) for model in models]
    ties = method == "fim_ties"
    merged = {}
    for name, value in theta0.items():
        layer = reference.layer_of(name)
        merged[name] = reference.merge_tensor(
            method,
            value,
            [theta[name] for theta in thetas],
            [float(np.mean(a)) if layer is None else a[layer] for a in alphas],
            weights or [1.0] * len(models),
            densities or [0.2] * len(models),
            0.7 if ties and "gate_proj" in name else 1.0,
            0.05 if ties else 0.0,
            ties,
        )
    return merged


def assert_same(path: Path, expected: dict[str, np.ndarray], atol=2e-5):
    found = reference.load(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
def test_the_installed_wheel_merges_as_the_method_says(method, installed, loaded, pair, tmp_path):
    """The main job: wheel, stock `mergekit-yaml` in a process of its own, every tensor, the table and the report."""
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(config_for(pair, method)), encoding="utf-8")
    done = installed.run(MERGEKIT_YAML, str(config), str(tmp_path / "out"), "--no-copy-tokenizer")
    F, norms, alphas = reference.layer_coefficients(pair.base, pair.long)
    assert max(alphas) - min(alphas) > 0.1
    assert_same(tmp_path / "out", expect(pair.base, [pair.long], method, [alphas]))

    report = reference.report(tmp_path / "out")
    assert (report["format"], report["version"]) == ("mergekit-fim/report", 1)
    assert (report["method"], report["base_model"]) == (method, str(pair.base))
    assert (report["fisher"]["vocab_size"], report["fisher"]["num_layers"]) == (tiny.VOCAB, 5)
    (model,) = report["models"]
    assert (model["model"], model["weight"]) == (str(pair.long), 1.0)
    assert model["density"] == (0.2 if method == "fim_ties" else None)
    assert model["alpha_other"] == pytest.approx(np.mean(alphas))
    for layer, row, f, d, a in zip(report["fisher"]["layers"], model["layers"], F, norms, alphas, strict=True):
        assert layer["index"] == row["index"]
        assert layer["fisher"] == pytest.approx(f, rel=1e-4)
        assert np.mean(layer["squared_norms"]) / layer["parameters"] == pytest.approx(f, rel=1e-4)
        assert len(layer["squared_norms"]) == 8
        assert layer["fisher_stderr"] > 0
        assert row["task_vector_sq_norm"] == pytest.approx(d, rel=1e-5)
        assert row["score"] == pytest.approx(f * d, rel=1e-4)
        assert row["alpha"] == pytest.approx(a, abs=1e-4)
        line = next(line for line in done.stdout.splitlines() if line.split()[:1] == [str(layer["index"])])
        assert line.split()[-1] == f"{row['alpha']:.3f}"
        assert len(line) <= 80
    assert report["settings"]["fisher_samples"] == 8
    assert report["versions"]["mergekit"].startswith("0.1.")
    assert "Measuring Fisher information" in done.stderr

    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (
        f"[{'FIM-TIES' if method == 'fim_ties' else 'FIM Task Arithmetic'}](https://arxiv.org/abs/2603.21705)" in card
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()

    # The same command again: the same bytes.
    loaded.run(MERGEKIT_YAML, str(config), str(tmp_path / "again"), "--no-copy-tokenizer", "--quiet")
    for name in ("model.safetensors", "fim_report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
def test_two_fine_tuned_models(method, pair, merge):
    models = [
        {"model": str(pair.long), "parameters": {"weight": 0.8, "density": 0.5}},
        {"model": str(pair.third), "parameters": {"weight": 0.4}},
    ]
    out, _ = merge.ok(config_for(pair, method, models=models))
    alphas = [reference.layer_coefficients(pair.base, model)[2] for model in (pair.long, pair.third)]
    assert_same(out, expect(pair.base, [pair.long, pair.third], method, alphas, [0.5, 0.2], [0.8, 0.4]))
    report = reference.report(out)
    assert [m["weight"] for m in report["models"]] == [0.8, 0.4]
    # One model's coefficients don't depend on the other's presence.
    alone, _ = merge.ok(config_for(pair, method), out="alone")
    assert reference.report(alone)["models"][0]["layers"] == report["models"][0]["layers"]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2", "gpt2", "mixtral"])
def test_other_architectures(kind, merge, tmp_path):
    base = tiny.build(tiny.config(kind))
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(tiny.tuned(base, 1), tmp_path / "long")]
    config = {"merge_method": "fim_ta", "base_model": str(paths[0]), "models": [{"model": str(paths[1])}]}
    out, _ = merge.ok(config | {"dtype": "float32"})
    alphas = reference.layer_coefficients(*paths)[2]
    theta0, theta1 = (transformers.AutoModelForCausalLM.from_pretrained(p).state_dict() for p in paths)
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in merged.state_dict().items():
        layer = reference.layer_of(name)
        alpha = np.mean(alphas) if layer is None else alphas[layer]
        expected = theta0[name] + alpha * (theta1[name] - theta0[name])
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=2e-5, msg=name)


def settings(out):
    report = reference.report(out)
    return report["settings"], [layer["alpha"] for layer in report["models"][0]["layers"]]


def test_the_settings_reach_the_measurement_and_the_map(pair, merge):
    parameters = {
        "fisher_samples": 3,
        "fisher_seq_len": 16,
        "fisher_seed": 7,
        "fisher_labels": "sampled",
        "sharpness": -2,
        "mapping": "anchored",
        "alpha_min": 0.1,
        "alpha_max": 0.9,
        "alpha_other": 0.25,
        "gate_scale": 0.5,
        "norm_tolerance": 0.01,
        "lambda": 1.1,
    }
    out, _ = merge.ok(config_for(pair, parameters=parameters))
    used, alphas = settings(out)
    assert {name: used[name] for name in parameters} == parameters
    measured = reference.fisher(pair.base, 3, 16, 7, uniforms=True)
    _, norms, _ = reference.layer_coefficients(pair.base, pair.long, samples=1, seq_len=2)
    scores = [np.mean(s) / count * d for (count, s), d in zip(measured, norms, strict=True)]
    expected = reference.coefficients(scores, -2, 0.1, 0.9, anchored=True)
    assert alphas == pytest.approx(list(expected), abs=1e-4)
    assert reference.report(out)["models"][0]["alpha_other"] == 0.25
    theta0, theta1 = reference.load(pair.base), reference.load(pair.long)
    for name, value in reference.load(out).items():
        layer = reference.layer_of(name)
        alpha = 0.25 if layer is None else expected[layer]
        gate = 0.5 if "gate_proj" in name else 1.0
        wanted = reference.merge_tensor(
            "fim_ties", theta0[name], [theta1[name]], [alpha], [1], [0.2], gate, 0.01, True, 1.1
        )
        np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=1e-4, err_msg=name)


def test_alpha_mean_makes_layer_adaptive_and_uniform_comparable(pair, merge):
    out, _ = merge.ok(config_for(pair, parameters={"alpha_mean": 0.3}))
    _, alphas = settings(out)
    assert np.mean(alphas) == pytest.approx(0.3, abs=1e-12)
    assert np.std(alphas) > 0.01


def test_random_seed_does_not_change_the_tokens(pair, merge):
    first, _ = merge.ok(config_for(pair))
    second, _ = merge.ok(config_for(pair), "--random-seed", "123", out="second")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_quiet_prints_nothing(pair, merge, capfd):
    _, result = merge.ok(config_for(pair), "--quiet")
    assert result.output == ""
    assert capfd.readouterr().err == ""
    _, result = merge.ok(config_for(pair), out="loud")
    assert "Fisher information of" in result.output


def test_the_dtype_of_the_config_is_that_of_measurement_and_result(merge, tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_fim.fisher.loading.running_dtype", lambda dtype, device: dtype)
    base = tiny.build(tiny.config("llama"))
    half = [tiny.save(m, tmp_path / n, torch.bfloat16) for n, m in (("b", base), ("l", tiny.tuned(base, 1)))]
    config = {"merge_method": "fim_ties", "base_model": str(half[0]), "models": [{"model": str(half[1])}]}
    out, _ = merge.ok(config)  # the checkpoints' own
    assert {t.dtype for t in transformers.AutoModelForCausalLM.from_pretrained(out).parameters()} == {torch.bfloat16}
    wide, _ = merge.ok(config | {"dtype": "float32", "out_dtype": "float16"}, out="wide")
    assert json.loads((wide / "config.json").read_text())["dtype"] == "float16"
    assert {t.dtype for t in load_file(wide / "model.safetensors").values()} == {torch.float16}
    assert [reference.report(path)["fisher"]["dtype"] for path in (out, wide)] == ["bfloat16", "float32"]
    own, float32 = (reference.report(path)["fisher"]["layers"][0]["fisher"] for path in (out, wide))
    assert own == pytest.approx(float32, rel=0.1)
    assert own != pytest.approx(float32, rel=1e-6)


def test_fim_ta_has_no_density(pair, merge):
    out, result = merge.ok(config_for(pair, "fim_ta"))
    report = reference.report(out)
    assert report["settings"]["default_density"] is None
    shared = [name for name, its in PARAMETERS.items() if its.scope is not Scope.MODEL and "fim_ta" in its.methods]
    kept = set(report["settings"]) - {"default_density", "dtype", "out_dtype"}
    assert kept == set(shared) - {"fisher_cache"}  # how it was come by, not what it is
    assert [model["density"] for model in report["models"]] == [None]
    assert "density" not in result.output
    out, _ = merge.ok(config_for(pair, "fim_ta", parameters={"density": 0.5}), out="set")
    report = reference.report(out)
    assert [model["density"] for model in report["models"]] == [None]
    assert report["warnings"] == ["density has no effect in fim_ta, which keeps every entry of the task vectors"]


def test_alpha_by_hand_runs_no_pre_pass(pair, merge, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("the pre-pass ran")

    monkeypatch.setattr("mergekit_fim.prepass.measured.measure_checkpoint", forbidden)
    monkeypatch.setattr("mergekit_fim.prepass.layers.TaskVectorSweep", forbidden)
    models = [{"model": str(pair.long), "parameters": {"alpha": 0.3}}]
    out, result = merge.ok(config_for(pair, "fim_ta", models=models))
    assert "alpha of" in result.output
    stock = config_for(pair, "task_arithmetic", models=[{"model": str(pair.long), "parameters": {"weight": 0.3}}])
    theirs, _ = merge.ok(stock, out="stock")
    expected = reference.load(theirs)
    assert_same(out, expected, atol=1e-6)
    report = reference.report(out)
    assert report["fisher"] is None
    assert report["models"][0]["alpha"] == 0.3

    # At a level above the models, as a gradient, and as filters that leave nothing out, it is by hand as well.
    merge.ok(config_for(pair, parameters={"alpha": [0.2, 0.8]}), out="gradient")
    merge.ok(config_for(pair, parameters={"alpha": [{"filter": "mlp", "value": 0.2}, {"value": 0.5}]}), out="filters")


def test_alpha_by_hand_for_some_tensors_leaves_the_others_to_the_pre_pass(pair, merge):
    hand = [{"filter": "model.layers.1.", "value": 0.0}, {"filter": "lm_head", "value": 1.0}]
    out, result = merge.ok(
        config_for(pair, "fim_ta", models=[{"model": str(pair.long), "parameters": {"alpha": hand}}])
    )
    assert "is set by hand" in result.output
    alphas = reference.layer_coefficients(pair.base, pair.long)[2]
    used = [0.0 if layer == 1 else alpha for layer, alpha in enumerate(alphas)]
    theta0, theta1 = reference.load(pair.base), reference.load(pair.long)
    for name, value in reference.load(out).items():
        layer = reference.layer_of(name)
        alpha = np.mean(used) if layer is None else used[layer]
        alpha = 1.0 if "lm_head" in name else alpha
        np.testing.assert_allclose(value, theta0[name] + alpha * (theta1[name] - theta0[name]), rtol=1e-4, atol=2e-5)


STOCK = {
    "ties": {
        "models": [
            {"parameters": {"weight": 0.8, "density": [0.2, 0.9, 0.4]}},
            {"parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 0.9}], "density": 0.5}},
        ],
        "parameters": {"normalize": True, "int8_mask": True, "rescale": False, "lambda": 0.9},
    },
    "task_arithmetic": {
        "models": [{"parameters": {"weight": [0.1, 0.9]}}, {"parameters": {"weight": 0.3, "density": 0.7}}],
        "parameters": {"normalize": False, "int8_mask": True},
    },
}


@pytest.mark.parametrize("stock", STOCK)
def test_a_stock_config_works_with_only_the_method_changed(stock, pair, merge):
    parts = STOCK[stock]
    models = [{"model": str(p)} | m for p, m in zip((pair.long, pair.third), parts["models"], strict=True)]
    models.append({"model": str(pair.base)})
    ours = "fim_ties" if stock == "ties" else "fim_ta"
    config = config_for(pair, ours, models=models, parameters=dict(parts["parameters"]))
    out, _ = merge.ok(config)
    assert reference.report(out)["models"][0]["layers"]
    # With α = 1 and what TIES doesn't have switched off, it is the stock merge: filters and gradients included.
    config["parameters"] |= {"alpha": 1.0, "gate_scale": 1.0, "norm_tolerance": 0.0}
    same, _ = merge.ok(config, out="same")
    config["parameters"] = dict(parts["parameters"])
    theirs, _ = merge.ok(config | {"merge_method": stock}, out="stock")
    assert_same(same, reference.load(theirs), atol=1e-5)


def test_from_python(pair, tmp_path):
    """`run_merge`, twice with one config object: it is left as it was, and the second merge measures anew."""
    config = MergeConfiguration.model_validate(config_for(pair))
    before = config.model_dump()
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    run_merge(config, str(tmp_path / "one"), options)
    assert config.model_dump() == before
    config.parameters = {"sharpness": 0.0}
    run_merge(config, str(tmp_path / "two"), options)
    assert settings(tmp_path / "two")[1] == [0.5] * 5
    assert settings(tmp_path / "one")[1] != [0.5] * 5


@pytest.mark.slow
def test_mergekit_multi_with_a_later_stage_on_ours(loaded, pair, tmp_path):
    stages = [
        config_for(pair) | {"name": "first"},
        config_for(pair, "fim_ta", models=[{"model": "first"}, {"model": str(pair.third)}]),
    ]
    config = tmp_path / "multi.yml"
    config.write_text(yaml.safe_dump_all(stages), encoding="utf-8")
    loaded.run(
        *(
            str(SCRIPTS / "mergekit-multi"),
            str(config),
            "--out-path",
            str(tmp_path / "out"),
            "-I",
            str(tmp_path / "stages"),
        ),
        *("--no-copy-tokenizer", "--no-write-model-card"),
    )
    first, final = reference.report(tmp_path / "stages" / "first"), reference.report(tmp_path / "out")
    assert [m["model"] for m in final["models"]] == [str(tmp_path / "stages" / "first"), str(pair.third)]
    assert first["fisher"] == final["fisher"]
    alphas = [reference.layer_coefficients(pair.base, m)[2] for m in (tmp_path / "stages" / "first", pair.third)]
    assert_same(tmp_path / "out", expect(pair.base, [tmp_path / "stages" / "first", pair.third], "fim_ta", alphas))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft with transformers 5
def test_lora_references_base_included(pair, merge, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(pair.base)
    adapters = [f"{pair.base}+{tiny.adapter(pair.base, tmp_path / n, i)}" for i, n in enumerate(("one", "two"))]
    config = {
        "merge_method": "fim_ta",
        "base_model": adapters[0],
        "models": [{"model": adapters[1]}],
        "dtype": "float32",
    }
    out, _ = merge.ok(config, "--lora-merge-cache", str(tmp_path / "cache"))
    merged = [ModelReference.parse(a).merged(cache_dir=str(tmp_path / "cache")).model.path for a in adapters]
    alphas = reference.layer_coefficients(*map(Path, merged))[2]
    assert_same(out, expect(Path(merged[0]), [Path(merged[1])], "fim_ta", [alphas]))
    assert not np.allclose(
        reference.load(Path(merged[0]))["model.layers.0.self_attn.q_proj.weight"],
        base.state_dict()["model.layers.0.self_attn.q_proj.weight"].numpy(),
    )


def test_a_model_that_cannot_be_run_layer_by_layer_has_all_its_task_vectors_measured(pair, merge, monkeypatch):
    """One that overwrites its layers' inputs is found out in the first of them, when no other has been read."""
    plain, _ = merge.ok(config_for(pair, "fim_ta", parameters={"fisher_cache": False}))
    original = LlamaDecoderLayer.forward

    def forward(self, hidden_states, *args, **kwargs):
        with torch.no_grad():
            hidden_states.mul_(1.0)
        return original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    out, _ = merge.ok(config_for(pair, "fim_ta", parameters={"fisher_cache": False}), out="overwrites")
    report = reference.report(out)
    assert "can't be run layer by layer" in report["warnings"][0]
    for found, expected in zip(
        report["models"][0]["layers"], reference.report(plain)["models"][0]["layers"], strict=True
    ):
        assert found["task_vector_sq_norm"] == expected["task_vector_sq_norm"]
        assert found["alpha"] == pytest.approx(expected["alpha"], rel=1e-5)


def opened(path):
    return open_model(str(path), None, MergeOptions())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_task_vectors_are_of_the_weights_as_the_merge_reads_them(dtype, pair):
    base, long = opened(pair.base), opened(pair.long)
    pairs = [LayerPair(i, i) for i in range(5)]
    found = TaskVectorSweep(base, {long: pairs}, dtype).norms(quiet=True)[long.reference]
    theta0, theta1 = (load_file(path / "model.safetensors") for path in (pair.base, pair.long))
    norms = dict.fromkeys([*range(5), None], 0.0)
    for name in theta0:
        a, b = (t[name].to(getattr(torch, dtype or "float32")).double() for t in (theta0, theta1))
        norms[reference.layer_of(name)] += float((b - a).square().sum())
    assert found.layers == pytest.approx({p: norms[p.base_layer] for p in pairs}, rel=1e-6)
    assert found.other == pytest.approx(norms[None], rel=1e-6)


def test_the_sums_do_not_hang_on_the_order_of_tensors(pair):
    """To the last digit: mergekit lists the tensors of some architectures in the order of a set of texts."""

    def turned(model: InputModel, by: int) -> InputModel:
        layers = [replace(its, tensors=(*its.tensors[by:], *its.tensors[:by])) for its in model.layout.layers]
        other = {name: (*its[by:], *its[:by]) for name, its in model.layout.modules.items()}
        return replace(model, layout=replace(model.layout, layers=tuple(layers), modules=other))

    models, pairs = (opened(pair.base), opened(pair.long)), [LayerPair(i, i) for i in range(5)]
    found = []
    for by in range(9):
        base, long = (turned(model, by) for model in models)
        found.append(TaskVectorSweep(base, {long: pairs}, None).norms(quiet=True)[long.reference])
    assert found == found[:1] * 9


def test_task_vectors_are_read_once_in_the_order_of_the_layers(pair, monkeypatch):
    """Which is that of the measurement beside it."""
    read = []
    original = InputModel.load
    monkeypatch.setattr(
        InputModel, "load", lambda self, *args: read.append((self, args[0].name)) or original(self, *args)
    )
    base, *models = map(opened, (pair.base, pair.long, pair.third))
    pairs = [LayerPair(i, i) for i in range(5)]
    TaskVectorSweep(base, dict.fromkeys(models, pairs), None).norms(quiet=True)
    assert len(read) == len(set(read)) == 3 * len(base.headers)
    layers = [reference.layer_of(name) for _, name in read if reference.layer_of(name) is not None]
    assert layers == sorted(layers)


@pytest.mark.parametrize("options", [{"max_shard_size": "20KB"}, "bin"])
def test_sharded_and_pickled_checkpoints(options, pair, merge, tmp_path):
    long = tmp_path / "long"
    model = transformers.AutoModelForCausalLM.from_pretrained(pair.long)
    if options == "bin":
        model.config.save_pretrained(long)
        torch.save(model.state_dict(), long / "pytorch_model.bin")
    else:
        model.save_pretrained(long, **options)
        assert len(list(long.glob("*.safetensors"))) > 2
    plain, _ = merge.ok(config_for(pair))
    out, _ = merge.ok(config_for(pair, models=[{"model": str(long)}]), out="other")
    assert (plain / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_no_checkpoint_is_held_after_the_measurement(pair, merge, tmp_path, monkeypatch):
    """A pickled one is in memory as long as mergekit's loader of it."""
    paths = [tmp_path / "base", tmp_path / "long"]
    for path, stored in zip(paths, (pair.base, pair.long), strict=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(stored)
        model.config.save_pretrained(path)
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    held = []

    def watched(original, *args, **options):
        held.append([loader.current_shard for loader in LoaderCache().loaders.values()])
        return original(*args, **options)

    monkeypatch.setattr(prepass, "merge_coefficients", functools.partial(watched, prepass.merge_coefficients))
    merge.ok(config_for(pair, base_model=str(paths[0]), models=[{"model": str(paths[1])}]))
    assert held == [[None, None]]


def test_the_default_density_follows_the_size_of_the_base():
    for parameters, density in ((2_999_999_999, 0.2), (3_000_000_000, 0.4)):
        shapes = [(3,), (parameters - 3, 1)]
        base = SimpleNamespace(headers={str(shape): SimpleNamespace(shape=shape) for shape in shapes})
        assert default_density(base) == density


def test_layer_prefixes():
    assert layer_prefix("model.layers.3.mlp.experts.3.w1", 3) == "model.layers.3."
    assert layer_prefix("layers.12.mixer", 12) == "layers.12."
    assert layer_prefix("model.layers.12.mlp", 2) is None


@pytest.mark.slow
def test_importing_mergekit_in_any_order_registers_once(loaded):
    """Where no more has been imported than what mergekit itself imports."""
    code = """
import sys
assert not [name for name in sys.modules if name.startswith(("mergekit.", "mergekit_fim."))]
__import__(sys.argv[1])
import mergekit.plan, mergekit_fim
from mergekit import merge_methods
names = [method.spec.name for method in merge_methods.registered_methods()]
hooked = bool(mergekit.plan.MergePlanner.plan_to_disk.mergekit_fim)
print(hooked and names.count("fim_ties") == names.count("fim_ta") == 1)
"""
    modules = ["mergekit.config", "mergekit.plan"]
    modules += ["mergekit_fim.merging.methods", "mergekit_fim.hook.planner", "mergekit_fim.report.table"]
    for module in modules:
        done = loaded.run("-c", code, module)
        assert (done.stdout, done.stderr) == ("True\n", ""), module


def test_multi_gpu_in_worker_threads(pair, merge, request):
    """mergekit's multi-GPU executor over two stand-in devices: same bytes, report included."""
    plain, _ = merge.ok(config_for(pair))
    request.getfixturevalue("two_accelerators")
    out, _ = merge.ok(config_for(pair), "--multi-gpu", out="multi")
    found, expected = reference.load(out), reference.load(plain)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert (out / "fim_report.json").read_bytes() == (plain / "fim_report.json").read_bytes()


def test_the_random_state_of_the_process_is_left_alone(pair, merge):
    state = torch.get_rng_state()
    merge.ok(config_for(pair, parameters={"fisher_labels": "sampled"}))
    assert torch.equal(torch.get_rng_state(), state)
