"""Tables and figure of docs/evidence.md: `python -m benchmarks.evidence.tables FOLDER... [--figure FILE]`.

Each FOLDER is a pair with a summary.json by `python -m benchmarks.evidence`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.summary import REFERENCE
from benchmarks.evidence.variants import VARIANTS

Pair = dict[str, Any]
DEFAULTS = (REFERENCE, "ties density 0.2", "fim_ta", "fim_ties")
DRAWN = (REFERENCE, "fim_ta", "fim_ties", "ties density 0.2", "slerp")


def row_of(pair: Pair, variant: str) -> Any:
    return next((row for row in pair["rows"] if row["variant"] == variant), None)


def pairs_table(pairs: Sequence[Pair]) -> str:
    """Both ends of every pair, and what uniform task arithmetic makes of it."""
    lines = [
        _line("pair", "base", "long", "uniform task arithmetic, strength: accuracy @ tokens"),
        _line(*["---"] * 4),
    ]
    for pair in pairs:
        ends = [f"{accuracy:.2f} @ {tokens:.1f}" for accuracy, tokens in pair["ends"].values()]
        its = row_of(pair, REFERENCE)["points"]
        points = ", ".join(f"{strength:.2f}: {accuracy:.2f} @ {tokens:.0f}" for strength, accuracy, tokens in its)
        lines.append(_line(f"{pair['kind']} {pair['seed']}", *ends, points))
    return "\n".join(lines)


def variants_table(pairs: Sequence[Pair]) -> str:
    """Every variant over the seeds of a kind."""
    seeds = [str(pair["seed"]) for pair in pairs]
    heads = [f"held-out gain, seeds {', '.join(seeds)}", "mean ± spread", "above 0", "area − uniform's"]
    lines = [_line("variant", *heads, "better, worse", "best merge"), _line(*["---"] * 7)]
    for variant in VARIANTS:
        found = [row for pair in pairs if (row := row_of(pair, variant)) is not None]
        if not found:
            lines.append(_line(variant, "not run", *[""] * 5))
            continue
        held = [row["held_out"] for row in found]
        each = ", ".join(f"{value:+.3f}" for value, _, _ in held)
        above = sum(low > 0 for _, low, _ in held)
        apart = [row["against"] for row in found if row["against"] is not None]
        cells = [variant, each, _spread([h[0] for h in held]), f"{above} of {len(found)}"]
        if apart:
            better, worse = sum(a[1] > 0 for a in apart), sum(a[2] < 0 for a in apart)
            cells += [_spread([a[0] for a in apart]), f"{better}, {worse}"]
        else:
            cells += ["", ""]
        lines.append(_line(*cells, f"{np.mean([row['best'] for row in found]):+.3f}"))
    return "\n".join(lines)


def aims_table(pairs: Sequence[Pair]) -> str:
    """Whether a method that people have is above the chord, and as good as the best there is."""
    heads = [f"{name}: held-out gain" for name in DEFAULTS], [f"{name}: of the best area" for name in DEFAULTS]
    lines = [_line("pair", *heads[0], "best area", *heads[1]), _line(*["---"] * (2 + 2 * len(DEFAULTS)))]
    for pair in pairs:
        best = max(pair["rows"], key=lambda row: row["area"])
        its = [row_of(pair, name) for name in DEFAULTS]
        cells = [f"{pair['kind']} {pair['seed']}"]
        cells += ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["held_out"]) if row else "not run" for row in its]
        cells.append(f"{best['area']:.3f}, {best['variant']}")
        cells += [f"{row['area'] / best['area']:.1%}" if row else "" for row in its]
        lines.append(_line(*cells))
    return "\n".join(lines)


def prose_table(pairs: Sequence[Pair]) -> str:
    """What an unrelated text costs base, long model, and the worst merge of every variant."""
    lines = [_line("model", *(f"seed {pair['seed']}" for pair in pairs)), _line(*["---"] * (1 + len(pairs)))]
    for name in ("base", "long"):
        lines.append(_line(name, *(f"{pair['prose'][name]:.4f}" for pair in pairs)))
    for variant in VARIANTS:
        found = [row_of(pair, variant) for pair in pairs]
        if any(found):
            lines.append(_line(variant, *(f"{row['prose']:.4f}" if row and row["prose"] else "" for row in found)))
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):+.3f}{spread}"


def draw(kinds: dict[str, list[Pair]], path: Path) -> None:
    """The first seed of every kind: accuracy against tokens of some variants, and the chord."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(4.2 * len(kinds), 3.6), squeeze=False, layout="constrained"
    )
    for panel, (kind, pairs) in zip(panels[0], kinds.items(), strict=True):
        (base, long), rows = pairs[0]["ends"].values(), pairs[0]["rows"]
        panel.plot([base[1], long[1]], [base[0], long[0]], color="0.6", linestyle="--", label="chord", zorder=1)
        for number, variant in enumerate(DRAWN):
            its = next((row for row in rows if row["variant"] == variant), None)
            if its is not None:
                _, accuracy, tokens = zip(*its["points"], strict=True)
                panel.plot(
                    tokens, accuracy, "osD^v"[number], color=f"C{number}", markersize=5, alpha=0.8, label=variant
                )
        panel.set(title=kind, xlabel="mean tokens", ylabel="accuracy")
    panels[0][0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    kinds: dict[str, list[Pair]] = {}
    for folder in arguments.folders:
        pair = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        kinds.setdefault(pair["kind"], []).append(pair)
    kinds = {kind: sorted(pairs, key=lambda pair: pair["seed"]) for kind, pairs in kinds.items()}
    print(pairs_table([pair for pairs in kinds.values() for pair in pairs]))
    print(f"\n{aims_table([pair for pairs in kinds.values() for pair in pairs])}")
    for kind, pairs in kinds.items():
        print(f"\n### {kind}\n\n{variants_table(pairs)}")
        if all(pair["prose"] for pair in pairs):
            print(f"\n{prose_table(pairs)}")
    if arguments.figure:
        draw(kinds, arguments.figure)


if __name__ == "__main__":
    main()
