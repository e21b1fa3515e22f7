"""Reproducibility, tolerances of dtypes and of large sums, and properties that hold for any input."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import reference
import tiny
import torch
import transformers
import yaml
from environments import Environment
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded import Loaded
from mergekit.options import MergeOptions
from merges import config_for, trim

from mergekit_fim.coefficients import MAPPINGS, Mapping, importance_scores, merge_coefficients
from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.fisher.measure import measure_checkpoint
from mergekit_fim.fisher.samples import draw_samples
from mergekit_fim.models.inputs import open_model
from mergekit_fim.norms import squared_distance, squared_norm

SETTINGS = FisherSettings(samples=3, seq_len=8, seed=2)
always = settings(derandomize=True, deadline=None, max_examples=150, database=None)


# Reproducibility


@pytest.fixture(scope="module")
def large_pair(tmp_path_factory):
    """Large enough for torch to share out sums and products among threads."""
    folder = tmp_path_factory.mktemp("large")
    base = tiny.build(tiny.config("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2))
    return tiny.save(base, folder / "base"), tiny.save(tiny.tuned(base, 1), folder / "long")


CONFIG = {"dtype": "float32", "parameters": {"fisher_samples": 2, "fisher_seq_len": 16}}
OPTIONS = ("--no-write-model-card", "--no-copy-tokenizer")


def merged_by_a_process(python: Environment | Loaded, paths, folder: Path) -> Path:
    """A merge by another process with one thread, with a cache of its own."""
    folder.mkdir()
    config = {"merge_method": "fim_ties", "base_model": str(paths[0]), "models": [{"model": str(paths[1])}]}
    (folder / "config.yml").write_text(yaml.safe_dump(config | CONFIG), encoding="utf-8")
    environment = {"OMP_NUM_THREADS": "1", "MERGEKIT_FIM_CACHE": str(folder / "cache")}
    python.run("-m", "mergekit_fim", "merge", "config.yml", "out", *OPTIONS, cwd=folder, env=environment)
    return folder / "out"


@pytest.mark.slow
def test_repeated_merges_are_the_same_and_the_number_of_threads_hardly_matters(
    installed, loaded, large_pair, merge, tmp_path
):
    first = merged_by_a_process(installed, large_pair, tmp_path / "first")
    again = merged_by_a_process(loaded, large_pair, tmp_path / "again")
    torch.set_num_threads(2)
    try:
        two, _ = merge.ok(yaml.safe_load((tmp_path / "first" / "config.yml").read_text()), out="two")
    finally:
        torch.set_num_threads(1)
    files = sorted(path.name for path in first.iterdir())
    assert {"model.safetensors", "config.json", "fim_report.json"} <= set(files)
    for name in files:
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    # What may differ are the matrix products, by their last digits: how they are shared out is the libraries' choice.
    expected, found = reference.report(first), reference.report(two)
    for a, b in zip(expected["fisher"]["layers"], found["fisher"]["layers"], strict=True):
        assert b["squared_norms"] == pytest.approx(a["squared_norms"], rel=1e-5)
    for a, b in zip(expected["models"][0]["layers"], found["models"][0]["layers"], strict=True):
        assert b["task_vector_sq_norm"] == a["task_vector_sq_norm"]
        assert b["alpha"] == pytest.approx(a["alpha"], abs=1e-5)
    tensors = reference.load(two)
    for name, value in reference.load(first).items():
        np.testing.assert_allclose(tensors[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("size", [1, 4095, 4097, 1 << 20, 3_000_001])
def test_norms_are_the_same_for_any_number_of_threads(size):
    generator = torch.Generator().manual_seed(size)
    a, b = (torch.randn(size, generator=generator) for _ in range(2))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((float(squared_norm(a)), squared_distance(a, b)))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    assert found[0] == pytest.approx((float(a.double().square().sum()), float((a - b).double().square().sum())), 1e-7)


def test_the_tokens_depend_on_the_settings_only():
    """Not on the device or the dtype that torch is set to, nor on its global generator, which they leave alone."""
    wanted = FisherSettings(4, 16, 7, "sampled")
    first = draw_samples(wanted, 1000)
    assert first.input_ids[0, :4].tolist() == [615, 892, 721, 286]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    drawn = [draw_samples(wanted, 1000)]
    for device in ("meta", "cpu"):
        with torch.device(device):
            drawn.append(draw_samples(wanted, 1000))
    for dtype in (torch.float64, torch.bfloat16):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            drawn.append(draw_samples(wanted, 1000))
        finally:
            torch.set_default_dtype(default)
    for samples in drawn:
        assert samples.input_ids.device.type == samples.uniforms.device.type == "cpu"
        assert samples.input_ids.dtype is torch.int64
        assert samples.uniforms.dtype is torch.float64
        assert torch.equal(samples.input_ids, first.input_ids)
        assert torch.equal(samples.uniforms, first.uniforms)
    assert torch.equal(torch.get_rng_state(), state)
    more = draw_samples(FisherSettings(4, 16, 7, "inputs"), 1000)
    assert torch.equal(more.input_ids, first.input_ids)
    assert not torch.equal(draw_samples(FisherSettings(4, 16, 8), 1000).input_ids, first.input_ids)


# Dtypes


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2), (torch.float64, 1e-5)])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_dtypes_agree(kind, dtype, tolerance, tmp_path):
    """One and the same 16-bit checkpoint, run in each dtype: float32 is the measure."""
    path = tiny.save(tiny.build(tiny.config(kind)), tmp_path / "m", torch.bfloat16)
    if dtype is torch.float16:  # whose numbers a bfloat16 checkpoint may not hold
        path = tiny.save(transformers.AutoModelForCausalLM.from_pretrained(path), tmp_path / "half", torch.float16)
    base = open_model(str(path), None, MergeOptions())
    found, expected = (
        measure_checkpoint(base, SETTINGS, None, MergeOptions(quiet=True), running=running)
        for running in (dtype, torch.float32)
    )
    assert (found.dtype, found.warnings, expected.dtype) == (str(dtype).removeprefix("torch."), (), "float32")
    assert [x.fisher for x in found.layers] == pytest.approx([x.fisher for x in expected.layers], rel=tolerance)
    assert found != expected


# Independence


def alphas_of(result) -> dict[str, list[float]]:
    out, _ = result
    models = reference.report(out)["models"]
    return {m["model"]: [layer["alpha"] for layer in m["layers"]] + [m["alpha_other"]] for m in models}


def test_coefficients_depend_neither_on_other_models_nor_on_the_order(pair, merge):
    long, third = {"model": str(pair.long)}, {"model": str(pair.third), "parameters": {"weight": 0.3}}
    common = {"parameters": {"fisher_samples": 3, "fisher_seq_len": 8, "alpha_mean": 0.4}}
    both = alphas_of(merge.ok(config_for(pair, models=[long, third], **common), out="both"))
    swapped = alphas_of(merge.ok(config_for(pair, models=[third, long], **common), out="swapped"))
    alone = alphas_of(merge.ok(config_for(pair, models=[long], **common), out="alone"))
    assert both == swapped
    assert alone == {str(pair.long): both[str(pair.long)]}
    assert both[str(pair.long)] != both[str(pair.third)]


def test_the_merge_does_not_depend_on_the_order_of_the_models(pair, merge):
    models = [{"model": str(path)} for path in (pair.long, pair.third)]
    common = {"parameters": {"fisher_samples": 3, "fisher_seq_len": 8}}
    first, second = (
        reference.load(merge.ok(config_for(pair, models=order, **common), out=name)[0])
        for name, order in (("first", models), ("second", models[::-1]))
    )
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


# Large sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_over_a_billion_elements_keep_six_digits(dtype):
    """Of equal numbers, where a float32 sum would stop growing at 2^24 of them; a view that takes no memory."""
    count = 10**9 + 7
    a, b = (torch.tensor([value], dtype=dtype) for value in (0.0123, -0.0457))
    exact = count * float(a.double() ** 2)
    assert float(squared_norm(a.expand(count))) == pytest.approx(exact, rel=1e-6)
    if dtype is torch.bfloat16:
        exact = count * float((a.double() - b.double()) ** 2)
        assert squared_distance(a.expand(count), b.expand(count)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_sums_of_numbers_of_all_sizes_keep_six_digits(spread):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5_000_000, generator=generator) * torch.exp(
        spread * torch.randn(5_000_000, generator=generator)
    )
    for dtype in (torch.float32, torch.bfloat16):
        x = values.to(dtype)
        assert float(squared_norm(x)) == pytest.approx(float(x.double().square().sum()), rel=1e-6)


def test_a_float16_norm_does_not_overflow():
    values = torch.full((1000,), 6e4, dtype=torch.float16)
    exact = 1000 * float(values[0]) ** 2
    assert float(squared_norm(values)) == pytest.approx(exact)
    assert squared_distance(values, -values) == pytest.approx(4 * exact)


# Properties

positive = st.floats(min_value=1e-12, max_value=1e12)
scores = st.lists(positive, min_size=1, max_size=40)
any_scores = st.lists(st.one_of(st.just(0.0), st.floats(0, 1e300)), min_size=1, max_size=40)


@st.composite
def mappings(draw, sharpest=1e6, least=-1e6):
    low = draw(st.floats(-3, 3))
    high = low + draw(st.floats(0.01, 3))
    part = draw(st.one_of(st.none(), st.floats(0.001, 0.999)))
    mean = None if part is None else low + part * (high - low)
    return Mapping(draw(st.floats(least, sharpest)), low, high, mean, draw(st.sampled_from(MAPPINGS)))


@always
@given(any_scores, mappings())
def test_coefficients_are_finite_and_within_their_ends(values, mapping):
    alphas = merge_coefficients(values, mapping)
    assert len(alphas) == len(values)
    slack = 1e-12 * (abs(mapping.alpha_min) + abs(mapping.alpha_max))
    for alpha, score in zip(alphas, values, strict=True):
        assert math.isfinite(alpha)
        assert mapping.alpha_min - slack <= alpha <= mapping.alpha_max + slack
        if score == 0:
            assert alpha == mapping.alpha_max
    scored = [alpha for alpha, score in zip(alphas, values, strict=True) if score > 0]
    if mapping.alpha_mean is not None and scored:
        assert math.fsum(scored) / len(scored) == pytest.approx(mapping.alpha_mean, abs=1e-9)


@always
@given(scores, mappings(1e3, 0))
def test_a_higher_score_never_has_a_higher_coefficient(values, mapping):
    pairs = sorted(zip(values, merge_coefficients(values, mapping), strict=True))
    for (low_score, high_alpha), (high_score, low_alpha) in itertools.pairwise(pairs):
        assert low_score <= high_score
        assert low_alpha <= high_alpha + 1e-12


@always
@given(
    st.lists(st.tuples(positive, positive), min_size=1, max_size=40),
    st.floats(1e-6, 1e6),
    mappings(10, -10),
    st.randoms(use_true_random=False),
)
def test_neither_a_common_factor_of_f_nor_the_order_of_the_layers_matters(layers, factor, mapping, random):
    fisher, norms = zip(*layers, strict=True)
    alphas = merge_coefficients(importance_scores(fisher, norms), mapping)
    scaled = merge_coefficients(importance_scores([factor * f for f in fisher], norms), mapping)
    assert scaled == pytest.approx(alphas, abs=1e-9)
    order = list(range(len(layers)))
    random.shuffle(order)
    shuffled = merge_coefficients(importance_scores([fisher[i] for i in order], [norms[i] for i in order]), mapping)
    assert shuffled == pytest.approx([alphas[i] for i in order], abs=1e-9)


@always
@given(
    st.lists(
        st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5]), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=300
    ),
    st.floats(1e-6, 1.0),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_trimming_keeps_exactly_k_of_the_largest(values, density, dtype):
    delta = torch.tensor(values, dtype=dtype)
    kept = trim(delta.clone(), density)
    keep = max(1, int(density * len(values)))
    changed = kept != delta
    assert torch.equal(kept[changed], torch.zeros(int(changed.sum()), dtype=dtype))  # an entry is kept or set to zero
    largest = delta.abs().sort(descending=True).values[:keep]
    assert torch.equal(kept.abs().sort(descending=True).values[:keep], largest)
    assert int(torch.count_nonzero(kept)) == int(torch.count_nonzero(largest))


@settings(derandomize=True, deadline=None, max_examples=15, database=None)
@given(st.integers(140_000, 600_000), st.floats(0.001, 0.999), st.integers(1, 2**30), st.booleans())
def test_trimming_long_tensors_keeps_exactly_k_of_the_largest(size, density, seed, narrow):
    """Long enough to be taken in runs, with the threshold bracketed by a sample."""
    delta = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    if narrow:
        delta = delta.bfloat16().float()  # few distinct magnitudes
    kept = trim(delta.clone(), density)
    keep = max(1, int(density * size))
    largest = delta.abs().sort(descending=True).values[:keep]
    assert torch.equal(kept.abs().sort(descending=True).values[:keep], largest)
    assert int(torch.count_nonzero(kept)) == int(torch.count_nonzero(largest))
    assert torch.equal(torch.where(kept == 0, delta, kept), delta)
