"""The merge by Kronecker factors against the Kronecker system itself, solved by NumPy, and what must hold of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_fim.merging.kron import InputMap, spreads

DAMPING = 1e-3


def damped(rows: np.ndarray, damping: float) -> np.ndarray:
    """A factor, as METHOD has it: the mean of the outer products, and a part of its mean diagonal."""
    factor = rows.T @ rows / len(rows)
    return factor + damping * np.trace(factor) / len(factor) * np.eye(len(factor))


def power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """A power of a symmetric matrix whose eigenvalues are above 0."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.T


def moments(inputs, betas, damping=DAMPING, sharpness=1.0) -> list[np.ndarray]:
    """M_k = Ā^½ (Ā^-½ A_k Ā^-½)^s Ā^½ of the base and of every fine-tuned model."""
    factors = [damped(x, damping) for x in inputs]
    if sharpness == 1:
        return factors
    mean = sum(w * f for w, f in zip([1 - sum(betas), *betas], factors, strict=True))
    root, inverse = power(mean, 0.5), power(mean, -0.5)
    return [root @ power(inverse @ f @ inverse, sharpness) @ root for f in factors]


def dense(deltas, inputs, betas, damping=DAMPING, sharpness=1.0) -> np.ndarray:
    """Σ_k w_k (I ⊗ M_k) vec Δ = Σ_m β_m (I ⊗ M_m) vec δ_m, row by row, as one linear system."""
    weights = [1 - sum(betas), *betas]
    kron = [np.kron(np.eye(len(deltas[0])), moment) for moment in moments(inputs, betas, damping, sharpness)]
    system = sum(w * k for w, k in zip(weights, kron, strict=True))
    right = sum(b * k @ d.reshape(-1) for b, k, d in zip(betas, kron[1:], deltas, strict=True))
    return np.linalg.solve(system, right).reshape(deltas[0].shape)


def case(seed=0, models=1, outputs=5, inputs=7, tokens=6, scale=0.0, repeated=False):
    """Task vectors and inputs; `scale`: the decades that the directions' sizes spread over."""
    random = np.random.default_rng(seed)
    deltas = [random.normal(size=(outputs, inputs)) for _ in range(models)]
    sizes = 10 ** (scale * random.uniform(0, 1, inputs))
    turn = np.linalg.qr(random.normal(size=(inputs, inputs)))[0]
    first = random.normal(size=(tokens, inputs)) * sizes @ turn
    rows = [first, *(first + 0.5 * random.normal(size=(tokens, inputs)) * sizes @ turn for _ in range(models))]
    return deltas, [np.concatenate([x, x[: tokens // 2]]) if repeated else x for x in rows]


def merged(deltas, inputs, betas, damping=DAMPING, sharpness=1.0, dtype=torch.float64) -> np.ndarray:
    its = [torch.tensor(d, dtype=dtype) for d in deltas]
    found = InputMap([torch.tensor(x) for x in inputs], betas, damping, sharpness, dtype)(its)
    assert found.dtype is dtype
    return found.double().numpy()


def close(found, expected, tolerance=1e-8):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 2, 3, 6, 20])
@pytest.mark.parametrize("repeated", [False, True])
def test_as_the_kronecker_system(models, tokens, repeated):
    deltas, inputs = case(models=models, tokens=tokens, repeated=repeated)
    betas = [0.5, 0.2, 0.15][:models]
    close(merged(deltas, inputs, betas), dense(deltas, inputs, betas), 1e-6)


@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("tokens", [2, 6, 20])
@pytest.mark.parametrize("sharpness", [-1.0, 0.0, 0.5, 2.0, 4.0])
def test_sharpened(models, tokens, sharpness):
    deltas, inputs = case(models=models, tokens=tokens)
    betas = [0.5, 0.2, 0.15][:models]
    expected = dense(deltas, inputs, betas, 0.1, sharpness)
    close(merged(deltas, inputs, betas, 0.1, sharpness), expected, 1e-6)
    close(merged(deltas, inputs, betas, 0.1, sharpness, torch.float32), expected, 1e-4)


def test_the_sharpness_is_a_power_of_the_ratios():
    """Of one model: along a generalised eigenvector of A_1 and A_0, in the place of its eigenvalue r."""
    deltas, inputs = case(5)
    base, long = (damped(x, 0.1) for x in inputs)
    inverse = np.linalg.inv(np.linalg.cholesky(base))
    ratios, vectors = np.linalg.eigh(inverse @ long @ inverse.T)
    right = np.linalg.solve(inverse, vectors)
    alphas = 0.3 * ratios**4 / (0.7 + 0.3 * ratios**4)
    close(merged(deltas, inputs, [0.3], 0.1, 4.0), deltas[0] @ right * alphas @ vectors.T @ inverse, 1e-6)


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.floats(0.01, 0.99))
def test_on_any_shape(seed, outputs, width, tokens, beta):
    deltas, inputs = case(seed, 1, outputs, width, tokens, scale=1.0)
    close(merged(deltas, inputs, [beta]), dense(deltas, inputs, [beta]), 1e-5)


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("tokens", [4, 20])
def test_directions_of_very_different_sizes(models, tokens):
    """Inputs' squares over eight decades, as activations have them, and task vectors in float32."""
    deltas, inputs = case(3, models, tokens=tokens, scale=4.0)
    betas = [0.4, 0.3][:models]
    expected = dense(deltas, inputs, betas)
    close(merged(deltas, inputs, betas), expected, 1e-5)
    close(merged(deltas, inputs, betas, dtype=torch.float32), expected, 2e-3)


def test_in_float32():
    deltas, inputs = case(1, 2, outputs=12, inputs=20, tokens=8)
    close(merged(deltas, inputs, [0.4, 0.3], dtype=torch.float32), dense(deltas, inputs, [0.4, 0.3]), 2e-5)


@pytest.mark.parametrize("models", [1, 2])
def test_many_outputs_take_the_map_itself(models):
    """The first call makes it of the thin matrices, and others use it."""
    deltas, inputs = case(2, models, outputs=60, inputs=14, tokens=4)
    betas, its = [0.4, 0.3][:models], [torch.tensor(d) for d in deltas]
    made = InputMap([torch.tensor(x) for x in inputs], betas, DAMPING, 1.0, torch.float64)
    few = made([d[:2] for d in its]).numpy()
    expected = dense(deltas, inputs, betas)
    close(few, expected[:2])
    assert made._basis is not None
    for _ in range(2):
        close(made(its).numpy(), expected)
    assert made._basis is None


def test_the_ends_are_the_models_themselves():
    deltas, inputs = case(models=2)
    assert not merged(deltas, inputs, [0.0, 0.0]).any()
    assert np.array_equal(merged(deltas, inputs, [0.0, 1.0]), deltas[1])
    # A model without a coefficient has no part in it.
    close(merged(deltas, inputs, [0.4, 0.0]), dense(deltas[:1], inputs[:2], [0.4]))
    close(merged(deltas, inputs, [0.4, 0.0], 0.1, 4.0), dense(deltas[:1], inputs[:2], [0.4], 0.1, 4.0))
    # Nor has the base where the others take all.
    close(merged(deltas, inputs, [0.4, 0.6], 0.1, 4.0), dense(deltas, inputs, [0.4, 0.6], 0.1, 4.0), 1e-6)


@pytest.mark.parametrize("models", [1, 2])
def test_the_same_factors_everywhere_are_task_arithmetic(models):
    deltas, inputs = case(models=models, scale=3.0)
    betas = [0.3, 0.25][:models]
    expected = sum(b * d for b, d in zip(betas, deltas, strict=True))
    its = [inputs[0]] * len(inputs)
    close(merged(deltas, its, betas), expected, 1e-7)
    close(merged(deltas, its, betas, dtype=torch.float32), expected, 1e-6)
    close(merged(deltas, [np.eye(7)] * len(inputs), betas), expected)


def test_no_inputs_at_all_leave_the_coefficients():
    deltas, inputs = case(models=1)
    zero = [np.zeros_like(x) for x in inputs]
    close(merged(deltas, zero, [0.3]), 0.3 * deltas[0])
    assert spreads([torch.tensor(x) for x in zero], [0.3], DAMPING, 1.0)[0].largest == 0.3
    # Of one model alone: outside what the other has of them the task vector comes whole.
    zero[1] = inputs[1]
    close(merged(deltas, zero, [0.3]), dense(deltas, zero, [0.3]))


@pytest.mark.parametrize("betas", [[-0.1], [1.1], [0.6, 0.6], [float("nan")]])
def test_coefficients_beyond_their_range_are_refused(betas):
    deltas, inputs = case(models=len(betas))
    with pytest.raises(ValueError, match="sum up to at most 1"):
        merged(deltas, inputs, betas)


@pytest.mark.parametrize(("models", "sharpness"), [(1, 1e6), (2, 50.0)])
def test_more_sharpness_than_numbers_can_hold_is_refused(models, sharpness):
    deltas, inputs = case(models=models)
    with pytest.raises(ValueError, match="singular"):
        merged(deltas, inputs, [0.5, 0.2][:models], 0.1, sharpness)


def test_factors_that_are_not_finite_are_refused():
    deltas, inputs = case()
    inputs[1][0, 0] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        merged(deltas, inputs, [0.5])
    with pytest.raises(ValueError, match="not finite"):
        spreads([torch.tensor(x) for x in inputs], [0.5], DAMPING, 1.0)


@pytest.mark.parametrize("tokens", [2, 20, 300])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("sharpness", [1.0, 3.0])
def test_spreads_are_of_the_eigenvalues(tokens, repeated, sharpness):
    """Of the map from a task vector to its part of the merged one, restricted to the span; of at most 128 tokens."""
    _, inputs = case(4, 2, outputs=11, inputs=13, tokens=tokens, repeated=repeated)
    betas, weights = [0.5, 0.2], [0.3, 0.5, 0.2]
    some = [x[:: -(-len(x) // 128)] for x in inputs]
    assert len(some[0]) <= 128
    factors = moments(some, betas, 0.1, sharpness)
    _, sizes, basis = np.linalg.svd(np.concatenate(some), full_matrices=False)
    basis = basis[sizes > 1e-9 * sizes[0]]
    factors = [basis @ f @ basis.T for f in factors]
    whole = sum(w * f for w, f in zip(weights, factors, strict=True))
    found = spreads([torch.tensor(x) for x in inputs], betas, 0.1, sharpness)
    assert len(found) == 2
    for its, beta, factor in zip(found, betas, factors[1:], strict=True):
        alphas = np.linalg.eigvals(np.linalg.solve(whole, beta * factor)).real
        apart = (alphas - beta) ** 2
        expected = [alphas.mean(), alphas.std(), alphas.min(), alphas.max(), apart.sum() ** 2 / (apart**2).sum()]
        assert list(vars(its).values()) == pytest.approx(expected, rel=1e-6)


def test_spreads_where_nothing_is_told_apart():
    _, inputs = case()
    its = [torch.tensor(inputs[0])] * 2
    (found,) = spreads(its, [0.3], DAMPING, 1.0)
    assert (found.mean, found.least, found.largest) == pytest.approx((0.3, 0.3, 0.3))
    assert found.directions == 0
    assert spreads(its, [0.0], DAMPING, 1.0)[0].largest == 0
