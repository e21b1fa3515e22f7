import contextlib
import gc
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
from environments import ROOT, Environment, made_once, make_environment, pip
from loaded import Loaded
from mergekit.io.tasks import LoaderCache
from merges import Merge, Pair
from stub import Stub, stubs
from warm import Warm

from mergekit_fim.evaluate.answers import server
from mergekit_fim.fisher.loading import Placement

os.environ["HF_HUB_OFFLINE"] = "1"  # tests never ask the network
os.environ["COLUMNS"] = "100"  # whatever the terminal, or pytest-xdist, has
# Models this small gain nothing from more threads, and lose much where the machine is busy.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def _quick_to_collect() -> None:
    """Every run of a sweep ends with a collection of garbage, which goes through everything that isn't frozen."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """pytest looks for what was never closed in the garbage that is left."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def _caches(tmp_path_factory) -> Path:
    """Apart from the tests' own folders, which pytest goes through for each new one."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def cache_folder(_caches, monkeypatch) -> Path:
    """Every test has a cache of its own, empty at first."""
    folder = Path(tempfile.mkdtemp(dir=_caches))
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


@pytest.fixture
def merge(tmp_path) -> Merge:
    return Merge(tmp_path)


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
def loaded(installed, tmp_path_factory) -> Iterator[Loaded]:
    """A process of that environment that has imported the libraries; mergekit's cards list models as text hashes."""
    process = Loaded(installed.python, tmp_path_factory.mktemp("loaded"), PYTHONHASHSEED="0")
    yield process
    process.close()


@pytest.fixture(scope="session")
def unhooked(installed, tmp_path_factory) -> Iterator[Loaded]:
    """The same with the hook switched off."""
    process = Loaded(
        installed.python, tmp_path_factory.mktemp("unhooked"), PYTHONHASHSEED="0", MERGEKIT_FIM_DISABLE="1"
    )
    yield process
    process.close()


@pytest.fixture(scope="session")
def warm(tmp_path_factory) -> Iterator[Warm]:
    """A process that has imported everything, offline."""
    process = Warm(tmp_path_factory.mktemp("warm"), HF_HUB_OFFLINE="1")
    yield process
    process.close()


@pytest.fixture
def stub(monkeypatch) -> Iterator[Callable[..., Stub]]:
    """Starts stand-ins for servers, which aren't waited for when they fail."""
    monkeypatch.setattr(server, "_RETRIES", 1)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with stubs() as start:
        yield start


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


@pytest.fixture
def config(tmp_path):
    def write(content: dict, name: str = "config.yml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return write
