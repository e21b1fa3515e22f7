"""The source tree, and virtual environments that have the package installed."""

import os
import pickle
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))
MERGEKIT_YAML = str(SCRIPTS / "mergekit-yaml")  # the script that pip made for it
T = TypeVar("T")


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


def files(environment: Environment) -> set[str]:
    found = (p.relative_to(environment.site_packages) for p in environment.site_packages.rglob("*"))
    return {str(p) for p in found if "__pycache__" not in p.parts}


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


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.S | re.M)
