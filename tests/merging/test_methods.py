"""One tensor at a time: the kernels against NumPy, and the identities with mergekit's own methods."""

import math

import numpy as np
import pytest
import reference
import torch
from mergekit.merge_methods import TensorGroup, get
from merges import trim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mergekit_fim.errors import FimError
from mergekit_fim.merging.gates import is_gate_projection
from mergekit_fim.merging.trim import find_threshold

GATE = "model.layers.1.mlp.gate_proj.weight"


def tensors(count, shape=(40, 30), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).to(dtype)
    return [base] + [(base + 0.1 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(count)]


def run(method, inputs, name="model.layers.1.mlp.up_proj.weight", **parameters):
    if method == "fim_ties" or method == "ties":
        parameters.setdefault("density", [0.3] * (len(inputs) - 1))
    group = TensorGroup.from_tensors(inputs, base_index=0, name=name)
    return get(method)([group], parameters=parameters)[0]


def test_a_matrix_that_lies_transposed():
    """As a pickled checkpoint may hold it."""
    inputs = tensors(1)
    shared = {"alpha": [0.5], "weight": [1.0], "density": 0.2, "kron_source": [""]}
    found = run("fim_kron", [t.T.contiguous().T for t in inputs], **shared)
    assert torch.equal(found, run("fim_kron", inputs, **shared))
    moved = (found - inputs[0]).count_nonzero()
    assert 0 < moved <= 0.2 * found.numel()


@pytest.mark.parametrize("method", ["fim_ta", "fim_ties"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tolerance", [0.0, 0.05, 1e-4])
def test_matches_numpy(method, count, normalize, tolerance):
    inputs = tensors(count)
    alphas, weights, densities = [0.9, 0.35, 0.6][:count], [1.0, 0.5, 2.0][:count], [0.3, 0.5, 1.0][:count]
    merged = run(
        method,
        inputs,
        name=GATE,
        alpha=alphas,
        weight=weights,
        density=densities,
        normalize=normalize,
        gate_scale=0.7,
        norm_tolerance=tolerance,
        **{"lambda": 1.5},
    )
    arrays = [t.double().numpy() for t in inputs]
    expected = reference.merge_tensor(
        method, arrays[0], arrays[1:], alphas, weights, densities, 0.7, tolerance, normalize, 1.5
    )
    np.testing.assert_allclose(merged.numpy(), expected, rtol=2e-5, atol=2e-6)
    if tolerance == 1e-4:  # the calibration did something
        uncalibrated = reference.merge_tensor(
            method, arrays[0], arrays[1:], alphas, weights, densities, 0.7, 0, normalize, 1.5
        )
        assert not np.allclose(merged.numpy(), uncalibrated, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("alphas", [[0.3], [0.3, 0.8], [1.2, -0.4, 0.5]])
@pytest.mark.parametrize("normalize", [True, False])
def test_fim_ta_by_hand_is_task_arithmetic(alphas, normalize):
    inputs = tensors(len(alphas))
    ours = run("fim_ta", inputs, name=GATE, alpha=alphas)
    torch.testing.assert_close(ours, run("task_arithmetic", inputs, weight=alphas), rtol=1e-6, atol=1e-6)
    # normalize and weight as mergekit has them: α = 1 leaves nothing but them.
    ours = run("fim_ta", inputs, alpha=1.0, weight=alphas, normalize=normalize)
    theirs = run("task_arithmetic", inputs, weight=alphas, normalize=normalize)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [[1.0], [0.5], [1.0, 0.4], [0.7, 1.0, 0.2], [1.0, 0.0], [1.0, -0.5, 0.3]])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_fim_ties_with_alpha_one_is_ties(weights, normalize, scale):
    inputs = tensors(len(weights), seed=3)
    common = {"weight": weights, "normalize": normalize, "lambda": scale}
    ours = run("fim_ties", inputs, name=GATE, alpha=1.0, gate_scale=1.0, norm_tolerance=0.0, **common)
    torch.testing.assert_close(ours, run("ties", inputs, **common), rtol=1e-5, atol=1e-6)


def test_a_weight_is_not_normalised_away_by_alpha():
    """Two models that agree everywhere: the result is the weighted mean of the α δ, not of the δ."""
    base = torch.zeros(8)
    delta = torch.arange(1.0, 9.0)
    merged = run(
        "fim_ties", [base, delta, delta], alpha=[0.5, 0.25], weight=[3.0, 1.0], density=1.0, norm_tolerance=0.0
    )
    torch.testing.assert_close(merged, delta * (3 * 0.5 + 1 * 0.25) / 4)


def test_gate_protection_applies_to_gate_projections_only():
    inputs = tensors(1)
    plain = run("fim_ties", inputs, alpha=0.5, norm_tolerance=0.0)
    gate = run("fim_ties", inputs, name=GATE, alpha=0.5, norm_tolerance=0.0)
    torch.testing.assert_close(gate - inputs[0], 0.7 * (plain - inputs[0]), rtol=1e-4, atol=1e-6)
    assert torch.equal(run("fim_ta", inputs, name=GATE, alpha=0.5), run("fim_ta", inputs, alpha=0.5))


FUSED_EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"
FUSED = [("model.layers.1.mlp.gate_up_proj.weight", (8, 6)), (FUSED_EXPERTS, (3, 4, 5))]


@pytest.mark.parametrize(("name", "shape"), FUSED)
@pytest.mark.parametrize("count", [1, 2])
def test_gate_protection_of_the_gates_half(name, shape, count):
    """Each half is merged as a tensor of its own, with its own target norm: the gate's by α × gate_scale."""
    inputs = tensors(count, shape)
    inputs[1] *= 1.5
    options = {"weight": [1.0, 0.5][:count], "density": 1.0, "norm_tolerance": 1e-4, "alpha": [0.9, 0.3][:count]}
    found = run("fim_ties", inputs, name=name, **options).chunk(2, len(shape) - 2)
    gate, up = zip(*(t.chunk(2, len(shape) - 2) for t in inputs), strict=True)
    torch.testing.assert_close(found[0], run("fim_ties", [t.contiguous() for t in gate], name=GATE, **options))
    torch.testing.assert_close(found[1], run("fim_ties", [t.contiguous() for t in up], **options))
    assert not torch.allclose(found[0], run("fim_ties", [t.contiguous() for t in gate], **options), rtol=0.01)


@pytest.mark.parametrize(("name", "shape"), FUSED)
def test_a_fused_tensor_is_trimmed_as_a_whole(name, shape):
    inputs = tensors(1, shape)
    merged = run("fim_ties", inputs, name=name, alpha=1.0, density=0.3, norm_tolerance=0.0)
    kept = trim(inputs[1] - inputs[0], 0.3)
    gate, up = kept.chunk(2, len(shape) - 2)
    torch.testing.assert_close(merged - inputs[0], torch.cat([0.7 * gate, up], len(shape) - 2), rtol=1e-4, atol=1e-6)
    plain = run("fim_ties", inputs, name=name, alpha=1.0, density=0.3, norm_tolerance=0.0, gate_scale=1.0)
    torch.testing.assert_close(plain - inputs[0], kept, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.gate_proj.weight", True),
        ("model.layers.0.mlp.experts.3.gate_proj.weight", True),
        ("model.layers.0.mlp.shared_experts.gate_proj.weight", True),
        ("model.layers.0.feed_forward.w1.weight", True),
        ("transformer.h.0.mlp.c_fc_0.weight", True),
        ("transformer.h.0.mlp.c_fc2.weight", True),
        ("transformer.h.0.mlp.w2.weight", True),
        ("model.layers.0.mlp.gate.weight", False),  # a router
        ("model.layers.0.self_attn.gate_proj.weight", False),  # AFMoE's attention
        ("model.layers.0.mlp.shared_expert_gate.weight", False),
        ("model.layers.0.mlp.gate_up_proj.weight", False),
        ("model.layers.0.mlp.up_proj.weight", False),
        ("model.layers.0.feed_forward.w2.weight", False),
        ("transformer.h.0.mlp.w1.weight", False),
        ("transformer.h.0.mlp.c_fc.weight", False),
    ],
)
def test_gate_projection_names(name, expected):
    assert is_gate_projection(name) is expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_wide_and_the_result_in_the_inputs_dtype(dtype):
    inputs = tensors(2, dtype=dtype)
    merged = run("fim_ta", inputs, alpha=[0.3, 0.4])
    assert merged.dtype == dtype
    wide = [t.double() for t in inputs]
    exact = wide[0] + 0.3 * (wide[1] - wide[0]) + 0.4 * (wide[2] - wide[0])
    if dtype is torch.float64:
        torch.testing.assert_close(merged, exact, rtol=1e-14, atol=1e-14)
    else:  # correctly rounded once, but for ties that float32 arithmetic breaks the other way
        assert (merged != exact.to(dtype)).float().mean() < 0.01


@pytest.mark.parametrize("method", ["fim_ta", "fim_ties"])
def test_inputs_are_not_changed(method):
    inputs = tensors(2)
    copies = [t.clone() for t in inputs]
    run(method, inputs, alpha=[0.3, 0.4])
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("method", ["fim_ta", "fim_ties"])
def test_without_alpha_there_is_no_merge(method):
    with pytest.raises(TypeError, match="Missing required parameter alpha"):
        run(method, tensors(1))


@pytest.mark.parametrize("shape", [(7,), (1,), (16, 9), (3, 5, 4), (0,)])
@pytest.mark.parametrize("density", [1e-9, 0.2, 0.5, 0.999, 1.0])
def test_trim_keeps_the_largest(shape, density):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    kept = trim(delta.clone(), density)
    n = delta.numel()
    keep = min(n, max(1, int(density * n)))
    assert int((kept != 0).sum()) == keep
    if n:
        expected = delta.abs().flatten().sort(descending=True).values[:keep]
        assert torch.equal(kept.abs().flatten().sort(descending=True).values[:keep], expected)


def test_trim_spreads_its_choice_among_equals_over_the_tensor():
    assert trim(torch.tensor([1.0, -2.0, 2.0, 2.0, 0.5]), 0.4).tolist() == [0, -2, 2, 0, 0]
    kept = trim(torch.ones(1000), 0.1).nonzero()[:, 0]
    assert kept.tolist() == list(range(0, 1000, 10))
    assert trim(torch.zeros(6), 0.5).tolist() == [0] * 6


def test_trim_keeps_the_density_on_the_few_levels_of_16_bit_differences():
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(100_000, generator=generator)).bfloat16()
    tuned = (base + 1e-4 * torch.randn(100_000, generator=generator)).bfloat16()
    delta = tuned.float() - base.float()
    kept = trim(delta.clone(), 0.2)
    assert int((kept != 0).sum()) == 20_000
    dropped = delta[kept == 0].abs().max()
    assert kept[kept != 0].abs().min() >= dropped


def test_a_model_without_a_task_vector_changes_nothing():
    """Beside another one, where norms are calibrated too; as in stock `ties`, where it takes no part."""
    base, tuned = tensors(1)
    tuned = tuned * 1.6
    alone = run("fim_ties", [base, tuned], alpha=0.6, norm_tolerance=1e-4)
    beside = run("fim_ties", [base, tuned, base.clone()], alpha=[0.6, 1.0], norm_tolerance=1e-4)
    torch.testing.assert_close(beside, alone, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(run("fim_ties", [base, tuned], alpha=0.6, norm_tolerance=0.0), alone)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gate_scale", [1.0, 0.0])
def test_a_model_with_an_alpha_of_zero_changes_nothing(normalize, gate_scale):
    """The disjoint merge leaves it out; so does the norm that the result is calibrated to."""
    base, tuned, other = tensors(2)
    common = {"normalize": normalize, "norm_tolerance": 1e-4, "name": GATE, "gate_scale": gate_scale, "density": 1.0}
    alone = run("fim_ties", [base, tuned * 8], alpha=0.6, **common)
    beside = run("fim_ties", [base, tuned * 8, other], alpha=[0.6, 0.0], **common)
    torch.testing.assert_close(beside, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
@pytest.mark.parametrize("weights", [[0.3, 0.6, -0.9], [0.7, 0.1, -0.8], [3e-4, 6e-4, -9e-4]])
def test_weights_that_cancel_but_for_rounding_divide_by_nothing(method, weights):
    inputs = tensors(3)
    deltas = [t - inputs[0] for t in inputs[1:]]
    merged = run(method, inputs, weight=weights, alpha=1.0, density=1.0, normalize=True, norm_tolerance=0.0)
    assert (merged - inputs[0]).abs().max() < 20 * sum(d.abs().max() for d in deltas)  # the smallest other divisor: 0.1


def test_nan_leaves_no_order_and_ends_in_an_error():
    base, tuned = tensors(1)
    with pytest.raises(FimError, match=r"up_proj.weight: the merged tensor isn't finite"):
        run("fim_ties", [base, torch.full_like(tuned, math.nan)], alpha=0.5)
    tuned[0, 0] = math.nan
    with pytest.raises(FimError, match="isn't finite"):
        run("fim_ties", [base, tuned], alpha=0.5)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.nbytes)
        return result


@pytest.mark.parametrize(("changed", "equal"), [(0.0, False), (0.01, False), (0.15, False), (0.5, True), (1.0, True)])
def test_trimming_many_equal_entries_takes_little_memory(changed, equal):
    """Zeros, as of frozen embeddings and sparse fine-tunes, take none; entries that are equal, a few bytes each."""
    size = 1 << 22
    delta = torch.zeros(size)
    count = int(changed * size)
    delta[:count] = 1.0 if equal else torch.randn(count, generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        threshold = find_threshold(lambda run: delta[run].clone(), size, 0.2, delta.device)
    assert largest.bytes <= max(4 * count * equal, 1 << 21)
    kept = trim(delta, 0.2)
    keep = int(0.2 * size)
    assert int(torch.count_nonzero(kept)) == min(keep, count)
    assert (threshold is None) is (count <= keep)
