"""What docs/upstream/ proposes for mergekit: on a patched copy the package needs no hook, and gives the same bytes."""

import functools
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from threading import Event

import mergekit
import mergekit.merge
import pytest
import yaml
from environments import MERGEKIT_YAML, ROOT, Environment, made_once, make_environment, pip
from loaded import Loaded
from merges import config_for, ends_in_one_line

PATCHES = sorted((ROOT / "docs" / "upstream").glob("*.patch"))
NO_HOOK = {"MERGEKIT_FIM_DISABLE": "1"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.metadata.version("mergekit") != "0.1.5", reason="the patches are for mergekit 0.1.5"),
]


def copy_of_mergekit(folder: Path) -> Path:
    return shutil.copytree(Path(mergekit.__file__).parent, folder / "mergekit")


def apply(patch: Path, folder: Path) -> None:
    """Insert a patch's lines in the files of a folder. It takes no tool, as a patch of insertions alone needs none."""
    for part in re.split(r"^--- ", patch.read_text(encoding="utf-8"), flags=re.M)[1:]:
        target = folder / re.search(r"^\+\+\+ b/(.+)$", part, re.M)[1]
        lines = target.read_text(encoding="utf-8").splitlines(keepends=True)
        hunks = re.findall(r"^@@ -(\d+),0 .*\n((?:\+.*\n)+)", part, re.M)
        for line, added in reversed(hunks):
            lines[int(line) : int(line)] = re.findall(r"^\+(.*\n)", added, re.M)
        target.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def patched(wheel, tmp_path_factory) -> Environment:
    """An environment with the wheel, and a copy of mergekit with all of the patches."""

    def install(folder: Path) -> Environment:
        environment = make_environment(folder / "venv")
        pip(environment, "install", "--no-deps", "--no-index", "--quiet", str(wheel))
        copy_of_mergekit(environment.site_packages)
        for patch in PATCHES:
            apply(patch, environment.site_packages)
        return environment

    return made_once(tmp_path_factory, "patched", install)


def test_the_patches_hold_nothing_of_mergekits():
    assert len(PATCHES) == 3
    for patch in PATCHES:
        for line in patch.read_text(encoding="utf-8").splitlines():
            assert re.fullmatch(r"(---|\+\+\+) [ab]/mergekit/\S+|@@ -\d+,0 \+\d+(,\d+)? @@|\+.*", line), line


@pytest.mark.skipif(shutil.which("git") is None, reason="git isn't installed")
def test_git_applies_them_likewise(tmp_path):
    for patch in PATCHES:
        for name in ("here", "by-git"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            copy_of_mergekit(tmp_path / name)
        apply(patch, tmp_path / "here")
        subprocess.run(["git", "init", "-q"], cwd=tmp_path / "by-git", check=True)
        subprocess.run(["git", "apply", "--unidiff-zero", str(patch)], cwd=tmp_path / "by-git", check=True)
        changed = re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(encoding="utf-8"), re.M)
        for name in changed:
            text = (tmp_path / "here" / name).read_text(encoding="utf-8")
            assert text == (tmp_path / "by-git" / name).read_text(encoding="utf-8")
            assert text != (Path(mergekit.__file__).parents[1] / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def seams(patched, tmp_path_factory) -> Iterator[Loaded]:
    """A process of the patched environment, without the hook."""
    process = Loaded(patched.python, tmp_path_factory.mktemp("seams"), PYTHONHASHSEED="0", **NO_HOOK)
    yield process
    process.close()


def merged(python: Loaded | Environment, config: dict, folder: Path, *command: str) -> dict[str, bytes]:
    """All files of a merge, by the stock command or another."""
    folder.mkdir()
    source = folder / "config.yml"
    source.write_text(yaml.safe_dump(config))
    # mergekit's card lists the models in the order of a set.
    variables = {"PYTHONHASHSEED": "0", "MERGEKIT_FIM_CACHE": str(folder / "cache")}
    python.run(*(command or (MERGEKIT_YAML,)), str(source), str(folder / "merged"), "--quiet", env=variables)
    return {path.name: path.read_bytes() for path in (folder / "merged").iterdir()}


@pytest.fixture(scope="module")
def expected(loaded, pair, tmp_path_factory) -> Callable[[str], dict[str, bytes]]:
    """All files of a merge by a method, with the hook."""
    folder = tmp_path_factory.mktemp("expected")
    return functools.cache(lambda method: merged(loaded, config_for(pair, method), folder / method))


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


@pytest.mark.parametrize("method", ["fim_ties", "fim_kron"])
def test_without_the_hook_a_merge_is_the_same(method, patched, seams, expected, pair, tmp_path):
    config, hooked = config_for(pair, method), expected(method)
    assert {"model.safetensors", "fim_report.json", "README.md"} <= hooked.keys()
    assert b"## Merge coefficients" in hooked["README.md"]
    assert differing(merged(seams, config, tmp_path / "seams"), hooked) == []
    if method == "fim_ties":  # with the hook in place as well, which then wraps nothing
        assert differing(merged(patched, config, tmp_path / "both"), hooked) == []


def test_our_own_commands_use_the_seams_too(loaded, seams, pair, tmp_path):
    config, ours = config_for(pair), ("-m", "mergekit_fim", "merge")
    hooked = merged(loaded, config, tmp_path / "hook", *ours)
    assert differing(merged(seams, config, tmp_path / "seams", *ours), hooked) == []
    source, plan = str(tmp_path / "hook" / "config.yml"), tmp_path / "plan.json"
    done = seams.run("-m", "mergekit_fim", "plan", source, "--json", str(plan), cwd=tmp_path)
    assert "Traceback" not in done.stderr
    report = json.loads(hooked["fim_report.json"])
    assert json.loads(plan.read_text(encoding="utf-8"))["models"] == report["models"]


WRAPPED = """
import mergekit.merge, mergekit.multigpu_executor
from mergekit.merge_methods import registered_methods
from mergekit.plan import MergePlanner
found = [MergePlanner.plan_to_disk, mergekit.merge.run_merge]
print([hasattr(x, "__wrapped__") for x in found], [method.spec.name for method in registered_methods()][-3:])
"""


def test_the_hook_wraps_nothing_where_there_are_seams(patched, loaded, seams):
    ours = "['fim_ties', 'fim_ta', 'fim_kron']"
    assert loaded.run("-c", WRAPPED).stdout.strip() == f"[True, True] {ours}"
    for python in (patched, seams):
        done = python.run("-c", WRAPPED)
        assert (done.stdout.strip(), done.stderr) == (f"[False, False] {ours}", "")


def test_with_the_first_patch_alone_only_the_card_lacks_something(wheel, expected, pair, tmp_path):
    environment = make_environment(tmp_path / "venv")
    pip(environment, "install", "--no-deps", "--no-index", "--quiet", str(wheel))
    copy_of_mergekit(environment.site_packages)
    apply(PATCHES[0], environment.site_packages)
    for name in ("mergekit_fim.pth", "mergekit_fim.start"):
        (environment.site_packages / name).unlink()
    found = merged(environment, config_for(pair), tmp_path / "entry-point")
    # The stock command has taken `run_merge` before that is wrapped: its card has no section of ours.
    assert differing(found, expected("fim_ties")) == ["README.md"]


def test_a_plug_in_that_fails_is_a_warning(seams, tmp_path):
    metadata = tmp_path / "broken-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[mergekit.merge_methods]\nbroken = nowhere.to_be_found\n")
    done = seams.run("-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{WRAPPED}")
    assert done.stdout.strip().endswith("['fim_ties', 'fim_ta', 'fim_kron']")
    assert done.stderr == "WARNING:root:Merge methods of nowhere.to_be_found left out: No module named 'nowhere'\n"


def test_processes_that_would_each_write_the_merge_are_refused(seams, pair, tmp_path):
    """With the seams the hook no longer wraps `run_merge`, which made the stock command share its work."""
    source = tmp_path / "config.yml"
    source.write_text(yaml.safe_dump(config_for(pair)))
    target = tmp_path / "merged"
    several = {"WORLD_SIZE": "2", "RANK": "0"}
    done = seams.run(MERGEKIT_YAML, str(source), str(target), env=several, check=False)
    ends_in_one_line(done, "several processes", "mergekit-fim merge", absent=target)


@pytest.fixture
def mended(patched, monkeypatch):
    """mergekit's executor for `--multi-gpu` with the third patch, in this process."""
    name = "mergekit.multigpu_executor_mended"
    path = patched.site_packages / "mergekit" / "multigpu_executor.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_third_patch_loses_no_result(two_accelerators, mended, merge, pair, monkeypatch):
    """By a stock method, with a thread that takes some results only when the workers have ended."""

    def lost(executor: type) -> bool:
        """Whether one stays in the queue."""
        queues = []

        class Late(Queue):
            taken = 0

            def get(self, *args, **kwargs):
                while self.taken == 20 and not Event.is_set(self.done):
                    time.sleep(0.001)
                result = super().get(*args, **kwargs)
                self.taken += 1
                return result

        class WithLate(executor):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.task_completion_queue = Late()
                self.task_completion_queue.done = self.done_event
                queues.append(self.task_completion_queue)

        monkeypatch.setattr(mergekit.merge, "MultiGPUExecutor", WithLate)
        merge(config, "--multi-gpu", out="multi")
        return not queues[0].empty()

    models = [{"model": str(pair.long), "parameters": {"weight": 0.5}}]
    config = config_for(pair, "task_arithmetic", models=models)
    plain, _ = merge.ok(config)
    for name in ("get_torch_accelerator_type", "get_torch_accelerator_count"):
        monkeypatch.setattr(mended, name, getattr(mergekit.multigpu_executor, name))
    assert lost(mergekit.multigpu_executor.MultiGPUExecutor)
    assert not lost(mended.MultiGPUExecutor)
    assert (merge.folder / "multi" / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
