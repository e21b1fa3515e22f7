"""What the statistics of a sweep make of simulated runs, whose fronts are known: docs/sweep.md's figures.

    python benchmarks/fronts.py [--sweeps 200]

The base is right on half of the problems, the long model on 0.8 at ten times the length. Problems differ in how hard
they are, and runs answer each by chance. Merges lie on the chord: every problem's chance to be solved is the mix of the
two models'. Where there is a gain, it is added: 4 · 0.075 · s(1 − s) at the share s of the way, whose mean is 0.05.
"""

import argparse

import numpy as np
import tqdm

from mergekit_fim.evaluate.front import Outcomes, summarize

RUNS, PROBLEMS = (1, 5, 10), (60, 100, 500, 1319)
HARDNESS, GAIN, RESAMPLES = 2.0, 0.075, 400


def chances(hardness: np.ndarray, share: float, gain: float) -> np.ndarray:
    """How likely a run is to solve each problem."""
    scale = np.sqrt(1 + 0.346 * HARDNESS**2)  # a logistic curve of normal hardness has about this mean
    base, long = (1 / (1 + np.exp(-(np.log(x / (1 - x)) * scale + hardness))) for x in (0.5, 0.8))
    return np.minimum(1, (1 - share) * base + share * long + 4 * gain * share * (1 - share))


def sweep(rng: np.random.Generator, problems: int, runs: int, gain: float) -> list[Outcomes]:
    """Base, long, and two methods that are equally good."""
    hardness = rng.normal(size=problems) * HARDNESS
    no = np.zeros((problems, 1), dtype=bool)

    def run(name: str, method: str | None, share: float) -> Outcomes:
        right = rng.random((problems, 1)) < chances(hardness, share, gain)[:, None]
        tokens = rng.lognormal(np.log(30 + 270 * share) - 0.18, 0.6, size=(problems, 1))
        return Outcomes(name, method, {}, right, np.maximum(1, tokens).astype(int), no, no, no)

    shares = [(i + 1) / (runs + 1) for i in range(runs)]
    return [
        run("base", None, 0),
        run("long", None, 1),
        *(run(f"{method} {share}", method, share) for method in "ab" for share in shares),
    ]


def true_area(runs: int, gain: float) -> float:
    """The mean height of the front of runs at equal steps, which is concave."""
    hardness = np.random.default_rng(9).normal(size=1_000_000) * HARDNESS
    heights = [chances(hardness, i / (runs + 1), gain).mean() for i in range(runs + 2)]
    return float(np.trapezoid(heights) / (runs + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=200)
    sweeps = parser.parse_args().sweeps
    print(f"{sweeps} sweeps a line, {RESAMPLES} resamples each")
    print(
        "| gain | problems | runs | gain by luck and all | held out | held out is above 0 | interval covers the area |",
        end="",
    )
    print(" difference differs from 0 | ± of it |")
    print("|" + " --- |" * 9)
    for gain in (0.0, GAIN):
        for problems in PROBLEMS:
            for runs in RUNS:
                area, rng, found = true_area(runs, gain), np.random.default_rng(0), []
                for seed in tqdm.trange(sweeps, leave=False, desc=f"{problems} problems, {runs} runs"):
                    summary = summarize(
                        sweep(rng, problems, runs, gain), "base", "long", seed=seed, resamples=RESAMPLES
                    )
                    one, apart = summary.areas[0], summary.differences[0].difference
                    found.append(
                        (
                            one.gain,
                            one.held_out.value,
                            one.held_out.low > 0,
                            one.area.low <= area <= one.area.high,
                            apart.low > 0 or apart.high < 0,
                            (apart.high - apart.low) / 2,
                        )
                    )
                luck, held, above, covers, differs, width = np.mean(found, axis=0)
                shown = f"| {luck:.3f} | {held:+.4f} | {above:.2f} | {covers:.2f} | {differs:.3f} | {width:.3f} |"
                print(f"| {'0.05' if gain else '0'} | {problems:,} | {runs} {shown}", flush=True)
    print(
        "\n| problems | a run that is 0.1 worse than the long model isn't below it beyond the interval |\n| --- | --- |"
    )
    for problems in PROBLEMS:
        rng, passed = np.random.default_rng(0), []
        for seed in range(sweeps):
            outcomes = sweep(rng, problems, 2, 0.0)[:4]  # base, long, and a third and two thirds of the way: 0.1 worse
            summary = summarize(outcomes, "base", "long", seed=seed, resamples=RESAMPLES)
            passed.append(summary.runs[3].against_long.difference.high >= 0)
        print(f"| {problems:,} | {np.mean(passed):.2f} |", flush=True)


if __name__ == "__main__":
    main()
