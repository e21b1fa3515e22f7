"""Models that see, too: of several modules, of which the language model's decoder layers are measured."""

import json

import numpy as np
import pytest
import reference
import tiny
import torch
import yaml
import zoo
from click.testing import CliRunner
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from merges import ends_in_one_line, unwrapped
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mergekit_fim.cli import main
from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.evaluate.answers.engine import Decoding
from mergekit_fim.evaluate.answers.generation import complete
from mergekit_fim.evaluate.answers.loading import load_model as load_for_generation
from mergekit_fim.evaluate.answers.prompts import Prompt
from mergekit_fim.fisher.batched import batched_engine
from mergekit_fim.fisher.loading import Placement, load_to_run
from mergekit_fim.fisher.measure import measure_model
from mergekit_fim.models.inputs import open_model

# By their classes: mergekit's own definition, or one that it infers; what that leaves out of these.
ADDED = {
    "Gemma3ForConditionalGeneration": 48,  # transformers 5 saves the tower under other names than those of the releases
    "Gemma4ForConditionalGeneration": 0,
    "Idefics3ForConditionalGeneration": 0,
    "Llama4ForConditionalGeneration": 0,
    "LlavaForConditionalGeneration": 21,
    "Mistral3ForConditionalGeneration": 0,
    "Qwen2_5_VLForConditionalGeneration": 0,
    "Qwen3_5ForConditionalGeneration": 0,
    "Qwen3_5MoeForConditionalGeneration": 24,
    "Qwen3VLForConditionalGeneration": 0,
}
MODULES = {
    "Gemma3ForConditionalGeneration": ["text_decoder", "multi_modal_projector", "vision_tower"],
    "Gemma4ForConditionalGeneration": ["default", "model.vision_tower.encoder.layers", "model.language_model.layers"],
    "Mistral3ForConditionalGeneration": ["text_decoder", "multi_modal_projector", "vision_tower"],
    "Qwen3_5ForConditionalGeneration": ["default", "model.visual.blocks", "model.language_model.layers"],
}
MISTRAL, QWEN = "Mistral3ForConditionalGeneration", "Qwen3_5ForConditionalGeneration"
SETTINGS = {"fisher_samples": 2, "fisher_seq_len": 8}
AUTO = {"auto": AutoModelForImageTextToText, "layer_of": reference.decoder_layer_of}


def saved(name, folder, **options):
    base = zoo.build(name, **options)
    tunes = [zoo.tuned(base, seed) for seed in (1, 2)]
    return [tiny.save(m, folder / n) for m, n in zip((base, *tunes), ("base", "long", "third"), strict=True)]


def config_of(base, *models, method="fim_ta", modules=(), **parameters) -> dict:
    listed = [{"model": str(model)} for model in models]
    content = {"merge_method": method, "base_model": str(base), "dtype": "float32"}
    content |= {"modules": {name: {"models": listed} for name in modules}} if modules else {"models": listed}
    return content | {"parameters": SETTINGS | parameters}


def is_language(name: str) -> bool:
    return not any(part in name for part in ("visual", "vision", "multi_modal", "connector"))


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ADDED)
def test_the_language_model_is_measured_and_all_is_merged(name, merge, tmp_path):
    """Fisher information by plain autograd, every tensor as the checkpoint has it by the method, and all loads."""
    base, long, _ = saved(name, tmp_path)
    out, _ = merge.ok(config_of(base, long))
    report = reference.report(out)
    assert len(report["added_tensors"]) == ADDED[name], report["added_tensors"]
    assert not any("can't be run layer by layer" in line for line in report["warnings"])
    naive = reference.fisher(base, 2, 8, **AUTO)
    for layer, (parameters, squared_norms) in zip(report["fisher"]["layers"], naive, strict=True):
        assert layer["squared_norms"] == pytest.approx(squared_norms, rel=2e-4)
        assert layer["parameters"] == parameters
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    alphas = {layer["index"]: layer["alpha"] for layer in report["models"][0]["layers"]}
    alphas[None] = report["models"][0]["alpha_other"]
    theta0, theta1 = (AutoModelForImageTextToText.from_pretrained(path).state_dict() for path in (base, long))
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            a, b = (theta[key].double().numpy() for theta in (theta0, theta1))
            layer = reference.decoder_layer_of(key)
            np.testing.assert_allclose(value.numpy(), a + alphas[layer] * (b - a), rtol=1e-4, atol=2e-5, err_msg=key)
            assert not np.array_equal(value.numpy(), a.astype(np.float32)), key


@pytest.mark.parametrize("name", ADDED)
def test_a_merge_by_directions(name, merge, tmp_path):
    """Directions are told apart in the decoder layers alone, and what isn't the language model's may be kept."""
    base, long, _ = saved(name, tmp_path)
    out, _ = merge.ok(config_of(base, long, method="fim_kron", other_modules="base", alpha_other=0.25))
    _, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    theta = [AutoModelForImageTextToText.from_pretrained(path).state_dict() for path in (base, long, out)]
    told_apart = 0
    for key, value in theta[2].items():
        if value.is_floating_point():
            layer = reference.decoder_layer_of(key)
            alpha = 0.0 if not is_language(key) else 0.25 if layer is None else 0.5
            plain = theta[0][key] + alpha * (theta[1][key] - theta[0][key])
            is_plain = torch.allclose(value, plain, rtol=1e-4, atol=2e-5)
            assert is_plain or (layer is not None and value.ndim > 1), key
            told_apart += not is_plain
    assert told_apart > 6


@pytest.mark.parametrize("by_module", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_merge_by_ties_against_the_reference(name, by_module, merge, tmp_path):
    """Coefficients from scratch; gate protection only in the decoder layers, though a tower may have gates, too."""
    base, long, _ = saved(name, tmp_path)
    out, _ = merge.ok(config_of(base, long, method="fim_ties", modules=MODULES[name] if by_module else ()))
    _, _, alphas = reference.layer_coefficients(base, long, samples=2, seq_len=8, **AUTO)
    theta0, theta1, merged = (reference.load(path) for path in (base, long, out))
    assert merged.keys() == theta0.keys()
    for key, value in merged.items():
        layer = reference.decoder_layer_of(key)
        alpha = np.mean(alphas) if layer is None else alphas[layer]
        gate = 0.7 if layer is not None and ".mlp.gate_proj." in key else 1.0
        wanted = reference.merge_tensor("fim_ties", theta0[key], [theta1[key]], [alpha], [1.0], [0.2], gate, 0.05, True)
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("kept", ["base", "tuned"])
@pytest.mark.parametrize("name", MODULES)
def test_other_modules_are_kept_to_the_byte(name, kept, merge, tmp_path):
    base, long, _ = saved(name, tmp_path)
    tensors = load_file(base / "model.safetensors")
    for key in tensors:
        if not is_language(key):
            tensors[key].view(-1)[0] = -0.0  # which no sum gives
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    plain = load_file(merge.ok(config_of(base, long), out="plain")[0] / "model.safetensors")
    out, result = merge.ok(config_of(base, long, other_modules=kept))
    merged, source = (load_file(p / "model.safetensors") for p in (out, base if kept == "base" else long))
    towers = [key for key in merged if not is_language(key)]
    for key, value in merged.items():
        same_as = source if key in towers else plain
        assert value.numpy().tobytes() == same_as[key].numpy().tobytes(), key
    report = reference.report(out)
    assert sum(module[f"kept_from_{kept}"] for module in report["modules"]) == len(towers) > 10
    assert f"{len(towers)} tensors such as {min(towers)} are kept from" in unwrapped(result)
    assert not any(np.array_equal(plain[key], source[key]) for key in towers)


def test_other_modules_by_filter_and_by_module(merge, tmp_path):
    base, long, third = saved(MISTRAL, tmp_path)
    content = config_of(base, long, third, modules=MODULES[MISTRAL])
    content["modules"]["vision_tower"] = {
        "models": [{"model": str(third)}],
        "parameters": {"other_modules": [{"filter": "layers.0.", "value": "tuned"}, {"value": "merge"}]},
    }
    content["modules"]["multi_modal_projector"]["parameters"] = {"other_modules": "base"}
    out, _ = merge.ok(content)
    theta0, theta1, theta2, merged = (reference.load(path) for path in (base, long, third, out))
    one, two = reference.report(out)["models"]
    assert [model["model"] for model in (one, two)] == [str(long), str(third)]
    for key, value in merged.items():
        layer = reference.decoder_layer_of(key)
        a, b = (
            [m["alpha_other"], *(x["alpha"] for x in m["layers"])][0 if layer is None else layer + 1]
            for m in (one, two)
        )
        if key.startswith("multi_modal_projector"):
            wanted = theta0[key]
        elif key.startswith("vision_tower.transformer.layers.0."):
            wanted = theta2[key]
        else:
            a = 0.0 if key.startswith("vision_tower") else a
            wanted = theta0[key] + a * (theta1[key] - theta0[key]) + b * (theta2[key] - theta0[key])
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5, err_msg=key)


def test_by_hand_with_the_tower_kept_nothing_is_measured(merge, tmp_path):
    base, long, _ = saved(MISTRAL, tmp_path)
    content = config_of(base, long, modules=MODULES[MISTRAL], other_modules="tuned")
    content["modules"]["text_decoder"]["models"][0] |= {"parameters": {"alpha": 0.25}}
    content["modules"]["text_decoder"]["models"] = [dict(content["modules"]["text_decoder"]["models"][0])]
    content["modules"]["vision_tower"]["models"] = content["modules"]["multi_modal_projector"]["models"] = [
        {"model": str(long)}
    ]
    out, _ = merge.ok(content)
    assert reference.report(out)["fisher"] is None
    theta0, theta1, merged = (reference.load(path) for path in (base, long, out))
    for key, value in merged.items():
        wanted = theta0[key] + 0.25 * (theta1[key] - theta0[key]) if is_language(key) else theta1[key]
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ADDED)
def test_streamed_is_resident_and_the_tower_stays_on_disk(name, tmp_path):
    path, *_ = saved(name, tmp_path)
    options = MergeOptions(quiet=True)
    LoaderCache().setup(options)
    base = open_model(str(path), None, options)
    settings = FisherSettings(samples=2, seq_len=8)
    found = []
    for streamed in (True, False):
        where = Placement(torch.device("cpu"), spread=False, streamed=streamed)
        rows = name.partition("For")[0] not in ("Gemma4", "Idefics3", "Llama4")  # whose code looks into the embeddings
        loaded = load_to_run(base, "float32", options, where, rows=rows)
        assert all(is_language(key) for key, _ in loaded.model.named_parameters())
        meta = [parameter.is_meta for layer in loaded.layers for parameter in layer.parameters()]
        assert all(meta) if streamed else not any(meta)
        found.append(
            measure_model(
                loaded.model, loaded.layers, settings, weights=loaded.weights, engine=batched_engine, quiet=True
            )
        )
    for one, other in zip(found[0].layers, found[1].layers, strict=True):
        assert one.squared_norms == pytest.approx(other.squared_norms, rel=1e-6)


def test_decoder_layers_in_slices(merge, tmp_path):
    """One twice, under `modules:`: the merged config has the layers that there are, and its own kinds of them."""
    base, long, _ = saved(QWEN, tmp_path)
    content = config_of(base, long, modules=MODULES[QWEN])
    ranges = ([0, 2], [1, 2])
    content["modules"]["model.language_model.layers"] = {
        "slices": [{"sources": [{"model": str(m), "layer_range": r} for m in (base, long)]} for r in ranges]
    }
    out, _ = merge.ok(content)
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    kinds = zoo.config("qwen3_5").text_config.layer_types
    assert model.config.text_config.layer_types == [*kinds, kinds[1]]
    alphas = [layer["alpha"] for layer in reference.report(out)["models"][0]["layers"]]
    theta0, theta1, merged = (reference.load(path) for path in (base, long, out))
    key = "model.language_model.layers.{}.mlp.up_proj.weight"
    wanted = theta0[key.format(1)] + alphas[1] * (theta1[key.format(1)] - theta0[key.format(1)])
    np.testing.assert_allclose(merged[key.format(2)], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", ["merge", "base", "tuned"])
@pytest.mark.parametrize("name", [MISTRAL, QWEN])
def test_the_exported_config_gives_the_same_weights(name, kept, merge, tmp_path):
    base, long, _ = saved(name, tmp_path)
    content = config_of(base, long, other_modules=kept, gate_scale=0.7)
    ours = reference.load(merge.ok(content, out="ours")[0])
    (tmp_path / "config.yml").write_text(yaml.safe_dump(content))
    result = run("export", tmp_path / "config.yml", "-o", tmp_path / "plain.yml", "--quiet")
    assert result.exit_code == 0, result.output
    assert ("kept from the fine-tuned model" in " ".join(result.stderr.split())) is (kept == "tuned")
    stock = yaml.safe_load((tmp_path / "plain.yml").read_text())
    assert set(stock["modules"]) == set(MODULES[name])
    found = reference.load(merge.ok(stock, out="stock")[0])
    assert found.keys() == ours.keys()
    for key, value in ours.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def test_plan_and_fisher_name_the_modules(tmp_path):
    base, long, _ = saved(MISTRAL, tmp_path)
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config_of(base, long, other_modules="base")))
    result = run("plan", tmp_path / "config.yml", "--json", tmp_path / "plan.json", "--quiet")
    said = " ".join(result.stdout.split())
    assert "those of the module text_decoder; outside are also all of multi_modal_projector, vision_tower" in said
    assert "other_modules: 24 tensors such as multi_modal_projector.linear_1.weight are kept from the base" in said
    modules = {module.pop("module"): module for module in json.loads((tmp_path / "plan.json").read_text())["modules"]}
    assert modules["text_decoder"]["decoder_layers"] == 2
    assert modules["text_decoder"]["of_other_modules"] == 0
    assert modules["vision_tower"]["of_other_modules"] == modules["vision_tower"]["kept_from_base"] == 20
    result = run("fisher", base, "-o", tmp_path / "fisher.json", "--samples", "2", "--seq-len", "8", "--quiet")
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "fisher.json").read_text())
    naive = reference.fisher(base, 2, 8, **AUTO)
    assert [layer["parameters"] for layer in measured["layers"]] == [count for count, _ in naive]


def test_a_tied_base_with_an_untied_tune(merge, tmp_path):
    """The head is merged with the embeddings, and both configs of the merged model say that it is its own."""
    name = "Qwen2_5_VLForConditionalGeneration"
    tied = zoo.build(name, tie_word_embeddings=True)
    untied = zoo.tuned(zoo.build(name, tie_word_embeddings=False))
    paths = [tiny.save(tied, tmp_path / "base"), tiny.save(untied, tmp_path / "long")]
    out, _ = merge.ok(config_of(*paths))
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.tie_word_embeddings is False
    alpha = reference.report(out)["models"][0]["alpha_other"]
    theta0, theta1 = (reference.load(path) for path in paths)
    embeddings = theta0["model.embed_tokens.weight"]
    wanted = embeddings + alpha * (theta1["lm_head.weight"] - embeddings)
    np.testing.assert_allclose(model.lm_head.weight.detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_config_keys_that_differ_are_named_one_by_one(merge, tmp_path):
    base, long, _ = saved(QWEN, tmp_path)
    content = json.loads((long / "config.json").read_text())
    content["text_config"]["max_position_embeddings"] = 256
    (long / "config.json").write_text(json.dumps(content))
    out, _ = merge.ok(config_of(base, long))
    (difference,) = reference.report(out)["config_differences"]
    assert (difference["key"], difference["written"]) == ("text_config.max_position_embeddings", 256)
    assert json.loads((out / "config.json").read_text())["text_config"]["max_position_embeddings"] == 256


def as_released(path):
    """Gemma 3's tower under the names that its releases have."""
    tensors = load_file(path / "model.safetensors")
    named = {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in tensors.items()}
    save_file(named, path / "model.safetensors", {"format": "pt"})


def as_transformers_has_it(path):
    """As versions before 5 saved it."""
    model = AutoModelForImageTextToText.from_pretrained(path)
    own = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(own, path / "model.safetensors", {"format": "pt"})


def test_gemma_3_as_it_is_released_is_whole_by_mergekits_definition(merge, tmp_path):
    base, long, _ = saved("Gemma3ForConditionalGeneration", tmp_path, vision_config={"vision_use_head": False})
    for path in (base, long):
        as_released(path)
    out, _ = merge.ok(config_of(base, long))
    assert reference.report(out)["added_tensors"] == []
    assert reference.load(out).keys() == reference.load(base).keys()
    _, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("rename", [as_released, as_transformers_has_it])
@pytest.mark.parametrize("which", ["base", "long"])
def test_models_that_name_their_tensors_otherwise_are_refused(rename, which, merge, tmp_path):
    base, long, _ = saved("Gemma3ForConditionalGeneration", tmp_path)
    rename({"base": base, "long": long}[which])
    out, result = merge(config_of(base, long))
    ends_in_one_line(result, str(tmp_path), "same version of transformers", absent=out)


def test_gemma_3_as_transformers_4_saved_it(merge, tmp_path):
    base, long, _ = saved("Gemma3ForConditionalGeneration", tmp_path)
    for path in (base, long):
        as_transformers_has_it(path)
    out, _ = merge.ok(config_of(base, long))
    assert reference.load(out).keys() == reference.load(base).keys()
    _, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info


REFUSED = {
    "a module that lacks": (
        lambda c, b, t: c["modules"].pop("vision_tower"),
        ["modules", "multi_modal_projector, text_decoder, vision_tower", "no vision_tower"],
    ),
    "a module of another name": (
        lambda c, b, t: c["modules"].update(vision=c["modules"].pop("vision_tower")),
        ["modules", "found vision"],
    ),
    "slices": (
        lambda c, b, t: c.update(
            modules=None,
            slices=[{"sources": [{"model": m, "layer_range": [0, 2]} for m in (b, t)]}],
        ),
        ["slices", "multi_modal_projector, text_decoder, vision_tower", "`modules:`"],
    ),
    "a tower in slices": (
        lambda c, b, t: c["modules"].update(
            vision_tower={"slices": [{"sources": [{"model": m, "layer_range": [0, 1]} for m in (b, t)]}]}
        ),
        ["modules.vision_tower.slices[0]", "all 2 layers", "[0, 1]"],
    ),
    "two to keep from": (
        lambda c, b, t: (
            c["modules"]["vision_tower"].update(models=[{"model": t}, {"model": t.replace("long", "third")}]),
            c["parameters"].update(other_modules="tuned"),
        ),
        ["other_modules", "vision_tower.", "one fine-tuned model", "found 2"],
    ),
    "a value that there isn't": (
        lambda c, b, t: c["parameters"].update(other_modules="long"),
        ["the top-level parameters", "`other_modules`", "`merge`, `base` or `tuned`", "'long'"],
    ),
    "a gradient": (
        lambda c, b, t: c["parameters"].update(other_modules=["base", "tuned"]),
        ["the top-level parameters", "`other_modules`", "gradient"],
    ),
    "a misspelling": (
        lambda c, b, t: c["parameters"].update(other_module="base"),
        ["the top-level parameters", "`other_module`", "did you mean `other_modules`?"],
    ),
    "for one model": (
        lambda c, b, t: c["modules"]["vision_tower"].update(
            models=[{"model": t, "parameters": {"other_modules": "base"}}]
        ),
        ["modules.vision_tower.models[0]", "`other_modules`", "no effect on a single model"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused(case, merge, tmp_path):
    change, words = REFUSED[case]
    base, long, _ = saved(MISTRAL, tmp_path)
    content = config_of(base, long, modules=MODULES[MISTRAL])
    change(content, str(base), str(long))
    out, result = merge({key: value for key, value in content.items() if value is not None})
    ends_in_one_line(result, *words, absent=out)


def test_what_mergekit_cannot_merge_is_refused_by_name(merge, tmp_path):
    """Its definition of Qwen2-VL is of transformers before 5."""
    base, long, _ = saved("Qwen2VLForConditionalGeneration", tmp_path)
    words = ("Qwen2VLForConditionalGeneration", "num_hidden_layers", "mergekit")
    out, result = merge(config_of(base, long))
    ends_in_one_line(result, *words, absent=out)
    for arguments in (["fisher", base, "-o", tmp_path / "f.json"], ["delta", base, long]):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        ends_in_one_line(result, *words, absent=tmp_path / "f.json")


def test_without_other_modules_the_parameter_has_no_effect_and_says_so(pair, merge):
    out, result = merge.ok(config_of(pair.base, pair.long, other_modules="base"))
    assert "other_modules has no effect" in unwrapped(result)
    plain, result = merge.ok(config_of(pair.base, pair.long), out="plain")
    assert "other_modules" not in unwrapped(result)
    found, expected = reference.load(out), reference.load(plain)
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", MODULES)
def test_it_answers_in_a_sweep(name, tmp_path):
    """As transformers' whole model does by itself."""
    base, *_ = saved(name, tmp_path)
    tokenizer = tiny.tokenizer()
    model = load_for_generation("base", str(base), tokenizer, MergeOptions(quiet=True), torch.float32)
    prompts = [Prompt("p", i, 0, text, False) for i, text in enumerate(("ab", "1 + 1"))]
    found = {prompt.text: completion for prompt, completion in complete(model, prompts, Decoding(4))}
    assert found.keys() == {prompt.text for prompt in prompts}
    whole = AutoModelForImageTextToText.from_pretrained(base)
    for text, completion in found.items():
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        out = whole.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)
        written = [token for token in out[0, ids.shape[1] :].tolist() if token not in model.stop]
        assert completion.text == tokenizer.decode(written, skip_special_tokens=True)
