"""Random merge configs: each is refused in one line or merged by coefficients within their bounds, and nothing else."""

import math

import pytest
import reference
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from merges import Pair
from pydantic import ValidationError

from mergekit_fim.coefficients import Mapping, merge_coefficients
from mergekit_fim.config.parameters import METHODS, PARAMETERS, Scope
from mergekit_fim.config.settings import check_config
from mergekit_fim.errors import FimError
from mergekit_fim.tools.plan import resolve

SETTINGS = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
OPTIONS = MergeOptions(quiet=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Pair:
    """Three layers, so that a merge is planned in no time."""
    folder = tmp_path_factory.mktemp("small")
    base = tiny.build(tiny.config("llama", num_hidden_layers=3))
    tunes = (tiny.save(tiny.tuned(base, seed), folder / name) for seed, name in ((1, "long"), (2, "third")))
    return Pair(tiny.save(base, folder / "base"), *tunes)


# What makes sense for some parameter, what is at the edge of that, and what makes none for any.
NUMBERS = st.sampled_from([0, 1, 0.5, 0.2, -1, 2, 8, 64, 1.0, 1e-300, -1e300, 1.7e308, 2**63, 10**400, "1e-3", "0.4"])
ODD = st.sampled_from([math.nan, math.inf, True, False, "", "true", "inputs", "sampled", "a\nb", "none.json", "α"])
VALUES = st.one_of(NUMBERS, NUMBERS, ODD, st.floats(0, 1), st.integers(-2, 130), st.text(max_size=3))
FILTERS = st.sampled_from(["*", "mlp", "model.layers.1.", "self_attn", "lm_head", ""])
CONDITION = st.fixed_dictionaries({"value": VALUES}, optional={"filter": FILTERS})
PARAMETER_SETTINGS = st.one_of(
    VALUES, VALUES, st.lists(VALUES, max_size=3), CONDITION, st.lists(CONDITION, min_size=1, max_size=3)
)
NAMES = st.one_of(st.sampled_from(sorted(PARAMETERS)), st.sampled_from(["sharpnes", "weights", "t", "", "a\nb", "λ"]))
# By what a parameter is made for: most blocks would be refused for one of their values, and nothing else be seen.
GOOD = {
    "fisher_cache": st.booleans(),
    "fisher_samples": st.integers(1, 3),
    "fisher_seq_len": st.integers(2, 9),
    "fisher_seed": st.integers(0, 2),
    "fisher_labels": st.sampled_from(["inputs", "sampled"]),
    "sharpness": st.floats(-1e3, 1e3),
    "alpha_mean": st.floats(0.01, 0.99),
    "alpha_min": st.floats(-2, 0.3),
    "alpha_max": st.floats(0.2, 2),
    "alpha_other": st.floats(-1, 2),
    "gate_scale": st.floats(0, 2),
    "norm_tolerance": st.floats(0, 1),
    "lambda": st.floats(-2, 2),
    "normalize": st.booleans(),
    "int8_mask": st.booleans(),
    "rescale": st.just(False),
    "weight": st.floats(-2, 2),
    "density": st.floats(1e-3, 1),
    "alpha": st.floats(-1, 2),
    "damping": st.floats(1e-4, 1),
}


def block(*scopes: Scope):
    """Parameters of one place: those that belong there, and now and then anything."""
    good = {name: GOOD[name] for name, p in PARAMETERS.items() if p.scope in scopes and name in GOOD}
    sound = st.fixed_dictionaries({}, optional=good)
    return st.one_of(sound, sound, sound, st.dictionaries(NAMES, PARAMETER_SETTINGS, max_size=2))


@st.composite
def configs(draw, base: str, models: tuple[str, ...]):
    def entry(model, **more):
        return {"model": model, "parameters": draw(block(Scope.MODEL)), **more}

    config = {
        "merge_method": draw(st.sampled_from(METHODS)),
        "base_model": base,
        "parameters": draw(block(Scope.MERGE, Scope.TENSOR, Scope.MODEL)),
    }
    tuned = draw(st.lists(st.sampled_from(models), min_size=1, max_size=2, unique=True))
    kind = draw(st.sampled_from(["models", "models", "slices", "modules"]))
    if kind == "slices":
        ranges = draw(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 4)), min_size=1, max_size=2))
        sound = [[0, 3]], [[0, 1], [1, 3]], [[0, 2], [1, 3]]
        ranges = draw(st.sampled_from([*sound, *sound, [list(r) for r in ranges]]))
        config["slices"] = [
            {
                "sources": [{"model": base, "layer_range": r}, *(entry(m, layer_range=r) for m in tuned)],
                "parameters": draw(block(Scope.TENSOR, Scope.MODEL)),
            }
            for r in ranges
        ]
    else:
        listed = [entry(m) for m in tuned]
        module = {"models": listed, "parameters": draw(block(Scope.TENSOR, Scope.MODEL))}
        config |= {"models": listed} if kind == "models" else {"modules": {"default": module}}
    if draw(st.booleans()):
        config["dtype"] = draw(st.sampled_from(["float32", "float32", "float64", "int8", ""]))
    return config


def assert_one_line(error: FimError) -> None:
    text = str(error)
    assert text
    assert text.isprintable()
    assert len(text) < 1000


def accepted(content: dict) -> MergeConfiguration | None:
    """The config, if mergekit's own definition has a place for it."""
    try:
        return MergeConfiguration.model_validate(content)
    except (ValidationError, RuntimeError):
        return None


@settings(max_examples=400, **SETTINGS)
@given(configs("base", ("long", "third")))
def test_a_config_is_accepted_or_refused_in_one_line(content):
    config = accepted(content)
    if config is None:
        return
    before = config.model_copy(deep=True)
    try:
        found = check_config(config)
    except FimError as error:
        assert_one_line(error)
    else:
        mapping = found.mapping
        assert mapping.alpha_min <= mapping.alpha_max
        assert found.fisher.samples >= 1
        assert found.fisher.seq_len >= 2
        alphas = merge_coefficients([1.0, 0.0, 1e-9, 7.0], mapping)
        assert all(mapping.alpha_min <= alpha <= mapping.alpha_max for alpha in alphas)
    assert repr(config) == repr(before)


def check_plan(config: MergeConfiguration) -> bool:
    """Plan a merge, and check its coefficients; whether it was accepted."""
    try:
        plan = resolve(config, OPTIONS)
    except FimError as error:
        assert_one_line(error)
        return False
    pre_pass = plan.pre_pass
    mapping = pre_pass.settings.mapping
    for model in (m for c in pre_pass.coefficients for m in c.models):
        assert all(mapping.alpha_min <= alpha <= mapping.alpha_max for alpha in model.alphas)
        if mapping.alpha_mean is not None:
            scored = [a for a, s in zip(model.alphas, model.scores, strict=True) if s > 0]
            assert sum(scored) / len(scored) == pytest.approx(mapping.alpha_mean, abs=1e-9)
        elif mapping.sharpness == 0:
            assert len(set(model.alphas)) == 1
    # Every tensor has every parameter, and the α of its layer unless the user set it.
    for tensor in plan.tensors:
        for model, alpha in tensor.per_model("alpha").items():
            assert math.isfinite(alpha)
            assert math.isfinite(tensor.per_model("weight")[model])
            layer = reference.layer_of(tensor.sources()[model].name)
            by_hand = [m.alpha for m in pre_pass.models if m.model.reference == model] != [None]
            if layer is not None and not by_hand and pre_pass.kron is not None:
                assert alpha == mapping.alpha_mean
            elif layer is not None and not by_hand:
                (found,) = [m for c in pre_pass.coefficients for m in c.models if m.model.reference == model]
                assert alpha == found.alphas[[pair.source_layer for pair in found.pairs].index(layer)]
    return True


def test_a_merge_is_planned_or_refused_in_one_line(small):
    outcomes = []

    @settings(max_examples=150, **SETTINGS)
    @given(configs(str(small.base), (str(small.long), str(small.third))))
    def every(content):
        LoaderCache.loaders.clear()
        config = accepted(content)
        if config is not None:
            outcomes.append(check_plan(config))

    every()
    # The examples are the same every time, and neither all good nor all bad.
    assert min(outcomes.count(True), outcomes.count(False)) >= 20


FINITE = st.floats(-1e308, 1e308)


@settings(max_examples=400, **SETTINGS)
@given(
    st.lists(st.one_of(st.floats(0, 1e300), st.just(0.0)), min_size=1, max_size=9),
    FINITE,
    FINITE,
    FINITE,
    st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_coefficients_stay_within_their_bounds(scores, sharpness, low, high, mean):
    try:
        mapping = Mapping(sharpness, low, high, mean)
    except ValueError:
        return
    alphas = merge_coefficients(scores, mapping)
    assert len(alphas) == len(scores)
    assert all(low <= alpha <= high for alpha in alphas)
    pairs = sorted((s, a) for s, a in zip(scores, alphas, strict=True) if s > 0)
    values = [a for _, a in pairs]
    assert values == sorted(values, reverse=sharpness > 0)
