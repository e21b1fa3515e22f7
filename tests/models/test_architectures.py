"""One tiny random model of every architecture: measured, accounted for, merged by the stock command, loaded, run."""

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import reference
import tiny
import torch
import transformers
import zoo
from environments import ROOT
from kinds import KINDS, LAYERS, MASKS, Kind, add_masks, configure
from mergekit.options import MergeOptions
from merges import ends_in_one_line
from safetensors.torch import load_file, save_file
from torch import nn

from mergekit_fim import resolve
from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.fisher.engine import autograd_engine
from mergekit_fim.fisher.measure import measure_checkpoint, measure_model
from mergekit_fim.merging.gates import is_layout_known
from mergekit_fim.models.inputs import open_model
from mergekit_fim.report.table import render
from mergekit_fim.tools.export import compare, export, losses

SETTINGS = FisherSettings(samples=2, seq_len=8, seed=2)


@dataclass(frozen=True)
class Checkpoints:
    kind: Kind
    base: Path
    long: Path
    narrow: Path  # the base in bfloat16


@pytest.fixture(scope="module", params=KINDS)
def checkpoints(request, tmp_path_factory) -> Checkpoints:
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp("kind")
    base = tiny.build(configure(kind.kind, kind.changes))
    paths = [tiny.save(base, folder / "base"), tiny.save(tiny.tuned(base, 1), folder / "long")]
    paths.append(tiny.save(base, folder / "narrow", torch.bfloat16))
    for path in paths if kind.masks else []:
        add_masks(path)
    return Checkpoints(kind, *paths)


def decoder_layers(model: transformers.PreTrainedModel) -> list[nn.Module]:
    """In every text model the first list of modules."""
    return list(next(module for module in model.modules() if isinstance(module, nn.ModuleList)))


def by_reference_engine(path: Path, dtype: torch.dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return measure_model(model, decoder_layers(model), SETTINGS, engine=autograd_engine, quiet=True)


def streamed(path: Path, running: torch.dtype):
    base = open_model(str(path), None, MergeOptions())
    found = measure_checkpoint(base, SETTINGS, None, MergeOptions(quiet=True), running=running)
    assert found.warnings == ()  # so it ran layer by layer
    assert found.dtype == str(running).removeprefix("torch.")
    return found


def test_three_engines_agree_in_float32(checkpoints):
    """From a float32 checkpoint, and from a bfloat16 one whose weights are widened as they are used."""
    naive = reference.fisher(checkpoints.base, SETTINGS.samples, SETTINGS.seq_len, SETTINGS.seed)
    assert len(naive) == LAYERS
    for path in (checkpoints.base, checkpoints.narrow):
        fast, slow = streamed(path, torch.float32), by_reference_engine(path, torch.float32)
        assert len(fast.layers) == len(slow.layers) == LAYERS
        for a, b in zip(fast.layers, slow.layers, strict=True):
            assert a.parameters == b.parameters
            assert a.squared_norms == pytest.approx(b.squared_norms, rel=1e-4)
        if path == checkpoints.base:
            for layer, (parameters, squared_norms) in zip(fast.layers, naive, strict=True):
                assert layer.parameters == parameters
                assert layer.squared_norms == pytest.approx(squared_norms, rel=1e-4)


def test_fast_and_reference_engine_agree_in_bfloat16(checkpoints):
    fast = streamed(checkpoints.narrow, torch.bfloat16)
    slow = by_reference_engine(checkpoints.narrow, torch.bfloat16)
    for a, b in zip(fast.layers, slow.layers, strict=True):
        assert a.fisher == pytest.approx(b.fisher, rel=2e-2)


def header(path: Path) -> dict[str, list[int]]:
    """The shapes of a checkpoint's tensors, from the bytes of its file."""
    (file,) = path.glob("*.safetensors")
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        entries = json.loads(stream.read(length))
    return {name: entry["shape"] for name, entry in entries.items() if name != "__metadata__"}


def test_every_tensor_of_the_checkpoint_is_in_a_layer_or_outside(checkpoints):
    shapes = header(checkpoints.base)
    elements = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    base = open_model(str(checkpoints.base), None, MergeOptions())
    names = [tensor.name for tensor in base.layout.all_tensors()]
    assert len(names) == len(set(names))
    assert base.unknown == ()

    def held(tensors) -> int:
        own = [t for t in tensors if t.name not in base.absent]
        # One that is stored only as what it is tied to is counted there.
        own = [t for t in own if t.name in shapes or base.stored_name(t, tied=True) is None]
        return sum(base.load(tensor, None).numel() for tensor in own)

    assert [held(layer.tensors) for layer in base.layout.layers] == [
        sum(n for name, n in elements.items() if reference.layer_of(name) == layer) for layer in range(LAYERS)
    ]
    assert held(base.layout.other) == sum(n for name, n in elements.items() if reference.layer_of(name) is None)
    measured = streamed(checkpoints.base, torch.float32)
    parameters = sum(layer.parameters for layer in measured.layers) + held(base.layout.other)
    assert parameters == sum(n for name, n in elements.items() if not name.endswith(MASKS))
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints.base)
    assert parameters == sum(parameter.numel() for parameter in model.parameters())


def split(kind: Kind, name: str, shape: tuple[int, ...]) -> list[tuple[tuple, float]]:
    """The parts of a tensor, each with the factor of gate protection."""
    if kind.gate and re.search(kind.gate, name):
        return [((...,), 0.7)]
    if kind.fused and re.search(kind.fused[0], name):
        axis = kind.fused[1]
        half, before = shape[axis] // 2, (slice(None),) * axis
        return [((*before, slice(0, half)), 0.7), ((*before, slice(half, None)), 1.0)]
    return [((...,), 1.0)]


def expected(kind: Kind, name: str, theta0: np.ndarray, theta1: np.ndarray, alpha: float) -> np.ndarray:
    """`fim_ties` with its defaults, one model: trimmed as a whole, scaled and calibrated by parts."""
    kept = reference.trim((theta1.astype(np.float32) - theta0.astype(np.float32)).astype(np.float64), 0.2)
    merged = np.array(theta0)
    for part, factor in split(kind, name, theta0.shape):
        a = factor * alpha
        merged[part] += a * kept[part]
        target = (1 - a) * np.linalg.norm(theta0[part]) + a * np.linalg.norm(theta1[part])
        norm = np.linalg.norm(merged[part])
        if abs(norm / target - 1) > 0.05:
            merged[part] *= target / norm
    return merged


def test_the_merged_model_loads_as_what_was_merged_and_runs(checkpoints, merge):
    kind = checkpoints.kind
    out, result = merge.ok(
        {
            "merge_method": "fim_ties",
            "base_model": str(checkpoints.base),
            "models": [{"model": str(checkpoints.long)}],
            "dtype": "float32",
            "parameters": {"fisher_samples": SETTINGS.samples, "fisher_seq_len": SETTINGS.seq_len},
        }
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(out, output_loading_info=True)
    assert not any(info.values()), info
    generated = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 7)

    report = reference.report(out)
    alphas = {index: layer["alpha"] for index, layer in enumerate(report["models"][0]["layers"])}
    alphas[None] = report["models"][0]["alpha_other"]
    theta0, theta1 = (load(path).state_dict() for path in (checkpoints.base, checkpoints.long))
    assert set(alphas) == {None, *range(LAYERS)}
    for name, value in model.state_dict().items():
        a, b = (theta[name].double().numpy() for theta in (theta0, theta1))
        wanted = expected(kind, name, a, b, alphas[reference.layer_of(name)])
        np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-4, atol=2e-5, err_msg=name)
        assert not np.array_equal(value.numpy(), a.astype(np.float32)), name

    printed = " ".join(result.output.split())
    state = [name for name in theta0 if reference.layer_of(name) is not None]
    separate = [name for name in state if kind.gate and re.search(kind.gate, name)]
    fused = [name for name in state if kind.fused and re.search(kind.fused[0], name)]
    assert (report["gate_projections"], report["fused_gate_projections"]) == (separate, fused)
    if separate or fused:
        assert "gate protection: α × 0.7 on" in printed
        assert "gate protection: not applied" not in printed
    else:
        assert "gate protection: not applied" in printed


def test_a_merge_by_directions_loads_and_runs(checkpoints, merge):
    """Of every matrix that the report counts among those with factors some directions are told apart."""
    parameters = {"fisher_samples": SETTINGS.samples, "fisher_seq_len": SETTINGS.seq_len}
    paths = [str(path) for path in (checkpoints.base, checkpoints.long)]
    config = {"merge_method": "fim_kron", "base_model": paths[0], "models": [{"model": paths[1]}]}
    out, _ = merge.ok(config | {"dtype": "float32", "parameters": parameters})
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(out, output_loading_info=True)
    assert not any(info.values()), info
    generated = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 7)
    theta0, theta1 = (load(path).state_dict() for path in paths)
    told_apart = set()
    for name, value in model.state_dict().items():
        plain = theta0[name] + 0.5 * (theta1[name] - theta0[name])
        if not torch.allclose(value, plain, rtol=1e-4, atol=2e-5):
            told_apart.add(name)
            assert value.isfinite().all()
            assert reference.layer_of(name) is not None
    matrices = {n for n, v in theta0.items() if reference.layer_of(n) is not None and v.ndim > 1}
    assert told_apart <= matrices
    assert len(told_apart) >= len(matrices) / 2  # Mamba's convolutions and A have none
    (of_model,) = reference.report(out)["kron"]["models"]
    assert all(layer["parts"] for layer in of_model["layers"])


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.fused])
def test_the_second_half_of_a_fused_tensor_is_the_up_projection(name):
    """transformers' own code: the MLP's output is proportional to it, and not to the gate's half."""
    kind = KINDS[name]
    model = tiny.build(configure(kind.kind, kind.changes))
    mlp = decoder_layers(model)[0].mlp
    (parameter,) = [p for n, p in mlp.named_parameters() if "gate_up_proj" in n]
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    tensor = "layers.0.mlp.experts.gate_up_proj" if kind.fused[1] else "layers.0.mlp.gate_up_proj.weight"
    (gate, factor), (up, one) = split(kind, tensor, tuple(parameter.shape))
    assert (factor, one) == (0.7, 1.0)
    with torch.no_grad():
        before = mlp(x)
        parameter[up] *= 3
        torch.testing.assert_close(mlp(x), 3 * before)
        parameter[up] /= 3
        parameter[gate] *= 3
        assert not torch.allclose(mlp(x), 3 * before, rtol=0.05)


@pytest.mark.parametrize(
    ("tensor", "model_type", "known"),
    [
        ("model.layers.0.mlp.gate_up_proj.weight", "phi3", True),
        ("model.layers.0.shared_mlp.input_linear.weight", "granitemoehybrid", True),
        ("model.layers.0.mlp.experts.gate_up_proj", "mixtral", True),
        ("model.layers.0.mlp.experts.gate_up_proj", "qwen3_moe", True),
        ("model.layers.0.mlp.experts.gate_up_proj", "gpt_oss", False),  # [expert, input, output], interleaved
        ("model.layers.0.mlp.experts.gate_up_proj_bias", "gpt_oss", False),
        ("model.layers.0.mlp.experts.gate_up_proj", "aria_text", False),  # [expert, input, output]
        ("model.layers.0.feed_forward.experts.gate_up_proj", "llama4", False),  # [expert, input, output]
        ("model.layers.0.mlp.experts.gate_up_proj", "a_model_of_ones_own", False),
    ],
)
def test_where_the_gates_half_is_known(tensor, model_type, known):
    assert is_layout_known(tensor, model_type) is known


def refused(merge, base: Path, long: Path, *words: str) -> None:
    target, result = merge(
        {"merge_method": "fim_ties", "base_model": str(base), "models": [{"model": str(long)}], "dtype": "float32"}
    )
    ends_in_one_line(result, *words, absent=target)


def test_a_layer_whose_tensor_lacks_its_number_is_refused(merge, tmp_path):
    base = zoo.build("inkling2_text")
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(zoo.tuned(base), tmp_path / "long")]
    refused(merge, *paths, f"{paths[0]}: ", "model.llm.attn_res.attn_queries.0, which is part of decoder layer 1")


def test_what_the_definition_leaves_out_must_be_in_every_model(merge, tmp_path):
    """Experts, which are one tensor in memory, and one by one in checkpoints."""
    base = zoo.build("deepseek_v3")
    long = zoo.tuned(base)
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(long, tmp_path / "long")]
    file, name = paths[1] / "model.safetensors", "model.layers.1.mlp.experts.0.gate_proj.weight"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
    refused(merge, *paths, f"{paths[1]}: expected the tensor {name}", "saved by the same version of transformers")


def test_experts_may_be_one_tensor_in_one_checkpoint_and_single_in_the_other(merge, tmp_path):
    base = zoo.build("deepseek_v3")
    long = zoo.tuned(base)
    paths = [
        tiny.save(base, tmp_path / "base"),
        tiny.save(long, tmp_path / "single"),
        tiny.save(long, tmp_path / "one"),
    ]
    save_file(long.state_dict(), paths[2] / "model.safetensors", metadata={"format": "pt"})
    merged = []
    for path in paths[1:]:
        config = {"merge_method": "fim_ta", "base_model": str(paths[0]), "models": [{"model": str(path)}]}
        out = merge.ok(config, out=f"{path.name}-merged")[0]
        merged.append(transformers.AutoModelForCausalLM.from_pretrained(out).state_dict())
    for name, value in merged[0].items():
        torch.testing.assert_close(value, merged[1][name], rtol=1e-5, atol=1e-6)


def test_a_tied_head_beside_one_of_its_own_is_refused_with_the_remedy(merge, tmp_path):
    """mergekit's definition of Phi-3 requires a head, and knows no tensor that it could be tied to."""
    base = tiny.build(configure("phi3", {"tie_word_embeddings": True}))
    paths = [tiny.save(base, tmp_path / "base")]
    for name, model in (("copy", base), ("long", tiny.tuned(base, 1))):
        model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
        model.config.tie_word_embeddings = False
        paths.append(tiny.save(model, tmp_path / name))
    refused(
        merge,
        *(paths[0], paths[2], f"{paths[0]}: the checkpoint lacks the tensor lm_head.weight"),
        "tied to model.embed_tokens.weight there; save the models with a copy",
    )
    out, _ = merge.ok({"merge_method": "fim_ta", "base_model": str(paths[1]), "models": [{"model": str(paths[2])}]})
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())


VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def llava() -> transformers.PreTrainedModel:
    cfg = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=configure("llama", {}), image_token_index=96
    )
    return transformers.LlavaForConditionalGeneration(cfg)


def test_the_language_part_of_a_vision_language_model_merges(merge, tmp_path):
    """LLaVA's is a Llama: saved as one, it is merged as one."""
    paths = []
    for name in ("base", "long"):
        whole = llava()
        part = transformers.LlamaForCausalLM(whole.config.text_config)
        part.model.load_state_dict(whole.model.language_model.state_dict())
        part.lm_head.load_state_dict(whole.lm_head.state_dict())
        paths.append(tiny.save(part, tmp_path / name))
    out, _ = merge.ok({"merge_method": "fim_ta", "base_model": str(paths[0]), "models": [{"model": str(paths[1])}]})
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert len(reference.report(out)["fisher"]["layers"]) == LAYERS


def test_an_exported_merge_says_that_the_gates_half_is_not_protected(tmp_path):
    """And the report counts the tensors."""
    base = tiny.build(configure("phi3", {}))
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(tiny.tuned(base, 1), tmp_path / "long")]
    config = {"merge_method": "fim_ties", "base_model": str(paths[0]), "models": [{"model": str(paths[1])}]}
    options = MergeOptions(quiet=True)
    for scale, lost in ((0.7, True), (1, False)):
        plan = resolve(config | {"parameters": {"gate_scale": scale, "norm_tolerance": 0}}, options)
        text = " ".join(render(plan.pre_pass).split())
        assert ("gate's half of 2 fused tensors such as model.layers.0.mlp.gate_up_proj.weight" in text) is lost
        _, exported = export(plan, options)
        found = [loss for loss in losses(plan, exported) if "gate protection" in loss]
        assert len(found) == lost
        assert all("model.layers.0.mlp.gate_up_proj.weight" in loss for loss in found)
        differences = {d.name: d.of_change for d in compare(plan, exported, options)}
        fused = {d for name, d in differences.items() if "gate_up_proj" in name}
        others = {d for name, d in differences.items() if "gate_up_proj" not in name}
        assert max(others) < 1e-5
        assert (min(fused) > 0.05) if lost else (max(fused) < 1e-5)


def test_gate_scale_leaves_fused_tensors_of_unknown_layout_alone(tmp_path):
    """Whoever sets it where; other tensors keep what was set."""
    base = tiny.build(configure("gpt_oss", {}))
    paths = [tiny.save(base, tmp_path / "base"), tiny.save(tiny.tuned(base, 1), tmp_path / "long")]
    slices = [
        {
            "sources": [{"model": str(p), "layer_range": [i, i + 1]} for p in paths],
            "parameters": {"gate_scale": 0.4} if i else {},
        }
        for i in range(LAYERS)
    ]
    plan = resolve({"merge_method": "fim_ties", "base_model": str(paths[0]), "slices": slices})
    scales = {tensor.name: tensor.parameter("gate_scale") for tensor in plan.tensors}
    for layer, given in ((0, 0.7), (1, 0.4)):
        assert scales[f"model.layers.{layer}.mlp.experts.gate_up_proj"] == 1
        assert scales[f"model.layers.{layer}.mlp.experts.gate_up_proj_bias"] == 1
        assert scales[f"model.layers.{layer}.mlp.experts.down_proj"] == given
    assert plan.pre_pass.shared["gate_scale"] == [0.7, 0.4]


def test_the_documentation_lists_every_model():
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    for name in KINDS:
        assert re.search(rf"^\| {re.escape(name)}(?: \(.*?\))? \|", text, re.M), name
