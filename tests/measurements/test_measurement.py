"""Measurements as files: written, read, refused, used by merges, and from the Hub."""

import copy
import hashlib
import http.server
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from typing import ClassVar

import pytest
import reference
import tiny
import torch
import transformers
from click.testing import CliRunner
from measured import measurement
from mergekit.options import MergeOptions
from merges import config_for, ends_in_one_line, unwrapped
from safetensors.torch import load_file, save_file

import mergekit_fim
from mergekit_fim.cli import main
from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.errors import FimError
from mergekit_fim.files import PART
from mergekit_fim.measurements.file import as_json, from_json, write_measurement
from mergekit_fim.measurements.record import FisherMeasurement, LayerFisher, Measurement, ModelIdentity
from mergekit_fim.measurements.store import read_measurement
from mergekit_fim.models.identity import _starts, fingerprint, identity
from mergekit_fim.models.inputs import open_model


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "fisher.json"
    write_measurement(measurement(), str(path))
    assert read_measurement(str(path)) == measurement()
    assert os.listdir(tmp_path) == ["fisher.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_single_sequence_has_no_standard_error(tmp_path):
    fisher = FisherMeasurement(97, "float32", FisherSettings(1, 12), (LayerFisher(0, 3, (2.0,)),))
    one = measurement(fisher=fisher, model=ModelIdentity("m", None, None, 1, 97, "f-c"))
    write_measurement(one, str(tmp_path / "f.json"))
    assert read_measurement(str(tmp_path / "f.json")) == one
    assert json.loads((tmp_path / "f.json").read_text())["layers"][0]["fisher_stderr"] is None


def test_a_newer_writer_may_add_keys():
    content = as_json(measurement())
    content["more"] = {"a": 1}
    content["layers"][0]["more"] = 1
    content["checksum"] = checksum(content)
    assert from_json(content, "f") == measurement()


def checksum(content):
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def edited(path, value, *, sign=False):
    """A file in which one value, by its path, was changed or (None) removed; with `sign`, under a fitting checksum."""
    content = as_json(measurement())
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    if sign:
        content["checksum"] = checksum(content)
    return content


BAD = {
    "another format": (edited(["format"], "mergekit-fim/report"), ["mergekit-fim/fisher", "mergekit-fim/report"]),
    "a list": ([1], ["mergekit-fim/fisher", "list"]),
    "a newer version": (edited(["version"], 2), ["version 1", "found 2", "upgrade"]),
    "an odd version": (edited(["version"], "1"), ["`version`", "integer", "found '1'"]),
    "no model": (edited(["model"], None), ["`model` is missing"]),
    "no fingerprint": (edited(["model", "fingerprint"], None), ["`model`", "fingerprint is missing"]),
    "a layer missing": (edited(["layers"], as_json(measurement())["layers"][:1]), ["`layers`", "2 decoder layers"]),
    "layers of another order": (
        edited(["layers", 0, "index"], 1),
        ["`layers`", "2 decoder layers in order", "found layer 1"],
    ),
    "no parameters": (
        edited(["layers", 1, "parameters"], 0),
        ["`layers[1].parameters`", "greater than or equal to 1", "found 0"],
    ),
    "a sequence missing": (
        edited(["layers", 1, "squared_norms"], [3.0]),
        ["`layers`", "2 squared norms each", "layer 1 with 1"],
    ),
    "a negative norm": (edited(["layers", 0, "squared_norms", 0], -1.0), ["`layers[0].squared_norms[0]`", "-1.0"]),
    "a text for a norm": (
        edited(["layers", 0, "squared_norms", 0], "1"),
        ["`layers[0].squared_norms[0]`", "number", "found '1'"],
    ),
    "another F": (edited(["layers", 0, "fisher"], 0.06), ["changed after it was written"]),
    "no F": (edited(["layers", 0, "fisher"], None), ["changed after it was written"]),
    "another stderr": (edited(["layers", 1, "fisher_stderr"], 9.0), ["changed after it was written"]),
    "no layers": (
        edited(["layers"], []) | {"model": as_json(measurement())["model"] | {"num_layers": 0}},
        ["`layers`", "expected 0 decoder layers"],
    ),
    "layers beyond counting": (edited(["model", "num_layers"], 10**15), ["`layers`", "expected 1000000000000000"]),
    "a text for a count": (edited(["model", "num_layers"], "2"), ["`model.num_layers`", "found '2'"]),
    "a switch for a version": (edited(["version"], True), ["`version`", "found True"]),
    "an F that isn't finite": (
        json.loads(json.dumps(edited(["layers", 0, "fisher"], 1.5)).replace("1.5", "1e999")),
        ["finite"],
    ),
    "no samples": (edited(["settings", "samples"], 0), ["`settings`", "`samples`", "at least 1", "found 0"]),
    "labels": (edited(["settings", "labels"], "x"), ["`settings`", "`labels`", "inputs"]),
    "edited by hand": (edited(["model", "vocab_size"], 98), ["changed after it was written", "checksum"]),
    "norms and F edited by hand": (
        {
            **as_json(measurement()),
            "layers": as_json(
                measurement(
                    fisher=FisherMeasurement(
                        97,
                        "float32",
                        FisherSettings(2, 12, 5, "sampled"),
                        (LayerFisher(0, 10, (1.0, 1.0)), LayerFisher(1, 12, (0.0, 3.0))),
                    )
                )
            )["layers"],
        },
        ["changed after it was written"],
    ),
    "no checksum": (edited(["checksum"], None), ["`checksum` is missing"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_content(case, tmp_path):
    content, words = BAD[case]
    path = tmp_path / "f.json"
    path.write_text(json.dumps(content))
    with pytest.raises(FimError) as caught:
        read_measurement(str(path))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for word in words:
        assert word in message


def test_bad_files(tmp_path):
    good = json.dumps(as_json(measurement()))
    files = {
        "truncated": (good[:300], "JSON"),
        "empty": ("", "JSON"),
        "nan": (good.replace("1.0", "NaN", 1), "NaN"),
        "infinite": (good.replace("1.0", "-Infinity", 1), "Infinity"),
        "deep": ("[" * 100_000, "JSON"),
        "binary": (b"\xff\xfe\x00", "JSON"),
    }
    for name, (content, word) in files.items():
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(FimError, match=word) as caught:
            read_measurement(str(path))
        assert "\n" not in str(caught.value), name
    with pytest.raises(FimError, match="found a folder"):
        read_measurement(str(tmp_path))
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(FimError, match="at most 64 MB, found 1024 MB"):
        read_measurement(str(tmp_path / "huge"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "f.json"
    path.write_text("before")

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FimError, match="No space left"):
        write_measurement(measurement(), str(path))
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["f.json"]


def opened(path):
    return open_model(str(path), None, MergeOptions())


@pytest.fixture
def model(tmp_path):
    return tiny.save(tiny.build(tiny.config("llama")), tmp_path / "model")


def test_the_fingerprint_is_that_of_the_weights_wherever_they_are(model, tmp_path):
    own = fingerprint(opened(model))
    assert len(own) == 49
    shutil.copytree(model, tmp_path / "copy")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded.config.save_pretrained(tmp_path / "bin")
    torch.save(load_file(model / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    for name in ("copy", "shards", "bin"):
        assert fingerprint(opened(tmp_path / name)) == own, name
    changes = {"_name_or_path": "x", "transformers_version": "4", "dtype": "bfloat16", "use_cache": False}
    for key, value in changes.items():
        change(tmp_path / "copy" / "config.json", key, value)
        assert fingerprint(opened(tmp_path / "copy")) == own, key


def test_a_tied_head_that_is_stored_is_that_of_the_embedding(tmp_path):
    """As `torch.save` of a state dict stores it, and safetensors don't."""
    built = tiny.build(tiny.config("qwen2", tie_word_embeddings=True))
    tiny.save(built, tmp_path / "tied")
    for name in ("bin", "other"):
        built.config.save_pretrained(tmp_path / name)
        tensors = {k: v.clone() for k, v in built.state_dict().items()}
        assert "lm_head.weight" in tensors
        if name == "other":
            tensors["lm_head.weight"][0, 0] += 1
        torch.save(tensors, tmp_path / name / "pytorch_model.bin")
    tied, stored, other = (fingerprint(opened(tmp_path / name)) for name in ("tied", "bin", "other"))
    assert tied == stored != other


def change(path, key, value):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {key: value}))


def test_other_weights_have_another_fingerprint(model, tmp_path):
    own = fingerprint(opened(model))
    tensors = load_file(model / "model.safetensors")
    seen = {own}
    for i, name in enumerate(tensors):
        other = {k: v.clone() for k, v in tensors.items()}
        other[name].view(-1)[i % other[name].numel()] += 1e-3
        path = tmp_path / f"m{i}"
        shutil.copytree(model, path)
        save_file(other, path / "model.safetensors", metadata={"format": "pt"})
        found = fingerprint(opened(path))
        assert found.split("-")[1] == own.split("-")[1]
        seen.add(found)
    assert len(seen) == len(tensors) + 1
    half = tiny.save(tiny.build(tiny.config("llama")), tmp_path / "half", torch.bfloat16)
    assert fingerprint(opened(half)).split("-")[0] != own.split("-")[0]
    shutil.copytree(model, tmp_path / "rope")
    change(tmp_path / "rope" / "config.json", "rms_norm_eps", 1e-3)
    weights, config = fingerprint(opened(tmp_path / "rope")).split("-")
    assert weights == own.split("-")[0]
    assert config != own.split("-")[1]


def test_a_fingerprint_samples_every_part_of_a_large_tensor():
    assert _starts(10_000, 8) == [0, 4096, 8192]
    starts = _starts(10**9, 100)
    assert starts[0] == 0
    assert starts[-1] + 4096 == 10**9
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert max(gaps) - min(gaps) <= 1


def measured_file(base, path, *options):
    result = CliRunner().invoke(main, ["fisher", str(base), "-o", str(path), "-q", "--dtype", "float32", *options])
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def no_measurement(monkeypatch):
    def forbidden(*_args, **_kwargs):
        raise AssertionError("measured")

    monkeypatch.setattr("mergekit_fim.prepass.measured.measure_checkpoint", forbidden)


def test_a_merge_uses_a_measurement(pair, merge, tmp_path, request):
    plain, _ = merge.ok(config_for(pair, parameters={"fisher_samples": 3, "fisher_labels": "sampled"}))
    file = measured_file(pair.base, tmp_path / "f.json", "--samples", "3", "--labels", "sampled", "--no-cache")
    request.getfixturevalue("no_measurement")
    shutil.copytree(pair.base, tmp_path / "elsewhere")
    parameters = {"fisher": str(file), "fisher_cache": False}
    config = config_for(pair, parameters=parameters, base_model=str(tmp_path / "elsewhere"))
    out, result = merge.ok(config, out="used")
    assert f"(from {file})" in unwrapped(result)
    assert "3 × 64 random tokens (seed 0, labels: sampled" in unwrapped(result)
    assert (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    report = reference.report(out)
    assert report["fisher"]["model"]["id"] == str(tmp_path / "elsewhere")
    assert report["settings"]["fisher"] == str(file)
    assert report["settings"]["fisher_samples"] == 3
    assert report["fisher"]["layers"] == reference.report(plain)["fisher"]["layers"]
    # A setting that says the same doesn't contradict it.
    merge.ok(config_for(pair, parameters=parameters | {"fisher_samples": 3}), out="same")


@pytest.mark.parametrize("name", ["samples", "seq_len", "seed", "labels"])
def test_a_measurement_that_contradicts_the_config(name, pair, merge, tmp_path, no_measurement):
    file = tmp_path / "f.json"
    own = identity(opened(pair.base))
    layers = tuple(LayerFisher(i, 3, (1.0, 2.0)) for i in range(5))
    fisher = FisherMeasurement(97, "float32", FisherSettings(2, 12, 5, "inputs"), layers)
    write_measurement(Measurement.of(fisher, own), str(file))
    value = "sampled" if name == "labels" else 7
    target, result = merge(config_for(pair, parameters={"fisher": str(file), f"fisher_{name}": value}))
    has = getattr(fisher.settings, name)
    ends_in_one_line(result, str(file), f"with {name} {has}", f"fisher_{name} to {value}", absent=target)
    ends_in_one_line(result, str(file), f"with {name} {has}", f"fisher_{name} to {value}", absent=target)
    # Of several, always the same one is named.
    parameters = {"fisher_samples": 7, "fisher_seq_len": 7, "fisher_seed": 7, "fisher_labels": "sampled"}
    target, result = merge(config_for(pair, parameters={"fisher": str(file), **parameters}), out="several")
    ends_in_one_line(result, str(file), "with labels inputs", absent=target)


def test_a_measurement_of_another_model(pair, merge, tmp_path, no_measurement):
    cases = {"long": (pair.long, "weights;"), "config": (tmp_path / "config", "config.json;")}
    shutil.copytree(pair.base, tmp_path / "config")
    change(tmp_path / "config" / "config.json", "rms_norm_eps", 1e-3)
    for name, (path, word) in cases.items():
        file = tmp_path / f"{name}.json"
        layers = tuple(LayerFisher(i, 3, (1.0,) * 8) for i in range(5))
        fisher = FisherMeasurement(97, "float32", FisherSettings(), layers)
        write_measurement(Measurement.of(fisher, identity(opened(path))), str(file))
        target, result = merge(config_for(pair, parameters={"fisher": str(file)}), out=f"out-{name}")
        ends_in_one_line(result, str(path), str(pair.base), word, "mergekit-fim fisher", absent=target)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nothing.json", ["nothing.json", "no such file"]),
        ("./a/b", ["./a/b", "no such file"]),
        ("folder/fisher.json", ["folder/fisher.json", "no such file"]),
        ("user/repo", ["user/repo", "neither a file here nor to be had from the Hub"]),
        ("", ["`fisher`", "user/repo"]),
        (3, ["`fisher`", "found 3"]),
    ],
)
def test_a_measurement_that_is_not_there(value, words, pair, merge, no_measurement):
    target, result = merge(config_for(pair, parameters={"fisher": value}))
    ends_in_one_line(result, *words, absent=target)


class Hub(http.server.BaseHTTPRequestHandler):
    """What hf_hub_download asks the Hub: one repository with two files, at two revisions."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        Hub.asked.append(self.path)
        content = Hub.files.get(self.path)
        if "broken" in self.path:  # the connection ends in the middle of an answer
            return
        self.send_response(200 if content is not None else 403 if "gated" in self.path else 404)
        self.send_header("X-Repo-Commit", ("2" if "/v2/" in self.path else "1") * 40)
        if content is None:
            codes = {"gated": "GatedRepo", "none": "RepoNotFound", "v9": "RevisionNotFound"}
            code = next((code for word, code in codes.items() if word in self.path), "EntryNotFound")
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and content is not None:
            self.wfile.write(content)

    def log_message(self, *_args):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_measurement_from_the_hub(hub, tmp_path):
    """In a process of its own, as huggingface_hub reads its settings once; the Hub is a server on this machine."""
    written = {}
    for name, seed in (("fisher.json", 1), ("more/other.json", 2)):
        layers = measurement().fisher.layers
        fisher = FisherMeasurement(97, "float32", FisherSettings(2, 12, seed), layers)
        write_measurement(measurement(fisher=fisher), str(tmp_path / "f.json"))
        written[name] = (tmp_path / "f.json").read_bytes()
    Hub.files = {
        "/user/repo/resolve/main/fisher.json": written["fisher.json"],
        "/user/repo/resolve/v2/fisher.json": written["more/other.json"],
        "/user/repo/resolve/main/more/other.json": written["more/other.json"],
    }
    code = """
import sys
from mergekit_fim import FimError, read_measurement
for name in sys.argv[1:]:
    try:
        print(read_measurement(name).fisher.settings.seed)
    except FimError as error:
        print(error)
"""
    names = ["user/repo", "user/repo@v2", "user/repo/more/other.json"]
    bad = {
        "user/repo/missing.json": "the repository user/repo on the Hub has no file missing.json",
        "user/gated": "the repository user/gated on the Hub is gated; ask for access",
        "user/none": "no file of that name here, and on the Hub no repository user/none, or a private one",
        "user/repo@v9": "the repository user/repo on the Hub has no revision v9",
        "user/broken": "neither a file here nor to be had from the Hub",
    }
    names += bad
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    environment |= {"NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    lines = done.stdout.splitlines()
    assert lines[:3] == ["1", "2", "2"], done.stdout + done.stderr
    for line, (name, words) in zip(lines[3:], bad.items(), strict=True):
        assert line.startswith(f"{name}: {words}"), line
    assert Hub.asked
    # What was downloaded is there without the Hub.
    environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-c", code, "user/repo"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.stdout == "1\n", done.stdout + done.stderr


def test_a_local_file_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    write_measurement(measurement(), "user/repo")
    assert read_measurement("user/repo") == measurement()


def test_slices_of_two_bases_use_a_measurement_of_one(pair, merge, tmp_path):
    """The other base is measured, with the same settings."""
    file = measured_file(pair.base, tmp_path / "f.json", "--samples", "3")
    sources = [
        {"base_model": str(base), "sources": [{"model": str(m), "layer_range": layers} for m in (base, pair.long)]}
        for base, layers in ((pair.base, [0, 2]), (pair.third, [2, 5]))
    ]
    config = config_for(pair, "fim_ta", slices=copy.deepcopy(sources), parameters={"fisher": str(file)})
    del config["models"]
    out, result = merge.ok(config)
    assert unwrapped(result).count(f"(from {file})") == 1
    report = reference.report(out)
    assert report["fisher"]["layers"] == json.loads(file.read_text())["layers"]
    other = report["fisher_of_other_bases"][str(pair.third)]
    assert [len(layer["squared_norms"]) for layer in other["layers"]] == [3] * 5
    assert not [name for name in os.listdir(tmp_path) if name.endswith(PART)]


@pytest.mark.parametrize(
    "changes", [{"labels": "bogus"}, {"seed": -1}, {"samples": 0}, {"seq_len": 1}, {"samples": 2.0}, {"seed": True}]
)
def test_settings_are_checked_when_they_are_made(changes):
    (name,) = changes
    with pytest.raises(FimError, match=f"FisherSettings: `{name}` must be"):
        FisherSettings(**changes)


def test_whatever_is_wrong_in_python_is_one_error(pair, tmp_path):
    good = config_for(pair)
    bad = {
        "empty": {},
        "none": None,
        "text": good | {"models": "long"},
        "key": good | {"modelss": []},
        "base": good | {"base_model": str(tmp_path / "no")},
        "method": good | {"merge_method": "nope"},
    }
    for config in bad.values():
        with pytest.raises(FimError):
            mergekit_fim.resolve(config)
        with pytest.raises(FimError):
            mergekit_fim.merge(config, tmp_path / "out")
    with pytest.raises(FimError, match="dtype"):
        mergekit_fim.measure(pair.base, dtype="int8")
    assert list(tmp_path.iterdir()) == []
    assert mergekit_fim.measure(pair.base, FisherSettings(1, 4)).model.num_layers == 5  # a Path will do
