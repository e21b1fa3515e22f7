"""Hostile input: one table of bad configs, models, measurements and command lines, through every command.

Each ends with a status other than 0 and one line that names the thing, and leaves every file as it was.
"""

import json
import math
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import reference
import safetensors
import tiny
import torch
import transformers
import yaml
from click.testing import CliRunner
from damage import UP, change_config, change_tensor, poison, remake
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml
from merges import Pair, config_for, ends_in_one_line

from mergekit_fim.cli import main
from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.files import PART
from mergekit_fim.measurements.file import write_measurement
from mergekit_fim.measurements.record import FisherMeasurement, LayerFisher, Measurement
from mergekit_fim.models.identity import fingerprint, identity
from mergekit_fim.models.inputs import open_model


@dataclass(frozen=True)
class Bad:
    """A bad input.

    Attributes:
        words: what the message must contain; {base}, {long} and {folder} stand for paths.
        config: the changes of a good config, or a config's text.
        damage: done to the models, of which the case then has copies of its own.
        options: of the command.
        commands: those that must refuse it.
        is_stock: mergekit-yaml ends in an error of its own, before this package's code runs.
        is_early: refused before anything is measured.
    """

    words: list[str]
    config: Callable[[Pair], dict | str] = lambda _: {}
    damage: Callable[[Pair], object] | None = None
    options: tuple[str, ...] = ()
    commands: tuple[str, ...] = ("mergekit-yaml", "plan", "merge")
    is_stock: bool = False
    is_early: bool = True


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
    "weight in other digits": (lambda p: model_parameters(p, weight="\uff11"), ["`weight`", "finite number"]),
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


def both_single_and_sharded(path: Path):
    whole = (path / "model.safetensors").read_bytes()
    shard(path)
    (path / "model.safetensors").write_bytes(whole)


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
    "more rows than the vocabulary": (
        "base",
        lambda p: change_tensor(p, "model.embed_tokens.weight", lambda t: torch.cat([t, t[:3]])),
        ["[97, 32]", "embed_tokens", "config.json", "[100, 32]"],
    ),
    "a vocabulary smaller than its rows": (
        "long",
        lambda p: change_config(p, vocab_size=50),
        ["[50, 32]", "embed_tokens", "[97, 32]"],
    ),
    "two sets of weights": ("base", both_single_and_sharded, ["model.safetensors", "index.json", "remove one"]),
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
    "a task vector beyond float32": (
        "long",
        lambda p: change_tensor(p, UP, poison(1e30)),
        [UP, "decoder layer 2", "overflows float32"],
    ),
}


LATE = {"NaN in the base", "NaN in the long model", "infinity in the long model", "NaN outside the layers"}


def slices(pair, *ranges):
    sources = [[{"model": str(m), "layer_range": r} for m in (pair.base, pair.long)] for r in ranges]
    return {"models": None, "slices": [{"sources": s} for s in sources]}


# More configs that this package refuses.
CONFIGS |= {
    "a whole number of 400 digits": (lambda p: {"parameters": {"fisher_samples": 10**400}}, ["`fisher_samples`"]),
    "a number of 400 digits": (lambda p: {"parameters": {"sharpness": 10**400}}, ["`sharpness`", "finite number"]),
    "a seed of 2^63": (lambda p: {"parameters": {"fisher_seed": 2**63}}, ["`fisher_seed`", "2^63 − 1"]),
    "10^9 samples": (lambda p: {"parameters": {"fisher_samples": 10**9}}, ["fisher_samples", "16,777,216 tokens"]),
    "10^9 tokens": (lambda p: {"parameters": {"fisher_seq_len": 10**9}}, ["fisher_seq_len", "16,777,216 tokens"]),
    "α over more than there are numbers": (
        lambda p: {"parameters": {"alpha_min": -1.7e308, "alpha_max": 1.7e308}},
        ["alpha_min", "alpha_max", "too far apart"],
    ),
    "a text with line breaks": (lambda p: model_parameters(p, weight="1\n2"), ["`weight`", "finite number"]),
    "a name with line breaks": (lambda p: {"parameters": {"a\nb\x1b[2J": 1}}, ["unknown parameter `a b"]),
    "a long text": (lambda p: model_parameters(p, weight="w" * 10**5), ["`weight`", "www..."]),
    "a number for labels": (lambda p: {"parameters": {"fisher_labels": 1}}, ["`fisher_labels`", "found 1"]),
    "a text for a switch": (lambda p: {"parameters": {"fisher_cache": "maybe"}}, ["`fisher_cache`", "true or false"]),
    "an empty dtype": (lambda p: {"dtype": ""}, ["dtype", "bfloat16"]),
    "a negative layer": (lambda p: slices(p, [-1, 2]), ["slices[0]", "within [0, 5]", "found [-1, 2]"]),
    "layers backwards": (lambda p: slices(p, [0, 2], [3, 1]), ["slices[1]", "within [0, 5]", "found [3, 1]"]),
    "no layers": (lambda p: slices(p, [2, 2]), ["slices[0]", "found [2, 2]"]),
    "10^9 layers": (lambda p: slices(p, [0, 10**9]), ["slices[0]", "found [0, 1000000000]"]),
    "a module that isn't there": (
        lambda p: {"models": None, "modules": {"vision": {"models": [{"model": str(p.long)}]}}},
        ["modules", "expected default", "found vision"],
    ),
    "the base's tokenizer where there is none": (
        lambda p: {"tokenizer": {"source": "base"}},
        ["{base}", "tokenizer", "leave the setting out"],
    ),
    "a union of no tokenizers": (lambda p: {"tokenizer_source": "union"}, ["{base}", "tokenizer"]),
    "a measurement that is a folder": (lambda p: {"parameters": {"fisher": str(p.base)}}, ["{base}", "found a folder"]),
    "a measurement that is the weights": (
        lambda p: {"parameters": {"fisher": str(p.base / "model.safetensors")}},
        ["model.safetensors", "expected a JSON file"],
    ),
    "a measurement that is a config": (
        lambda p: {"parameters": {"fisher": str(p.base / "config.json")}},
        ["config.json", "expected a measurement", "mergekit-fim fisher"],
    ),
}

# Those that mergekit-yaml stumbles over itself.
STOCK = {
    "the models empty": (lambda p: {"models": []}, ["{folder}/config.yml", "models"]),
    "models and slices": (lambda p: slices(p, [0, 5]) | {"models": [{"model": str(p.long)}]}, ["config.yml", "models"]),
    "slices empty": (lambda p: {"models": None, "slices": []}, ["config.yml", "slices"]),
    "a slice of nothing": (lambda p: {"models": None, "slices": [{"sources": []}]}, ["slices[0]", "found none"]),
    "modules empty": (lambda p: {"models": None, "modules": {}}, ["config.yml", "modules"]),
    "a module of nothing": (lambda p: {"models": None, "modules": {"default": {}}}, ["config.yml", "slices or models"]),
    "models a number": (lambda p: {"models": 7}, ["`models`", "found 7"]),
    "a model a number": (lambda p: {"models": [{"model": 3}]}, ["`models[0].model`", "found 3"]),
    "a model without its name": (lambda p: {"models": [{"parameters": {}}]}, ["`models[0]`", "model is missing"]),
    "parameters a list": (lambda p: {"parameters": [1, 2]}, ["`parameters`", "dictionary", "found [1, 2]"]),
    "parameters a text": (lambda p: {"parameters": "x"}, ["`parameters`", "dictionary", "found 'x'"]),
    "a value of nothing": (lambda p: {"parameters": {"weight": None}}, ["`parameters.weight`", "found None"]),
    "a value of a mapping": (lambda p: {"parameters": {"weight": {"a": 1}}}, ["`parameters.weight`", "found {'a': 1}"]),
    "a filter without a value": (lambda p: {"parameters": {"weight": [{"filter": "mlp"}]}}, ["`parameters.weight`"]),
    "a number for a name": (lambda p: {"parameters": {3: 4}}, ["`parameters.3`"]),
    "no method": (lambda p: {"merge_method": None}, ["`merge_method` is missing"]),
    "a method a number": (lambda p: {"merge_method": 3}, ["`merge_method`", "found 3"]),
    "a method spelled wrong": (lambda p: {"merge_method": "fim_tie"}, ["fim_tie"]),
    "a dtype a number": (lambda p: {"dtype": 5}, ["`dtype`", "found 5"]),
    "three numbers for a range": (lambda p: slices(p, [0, 1, 2]), ["`slices[0].sources[0].layer_range`", "[0, 1, 2]"]),
    "half a layer": (lambda p: slices(p, [0.5, 2]), ["`slices[0].sources[0].layer_range[0]`", "0.5"]),
    "a text for a layer": (lambda p: slices(p, ["a", 2]), ["`slices[0].sources[0].layer_range[0]`"]),
    "two tokenizer settings": (
        lambda p: {"tokenizer": {"source": "base"}, "tokenizer_source": "base"},
        ["config.yml", "tokenizer_source"],
    ),
    "a tokenizer of a list": (lambda p: {"tokenizer": {"source": [1]}}, ["`tokenizer.source`", "found [1]"]),
    "a base that isn't there": (lambda p: {"base_model": f"{p.base}-no"}, ["{base}-no", "folder of a model"]),
    "a model that isn't there": (lambda p: {"models": [{"model": f"{p.long}-no"}]}, ["{long}-no", "check the name"]),
    "a base without a name": (lambda p: {"base_model": ""}, ["folder of a model"]),
    "a base that is a file": (lambda p: {"base_model": str(p.base / "config.json")}, ["{base}/config.json"]),
    "a base that is its weights": (lambda p: {"base_model": str(p.base / "model.safetensors")}, ["{base}/model."]),
    "a folder without a model": (lambda p: {"base_model": str(p.base.parent)}, ["folder of a model", "check the name"]),
    "two revisions": (lambda p: {"base_model": "a@b@c"}, ["a@b@c"]),
    "two adapters": (lambda p: {"base_model": "a+b+c"}, ["a+b+c"]),
    "an adapter without a cache": (
        lambda p: {"models": [{"model": f"{p.base}+{p.base}"}]},
        ["{base}+{base}", "cache dir"],
    ),
    "a model within itself": (lambda p: {"models": [{"model": f"{p.base}+{p.base}+{p.base}"}]}, ["{base}+{base}"]),
    "a zero byte": (lambda p: {"base_model": "a\0b"}, ["folder of a model"]),
}

# Those that mergekit-yaml merges without.
UNKNOWN = {
    "at the top": (lambda p: {"out_dtyp": "float16"}, ["`out_dtyp` at the top", "did you mean `out_dtype`?"]),
    "parameters at the top": (lambda p: {"paramters": {"lambda": 0.1}}, ["`paramters`", "`parameters`?"]),
    "in a model": (lambda p: {"models": [{"model": str(p.long), "weight": 0.1}]}, ["`weight` in `models[0]`"]),
    "a range in a model": (
        lambda p: {"models": [{"model": str(p.long), "layer_range": [0, 2]}]},
        ["`layer_range` in `models[0]`", "model, parameters"],
    ),
    "in a source": (
        lambda p: {
            "models": None,
            "slices": [{"sources": [{"model": str(m), "layer_range": [0, 5], "x": 1} for m in (p.base, p.long)]}],
        },
        ["`x` in `slices[0].sources[0]`"],
    ),
    "in a filter": (
        lambda p: model_parameters(p, weight=[{"filter": "mlp", "value": 1, "vlue": 2}, {"value": 1}]),
        ["`vlue` in `models[0].parameters.weight[0]`", "`value`?"],
    ),
    "in the tokenizer": (lambda p: {"tokenizer": {"source": "base", "tokns": {}}}, ["`tokns` in `tokenizer`"]),
}


# What is appended to a good config's text.
TEXTS = {
    "an alias in itself": ("parameters: &p {weight: *p}", ["`parameters.weight`", "no meaning"]),
    "deep nesting": ("x: " + "[" * 5000, ["YAML", "recursion"]),
    "a number of 5,000 digits": (
        "parameters: {sharpness: " + "9" * 5000 + "}",
        ["YAML", "4300 digits" if sys.version_info >= (3, 11) else "(4300)", "5000 digits"],
    ),
    "a date that isn't one": ("x: 2020-99-99", ["YAML", "month"]),
    "a number that isn't one": ("x: !!int ''", ["YAML"]),
    "a switch that isn't one": ("x: !!bool x", ["YAML"]),
    "code": ("x: !!python/object/apply:os.mkdir [{folder}/made]", ["YAML", "python/object/apply:os.mkdir"]),
    "a list for a key": ("? [a]\n: b", ["YAML", "unhashable"]),
    "two documents": ("---\nx: 1", ["YAML", "another document"]),
    "an unknown alias": ("x: *nobody", ["YAML", "nobody"]),
    "a tab": ("\tx: 1", ["YAML", "line"]),
    "an open bracket": ("x: [", ["YAML"]),
    "17 MB": ("#" * (17 << 20), ["at most 1 MB"]),
    "a key twice": ("dtype: float32\ndtype: bfloat16", ["dtype stands twice", "line"]),
    "a parameter twice": ("parameters: {lambda: 0.5, lambda: 0.1}", ["lambda stands twice"]),
}
NOT_STOCK = {
    "17 MB",
    "a key twice",
    "a parameter twice",
}  # mergekit-yaml reads these, and merges


def write(name: str, content: str | bytes):
    def damage(path: Path):
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def cut(path: Path, length: int):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])


def folder_for_file(path: Path, name: str):
    (path / name).unlink()
    (path / name).mkdir()


def with_index(text: str):
    def damage(path: Path):
        shard(path)
        (path / "model.safetensors.index.json").write_text(text)

    return damage


def nan_in_the_config(path: Path):
    file = path / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN'))


WHOLE = "found none that can be opened"
# Damage that mergekit-yaml stumbles over itself.
STOCK_MODELS = {
    "a config that is not JSON": (write("config.json", "{nope"), [WHOLE, "JSON"]),
    "a config that is a list": (write("config.json", "[1]"), [WHOLE]),
    "an empty config": (write("config.json", ""), [WHOLE]),
    "no config": (lambda p: (p / "config.json").unlink(), [WHOLE]),
    "a config that is a folder": (lambda p: folder_for_file(p, "config.json"), [WHOLE]),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), [WHOLE, "model files"]),
    "weights cut in the header": (lambda p: cut(p, 1000), [WHOLE]),
    "weights cut in the data": (lambda p: cut(p, -1), [WHOLE, "not fully covered"]),
    "empty weights": (lambda p: cut(p, 0), [WHOLE, "header"]),
    "weights with a header of 2^64 bytes": (write("model.safetensors", b"\xff" * 8 + b"{}"), [WHOLE, "header"]),
    "weights that are a folder": (lambda p: folder_for_file(p, "model.safetensors"), [WHOLE]),
    "an index that is not JSON": (with_index("{"), [WHOLE]),
    "an index of nothing": (with_index("{}"), [WHOLE, "weight_map"]),
    "an index of numbers": (with_index('{"weight_map": [3]}'), [WHOLE]),
    "layers in words": (lambda p: change_config(p, num_hidden_layers="five"), [WHOLE, "num_hidden_layers"]),
    "no architecture": (lambda p: change_config(p, architectures=None), [WHOLE, "0 architectures"]),
    "two architectures": (lambda p: change_config(p, architectures=["LlamaForCausalLM"] * 2), ["2 architectures"]),
    "an unknown model type": (lambda p: change_config(p, model_type="nope"), [WHOLE, "nope"]),
    "heads that don't fit": (lambda p: change_config(p, num_attention_heads=3), [WHOLE, "heads"]),
}
MODELS |= {
    "an index to numbers": ("long", with_index('{"weight_map": {"a": 3}}'), [WHOLE, "index"]),
    "an index that leaves the folder": (
        "long",
        with_index('{"weight_map": {"a": "../b.safetensors"}}'),
        ["is missing"],
    ),
    "minus one layer": ("both", lambda p: change_config(p, num_hidden_layers=-1), ["at least one decoder layer"]),
    "no layers at all": ("both", lambda p: remake(p, num_hidden_layers=0), ["at least one decoder layer"]),
    "more layers in the config": (
        "both",
        lambda p: change_config(p, num_hidden_layers=6),
        ["lacks", "model.layers.5."],
    ),
    "more tokens in the config": (
        "both",
        lambda p: change_config(p, vocab_size=200),
        ["[200, 32] of model.embed_tokens.weight", "config.json", "[97, 32]"],
    ),
    "no tokens": ("both", lambda p: change_config(p, vocab_size=0), ["vocab_size of at least 1"]),
    "another size in the config": (
        "both",
        lambda p: change_config(p, hidden_size=64, head_dim=8),
        ["[64] of model.layers.0", "[32]"],
    ),
    "a scalar for a matrix": (
        "both",
        lambda p: change_tensor(p, UP, lambda t: t[0, 0].clone()),
        [UP, "[48, 32]", "[]"],
    ),
    "nothing for a matrix": ("both", lambda p: change_tensor(p, UP, lambda t: t[:0].clone()), [UP, "found [0, 32]"]),
    "booleans": ("base", lambda p: change_tensor(p, UP, lambda t: t > 0), [UP, "BOOL", "unquantised"]),
    "complex numbers": ("long", lambda p: change_tensor(p, UP, lambda t: t.to(torch.complex64)), [UP, "C64"]),
    "whole numbers": ("long", lambda p: change_tensor(p, UP, lambda t: t.to(torch.int64)), [UP, "I64"]),
    "an unknown activation": ("both", lambda p: change_config(p, hidden_act="nope"), ["nope", "config.json"]),
    "an unknown architecture": ("both", lambda p: change_config(p, architectures=["Nope"]), ["causal", "Nope"]),
    "NaN in the config": ("both", nan_in_the_config, ["decoder layer 0", "isn't finite"]),
    "infinity in the base": ("base", lambda p: change_tensor(p, UP, poison(-math.inf)), [UP, "decoder layer 2"]),
}
LATE |= {"NaN in the config", "infinity in the base", "a task vector beyond float32"}


def measured(of: str, change: Callable[[dict], object] | None = None):
    """Write a measurement of one of the models beside them, with something changed under a fitting checksum."""

    def damage(place: Pair):
        own = identity(open_model(str(getattr(place, of)), None, MergeOptions()))
        layers = tuple(LayerFisher(i, 3, (1.0,) * 8) for i in range(5))
        file = place.base.parent / "fisher.json"
        write_measurement(Measurement.of(FisherMeasurement(97, "float32", FisherSettings(), layers), own), str(file))
        if change is not None:
            content = json.loads(file.read_text())
            change(content)
            file.write_text(json.dumps(content))

    return damage


def beside(content: bytes | None):
    def damage(place: Pair):
        with (place.base.parent / "fisher.json").open("wb") as file:
            file.truncate(1 << 30) if content is None else file.write(content)

    return damage


MEASUREMENTS = {
    "of another model": (measured("long"), ["{long}", "differs from the base {base} in its weights"]),
    "of a newer version": (measured("base", lambda c: c.update(version=2)), ["found 2", "upgrade"]),
    "with NaN": (measured("base", lambda c: c["layers"][1].update(fisher=math.nan)), ["NaN", "finite"]),
    "with a layer missing": (measured("base", lambda c: c["layers"].pop()), ["`layers`", "5 decoder layers"]),
    "changed by hand": (measured("base", lambda c: c["model"].update(vocab_size=3)), ["checksum"]),
    "of 1 GB": (beside(None), ["at most 64 MB, found 1024 MB"]),
    "of nothing": (beside(b""), ["expected a JSON file"]),
    "that is not JSON": (beside(b"{" * 10**6), ["expected a JSON file"]),
    "in another encoding": (beside('{"ü": 1}'.encode("utf-16")), ["expected a JSON file"]),
}


def on(which: str, change):
    def damage(place: Pair):
        for name in ("base", "long") if which == "both" else (which,):
            change(getattr(place, name))

    return damage


def named(which: str, words: list[str]) -> list[str]:
    return words if which == "both" else [*words, "{" + which + "}"]


OURS = ("plan", "merge")
BAD = {
    **{f"config: {k}": Bad(words, config) for k, (config, words) in CONFIGS.items()},
    **{f"config: {k}": Bad(words, config, is_stock=True) for k, (config, words) in STOCK.items()},
    **{
        f"unknown key: {k}": Bad(["{folder}/config.yml: unknown key", *words], config, commands=OURS)
        for k, (config, words) in UNKNOWN.items()
    },
    **{
        f"text: {k}": Bad(
            ["{folder}/config.yml", *words],
            lambda p, text=text: yaml.safe_dump(config_for(p)) + text,
            commands=OURS if k in NOT_STOCK else ("mergekit-yaml", *OURS),
            is_stock=True,
        )
        for k, (text, words) in TEXTS.items()
    },
    **{
        f"model: {k}": Bad(named(which, words), damage=on(which, change), is_early=k not in LATE)
        for k, (which, change, words) in MODELS.items()
    },
    **{
        f"{which}: {k}": Bad([*words, "{" + which + "}"], damage=on(which, change), is_stock=True)
        for k, (change, words) in STOCK_MODELS.items()
        for which in ("base", "long")
    },
    **{
        f"a measurement {k}": Bad(
            ["fisher.json", *words],
            lambda p: {"parameters": {"fisher": str(p.base.parent / "fisher.json")}},
            damage=damage,
        )
        for k, (damage, words) in MEASUREMENTS.items()
    },
    "a name with @": Bad(
        ["{folder}/mo@del", "found none"],
        lambda p: {"models": [{"model": str(p.base.parent / "mo@del")}]},
        damage=lambda p: shutil.copytree(p.long, p.base.parent / "mo@del"),
        is_stock=True,
    ),
    "a device that isn't one": Bad(["--device", "abacus"], options=("--device", "abacus")),
    "a device for shapes only": Bad(["--device meta", "leave it out"], options=("--device", "meta")),
    "no threads": Bad(["options", "positive"], options=("--num-threads", "0"), commands=OURS),
    "a seed below 0": Bad(["options", "Seed"], options=("--random-seed", "-1"), commands=OURS),
    "a size that isn't one": Bad(["options", "abc"], options=("--out-shard-size", "abc"), commands=OURS),
    "no text at all": Bad(["{folder}/config.yml", "NoneType"], lambda _: "# nothing\n", is_stock=True),
    "a list": Bad(["{folder}/config.yml", "found list"], lambda _: "- 1\n", is_stock=True),
    # The merge alone can see these, tensor by tensor.
    "a factor beyond all numbers": Bad(
        ["isn't finite in float32", "`lambda`"],
        lambda p: {"parameters": {"lambda": 1e300}},
        commands=("merge",),
        is_early=False,
    ),
    "a weight beyond all numbers": Bad(
        ["isn't finite in float32", "`weight`"],
        lambda p: {"models": [{"model": str(m), "parameters": {"weight": 1e308}} for m in (p.long, p.third)]},
        commands=("merge",),
        is_early=False,
    ),
    "NaN where α is set by hand": Bad(
        [UP, "isn't finite", "NaN"],
        lambda p: {"parameters": {"alpha": 0.5}},
        damage=lambda p: change_tensor(p.long, UP, poison(math.nan)),
        commands=("merge",),
        is_early=False,
    ),
}


CASES = [(case, command) for case, bad in BAD.items() for command in bad.commands]


def test_the_table_is_long_enough():
    assert len(BAD) > 170


def snapshot(folder: Path) -> dict[str, bytes | None]:
    files = {p: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    return {
        str(p): (b"large" if files.get(p, 0) > 1 << 24 else p.read_bytes()) if p in files else None
        for p in folder.rglob("*")
    }


def run(command: str, source: Path, out: Path, *options: str):
    quiet = [*options, "--quiet"]
    if command == "plan":
        return CliRunner().invoke(main, ["plan", str(source), *quiet])
    target = [str(source), str(out), "--no-write-model-card", "--no-copy-tokenizer", *quiet]
    if command == "merge":
        return CliRunner().invoke(main, ["merge", *target])
    return CliRunner().invoke(mergekit_yaml, target)


def filled(text: str, places: dict[str, Path]) -> str:
    for name, path in places.items():
        text = text.replace(name, str(path))
    return text


@pytest.mark.parametrize(("case", "command"), CASES)
def test_bad_input(case, command, pair, tmp_path, monkeypatch):
    bad = BAD[case]
    if bad.is_early:

        def expensive(*_args, **_kwargs):
            raise AssertionError("expensive work began")

        monkeypatch.setattr("mergekit_fim.fisher.measure.load_to_run", expensive)
        monkeypatch.setattr("mergekit_fim.prepass.layers.TaskVectorSweep", expensive)
    if bad.damage is not None:
        pair = Pair(*(Path(shutil.copytree(p, tmp_path / p.name)) for p in (pair.base, pair.long)), pair.third)
        bad.damage(pair)
    content = bad.config(pair)
    if isinstance(content, dict):
        method = "fim_ta" if command == "plan" else "fim_ties"
        content = {k: v for k, v in (config_for(pair, method) | content).items() if v is not None}
        content = yaml.dump(content, Dumper=yaml.Dumper)
    source, out = tmp_path / "config.yml", tmp_path / "out"
    source.write_text(content.replace("{folder}", str(tmp_path)), encoding="utf-8")
    if command == "merge":  # into a folder that is there; mergekit-yaml would have to make it
        out.mkdir()
        (out / "keep").write_bytes(b"\0this")
        (out / "config.json").write_text("{}")
    before = snapshot(tmp_path)
    result = run(command, source, out, *bad.options)
    assert snapshot(tmp_path) == before
    if command == "mergekit-yaml" and bad.is_stock:
        assert result.exit_code == 1
    else:
        places = {"{base}": pair.base, "{long}": pair.long, "{folder}": tmp_path}
        ends_in_one_line(result, *(filled(word, places) for word in bad.words))


# The command that measures opens a model by itself.
UNMEASURABLE = {k: (change, words) for k, (change, words) in STOCK_MODELS.items()}
UNMEASURABLE |= {
    k: (change, words) for k, (which, change, words) in MODELS.items() if which != "long" and k not in LATE
}


@pytest.mark.parametrize("case", UNMEASURABLE)
def test_bad_models_are_not_measured(case, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_fim.fisher.measure.load_to_run", lambda *_a, **_k: pytest.fail("measured"))
    change, words = UNMEASURABLE[case]
    model = Path(shutil.copytree(pair.base, tmp_path / "model"))
    change(model)
    before = snapshot(tmp_path)
    result = CliRunner().invoke(main, ["fisher", str(model), "-o", str(tmp_path / "f.json"), "-q"])
    ends_in_one_line(result, str(model), *words)
    assert snapshot(tmp_path) == before


COMMAND_LINES = {
    "a config that isn't there": (["plan", "{t}/none.yml"], ["none.yml", "can't be read"]),
    "a config that is a folder": (["plan", "{t}"], ["{t}", "can't be read"]),
    "a figure of another kind": (["plan", "{t}/c.yml", "--plot", "{t}/f.gif"], [".png or .svg"]),
    "a report into a folder": (["plan", "{t}/c.yml", "--json", "{t}"], ["{t}", "found a folder"]),
    "an export into nowhere": (["export", "{t}/c.yml", "-o", "{t}/no/x.yml"], ["{t}/no", "doesn't exist"]),
    "a merge into a file": (["merge", "{t}/c.yml", "{t}/c.yml"], ["found the file {t}/c.yml"]),
    "a merge below a file": (["merge", "{t}/c.yml", "{t}/c.yml/a/b"], ["found the file {t}/c.yml"]),
    "a merge into nothing": (["merge", "{t}/c.yml", ""], ["name of a folder", "name one"]),
    "an export over its config": (["export", "{t}/c.yml", "-o", "{t}/c.yml"], ["take the place of {t}/c.yml"]),
    "a report over its config": (["plan", "{t}/c.yml", "--json", "{t}/./c.yml"], ["take the place of {t}/c.yml"]),
    "two outputs in one": (
        ["plan", "{t}/c.yml", "--json", "{t}/f.svg", "--plot", "{t}/f.svg"],
        ["{t}/f.svg", "take the place"],
    ),
    "a measurement over the weights": (
        ["fisher", "{b}", "-o", "{b}/model.safetensors"],
        ["take the place of {b}/model.safetensors"],
    ),
    "a measurement over the config": (["fisher", "{b}", "-o", "{b}/config.json"], ["take the place of {b}/config"]),
    "a measurement into a folder to be": (["fisher", "{b}", "-o", "{t}/f/"], ["{t}/f/", "found a folder"]),
    "a measurement to -": (["fisher", "{b}", "-o", "-"], ["/dev/stdout"]),
    "a merge over its base": (["merge", "{t}/c.yml", "{b}"], ["folder of {b}", "write elsewhere"]),
    "a merge over its long model": (["merge", "{t}/c.yml", "{l}/."], ["folder of {l}", "write elsewhere"]),
    "a figure of nothing": (["plot", "{t}/none.json", "-o", "{t}/f.png"], ["none.json"]),
    "a figure of a config": (["plot", "{t}/c.yml", "-o", "{t}/f.png"], ["c.yml", "JSON"]),
    "a comparison with a config": (["compare", "{t}/c.yml", "{t}/c.yml"], ["c.yml", "JSON"]),
    "too many tokens": (["fisher", "{b}", "-o", "{t}/f", "--samples", "1000000000"], ["16,777,216 tokens"]),
    "too long a sequence": (["fisher", "{b}", "-o", "{t}/f", "--seq-len", "129"], ["128 positions"]),
    "two revisions": (["fisher", "a@b@c", "-o", "{t}/f"], ["a@b@c"]),
    "a model of another kind": (["fisher", "{t}/c.yml", "-o", "{t}/f"], ["{t}/c.yml", "folder of a model"]),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_bad_command_lines(case, pair, tmp_path):
    arguments, words = COMMAND_LINES[case]
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config_for(pair)))
    before = snapshot(tmp_path)
    weights = snapshot(pair.base), snapshot(pair.long)
    places = {"t": tmp_path, "b": pair.base, "l": pair.long}
    result = CliRunner().invoke(main, [a.format(**places) for a in arguments])
    ends_in_one_line(result, *(w.format(**places) for w in words))
    assert snapshot(tmp_path) == before
    assert (snapshot(pair.base), snapshot(pair.long)) == weights


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan"],
        ["merge", "c.yml"],
        ["fisher", "m"],
        ["fisher", "m", "-o", "f", "--samples", "0"],
        ["fisher", "m", "-o", "f", "--seed", "-1"],
        ["plan", "c.yml", "--nothing"],
        ["nothing"],
    ],
)
def test_usage_errors(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["mergekit-yaml", "merge"])
@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only"])
def test_an_output_that_cannot_be_written_is_seen_first(kind, command, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_fim.fisher.measure.load_to_run", lambda *_a, **_k: pytest.fail("measured"))
    source, out = tmp_path / "config.yml", tmp_path / "out"
    source.write_text(yaml.safe_dump(config_for(pair)))
    if kind == "read-only":  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    else:
        out.write_text("this")
    before = snapshot(tmp_path)
    ends_in_one_line(run(command, source, out / "a" if kind == "below a file" else out), str(out), "write elsewhere")
    assert snapshot(tmp_path) == before


def test_too_little_memory_on_the_cpu(pair, merge, monkeypatch):
    def out_of_memory(*_args, **_kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr("mergekit_fim.fisher.measure.measure_model", out_of_memory)
    target, result = merge(config_for(pair))
    ends_in_one_line(result, str(pair.base), "too little memory", "64 tokens", "lower fisher_seq_len")
    assert not target.exists()


def test_mergekit_yaml_does_not_merge_over_its_inputs(pair, tmp_path):
    base = Path(shutil.copytree(pair.base, tmp_path / "base"))
    source = tmp_path / "config.yml"
    source.write_text(yaml.safe_dump(config_for(pair, base_model=str(base))))
    before = snapshot(tmp_path)
    ends_in_one_line(run("mergekit-yaml", source, base), f"folder of {base}", "write elsewhere")
    assert snapshot(tmp_path) == before


def test_tensors_that_nobody_knows_are_named(pair, tmp_path, merge):
    """The merge leaves them out, as transformers does when it loads the models."""
    long = Path(shutil.copytree(pair.long, tmp_path / "long"))
    tensors = safetensors.torch.load_file(long / "model.safetensors")
    extra = {"model.layers.2.self_attn.q_proj.bias": torch.ones(32), "model.layers.5.mlp.up_proj.weight": torch.ones(3)}
    safetensors.torch.save_file(tensors | extra, long / "model.safetensors", metadata={"format": "pt"})
    plain, _ = merge.ok(config_for(pair))
    out, _ = merge.ok(config_for(pair, models=[{"model": str(long)}]), out="extra")
    (warning,) = reference.report(out)["warnings"]
    assert f"{long} holds tensors that no model with its config.json has" in warning
    assert "model.layers.2.self_attn.q_proj.bias and 1 more" in warning
    assert (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    one = Path(shutil.copytree(pair.long, tmp_path / "one"))
    extra.popitem()
    safetensors.torch.save_file(tensors | extra, one / "model.safetensors", metadata={"format": "pt"})
    out, _ = merge.ok(config_for(pair, models=[{"model": str(one)}]), out="out-one")
    assert reference.report(out)["warnings"][0].endswith(next(iter(extra)))


def test_a_config_that_wants_tuples(pair, merge, tmp_path):
    base = Path(shutil.copytree(pair.base, tmp_path / "base"))
    change_config(base, return_dict=False)
    plain, _ = merge.ok(config_for(pair))
    out, _ = merge.ok(config_for(pair, base_model=str(base)), out="tuples")
    assert (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_a_measurement_that_is_not_used_is_said(pair, merge):
    parameters = {"alpha": 0.5, "fisher": "/no/such.json"}
    out, _ = merge.ok(config_for(pair, parameters=parameters))
    assert "/no/such.json is not used" in reference.report(out)["warnings"][0]


# A model that is whole or isn't there


def full_disk(monkeypatch, after: int):
    original, written = safetensors.torch.save_file, []

    def save(tensors, path, metadata=None):
        if len(written) == after:
            Path(path).write_bytes(b"half")
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        written.append(path)
        original(tensors, path, metadata=metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", save)


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("options", [[], ["--async-write"]])
def test_a_full_disk_leaves_no_half_model(is_there, options, pair, tmp_path, monkeypatch):
    source, out = tmp_path / "config.yml", tmp_path / "new" / "out"
    source.write_text(yaml.safe_dump(config_for(pair)))
    if is_there:
        assert run("merge", source, out).exit_code == 0
        (out / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    full_disk(monkeypatch, 2)
    result = run("merge", source, out, "--out-shard-size", "60k", *options)
    ends_in_one_line(result, "No space left", "free some space")
    assert snapshot(tmp_path) == before


def test_a_file_that_may_not_grow(pair, warm, tmp_path):
    """The system itself refuses the last bytes of the weights, in a process of its own."""
    source, out = tmp_path / "config.yml", tmp_path / "out"
    source.write_text(yaml.safe_dump(config_for(pair)))
    done = warm.run("mergekit-fim", "merge", source, out, "--no-copy-tokenizer", "--quiet", file_size=100_000)
    assert ends_in_one_line(done).startswith("Error: mergekit can't do this merge (")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yml"]


@pytest.mark.parametrize("command", ["merge", "mergekit-yaml"])
def test_an_older_model_gives_way_to_the_new_one_whole(command, pair, tmp_path):
    """mergekit would leave the older model's weights beside the new shards, and loading would take the older."""
    source, out = tmp_path / "config.yml", tmp_path / "out"
    source.write_text(yaml.safe_dump(config_for(pair)))
    assert run(command, source, out).exit_code == 0
    (out / "notes.txt").write_text("mine")
    if command == "merge":
        (out / "model-3.safetensors").write_bytes(b"what a merge that failed left")
    source.write_text(yaml.safe_dump(config_for(pair, "fim_ta", parameters={"alpha": 1.0})))
    assert run(command, source, out, "--out-shard-size", "60k").exit_code == 0
    weights = {name for name in os.listdir(out) if name.startswith("model")}
    assert {name for name in weights if "-of-" not in name} == {"model.safetensors.index.json"}
    assert (out / "notes.txt").read_text() == "mine"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    expected = reference.load(pair.long)
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(PART)]
    # And back: shards give way to a single file.
    assert run(command, source, out).exit_code == 0
    assert {name for name in os.listdir(out) if name.startswith("model")} == {"model.safetensors"}


def test_no_report_of_an_older_merge_stays_beside_a_model_of_another_method(pair, tmp_path):
    source, out = tmp_path / "config.yml", tmp_path / "out"
    source.write_text(yaml.safe_dump(config_for(pair)))
    assert run("merge", source, out).exit_code == 0
    assert (out / "fim_report.json").exists()
    source.write_text(yaml.safe_dump(config_for(pair, "task_arithmetic", parameters={"weight": 0.5})))
    assert run("merge", source, out).exit_code == 0
    assert not (out / "fim_report.json").exists()


def test_the_config_goes_first_and_comes_last(pair, tmp_path, monkeypatch):
    """However early the replacement ends, what is left doesn't load as a model of old and new weights."""
    source, out = tmp_path / "config.yml", tmp_path / "out"
    source.write_text(yaml.safe_dump(config_for(pair)))
    assert run("merge", source, out, "--out-shard-size", "60k").exit_code == 0
    original, done = os.replace, []

    def replace(a, b):
        if Path(b).parent == out:
            assert not (out / "config.json").exists()
            if len(done) == 1:
                raise OSError(5, "Input/output error")
            done.append(b)
        original(a, b)

    monkeypatch.setattr(os, "replace", replace)
    ends_in_one_line(run("merge", source, out), str(out), "can't be written", "Input/output error")
    assert not (out / "config.json").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_python_merge_is_whole_too(pair, tmp_path, monkeypatch):
    import mergekit_fim

    full_disk(monkeypatch, 0)
    with pytest.raises(mergekit_fim.FimError, match=r"No space left on device.*free some space"):
        mergekit_fim.merge(config_for(pair), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(mergekit_fim.FimError, match="found the file"):
        mergekit_fim.merge(config_for(pair), str(tmp_path / "file"))


def test_a_relative_output_and_the_name_in_the_model_card(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text(yaml.safe_dump(config_for(pair)))
    for out in ("a/b/my model/", "my other"):
        result = CliRunner().invoke(main, ["merge", "c.yml", out, "--no-copy-tokenizer", "--quiet"])
        assert result.exit_code == 0, result.output
    assert "# my model" in Path("a/b/my model/README.md").read_text()
    assert sorted(os.listdir()) == ["a", "c.yml", "my other"]
    # A link to a folder stays one.
    Path("link").symlink_to("my other")
    assert CliRunner().invoke(main, ["merge", "c.yml", "link", "--no-copy-tokenizer", "--quiet"]).exit_code == 0
    assert Path("link").is_symlink()
    assert sorted(os.listdir()) == ["a", "c.yml", "link", "my other"]


# Code in checkpoints


class Code:
    """What a hostile pickle does on being read: it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def hostile(path: Path, marker: Path, layout: str):
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    tensors = dict(model.state_dict()) | {"x": Code(marker)}
    if layout == "old":  # as before torch 1.6: no archive
        torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif layout == "pickle":
        (path / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Code(marker)}))
    else:
        torch.save(tensors, path / "pytorch_model.bin")
    if layout == "sharded":  # mergekit reads the index alone
        (path / "pytorch_model.bin").rename(path / "pytorch_model-1.bin")
        index = {"weight_map": dict.fromkeys(tensors, "pytorch_model-1.bin")}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("lazy", [[], ["--lazy-unpickle"]])
@pytest.mark.parametrize("layout", ["single", "sharded", "old", "pickle"])
def test_pickled_code_is_not_run(layout, lazy, pair, tmp_path):
    marker = tmp_path / "made"
    base = Path(shutil.copytree(pair.base, tmp_path / "base"))
    hostile(base, marker, layout)
    marker.mkdir()
    with pytest.raises(FileExistsError):  # it is what it claims to be
        torch.load(next(base.glob("*.bin")), weights_only=False)
    marker.rmdir()
    source = tmp_path / "c.yml"
    source.write_text(yaml.safe_dump(config_for(pair, base_model=str(base))))
    for command in ("mergekit-yaml", "plan", "merge"):
        result = run(command, source, tmp_path / "out", *lazy)
        assert result.exit_code == 1
        if command != "mergekit-yaml":
            ends_in_one_line(result, str(base))
    result = CliRunner().invoke(main, ["fisher", str(base), "-o", str(tmp_path / "f.json"), "-q", *lazy])
    ends_in_one_line(result, str(base))
    assert not marker.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "c.yml"]


def test_the_fingerprint_runs_no_pickled_code(pair, tmp_path):
    base = Path(shutil.copytree(pair.base, tmp_path / "base"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    opened = open_model(str(base), None, MergeOptions())
    torch.save({"x": Code(tmp_path / "made")}, base / "pytorch_model.bin")
    with pytest.raises(Exception, match="can't read"):
        fingerprint(opened)
    assert not (tmp_path / "made").exists()


# Odd models that work


def merged(merge, folder: Path, method="fim_ta", **changes):
    base = tiny.build(tiny.config("llama", **changes))
    paths = [tiny.save(base, folder / "base"), tiny.save(tiny.tuned(base, 1), folder / "long")]
    config = {"merge_method": method, "base_model": str(paths[0]), "models": [{"model": str(paths[1])}]}
    out, result = merge.ok(config | {"dtype": "float32"})
    return paths, out, result


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 1}, {"vocab_size": 2}, {"vocab_size": 1}, {"max_position_embeddings": 64}]
)
def test_models_as_small_as_can_be(changes, merge, tmp_path):
    paths, out, _ = merged(merge, tmp_path, **changes)
    report = reference.report(out)
    rows = report["models"][0]["layers"]
    theta0, theta1 = (reference.load(p) for p in paths)
    if changes.get("vocab_size") == 1:  # there is nothing to predict
        assert [layer["fisher"] for layer in report["fisher"]["layers"]] == [0.0] * 5
        alphas = [1.0] * 5
        assert report["warnings"]
    else:
        alphas = reference.layer_coefficients(*paths)[2]
    if changes.get("num_hidden_layers") == 1:
        assert alphas == [0.5]  # alone, it is at the mean
    assert [row["alpha"] for row in rows] == pytest.approx(alphas, abs=1e-4)
    for name, value in reference.load(out).items():
        layer = reference.layer_of(name)
        alpha = np.mean(alphas) if layer is None else alphas[layer]
        expected = theta0[name] + alpha * (theta1[name] - theta0[name])
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=2e-5, err_msg=name)


def test_a_dead_layer(merge, tmp_path, caplog):
    """Its weights make its gradient exactly zero: it takes no part in the mapping, and gets alpha_max."""
    base = tiny.build(tiny.config("llama"))
    dead = base.model.layers[3]
    with torch.no_grad():
        for part in (dead.input_layernorm, dead.post_attention_layernorm, dead.self_attn.o_proj, dead.mlp.down_proj):
            part.weight.zero_()
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(tiny.tuned(base, 1), tmp_path / "long")]
    config = {"merge_method": "fim_ta", "base_model": str(paths[0]), "models": [{"model": str(paths[1])}]}
    out, _ = merge.ok(config | {"dtype": "float32", "parameters": {"alpha_max": 0.9}})
    report = reference.report(out)
    measured_fisher = reference.fisher(paths[0])
    assert sum(measured_fisher[3][1]) == 0
    assert report["fisher"]["layers"][3]["fisher"] == 0
    rows = report["models"][0]["layers"]
    assert rows[3]["alpha"] == 0.9
    F, norms, rest = [], [], [0, 1, 2, 4]
    theta0, theta1 = (reference.load(p) for p in paths)
    for layer, (count, squared) in enumerate(measured_fisher):
        F.append(np.mean(squared) / count)
        norms.append(sum(((theta1[n] - v) ** 2).sum() for n, v in theta0.items() if reference.layer_of(n) == layer))
    expected = reference.coefficients([F[i] * norms[i] for i in rest], high=0.9)
    assert [rows[i]["alpha"] for i in rest] == pytest.approx(list(expected), abs=1e-4)
    assert any("no Fisher information" in warning and "3" in warning for warning in report["warnings"])
    assert "no Fisher information" in caplog.text


NAMES = ["my models", "модели ☃", "a+b".replace("+", "&"), "100%s {x} $HOME", "-dash", 'it\'s "so"']


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", ["mergekit-yaml", "merge"])
def test_odd_names(name, command, pair, tmp_path):
    folder = tmp_path / name
    paths = [Path(shutil.copytree(p, folder / f"{name} {p.name}")) for p in (pair.base, pair.long)]
    config = config_for(pair, "fim_ta", base_model=str(paths[0]), models=[{"model": str(paths[1])}])
    source = folder / f"{name}.yml"
    source.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    result = run(command, source, folder / f"{name} @ out")
    assert result.exit_code == 0, result.output
    report = reference.report(folder / f"{name} @ out")
    assert (report["base_model"], report["models"][0]["model"]) == tuple(map(str, paths))
    assert run("plan", source, folder).exit_code == 0
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
