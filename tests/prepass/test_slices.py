"""Slices get the coefficients of their source layers, whatever their place in the output."""

import numpy as np
import pytest
import reference
import tiny
import transformers
from merges import config_for, ends_in_one_line

import mergekit_fim


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


def test_the_base_may_stand_anywhere_among_the_sources(pair, merge):
    config = config_of(pair, ((0, 3), (2, 5)))
    first, _ = merge.ok(config, out="first")
    config["slices"][0]["sources"].reverse()
    last, _ = merge.ok(config, out="last")
    rows = [reference.report(out)["models"][0]["layers"] for out in (first, last)]
    assert rows[0] == rows[1]
    assert (first / "model.safetensors").read_bytes() == (last / "model.safetensors").read_bytes()


def test_models_of_different_slices_keep_apart(pair):
    """Each has its own pairs of layers, and its own settings: what is set for one is not looked for in the other."""
    first = slices(pair, ((0, 3), (1, 4)))[0]
    second = slices(pair, (3, 4), models=[pair.third])[0]
    by_hand = [{"filter": "mlp", "value": [0.9, 0.1]}]
    second["sources"][1]["parameters"] = {"weight": 0.5, "alpha": by_hand}
    config = config_of(pair, (0, 3))
    config["slices"] = [first, second]
    found = mergekit_fim.resolve(config).pre_pass
    long, third = found.coefficients[0].models
    assert [(x.base_layer, x.source_layer) for x in long.pairs] == [(0, 1), (1, 2), (2, 3), (3, 3), (4, 4)]
    assert [(x.base_layer, x.source_layer) for x in third.pairs] == [(i, i) for i in range(5)]
    assert long.used_alphas == long.alphas
    changed = [i for i in range(5) if third.used_alphas[i] != third.alphas[i]]
    assert changed == [3]  # the one layer of its slice, at the end of the gradient as in mergekit
    mlp = [name for name in reference.load(pair.base) if name.startswith("model.layers.3.")]
    share = sum("mlp" in name for name in mlp) / len(mlp)
    assert third.used_alphas[3] == pytest.approx(0.1 * share + third.alphas[3] * (1 - share))
    assert [model.weight for model in found.models] == [1.0, 0.5]


def test_a_gradient_by_hand_for_some_of_the_tensors(pair):
    config = config_for(pair, "fim_ta", parameters={"alpha": [{"filter": "mlp", "value": [0.1, 0.9]}]})
    (model,) = mergekit_fim.resolve(config).pre_pass.coefficients[0].models
    names = [name for name in reference.load(pair.base) if name.startswith("model.layers.0.")]
    share = sum("mlp" in name for name in names) / len(names)
    expected = [share * (0.1 + 0.2 * i) + (1 - share) * alpha for i, alpha in enumerate(model.alphas)]
    assert model.used_alphas == pytest.approx(expected)


def test_models_of_other_bases_keep_apart(pair):
    config = config_of(pair, (0, 3))
    other = {"sources": [{"model": str(m), "layer_range": [3, 5]} for m in (pair.third, pair.base)]}
    config["slices"] = [*slices(pair, (0, 3)), other | {"base_model": str(pair.third)}]
    found = mergekit_fim.resolve(config).pre_pass
    assert [str(c.base) for c in found.coefficients] == [str(pair.base), str(pair.third)]
    assert [[str(m.model) for m in c.models] for c in found.coefficients] == [[str(pair.long)], [str(pair.base)]]


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
    report = reference.report(out)
    assert report["base_model"] == str(pair.base)
    assert list(report["fisher_of_other_bases"]) == [str(pair.third)]
    measured = {str(pair.base): report["fisher"]} | report["fisher_of_other_bases"]
    assert [m["base_model"] for m in report["models"]] == [str(pair.base), str(pair.third)]
    for model in report["models"]:
        for row, layer in zip(model["layers"], measured[model["base_model"]]["layers"], strict=True):
            assert row["score"] == pytest.approx(layer["fisher"] * row["task_vector_sq_norm"])


def test_parameters_of_one_slice(pair, merge):
    config = config_of(pair, (0, 2), (2, 5))
    config["slices"][1]["sources"][1]["parameters"] = {"weight": 0.5, "alpha": 0.25}
    out, _ = merge.ok(config)
    alphas = reference.layer_coefficients(pair.base, pair.long)[2]
    theta0, theta1 = reference.load(pair.base), reference.load(pair.long)
    for name, value in reference.load(out).items():
        layer = reference.layer_of(name)
        if layer is not None:
            alpha = alphas[layer] if layer < 2 else 0.125
            expected = theta0[name] + alpha * (theta1[name] - theta0[name])
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=2e-5, err_msg=name)
    # The report tells what each layer got, and that the slices differ.
    (model,) = reference.report(out)["models"]
    assert [row["alpha"] for row in model["layers"]] == pytest.approx([*alphas[:2], 0.25, 0.25, 0.25], abs=1e-4)
    assert (model["weight"], model["alpha"]) == ([1.0, 0.5], [None, 0.25])


def test_shared_parameters_of_one_slice_are_reported(pair, merge):
    config = config_of(pair, (0, 2), (2, 5), method="fim_ties")
    config["slices"][0]["parameters"] = {"gate_scale": 1, "norm_tolerance": 0}
    out, result = merge.ok(config)
    assert reference.report(out)["settings"]["gate_scale"] == [1, 0.7]
    assert "α × [1, 0.7]" in result.output


def test_outside_the_layers_follows_what_the_layers_got(pair, merge):
    """α by hand for the layers alone: the default outside is their mean, not that of coefficients nobody used."""
    alpha = [{"filter": "layers", "value": 0.9}]
    out, _ = merge.ok(config_for(pair, "fim_ta", models=[{"model": str(pair.long), "parameters": {"alpha": alpha}}]))
    (model,) = reference.report(out)["models"]
    assert model["alpha_other"] == pytest.approx(0.9)
    assert [row["alpha"] for row in model["layers"]] == pytest.approx([0.9] * 5)


def test_a_first_slice_of_the_base_alone(pair, merge):
    """mergekit takes what lies outside the layers from the first and the last slice together."""
    config = config_of(pair, (0, 2), (2, 5))
    del config["slices"][0]["sources"][1]
    target, result = merge(config)
    ends_in_one_line(result, "the first and the last must have the same number of sources", absent=target)


def test_first_and_last_slices_of_the_base_alone(pair, merge):
    config = config_of(pair, (0, 1), (1, 4), (4, 5))
    for i in (0, 2):
        del config["slices"][i]["sources"][1]
    out, result = merge.ok(config)
    alphas = reference.layer_coefficients(pair.base, pair.long)[2]
    used = {(layer, layer): alphas[layer] if layer in (1, 2, 3) else 0.0 for layer in range(5)}
    assert_layers(out, pair, list(used), used, 0.0)
    note = "the first and the last slice have no fine-tuned model: embeddings and head stay the base's"
    assert note in reference.report(out)["warnings"]
    _, result = merge.ok(config_of(pair, (0, 1), (1, 5)), out="both")
    assert "have no fine-tuned model" not in result.output


def test_layers_of_two_kinds_are_not_merged(merge, tmp_path):
    kinds = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    base = tiny.build(tiny.config("lfm2", **kinds))
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(tiny.tuned(base, 1), tmp_path / "long")]
    sources = [{"model": str(p), "layer_range": r} for p, r in zip(paths, ([0, 1], [1, 2]), strict=True)]
    config = {"merge_method": "fim_ta", "base_model": str(paths[0]), "slices": [{"sources": sources}]}
    target, result = merge(config | {"dtype": "float32"})
    words = "decoder layer 1 has other tensors than the base's layer 0"
    ends_in_one_line(result, str(paths[1]), words, "pair layers of the same kind", absent=target)


def test_slices_of_an_architecture_that_mergekit_infers(merge, tmp_path):
    """mergekit doesn't know its layer-count key; the merged model's config must have the right one all the same."""
    shape = {"vocab_size": tiny.VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "rotary_dim": 4}
    base = tiny.build(transformers.GPTJConfig(**shape, bos_token_id=None, eos_token_id=None))
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(tiny.tuned(base, 1), tmp_path / "long")]
    sources = [[{"model": str(p), "layer_range": r} for p in paths] for r in ([0, 1], [2, 3])]
    config = {"merge_method": "fim_ta", "base_model": str(paths[0]), "slices": [{"sources": s} for s in sources]}
    out, _ = merge.ok(config | {"dtype": "float32"})
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert model.config.n_layer == 2
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
