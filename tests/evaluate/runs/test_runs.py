"""The runs of a sweep: what varies, and twins of the same strength."""

import itertools

import pytest
import safetensors.torch
import torch
import yaml
from mergekit.config import MergeConfiguration
from merges import Pair

from mergekit_fim.api import merge as merge_whole
from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.runs.families import STRENGTHS, Run
from mergekit_fim.evaluate.runs.listed import families, models_as_they_are

PAIR = {"merge_method": "fim_ta", "base_model": "b", "models": [{"model": "l"}]}
THREE = {"merge_method": "fim_ta", "base_model": "b", "models": [{"model": "l"}, {"model": "b"}, {"model": "x/l"}]}
SLICES = {
    "merge_method": "fim_ties",
    "base_model": "b",
    "slices": [
        {"sources": [{"model": "l", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]},
        {"sources": [{"model": "l", "layer_range": [2, 4]}, {"model": "b", "layer_range": [2, 4]}]},
    ],
}


def configured(content: dict, **changes) -> MergeConfiguration:
    return MergeConfiguration.model_validate(content | changes)


def made(config: MergeConfiguration, *varied: str, compare: tuple[str, ...] = ()) -> list[Run]:
    of = families({"config.yml": config}, varied, compare, lambda: 0.3)
    return [run for family in of for run in family.runs()]


def written(run: Run) -> dict:
    assert run.config is not None
    return yaml.safe_load(run.config.to_yaml())


def test_models_as_they_are():
    assert [(run.name, str(run.model)) for run in models_as_they_are(configured(PAIR), ("x/i", "y/i/"))] == [
        ("base", "b"),
        ("long", "l"),
        ("i", "x/i"),
        ("i (2)", "y/i/"),
    ]
    several = models_as_they_are(configured(THREE), ("m+a/d@7",))
    assert [(run.name, str(run.model)) for run in several] == [
        ("base", "b"),
        ("l", "l"),
        ("l (2)", "x/l"),
        ("d", "m+a/d@7"),
    ]
    assert all(run.method is None and run.config is None for run in several)


@pytest.mark.parametrize(
    ("changes", "also", "words"),
    [
        ({"base_model": None}, (), ["base_model:"]),
        ({"models": [{"model": "b"}]}, (), ["fine-tuned", "models:"]),
        ({}, ("a@b@c",), ["--also", "a@b@c"]),
        ({}, ("a+b+c",), ["--also", "a+b+c"]),
    ],
)
def test_no_models(changes, also, words):
    with pytest.raises(FimError) as error:
        models_as_they_are(configured(PAIR, **changes), also)
    assert all(word in str(error.value) for word in words)


def test_the_strength_varies_by_default():
    runs = made(configured(PAIR, parameters={"alpha_mean": 0.9, "sharpness": 2}))
    assert [run.name for run in runs] == [f"fim_ta alpha_mean={value}" for value in STRENGTHS]
    assert [written(run)["parameters"] for run in runs] == [{"alpha_mean": v, "sharpness": 2} for v in STRENGTHS]
    assert [run.name for run in made(configured(PAIR, merge_method="slerp"))] == [f"slerp t={v}" for v in STRENGTHS]
    assert [run.name for run in made(configured(PAIR, merge_method="karcher"))] == ["karcher"]


def test_every_combination_once_the_strength_first():
    config = configured(PAIR)
    runs = made(config, "sharpness=0,1", "alpha_mean=0.2,0.4", "normalize=true")
    assert [list(run.settings.items()) for run in runs] == [
        [("alpha_mean", a), ("sharpness", s), ("normalize", True)] for a, s in itertools.product((0.2, 0.4), (0.0, 1.0))
    ]
    assert runs[1].name == "fim_ta alpha_mean=0.2 sharpness=1.0 normalize=true"
    assert config.parameters is None


def test_a_setting_holds_wherever_the_config_has_another():
    config = configured(SLICES, parameters={"density": 0.5, "gate_scale": 1})
    assert config.slices
    config.slices[0].parameters = {"gate_scale": 0.1, "density": 0.6}
    config.slices[1].sources[0].parameters = {"density": 0.7, "weight": 2}
    (run,) = made(config, "density=0.4", "gate_scale=0.2")
    sources = [s for part in written(run)["slices"] for s in part["sources"]]
    assert [s.get("parameters") for s in sources] == [{"density": 0.4}, None, {"weight": 2.0, "density": 0.4}, None]
    assert [part.get("parameters") for part in written(run)["slices"]] == [None, None]
    assert written(run)["parameters"] == {"gate_scale": 0.2}
    modules = configured({"merge_method": "ties", "base_model": "b", "modules": {"m": {"models": PAIR["models"]}}})
    (run,) = made(modules, "weight=0.3")
    assert written(run)["modules"]["m"]["models"] == [{"model": "l", "parameters": {"weight": 0.3}}]


@pytest.mark.parametrize(
    ("method", "varied", "words"),
    [
        ("fim_ties", "alpha_maen=0.2", ["alpha_maen", "alpha_mean"]),
        ("fim_ties", "zzz=0.2", ["zzz", "known are", "sharpness"]),
        ("ties", "alpha_mean=0.2", ["no parameter of ties", "alpha_mean"]),
        ("karcher", "weight=1", ["no parameter of karcher", "`weight`"]),
        ("fim_ties", "alpha_mean", ["NAME=VALUE", "alpha_mean"]),
        ("fim_ties", "=0.2", ["NAME=VALUE"]),
        ("fim_ties", "alpha_mean=", ["`alpha_mean`", "(0, 1)"]),
        ("fim_ties", "alpha_mean=0.2,,0.3", ["`alpha_mean`", "(0, 1)"]),
        ("fim_ties", "alpha_mean=0.2,1.5", ["`alpha_mean`", "(0, 1)", "1.5"]),
        ("fim_ties", "alpha_mean=0.2,0.20", ["`alpha_mean`", "differ"]),
        ("fim_ties", "sharpness=[1", ["`sharpness`", "[1"]),
        ("ties", "weight=a", ["`weight`", "a"]),
        ("ties", "weight=", ["`weight`"]),
    ],
)
def test_settings_that_cannot_be(method, varied, words):
    with pytest.raises(FimError) as error:
        made(configured(PAIR, merge_method=method), varied)
    assert all(word in str(error.value) for word in ["--set", *words])


def test_settings_twice():
    with pytest.raises(FimError, match="`sharpness` twice"):
        made(configured(PAIR), "sharpness=1", "sharpness=2")


def test_an_unknown_method():
    with pytest.raises(FimError, match=r"found 'tise'; name one of .*task_arithmetic"):
        made(configured(PAIR, merge_method="tise"))


# Several configs


def several(*varied: str, compare: tuple[str, ...] = (), **configs: dict) -> list[Run]:
    of = families({f"x/{n}.yml": configured(its) for n, its in configs.items()}, varied, compare, lambda: 0.3)
    return [run for family in of for run in family.runs()]


LINEAR = {"merge_method": "linear", "models": [{"model": "b", "parameters": {"weight": 0.9}}, {"model": "l"}]}


def test_every_config_is_a_family_of_its_files_name():
    runs = several(a=PAIR, b=PAIR | {"merge_method": "slerp"}, c=PAIR | {"merge_method": "karcher"}, d=LINEAR)
    assert [run.name for run in runs] == [
        *(f"a alpha_mean={s}" for s in STRENGTHS),
        *(f"b t={s}" for s in STRENGTHS),
        "c",
        *(f"d weight={s}" for s in STRENGTHS),
    ]
    assert [run.method for run in runs] == ["a"] * 5 + ["b"] * 5 + ["c"] + ["d"] * 5
    assert runs[0].family.run({"alpha_mean": 0.3}).name == "a alpha_mean=0.3"
    assert [its["parameters"]["weight"] for its in written(runs[-1])["models"]] == [0.9, 0.8]


def test_a_setting_is_of_the_configs_that_know_it():
    ours, theirs = PAIR | {"merge_method": "fim_ties"}, PAIR | {"merge_method": "ties"}
    runs = several("alpha_mean=0.4", "weight=0.3", "density=0.1,0.2", ours=ours, theirs=theirs)
    assert [run.name for run in runs] == [
        *(f"ours alpha_mean=0.4 density={d}" for d in (0.1, 0.2)),
        *(f"theirs weight=0.3 density={d}" for d in (0.1, 0.2)),
    ]
    runs = several("lambda=0.5", "alpha_mean=0.4", ours=ours, theirs=theirs, compare=("linear",))
    assert [run.name for run in runs] == ["ours alpha_mean=0.4 lambda=0.5", "theirs lambda=0.5", "linear weight=0.4"]
    assert [run.strength for run in runs] == [0.4, 0.5, 0.4]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (PAIR | {"base_model": "c"}, ["x/b.yml", "the models of x/a.yml", "base b with l", "found c with l"]),
        (PAIR | {"models": [{"model": "m"}]}, ["x/b.yml", "found b with m"]),
        (LINEAR | {"models": [{"model": "b"}]}, ["x/b.yml", "no base with none"]),
    ],
)
def test_configs_of_other_models(other, words):
    with pytest.raises(FimError) as error:
        several(a=PAIR, b=other)
    assert all(word in str(error.value) for word in words)


def test_configs_of_one_name():
    with pytest.raises(FimError, match="found ties twice"):
        several(a=PAIR, ties=PAIR, compare=("ties",))


# Twins

WEIGHED = PAIR | {"models": [{"model": "l", "parameters": {"weight": [{"filter": "mlp", "value": 1}, {"value": 0.5}]}}]}


def twin_of(config: MergeConfiguration, method: str, *varied: str) -> Run:
    return made(config, *(varied or ("alpha_mean=0.4",)), compare=(method,))[-1]


def test_a_twin_has_the_strength_and_what_it_knows_of_the_rest():
    config = configured(PAIR, dtype="bfloat16", parameters={"lambda": 0.9, "sharpness": 2, "fisher_samples": 3})
    run = twin_of(config, "task_arithmetic")
    assert (run.name, run.method, run.settings) == ("task_arithmetic weight=0.4", "task_arithmetic", {"weight": 0.4})
    assert written(run) == {
        "merge_method": "task_arithmetic",
        "base_model": "b",
        "models": [{"model": "l", "parameters": {"weight": 0.4}}],
        "dtype": "bfloat16",
        "parameters": {"lambda": 0.9, "normalize": False},
    }
    own = {"damping": 0.01, "fisher": "a.safetensors", "fisher_samples": 4, "lambda": 0.9}
    config = configured(PAIR, merge_method="fim_kron", parameters=own)
    assert written(twin_of(config, "task_arithmetic"))["parameters"] == {"lambda": 0.9, "normalize": False}


def test_a_twin_that_trims_has_a_density():
    assert written(twin_of(configured(PAIR), "ties"))["parameters"] == {"normalize": False, "density": 0.3}
    by_hand = configured(PAIR, merge_method="fim_ties", models=[{"model": "l", "parameters": {"density": 0.6}}])
    assert written(twin_of(by_hand, "ties"))["models"][0]["parameters"] == {"density": 0.6, "weight": 0.4}
    config = configured(PAIR, merge_method="fim_ties", parameters={"density": 0.5})
    assert written(twin_of(config, "ties"))["parameters"] == {"normalize": False, "density": 0.5}
    assert written(twin_of(by_hand, "task_arithmetic"))["models"][0]["parameters"] == {"weight": 0.4}


def test_twins_are_there_once():
    varied = ("alpha_mean=0.2,0.4", "density=0.1,0.3", "sharpness=0,1")
    runs = made(configured(PAIR, merge_method="fim_ties"), *varied, compare=("ties", "task_arithmetic"))
    assert len(runs) == 8 + 4 + 2
    assert [run.name for run in runs[8:]] == [
        *(f"ties weight={w} density={d}" for w in (0.2, 0.4) for d in (0.1, 0.3)),
        *(f"task_arithmetic weight={w}" for w in (0.2, 0.4)),
    ]


def test_the_base_is_one_model_more_for_linear():
    assert written(twin_of(configured(PAIR), "linear"))["models"] == [
        {"model": "b", "parameters": {"weight": 0.6}},
        {"model": "l", "parameters": {"weight": 0.4}},
    ]
    config = configured(THREE, parameters={"weight": 0.5})
    assert [m["parameters"]["weight"] for m in written(twin_of(config, "linear"))["models"]] == [
        pytest.approx(0.6),
        0.2,
        0.2,
    ]


def test_several_models_that_are_normalised():
    config = configured(THREE, merge_method="fim_ties", parameters={"lambda": 0.5, "weight": 3})
    run = twin_of(config, "ties")
    assert run.settings == {"lambda": 0.4}
    assert written(run)["parameters"] == {"normalize": True, "lambda": 0.2, "density": 0.3}
    assert [m.get("parameters") for m in written(run)["models"]] == [{"weight": 3.0}, None, {"weight": 3.0}]
    config = configured(THREE)  # fim_ta doesn't normalise
    assert written(twin_of(config, "ties"))["parameters"] == {"normalize": False, "density": 0.3}


def test_settings_of_slices_hold_for_their_twins():
    config = configured(SLICES, parameters={"weight": 3, "normalize": False})
    assert config.slices
    config.slices[0].parameters = {"weight": 0.5, "density": 0.7}
    written_as = written(twin_of(config, "ties"))
    weights = [s.get("parameters") for part in written_as["slices"] for s in part["sources"]]
    assert weights == [{"weight": 0.2}, None, {"weight": pytest.approx(1.2)}, None]
    assert [part.get("parameters") for part in written_as["slices"]] == [{"density": 0.7}, None]
    assert written_as["parameters"] == {"normalize": False, "density": 0.3}  # for the slice that has none


def test_a_density_of_one_model_is_not_the_others():
    models = [{"model": "l", "parameters": {"density": 0.6}}, {"model": "x/l"}]
    run = twin_of(configured(THREE, merge_method="fim_ties", models=models), "ties")
    assert written(run)["models"][0]["parameters"]["density"] == 0.6
    assert written(run)["parameters"]["density"] == 0.3


def test_a_lambda_of_a_module_is_scaled_too():
    module = {"models": THREE["models"], "parameters": {"lambda": 0.5}}
    config = configured({"merge_method": "fim_ties", "base_model": "b", "modules": {"m": module}})
    made = written(twin_of(config, "ties"))
    assert (made["modules"]["m"]["parameters"]["lambda"], made["parameters"]["lambda"]) == (0.2, 0.4)


def test_a_twin_of_the_strength_in_the_config():
    config = configured(PAIR, parameters={"alpha_mean": 0.7})
    assert twin_of(config, "ties", "sharpness=0,1").name == "ties weight=0.7"
    assert twin_of(configured(PAIR), "ties", "alpha=0.25").name == "ties weight=0.25"
    twin = twin_of(configured(PAIR, merge_method="ties"), "linear", "weight=0.25")
    assert (twin.name, twin.family.run({"weight": 0.5}).name) == ("linear weight=0.25", "linear weight=0.5")


@pytest.mark.parametrize(
    ("content", "method", "varied", "words"),
    [
        (PAIR, "slerp", "alpha_mean=0.4", ["--compare", "one of task_arithmetic, ties, linear", "slerp"]),
        (PAIR | {"merge_method": "ties"}, "ties", "weight=0.4", ["--compare", "ties twice"]),
        (WEIGHED, "ties", "alpha_mean=0.4", ["--compare", "`weight`", "one number"]),
        (PAIR, "ties", "sharpness=0,1", ["--compare", "ties", "alpha_mean", "--set alpha_mean="]),
        (SLICES, "linear", "alpha_mean=0.4", ["--compare", "linear", "models:"]),
    ],
)
def test_twins_that_cannot_be(content, method, varied, words):
    with pytest.raises(FimError) as error:
        made(configured(content), varied, compare=(method,))
    assert all(word in str(error.value) for word in words)


def tensors(config: MergeConfiguration, folder) -> dict[str, torch.Tensor]:
    from mergekit.options import MergeOptions

    merge_whole(config, folder, MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False))
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("method", "twins"), [("fim_ta", ["task_arithmetic", "linear"]), ("fim_ties", ["ties"])], ids=["ta", "ties"]
)
def test_twins_are_as_strong(method, twins, several, pair: Pair, tmp_path):
    """The uniform merge of the same mean is the twin, where mergekit has one that does the same."""
    models = [{"model": str(pair.long)}, *([{"model": str(pair.third)}] if several else [])]
    parameters = {"sharpness": 0, "gate_scale": 1, "norm_tolerance": 0, "density": 0.4}
    config = configured(
        {"merge_method": method, "base_model": str(pair.base), "models": models, "parameters": parameters},
        dtype="float32",
    )
    own, *others = made(config, "alpha_mean=0.3", compare=tuple(twins))
    assert own.config is not None
    expected = tensors(own.config, tmp_path / "own")
    for run in others:
        assert run.config is not None
        found = tensors(run.config, tmp_path / run.name)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=f"{run.name} {name}")
