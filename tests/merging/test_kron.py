"""The merge by Kronecker factors against the Kronecker system itself, solved by NumPy, and what must hold of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_fim.merging.kron import InputMap, Side, damping_of, merge_by_both, spread

DAMPING = 1e-3


def damped(rows: np.ndarray, damping: float) -> np.ndarray:
    """A factor, as METHOD has it: the mean of the outer products, and a part of its mean diagonal."""
    factor = rows.T @ rows / len(rows)
    return factor + damping * np.trace(factor) / len(factor) * np.eye(len(factor))


def dense(deltas, inputs, gradients, betas, damping=DAMPING) -> np.ndarray:
    """Σ_k w_k (G_k ⊗ A_k) vec Δ = Σ_m β_m (G_m ⊗ A_m) vec δ_m, row by row, as one linear system."""
    weights = [1 - sum(betas), *betas]
    a = [damped(x, damping) for x in inputs]
    g = [np.eye(len(deltas[0]))] * len(a) if gradients is None else [damped(b, damping) for b in gradients]
    kron = [np.kron(x, y) for x, y in zip(g, a, strict=True)]
    system = sum(w * k for w, k in zip(weights, kron, strict=True))
    right = sum(b * k @ d.reshape(-1) for b, k, d in zip(betas, kron[1:], deltas, strict=True))
    return np.linalg.solve(system, right).reshape(deltas[0].shape)


def case(seed=0, models=1, outputs=5, inputs=7, tokens=6, scale=0.0, repeated=False):
    """Task vectors, inputs and gradients; `scale`: the decades that the directions' sizes spread over."""
    random = np.random.default_rng(seed)
    deltas = [random.normal(size=(outputs, inputs)) for _ in range(models)]
    sides = []
    for width in (inputs, outputs):
        sizes = 10 ** (scale * random.uniform(0, 1, width))
        turn = np.linalg.qr(random.normal(size=(width, width)))[0]
        first = random.normal(size=(tokens, width)) * sizes @ turn
        others = [first + 0.5 * random.normal(size=(tokens, width)) * sizes @ turn for _ in range(models)]
        rows = [first, *others]
        sides.append([np.concatenate([x, x[: tokens // 2]]) if repeated else x for x in rows])
    return deltas, *sides


def merged(deltas, inputs, gradients, betas, damping=DAMPING, dtype=torch.float64) -> np.ndarray:
    its, a = [torch.tensor(d, dtype=dtype) for d in deltas], [torch.tensor(x) for x in inputs]
    if gradients is None:
        found = InputMap(a, betas, damping, dtype)(its)
    else:
        g = [torch.tensor(b) for b in gradients]
        found = merge_by_both(its, Side(a, damping), Side(g, damping), betas)
    assert found.dtype is dtype
    return found.double().numpy()


def close(found, expected, tolerance=1e-8):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


KINDS = pytest.mark.parametrize("both", [False, True], ids=["inputs", "both"])


@KINDS
@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 2, 3, 6, 20])
@pytest.mark.parametrize("repeated", [False, True])
def test_as_the_kronecker_system(both, models, tokens, repeated):
    deltas, inputs, gradients = case(models=models, tokens=tokens, repeated=repeated)
    betas = [0.5, 0.2, 0.15][:models]
    gradients = gradients if both else None
    close(merged(deltas, inputs, gradients, betas), dense(deltas, inputs, gradients, betas), 1e-6)


@KINDS
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.floats(0.01, 0.99))
def test_on_any_shape(both, seed, outputs, width, tokens, beta):
    deltas, inputs, gradients = case(seed, 1, outputs, width, tokens, scale=1.0)
    gradients = gradients if both else None
    close(merged(deltas, inputs, gradients, [beta]), dense(deltas, inputs, gradients, [beta]), 1e-5)


@KINDS
@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("tokens", [4, 20])
def test_directions_of_very_different_sizes(both, models, tokens):
    """Inputs' squares over eight decades, as activations have them, and task vectors in float32."""
    deltas, inputs, gradients = case(3, models, tokens=tokens, scale=4.0)
    betas, gradients = [0.4, 0.3][:models], gradients if both else None
    expected = dense(deltas, inputs, gradients, betas)
    close(merged(deltas, inputs, gradients, betas), expected, 1e-5)
    close(merged(deltas, inputs, gradients, betas, dtype=torch.float32), expected, 2e-3)


@KINDS
def test_in_float32(both):
    deltas, inputs, gradients = case(1, 2, outputs=12, inputs=20, tokens=8)
    gradients = gradients if both else None
    found = merged(deltas, inputs, gradients, [0.4, 0.3], dtype=torch.float32)
    close(found, dense(deltas, inputs, gradients, [0.4, 0.3]), 2e-5)


@pytest.mark.parametrize("models", [1, 2])
def test_many_outputs_take_the_map_itself(models):
    """The first call makes it of the thin matrices, and others use it."""
    deltas, inputs, _ = case(2, models, outputs=60, inputs=14, tokens=4)
    betas, its = [0.4, 0.3][:models], [torch.tensor(d) for d in deltas]
    made = InputMap([torch.tensor(x) for x in inputs], betas, DAMPING, torch.float64)
    few = made([d[:2] for d in its]).numpy()
    expected = dense(deltas, inputs, None, betas)
    close(few, expected[:2])
    assert made._basis is not None
    for _ in range(2):
        close(made(its).numpy(), expected)
    assert made._basis is None


@KINDS
def test_the_ends_are_the_models_themselves(both):
    deltas, inputs, gradients = case(models=2)
    gradients = gradients if both else None
    assert not merged(deltas, inputs, gradients, [0.0, 0.0]).any()
    assert np.array_equal(merged(deltas, inputs, gradients, [0.0, 1.0]), deltas[1])
    # A model without a coefficient has no part in it.
    close(
        merged(deltas, inputs, gradients, [0.4, 0.0]),
        dense(deltas[:1], inputs[:2], None if gradients is None else gradients[:2], [0.4]),
    )


@KINDS
@pytest.mark.parametrize("models", [1, 2])
def test_the_same_factors_everywhere_are_task_arithmetic(both, models):
    deltas, inputs, gradients = case(models=models, scale=3.0)
    betas = [0.3, 0.25][:models]
    expected = sum(b * d for b, d in zip(betas, deltas, strict=True))
    its = [inputs[0]] * len(inputs), [gradients[0]] * len(gradients) if both else None
    close(merged(deltas, *its, betas), expected, 1e-7)
    close(merged(deltas, *its, betas, dtype=torch.float32), expected, 1e-6)
    identity = [np.eye(7)] * len(inputs), [np.eye(5)] * len(inputs) if both else None
    close(merged(deltas, *identity, betas), expected)


@KINDS
def test_no_inputs_at_all_leave_the_coefficients(both):
    deltas, inputs, gradients = case(models=1)
    zero = [np.zeros_like(x) for x in inputs]
    close(merged(deltas, zero, gradients if both else None, [0.3]), 0.3 * deltas[0])
    assert spread(0, [torch.tensor(x) for x in zero], None, [0.3], DAMPING).largest == 0.3
    # Of one model alone: outside what the other has of them the task vector comes whole.
    zero[1] = inputs[1]
    close(merged(deltas, zero, None, [0.3]), dense(deltas, zero, None, [0.3]))


@pytest.mark.parametrize("betas", [[-0.1], [1.1], [0.6, 0.6], [float("nan")]])
def test_coefficients_beyond_their_range_are_refused(betas):
    deltas, inputs, _ = case(models=len(betas))
    with pytest.raises(ValueError, match="sum up to at most 1"):
        merged(deltas, inputs, None, betas)


def test_factors_that_are_not_finite_are_refused():
    deltas, inputs, gradients = case()
    inputs[1][0, 0] = np.inf
    for g in (None, gradients):
        with pytest.raises(ValueError, match="not finite"):
            merged(deltas, inputs, g, [0.5])


def test_damping_is_a_part_of_the_mean_diagonal():
    rows = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 2.0]])
    assert damping_of(rows, 0.1) == pytest.approx(0.1 * np.trace((rows.T @ rows / 2).numpy()) / 3)


@KINDS
@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("model", [0, 1])
def test_spread_is_of_the_eigenvalues(both, tokens, model):
    """Of the map from a task vector to its part of the merged one, restricted to the span."""
    _, inputs, gradients = case(4, 2, outputs=11, inputs=13, tokens=tokens)
    betas = [0.5, 0.2]
    beta, weights = betas[model], [0.3, 0.5, 0.2]
    per_side = []
    for rows in (inputs, gradients) if both else (inputs,):
        factors = [damped(x, DAMPING) for x in rows]
        basis = np.linalg.svd(np.concatenate(rows), full_matrices=False)[2]
        factors = [basis @ f @ basis.T for f in factors]
        whole = sum(w * f for w, f in zip(weights, factors, strict=True))
        per_side.append(np.linalg.eigvals(np.linalg.solve(whole, beta * factors[model + 1])).real)
    alphas = per_side[0]
    if both:
        odds = np.outer(*(x / (1 - x) for x in per_side)) * (1 - beta) / beta
        alphas = odds / (1 + odds)
    its = [torch.tensor(b) for b in gradients] if both else None
    found = spread(model, [torch.tensor(x) for x in inputs], its, betas, DAMPING)
    apart = (alphas - beta) ** 2
    expected = [alphas.mean(), alphas.std(), alphas.min(), alphas.max(), apart.sum() ** 2 / (apart**2).sum()]
    assert list(vars(found).values()) == pytest.approx(expected, rel=1e-6)
    sampled = spread(model, [torch.tensor(x) for x in inputs], its, betas, DAMPING, tokens=5)
    assert (sampled == found) is (tokens == 2)


def test_spread_where_nothing_is_told_apart():
    _, inputs, _ = case()
    its = [torch.tensor(inputs[0])] * 2
    found = spread(0, its, None, [0.3], DAMPING)
    assert (found.mean, found.least, found.largest) == pytest.approx((0.3, 0.3, 0.3))
    assert found.directions == 0
    assert spread(0, its, None, [0.0], DAMPING).largest == 0
