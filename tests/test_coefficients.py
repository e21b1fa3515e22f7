import math
import random

import pytest
import reference

from mergekit_fim.coefficients import Mapping, importance_scores, merge_coefficients

SCORES = [4.43e-3, 2.0e-5, 7.1e-5, 2.61e-6, 1.3e-4, 9.9e-6]


@pytest.mark.parametrize("sharpness", [1.0, 2.5, 0.0, -1.0])
def test_matches_the_formula(sharpness):
    expected = reference.coefficients(SCORES, sharpness, 0.1, 0.9)
    assert merge_coefficients(SCORES, Mapping(sharpness, 0.1, 0.9)) == pytest.approx(list(expected), abs=1e-14)


def test_a_high_score_means_a_low_coefficient_and_a_negative_sharpness_turns_it_round():
    order = sorted(range(len(SCORES)), key=SCORES.__getitem__)
    falling = merge_coefficients(SCORES, Mapping())
    rising = merge_coefficients(SCORES, Mapping(sharpness=-1.0))
    assert [falling[i] for i in order] == sorted(falling, reverse=True)
    assert [rising[i] for i in order] == sorted(rising)
    assert falling == pytest.approx([1 - a for a in rising])


def test_sharpness_zero_is_the_uniform_merge():
    assert merge_coefficients(SCORES, Mapping(sharpness=0.0)) == [0.5] * len(SCORES)
    assert merge_coefficients(SCORES, Mapping(sharpness=0.0, alpha_mean=0.3)) == pytest.approx([0.3] * len(SCORES))


def test_a_spread_below_one_nat_is_not_stretched():
    scores = [math.exp(x) for x in (-0.1, 0.0, 0.1)]
    alphas = merge_coefficients(scores, Mapping())
    assert alphas == pytest.approx([1 / (1 + math.exp(x)) for x in (-0.1, 0.0, 0.1)], abs=1e-12)


def test_anchored_leaves_the_largest_score_half_way_and_the_others_above():
    scores = [math.exp(x) for x in (3.0, 0.0, -3.0)]  # a spread of √6 nats
    alphas = merge_coefficients(scores, Mapping(mapping="anchored"))
    assert alphas == pytest.approx([1 / (1 + math.exp(-x / math.sqrt(6))) for x in (0.0, 3.0, 6.0)], abs=1e-12)
    turned = merge_coefficients(scores, Mapping(-1.0, mapping="anchored"))
    assert turned == pytest.approx([1 - alpha for alpha in alphas])
    alike = merge_coefficients([1.0, 0.95, 0.9], Mapping(mapping="anchored"))
    assert all(0.5 <= alpha < 0.53 for alpha in alike)


@pytest.mark.parametrize("sharpness", [1.0, -3.0, 0.0])
def test_with_a_mean_both_mappings_are_the_same(sharpness):
    centred, anchored = (
        merge_coefficients(SCORES, Mapping(sharpness, alpha_mean=0.4, mapping=mapping))
        for mapping in ("centred", "anchored")
    )
    assert anchored == pytest.approx(centred, abs=1e-12)


@pytest.mark.parametrize("mean", [1e-6, 0.2, 0.5, 0.83, 1 - 1e-6])
@pytest.mark.parametrize("sharpness", [1.0, -3.0, 40.0, 1e4, 1e308])
def test_alpha_mean_is_met_exactly(mean, sharpness):
    alphas = merge_coefficients(SCORES, Mapping(sharpness, alpha_mean=mean))
    assert math.fsum(alphas) / len(alphas) == pytest.approx(mean, rel=1e-9)
    assert all(0 <= a <= 1 for a in alphas)


@pytest.mark.parametrize("sharpness", [1.0, -3.0])
def test_alpha_mean_is_met_in_any_range(sharpness):
    alphas = merge_coefficients(SCORES, Mapping(sharpness, -0.5, 2.5, 1.75))
    assert math.fsum(alphas) / len(alphas) == pytest.approx(1.75, rel=1e-9)


@pytest.mark.parametrize(
    "mapping",
    [Mapping(alpha_min=-1e20, alpha_mean=0.5), Mapping(alpha_max=2.0, alpha_mean=5e-324)],
    ids=["next to alpha_max", "next to alpha_min"],
)
def test_a_mean_that_rounds_to_an_end_of_the_range(mapping):
    alphas = merge_coefficients(SCORES, mapping)
    span = mapping.alpha_max - mapping.alpha_min
    assert math.fsum(alphas) / len(alphas) == pytest.approx(mapping.alpha_mean, abs=1e-12 * span)


def test_layers_without_a_score_get_alpha_max_and_do_not_move_the_others():
    alphas = merge_coefficients([*SCORES, 0.0, 0.0], Mapping(alpha_max=0.8, alpha_mean=0.4))
    assert alphas[-2:] == [0.8, 0.8]
    assert alphas[:-2] == merge_coefficients(SCORES, Mapping(alpha_max=0.8, alpha_mean=0.4))
    assert merge_coefficients([0.0, 0.0], Mapping(alpha_max=0.8)) == [0.8, 0.8]


def test_a_common_factor_and_the_order_of_the_layers_do_not_matter():
    alphas = merge_coefficients(SCORES, Mapping())
    assert merge_coefficients([s * 1e-200 for s in SCORES], Mapping()) == pytest.approx(alphas, abs=1e-10)
    order = list(range(len(SCORES)))
    random.Random(0).shuffle(order)
    assert merge_coefficients([SCORES[i] for i in order], Mapping()) == pytest.approx([alphas[i] for i in order])


def test_a_range_of_one_number():
    assert merge_coefficients(SCORES, Mapping(alpha_min=0.5, alpha_max=0.5)) == [0.5] * len(SCORES)


def test_a_single_layer_is_in_the_middle():
    assert merge_coefficients([3.0], Mapping()) == [0.5]


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"alpha_min": 0.6, "alpha_max": 0.5}, r"alpha_min \(0.6\) must not exceed alpha_max \(0.5\)"),
        ({"alpha_mean": 0.9, "alpha_max": 0.5}, "alpha_mean"),
        ({"alpha_mean": 0.5, "alpha_max": 0.5}, "alpha_mean"),
        ({"alpha_mean": 0.1, "alpha_min": 0.2}, "alpha_mean"),
        ({"alpha_mean": 0.2, "alpha_min": 0.2}, "alpha_mean"),
        ({"sharpness": math.inf}, "finite"),
        ({"alpha_min": -1e308, "alpha_max": 1e308}, "too far apart"),
        ({"mapping": "ancored"}, "centred or anchored, got ancored"),
    ],
)
def test_bad_mappings(mapping, words):
    with pytest.raises(ValueError, match=words):
        Mapping(**mapping)


def test_scores():
    assert importance_scores([2.0, 3.0], [5.0, 0.0]) == [10.0, 0.0]
    with pytest.raises(ValueError, match="task-vector norm of layer 1"):
        importance_scores([1.0, 1.0], [1.0, math.nan])
    with pytest.raises(ValueError, match=r"Fisher information of layer 0 .* got inf"):
        importance_scores([math.inf, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"Fisher information of layer 1 .* got -1"):
        importance_scores([1.0, -1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="2 Fisher values for 1"):
        importance_scores([1.0, 1.0], [1.0])
