"""The merged model loads as what was merged, and the report says what was written."""

import json

import numpy as np
import pytest
import reference
import tiny
import tokenizers
import torch
import transformers
from merges import config_for
from safetensors.torch import load_file, save_file


def build_pair(folder, base_changes, long_changes, kind="qwen2"):
    base = tiny.build(tiny.config(kind, **base_changes))
    long = tiny.tuned(base, 1, cfg=tiny.config(kind, **base_changes | long_changes))
    return tiny.save(base, folder / "base"), tiny.save(long, folder / "long")


def config_of(base, long, method="fim_ties", **changes):
    return {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(long)}],
        "dtype": "float32",
    } | changes


def loaded(out):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
def test_the_papers_pair_tied_base_untied_long(method, merge, tmp_path):
    """As Qwen2.5-Math-1.5B (tied, context 4096) and DeepSeek-R1-Distill-Qwen-1.5B (untied, context 131072)."""
    base, long = build_pair(
        tmp_path,
        {"tie_word_embeddings": True, "max_position_embeddings": 4096},
        {"tie_word_embeddings": False, "max_position_embeddings": 131072},
    )
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    out, result = merge.ok(config_of(base, long, method))
    config = json.loads((out / "config.json").read_text())
    assert config["max_position_embeddings"] == 131072
    model = loaded(out)
    assert model.config.tie_word_embeddings is False
    # The head in memory is the merged one: the base's embedding moved towards the long model's head.
    theta0, theta1 = reference.load(base)["model.embed_tokens.weight"], reference.load(long)["lm_head.weight"]
    alpha = reference.report(out)["models"][0]["alpha_other"]
    ties = method == "fim_ties"
    expected = reference.merge_tensor(method, theta0, [theta1], [alpha], [1], [0.2], 1, 0.05 if ties else 0, ties)
    np.testing.assert_allclose(model.lm_head.weight.detach().numpy(), expected, rtol=1e-4, atol=2e-5)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    for name, value in load_file(out / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], value), name

    differences = {d["key"]: d for d in reference.report(out)["config_differences"]}
    assert differences["tie_word_embeddings"] == {
        "key": "tie_word_embeddings",
        "values": {str(base): True, str(long): False},
        "written": False,
    }
    assert differences["max_position_embeddings"]["written"] == 131072
    assert "config key tie_word_embeddings differs" in result.output


def test_untied_base_tied_long(merge, tmp_path):
    base, long = build_pair(tmp_path, {"tie_word_embeddings": False}, {"tie_word_embeddings": True})
    out, _ = merge.ok(config_of(base, long, "fim_ta"))
    model = loaded(out)
    theta0, theta1 = reference.load(base)["lm_head.weight"], reference.load(long)["model.embed_tokens.weight"]
    alpha = reference.report(out)["models"][0]["alpha_other"]
    found = model.lm_head.weight.detach().numpy()
    np.testing.assert_allclose(found, theta0 + alpha * (theta1 - theta0), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("stored", ["not stored", "a copy", "another"])
def test_a_head_stored_beside_a_tied_config(stored, merge, tmp_path):
    base, long = build_pair(tmp_path, {"tie_word_embeddings": True}, {})
    if stored != "not stored":
        for path in (base, long):
            tensors = load_file(path / "model.safetensors")
            head = tensors["model.embed_tokens.weight"].clone()
            tensors["lm_head.weight"] = head if stored == "a copy" else head + 1
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    out, _ = merge.ok(config_of(base, long))
    model = loaded(out)
    own = model.lm_head.weight is not model.model.embed_tokens.weight
    assert own is (stored == "another")
    assert model.config.tie_word_embeddings is not own
    for name, value in load_file(out / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], value), name


def test_the_context_stays_the_bases_where_rotary_parameters_differ(merge, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e6}
    base, long = build_pair(tmp_path, {}, {"max_position_embeddings": 512, "rope_parameters": rope})
    out, result = merge.ok(config_of(base, long))
    assert loaded(out).config.max_position_embeddings == 128
    assert "config key rope_parameters differs" in result.output


def test_a_longer_base_keeps_its_context(merge, tmp_path):
    base, long = build_pair(tmp_path, {"max_position_embeddings": 512}, {"max_position_embeddings": 128})
    out, _ = merge.ok(config_of(base, long))
    assert loaded(out).config.max_position_embeddings == 512


def test_vocabularies_that_mergekit_aligns(merge, tmp_path):
    base = tiny.build(tiny.config("llama"))
    long = tiny.build(tiny.config("llama", vocab_size=101), 1)
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(long, tmp_path / "long")]
    target, result = merge(config_of(*paths))
    assert result.exit_code == 1
    assert "tokenizer: {source: base}" in result.output
    assert not target.exists()
    out, result = merge.ok(config_of(*paths), "--unsafe-truncate-embeddings", out="truncated")
    assert loaded(out).config.vocab_size == tiny.VOCAB
    assert "n/a" in result.output  # the task vector outside the layers
    swapped, _ = merge.ok(config_of(*reversed(paths)), "--unsafe-truncate-embeddings", out="swapped")
    assert loaded(swapped).config.vocab_size == tiny.VOCAB


@pytest.mark.parametrize("setting", [{"tokenizer": {"source": "base"}}, {"tokenizer_source": "union"}])
def test_tokenizers_that_mergekit_aligns(setting, merge, tmp_path):
    paths = [tmp_path / "base", tmp_path / "long"]
    for seed, (path, size) in enumerate(zip(paths, (tiny.VOCAB, 101), strict=True)):
        tiny.save(tiny.build(tiny.config("llama", vocab_size=size), seed), path)
        words = {f"w{i}": i for i in range(size)}
        tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="w0").save_pretrained(path)
    out, result = merge.ok(config_of(*paths, "fim_ta") | setting)
    rows = tiny.VOCAB if "tokenizer" in setting else 101
    model = loaded(out)
    assert model.config.vocab_size == rows
    assert "config key vocab_size" not in result.output
    # Rows that both have are merged, a row that only the long model has is its own.
    alpha = reference.report(out)["models"][0]["alpha_other"]
    theta0, theta1 = (reference.load(p)["model.embed_tokens.weight"] for p in paths)
    expected = theta0 + alpha * (theta1[: tiny.VOCAB] - theta0)
    found = model.model.embed_tokens.weight.detach().numpy()
    np.testing.assert_allclose(found[: tiny.VOCAB], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_without_greek(encoding, pair, merge, monkeypatch):
    import io
    import sys

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    target = merge.folder / "out"
    run_merge(MergeConfiguration.model_validate(config_for(pair)), str(target), MergeOptions(copy_tokenizer=False))
    assert (target / "fim_report.json").exists()


def test_a_tied_head_is_counted_once(merge, tmp_path):
    base, long = build_pair(tmp_path, {"tie_word_embeddings": True}, {})
    _, result = merge.ok(config_of(base, long))
    theta0, theta1 = reference.load(base), reference.load(long)
    norm = sum(((theta1[n] - theta0[n]) ** 2).sum() for n in theta0 if reference.layer_of(n) is None) ** 0.5
    line = next(line for line in result.output.splitlines() if line.split()[:1] == ["outside"])
    assert line.split()[1] == f"{norm:.3g}"


OPTIONS = ["--trust-remote-code", "--low-cpu-memory", "--async-write", "--lazy-unpickle", "--read-to-gpu", "-v"]


def test_other_options_of_mergekits(pair, merge, tmp_path):
    plain, _ = merge.ok(config_for(pair))
    out, _ = merge.ok(config_for(pair), *OPTIONS, "--transformers-cache", str(tmp_path / "cache"), out="options")
    assert (out / "fim_report.json").read_bytes() == (plain / "fim_report.json").read_bytes()
    found, expected = reference.load(out), reference.load(plain)
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


def test_identical_models(pair, merge, caplog):
    out, _ = merge.ok(config_for(pair, models=[{"model": str(pair.base) + "/."}]))
    report = reference.report(out)
    assert [layer["alpha"] for layer in report["models"][0]["layers"]] == [1.0] * 5
    assert "does not differ from the base in any decoder layer" in caplog.text
    assert report["warnings"]
    for name, value in reference.load(out).items():
        np.testing.assert_array_equal(value, reference.load(pair.base)[name])


def test_one_layer_without_a_task_vector(pair, merge, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(pair.long)
    base = transformers.AutoModelForCausalLM.from_pretrained(pair.base)
    model.model.layers[2].load_state_dict(base.model.layers[2].state_dict())
    out, _ = merge.ok(config_for(pair, models=[{"model": str(tiny.save(model, tmp_path / "long"))}]))
    rows = reference.report(out)["models"][0]["layers"]
    assert rows[2]["task_vector_sq_norm"] == 0
    assert rows[2]["alpha"] == 1.0
    F, norms, _ = reference.layer_coefficients(pair.base, pair.long)
    rest = [0, 1, 3, 4]
    expected = reference.coefficients([F[i] * norms[i] for i in rest])
    assert [rows[i]["alpha"] for i in rest] == pytest.approx(list(expected), abs=1e-4)
    assert reference.report(out)["models"][0]["alpha_other"] == pytest.approx(np.mean(expected), abs=1e-4)


def test_the_report_of_three_models_fits_the_screen(pair, merge):
    names = [str(pair.long), str(pair.third), f"{pair.long}/."]
    out, result = merge.ok(config_for(pair, models=[{"model": name} for name in names]))
    table = [line for line in result.output.splitlines() if not line.startswith(("-", "Fisher"))]
    assert max(len(line) for line in table) <= 100
    assert len([line for line in table if line.split()[:1] == ["0"]]) == 2  # two models side by side, one below
    assert [m["model"] for m in reference.report(out)["models"]] == names
