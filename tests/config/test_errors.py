"""Bad input ends in one line that names the thing and the remedy, exit status 1, no traceback, no output folder."""

import shutil

import pytest
import reference
import tiny
import torch
import transformers
import yaml
from damage import change_tensor, poison, remake
from environments import MERGEKIT_YAML
from mergekit.options import MergeOptions
from merges import config_for, ends_in_one_line

from mergekit_fim.errors import FimError
from mergekit_fim.models.inputs import InputModel, open_model
from mergekit_fim.prepass.task_vectors import LayerPair, TaskVectorSweep


@pytest.mark.parametrize("which", ["base", "long"])
def test_tensors_that_one_model_has_and_mergekit_does_not_plan(which, merge, tmp_path):
    """mergekit's Llama has no biases: they would be missing from the output, and random when it is loaded."""
    for name in ("base", "long"):
        tiny.save(tiny.build(tiny.config("llama", attention_bias=name == which)), tmp_path / name)
    config = {
        "merge_method": "fim_ta",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "long")}],
    }
    target, result = merge(config | {"dtype": "float32"})
    other = {"base": "long", "long": "base"}[which]
    expected = f"{tmp_path / other}: expected the tensor model.layers.0.self_attn.k_proj.bias as in {tmp_path / which}"
    ends_in_one_line(result, expected, absent=target)


def test_activations_that_overflow(merge, tmp_path, monkeypatch):
    """float16 is left for a wider type, with a warning, and a wider type that overflows is an error."""
    monkeypatch.setattr("mergekit_fim.fisher.loading.running_dtype", lambda dtype, device: dtype)
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
    ends_in_one_line(result, str(tmp_path / "wild"), "decoder layer 0", "float32", "isn't finite", absent=target)


@pytest.mark.parametrize("which", ["base", "long"])
def test_embeddings_of_two_sizes_that_are_not_finite(which, pair, merge, tmp_path):
    """They have no task vector that would show it."""
    paths = {"base": tmp_path / "base", "long": tmp_path / "long"}
    shutil.copytree(pair.base, paths["base"])
    remake(paths["long"], vocab_size=101)
    change_tensor(paths[which], "model.embed_tokens.weight", poison(float("nan")))
    config = config_for(pair, base_model=str(paths["base"]), models=[{"model": str(paths["long"])}])
    target, result = merge(config, "--unsafe-truncate-embeddings")
    ends_in_one_line(result, f"{paths[which]}: tensor model.embed_tokens", "outside the layers", "NaN", absent=target)


def test_memory_that_runs_out_in_a_step_costs_no_part_of_it(pair, monkeypatch):
    """The measurement beside it halves its batch and goes on: the step is taken again, whole."""
    base, long = (open_model(str(path), None, MergeOptions()) for path in (pair.base, pair.long))
    pairs = {long: [LayerPair(i, i) for i in range(5)]}
    expected = TaskVectorSweep(base, pairs, None).norms(quiet=True)[long.reference].layers
    sweep, original, calls = TaskVectorSweep(base, pairs, None), InputModel.load, []

    def load(self, *arguments):
        calls.append(arguments)
        if len(calls) == 9:
            raise MemoryError
        return original(self, *arguments)

    monkeypatch.setattr(InputModel, "load", load)
    with pytest.raises(MemoryError):
        sweep.norms(quiet=True)
    assert sweep.norms(quiet=True)[long.reference].layers == expected


@pytest.mark.parametrize("count", [1, 2])  # of accelerators: threads as many times four
def test_task_vectors_of_what_the_measurement_read_and_of_the_rest(count, pair, monkeypatch):
    """Whoever reads a tensor first, and in however many threads: the same sums, and nothing of the base read twice."""
    base, long, third = (open_model(str(path), None, MergeOptions()) for path in (pair.base, pair.long, pair.third))
    pairs = [LayerPair(i, i) for i in range(5)]
    models = {long: pairs, third: [*pairs, LayerPair(1, 3)]}
    expected = TaskVectorSweep(base, models, None).norms(quiet=True)
    monkeypatch.setattr("mergekit_fim.prepass.task_vectors.readers", lambda devices: 4 * len(devices))
    sweep, original, read = TaskVectorSweep(base, models, None, [torch.device("cpu")] * count), InputModel.load, []

    def load(self, tensor, dtype):
        read.append((self, tensor.name))
        return original(self, tensor, dtype)

    monkeypatch.setattr(InputModel, "load", load)
    shown = [tensor for layer in base.layout.layers[1:3] for tensor in layer.tensors]
    for tensor in (*shown, *shown, base.layout.other[0]):
        sweep(tensor, original(base, tensor, None))
    assert {model for model, _ in read} == {long, third}
    found = sweep.norms(quiet=True)
    assert found == expected
    of_base = [name for model, name in read if model is base]
    rest = [*base.layout.other[1:], *(t for i in (0, 3, 4) for t in base.layout.layers[i].tensors)]
    assert sorted(of_base) == sorted(t.name for t in rest)


def test_layers_of_two_shapes(pair, tmp_path):
    """The headers show it first, but for layers that differ within each model, paired by slices."""
    remake(tmp_path / "narrow", intermediate_size=40)
    base, narrow = (open_model(str(path), None, MergeOptions()) for path in (pair.base, tmp_path / "narrow"))
    pairs = [LayerPair(i, i) for i in range(5)]
    with pytest.raises(FimError, match=r"expected the shape \[48, 32\] of .* found \[40, 32\]; the models must share"):
        TaskVectorSweep(base, {narrow: pairs}, None).norms(quiet=True)


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
    ends_in_one_line(result, "causal language model", absent=target)


def test_other_architectures_are_not_mixed_even_with_allow_crimes(pair, merge, tmp_path):
    remake(tmp_path / "qwen", "qwen2")
    target, result = merge(config_for(pair, models=[{"model": str(tmp_path / "qwen")}]), "--allow-crimes")
    ends_in_one_line(result, str(tmp_path / "qwen"), absent=target)


@pytest.mark.parametrize(
    "option", [["--cuda"], ["--device", "cuda:0"], ["--multi-gpu"], ["--gpu-rich"], ["--device", "abacus"]]
)
def test_a_device_that_is_not_there(option, pair, merge, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    target, result = merge(config_for(pair), *option)
    ends_in_one_line(
        result, "--multi-gpu" if "--" in option[-1] and option != ["--cuda"] else "--device", absent=target
    )


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
    ends_in_one_line(result, "mergekit-yaml", files[1], absent=tmp_path / "out")


def test_in_a_process_of_its_own(loaded, pair, tmp_path):
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(config_for(pair, parameters={"sharpnes": 1})))
    done = loaded.run(MERGEKIT_YAML, str(config), str(tmp_path / "out"), check=False)
    line = ends_in_one_line(done, absent=tmp_path / "out")
    assert line.startswith("Error: the top-level parameters: unknown parameter `sharpnes`")
