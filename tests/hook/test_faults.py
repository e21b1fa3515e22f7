"""Whatever stops a command, at any moment: no half file is taken for a whole one, and the next run is as if it had been
the first.
"""

import abc
import errno
import json
import operator
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import tiny
import transformers
import yaml
from click.testing import CliRunner
from merges import Merge, Pair, config_for, ends_in_one_line
from safetensors.torch import load
from warm import Outcome, Warm

from mergekit_fim import files
from mergekit_fim.cli import main
from mergekit_fim.files import PART
from mergekit_fim.fisher import batched
from mergekit_fim.measurements.store import read_measurement

pytestmark = pytest.mark.slow

PLAIN = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")
SMALL = {"fisher_samples": 2, "fisher_seq_len": 8}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Pair:
    """A pair of two layers."""
    folder = tmp_path_factory.mktemp("small")
    base = tiny.build(tiny.config("llama", num_hidden_layers=2))
    paths = [tiny.save(base, folder / "base"), tiny.save(tiny.tuned(base, 1), folder / "long")]
    return Pair(*paths, paths[1])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def agree(found: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    """Whether files are the same but for the last digits of what was measured and of all that follows from it.

    Matrix products round differently to 1e-6, or to 1e-5 for another number of sequences, which is then said.
    """
    rel = 1e-5 if any(b"memory ran short" in content for content in found.values()) else 1e-6
    if found.keys() != expected.keys():
        return False
    for name, content in found.items():
        if name.endswith(".json"):
            same = _agree(json.loads(content), json.loads(expected[name]), rel)
        elif name.endswith(".safetensors"):
            a, b = load(content), load(expected[name])
            same = a.keys() == b.keys() and all(
                a[key].dtype is b[key].dtype and a[key].shape == b[key].shape for key in a
            )
            same = same and all(float((a[key] - b[key]).abs().max()) <= rel * float(b[key].abs().max()) for key in a)
        else:
            same = content == expected[name]
        if not same:
            return False
    return True


def _agree(found, expected, rel: float, key: str = "") -> bool:
    """Content of a report or a measurement; the standard error is a difference of norms, so that it has less digits."""
    if key == "checksum":  # of the digits; who reads the measurement compares it
        return True
    if key == "warnings":
        return expected == [] and all("memory ran short" in line for line in found)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_agree(found[k], v, rel, k) for k, v in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(_agree(a, b, rel, key) for a, b in zip(found, expected, strict=True))
    if isinstance(expected, float):
        return found == pytest.approx(expected, rel=rel if key in ("squared_norms", "fisher") else 10 * rel)
    return found == expected


def moments(calls: dict[str, int]) -> list[tuple[str, int]]:
    """25, spread over a run: over all of its calls, over those that touch files, and over those for files of ours."""
    parts = {"all": 9, "file": 7, "own": 9}
    return [(kind, 1 + calls[kind] * (2 * i + 1) // (2 * n)) for kind, n in parts.items() for i in range(n)]


class Work(abc.ABC):
    """A command that is stopped and run again, what it leaves, and what it leaves undisturbed."""

    def __init__(self, warm: Warm, folder: Path, pair: Pair) -> None:
        self.warm, self.folder, self.out = warm, folder, folder / "out"
        self.cache = folder / "cache"
        self.arguments = self.prepare(pair)
        self.reset()
        for file in self.out.iterdir():
            file.unlink()
        self.calls = self.run(count=True).calls
        self.whole, self.kept = contents(self.out), contents(self.cache)
        assert len(self.kept) == 1

    @abc.abstractmethod
    def prepare(self, pair: Pair) -> list[str]:
        """The command, after whatever must be there before it runs."""

    def reset(self) -> None:
        """As before the first run."""
        for folder in (self.out, self.cache):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def run(self, *, may_fail: bool = False, **job) -> Outcome:
        done = self.warm.run(*self.arguments, environment={"MERGEKIT_FIM_CACHE": str(self.cache)}, **job)
        assert may_fail or job.get("fault") or done.status == 0, done.stderr
        return done

    @abc.abstractmethod
    def check_stopped(self, same: Callable[[dict[str, bytes], dict[str, bytes]], bool] = operator.eq) -> None:
        """Nothing that has the name of a result is less than one."""


class MergeWork(Work):
    """A merge over an older merge's folder, of another method."""

    def prepare(self, pair: Pair) -> list[str]:
        commands = {}
        for method in ("fim_ta", "fim_ties"):
            config = self.folder / f"{method}.yml"
            config.write_text(yaml.safe_dump(config_for(pair, method, parameters=SMALL)), encoding="utf-8")
            commands[method] = ["mergekit-yaml", str(config), str(self.out), *PLAIN]
        self.arguments = commands["fim_ta"]
        self.run()
        self.older = self.out.rename(self.folder / "older")
        return commands["fim_ties"]

    def reset(self) -> None:
        super().reset()
        shutil.copytree(self.older, self.out, dirs_exist_ok=True)

    def check_stopped(self, same=operator.eq) -> None:
        found = contents(self.out)
        if {"config.json", "fim_report.json"} & found.keys():  # without a config nothing is loaded
            pair, older, whole = (
                {name: files[name] for name in ("model.safetensors", "fim_report.json")}
                for files in (found, contents(self.older), self.whole)
            )
            assert pair == older or same(pair, whole)


class FisherWork(Work):
    """A measurement."""

    def prepare(self, pair: Pair) -> list[str]:
        options = ["--samples", "2", "--seq-len", "8", "-q"]
        return ["mergekit-fim", "fisher", str(pair.base), "-o", str(self.out / "fisher.json"), *options]

    def check_stopped(self, same=operator.eq) -> None:
        found = {name: content for name, content in contents(self.out).items() if name == "fisher.json"}
        assert not found or same(found, self.whole)


@pytest.fixture(params=[MergeWork, FisherWork], ids=["merge", "fisher"], scope="module")
def work(request, warm, small, tmp_path_factory) -> Work:
    return request.param(warm, tmp_path_factory.mktemp("work"), small)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_at_any_moment(number, work):
    """50 moments of a merge and 50 of a measurement."""
    parts = []
    for kind, at in moments(work.calls):
        work.reset()
        done = work.run(fault=(kind, at, number))
        left = [p for folder in (work.out, work.cache) for p in folder.iterdir() if p.name.endswith(PART)]
        if number == signal.SIGKILL:
            assert done.status == -signal.SIGKILL
            parts += left
        else:
            assert (done.status, done.stderr.split()[-1:]) == (1, ["Aborted!"]), (kind, at, done)
            assert "Traceback" not in done.stderr
            assert left == []
        work.check_stopped()
        assert contents(work.cache).items() - {(p.name, p.read_bytes()) for p in left} <= work.kept.items()
        work.run()
        assert contents(work.out) == work.whole, (kind, at)
        assert contents(work.cache) == work.kept, (kind, at)
    assert bool(parts) is (number == signal.SIGKILL)  # or no moment was one of writing


def test_interrupted_before_anything(warm):
    """While a command's own imports run."""
    done = warm.run("mergekit-fim", "compare", "a", "b", fault=("all", 20, signal.SIGINT))
    assert (done.status, done.stderr) == (1, "\nAborted!\n")


@pytest.fixture
def merge(tmp_path) -> Merge:
    """All merges of a test share its cache."""
    return Merge(tmp_path, fresh=False)


def fill_disk(monkeypatch, path: Path, part: float = 0.5) -> None:
    """The disk is full when `part` of an unfinished file for `path`, or for any file in that folder, is written."""

    def opened(name, mode="r", **options):
        file = open(name, mode, **options)  # noqa: SIM115
        if "w" in mode and str(name).startswith((f"{path.parent}/.{path.name}", f"{path}/.")):
            original = file.write

            def write(text):
                original(text[: int(len(text) * part)])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            file.write = write
        return file

    monkeypatch.setattr(files, "open", opened, raising=False)


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_a_disk_that_fills_while_the_measurement_is_kept(part, small, merge, cache_folder, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        fill_disk(patch, cache_folder, part)
        first, _ = merge.ok(config_for(small, parameters=SMALL))
    assert "not kept for the next merge" in caplog.text
    assert "No space left on device" in caplog.text
    assert contents(cache_folder) == {}
    again, _ = merge.ok(config_for(small, parameters=SMALL), out="again")
    assert contents(first) == contents(again)


def test_a_disk_that_fills_while_the_report_is_written(small, merge, monkeypatch):
    older, _ = merge.ok(config_for(small, "fim_ta", parameters=SMALL))
    with monkeypatch.context() as patch:
        fill_disk(patch, older / "fim_report.json")
        out, result = merge(config_for(small, parameters=SMALL))
    assert out == older
    line = ends_in_one_line(result)
    assert line.startswith(f"Error: {out / 'fim_report.json'}: can't be written (No space left on device)")
    assert "fim_report.json" not in contents(out)  # the older merge's would be of another model
    assert not [name for name in contents(out) if name.endswith(PART)]
    out, _ = merge.ok(config_for(small, parameters=SMALL))
    clean, _ = merge.ok(config_for(small, parameters=SMALL), out="clean")
    assert contents(out) == contents(clean)


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_a_disk_that_fills_while_a_measurement_is_written(part, pair, tmp_path, monkeypatch):
    arguments = ["fisher", str(pair.base), "-o", str(tmp_path / "f.json"), "-q", "--samples", "2", "--seq-len", "8"]
    with monkeypatch.context() as patch:
        fill_disk(patch, tmp_path / "f.json", part)
        result = CliRunner().invoke(main, arguments)
    line = ends_in_one_line(result)
    assert result.stderr == line + "\n"
    assert line.startswith(f"Error: {tmp_path / 'f.json'}: can't be written (No space left on device); free some space")
    assert contents(tmp_path) == {}
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert len(read_measurement(str(tmp_path / "f.json")).fisher.layers) == 5


def test_files_that_must_stay_small(work):
    """The system refuses whatever is longer, in the middle of the file: mergekit's own files as well."""
    work.reset()
    done = work.run(file_size=500, may_fail=True)
    assert done.status > 0
    work.check_stopped()
    assert contents(work.cache) == {}
    assert not [name for name in contents(work.out) if name.endswith(PART)]
    work.run()
    assert (contents(work.out), contents(work.cache)) == (work.whole, work.kept)


def test_two_merges_at_once(small, warm, tmp_path):
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(config_for(small, parameters=SMALL)), encoding="utf-8")
    environment = {"MERGEKIT_FIM_CACHE": str(tmp_path / "cache")}
    outs = [tmp_path / name for name in ("first", "second", "alone")]
    jobs = [{"arguments": ["mergekit-yaml", str(config), str(o), *PLAIN], "environment": environment} for o in outs]
    assert [done.status for done in warm.together(*jobs[:2])] == [0, 0]
    (kept,) = contents(tmp_path / "cache")
    read_measurement(str(tmp_path / "cache" / kept))
    shutil.rmtree(tmp_path / "cache")
    assert warm.together(jobs[2])[0].status == 0
    assert contents(outs[0]) == contents(outs[1]) == contents(outs[2])


@pytest.mark.parametrize("megabytes", [0, 4, 8, 16])
def test_little_memory(megabytes, work):
    """Of these, some are too little: then it ends, and without a result.

    Where it is enough, the last digits may differ: the library that multiplies matrices takes another way when it gets
    no memory to copy them to (MKL on Intel's processors with AVX-512, silently), or the batch was halved, which is
    said. Once there is enough memory and nothing is kept, the bytes are the same again.
    """
    work.reset()
    done = work.run(memory=megabytes << 20, may_fail=True)
    if done.status == 0:
        assert agree(contents(work.out), work.whole)
    else:
        assert done.status in (1, -signal.SIGABRT, -signal.SIGSEGV), done  # what C++ makes of it, at worst
    work.check_stopped(agree)
    kept = {name: content for name, content in contents(work.cache).items() if not name.endswith(PART)}
    assert not kept or agree(kept, work.kept)
    for name in kept:
        read_measurement(str(work.cache / name))
    work.run()
    assert agree(contents(work.out), work.whole)
    assert agree(contents(work.cache), work.kept)
    assert not kept or contents(work.cache) == kept  # it is used
    shutil.rmtree(work.cache)
    work.run()
    assert (contents(work.out), contents(work.cache)) == (work.whole, work.kept)


def test_too_little_memory_for_the_sequences(warm, tmp_path):
    model = tiny.save(
        tiny.build(tiny.config("llama", intermediate_size=8192, max_position_embeddings=1024)), tmp_path / "model"
    )
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["mergekit-fim", "fisher", model, "-o", out / "f.json", "-q", "--samples", "1", "--seq-len", "1024"]
    done = warm.run(*arguments, memory=64 << 20, environment={"MERGEKIT_FIM_CACHE": str(tmp_path / "cache")})
    line = ends_in_one_line(done, "lower fisher_seq_len (--seq-len)")
    assert done.stderr == line + "\n"
    assert line.startswith(f"Error: {model}: cpu has too little memory for the Fisher pre-pass")
    assert contents(out) == {}
    assert not (tmp_path / "cache").exists()


CPU_ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize("error", [RuntimeError(CPU_ALLOCATOR), MemoryError()])
def test_memory_on_the_cpu_halves_the_batch(error, small, merge, cache_folder, monkeypatch, caplog):
    """The report and the console say so, and say it again where the kept measurement is used."""
    parameters = {"fisher_seq_len": 8, "fisher_cache": False}
    whole, _ = merge.ok(config_for(small, parameters=parameters))
    said = f"{small.base}: memory ran short for 8 sequences at a time, 2 at a time were measured in the end"
    original, sizes = batched._Run.measure, []

    def measure(self, samples, device):
        sizes.append(len(samples.input_ids))
        if sizes[-1] > limit:
            raise error
        return original(self, samples, device)

    monkeypatch.setattr(batched._Run, "measure", measure)
    limit = 2
    out, _ = merge.ok(config_for(small, parameters=parameters), out="halved")
    assert sizes == [8, 4, 2, 2, 2, 2]
    found, expected = (reference.report(path)["fisher"]["layers"] for path in (out, whole))
    for a, b in zip(found, expected, strict=True):
        assert a["squared_norms"] == pytest.approx(b["squared_norms"], rel=1e-5)
    assert reference.report(whole)["warnings"] == []
    (warning,) = reference.report(out)["warnings"]
    assert warning.startswith(said)
    parameters["fisher_cache"] = True
    first, _ = merge.ok(config_for(small, parameters=parameters), out="first")
    again, _ = merge.ok(config_for(small, parameters=parameters), out="again")
    assert sizes.count(8) == 2  # it isn't measured again
    assert len(contents(cache_folder)) == 1
    assert [reference.report(path)["warnings"] for path in (first, again)] == [[warning]] * 2
    assert [r.getMessage() for r in caplog.records if r.name == "mergekit_fim"] == [warning] * 3
    parameters["fisher_cache"] = False
    limit = 0
    target, result = merge(config_for(small, parameters=parameters), out="none")
    ends_in_one_line(result, str(small.base), "too little memory", "fisher_seq_len", absent=target)


def test_a_model_that_fails_layer_by_layer_is_measured_as_a_whole(pair, merge, monkeypatch):
    """Whatever its code says: that is no lack of memory."""
    expected = reference.fisher(pair.base)

    def measure(self, samples, device):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(batched._Run, "measure", measure)
    out, _ = merge.ok(config_for(pair))
    report = reference.report(out)
    assert [layer["squared_norms"] for layer in report["fisher"]["layers"]] == [
        pytest.approx(squared_norms, rel=1e-4) for _, squared_norms in expected
    ]
    (line,) = report["warnings"]
    assert "can't be run layer by layer (mat1 and mat2 shapes cannot be multiplied)" in line


def test_a_model_whose_own_code_fails_is_refused_in_one_line(merge, tmp_path):
    """More rotary dimensions than a head has."""
    changes = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 16}
    for name in ("base", "long"):
        tiny.save(transformers.GPTJForCausalLM(transformers.GPTJConfig(**changes)), tmp_path / name)
    config = {"merge_method": "fim_ta", "base_model": str(tmp_path / "base")}
    target, result = merge(config | {"models": [{"model": str(tmp_path / "long")}]})
    words = f"{tmp_path / 'base'}: GPTJForCausalLM of transformers can't be run", "in decoder layer 0 (RuntimeError: "
    ends_in_one_line(result, *words, absent=target)


def test_unfinished_files_of_others_are_left(tmp_path):
    """Those of processes that are at it here or, for an hour, on another machine; and what isn't ours."""
    machine = files._machine()
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait(timeout=60)
    ended = process.pid
    names = {
        "dead": f".f.json.{machine}-{ended}-0123abcd{PART}",
        "alive": f".f.json.{machine}-{os.getppid()}-0123abcd{PART}",
        "elsewhere": f".f.json.{'0' * 8}-{ended}-0123abcd{PART}",
        "not ours": f".f.json.{machine}-{ended}-0123abcd.part",
    }
    for name in names.values():
        (tmp_path / name).write_text("{")
    folders = {key: f".model.{machine}-{names[key].split('-')[1]}-0123abcd{PART}" for key in ("dead", "alive")}
    for name in folders.values():  # as of `mergekit-fim merge`
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("")
        os.utime(tmp_path / name, (0, 0))
    files.write_json(str(tmp_path / "f.json"), {})
    left = {"f.json", f"{folders['alive']}/model.safetensors", *names.values()} - {names["dead"]}
    assert set(contents(tmp_path)) == left
    os.utime(tmp_path / names["elsewhere"], (0, 0))
    files.write_json(str(tmp_path / "f.json"), {})
    assert set(contents(tmp_path)) == left - {names["elsewhere"]}


def test_what_is_no_file_is_written_to_as_it_is(tmp_path):
    """A pipe, here, as /dev/stdout may be one; and a link stays one."""
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    files.write_json(str(tmp_path / "pipe"), {"a": 1})
    assert json.loads(reader.communicate(timeout=60)[0]) == {"a": 1}
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "folder" / "target.json")
    for content in ({"a": 1}, {"a": 2}):
        files.write_json(str(tmp_path / "link.json"), content)
        assert (tmp_path / "link.json").is_symlink()
        assert json.loads((tmp_path / "folder" / "target.json").read_text()) == content
    assert os.listdir(tmp_path / "folder") == ["target.json"]


def test_a_process_number_means_a_process_of_one_container(monkeypatch):
    own = files._machine()
    original = os.readlink
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]" if path == "/proc/self/ns/pid" else original(path))
    assert files._machine() != own
