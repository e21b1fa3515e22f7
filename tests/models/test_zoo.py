"""Models of today, made by the builder that makes all of transformers' (`make architectures`): measured and merged."""

import numpy as np
import pytest
import reference
import tiny
import torch
import transformers
import zoo
from environments import ROOT
from kinds import ADDED
from merges import unwrapped

from mergekit_fim.measurements.record import Experts

WHOLE = ("ctrl", "xlnet", "xlstm")
SETTINGS = {"fisher_samples": 2, "fisher_seq_len": 8}


def config_of(base, long, **parameters) -> dict:
    models = [{"model": str(long)}]
    return {
        "merge_method": "fim_ta",
        "base_model": str(base),
        "models": models,
        "dtype": "float32",
        "parameters": SETTINGS | parameters,
    }


@pytest.mark.parametrize("name", ADDED)
def test_a_model_is_measured_and_merged_whole(name, merge, tmp_path):
    """By plain autograd, and by what the method says for each layer's α, tensor by tensor."""
    base = zoo.build(name)
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(zoo.tuned(base), tmp_path / "long")]
    out, result = merge.ok(config_of(*paths))
    report = reference.report(out)
    assert len(report["added_tensors"]) == ADDED[name], report["added_tensors"]
    assert ("merged beyond mergekit's definition" in unwrapped(result)) is bool(ADDED[name])
    assert any("can't be run layer by layer" in line for line in report["warnings"]) is (name in WHOLE)

    naive = reference.fisher(paths[0], SETTINGS["fisher_samples"], SETTINGS["fisher_seq_len"])
    layers = report["fisher"]["layers"]
    assert len(layers) == len(naive) == base.config.get_text_config().num_hidden_layers
    for layer, (parameters, squared_norms) in zip(layers, naive, strict=True):
        assert layer["squared_norms"] == pytest.approx(squared_norms, rel=2e-4)
        assert layer["parameters"] == parameters

    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(out, output_loading_info=True)
    assert not any(info.values()), info
    alphas: dict = {layer["index"]: layer["alpha"] for layer in report["models"][0]["layers"]}
    alphas[None] = report["models"][0]["alpha_other"]
    theta0, theta1 = (load(path).state_dict() for path in paths)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            a, b = (theta[key].double().numpy() for theta in (theta0, theta1))
            wanted = a + alphas[reference.layer_of(key)] * (b - a)
            np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-4, atol=2e-5, err_msg=key)
            assert not np.array_equal(value.numpy(), a.astype(np.float32)), key
    if name not in ("bamba", "granitemoehybrid", "xlstm"):  # as the base, these can't: transformers 5.23
        generated = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1, min_new_tokens=1, do_sample=False)
        assert generated.shape == (1, 4)


@pytest.mark.parametrize("name", ADDED)
def test_a_model_is_merged_by_directions(name, merge, tmp_path):
    """What has no factors gets α, and nothing is lost."""
    base = zoo.build(name)
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(zoo.tuned(base), tmp_path / "long")]
    out, _ = merge.ok(config_of(*paths) | {"merge_method": "fim_kron"})
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(out, output_loading_info=True)
    assert not any(info.values()), info
    theta0, theta1 = (load(path).state_dict() for path in paths)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            assert value.isfinite().all(), key
            if value.ndim < 2 or reference.layer_of(key) is None:
                plain = theta0[key] + 0.5 * (theta1[key] - theta0[key])
                torch.testing.assert_close(value, plain, rtol=1e-4, atol=2e-5, msg=key)
    assert reference.report(out)["kron"]["models"][0]["layers"]


def test_slices_take_what_is_added_along(merge, tmp_path):
    """The layer with experts twice: each of the two has those of its source, by its source's α."""
    base = zoo.build("deepseek_v3")
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(zoo.tuned(base), tmp_path / "long")]
    slices = [{"sources": [{"model": str(path), "layer_range": r} for path in paths]} for r in ([0, 2], [1, 2])]
    config = {key: value for key, value in config_of(*paths).items() if key != "models"}
    out, _ = merge.ok(config | {"slices": slices})
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    layers = model.model.layers
    assert len(layers) == 3
    for name, value in layers[1].state_dict().items():
        torch.testing.assert_close(layers[2].state_dict()[name], value)
    theta0, theta1 = (reference.load(path) for path in paths)
    alpha = reference.report(out)["models"][0]["layers"][1]["alpha"]
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    wanted = theta0[name] + alpha * (theta1[name] - theta0[name])
    np.testing.assert_allclose(layers[2].mlp.experts.down_proj[3].detach().numpy(), wanted, rtol=1e-4, atol=2e-5)


def test_experts_that_no_token_reaches_are_reported(merge, tmp_path):
    """Expert 2 is never chosen; what was kept of a measurement says so again."""
    base = zoo.build("deepseek_v3")
    with torch.no_grad():
        base.model.layers[1].mlp.gate.e_score_correction_bias[2] = -100
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(zoo.tuned(base, scale=1e-3), tmp_path / "long")]
    again = type(merge)(tmp_path, fresh=False)
    config = config_of(*paths, fisher_samples=8)
    for merging in (merge, again):
        out, result = merging.ok(config)
        report = reference.report(out)
        layers = report["fisher"]["layers"]
        assert "experts" not in layers[0]
        assert (layers[1]["experts"], layers[1]["experts_not_reached"]) == (4, [2])
        assert "1 of 4 were reached by no random token (most in decoder layer 1: 1)" in unwrapped(result)
    assert "kept from an earlier measurement" in unwrapped(result)

    naive = type(base).from_pretrained(paths[0])
    ids = torch.randint(0, tiny.VOCAB, (8, 8), generator=torch.Generator().manual_seed(0))
    naive(input_ids=ids, labels=ids).loss.backward()
    reached = [bool(grad.any()) for grad in naive.model.layers[1].mlp.experts.down_proj.grad]
    assert reached == [True, True, False, True]


def test_experts_are_those_of_all_tokens_together():
    """Of several processes, each with its own sequences."""
    assert Experts.together([Experts(4, (0, 1, 2)), None, Experts(4, (1, 2, 3))]) == Experts(4, (1, 2))
    assert Experts.together([None]) is None


def test_every_model_of_transformers_is_in_the_table():
    """Made by `make architectures`; which models there are is transformers' to say."""
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = text.split("make architectures: begin -->")[1].split("<!-- make architectures: end")[0]
    for name in ADDED:
        assert f"`{name}`" in rows, name
