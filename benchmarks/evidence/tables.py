"""Tables and figure of docs/evidence.md, of what is kept in docs/evidence/.

python -m benchmarks.evidence.tables [FILE...] [--write docs/evidence.md] [--figure docs/evidence.png]
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.evidence.summary import KEPT, REFERENCE, Difference, Found, load
from benchmarks.evidence.variants import TRIMMED, VARIANTS
from benchmarks.pages import head, line, put
from benchmarks.pairs.recipes import KINDS

COMMAND = "python -m benchmarks.evidence.tables"
PRESETS = (REFERENCE, "ties density 0.02", "ties density 0.2", "fim_ta", "fim_ties", "fim_ties density 0.02")
DRAWN = (REFERENCE, "fim_ta", "fim_ties", "ties density 0.02", "S3")
IN_SHORT = {
    "ties density 0.02": "mergekit's `ties`, density 0.02, as the sparse preset",
    "fim_ties density 0.02": "`fim_ties`, density 0.02, the paper's mapping",
    "fim_ties": "`fim_ties`, density 0.2, the default",
    "ties density 0.2": "mergekit's `ties`, density 0.2",
    "fim_ta": "`fim_ta`",
    "S3": "S³ (arXiv 2609.37976)",
}
KINDS_IN_SHORT = {
    "words": "SmolLM2, sums in words",
    "gym": "SmolLM2, reasoning-gym",
    "scratch-llama": "Llama from scratch",
    "scratch-mixtral": "mixture of experts",
    "scratch-gpt2": "GPT-2",
}

Kinds = Mapping[str, Sequence[Found]]


def pairs_table(pairs: Sequence[Found]) -> Iterator[str]:
    """Both ends of every pair, and what uniform task arithmetic makes of it."""
    titles = ("uniform task arithmetic, strength: accuracy @ tokens", "‖δ‖ / ‖θ0‖", "variants", "hours")
    yield from head("pair", "base", "long", *titles)
    for pair in pairs:
        ends = [f"{accuracy:.2f} @ {tokens:.1f}" for accuracy, tokens in pair.ends.values()]
        uniform = pair.row(REFERENCE)
        its = uniform.points if uniform else ()
        points = ", ".join(f"{strength:.2f}: {accuracy:.2f} @ {tokens:.0f}" for strength, accuracy, tokens in its)
        kept = ["not kept" if value is None else f"{value:.2g}" for value in (pair.distance, pair.hours)]
        yield line(pair.name, *ends, points, kept[0], str(len(pair.rows)), kept[1])


def aims_table(pairs: Sequence[Found]) -> Iterator[str]:
    """Whether a method that people have is above the chord, and as good as the best there is."""
    yield from head("pair", "best area", *(f"{name}: gain, share of the best area" for name in PRESETS))
    for pair in pairs:
        best = max(pair.rows, key=lambda row: row.area)
        cells = []
        for row in map(pair.row, PRESETS):
            cells.append(f"{_interval(row.gain)}, {row.area / best.area:.1%}" if row else "not run")
        yield line(pair.name, f"{best.area:.3f}, {best.variant}", *cells)


def summary_table(kinds: Kinds) -> Iterator[str]:
    """Every variant's area minus that of uniform task arithmetic, over the seeds of a kind, and how near the best."""
    yield from head("variant", *_titles(kinds), "share of the best area: worst, mean (pairs)")
    for variant in VARIANTS:
        cells = ["0"] * len(kinds) if variant == REFERENCE else _over_kinds(kinds, variant, "against")
        yield line(variant, *cells, _shares(kinds, variant))


def trimmed_table(kinds: Kinds) -> Iterator[str]:
    """What a coefficient for each layer adds to trimming: the area minus that of mergekit's ties, of one density."""
    yield from head("variant", *_titles(kinds))
    for variant in TRIMMED:
        yield line(variant, *_over_kinds(kinds, variant, "trimmed"))


def _titles(kinds: Kinds) -> list[str]:
    return [f"{kind} ({len(pairs)})" for kind, pairs in kinds.items()]


def _over_kinds(kinds: Kinds, variant: str, difference: str) -> Iterator[str]:
    for pairs in kinds.values():
        rows = [row for pair in pairs if (row := pair.row(variant)) is not None]
        apart = [its for row in rows if (its := getattr(row, difference)) is not None]
        yield _counted(apart, len(pairs))


def _shares(kinds: Kinds, variant: str) -> str:
    shares = [
        row.area / max(other.area for other in pair.rows)
        for pairs in kinds.values()
        for pair in pairs
        if (row := pair.row(variant)) is not None
    ]
    return f"{min(shares):.1%}, {np.mean(shares):.1%} ({len(shares)})" if shares else "not run"


def _counted(apart: Sequence[Difference], pairs: int) -> str:
    if not apart:
        return "not run"
    some = "" if len(apart) == pairs else f" of {len(apart)}"
    known = [its.sign for its in apart if its.sign is not None]
    of_known = f" of {len(known)}" if len(known) < len(apart) else ""
    counts = [f"{known.count(sign)}{of_known} {name}" for sign, name in ((1, "up"), (-1, "down")) if sign in known]
    return ", ".join([f"{_spread([its.value for its in apart])}{some}", *counts])


def short_table(kinds: Kinds) -> Iterator[str]:
    """The mean of some variants' areas minus that of uniform task arithmetic; bold where all intervals are above 0."""
    yield from head("", *(f"{KINDS_IN_SHORT[kind]} ({len(pairs)})" for kind, pairs in kinds.items()))
    for variant, title in IN_SHORT.items():
        cells = []
        for pairs in kinds.values():
            apart = [row.against for pair in pairs if (row := pair.row(variant)) is not None and row.against]
            mark = "**" if apart and all(its.sign == 1 for its in apart) else ""
            some = f" ({len(apart)})" if len(apart) < len(pairs) else ""
            mean = float(np.mean([its.value for its in apart])) if apart else 0.0
            cells.append(f"{mark}{mean:+.3f}{mark}{some}" if apart else "not run")
        yield line(title, *cells)


def variants_table(pairs: Sequence[Found]) -> Iterator[str]:
    """What every variant gains above the chord, over the seeds of a kind."""
    yield from head("variant", *(f"seed {pair.seed}" for pair in pairs), "mean ± spread", "above 0")
    missing = []
    for variant in VARIANTS:
        rows = [pair.row(variant) for pair in pairs]
        gains = [row.gain for row in rows if row is not None]
        if not gains:
            missing.append(variant)
            continue
        each = [f"{row.gain.value:+.3f}" if row else "not run" for row in rows]
        above = f"{sum(its.sign > 0 for its in gains)} of {len(gains)}"
        yield line(variant, *each, _spread([its.value for its in gains]), above)
    if missing:
        yield from ("", f"Not run: {'; '.join(missing)}.")


def prose_table(pairs: Sequence[Found]) -> Iterator[str]:
    """What an unrelated text costs base, long model, and the worst merge of every variant."""
    yield from head("model", *(f"seed {pair.seed}" for pair in pairs))
    for name in ("base", "long"):
        yield line(name, *(f"{pair.prose[name]:.4f}" for pair in pairs))
    for variant in VARIANTS:
        costs = [row.prose if (row := pair.row(variant)) else None for pair in pairs]
        if any(costs):
            yield line(variant, *("not run" if cost is None else f"{cost:.4f}" for cost in costs))


def fidelity_table(pairs: Sequence[Found]) -> Iterator[str]:
    """How well each signal says what moving a part of the model does."""
    yield from head("signal", *(pair.name for pair in pairs))
    for signal in pairs[0].fidelity:
        yield line(
            signal,
            *(
                " / ".join(f"{np.mean(values):.2f}" for values in pair.fidelity[signal].values())
                if signal in pair.fidelity
                else "not run"
                for pair in pairs
            ),
        )


def _interval(its: Difference) -> str:
    return f"{its.value:+.3f}" + (" [{:+.3f}, {:+.3f}]".format(*its.interval) if its.interval else "")


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):+.3f}{spread}"


def page(kinds: Kinds) -> Iterator[str]:
    """All tables, each under what it shows."""
    pairs = [pair for its in kinds.values() for pair in its]
    yield from ("", "### The pairs", "", *pairs_table(pairs))
    yield from ("", "### The aim", "", *aims_table(pairs))
    yield from ("", "### All variants beside uniform task arithmetic", "", *summary_table(kinds))
    yield from ("", "### What a coefficient for each layer adds to trimming", "", *trimmed_table(kinds))
    if measured := [pair for pair in pairs if pair.fidelity]:
        yield from ("", "### Fidelity", "", *fidelity_table(measured))
    for kind, its in kinds.items():
        yield from ("", f"### Above the chord: {kind}", "", *variants_table(its))
        if all(pair.prose for pair in its):
            yield from ("", f"### An unrelated text: {kind}", "", *prose_table(its))
    yield ""


def draw(kinds: Kinds, path: Path) -> None:
    """A pair of every kind: accuracy against tokens of some variants, and the chord."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(3.4 * len(kinds), 3.3), squeeze=False, layout="constrained"
    )
    for panel, (kind, pairs) in zip(panels[0], kinds.items(), strict=True):
        pair = max(pairs, key=lambda pair: sum(len(row.points) > 0 for row in pair.rows if row.variant in DRAWN))
        base, long = pair.ends.values()
        panel.plot([base[1], long[1]], [base[0], long[0]], color="0.6", linestyle="--", label="chord", zorder=1)
        for number, variant in enumerate(DRAWN):
            if (its := pair.row(variant)) is not None and its.points:
                _, accuracy, tokens = zip(*its.points, strict=True)
                panel.plot(
                    tokens, accuracy, "osD^v"[number], color=f"C{number}", markersize=5, alpha=0.8, label=variant
                )
        panel.set(title=f"{kind}, seed {pair.seed}", xlabel="mean tokens", ylabel="accuracy")
    fullest = max(panels[0], key=lambda panel: len(panel.get_legend_handles_labels()[1]))
    fullest.legend(fontsize=7, frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(KEPT.glob("*.json")))
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this page")
    parser.add_argument("--short", type=Path, metavar="FILE", help="put the shortest of them into this page")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found = [load(path) for path in arguments.files]
    kinds = {
        kind: sorted(its, key=lambda pair: pair.seed)
        for kind in KINDS
        if (its := [pair for pair in found if pair.kind == kind])
    }
    if arguments.write:
        put(arguments.write, COMMAND, list(page(kinds)))
    else:
        print("\n".join(page(kinds)))
    if arguments.short:
        put(arguments.short, f"{COMMAND} --short", ["", *short_table(kinds), ""])
    if arguments.figure:
        draw(kinds, arguments.figure)


if __name__ == "__main__":
    main()
