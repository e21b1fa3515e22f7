"""Bad input ends in one line that names the thing and the remedy, exit status 1, no traceback, no output folder."""

import json
import shutil
from pathlib import Path

import pytest
import reference
import tiny
import torch
import transformers
import yaml
from conftest import config_for
from safetensors.torch import load_file, save_file


def ends_in_one_line(result, target, *words):
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == lines[0]  # nothing after it: the message is a single line
    assert "Traceback" not in result.output + result.stderr
    for word in words:
        assert word in lines[0], lines[0]
    assert not target.exists()


def unwrapped(result):
    """What was printed, without the line breaks that fit it to the terminal."""
    return " ".join(result.output.split())


def model_parameters(pair, **parameters):
    return {"models": [{"model": str(pair.long), "parameters": parameters}]}


# name: (changes of a good config by the pair, words of the message)
CONFIGS = {
    "no base": (lambda p: {"base_model": None}, ["needs a base model", "add `base_model:`"]),
    "a base for the slices only": (
        lambda p: {
            "base_model": None,
            "models": None,
            "slices": [
                {
                    "base_model": str(p.base),
                    "sources": [{"model": str(m), "layer_range": [0, 5]} for m in (p.base, p.long)],
                }
            ],
        },
        ["needs a base model", "at the top"],
    ),
    "no fine-tuned model": (lambda p: {"models": [{"model": str(p.base)}]}, ["at least one fine-tuned model"]),
    "typo at the top": (
        lambda p: {"parameters": {"sharpnes": 1}},
        ["top-level", "`sharpnes`", "did you mean `sharpness`?"],
    ),
    "typo in a model": (
        lambda p: model_parameters(p, densty=0.2),
        ["models[0]", "`densty`", "did you mean `density`?"],
    ),
    "nothing near": (lambda p: {"parameters": {"qqq": 1}}, ["unknown parameter `qqq`", "fisher_samples"]),
    "density 0": (lambda p: model_parameters(p, density=0), ["`density`", "(0, 1]", "found 0"]),
    "density 1.5": (lambda p: {"parameters": {"density": 1.5}}, ["`density`", "(0, 1]", "found 1.5"]),
    "density in a gradient": (lambda p: model_parameters(p, density=[0.2, 2]), ["`density`", "found 2"]),
    "density in a filter": (
        lambda p: model_parameters(p, density=[{"filter": "mlp", "value": -1}, {"value": 0.5}]),
        ["`density`", "found -1"],
    ),
    "weight not a number": (lambda p: model_parameters(p, weight="heavy"), ["`weight`", "finite number", "'heavy'"]),
    "weight a boolean": (lambda p: model_parameters(p, weight=True), ["`weight`", "found True"]),
    "weight NaN": (lambda p: model_parameters(p, weight=float("nan")), ["`weight`", "found nan"]),
    "alpha infinite": (lambda p: model_parameters(p, alpha=float("inf")), ["`alpha`", "found inf"]),
    "no samples": (lambda p: {"parameters": {"fisher_samples": 0}}, ["`fisher_samples`", "at least 1"]),
    "half a sample": (lambda p: {"parameters": {"fisher_samples": 2.5}}, ["`fisher_samples`", "whole number"]),
    "one token": (lambda p: {"parameters": {"fisher_seq_len": 1}}, ["`fisher_seq_len`", "at least 2"]),
    "beyond the positions": (lambda p: {"parameters": {"fisher_seq_len": 129}}, ["fisher_seq_len", "128 positions"]),
    "negative seed": (lambda p: {"parameters": {"fisher_seed": -1}}, ["`fisher_seed`", "found -1"]),
    "labels": (lambda p: {"parameters": {"fisher_labels": "true"}}, ["`fisher_labels`", "`inputs` or `sampled`"]),
    "min above max": (lambda p: {"parameters": {"alpha_min": 0.9, "alpha_max": 0.1}}, ["alpha_min (0.9)", "alpha_max"]),
    "mean of 1": (lambda p: {"parameters": {"alpha_mean": 1}}, ["`alpha_mean`", "(0, 1)"]),
    "mean outside": (
        lambda p: {"parameters": {"alpha_mean": 0.5, "alpha_max": 0.4}},
        ["alpha_mean (0.5)", "alpha_max"],
    ),
    "sharpness infinite": (lambda p: {"parameters": {"sharpness": float("inf")}}, ["`sharpness`", "finite"]),
    "sharpness a gradient": (lambda p: {"parameters": {"sharpness": [0, 1]}}, ["`sharpness`", "one value", "gradient"]),
    "sharpness a filter": (
        lambda p: {"parameters": {"sharpness": {"filter": "mlp", "value": 1}}},
        ["`sharpness`", "one value", "filter"],
    ),
    "sharpness on a model": (lambda p: model_parameters(p, sharpness=2), ["models[0]", "`sharpness`", "top-level"]),
    "normalize on a model": (lambda p: model_parameters(p, normalize=True), ["models[0]", "`normalize`", "no effect"]),
    "normalize a number": (lambda p: {"parameters": {"normalize": 2}}, ["`normalize`", "true or false"]),
    "rescale": (lambda p: {"parameters": {"rescale": True}}, ["`rescale`", "norm_tolerance"]),
    "negative tolerance": (lambda p: {"parameters": {"norm_tolerance": -0.1}}, ["`norm_tolerance`", "found -0.1"]),
    "negative gate": (lambda p: {"parameters": {"gate_scale": -1}}, ["`gate_scale`", "found -1"]),
    "empty list": (lambda p: model_parameters(p, weight=[]), ["`weight`", "empty list"]),
    "dtype": (lambda p: {"dtype": "int8"}, ["dtype", "bfloat16", "int8"]),
    "integer dtype": (lambda p: {"dtype": "int64"}, ["dtype", "bfloat16", "int64"]),
    "out_dtype": (lambda p: {"out_dtype": "float8"}, ["out_dtype", "float8"]),
    "slice beyond the layers": (
        lambda p: {
            "models": None,
            "slices": [{"sources": [{"model": str(m), "layer_range": [3, 6]} for m in (p.base, p.long)]}],
        },
        ["slices[0]", "[0, 5]", "[3, 6]"],
    ),
    "slice of two lengths": (
        lambda p: {
            "models": None,
            "slices": [
                {
                    "sources": [
                        {"model": str(p.base), "layer_range": [0, 2]},
                        {"model": str(p.long), "layer_range": [0, 3]},
                    ]
                }
            ],
        },
        ["slices[0]", "same number of layers"],
    ),
    "slice without the base": (
        lambda p: {"models": None, "slices": [{"sources": [{"model": str(p.long), "layer_range": [0, 2]}]}]},
        ["slices[0]", "base"],
    ),
    "a model twice": (lambda p: {"models": [{"model": str(p.long)}] * 2}, ["Duplicate"]),
}


@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
@pytest.mark.parametrize("case", CONFIGS)
def test_bad_configs(case, method, pair, merge, monkeypatch):
    def expensive(*args, **kwargs):
        raise AssertionError("expensive work began")

    monkeypatch.setattr("mergekit_fim.fisher.load_model", expensive)
    monkeypatch.setattr("mergekit_fim.task_vectors.TaskVectorSweep", expensive)
    changes, words = CONFIGS[case]
    config = {k: v for k, v in (config_for(pair, method) | changes(pair)).items() if v is not None}
    target, result = merge(yaml.dump(config, Dumper=yaml.Dumper))
    ends_in_one_line(result, target, *words)


def change_config(path: Path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def change_tensor(path: Path, name: str, change):
    tensors = load_file(path / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(
        {k: v for k, v in tensors.items() if v is not None}, path / "model.safetensors", metadata={"format": "pt"}
    )


def poison(value):
    def change(tensor):
        tensor.view(-1)[3] = value
        return tensor

    return change


def remake(path: Path, kind="llama", **changes):
    tiny.save(tiny.build(tiny.config(kind, **changes), 3), path)


UP = "model.layers.2.mlp.up_proj.weight"


def shard(path: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="60KB")
    return json.loads((path / "model.safetensors.index.json").read_text())


def lose_a_shard(path: Path):
    index = shard(path)
    (path / index["weight_map"][UP]).unlink()


def cut_a_shard(path: Path):
    file = path / shard(path)["weight_map"][UP]
    file.write_bytes(file.read_bytes()[:1000])


def name_a_missing_tensor(path: Path):
    index = shard(path)
    index["weight_map"]["model.layers.9.extra"] = index["weight_map"][UP]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


# name: (which model is damaged, how, words of the message)
MODELS = {
    "another layer count": ("long", lambda p: remake(p, num_hidden_layers=4), ["num_hidden_layers 5", "found 4"]),
    "another hidden size": ("long", lambda p: remake(p, hidden_size=64, head_dim=8), ["hidden_size 32", "found 64"]),
    "another number of heads, same shapes": (
        "long",
        lambda p: change_config(p, num_attention_heads=8, num_key_value_heads=4, head_dim=4),
        ["num_attention_heads 4", "found 8"],
    ),
    "another intermediate size": (
        "long",
        lambda p: remake(p, intermediate_size=40),
        ["intermediate_size 48", "found 40"],
    ),
    "a vocabulary nobody aligns": (
        "long",
        lambda p: remake(p, vocab_size=101),
        ["embed_tokens", "tokenizer: {source: base}"],
    ),
    "one tensor of another shape": (
        "long",
        lambda p: change_tensor(p, UP, lambda t: t[:40].contiguous()),
        [UP, "[48, 32]", "[40, 32]"],
    ),
    "a tensor missing": ("long", lambda p: change_tensor(p, UP, lambda t: None), [UP, "lacks the tensor"]),
    "a tensor missing in the base": ("base", lambda p: change_tensor(p, UP, lambda t: None), [UP, "lacks the tensor"]),
    "int8 weights": ("long", lambda p: change_tensor(p, UP, lambda t: t.to(torch.int8)), [UP, "I8", "unquantised"]),
    "float8 weights": (
        "base",
        lambda p: change_tensor(p, UP, lambda t: t.to(torch.float8_e4m3fn)),
        [UP, "F8_E4M3", "unquantised"],
    ),
    "a quantised checkpoint": (
        "long",
        lambda p: change_config(p, quantization_config={"quant_method": "gptq", "bits": 4}),
        ["quantised (gptq)", "unquantised"],
    ),
    "a classifier": (
        "both",
        lambda p: change_config(p, architectures=["LlamaForSequenceClassification"]),
        ["causal language model", "LlamaForSequenceClassification"],
    ),
    "a missing shard": ("long", lose_a_shard, ["is missing", ".safetensors", "download"]),
    "a truncated shard": ("base", cut_a_shard, ["can't read", ".safetensors", "download"]),
    "an index with a missing tensor": ("long", name_a_missing_tensor, ["can't read", "model.layers.9.extra"]),
    "NaN in the base": ("base", lambda p: change_tensor(p, UP, poison(float("nan"))), [UP, "decoder layer 2", "NaN"]),
    "NaN in the long model": (
        "long",
        lambda p: change_tensor(p, UP, poison(float("nan"))),
        [UP, "decoder layer 2", "NaN"],
    ),
    "infinity in the long model": (
        "long",
        lambda p: change_tensor(p, UP, poison(float("inf"))),
        [UP, "decoder layer 2", "infinite"],
    ),
    "NaN outside the layers": (
        "long",
        lambda p: change_tensor(p, "model.norm.weight", poison(float("nan"))),
        ["model.norm.weight", "outside the layers", "NaN"],
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_bad_models(case, merge, tmp_path):
    which, damage, words = MODELS[case]
    base = tiny.build(tiny.config("llama"))
    paths = {"base": tiny.save(base, tmp_path / "base"), "long": tiny.save(tiny.tuned(base, 1), tmp_path / "long")}
    for name in ("base", "long") if which == "both" else (which,):
        damage(paths[name])
    config = {
        "merge_method": "fim_ties",
        "base_model": str(paths["base"]),
        "models": [{"model": str(paths["long"])}],
        "dtype": "float32",
    }
    target, result = merge(config)
    ends_in_one_line(result, target, *words)
    if which != "both":
        assert str(paths[which]) in result.stderr


@pytest.mark.parametrize("which", ["base", "long"])
def test_tensors_that_mergekit_does_not_plan(which, merge, tmp_path):
    """mergekit's Llama has no biases: they would be missing from the output, and random when it is loaded."""
    for name in ("base", "long"):
        tiny.save(tiny.build(tiny.config("llama", attention_bias=name == which)), tmp_path / name)
    config = {
        "merge_method": "fim_ta",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "long")}],
    }
    target, result = merge(config | {"dtype": "float32"})
    ends_in_one_line(result, target, str(tmp_path / which), "model.layers.0.self_attn.q_proj.bias", "doesn't cover")


def test_activations_that_overflow(merge, tmp_path, monkeypatch):
    """float16 is left for a wider type, with a warning, and a wider type that overflows is an error."""
    monkeypatch.setattr("mergekit_fim.placement.running_dtype", lambda dtype, device: dtype)
    base = tiny.build(tiny.config("llama"))
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(tiny.tuned(base, 1), tmp_path / "long")]
    for name in ("up", "down"):
        change_tensor(paths[0], f"model.layers.3.mlp.{name}_proj.weight", lambda t: t * 1e4)
    config = {"merge_method": "fim_ties", "base_model": str(paths[0]), "models": [{"model": str(paths[1])}]}
    target, result = merge.ok(config | {"dtype": "float16"})
    report = reference.report(target)
    assert report["fisher"]["dtype"] == "float32"
    assert ["overflows in float16" in warning for warning in report["warnings"]] == [True]
    wide, _ = merge.ok(config | {"dtype": "float32"}, out="wide")
    expected = [layer["fisher"] for layer in reference.report(wide)["fisher"]["layers"]]
    assert [layer["fisher"] for layer in report["fisher"]["layers"]] == pytest.approx(expected, rel=0.05)

    shutil.copytree(paths[0], tmp_path / "wild")
    for name in ("up", "down"):
        change_tensor(tmp_path / "wild", f"model.layers.3.mlp.{name}_proj.weight", lambda t: t * 1e17)
    shutil.copytree(tmp_path / "wild", tmp_path / "tuned")
    change_tensor(tmp_path / "tuned", "model.layers.0.input_layernorm.weight", lambda t: t * 1.1)
    config |= {"base_model": str(tmp_path / "wild"), "models": [{"model": str(tmp_path / "tuned")}]}
    target, result = merge(config | {"dtype": "float32"}, out="overflow")
    ends_in_one_line(result, target, str(tmp_path / "wild"), "decoder layer 0", "float32", "isn't finite")


def test_an_encoder_decoder(merge, tmp_path):
    cfg = transformers.T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    for name in ("base", "long"):
        transformers.T5ForConditionalGeneration(cfg).save_pretrained(tmp_path / name)
    config = {
        "merge_method": "fim_ta",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "long")}],
    }
    target, result = merge(config)
    ends_in_one_line(result, target, "causal language model")


def test_other_architectures_are_not_mixed_even_with_allow_crimes(pair, merge, tmp_path):
    remake(tmp_path / "qwen", "qwen2")
    target, result = merge(config_for(pair, models=[{"model": str(tmp_path / "qwen")}]), "--allow-crimes")
    ends_in_one_line(result, target, str(tmp_path / "qwen"))


@pytest.mark.parametrize(
    "option", [["--cuda"], ["--device", "cuda:0"], ["--multi-gpu"], ["--gpu-rich"], ["--device", "abacus"]]
)
def test_a_device_that_is_not_there(option, pair, merge, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    target, result = merge(config_for(pair), *option)
    ends_in_one_line(result, target, "--multi-gpu" if "--" in option[-1] and option != ["--cuda"] else "--device")


def test_an_existing_output_folder_is_left_alone(pair, merge, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("this")
    _, result = merge(config_for(pair, parameters={"sharpnes": 1}))
    assert result.exit_code == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["keep"]


def test_mergekit_pytorch_is_refused(pair, tmp_path):
    from click.testing import CliRunner
    from mergekit.scripts.merge_raw_pytorch import main

    files = [str(p / "model.safetensors") for p in (pair.base, pair.long)]
    config = tmp_path / "config.yml"
    config.write_text(
        yaml.safe_dump({"merge_method": "fim_ta", "base_model": files[0], "models": [{"model": files[1]}]})
    )
    result = CliRunner().invoke(main, [str(config), str(tmp_path / "out")])
    ends_in_one_line(result, tmp_path / "out", "mergekit-yaml", files[1])


def test_in_a_process_of_its_own(installed, pair, tmp_path):
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(config_for(pair, parameters={"sharpnes": 1})))
    done = installed.command("mergekit-yaml", str(config), str(tmp_path / "out"), check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: the top-level parameters: unknown parameter `sharpnes`")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
