"""Slices get the coefficients of their source layers, whatever their place in the output."""

import numpy as np
import pytest
import reference
import tiny
import transformers
from conftest import config_for


def slices(pair, *ranges, models=None):
    """One output slice per range of the base, or per (base range, model range)."""
    out = []
    for item in ranges:
        base, model = item if isinstance(item[0], tuple) else (item, item)
        sources = [{"model": str(pair.base), "layer_range": list(base)}]
        sources += [{"model": str(m), "layer_range": list(model)} for m in models or [pair.long]]
        out.append({"sources": sources})
    return out


def config_of(pair, *ranges, method="fim_ta", **changes):
    config = config_for(pair, method, slices=slices(pair, *ranges)) | changes
    del config["models"]
    return config


def assert_layers(out, pair, plan, alphas, other):
    """`plan`: per output layer, (base layer, model layer); `alphas`: α by such a pair."""
    theta0, theta1, merged = (reference.load(p) for p in (pair.base, pair.long, out))
    seen = set()
    for name, value in merged.items():
        layer = reference.layer_of(name)
        if layer is None:
            expected = theta0[name] + other * (theta1[name] - theta0[name])
        else:
            seen.add(layer)
            b, m = (name.replace(f".{layer}.", f".{source}.", 1) for source in plan[layer])
            expected = theta0[b] + alphas[plan[layer]] * (theta1[m] - theta0[b])
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=2e-5, err_msg=name)
    assert seen == set(range(len(plan)))


@pytest.mark.parametrize(
    ("ranges", "layers"),
    [
        ([(0, 5)], [0, 1, 2, 3, 4]),
        ([(0, 1), (2, 5)], [0, 2, 3, 4]),  # dropped, and what follows shifted
        ([(0, 3), (1, 4), (1, 5)], [0, 1, 2, 1, 2, 3, 1, 2, 3, 4]),  # repeated, more than ten layers deep
        ([(4, 5), (0, 1)], [4, 0]),  # reordered
    ],
)
def test_dropped_repeated_and_reordered_layers(ranges, layers, pair, merge):
    out, _ = merge.ok(config_of(pair, *ranges))
    alphas = reference.layer_coefficients(pair.base, pair.long)[2]
    by_pair = {(layer, layer): alpha for layer, alpha in enumerate(alphas)}
    assert_layers(out, pair, [(layer, layer) for layer in layers], by_pair, float(np.mean(alphas)))
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == len(layers)


def test_layers_merged_into_another_layer_are_measured_as_such(pair, merge):
    """The model's layers 1 to 3 go into the base's 2 to 4: δ and α are those of these pairs."""
    out, result = merge.ok(config_of(pair, (0, 2), ((2, 5), (1, 4))))
    plan = [(0, 0), (1, 1), (2, 1), (3, 2), (4, 3)]
    F = reference.layer_coefficients(pair.base, pair.long)[0]
    theta0, theta1 = reference.load(pair.base), reference.load(pair.long)
    norms = [
        sum(
            float(((theta1[name.replace(f".{b}.", f".{m}.", 1)] - value) ** 2).sum())
            for name, value in theta0.items()
            if reference.layer_of(name) == b
        )
        for b, m in plan
    ]
    alphas = reference.coefficients([F[b] * norm for (b, _), norm in zip(plan, norms, strict=True)])
    assert_layers(out, pair, plan, dict(zip(plan, alphas, strict=True)), float(np.mean(alphas)))
    rows = reference.report(out)["models"][0]["layers"]
    assert [(row.get("base_index", row["index"]), row["index"]) for row in rows] == plan
    assert "merge layers of different numbers" in result.output


def test_a_deep_model_does_not_mix_up_layers_1_and_12(merge, tmp_path):
    base = tiny.build(tiny.config("llama", num_hidden_layers=13))
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(tiny.tuned(base, 1), tmp_path / "long")]
    config = {"merge_method": "fim_ta", "base_model": str(paths[0]), "models": [{"model": str(paths[1])}]}
    out, _ = merge.ok(config | {"dtype": "float32"})
    alphas = reference.layer_coefficients(*paths)[2]
    theta0, theta1 = (reference.load(p) for p in paths)
    for name, value in reference.load(out).items():
        if (layer := reference.layer_of(name)) is not None:
            np.testing.assert_allclose(
                value, theta0[name] + alphas[layer] * (theta1[name] - theta0[name]), rtol=1e-4, atol=2e-5
            )


def test_layer_types_follow_the_slices(merge, tmp_path):
    """Stock mergekit 0.1.5 can't save such a config: transformers wants one layer type per layer."""
    base = tiny.build(tiny.config("gemma2"))
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(tiny.tuned(base, 1), tmp_path / "long")]
    sources = [[{"model": str(p), "layer_range": r} for p in paths] for r in ([0, 1], [2, 5])]
    config = {"merge_method": "fim_ties", "base_model": str(paths[0]), "slices": [{"sources": s} for s in sources]}
    out, _ = merge.ok(config | {"dtype": "float32"})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.layer_types == [base.config.layer_types[i] for i in (0, 2, 3, 4)]


def test_modules_and_a_base_per_slice(pair, merge):
    """`modules:` syntax, and a second base in one slice: each base is measured, each slice gets its own."""
    second = {"base_model": str(pair.third)} | slices(pair, (2, 5))[0]
    second["sources"][0]["model"] = str(pair.third)
    config = config_for(pair, "fim_ta", modules={"default": {"slices": [slices(pair, (0, 2))[0], second]}})
    del config["models"]
    out, _ = merge.ok(config)
    first = reference.layer_coefficients(pair.base, pair.long)[2]
    other = reference.layer_coefficients(pair.third, pair.long)[2]
    bases, theta1 = [reference.load(pair.base), reference.load(pair.third)], reference.load(pair.long)
    for name, value in reference.load(out).items():
        layer = reference.layer_of(name)
        if layer is None:
            continue
        base, alphas = (bases[0], first) if layer < 2 else (bases[1], other)
        expected = base[name] + alphas[layer] * (theta1[name] - base[name])
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=2e-5, err_msg=name)


def test_parameters_of_one_slice(pair, merge):
    config = config_of(pair, (0, 2), (2, 5))
    config["slices"][1]["sources"][1]["parameters"] = {"weight": 0.5, "alpha": 0.25}
    out, _ = merge.ok(config)
    alphas = reference.layer_coefficients(pair.base, pair.long)[2]
    by_pair = {(layer, layer): alphas[layer] if layer < 2 else 0.125 for layer in range(5)}
    theta = reference.load(out)
    assert_layers_of = {k: v for k, v in theta.items() if reference.layer_of(k) is not None}
    theta0, theta1 = reference.load(pair.base), reference.load(pair.long)
    for name, value in assert_layers_of.items():
        layer = reference.layer_of(name)
        expected = theta0[name] + by_pair[layer, layer] * (theta1[name] - theta0[name])
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=2e-5, err_msg=name)
