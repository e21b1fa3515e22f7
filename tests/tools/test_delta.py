"""`mergekit-fim delta`: the statistics of a task vector, against numpy, and what it refuses."""

import json
import re

import numpy as np
import pytest
import reference
import tiny
import torch
from merges import ends_in_one_line, run

import mergekit_fim
from mergekit_fim.tools.delta import edge_ratio, first_singular_value, gaussian_share, measure_tensor, summarize


def by_numpy(base: np.ndarray, model: np.ndarray) -> dict:
    """Of one tensor of distinct magnitudes, as the docstrings define them."""
    delta = (model.astype(np.float32) - base.astype(np.float32)).astype(np.float64).ravel()
    centred = delta - delta.mean()
    keep = max(1, int(0.02 * delta.size))
    squares = np.sort(delta**2)[::-1]
    return {
        "entries": delta.size,
        "zeros": np.mean(delta == 0),
        "relative_norm": np.linalg.norm(delta) / np.linalg.norm(base.astype(np.float64)),
        "excess_kurtosis": np.mean(centred**4) / np.mean(centred**2) ** 2 - 3,
        "top_share": squares[:keep].sum() / squares.sum(),
    }


def ratio_by_numpy(delta: np.ndarray) -> float:
    m, n = delta.shape
    return np.linalg.norm(delta, 2) / (np.sqrt(np.mean(delta**2)) * (np.sqrt(m) + np.sqrt(n)))


def measured(base: np.ndarray, model: np.ndarray):
    return summarize([measure_tensor(torch.from_numpy(base), torch.from_numpy(model), ratios=True)])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (400,), (700, 500)])
def test_statistics_of_a_tensor(shape, dtype, rng):
    base = rng.normal(size=shape).astype(dtype)
    delta = 0.1 * rng.standard_t(3, size=shape) + 0.05
    delta[rng.random(size=shape) < 0.3] = 0
    model = (base + delta).astype(dtype)
    found = measured(base, model)
    for name, value in by_numpy(base, model).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5), name
    if len(shape) == 2:
        its = model.astype(np.float64) - base.astype(np.float64)
        assert found.edge_ratio == found.largest_edge_ratio == pytest.approx(ratio_by_numpy(its), rel=0.01)
    else:
        assert found.edge_ratio is None


def test_gaussian_noise(rng):
    base = np.zeros((800, 600), np.float32)
    found = measured(base, rng.normal(size=base.shape).astype(np.float32))
    assert found.relative_norm is None
    assert found.excess_kurtosis == pytest.approx(0, abs=0.05)
    assert found.top_share == pytest.approx(gaussian_share(0.02), rel=0.02)
    assert found.gaussian_top_share == pytest.approx(gaussian_share(0.02))
    assert found.edge_ratio == pytest.approx(1, abs=0.02)
    thinned = rng.normal(size=base.shape) * (rng.random(size=base.shape) < 0.4)
    found = measured(base, thinned.astype(np.float32))
    assert found.zeros == pytest.approx(0.6, abs=0.01)
    assert found.top_share == pytest.approx(found.gaussian_top_share, rel=0.02)
    assert found.gaussian_top_share == pytest.approx(gaussian_share(0.05), rel=0.01)
    assert found.edge_ratio == pytest.approx(1, abs=0.05)


def test_the_gaussians_share_is_that_of_its_integral():
    x = np.linspace(2.3263478740408408, 12, 200001)
    tail = np.trapezoid(x**2 * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), x)
    assert gaussian_share(0.02) == pytest.approx(2 * tail, rel=1e-6)
    assert round(gaussian_share(0.02), 3) == 0.144
    assert gaussian_share(1.0) == pytest.approx(1)


def test_structure_of_low_rank(rng):
    noise = rng.normal(size=(300, 200))
    u, v = rng.normal(size=300), rng.normal(size=200)
    planted = (noise + 5 * 31.6 * np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))).astype(np.float32)
    found = edge_ratio(torch.from_numpy(planted))
    assert found == pytest.approx(ratio_by_numpy(planted), rel=1e-4)
    assert found > 3
    alone = torch.from_numpy(np.outer(u, v).astype(np.float32))
    assert edge_ratio(alone) == pytest.approx(np.sqrt(300 * 200) / (np.sqrt(300) + np.sqrt(200)), rel=1e-4)
    assert edge_ratio(1e-30 * alone.double()) == pytest.approx(edge_ratio(alone), rel=1e-4)
    assert edge_ratio(torch.zeros(3, 4)) is None


@pytest.mark.parametrize("shape", [(2, 2), (5, 300), (300, 5), (200, 200), (400, 150)])
def test_first_singular_values(shape, rng):
    for matrix in (rng.normal(size=shape), rng.standard_t(3, size=shape)):
        found = first_singular_value(torch.from_numpy(matrix))
        assert found == pytest.approx(np.linalg.norm(matrix, 2), rel=0.01)
        assert found <= np.linalg.norm(matrix, 2) * (1 + 1e-9)


def test_every_expert_is_a_matrix(rng):
    base = np.zeros((3, 40, 30), np.float32)
    model = rng.normal(size=base.shape).astype(np.float32)
    model[1] += 5
    found = measured(base, model)
    ratios = sorted(ratio_by_numpy(expert) for expert in model)
    assert found.edge_ratio == pytest.approx(ratios[1], rel=0.01)
    assert found.largest_edge_ratio == pytest.approx(ratios[2], rel=0.01)
    kernel = measured(base[:, :1], model[:, :1])
    assert kernel.edge_ratio is None


def test_equal_magnitudes_and_nothing():
    base = np.zeros(1000, np.float32)
    model = np.where(np.arange(1000) % 2, 0.5, -0.5).astype(np.float32)
    found = measured(base, model)
    assert (found.top_share, found.excess_kurtosis) == (pytest.approx(0.02), pytest.approx(-2))
    found = measured(model, model)
    assert (found.zeros, found.relative_norm) == (1, 0)
    assert (found.excess_kurtosis, found.top_share, found.edge_ratio) == (None, None, None)
    one = measured(base, np.where(np.arange(1000) == 7, 3, 0).astype(np.float32))
    assert one.top_share == one.gaussian_top_share == 1
    assert summarize([]).zeros is None


# the command


def kinds_by_numpy(base: dict, model: dict) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for name, values in base.items():
        if match := re.match(r"(?:model\.layers|transformer\.h)\.\d+\.(.*)\.weight", name):
            statistics = by_numpy(values, model[name])
            if values.ndim == 2:
                statistics["ratio"] = ratio_by_numpy(model[name].astype(np.float64) - values)
            found.setdefault(match[1], []).append(statistics)
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_command(kind, tmp_path):
    base = tiny.build(tiny.config(kind))
    paths = [
        tiny.save(m, tmp_path / n, max_shard_size="40KB") for n, m in (("base", base), ("long", tiny.tuned(base, 1)))
    ]
    assert len(list(paths[0].glob("*.safetensors"))) > 1
    result = run("delta", *paths, "--json", tmp_path / "d.json", "--quiet")
    content = json.loads((tmp_path / "d.json").read_text())
    assert (content["format"], content["model"]) == ("mergekit-fim/delta", str(paths[1]))
    expected = kinds_by_numpy(*map(reference.load, paths))
    assert expected.keys() <= content["kinds"].keys()
    for name, tensors in expected.items():
        found = content["kinds"][name]
        assert found["entries"] == sum(its["entries"] for its in tensors)
        for key in ("zeros", "excess_kurtosis"):
            assert found[key] == pytest.approx(np.mean([its[key] for its in tensors]), rel=1e-4, abs=1e-5), name
        ratios = [its["ratio"] for its in tensors if "ratio" in its]
        assert found["edge_ratio"] == (pytest.approx(np.median(ratios), rel=0.01) if ratios else None)
    entries = sum(its["entries"] for its in content["kinds"].values())
    assert content["layers"]["entries"] == entries
    total = sum(values.size for values in reference.load(paths[0]).values())
    assert entries + content["outside"]["entries"] == total
    assert content["outside"]["edge_ratio"] is None
    rows = [line.split() for line in result.output.splitlines()]
    attention = "self_attn.q_proj" if kind == "llama" else "attn.c_attn"
    (row,) = (row for row in rows if row[:1] == [attention])
    assert float(row[-2]) == pytest.approx(content["kinds"][attention]["edge_ratio"], rel=0.01)
    for word in ("zeros: share", "Gauss: of", "Marchenko-Pastur", "all decoder layers"):
        assert word in result.output


@pytest.mark.parametrize("columns", [80, 100])
def test_the_table_fits_the_terminal(columns, pair, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run("delta", pair.base, pair.long, "-q").output.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "kurtosis" in line) :]
    assert max(map(len, table)) <= columns
    assert any(line.split()[0].endswith("ention_layernorm") for line in table if line.strip())


def test_experts_share_a_row(tmp_path):
    base = tiny.build(tiny.config("qwen3_moe"))
    paths = [tiny.save(m, tmp_path / n) for n, m in (("base", base), ("long", tiny.tuned(base, 1)))]
    kinds = mergekit_fim.measure_delta(*paths).kinds
    experts = [name for name in kinds if "experts" in name]
    assert experts
    assert not any(re.search(r"\d", name) for name in experts)
    assert all(kinds[name].largest_edge_ratio > kinds[name].edge_ratio > 0.5 for name in experts)


def test_low_precision_leaves_zeros(tmp_path):
    base = tiny.build(tiny.config("llama"))
    models = {"base": base, "long": tiny.tuned(base, 1, scale=1e-4)}
    paths = [tiny.save(model, tmp_path / name, torch.bfloat16) for name, model in models.items()]
    found = mergekit_fim.measure_delta(*paths)
    assert 0.3 < found.layers.zeros < 0.7
    assert mergekit_fim.measure_delta(paths[0], paths[0]).layers.zeros == 1


def test_a_head_that_one_model_has(tmp_path):
    base = tiny.build(tiny.config("qwen2", tie_word_embeddings=True))
    long = tiny.tuned(base, 1, cfg=tiny.config("qwen2", tie_word_embeddings=False))
    paths = [tiny.save(m, tmp_path / n) for n, m in (("base", base), ("tied", tiny.tuned(base, 2)), ("long", long))]
    entries = [mergekit_fim.measure_delta(paths[0], path).outside.entries for path in paths[1:]]
    assert entries == [tiny.VOCAB * 32 + 32, 2 * tiny.VOCAB * 32 + 32]


def test_vocabularies_that_differ_are_left_out(pair, tmp_path):
    other = tiny.save(tiny.build(tiny.config("llama", vocab_size=101), 1), tmp_path / "long")
    result = run("delta", pair.base, other, "-q")
    said = " ".join(result.output.split())
    assert "left out, as the vocabularies differ: model.embed_tokens.weight ([97, 32] and [101, 32])" in said
    found = mergekit_fim.measure_delta(pair.base, other)
    assert (found.outside.entries, len(found.notes)) == (32, 2)


def test_what_is_refused(pair, tmp_path):
    broken = tiny.tuned(tiny.build(tiny.config("llama")), 1)
    with torch.no_grad():
        broken.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    broken = tiny.save(broken, tmp_path / "broken")
    other = tiny.save(tiny.build(tiny.config("qwen2")), tmp_path / "other")
    small = tiny.save(tiny.build(tiny.config("llama", intermediate_size=40)), tmp_path / "small")
    for model, *words in (
        (broken, "model.layers.2.mlp.up_proj.weight (decoder layer 2) contains NaN"),
        (other, str(other), "expected model_type llama", "found qwen2", "must share one architecture"),
        (small, str(small), "expected intermediate_size 48", "found 40"),
        (tmp_path / "none", "none", "expected the folder of a model"),
    ):
        ends_in_one_line(run("delta", pair.base, model, "-q", "--json", tmp_path / "d.json", ok=False), *words)
    ends_in_one_line(run("delta", broken, pair.base, "-q", ok=False), f"{broken}: tensor", "contains NaN")
    ends_in_one_line(run("delta", pair.base, pair.long, "--device", "cuda", ok=False), "--device cuda")
    for path, word in ((tmp_path / "no" / "d.json", "doesn't exist"), (pair.long / "config.json", "take the place")):
        ends_in_one_line(run("delta", pair.base, pair.long, "--json", path, ok=False), word)
    assert not (tmp_path / "d.json").exists()
