import contextlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
import tiny
import torch
import transformers
import yaml
from click.testing import CliRunner, Result
from filelock import FileLock
from mergekit.io.tasks import LoaderCache
from mergekit.scripts.run_yaml import main as mergekit_yaml
from stub import Stub, stubs
from warm import Outcome, Warm

from mergekit_fim.evaluate.answers import server
from mergekit_fim.fisher.loading import Placement
from mergekit_fim.merging.trim import find_threshold, runs, trim_run

os.environ["HF_HUB_OFFLINE"] = "1"  # tests never ask the network
os.environ["COLUMNS"] = "100"  # whatever the terminal, or pytest-xdist, has
ROOT = Path(__file__).parents[1]
T = TypeVar("T")
# Models this small gain nothing from more threads, and lose much where the machine is busy.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch) -> Path:
    """Every test has a cache of its own, empty at first."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MERGEKIT_FIM_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _fresh_state():
    """mergekit keeps its loaders for the life of the process, and its command sets up logging: undo both."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    LoaderCache.loaders.clear()
    yield
    LoaderCache.loaders.clear()
    root.handlers[:] = handlers
    root.setLevel(level)


@dataclass(frozen=True)
class Pair:
    base: Path
    long: Path
    third: Path


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Pair:
    """A Llama base of five layers with two fine-tunes, float32."""
    folder = tmp_path_factory.mktemp("pair")
    base = tiny.build(tiny.config("llama"))
    return Pair(
        tiny.save(base, folder / "base"),
        tiny.save(tiny.tuned(base, 1), folder / "long"),
        tiny.save(tiny.tuned(base, 2, scale=0.03), folder / "third"),
    )


@dataclass(frozen=True)
class Merge:
    """A merge by the stock command, in this process.

    With `fresh`, each has a cache of its own, so that two merges that are compared are both measured.
    """

    folder: Path
    fresh: bool = True

    def __call__(self, config: dict | str, *options: str, out: str = "out") -> tuple[Path, Result]:
        source = self.folder / f"{out}.yml"
        source.write_text(config if isinstance(config, str) else yaml.safe_dump(config), encoding="utf-8")
        target = self.folder / out
        if self.fresh:  # the fixture `cache_folder` undoes it
            os.environ["MERGEKIT_FIM_CACHE"] = tempfile.mkdtemp(dir=self.folder.parent)
        arguments = [str(source), str(target), "--no-write-model-card", "--no-copy-tokenizer", *options]
        return target, CliRunner().invoke(mergekit_yaml, arguments)

    def ok(self, config: dict | str, *options: str, out: str = "out") -> tuple[Path, Result]:
        target, result = self(config, *options, out=out)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return target, result


@pytest.fixture
def merge(tmp_path) -> Merge:
    return Merge(tmp_path)


def config_for(pair: Pair, method: str = "fim_ties", **changes) -> dict:
    return {
        "merge_method": method,
        "base_model": str(pair.base),
        "models": [{"model": str(pair.long)}],
        "dtype": "float32",
    } | changes


Finished = Result | Outcome | subprocess.CompletedProcess


def ends_in_one_line(result: Finished, *words: str, absent: Path | None = None) -> str:
    """The command failed with one line for its user, which has `words` in it, and left nothing at `absent`."""
    if isinstance(result, Result):
        assert isinstance(result.exception, SystemExit), repr(result.exception)
    status = {Result: "exit_code", Outcome: "status", subprocess.CompletedProcess: "returncode"}[type(result)]
    assert getattr(result, status) == 1, result
    lines = result.stderr.splitlines()
    assert sum(line.startswith("Error: ") for line in lines) == 1, result.stderr
    line = lines[-1]  # nothing comes after it
    assert line.startswith("Error: "), result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert line.isprintable()
    assert len(line) < 1200
    for word in words:
        assert word in line, line
    assert absent is None or not absent.exists()
    return line


def unwrapped(result: Result) -> str:
    """What was printed, without the line breaks that fit it to the terminal."""
    return " ".join(result.output.split())


@dataclass(frozen=True)
class Environment:
    """A virtual environment that has the package installed, and all else from the one that runs the tests."""

    python: Path
    site_packages: Path

    def run(self, *arguments: str, check: bool = True, **options) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **options.pop("env", {})}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            [str(self.python), *arguments], capture_output=True, text=True, env=environment, timeout=600, **options
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def command(self, name: str, *arguments: str, **options) -> subprocess.CompletedProcess:
        """A stock command of mergekit's, from the script that pip made for it."""
        script = Path(sysconfig.get_path("scripts")) / name
        return self.run(str(script), *arguments, **options)


def make_environment(folder: Path, *, dependencies: bool = True) -> Environment:
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout.strip())
    if dependencies:
        # A plain path: the .pth files of that folder, and so its own copy of the package's hook, are not read.
        (site / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Environment(python, site)


def pip(environment: Environment, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(environment.python), "--disable-pip-version-check"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """What `make` makes in a folder: once, for all of pytest-xdist's workers, which share the folder above theirs."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    made = folder.with_suffix(".pickle")
    with FileLock(folder.with_suffix(".lock")):
        if not made.exists():
            folder.mkdir()
            made.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(made.read_bytes())


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A copy of the source tree, so that building leaves nothing behind in it; each worker's own."""
    copy = tmp_path_factory.mktemp("source") / "mergekit-fim"
    ignore = shutil.ignore_patterns(".git", ".venv", ".demo", "__pycache__", ".*_cache", "dist")
    shutil.copytree(ROOT, copy, ignore=ignore)
    return copy


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory) -> Path:
    """The built wheel."""

    def build(folder: Path) -> Path:
        code = "import sys, hatchling.build as b; print(b.build_wheel(sys.argv[1]))"
        command = [sys.executable, "-c", code, str(folder)]
        return folder / subprocess.run(command, cwd=source, capture_output=True, text=True, check=True).stdout.strip()

    return made_once(tmp_path_factory, "wheel", build)


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Environment:
    """An environment with the wheel installed, which no test changes."""

    def install(folder: Path) -> Environment:
        environment = make_environment(folder / "venv")
        pip(environment, "install", "--no-deps", "--no-index", "--quiet", str(wheel))
        return environment

    return made_once(tmp_path_factory, "installed", install)


@pytest.fixture(scope="session")
def warm(tmp_path_factory) -> Iterator[Warm]:
    """A process that has imported everything, offline."""
    process = Warm(tmp_path_factory.mktemp("warm"), HF_HUB_OFFLINE="1")
    yield process
    process.close()


@pytest.fixture
def stub(monkeypatch) -> Iterator[Callable[..., Stub]]:
    """Starts stand-ins for servers, which aren't waited for when they fail."""
    monkeypatch.setattr(server, "_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with stubs() as start:
        yield start


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """A task vector of any shape with all but its largest entries set to zero, run by run as the merge does it."""
    flat = delta.reshape(-1)
    threshold = find_threshold(lambda run: flat[run].clone(), len(flat), density, delta.device)
    return torch.cat([trim_run(flat[r].clone(), r, threshold) for r in runs(len(flat), delta.device)]).view(delta.shape)


@pytest.fixture
def two_accelerators(monkeypatch):
    """mergekit's executor for `--multi-gpu`, over two stand-ins on the CPU."""
    module = "mergekit.multigpu_executor"
    monkeypatch.setattr(f"{module}.get_torch_accelerator_type", lambda: "cpu")
    monkeypatch.setattr(f"{module}.get_torch_accelerator_count", lambda: 2)
    cpu = Placement(torch.device("cpu"), spread=False, streamed=True)
    monkeypatch.setattr("mergekit_fim.fisher.loading.placement", lambda options: cpu)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
