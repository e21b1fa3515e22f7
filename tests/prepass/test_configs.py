"""The features of a merge config and of mergekit's options: the weights that come out, for each and in combination.

docs/promises.md has the table of which test covers what; what test_merge, test_slices and test_output cover isn't here.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import tiny
import tokenizers
import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit.scripts.multimerge import main as mergekit_multi
from merges import config_for
from safetensors.torch import load_file

LAYERS = 5


def by_layer(alphas, other: float) -> list[dict]:
    """One value per layer and one for the rest, as mergekit's filters."""
    return [{"filter": f"model.layers.{i}.", "value": float(a)} for i, a in enumerate(alphas)] + [{"value": other}]


def assert_close(out: Path | dict, expected: dict[str, np.ndarray], rtol=1e-4, atol=2e-5):
    found = out if isinstance(out, dict) else reference.load(out)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=atol, err_msg=name)


def assert_stock(merge, out: Path, alphas, other: float, config: dict, *options: str):
    """The same as stock task_arithmetic with the layers' coefficients, from elsewhere, as its weights."""
    weights = {"parameters": {"weight": by_layer(alphas, other)}}
    stock = json.loads(json.dumps(config)) | {"merge_method": "task_arithmetic"}
    for module in (stock, *stock.get("modules", {}).values()):
        for model in module.get("models", []):
            model |= weights
    theirs, _ = merge.ok(stock, *options, out="stock")
    assert_close(by_token(out), by_token(theirs))


def by_token(path: Path) -> dict[str, np.ndarray]:
    """A model's tensors, the vocabulary's rows in alphabetical order: mergekit numbers new tokens as it happens."""
    tensors = reference.load(path)
    if (path / "tokenizer.json").exists():
        ids = [i for _, i in sorted(transformers.AutoTokenizer.from_pretrained(path).get_vocab().items())]
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            rest = sorted(set(range(len(tensors[name]))) - set(ids))  # padding
            tensors[name] = tensors[name][ids + rest]
    return tensors


def test_modules_with_models(pair, merge):
    plain, _ = merge.ok(config_for(pair, "fim_ta"))
    config = config_for(pair, "fim_ta", modules={"default": {"models": [{"model": str(pair.long)}]}})
    del config["models"]
    out, _ = merge.ok(config, out="modules")
    assert (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    alphas = reference.layer_coefficients(pair.base, pair.long)[2]
    assert_stock(merge, out, alphas, float(np.mean(alphas)), config)
    # Parameters of the module stand above the config's, and below the model's.
    config["parameters"] = {"weight": 3.0, "lambda": 0.1}
    config["modules"]["default"] |= {"parameters": {"weight": 0.5, "lambda": 0.9}}
    weighted, _ = merge.ok(config, out="weighted")
    theta0 = reference.load(pair.base)
    moved = reference.load(out)
    assert_close(weighted, {name: value + 0.45 * (moved[name] - value) for name, value in theta0.items()})


# Tokenizers: word i of one model isn't word i of the other.
SIZES = {"base": 97, "long": 101, "third": 89}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory) -> dict[str, Path]:
    """Three models that know other words, some of them the same, in another order."""
    folder = tmp_path_factory.mktemp("vocabularies")
    paths = {}
    for seed, (name, size) in enumerate(SIZES.items()):
        model = tiny.build(tiny.config("llama", vocab_size=size), seed)
        paths[name] = tiny.save(model, folder / name)
        words = {f"w{(7 * seed + i) % 110}": i for i in range(size - 1)} | {"<unk>": size - 1}
        tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>").save_pretrained(paths[name])
    return paths


TOKENIZERS = {
    "base": lambda p: {"tokenizer": {"source": "base"}},
    "union": lambda p: {"tokenizer": {"source": "union"}},
    "a model": lambda p: {"tokenizer": {"source": str(p["long"])}},
    "a third model": lambda p: {"tokenizer": {"source": str(p["third"])}},
    "padded": lambda p: {"tokenizer": {"source": "union", "pad_to_multiple_of": 16}},
    "a token of a model's": lambda p: {
        "tokenizer": {"source": "base", "tokens": {"w50": {"source": str(p["long"]), "force": True}}}
    },
    "tokenizer_source: base": lambda p: {"tokenizer_source": "base"},
    "tokenizer_source: union": lambda p: {"tokenizer_source": "union"},
    "tokenizer_source: a model": lambda p: {"tokenizer_source": str(p["long"])},
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers(case, vocabularies, merge):
    """The layers' α are those of the checkpoints; rows are aligned as by mergekit itself."""
    config = {
        "merge_method": "fim_ta",
        "base_model": str(vocabularies["base"]),
        "models": [{"model": str(vocabularies["long"])}],
        "dtype": "float32",
    } | TOKENIZERS[case](vocabularies)
    out, _ = merge.ok(config)
    alphas = layers_alone(vocabularies["base"], vocabularies["long"])
    rows = reference.report(out)["models"][0]["layers"]
    assert [row["alpha"] for row in rows] == pytest.approx(list(alphas), abs=1e-4)
    assert_stock(merge, out, alphas, float(np.mean(alphas)), config)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.vocab_size == model.model.embed_tokens.weight.shape[0]
    assert model.config.vocab_size >= len(transformers.AutoTokenizer.from_pretrained(out))


def layers_alone(base: Path, long: Path):
    """`reference.layer_coefficients` where the vocabularies, which that compares too, are of different sizes."""
    measured = reference.fisher(base)
    F = [np.mean(squared) / count for count, squared in measured]
    theta0, theta1 = reference.load(base), reference.load(long)
    norms = [
        sum(((theta1[n] - v) ** 2).sum() for n, v in theta0.items() if reference.layer_of(n) == layer)
        for layer in range(len(F))
    ]
    return reference.coefficients([f * d for f, d in zip(F, norms, strict=True)])


@pytest.mark.parametrize("names", [("base", "long"), ("long", "base"), ("base", "third")])
def test_truncated_embeddings(names, vocabularies, merge):
    base, long = (vocabularies[name] for name in names)
    config = {"merge_method": "fim_ta", "base_model": str(base), "models": [{"model": str(long)}], "dtype": "float32"}
    options = ["--unsafe-truncate-embeddings"]
    out, _ = merge.ok(config, *options)
    alphas = layers_alone(base, long)
    assert_stock(merge, out, alphas, float(np.mean(alphas)), config, *options)
    size = min(SIZES[name] for name in names)
    theta0, theta1 = (reference.load(p)["model.embed_tokens.weight"][:size] for p in (base, long))
    found = reference.load(out)["model.embed_tokens.weight"]
    np.testing.assert_allclose(found, theta0 + np.mean(alphas) * (theta1 - theta0), rtol=1e-4, atol=2e-5)


# dtypes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [  # stored base, stored long, dtype, out_dtype
    (BF16, FP16, None, None),
    (BF16, FP32, None, None),
    (FP32, BF16, None, None),
    (FP16, BF16, None, "float32"),
    (BF16, FP32, "bfloat16", None),
    (BF16, FP16, "float32", None),
    (BF16, FP32, "float32", "bfloat16"),
    (FP32, FP32, "float16", None),
    (BF16, BF16, "float64", "float16"),
    (BF16, BF16, "torch.float32", None),
]


@pytest.mark.parametrize(("stored_base", "stored_long", "dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize("method", ["fim_ta", "fim_ties"])
def test_dtypes(method, stored_base, stored_long, dtype, out_dtype, merge, tmp_path, monkeypatch):
    """Every tensor is read in `dtype`, else as stored; the result is in that, or in what holds both."""
    monkeypatch.setattr(
        "mergekit_fim.fisher.loading.running_dtype", lambda wanted, device: torch.promote_types(wanted, FP32)
    )
    base = tiny.build(tiny.config("llama"))
    long = tiny.tuned(base, 1, scale=0.05)
    # Nothing is trimmed: of the 16-bit entries that share the magnitude where it ends, any may be kept.
    config = {"merge_method": method, "models": [{"model": str(tmp_path / "long"), "parameters": {"density": 1.0}}]}
    config |= {"base_model": str(tmp_path / "base")}
    config |= {k: v for k, v in (("dtype", dtype), ("out_dtype", out_dtype)) if v is not None}
    tiny.save(base, tmp_path / "base", stored_base)
    tiny.save(long, tmp_path / "long", stored_long)
    out, _ = merge.ok(config)

    read = getattr(torch, dtype.removeprefix("torch.")) if dtype else None
    result = read or torch.promote_types(stored_base, stored_long)
    final = getattr(torch, out_dtype) if out_dtype else result
    theta0, theta1 = ({k: v.to(read or v.dtype) for k, v in load(tmp_path / n).items()} for n in ("base", "long"))
    saved = {v.dtype for v in load(out).values()}
    assert saved == {final}
    # The same from models that are stored as they were read.
    for name, tensors in (("read0", theta0), ("read1", theta1)):
        model = transformers.AutoModelForCausalLM.from_config(base.config).double()
        model.load_state_dict({k: v.double() for k, v in tensors.items()})
        tiny.save(model, tmp_path / name)
    wide = torch.float64 if read is torch.float64 else FP32
    alphas = reference.layer_coefficients(tmp_path / "read0", tmp_path / "read1", dtype=wide)[2]
    rows = reference.report(out)["models"][0]["layers"]
    assert [row["alpha"] for row in rows] == pytest.approx(list(alphas), abs=1e-3)
    ties = method == "fim_ties"
    digits = max(torch.finfo(t).eps for t in (result, final))
    for name, value in load(out).items():
        layer = reference.layer_of(name)
        alpha = np.mean(alphas) if layer is None else alphas[layer]
        gate = 0.7 if ties and "gate_proj" in name else 1.0
        wanted = reference.merge_tensor(
            *(method, theta0[name].double().numpy(), [theta1[name].double().numpy()], [alpha], [1], [1.0], gate),
            *(0.05 if ties else 0.0, ties),
        )
        atol = digits * np.abs(wanted).max() + 2e-5
        np.testing.assert_allclose(value.double().numpy(), wanted, rtol=digits + 1e-4, atol=atol, err_msg=name)


def load(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


# Files


def stored(source: Path, target: Path, layout: str) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    if layout == "shards":
        return tiny.save(model, target, max_shard_size="60KB")
    model.config.save_pretrained(target)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    names = list(tensors)
    if layout == "bin":
        torch.save(tensors, target / "pytorch_model.bin")
        return target
    weight_map = {}
    for i in range(3):
        file = f"pytorch_model-{i + 1:05d}-of-00003.bin"
        torch.save({name: tensors[name] for name in names[i::3]}, target / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


@pytest.mark.parametrize("lazy", [[], ["--lazy-unpickle"]])
@pytest.mark.parametrize("layout", ["shards", "bin", "bins"])
def test_layouts_of_all_the_models(layout, lazy, pair, merge, tmp_path):
    """The base too, which is measured layer by layer from its files.

    Where its weights lie in memory is then another matter, and with it the last digits of matrix products.
    """
    plain, _ = merge.ok(config_for(pair))
    base, long = (stored(p, tmp_path / p.name, layout) for p in (pair.base, pair.long))
    assert len(list(base.glob("*.safetensors")) + list(base.glob("*.bin"))) == {"bin": 1, "bins": 3}.get(layout, 4)
    out, _ = merge.ok(config_for(pair, base_model=str(base), models=[{"model": str(long)}]), *lazy, out="other")
    assert_close(out, reference.load(plain), rtol=1e-5, atol=1e-6)
    alphas = reference.layer_coefficients(pair.base, pair.long)[2]
    rows = reference.report(out)["models"][0]["layers"]
    assert [row["alpha"] for row in rows] == pytest.approx(list(alphas), abs=1e-4)


OPTIONS = {
    "--async-write": ["--async-write", "--out-shard-size", "60k", "--write-threads", "3"],
    "--low-cpu-memory": ["--low-cpu-memory"],
    "--out-shard-size": ["--out-shard-size", "60k"],
    "--read-to-gpu": ["--read-to-gpu"],
    "--clone-tensors": ["--clone-tensors"],
    "--random-seed": ["--random-seed", "7"],
    "--multi-gpu": ["--multi-gpu"],
    "--multi-gpu --low-cpu-memory": ["--multi-gpu", "--low-cpu-memory"],
    "--multi-gpu --gpu-rich": ["--gpu-rich"],  # --cuda and --read-to-gpu, too, for which there is no device here
    "--multi-gpu --async-write": ["--multi-gpu", "--async-write", "--out-shard-size", "60k"],
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
def test_options(case, method, pair, merge, request):
    models = [{"model": str(pair.long)}, {"model": str(pair.third), "parameters": {"weight": [0.2, 0.9]}}]
    config = config_for(pair, method, models=models)
    plain, _ = merge.ok(config)
    if "--multi-gpu" in case:
        request.getfixturevalue("two_accelerators")
    out, _ = merge.ok(config, *OPTIONS[case], out="options")
    found, expected = load(out), load(plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (len(list(out.glob("*.safetensors"))) > 2) is ("60k" in OPTIONS[case])
    assert (out / "fim_report.json").read_bytes() == (plain / "fim_report.json").read_bytes()


def test_the_result_in_bin_files(pair, merge):
    plain, _ = merge.ok(config_for(pair))
    out, _ = merge.ok(config_for(pair), "--no-safe-serialization", out="bin")
    found = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(found[name], value) for name, value in load(plain).items())


# mergekit-multi


def test_a_stage_on_the_outputs_of_others(pair, tmp_path):
    """The base and the fine-tuned model of a fim stage are what two stages of stock methods made."""
    stages = [
        config_for(
            pair, "linear", models=[{"model": str(p), "parameters": {"weight": 0.5}} for p in (pair.base, pair.third)]
        )
        | {"name": "mean"},
        config_for(pair, "ties", models=[{"model": str(pair.long), "parameters": {"weight": 1.0, "density": 0.7}}])
        | {"name": "trimmed"},
        config_for(pair, "fim_ta", base_model="mean", models=[{"model": "trimmed"}]),
    ]
    del stages[0]["base_model"]
    source, out = tmp_path / "multi.yml", tmp_path / "out"
    source.write_text(yaml.safe_dump_all(stages), encoding="utf-8")
    arguments = [str(source), "--out-path", str(out), "-I", str(tmp_path / "stages")]
    result = CliRunner().invoke(mergekit_multi, [*arguments, "--no-copy-tokenizer", "--no-write-model-card"])
    assert result.exit_code == 0, result.output
    base, long = tmp_path / "stages" / "mean", tmp_path / "stages" / "trimmed"
    theta0, theta1, theta2 = (reference.load(p) for p in (pair.base, pair.third, base))
    assert all(np.allclose(theta2[name], (value + theta1[name]) / 2, atol=1e-6) for name, value in theta0.items())
    alphas = reference.layer_coefficients(base, long)[2]
    expected = {}
    for name, value in theta2.items():
        layer = reference.layer_of(name)
        alpha = np.mean(alphas) if layer is None else alphas[layer]
        expected[name] = value + alpha * (reference.load(long)[name] - value)
    assert_close(out, expected)


# Filters and gradients


def gradient(values, name: str) -> float:
    """mergekit's: evenly spaced over the layers; outside them the first value."""
    layer = reference.layer_of(name)
    return float(np.interp((layer or 0) / (LAYERS - 1) * (len(values) - 1), range(len(values)), values))


def first_match(filters, name: str) -> float:
    return next(
        gradient(f["value"], name) if isinstance(f["value"], list) else f["value"]
        for f in filters
        if f.get("filter", "*") == "*" or f["filter"] in name
    )


SETTINGS = {
    "weight gradient": {"weight": [0.2, 1.4, 0.6]},
    "weight filters": {
        "weight": [{"filter": "mlp", "value": 0.3}, {"filter": "model.layers.1.", "value": 2}, {"value": 1}]
    },
    "density gradient": {"density": [0.1, 0.9]},
    "density filters": {"density": [{"filter": "self_attn", "value": 0.8}, {"value": 0.3}]},
    "alpha gradient": {"alpha": [0.1, 0.9, 0.4]},
    "alpha filters": {"alpha": [{"filter": "q_proj", "value": 0.9}, {"filter": "*", "value": 0.2}]},
    "a gradient in a filter": {"alpha": [{"filter": "mlp", "value": [0.1, 0.8]}, {"value": [0.6, 0.2]}]},
    "all of them": {"weight": [0.5, 0.9], "density": [0.3, 0.7], "alpha": [0.2, 0.6]},
    "gate_scale gradient": {"gate_scale": [0.2, 1.5]},
    "lambda filters": {"lambda": [{"filter": "mlp", "value": 0.4}, {"value": 1.2}]},
    "norm_tolerance gradient": {"norm_tolerance": [0.001, 0.2]},
    "normalize filters": {"normalize": [{"filter": "mlp", "value": False}, {"value": True}], "weight": 0.6},
}
DEFAULTS = {"weight": 1.0, "density": 0.2, "gate_scale": 0.7, "lambda": 1.0, "norm_tolerance": 0.05, "normalize": True}
SHARED = ("gate_scale", "lambda", "norm_tolerance", "normalize")


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("place", ["the model", "the top"])
def test_filters_and_gradients(case, place, pair, merge):
    parameters = SETTINGS[case]
    of_model = {k: v for k, v in parameters.items() if k not in SHARED and place == "the model"}
    models = [{"model": str(pair.long), "parameters": of_model}]
    top = {k: v for k, v in parameters.items() if k not in of_model}
    out, _ = merge.ok(config_for(pair, models=models, parameters=top))
    alphas = reference.layer_coefficients(pair.base, pair.long)[2]
    theta0, theta1 = reference.load(pair.base), reference.load(pair.long)

    def value(key: str, name: str):
        setting = parameters.get(key, DEFAULTS.get(key))
        if key == "alpha" and setting is None:
            layer = reference.layer_of(name)
            return np.mean(alphas) if layer is None else alphas[layer]
        if isinstance(setting, list):
            return first_match(setting, name) if isinstance(setting[0], dict) else gradient(setting, name)
        return setting

    expected = {
        name: reference.merge_tensor(
            *("fim_ties", theta, [theta1[name]], [value("alpha", name)], [value("weight", name)]),
            *([value("density", name)], value("gate_scale", name) if "gate_proj" in name else 1.0),
            *(value("norm_tolerance", name), value("normalize", name), value("lambda", name)),
        )
        for name, theta in theta0.items()
    }
    assert_close(out, expected)
    plain = {
        name: reference.merge_tensor(
            "fim_ties", v, [theta1[name]], [np.mean(alphas)], [1], [0.2], 0.7 if "gate_proj" in name else 1, 0.05, True
        )
        for name, v in theta0.items()
    }
    assert any(not np.allclose(expected[n], plain[n], atol=1e-3) for n in plain)


def test_alpha_by_hand_is_the_weight_of_stock_task_arithmetic(pair, merge):
    """Gradients and filters resolve as mergekit's own."""
    for i, setting in enumerate(([0.1, 0.9, 0.4], [{"filter": "mlp", "value": [0.1, 0.8]}, {"value": 0.3}])):
        models = [{"model": str(pair.long), "parameters": {"alpha": setting}}]
        out, _ = merge.ok(config_for(pair, "fim_ta", models=models), out=f"ours{i}")
        stock = [{"model": str(pair.long), "parameters": {"weight": setting}}]
        theirs, _ = merge.ok(config_for(pair, "task_arithmetic", models=stock), out=f"stock{i}")
        assert_close(out, reference.load(theirs), rtol=1e-6, atol=1e-6)
