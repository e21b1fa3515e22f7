"""Run a sweep's statistics on simulated runs whose fronts are known. This gives the figures of docs/statistics.md.

    python benchmarks/fronts.py [--sweeps 100]

Problems differ in how hard they are, and runs answer each by chance. The long model's answers are ten times as long as
the base's. Merges lie at equal steps of length between them. One of the `SHAPES` gives their accuracy.
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import tqdm

from mergekit_fim.evaluate.front.bootstrap import Outcomes
from mergekit_fim.evaluate.front.paired import score_interval
from mergekit_fim.evaluate.front.statistics import summarize

HARDNESS, RESAMPLES, MARGIN = 2.0, 200, 0.05
BASE, LONG = 30.0, 300.0  # mean tokens

# A run's accuracy at a share of the way from the base's tokens to the long model's. A front takes the best run so far,
# so it stays above the long model once it is there.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "on the chord": lambda share: 0.5 + 0.3 * share,
    "concave": lambda share: 0.5 + 0.3 * share + 0.3 * share * (1 - share),
    "saturated half-way": lambda share: 0.2 + 0.6 * min(1.0, 2 * share),
    "above the long model": lambda share: min(0.5 + 0.6 * share, 0.9) if share < 1 else 0.8,
}
# The standard deviation of the logarithm of a run's lengths of answers.
EVEN, UNEVEN = 0.6, 1.2
LINES = [
    *((shape, EVEN, n) for shape in ("on the chord", "concave") for n in (60, 100, 200, 500, 1319)),
    *((shape, EVEN, n) for shape in ("saturated half-way", "above the long model") for n in (60, 200, 500)),
    *((shape, UNEVEN, 200) for shape in SHAPES),
]
RUNS = 5  # of each method


@functools.cache
def ease(accuracy: float) -> float:
    """Return the ease that, added to the hardness of problems, gives chances with this mean."""
    hardness, weights = np.polynomial.hermite_e.hermegauss(60)
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        found = weights @ (1 / (1 + np.exp(-(middle + HARDNESS * hardness)))) / weights.sum()
        low, high = (middle, high) if found < accuracy else (low, middle)
    return low


def solves(rng: np.random.Generator, hardness: np.ndarray, accuracy: float) -> np.ndarray:
    """Draw which problems a run solves."""
    return rng.random(hardness.shape) < 1 / (1 + np.exp(-(ease(accuracy) + HARDNESS * hardness)))


def sweep(rng: np.random.Generator, shape: str, spread: float, problems: int, runs: int) -> list[Outcomes]:
    """Simulate base, long, and two methods that are equally good."""
    hardness = rng.normal(size=problems)

    def run(name: str, method: str | None, share: float) -> Outcomes:
        right = solves(rng, hardness, SHAPES[shape](share))[:, None]
        lengths = rng.lognormal(np.log(BASE + (LONG - BASE) * share) - spread**2 / 2, spread, size=right.shape)
        return Outcomes(name, method, {}, right, np.maximum(1, np.rint(lengths)).astype(int))

    shares = [(i + 1) / (runs + 1) for i in range(runs)]
    merges = [run(f"{method} {share}", method, share) for method in "ab" for share in shares]
    return [run("base", None, 0.0), run("long", None, 1.0), *merges]


def true_areas(shape: str, runs: int) -> tuple[float, float]:
    """Return the mean heights of the front of such runs, and of the chord."""
    heights = [SHAPES[shape](i / (runs + 1)) for i in range(runs + 2)]
    chord = (heights[0] + heights[-1]) / 2
    heights = np.maximum.accumulate(heights).tolist()  # now they are concave
    return sum((one + other) / 2 for one, other in pairwise(heights)) / (runs + 1), chord


def luck(sweeps: int) -> None:
    """Print how much merges on the chord gain by luck alone."""
    runs = (1, 5, 10)
    print(f"\nGains of merges on the chord by luck, {2 * sweeps} sweeps")
    print(f"\n| problems | {' | '.join(f'runs: {x}' for x in runs)} |\n|{' --- |' * (len(runs) + 1)}")
    for problems in (60, 100, 500, 1319):
        found = []
        for count in runs:
            rng = np.random.default_rng(0)
            made = (sweep(rng, "on the chord", EVEN, problems, count) for _ in range(2 * sweeps))
            found.append(np.mean([summarize(its, "base", "long", resamples=1).areas[0].gain for its in made]))
        print(f"| {problems:,} | {' | '.join(f'{gain:.3f}' for gain in found)} |", flush=True)


def gains(sweeps: int) -> None:
    """Print the areas and gains that the statistics find."""
    columns = [
        *("merges", "spread of lengths", "problems", "true gain", "gain, luck included", "held out", "± of that"),
        *("its interval covers", "is above 0", "area's interval covers", "difference differs from 0", "± of it"),
    ]
    print(f"\n{RUNS} runs of each method, {sweeps} sweeps, {RESAMPLES} resamples")
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for shape, spread, problems in LINES:
        area, chord = true_areas(shape, RUNS)
        rng, found = np.random.default_rng(0), []
        for seed in tqdm.trange(sweeps, leave=False, desc=f"{shape}, {problems} problems"):
            made = sweep(rng, shape, spread, problems, RUNS)
            summary = summarize(made, "base", "long", seed=seed, resamples=RESAMPLES)
            one, apart = summary.areas[0], summary.differences[0].difference
            found.append(
                (
                    one.gain,
                    one.held_out.value,
                    one.held_out.low <= area - chord <= one.held_out.high,
                    one.held_out.low > 0,
                    one.area.low <= area <= one.area.high,
                    apart.low > 0 or apart.high < 0,
                    (apart.high - apart.low) / 2,
                )
            )
        gain, held, covers, above, area_covers, differs, width = np.mean(found, axis=0)
        error = np.std(found, axis=0)[1] / np.sqrt(sweeps)
        print(
            f"| {shape} | {spread} | {problems:,} | {area - chord:.4f} | {gain:.4f} | {held:.4f} | {error:.4f} | "
            f"{covers:.2f} | {above:.2f} | {area_covers:.2f} | {differs:.3f} | {width:.3f} |",
            flush=True,
        )


def kept(sweeps: int) -> None:
    """Print how often a run is shown to be within the margin of a long model of 0.8."""
    worse, limits = (0.0, 0.02, MARGIN, 0.1), functools.cache(score_interval)
    print(f"\nShown to be at most {MARGIN} less accurate than a long model of 0.8, {20 * sweeps} sweeps")
    print(f"\n| problems | {' | '.join(f'{x:g} less' for x in worse)} |\n|{' --- |' * (len(worse) + 1)}")
    for problems in (12, 60, 100, 200, 500, 1319):
        shares = []
        for less in worse:
            rng, count = np.random.default_rng(0), 0
            for _ in range(20 * sweeps):
                hardness = rng.normal(size=problems)
                long, run = (solves(rng, hardness, accuracy) for accuracy in (0.8, 0.8 - less))
                count += limits(int((run & ~long).sum()), int((long & ~run).sum()), problems)[0] >= -MARGIN
            shares.append(count / (20 * sweeps))
        print(f"| {problems:,} | {' | '.join(f'{share:.3f}' for share in shares)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=100)
    sweeps = parser.parse_args().sweeps
    kept(sweeps)
    luck(sweeps)
    gains(sweeps)


if __name__ == "__main__":
    main()
