"""Is there a better measure of a merge's strength than the mean of its coefficients?

    python -m benchmarks.evidence.strength KIND FOLDER

The pair must have been run. Compare how far its merges are on the way from base to long, in tokens, with what each
measure says of their coefficients. Merges by mappings of different shapes are taken together: a measure that holds for
all of them has one curve for all. The command prints how far the merges are from the rising curve that fits best, and
from the measure itself. Both are root mean squares, in parts of the way.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy.optimize import isotonic_regression

from benchmarks.evidence import mappings
from benchmarks.evidence.fronts import RUNS, Pair
from benchmarks.evidence.signals import BASE, LONG, Inputs, signals
from benchmarks.evidence.variants import MANY, OWN, VARIANTS
from benchmarks.pairs.recipes import KINDS

PAPER = Inputs()
# Mappings with a coefficient for each layer, and the inputs of their signals.
SHAPES: dict[str, tuple[mappings.Coefficients, Inputs]] = {
    "task_arithmetic": (lambda strength, its: np.full(len(its.moved), strength), PAPER),
    "fim_ta": (mappings.sigmoid_of(1.0), PAPER),
    "fim_ta sharpness -1": (mappings.sigmoid_of(-1.0), PAPER),
    "two endpoints, F": (mappings.two_endpoints(quadratic=False), MANY),
    "two endpoints, q": (mappings.two_endpoints(quadratic=True), MANY),
    "together": (mappings.together, MANY),
    "together, own text": (mappings.together, OWN),
}
Measure = Callable[[np.ndarray], float]


def measures(pair: Path) -> Iterator[tuple[str, Measure]]:
    """Return measures of a merge's coefficients [layer], each from 0 to 1."""
    yield "mean of α", lambda alphas: float(alphas.mean())
    for inputs in (PAPER, MANY, OWN):
        found = signals(pair, inputs)
        its = found.grouped(mappings.groups_by(found.tensors, mappings.whole))
        for at, end in ((BASE, "base"), (LONG, "long")):
            weights, dots = its.fisher(at) * its.moved, its.dots[at]

            def squares(alphas: np.ndarray, weights: np.ndarray = weights) -> float:
                return float((np.square(alphas) * weights).sum() / weights.sum())

            def roots(alphas: np.ndarray, weights: np.ndarray = weights) -> float:
                return float((alphas * np.sqrt(weights)).sum() / np.sqrt(weights).sum())

            def form(alphas: np.ndarray, dots: np.ndarray = dots) -> float:
                return float(np.square(dots @ alphas).sum() / np.square(dots.sum(axis=1)).sum())

            yield f"Σ α²s / Σ s, {inputs}, {end}", squares
            yield f"Σ α√s / Σ √s, {inputs}, {end}", roots
            yield f"αᵀGα / 1ᵀG1, {inputs}, {end}", form


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=200)
    arguments = parser.parse_args()
    pair = Pair(arguments.folder, KINDS[arguments.kind], arguments.n)
    models = pair.answers({}).models
    base, long = (models[name].tokens.mean() for name in ("base", "long"))
    alphas, shares = [], []
    for name, (mapping, inputs) in SHAPES.items():
        found = signals(pair.folder, inputs)
        its = found.grouped(mappings.groups_by(found.tensors, mappings.whole))
        for run in pair.known(name, VARIANTS[name], RUNS):
            alphas.append(mapping(float(run.settings["strength"]), its))
            shares.append((run.tokens.mean() - base) / (long - base))
    share = np.array(shares)
    print(f"{pair.folder.name}: {len(share)} merges\n\n| measure | from its curve | from itself |\n| --- | --- | --- |")
    for name, measure in measures(pair.folder):
        x = np.array([measure(its) for its in alphas])
        ordered = share[np.argsort(x)]
        away = np.sqrt(np.mean(np.square(isotonic_regression(ordered).x - ordered)))
        print(f"| {name} | {away:.3f} | {np.sqrt(np.mean(np.square(x - share))):.3f} |")


if __name__ == "__main__":
    main()
