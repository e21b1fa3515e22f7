"""What docs/security.md promises: no network, no code and no pickle of others unless the user asked for it."""

import ast
import json
import os
import re
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from environments import ROOT
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from merges import Pair, config_for, ends_in_one_line
from warm import Warm

import mergekit_fim
from mergekit_fim.errors import FimError
from mergekit_fim.models import checkpoint
from mergekit_fim.models import identity as fingerprint

PACKAGE = Path(mergekit_fim.__file__).parent
SMALL = {"fisher_samples": 2, "fisher_seq_len": 8}
MEASURE = ("--samples", "2", "--seq-len", "8", "-q", "--no-cache")


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """The Hub's libraries think that there is a network."""
    folder = tmp_path_factory.mktemp("warm")
    online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": ""}
    process = Warm(folder, **online, HF_HOME=str(folder / "hf"), MERGEKIT_FIM_CACHE=str(folder / "cache"))
    yield process
    process.close()


@pytest.fixture
def config(pair, tmp_path) -> str:
    return written(tmp_path, config_for(pair, parameters=SMALL))


def written(folder: Path, config: dict) -> str:
    (folder / "config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(folder / "config.yml")


@pytest.mark.parametrize("command", ["merge", "our merge", "plan", "export", "fisher", "saved", "plot", "compare"])
def test_local_folders_need_no_network(command, warm, config, pair, tmp_path):
    """With the Hub's offline switch off, any attempt to connect or to look up a name ends the process."""
    measured = str(tmp_path / "f.json")
    fisher = ["mergekit-fim", "fisher", str(pair.base), "-o", measured, *MEASURE, "--dtype", "float32"]
    commands = {
        "merge": [["mergekit-yaml", config, str(tmp_path / "out")]],
        "our merge": [["mergekit-fim", "merge", config, str(tmp_path / "out")]],
        "plan": [["mergekit-fim", "plan", config]],
        "export": [["mergekit-fim", "export", config, "-o", str(tmp_path / "plain.yml")]],
        "fisher": [fisher],
        "saved": [fisher, ["mergekit-yaml", str(tmp_path / "saved.yml"), str(tmp_path / "out")]],
        "plot": [fisher, ["mergekit-fim", "plot", measured, "-o", str(tmp_path / "f.svg")]],
        "compare": [fisher, ["mergekit-fim", "compare", measured, measured]],
    }
    (tmp_path / "saved.yml").write_text(yaml.safe_dump(config_for(pair, parameters={"fisher": measured})))
    for arguments in commands[command]:
        tokenizer = ["--no-copy-tokenizer"] if "yaml" in arguments[0] or arguments[1] == "merge" else []
        done = warm.run(*arguments, *tokenizer, offline=True)
        assert "NETWORK" not in done.stderr, done.stderr
        assert done.status == 0, done.stderr


def test_a_name_on_the_hub_is_looked_up_there(warm, pair, tmp_path):
    """So that the test above would see it: a measurement and a model by name, and mergekit's model card."""
    named = written(tmp_path, config_for(pair, parameters={"fisher": "user/repo"}))
    for arguments in (
        ["mergekit-yaml", named, str(tmp_path / "out"), "--no-copy-tokenizer"],
        ["mergekit-fim", "fisher", "user/repo", "-o", str(tmp_path / "f.json"), *MEASURE],
    ):
        done = warm.run(*arguments, offline=True)
        assert (done.status, "NETWORK" in done.stderr) == (77, True), done.stderr
    # mergekit's model card takes a relative path of two parts for a name on the Hub.
    relative = {"base_model": "models/base", "models": [{"model": "models/long"}], "parameters": SMALL}
    relative = written(tmp_path, config_for(pair) | relative)
    (tmp_path / "models").mkdir()
    for name, path in (("base", pair.base), ("long", pair.long)):
        (tmp_path / "models" / name).symlink_to(path)
    arguments = ["mergekit-yaml", relative, str(tmp_path / "out"), "--no-copy-tokenizer"]
    done = warm.run(*arguments, offline=True, folder=str(tmp_path))
    assert "NETWORK" in done.stderr
    assert (tmp_path / "out" / "fim_report.json").exists()  # by then all else is done
    done = warm.run(*arguments, "--no-write-model-card", offline=True, folder=str(tmp_path))
    assert (done.status, "NETWORK" in done.stderr) == (0, False), done.stderr


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
open({marker!r}, "a").close()
class OwnConfig(LlamaConfig):
    model_type = {kind!r}
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def bring_code(folder: Path, marker: Path, kind: str) -> None:
    """A checkpoint that comes with code, which leaves a marker when it runs."""
    (folder / "modeling_own.py").write_text(CODE.format(marker=str(marker), kind=kind))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = kind
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("command", ["fisher", "plan", "our merge", "merge"])
@pytest.mark.parametrize("kind", ["llama", "own"])
def test_code_of_a_model_runs_only_when_the_user_said_so(kind, command, warm, tmp_path):
    """Of a model whose kind transformers knows as well, and of one that can't be had without its code."""
    base = tiny.build(tiny.config("llama"))
    pair = Pair(*(tiny.save(m, tmp_path / n) for n, m in (("base", base), ("long", tiny.tuned(base, 1)))), tmp_path)
    marker, out = tmp_path / "marker", tmp_path / "out"
    for folder in (pair.base, pair.long):
        bring_code(folder, marker, kind)
    config = written(tmp_path, config_for(pair, parameters=SMALL | {"fisher_cache": False}))
    arguments = {
        "fisher": ["mergekit-fim", "fisher", str(pair.base), "-o", str(tmp_path / "f.json"), *MEASURE],
        "plan": ["mergekit-fim", "plan", config],
        "our merge": ["mergekit-fim", "merge", config, str(out), "--no-copy-tokenizer", "--no-write-model-card"],
        "merge": ["mergekit-yaml", config, str(out), "--no-copy-tokenizer", "--no-write-model-card"],
    }[command]
    done = warm.run(*arguments, offline=True)
    assert not marker.exists()
    if kind == "llama":  # transformers' own code runs
        assert done.status == 0, done.stderr
    else:
        assert done.status == 1
        assert not out.exists()
        assert not (tmp_path / "f.json").exists()
        if command == "merge":  # mergekit's own error, before the plug-in has its turn
            assert "trust_remote_code=True" in done.stderr
        else:
            ends_in_one_line(done, "pass --trust-remote-code")
    done = warm.run(*arguments, "--trust-remote-code", offline=True)
    assert marker.exists()
    assert done.status == 0, done.stderr


class Payload:
    """What a malicious pickle is made of."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.fixture
def malicious(tmp_path) -> tuple[Path, Path]:
    """A checkpoint whose .bin file makes a folder when it is unpickled, and that folder."""
    model = tiny.build(tiny.config("llama"))
    folder, marker = tmp_path / "malicious", tmp_path / "marker"
    model.config.save_pretrained(folder)
    tensors = model.state_dict()
    torch.save({**tensors, "extra": Payload(marker)}, folder / "pytorch_model.bin")
    # With an index mergekit doesn't look into the file before the plug-in does.
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "pytorch_model.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder, marker


@pytest.mark.parametrize("lazy", [[], ["--lazy-unpickle"]])
@pytest.mark.parametrize("command", ["fisher", "plan", "merge"])
def test_a_malicious_checkpoint_is_refused(command, lazy, warm, pair, malicious, tmp_path):
    folder, marker = malicious
    config = written(tmp_path, config_for(pair, models=[{"model": str(folder)}], parameters=SMALL))
    out = tmp_path / "out"
    arguments = {
        "fisher": ["mergekit-fim", "fisher", str(folder), "-o", str(tmp_path / "f.json"), *MEASURE],
        "plan": ["mergekit-fim", "plan", config],
        "merge": ["mergekit-fim", "merge", config, str(out), "--no-copy-tokenizer"],
    }[command]
    done = warm.run(*arguments, *lazy, offline=True)
    assert not marker.exists()
    ends_in_one_line(done, absent=out)
    assert not (tmp_path / "f.json").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # it would have
    assert marker.exists()


def test_our_own_readers_refuse_a_malicious_checkpoint(malicious):
    """Whatever mergekit does before: the headers and the fingerprint are read without running code."""
    folder, marker = malicious
    reference = ModelReference.parse(str(folder))
    LoaderCache().setup(MergeOptions(lazy_unpickle=False))
    with pytest.raises(FimError, match="can't read"):
        checkpoint.read_headers(reference)
    with pytest.raises(Exception, match="Weights only load failed"):
        list(fingerprint._pickled(str(folder / "pytorch_model.bin"), {}))
    assert not marker.exists()


def test_no_code_in_our_own_formats():
    """No module of ours can unpickle, evaluate or run text, and every `torch.load` is of tensors only."""
    banned = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "subprocess", "socket", "ctypes", "runpy"}
    banned_calls = {"eval", "exec", "compile", "system", "popen", "unsafe_load", "full_load", "load_module"}
    loads = 0
    for path in sorted(PACKAGE.glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            # The process that grades answers is this Python with a function of ours; it is never given a text to run.
            allowed = {"subprocess"} if path == PACKAGE / "evaluate" / "problems" / "grader.py" else set()
            assert not {name.split(".")[0] for name in names} & (banned - allowed), where
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            owner = getattr(getattr(node.func, "value", None), "id", None)
            is_harmless = (called, owner) in (("eval", "model"), ("compile", "re"))
            assert called not in banned_calls or is_harmless, where
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "load" and owner == "torch":
                loads += 1
                assert keywords.get("weights_only") == "True", where
            if called == "load" and owner == "yaml":
                raise AssertionError(where)
            assert keywords.get("trust_remote_code", "trust_remote_code") != "True", where
    assert loads == 3


def test_the_page_names_tests_that_are_there():
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 10
    for file, test in named:
        (path,) = (ROOT / "tests").rglob(file)
        assert f"def {test}(" in path.read_text(encoding="utf-8"), (file, test)
