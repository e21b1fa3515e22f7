"""Compare a sweep by vLLM with the same one by transformers: whole processes by turns, merges included.

    python benchmarks/sweep.py .demo/sums                  # the pair of `make demo`, in an environment that has vLLM
    python benchmarks/sweep.py .demo/sums --n 20 --rounds 1

There are twelve runs: base, long model, and five merges each by fim_kron and task_arithmetic. Every sweep has a cache
of its own, so that it measures. The time on the CPU is of a sweep and of the processes that it starts: it counts where
others use the machine, too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = Path(__file__).resolve().parent.parent / "example_configs" / "demo.yml"
SIDES = ("transformers", "vllm")


def swept(side: str, out: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Run a sweep, and return the seconds that it took, and those on the CPU."""
    command = [args.python, "-m", "mergekit_fim", "sweep", str(CONFIG), str(out), "--engine", side, "--quiet"]
    command += ["--problems", "problems.jsonl", "--n", str(args.n), "--max-tokens", "112"]
    command += ["--set", "alpha_mean=0.1,0.3,0.5,0.7,0.9", "--compare", "task_arithmetic"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MERGEKIT_FIM_CACHE": str(out.with_suffix(".cache"))}
    with (out.with_suffix(".log")).open("w+") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=args.pair, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        if status:
            log.seek(0)
            raise SystemExit(f"{side}: expected a sweep, found that it failed: {log.read()[-2000:]}")
    return seconds, usage.ru_utime + usage.ru_stime


def texts(out: Path) -> list[str]:
    """What all runs of a sweep answered, in order."""
    paths = sorted((out / "answers").iterdir())
    return [json.loads(line)["text"] for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path, help="a folder with base, long and problems.jsonl, as `make demo` makes it")
    parser.add_argument("--n", type=int, default=50, help="problems (50)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--python", default=sys.executable, help="the Python that sweeps (this one)")
    args = parser.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for side in SIDES:
                out = Path(folder, f"{side}-{number}")
                taken[side].append(swept(side, out, args))
                found[side] = texts(out)
                print(f"{side}: {taken[side][-1][0]:.0f} s, {taken[side][-1][1]:.0f} s on the CPU", file=sys.stderr)
    wall, cpu = ({side: statistics.median(its[i] for its in taken[side]) for side in SIDES} for i in (0, 1))
    print("| sweep of twelve runs | seconds | on the CPU |\n| --- | --- | --- |")
    for side in SIDES:
        print(f"| {side} | {wall[side]:.0f} | {cpu[side]:.0f} |")
    print(f"| vllm's part | {wall['vllm'] / wall['transformers']:.2f} | {cpu['vllm'] / cpu['transformers']:.2f} |")
    same = sum(a == b for a, b in zip(*found.values(), strict=True))
    print(f"\n{same} of {len(found['vllm'])} answers are the same.")


if __name__ == "__main__":
    main()
