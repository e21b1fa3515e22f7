"""Measure what the start-up hook costs every Python interpreter: `python -c pass` with it and without.

    python benchmarks/startup.py [--runs 200]

It makes two bare virtual environments, and copies the package and its .pth file into one. The runs alternate.
"""

import argparse
import compileall
import shutil
import statistics
import subprocess
import tempfile
import time
import venv
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mergekit_fim"


def environment(folder: Path, hook: bool) -> Path:
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    if hook:
        shutil.copytree(PACKAGE, site / "mergekit_fim", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(PACKAGE / "mergekit_fim.pth", site)
        compileall.compile_dir(site / "mergekit_fim", quiet=1)  # as pip does
    return folder / "bin" / "python"


def milliseconds(python: Path) -> float:
    start = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        pythons = {name: environment(Path(folder) / name, name == "with") for name in ("without", "with")}
        times: dict[str, list[float]] = {name: [] for name in pythons}
        for python in pythons.values():  # fill the file caches
            milliseconds(python)
        for _ in range(runs):
            for name, python in pythons.items():
                times[name].append(milliseconds(python))
    for name, values in times.items():
        print(f"{name:<8} median {statistics.median(values):6.2f} ms   minimum {min(values):6.2f} ms")
    pairs = [b - a for a, b in zip(times["without"], times["with"], strict=True)]
    print(f"{'cost':<8} median {statistics.median(pairs):6.2f} ms   of {runs} pairs")


if __name__ == "__main__":
    main()
