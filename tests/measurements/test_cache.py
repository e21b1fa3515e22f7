"""The cache: the second merge doesn't measure, and whatever is wrong with it costs a measurement, never a merge."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import tiny
import torch
from click.testing import CliRunner
from mergekit.options import MergeOptions
from merges import Merge, config_for, unwrapped

import mergekit_fim.prepass.measured
from mergekit_fim.cli import main
from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.files import PART
from mergekit_fim.measurements import store as cache
from mergekit_fim.measurements.file import write_measurement
from mergekit_fim.measurements.store import read_measurement
from mergekit_fim.models.inputs import open_model


@pytest.fixture
def merge(tmp_path) -> Merge:
    """All merges of a test share its cache."""
    return Merge(tmp_path, fresh=False)


@pytest.fixture
def measured(monkeypatch):
    """How often a base was measured."""
    calls = []
    original = mergekit_fim.prepass.measured.measure_checkpoint
    monkeypatch.setattr(
        mergekit_fim.prepass.measured, "measure_checkpoint", lambda *a, **k: calls.append(a[0]) or original(*a, **k)
    )
    return calls


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def bytes_of(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in ("model.safetensors", "fim_report.json")]


def test_the_second_merge_does_not_measure_and_says_so(pair, merge, cache_folder, measured):
    first, result = merge.ok(config_for(pair))
    (file,) = files(cache_folder)
    assert "kept from" not in result.output
    second, result = merge.ok(config_for(pair, models=[{"model": str(pair.long)}]), out="second")
    assert f"(kept from an earlier measurement: {file})" in unwrapped(result)
    assert len(measured) == 1
    assert bytes_of(first) == bytes_of(second)
    # Another model and another method on the same base.
    merge.ok(config_for(pair, "fim_ta", models=[{"model": str(pair.third)}]), out="third")
    assert len(measured) == 1
    # And the other way round: what `fisher` measures is kept for merges.
    result = CliRunner().invoke(
        main, ["fisher", str(pair.base), "-o", str(merge.folder / "f.json"), "--dtype", "float32"]
    )
    assert f"kept from an earlier measurement: {file}" in result.output
    assert len(measured) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": {"fisher_samples": 7}},
        {"parameters": {"fisher_seq_len": 63}},
        {"parameters": {"fisher_seed": 1}},
        {"parameters": {"fisher_labels": "sampled"}},
        {"dtype": "float64"},
    ],
)
def test_whatever_changes_the_numbers_is_measured_anew(changes, pair, merge, cache_folder, measured):
    merge.ok(config_for(pair))
    merge.ok(config_for(pair, **changes), out="other")
    assert len(measured) == 2
    assert len(files(cache_folder)) == 2


def test_other_weights_are_measured_anew(pair, merge, tmp_path, measured):
    merge.ok(config_for(pair))
    other = tiny.build(tiny.config("llama"))
    other.model.layers[3].mlp.up_proj.weight.data[3, 5] += 1
    merge.ok(config_for(pair, base_model=str(tiny.save(other, tmp_path / "base"))), out="other")
    assert len(measured) == 2


def test_switched_off(pair, merge, cache_folder, measured):
    merge.ok(config_for(pair, parameters={"fisher_cache": False}))
    merge.ok(config_for(pair, parameters={"fisher_cache": False}), out="again")
    assert len(measured) == 2
    assert files(cache_folder) == []
    config = merge.folder / "config.yml"
    config.write_text(json.dumps(config_for(pair)))
    for command in (
        ["plan", str(config)],
        ["export", str(config), "-o", str(merge.folder / "plain.yml"), "--no-check"],
        ["merge", str(config), str(merge.folder / "merged"), "--no-copy-tokenizer", "--no-write-model-card"],
        ["fisher", str(pair.base), "-o", str(merge.folder / "f.json")],
    ):
        result = CliRunner().invoke(main, [*command, "--no-cache", "--quiet"])
        assert result.exit_code == 0, result.output
    assert len(measured) == 6
    assert files(cache_folder) == []
    # What was kept before is not used either.
    merge.ok(config_for(pair), out="kept")
    merge.ok(config_for(pair, parameters={"fisher_cache": False}), out="anew")
    assert len(measured) == 8


def test_a_base_is_opened_once_and_its_dtype_chosen_once(pair, monkeypatch):
    """Opening may merge an adapter, and a choice that is timed may turn out otherwise the second time."""
    opened = []
    choices = iter([torch.float32, torch.float64])
    monkeypatch.setattr("mergekit_fim.fisher.loading.running_dtype", lambda dtype, device: next(choices))

    def open_base():
        opened.append(open_model(str(pair.base), None, MergeOptions()))
        return opened[-1]

    found = mergekit_fim.prepass.measured.measured(open_base, FisherSettings(1, 4), None, MergeOptions(quiet=True))
    assert len(opened) == 1
    assert found.measurement.fisher.dtype == "float32"


def damage(kind: str, file: Path) -> None:
    text = file.read_text()
    if kind == "truncated":
        file.write_text(text[: len(text) // 2])
    elif kind == "empty":
        file.write_text("")
    elif kind == "edited":
        content = json.loads(text)
        layer = content["layers"][2]
        layer["squared_norms"] = [2 * norm for norm in layer["squared_norms"]]
        layer["fisher"], layer["fisher_stderr"] = 2 * layer["fisher"], 2 * layer["fisher_stderr"]
        file.write_text(json.dumps(content))
    elif kind == "of another model":
        file.write_bytes((file.parent / "other").read_bytes())
    elif kind == "a folder":
        file.unlink()
        file.mkdir()


@pytest.mark.parametrize("kind", ["truncated", "empty", "edited", "of another model", "a folder"])
def test_a_file_that_cannot_be_trusted(kind, pair, merge, cache_folder, measured, caplog):
    merge.ok(config_for(pair, base_model=str(pair.third)), out="third")
    (file,) = files(cache_folder)
    file.rename(cache_folder / "other")
    first, _ = merge.ok(config_for(pair), out="first")
    (file,) = (f for f in files(cache_folder) if f.name != "other")
    damage(kind, file)
    again, _ = merge.ok(config_for(pair), out="again")
    assert len(measured) == 3
    assert "measured anew" in caplog.text
    assert bytes_of(first) == bytes_of(again)
    if kind != "a folder":
        merge.ok(config_for(pair), out="mended")
        assert len(measured) == 3


@pytest.mark.parametrize("kind", ["a file for a folder", "full", "read-only"])
def test_a_cache_that_cannot_be_written(kind, pair, merge, cache_folder, measured, monkeypatch, caplog):
    if kind == "a file for a folder":
        cache_folder.rmdir()
        cache_folder.write_text("")
    else:
        number = 28 if kind == "full" else 30

        def refuse(*_args, **_kwargs):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("mergekit_fim.prepass.measured.write_measurement", refuse)
    out, _ = merge.ok(config_for(pair))
    assert "not kept for the next merge" in caplog.text
    assert reference.report(out)["fisher"]["layers"]


def test_what_a_killed_process_left_is_removed(pair, merge, cache_folder):
    old, new = (cache_folder / f".{name}.json.{'0' * 8}-2-0123abcd{PART}" for name in "ab")
    for part in (old, new):
        part.write_text("{")
    os.utime(old, (time.time() - 7200,) * 2)
    merge.ok(config_for(pair))
    assert not old.exists()
    assert new.exists()  # maybe of a process that is still at it


def test_two_processes_at_once(pair, warm, cache_folder, tmp_path):
    """Several processes measure the same at the same time: each has the same numbers, and one file is left."""
    command = ["mergekit-fim", "fisher", str(pair.base), "-q", "--samples", "3", "-o"]
    outs = [tmp_path / f"{i}.json" for i in range(3)]
    environment = {"MERGEKIT_FIM_CACHE": str(cache_folder)}
    done = warm.together(*({"arguments": [*command, str(out)], "environment": environment} for out in outs))
    assert [outcome.status for outcome in done] == [0, 0, 0]
    assert len({out.read_bytes() for out in outs}) == 1
    (file,) = files(cache_folder)
    assert json.loads(file.read_text())["layers"] == json.loads(outs[0].read_text())["layers"]


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("MERGEKIT_FIM_CACHE", str(tmp_path / "own"))
    assert cache.cache_folder() == str(tmp_path / "own")
    monkeypatch.delenv("MERGEKIT_FIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == str(tmp_path / "xdg" / "mergekit-fim")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == str(tmp_path / ".cache" / "mergekit-fim")


def test_a_kept_measurement_says_what_it_was_made_with(pair, cache_folder, tmp_path):
    """A newer torch, for one, changes no key of the cache."""
    arguments = ["fisher", str(pair.base), "-q", "-o"]
    assert CliRunner().invoke(main, [*arguments, str(tmp_path / "a.json")]).exit_code == 0
    (file,) = cache_folder.iterdir()
    kept = read_measurement(str(file))
    write_measurement(replace(kept, versions={**kept.versions, "torch": "2.0"}), str(file))
    assert CliRunner().invoke(main, [*arguments, str(tmp_path / "b.json")]).exit_code == 0
    assert read_measurement(str(tmp_path / "b.json")).versions["torch"] == "2.0"
