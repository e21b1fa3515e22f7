"""What docs/upstream/ proposes for mergekit: on a patched copy the package needs no hook, and gives the same bytes."""

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from queue import Queue
from threading import Event

import mergekit
import mergekit.merge
import pytest
import yaml
from environments import ROOT, Environment, made_once, make_environment, pip
from merges import config_for, ends_in_one_line

PATCHES = sorted((ROOT / "docs" / "upstream").glob("*.patch"))
NO_HOOK = {"MERGEKIT_FIM_DISABLE": "1"}
pytestmark = pytest.mark.skipif(
    importlib.metadata.version("mergekit") != "0.1.5", reason="the patches are for mergekit 0.1.5"
)


def copy_of_mergekit(folder: Path) -> Path:
    return shutil.copytree(
        Path(mergekit.__file__).parent, folder / "mergekit", ignore=shutil.ignore_patterns("__pycache__")
    )


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


def merged(environment: Environment, config: dict, folder: Path, command: str = "mergekit-yaml", **variables: str):
    """All files of a merge, and what was printed of it."""
    folder.mkdir()
    source = folder / "config.yml"
    source.write_text(yaml.safe_dump(config))
    # mergekit's card lists the models in the order of a set.
    variables |= {"PYTHONHASHSEED": "0", "MERGEKIT_FIM_CACHE": str(folder / "cache")}
    arguments = [str(source), str(folder / "merged"), "--quiet"]
    if command == "mergekit-yaml":
        environment.command(command, *arguments, env=variables)
    else:
        environment.run("-m", "mergekit_fim", command, *arguments, env=variables)
    return {path.name: path.read_bytes() for path in (folder / "merged").iterdir()}


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


@pytest.mark.parametrize("method", ["fim_ties", "fim_kron"])
def test_without_the_hook_a_merge_is_the_same(method, patched, installed, pair, tmp_path):
    config = config_for(pair, method)
    expected = merged(installed, config, tmp_path / "hook")
    assert {"model.safetensors", "fim_report.json", "README.md"} <= expected.keys()
    assert b"## Merge coefficients" in expected["README.md"]
    assert differing(merged(patched, config, tmp_path / "seams", **NO_HOOK), expected) == []
    if method == "fim_ties":  # with the hook in place as well, which then wraps nothing
        assert differing(merged(patched, config, tmp_path / "both"), expected) == []


def test_our_own_commands_use_the_seams_too(patched, installed, pair, tmp_path):
    config = config_for(pair)
    expected = merged(installed, config, tmp_path / "hook", "merge")
    assert differing(merged(patched, config, tmp_path / "seams", "merge", **NO_HOOK), expected) == []
    source, plan = str(tmp_path / "hook" / "config.yml"), tmp_path / "plan.json"
    done = patched.run("-m", "mergekit_fim", "plan", source, "--json", str(plan), env=NO_HOOK, cwd=tmp_path)
    assert "Traceback" not in done.stderr
    report = json.loads(expected["fim_report.json"])
    assert json.loads(plan.read_text(encoding="utf-8"))["models"] == report["models"]


WRAPPED = """
import mergekit.merge, mergekit.multigpu_executor
from mergekit.merge_methods import registered_methods
from mergekit.plan import MergePlanner
found = [MergePlanner.plan_to_disk, mergekit.merge.run_merge]
print([hasattr(x, "__wrapped__") for x in found], [method.spec.name for method in registered_methods()][-3:])
"""


def test_the_hook_wraps_nothing_where_there_are_seams(patched, installed):
    ours = "['fim_ties', 'fim_ta', 'fim_kron']"
    assert installed.run("-c", WRAPPED).stdout.strip() == f"[True, True] {ours}"
    for variables in ({}, NO_HOOK):
        done = patched.run("-c", WRAPPED, env=variables)
        assert (done.stdout.strip(), done.stderr) == (f"[False, False] {ours}", "")


def test_with_the_first_patch_alone_only_the_card_lacks_something(wheel, installed, pair, tmp_path):
    environment = make_environment(tmp_path / "venv")
    pip(environment, "install", "--no-deps", "--no-index", "--quiet", str(wheel))
    copy_of_mergekit(environment.site_packages)
    apply(PATCHES[0], environment.site_packages)
    for name in ("mergekit_fim.pth", "mergekit_fim.start"):
        (environment.site_packages / name).unlink()
    config = config_for(pair)
    expected = merged(installed, config, tmp_path / "hook")
    # The stock command has taken `run_merge` before that is wrapped: its card has no section of ours.
    assert differing(merged(environment, config, tmp_path / "entry-point"), expected) == ["README.md"]


def test_a_plug_in_that_fails_is_a_warning(patched, tmp_path):
    metadata = tmp_path / "broken-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[mergekit.merge_methods]\nbroken = nowhere.to_be_found\n")
    done = patched.run("-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{WRAPPED}", env=NO_HOOK)
    assert done.stdout.strip().endswith("['fim_ties', 'fim_ta', 'fim_kron']")
    assert done.stderr == "WARNING:root:Merge methods of nowhere.to_be_found left out: No module named 'nowhere'\n"


def test_processes_that_would_each_write_the_merge_are_refused(patched, pair, tmp_path):
    """With the seams the hook no longer wraps `run_merge`, which made the stock command share its work."""
    source = tmp_path / "config.yml"
    source.write_text(yaml.safe_dump(config_for(pair)))
    target = tmp_path / "merged"
    several = NO_HOOK | {"WORLD_SIZE": "2", "RANK": "0"}
    done = patched.command("mergekit-yaml", str(source), str(target), env=several, check=False)
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
