"""Tables and figure of docs/evidence.md.

    python -m benchmarks.evidence.tables FOLDER... [--write docs/evidence.md] [--figure docs/evidence.png]

Each FOLDER is a pair with a summary.json by `python -m benchmarks.evidence`.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.summary import REFERENCE
from benchmarks.evidence.variants import VARIANTS
from benchmarks.pages import head, line, put

Pair = dict[str, Any]
COMMAND = "python -m benchmarks.evidence.tables"
DEFAULTS = (REFERENCE, "ties density 0.2", "fim_ta", "fim_ties")
DRAWN = (REFERENCE, "fim_ta", "fim_ties", "fim_ties density 0.05", "S3")


def row_of(pair: Pair, variant: str) -> Any:
    return next((row for row in pair["rows"] if row["variant"] == variant), None)


def pairs_table(pairs: Sequence[Pair]) -> Iterator[str]:
    """Both ends of every pair, and what uniform task arithmetic makes of it."""
    yield from head("pair", "base", "long", "uniform task arithmetic, strength: accuracy @ tokens")
    for pair in pairs:
        ends = [f"{accuracy:.2f} @ {tokens:.1f}" for accuracy, tokens in pair["ends"].values()]
        its = row_of(pair, REFERENCE)["points"]
        points = ", ".join(f"{strength:.2f}: {accuracy:.2f} @ {tokens:.0f}" for strength, accuracy, tokens in its)
        yield line(f"{pair['kind']} {pair['seed']}", *ends, points)


def aims_table(pairs: Sequence[Pair]) -> Iterator[str]:
    """Whether a method that people have is above the chord, and as good as the best there is."""
    yield from head("pair", "best area", *(f"{name}: gain, share of the best area" for name in DEFAULTS))
    for pair in pairs:
        best = max(pair["rows"], key=lambda row: row["area"])
        cells = []
        for row in (row_of(pair, name) for name in DEFAULTS):
            gain = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["held_out"]) if row else "not run"
            cells.append(f"{gain}, {row['area'] / best['area']:.1%}" if row else gain)
        yield line(f"{pair['kind']} {pair['seed']}", f"{best['area']:.3f}, {best['variant']}", *cells)


def summary_table(kinds: Mapping[str, Sequence[Pair]]) -> Iterator[str]:
    """Every variant's area minus that of uniform task arithmetic, over the seeds of every kind."""
    yield from head("variant", *(f"{kind} ({len(pairs)})" for kind, pairs in kinds.items()))
    for variant in VARIANTS:
        if variant != REFERENCE:
            yield line(variant, *(_against(pairs, variant) for pairs in kinds.values()))


def _against(pairs: Sequence[Pair], variant: str) -> str:
    apart = [row["against"] for pair in pairs if (row := row_of(pair, variant)) is not None]
    if not apart:
        return "not run"
    better, worse = sum(low > 0 for _, low, _ in apart), sum(high < 0 for _, _, high in apart)
    some = "" if len(apart) == len(pairs) else f" of {len(apart)}"
    return (
        f"{_spread([value for value, _, _ in apart])}{some}"
        + (f", {better} up" * bool(better))
        + (f", {worse} down" * bool(worse))
    )


def variants_table(pairs: Sequence[Pair]) -> Iterator[str]:
    """What every variant gains above the chord, over the seeds of a kind."""
    seeds = ", ".join(str(pair["seed"]) for pair in pairs)
    yield from head("variant", f"held-out gain, seeds {seeds}", "mean ± spread", "above 0", "best merge")
    for variant in VARIANTS:
        found = [row for pair in pairs if (row := row_of(pair, variant)) is not None]
        if not found:
            yield line(variant, "not run", "", "", "")
            continue
        held = [row["held_out"] for row in found]
        each = ", ".join(f"{value:+.3f}" for value, _, _ in held)
        above = sum(low > 0 for _, low, _ in held)
        best = np.mean([row["best"] for row in found])
        yield line(variant, each, _spread([h[0] for h in held]), f"{above} of {len(found)}", f"{best:+.3f}")


def prose_table(pairs: Sequence[Pair]) -> Iterator[str]:
    """What an unrelated text costs base, long model, and the worst merge of every variant."""
    yield from head("model", *(f"seed {pair['seed']}" for pair in pairs))
    for name in ("base", "long"):
        yield line(name, *(f"{pair['prose'][name]:.4f}" for pair in pairs))
    for variant in VARIANTS:
        found = [row_of(pair, variant) for pair in pairs]
        if any(found):
            yield line(variant, *(f"{row['prose']:.4f}" if row and row["prose"] else "not run" for row in found))


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):+.3f}{spread}"


def page(kinds: Mapping[str, Sequence[Pair]]) -> Iterator[str]:
    """All tables, each under what it shows."""
    pairs = [pair for its in kinds.values() for pair in its]
    yield from ("", "### The pairs", "", *pairs_table(pairs))
    yield from ("", "### The aim", "", *aims_table(pairs))
    yield from ("", "### All variants beside uniform task arithmetic", "", *summary_table(kinds))
    for kind, its in kinds.items():
        yield from ("", f"### Above the chord: {kind}", "", *variants_table(its))
        if all(pair.get("prose") for pair in its):
            yield from ("", f"### An unrelated text: {kind}", "", *prose_table(its))
    yield ""


def draw(kinds: Mapping[str, Sequence[Pair]], path: Path) -> None:
    """The first seed of every kind: accuracy against tokens of some variants, and the chord."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(3.4 * len(kinds), 3.3), squeeze=False, layout="constrained"
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this page")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    kinds: dict[str, list[Pair]] = {}
    for folder in arguments.folders:
        pair = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        kinds.setdefault(pair["kind"], []).append(pair)
    sorted_kinds = {kind: sorted(pairs, key=lambda pair: pair["seed"]) for kind, pairs in kinds.items()}
    if arguments.write:
        put(arguments.write, COMMAND, list(page(sorted_kinds)))
    else:
        print("\n".join(page(sorted_kinds)))
    if arguments.figure:
        draw(sorted_kinds, arguments.figure)


if __name__ == "__main__":
    main()
