"""Whole merges by `fim_kron`, by the stock command: every tensor against plain hooks and dense solutions."""

import functools
import json
import re

import huggingface_hub
import numpy as np
import pytest
import reference
import tiny
import torch
import transformers
from merges import config_for, ends_in_one_line, run, unwrapped
from safetensors.torch import load_file

from mergekit_fim.api import measure_factors
from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.prepass import kron as prepass_kron

LAYERS = 5


@functools.lru_cache(maxsize=12)
def rows_of(path, **options):
    return reference.linear_rows(path, **options)


def expected(paths, betas, *, transposed=False, other=None, plan=None, layers=range(LAYERS), factors=None, **options):
    """The merged model: `betas` of the fine-tuned models, `other` outside the layers.

    `plan`: (base layer, model layer) of every layer of the output. `factors`: damping and sharpness.
    """
    theta, rows = [reference.load(p) for p in paths], [rows_of(p, **options) for p in paths]
    plan = plan or [(i, i) for i in range(LAYERS)]
    merged = {}
    for name, value in theta[0].items():
        layer = reference.layer_of(name)
        if layer is None:
            deltas = [t[name] - value for t in theta[1:]]
            merged[name] = value + sum(b * d for b, d in zip(other or betas, deltas, strict=True))
            continue
        for at, (base, model) in enumerate(plan):
            if base != layer or at not in layers:
                continue
            names = [name, *(name.replace(f".{base}.", f".{model}.", 1) for _ in theta[1:])]
            deltas = [t[n] - value for t, n in zip(theta[1:], names[1:], strict=True)]
            if name in rows[0]:
                its = [r[n] for r, n in zip(rows, names, strict=True)]
                turned = [d.T if transposed else d for d in deltas]
                delta = reference.kron(turned, its, betas, **(factors or {}))
                delta = delta.T if transposed else delta
            else:
                delta = sum(b * d for b, d in zip(betas, deltas, strict=True))
            merged[name.replace(f".{base}.", f".{at}.", 1)] = value + delta
    return merged


def assert_same(out, wanted, atol=3e-5, names=None):
    found = reference.load(out)
    assert names is not None or found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=atol, err_msg=name)


def kron(pair, **changes):
    return config_for(pair, "fim_kron", **changes)


def test_as_dense_solutions_of_what_plain_hooks_see(pair, merge):
    out, _ = merge.ok(kron(pair))
    wanted = expected([pair.base, pair.long], [0.5])
    assert_same(out, wanted)
    plain = reference.load(merge.ok(config_for(pair, "fim_ta", parameters={"alpha": 0.5}), out="plain")[0])
    apart = [n for n, v in wanted.items() if not np.allclose(v, plain[n], atol=1e-4)]
    assert sorted(apart) == sorted(n for n in wanted if n.endswith("proj.weight"))
    again, _ = merge.ok(kron(pair), out="again")
    for name in ("model.safetensors", "fim_report.json"):
        assert (out / name).read_bytes() == (again / name).read_bytes()


def test_damping_and_sharpness(pair, merge):
    parameters = {"damping": 0.01, "sharpness": 1.0}
    out, _ = merge.ok(kron(pair, parameters=parameters))
    assert_same(out, expected([pair.base, pair.long], [0.5], factors=parameters))
    assert parameters.items() <= reference.report(out)["settings"].items()


def test_two_fine_tuned_models_with_weights(pair, merge):
    models = [{"model": str(pair.long), "parameters": {"weight": 3}}, {"model": str(pair.third)}]
    parameters = {"alpha_mean": 0.8, "alpha_other": 0.1, "fisher_seq_len": 16, "fisher_samples": 2}
    out, _ = merge.ok(kron(pair, models=models, parameters=parameters))
    paths, options = [pair.base, pair.long, pair.third], {"samples": 2, "seq_len": 16}
    assert_same(out, expected(paths, [0.6, 0.2], other=[0.075, 0.025], **options), atol=1e-4)


@pytest.mark.parametrize(
    "plan", [[(0, 0), (2, 2), (3, 3), (4, 4)], [(0, 0), (1, 1), (1, 1), (2, 2)], [(0, 0), (1, 1), (2, 1), (3, 2)]]
)
def test_slices_that_drop_repeat_and_shift(plan, pair, merge):
    sources = [
        [{"model": str(path), "layer_range": [i, i + 1]} for path, i in zip((pair.base, pair.long), its, strict=True)]
        for its in plan
    ]
    config = kron(pair, slices=[{"sources": s} for s in sources])
    del config["models"]
    out, _ = merge.ok(config)
    assert_same(out, expected([pair.base, pair.long], [0.5], plan=plan, layers=range(len(plan))))
    rows = reference.report(out)["kron"]["models"][0]["layers"]
    assert [(row.get("base_index", row["index"]), row["index"]) for row in rows] == sorted(set(plan))


def test_alpha_by_hand(pair, merge):
    hand = [{"filter": "model.layers.1.", "value": 0.9}, {"filter": "mlp", "value": 0.1}]
    models = [{"model": str(pair.long), "parameters": {"alpha": hand}}]
    out, _ = merge.ok(kron(pair, models=models, parameters={"alpha_mean": 0.4}))
    found = reference.load(out)
    paths = [pair.base, pair.long]
    for beta, layers, part in ((0.9, [1], ""), (0.1, [0, 2, 3, 4], ".mlp."), (0.4, [0, 2, 3, 4], ".self_attn.")):
        for name, value in expected(paths, [beta], layers=layers).items():
            if reference.layer_of(name) is not None and part in name:
                np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=3e-5, err_msg=name)
    (model,) = reference.report(out)["kron"]["models"]
    assert model["layers"][1]["alpha"] == pytest.approx(0.9)
    assert model["alpha_other"] == pytest.approx(np.mean([layer["alpha"] for layer in model["layers"]]))


@pytest.mark.parametrize(("alpha", "source"), [(0.0, "base"), (1.0, "long")])
def test_the_ends_are_the_models(alpha, source, pair, merge):
    out, _ = merge.ok(kron(pair, parameters={"alpha": alpha}))
    found, wanted = (load_file(path / "model.safetensors") for path in (out, getattr(pair, source)))
    for name, value in wanted.items():
        if alpha == 0:
            assert torch.equal(found[name], value)
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_density_gates_and_calibration_come_after_it(pair, merge):
    plain = reference.load(merge.ok(kron(pair))[0])
    parameters = {"density": 0.3, "gate_scale": 0.5, "lambda": 1.2}
    out = reference.load(merge.ok(kron(pair, parameters=parameters), out="changed")[0])
    calibrated = merge.ok(kron(pair, parameters=parameters | {"norm_tolerance": 1e-6}), out="calibrated")[0]
    theta0, theta1 = reference.load(pair.base), reference.load(pair.long)
    for name, value in plain.items():
        scale = 1.2 * (0.5 if "gate_proj" in name else 1)
        moved = theta0[name] + scale * reference.trim(value - theta0[name], 0.3)
        np.testing.assert_allclose(out[name], moved, rtol=1e-4, atol=2e-5, err_msg=name)
        target = np.linalg.norm(theta0[name]) * (1 - scale / 2) + scale / 2 * np.linalg.norm(theta1[name])
        assert np.linalg.norm(reference.load(calibrated)[name]) == pytest.approx(target, rel=1e-5), name


def test_conv1d_is_the_other_way_round(merge, tmp_path):
    base = tiny.build(tiny.config("gpt2"))
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(tiny.tuned(base, 1), tmp_path / "long")]
    config = {"merge_method": "fim_kron", "base_model": str(paths[0]), "models": [{"model": str(paths[1])}]}
    out, _ = merge.ok(config | {"dtype": "float32", "parameters": {"fisher_samples": 1, "fisher_seq_len": 12}})
    found = {name.removeprefix("transformer."): v for name, v in reference.load(out).items()}
    for name, value in expected(paths, [0.5], transposed=True, samples=1, seq_len=12).items():
        np.testing.assert_allclose(found[name.removeprefix("transformer.")], value, rtol=1e-4, atol=5e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts(kind, merge, tmp_path):
    """Each by the tokens that come to it; one that no token reaches by α alone."""
    base = tiny.build(tiny.config(kind, num_hidden_layers=2))
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(tiny.tuned(base, 1), tmp_path / "long")]
    config = {"merge_method": "fim_kron", "base_model": str(paths[0]), "models": [{"model": str(paths[1])}]}
    parameters = {"fisher_samples": 1, "fisher_seq_len": 4}
    out, _ = merge.ok(config | {"dtype": "float32", "parameters": parameters})
    report = reference.report(out)
    idle = {its["model"]: len(its["not_reached"]) for its in report["kron"]["factors"] if its["not_reached"]}
    assert idle
    for model, count in idle.items():
        words = f"{model}: no token came to the experts of {count} matrices"
        assert any(line.startswith(words) for line in report["warnings"]), report["warnings"]
    theta = [transformers.AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (*paths, out)]
    alike = 0  # to α alone
    experts = [name for name in theta[0] if "experts" in name and theta[0][name].ndim == 3 and "bias" not in name]
    assert experts
    for name in experts:
        for base_, tuned, merged in zip(*(t[name] for t in theta), strict=True):
            alike += torch.allclose(merged - base_, 0.5 * (tuned - base_), atol=1e-6)
    assert 0 < alike < sum(len(theta[0][name]) for name in experts)


def test_factors_are_kept_and_shared(pair, merge, monkeypatch):
    counted = []
    original = prepass_kron.measured_factors

    def measured(*args, **options):
        found = original(*args, **options)
        counted.append(found.origin)
        return found

    monkeypatch.setattr(prepass_kron, "measured_factors", measured)
    merge = type(merge)(merge.folder, fresh=False)
    merge.ok(kron(pair), out="first")
    merge.ok(kron(pair, parameters={"alpha_mean": 0.2}), out="second")
    assert [bool(origin) for origin in counted] == [False, False, True, True]
    merge.ok(kron(pair, parameters={"fisher_cache": False}), out="third")
    assert [bool(origin) for origin in counted[4:]] == [False, False]
    merge.ok(kron(pair, parameters={"fisher_seed": 3}), out="fourth")
    assert [bool(origin) for origin in counted[6:]] == [False, False]


BAD = {
    "sharpness": (
        {"sharpness": 1e6},
        "singular, damping included; measure again, raise `damping`, or lower `sharpness`",
    ),
    "mapping": ({"mapping": "anchored"}, "`mapping` has no meaning in fim_kron"),
    "alpha_min": ({"alpha_min": 0.1}, "`alpha_min` has no meaning in fim_kron"),
    "labels": ({"fisher_labels": "sampled"}, "`fisher_labels` has no meaning in fim_kron"),
    "damping": ({"damping": 0}, "`damping` must be a number in (0, 1], found 0"),
    "factors": ({"factors": "both"}, "unknown parameter `factors`"),
    "source": ({"kron_source": "x"}, "unknown parameter `kron_source`"),
    "too much": ({"alpha": 1.2}, "sum up to at most 1, found 1.2"),
    "below nothing": ({"alpha": [{"filter": "q_proj", "value": -0.1}]}, "q_proj.weight: expected coefficients"),
    "weights": ({"weight": 3, "normalize": False}, "sum up to at most 1, found 1.5"),
    "no name": ({"fisher": "a.safetensors,"}, "fisher: expected files of factors, separated by commas"),
    "no file": ({"fisher": "nowhere.safetensors"}, "nowhere.safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_parameters(case, pair, merge):
    parameters, words = BAD[case]
    target, result = merge(kron(pair, parameters=parameters))
    ends_in_one_line(result, words, absent=target)


def test_density_of_one_model_is_refused(pair, merge):
    models = [{"model": str(pair.long), "parameters": {"density": 0.5}}]
    target, result = merge(kron(pair, models=models))
    ends_in_one_line(result, "`density` has no effect on a single model", absent=target)


@pytest.mark.parametrize("method", ["fim_ta", "fim_ties"])
def test_the_other_methods_refuse_its_parameter(method, pair, merge):
    target, result = merge(config_for(pair, method, parameters={"damping": 0.1}))
    ends_in_one_line(result, f"`damping` has no meaning in {method}, only in fim_kron", absent=target)


def test_saved_factors(pair, merge, tmp_path):
    """Files by name, matched to the models; of another model, or of other tokens, they are refused."""

    settings = FisherSettings(samples=2, seq_len=16, seed=5)
    paths = {n: str(tmp_path / f"{n}.safetensors") for n in ("base", "long", "third")}
    for name, path in paths.items():
        measure_factors(getattr(pair, name), path, settings, dtype="float32")
    other = str(tmp_path / "other.safetensors")
    measure_factors(pair.long, other, FisherSettings(samples=2, seq_len=16, seed=6), dtype="float32")
    saved = {"fisher": f"{paths['long']}, {paths['base']}"}
    out, _ = merge.ok(kron(pair, parameters=saved))
    assert_same(out, expected([pair.base, pair.long], [0.5], samples=2, seq_len=16, seed=5))
    assert reference.report(out)["settings"]["fisher_seed"] == 5
    for parameters, *words in (
        ({"fisher": paths["third"]}, "which is none of the merge's models"),
        (saved | {"fisher_seed": 1}, "was measured with seed 5, but the config sets fisher_seed to 1"),
        ({"fisher": f"{paths['base']}, {other}"}, f"{other} is of 2 × 16 random tokens, seed 6, expected the same"),
    ):
        target, result = merge(kron(pair, parameters=parameters), out="refused")
        ends_in_one_line(result, *words, absent=target)


def test_factors_from_the_hub(pair, merge, tmp_path, monkeypatch):
    settings, asked = FisherSettings(samples=2, seq_len=16), []
    for name in ("base", "long"):
        measure_factors(getattr(pair, name), str(tmp_path / f"{name}.safetensors"), settings, dtype="float32")

    def download(repo: str, name: str, revision: str | None, cache_dir: str | None) -> str:
        asked.append((repo, name, revision))
        return str(tmp_path / {"user/base": "base.safetensors"}.get(repo, name))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    merge.ok(kron(pair, parameters={"fisher": "user/base, user/long/long.safetensors@v1"}))
    assert asked == [("user/base", "factors.safetensors", None), ("user/long", "long.safetensors", "v1")]
    target, result = merge(kron(pair, parameters={"fisher": "no/such.safetensors"}), out="missing")
    ends_in_one_line(result, "no/such.safetensors: expected the file of factors, or user/repo", absent=target)


def test_narrow_weights_and_nan(merge, tmp_path):
    base = tiny.build(tiny.config("llama", num_hidden_layers=2))
    paths = [tiny.save(base, tmp_path / "b", torch.bfloat16), tiny.save(tiny.tuned(base, 1), tmp_path / "l")]
    config = {"merge_method": "fim_kron", "base_model": str(paths[0]), "models": [{"model": str(paths[1])}]}
    out, _ = merge.ok(config | {"dtype": "bfloat16"})
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    long = tiny.tuned(base, 1)
    with torch.no_grad():
        long.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    tiny.save(long, tmp_path / "nan")
    target, result = merge(config | {"models": [{"model": str(tmp_path / "nan")}], "dtype": "float32"}, out="nan-out")
    ends_in_one_line(result, str(tmp_path / "nan"), "NaN", absent=target)


def test_what_is_seen(pair, merge):
    out, result = merge.ok(kron(pair))
    found = reference.report(out)["kron"]
    assert [f["model"] for f in found["factors"]] == [str(pair.base), str(pair.long)]
    (model,) = found["models"]
    for i, layer in enumerate(model["layers"]):
        assert (layer["index"], layer["alpha"]) == (i, 0.5)
        assert set(layer["parts"]) == {"attention", "mlp"}
        for part in layer["parts"].values():
            assert 0 < part["least"] < part["mean"] < part["largest"] < 1
            assert part["directions"] > 1
        line = next(line for line in result.output.splitlines() if line.split()[:1] == [str(i)])
        assert f"{layer['parts']['mlp']['largest']:.3f}" in line
        assert len(line) <= 100
    assert "Kronecker factors" in unwrapped(result)
    assert json.dumps(found)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_the_size_of_factors_is_said_before_they_are_recorded(kind, tmp_path):
    base = tiny.build(tiny.config(kind))
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(tiny.tuned(base, 1), tmp_path / "long")]
    config = {"merge_method": "fim_kron", "base_model": str(paths[0]), "models": [{"model": str(paths[1])}]}
    (tmp_path / "config.yml").write_text(json.dumps(config | {"dtype": "float32"}))
    result = run("plan", tmp_path / "config.yml", "--json", tmp_path / "plan.json")
    recorded = json.loads((tmp_path / "plan.json").read_text())["kron"]["factors"]
    for path, factors in zip(paths, recorded, strict=True):
        (said,) = set(re.findall(rf"Recording factors of {path}, about ([\d.]+) MB", result.stderr))
        assert float(said) == pytest.approx(factors["bytes"] / 1e6, rel=0.15)
