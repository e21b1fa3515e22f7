"""Every example config is merged, on tiny stand-ins for the models that it names."""

import pytest
import reference
import tiny
import yaml
from conftest import ROOT

CONFIGS = sorted((ROOT / "example_configs").glob("*.yml"))


def test_there_are_examples():
    assert {"demo", "l2s-1.5b-fim-ties", "l2s-1.5b-fim-ta", "l2s-7b-fim-ties", "l2s-7b-fim-ta", "three-models"} <= {
        path.stem for path in CONFIGS
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example(path, merge, tmp_path):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    tied = "7b" not in path.stem
    base = tiny.build(tiny.config("qwen2", tie_word_embeddings=tied))
    names = [config["base_model"], *(model["model"] for model in config["models"])]
    stand_ins = {names[0]: str(tiny.save(base, tmp_path / "stand-in-0"))}
    for i, name in enumerate(names[1:], 1):
        cfg = tiny.config("qwen2", tie_word_embeddings=False, max_position_embeddings=4096)
        stand_ins[name] = str(tiny.save(tiny.tuned(base, i, cfg=cfg), tmp_path / f"stand-in-{i}"))
    text = path.read_text(encoding="utf-8")
    for name in sorted(stand_ins, key=len, reverse=True):  # one name may be the beginning of another
        text = text.replace(f": {name}\n", f": {stand_ins[name]}\n").replace(f": {name} ", f": {stand_ins[name]} ")
    out, _ = merge.ok(text)
    report = reference.report(out)
    assert report["method"] == config["merge_method"]
    assert [m["model"] for m in report["models"]] == [stand_ins[name] for name in names[1:]]
    for model in report["models"]:
        alphas = [layer["alpha"] for layer in model["layers"]]
        assert len(alphas) == 5
        assert all(0 < alpha < 1 for alpha in alphas)
        if (mean := config.get("parameters", {}).get("alpha_mean")) is not None:
            assert sum(alphas) / 5 == pytest.approx(mean)
    for given, used in zip(config["models"], report["models"], strict=True):
        density = given.get("parameters", {}).get("density", 0.2)
        assert used["density"] == (density if config["merge_method"] == "fim_ties" else None)
