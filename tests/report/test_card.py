"""Our section in the merged model's card: what is in it, by every way to merge, and what it never costs."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.scripts.multimerge import main as mergekit_multi
from merges import config_for, run

from mergekit_fim.report.card import render_section, write_section

BEGIN, END = "<!-- mergekit-fim -->\n", "<!-- /mergekit-fim -->\n"
SMALL = {"fisher_samples": 2, "fisher_seq_len": 8}


def section(folder: Path) -> str:
    """Ours, which is there once, and last, after mergekit's own."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    own, begin, rest = text.partition(f"```\n\n{BEGIN}")
    assert "### Configuration" in own
    assert begin
    assert rest.endswith(f"\n\n{END}")
    assert rest.count("mergekit-fim -->") == 1
    return rest.removesuffix(END)


def tables(text: str) -> list[list[list[str]]]:
    """The Markdown tables, as a reader of GitHub's Markdown takes them apart, with the escapes undone."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        assert len({len(row) for row in rows}) == 1, block
        assert all(re.fullmatch(r" -+:? ", cell) for cell in rows[1])
        rows = [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in row] for row in rows]
        found.append([rows[0], *rows[2:]])
    return found


def report_of(folder: Path) -> dict:
    return json.loads((folder / "fim_report.json").read_text(encoding="utf-8"))


@pytest.fixture
def merged(pair, merge) -> Path:
    """A merge by the stock command, with its card."""
    return merge.ok(config_for(pair, parameters=SMALL), "--write-model-card", "--quiet")[0]


def test_the_section_has_the_numbers_of_the_report(pair, merged):
    text, report = section(merged), report_of(merged)
    layers, models, settings = tables(text)
    assert layers[0] == ["layer", "Fisher", "±", "‖δ‖", "score", "α"]
    (model,) = report["models"]
    for row, measured, layer in zip(layers[1:-1], report["fisher"]["layers"], model["layers"], strict=True):
        assert row[0] == str(layer["index"])
        numbers = measured["fisher"], measured["fisher_stderr"], layer["task_vector_sq_norm"] ** 0.5
        assert [float(cell) for cell in row[1:5]] == pytest.approx([*numbers, layer["score"]], rel=0.05)
        assert row[5] == f"{layer['alpha']:.3f}"
    assert layers[-1] == ["outside", "", "", "", "", f"{model['alpha_other']:.3f}"]
    assert models[1:] == [[str(pair.long), str(pair.base), "1.0", "0.2", ""]]
    shown = dict(settings[1:])
    assert shown == {
        f"`{name}`": value if isinstance(value, str) else json.dumps(value)
        for name, value in report["settings"].items()
        if value is not None
    }
    assert {"`fisher_samples`", "`sharpness`", "`gate_scale`", "`normalize`", "`dtype`"} <= shown.keys()
    assert "`fim_ties`" in text
    assert "arXiv 2603.21705" in text
    assert "mergekit-fim merge mergekit_config.yml merged" in text
    assert all(f"{name} {version}" in text for name, version in report["versions"].items())
    assert "### Warnings" not in text
    assert "![" not in text


@pytest.mark.parametrize("way", ["mergekit-fim", "run_merge", "run_merge by position", "mergekit-multi"])
def test_every_way_to_merge_writes_the_same(way, pair, merged, config, tmp_path):
    content, out = config_for(pair, parameters=SMALL), tmp_path / "other"
    if way == "mergekit-fim":
        run("merge", config(content), out, "--no-copy-tokenizer", "--quiet")
    elif way == "mergekit-multi":
        source = config(content | {"name": "other"})
        options = ["-I", str(tmp_path), "--no-copy-tokenizer", "--quiet"]
        result = CliRunner().invoke(mergekit_multi, [str(source), *options])
        assert result.exit_code == 0, result.output
    else:
        from mergekit.merge import run_merge

        arguments = {"merge_config": MergeConfiguration.model_validate(content), "out_path": str(out)}
        arguments["options"] = MergeOptions(quiet=True, copy_tokenizer=False)
        if way == "run_merge":
            run_merge(**arguments)
        else:
            run_merge(*arguments.values())
    assert section(out) == section(merged)


def test_run_merge_is_replaced_before_anyone_has_it(loaded):
    """Whichever is imported first; once only, and looking as mergekit's own does."""
    check = (
        "import inspect, importlib\n"
        "from mergekit.merge import run_merge\n"
        "from mergekit.scripts import run_yaml\n"
        "import mergekit.merge, mergekit_fim.hook.run_merge as ours\n"
        "assert run_merge is mergekit.merge.run_merge is run_yaml.run_merge\n"
        "importlib.reload(ours)\n"
        "assert run_merge is mergekit.merge.run_merge\n"
        "assert list(inspect.signature(run_merge).parameters) == "
        "['merge_config', 'out_path', 'options', 'config_source']\n"
        "print(run_merge.__name__, run_merge.__module__, hasattr(run_merge.__wrapped__, '__wrapped__'))\n"
    )
    for first in ("import mergekit_fim.tools.plan", "import mergekit_fim.hook.run_merge", "import mergekit_fim"):
        done = loaded.run("-c", f"{first}\n{check}")
        assert done.stdout.split() == ["run_merge", "mergekit.merge", "False"]


@pytest.mark.parametrize("command", ["mergekit-yaml", "mergekit-fim"])
def test_a_stock_merge_has_mergekits_card(command, pair, merge, config, monkeypatch):
    """Also over a folder in which a merge of ours was before, with its report."""
    content = config_for(pair, parameters=SMALL)
    out = merge.ok(content, "--write-model-card", "--quiet")[0]
    kept = (out / "fim_report.json").read_bytes()
    content = config_for(pair, "task_arithmetic", parameters={"weight": 0.5}) | {"models": [{"model": str(pair.long)}]}
    card = "---\nmine\n"
    monkeypatch.setattr("mergekit.merge.generate_card", lambda **_: card)
    monkeypatch.setattr("mergekit_fim.tools.whole.generate_card", lambda **_: card)
    if command == "mergekit-yaml":
        merge.ok(content, "--write-model-card", "--quiet")
        assert (out / "fim_report.json").read_bytes() == kept
    else:
        run("merge", config(content), out, "--no-copy-tokenizer", "--quiet")
    assert (out / "README.md").read_text() == card


def test_no_card_where_none_is_wanted(pair, merge, config, tmp_path):
    content = config_for(pair, parameters=SMALL)
    assert not (merge.ok(content)[0] / "README.md").exists()
    run("merge", config(content), tmp_path / "other", "--no-copy-tokenizer", "--no-write-model-card", "--quiet")
    assert not (tmp_path / "other" / "README.md").exists()
    # One of the user's own, or of an older merge, stays as it is.
    for path in (tmp_path / "out", tmp_path / "other"):
        (path / "README.md").write_text("mine")
    merge.ok(content)
    run("merge", config(content), tmp_path / "other", "--no-copy-tokenizer", "--no-write-model-card", "--quiet")
    assert {(tmp_path / name / "README.md").read_text() for name in ("out", "other")} == {"mine"}


def test_alpha_by_hand_has_settings_and_no_table(pair, merge):
    models = [{"model": str(pair.long), "parameters": {"alpha": [0.2, 0.7], "density": 0.3}}]
    out, _ = merge.ok(config_for(pair, models=models, parameters={"lambda": 0.9}), "--write-model-card", "--quiet")
    models, settings = tables(section(out))
    assert models[1:] == [[str(pair.long), str(pair.base), "1.0", "0.3", "[0.2, 0.7]"]]
    assert ["`lambda`", "0.9"] in settings
    assert "every α was set by hand" in section(out)
    names = {row[0] for row in settings}
    assert {"`gate_scale`", "`norm_tolerance`", "`dtype`"} <= names
    assert not [name for name in names if "fisher" in name or "alpha" in name or "sharpness" in name]


def test_several_models_one_of_them_by_hand_and_a_warning(pair, merge):
    models = [{"model": str(pair.long)}, {"model": str(pair.third), "parameters": {"alpha": 0.25, "weight": 0.5}}]
    models.append({"model": f"{pair.base}/."})  # warned of: it doesn't differ from the base
    content = config_for(pair, "fim_ta", models=models, parameters={"fisher_samples": 1, "fisher_seq_len": 8})
    out, _ = merge.ok(content, "--write-model-card", "--quiet")
    text, report = section(out), report_of(out)
    *layers, models, _ = tables(text)
    assert [model[0] for model in models[1:]] == [str(pair.long), str(pair.third), f"{pair.base}/."]
    assert [model[2:] for model in models[1:]] == [["1.0", "", ""], ["0.5", "", "0.25"], ["1.0", "", ""]]
    headings = re.findall(r"^### (.*) into ", text.replace("\\", ""), re.M)
    tabled = [model for model in report["models"] if model["layers"]]
    assert headings == [model["model"] for model in tabled]
    assert [[row[5] for row in table[1:-1]] for table in layers] == [
        [f"{layer['alpha']:.3f}" for layer in model["layers"]] for model in tabled
    ]
    assert layers[0][1][2] == ""  # a single sequence has no error
    assert report["warnings"] != []
    assert [line[2:] for line in text.replace("\\", "").splitlines() if line.startswith("- ")] == report["warnings"]


def test_several_bases_and_shifted_layers(pair, merge):
    """The slices' own bases have their own measurements, and a layer merged into another says so."""

    def part(base: Path, model: Path, start: int, other: int) -> dict:
        sources = [{"model": str(base), "layer_range": [start, start + 2]}]
        sources.append({"model": str(model), "layer_range": [other, other + 2]})
        return {"base_model": str(base), "sources": sources}

    slices = [part(pair.base, pair.long, 0, 1), part(pair.third, pair.long, 2, 2)]
    content = config_for(pair, parameters=SMALL) | {"slices": slices}
    del content["models"]
    out, _ = merge.ok(content, "--write-model-card", "--quiet")
    text, report = section(out), report_of(out)
    first, second = tables(text)[:2]
    assert [row[0] for row in first[1:3]] == ["0 (from 1)", "1 (from 2)"]
    assert {"2", "3", "outside"} <= {row[0] for row in second}
    (other,) = report["fisher_of_other_bases"].values()
    assert float(first[1][1]) == pytest.approx(report["fisher"]["layers"][0]["fisher"], rel=1e-3)
    (row,) = [row for row in second if row[0] == "2"]
    assert float(row[1]) == pytest.approx(other["layers"][2]["fisher"], rel=1e-3)
    assert f" into {pair.third}\n" in text.replace("\\", "")


def test_names_are_not_taken_for_markdown(pair, merge, tmp_path):
    names = ["a|b `x` *y* [z](q) <!-- -->", "<b>_d_|\\| $1$"]
    base, long = (shutil.copytree(p, tmp_path / n) for p, n in zip((pair.base, pair.long), names, strict=True))
    content = config_for(pair, base_model=str(base), models=[{"model": str(long)}], parameters=SMALL)
    out, _ = merge.ok(content, "--write-model-card", "--quiet")
    text = section(out)
    layers, models, _ = tables(text)
    assert len(layers[0]) == 6
    (row,) = models[1:]
    assert row[:2] == [str(long), str(base)]
    title = next(line for line in text.splitlines() if line.startswith("### "))
    assert re.sub(r"\\(.)", r"\1", title) == f"### {long} into {base}"
    plain = re.sub(r"\\.", "", title.removeprefix("### "))
    assert re.findall(r"[`*\[\]<>|$_\\]", plain) == []


def test_a_figure_is_added_and_stays_and_goes(pair, merge, merged):
    before = section(merged)
    run("plot", merged / "fim_report.json", "-o", merged.parent / "elsewhere.png")
    assert section(merged) == before
    run("plot", merged / "fim_report.json", "-o", merged / "fim_report.png")
    drawn = section(merged)
    assert [line for line in drawn.splitlines() if line not in before.splitlines()] == [
        "![Per decoder layer: Fisher information, norm of the task vector, and merge coefficient](fim_report.png)"
    ]
    write_section(str(merged))
    assert section(merged) == drawn  # replaced, not doubled
    run("plot", merged / "fim_report.json", "-o", merged / "my (second) figure.svg")
    assert section(merged) == drawn.replace("fim_report.png", "my%20%28second%29%20figure.svg")
    merge.ok(config_for(pair, parameters=SMALL), "--write-model-card", "--quiet")
    assert section(merged) == before  # what lies there is of the earlier merge


def test_a_figure_is_added_to_no_card_but_ours(merged):
    for card in (None, "# mine\n"):
        (merged / "README.md").unlink()
        if card is not None:
            (merged / "README.md").write_text(card)
        run("plot", merged / "fim_report.json", "-o", merged / "fim_report.png")
        assert (merged / "fim_report.png").exists()
        assert card is None or (merged / "README.md").read_text() == card
        (merged / "README.md").touch()


def test_what_a_sweep_measured_stays_until_it_is_replaced(merged):
    before = section(merged)
    row = "| run | accuracy |\n| --- | --- |\n| merge-1 | 0.5 |"
    write_section(str(merged), measured=row)
    assert section(merged) == f"{before}### Measured\n\n{row}\n\n"
    write_section(str(merged), figure="fim_report.png")
    with_figure = section(merged)
    assert "(fim_report.png)" in with_figure
    assert with_figure.endswith(f"### Measured\n\n{row}\n\n")
    write_section(str(merged), measured="other\n")
    assert section(merged) == with_figure.replace(row, "other")


def test_what_stands_after_the_section_stays(merged):
    path = merged / "README.md"
    before = path.read_text()
    path.write_text(before + "\n## License\nmine\n")
    write_section(str(merged), figure="f.png", measured="row")
    assert path.read_text().startswith(before.partition(BEGIN)[0] + BEGIN)
    assert path.read_text().endswith(f"row\n\n{END}\n## License\nmine\n")


def test_a_stock_merge_can_have_what_was_measured(tmp_path):
    (tmp_path / "README.md").write_text("---\nx\n---\n# out\n")
    write_section(str(tmp_path), measured="| a |\n| --- |\n| 1 |\n")
    expected = f"---\nx\n---\n# out\n\n{BEGIN}\n### Measured\n\n| a |\n| --- |\n| 1 |\n\n{END}"
    assert (tmp_path / "README.md").read_text() == expected
    write_section(str(tmp_path / "nowhere"), measured="| a |")
    assert os.listdir(tmp_path) == ["README.md"]


@pytest.mark.parametrize("command", ["mergekit-yaml", "mergekit-fim"])
def test_a_section_that_fails_costs_no_merge(command, pair, merge, config, tmp_path, monkeypatch, caplog):
    def full(path: str, _text: str) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr("mergekit_fim.report.card.write_text", full)
    content = config_for(pair, parameters=SMALL)
    if command == "mergekit-yaml":
        out = merge.ok(content, "--write-model-card", "--quiet")[0]
    else:
        out = tmp_path / "out"
        run("merge", config(content), out, "--no-copy-tokenizer", "--quiet")
    (record,) = [record for record in caplog.records if record.name == "mergekit_fim"]
    line = record.getMessage()
    assert "the merged model is whole" in line
    assert "No space left on device" in line
    assert line.isprintable()
    assert {"model.safetensors", "fim_report.json", "README.md", "mergekit_config.yml"} <= set(os.listdir(out))
    assert BEGIN not in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("report", "card"), [("{", b"# x\n"), ("[]", b"# x\n"), ('{"format": 1}', b"# x\n"), (None, b"\xff\xfe\x00")]
)
def test_damaged_files_are_a_warning_and_stay(report, card, merged, caplog):
    (merged / "README.md").write_bytes(card)
    if report is not None:
        (merged / "fim_report.json").write_text(report)
    write_section(str(merged))
    (record,) = caplog.records
    assert "its card has no section" in record.getMessage()
    assert record.getMessage().isprintable()
    assert (merged / "README.md").read_bytes() == card


def test_the_section_is_a_pure_function_of_the_report(merged):
    report = report_of(merged)
    before = json.dumps(report)
    text = render_section(report, figure="x.svg", measured="row")
    assert json.dumps(report) == before
    assert text == render_section(json.loads(before), figure="x.svg", measured="row")
    assert yaml.safe_load((merged / "mergekit_config.yml").read_text())["base_model"] in text.replace("\\", "")
