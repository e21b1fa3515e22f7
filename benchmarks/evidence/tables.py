"""Make the tables and the figure of docs/evidence.md from what is kept in docs/evidence/.

python -m benchmarks.evidence.tables [FILE...] [--write docs/evidence.md] [--figure docs/evidence.png]

One-sided pairs come first: their long model was trained from the base. The verdict is over them. Two-sided pairs come
after, and are called so everywhere: their base and long model were both trained from a parent.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.evidence import over_pairs
from benchmarks.evidence.summary import DEVELOPMENT, KEPT, REFERENCE, Difference, Found, load
from benchmarks.evidence.variants import EXPLORED, LISTED, TRIMMED, VARIANTS
from benchmarks.pages import head, line, put
from benchmarks.pairs.recipes import KINDS

COMMAND = "python -m benchmarks.evidence.tables"
BESIDE = (REFERENCE, "ties density 0.02", "ties density 0.05", "ties density 0.2")
PRESETS = (REFERENCE, "ties density 0.02", "ties density 0.2", "fim_ta", "fim_ties", "fim_ties density 0.02")
# The listed variants of interest. At most six can be told apart in grey.
DRAWN = (REFERENCE, "fim_kron", "ties density 0.02", "ties density 0.2", "fim_ta", "fim_ties")
IN_SHORT = {
    "fim_kron": "`fim_kron`",
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
    "coder": "Qwen2.5-Coder-0.5B, reasoning-gym",
    "scratch-llama": "Llama from scratch",
    "scratch-mixtral": "mixture of experts",
    "scratch-gpt2": "GPT-2",
}
ONE_SIDED, TWO_SIDED = "one-sided", "two-sided"

Kinds = Mapping[str, Sequence[Found]]


def sides(pairs: Sequence[Found]) -> dict[str, Kinds]:
    """Sort the pairs by side and kind. Leave out empty sides and kinds."""
    found: dict[str, dict[str, list[Found]]] = {ONE_SIDED: {}, TWO_SIDED: {}}
    for kind in KINDS:
        for pair in sorted(pairs, key=lambda pair: (pair.seed, pair.one_sided or 0)):
            if pair.kind == kind:
                found[TWO_SIDED if pair.one_sided is None else ONE_SIDED].setdefault(kind, []).append(pair)
    return {side: kinds for side, kinds in found.items() if kinds}


def over_table(pairs: Sequence[Found]) -> Iterator[str]:
    """Show the listed variants' areas minus their references', over lineages. Their number is in brackets.

    Differences that Holm's correction over the list leaves are bold.
    """
    yield from head("variant", *(f"minus {reference}" for reference in BESIDE))
    families = {reference: over_pairs.family(_apart(pairs, reference)) for reference in BESIDE}
    for variant in LISTED:
        cells = ("–" if variant == reference else _over(families[reference].get(variant)) for reference in BESIDE)
        yield line(variant, *cells)


def _apart(pairs: Sequence[Found], reference: str) -> dict[str, np.ndarray]:
    """Return each listed variant's differences of area from a reference [lineage], on the pairs that have both."""
    found = {}
    for variant in LISTED:
        both = [(pair, pair.row(variant), pair.row(reference)) for pair in pairs if variant != reference]
        differences = [((pair.kind, pair.seed), x.area - y.area) for pair, x, y in both if x and y]
        if differences:
            found[variant] = over_pairs.of_lineages(differences)
    return found


def _over(its: over_pairs.Mean | None) -> str:
    if its is None:
        return "not run"
    interval = " [{:+.3f}, {:+.3f}]".format(*its.interval) if its.interval else ""
    mark = "**" if its.adjusted is not None and its.adjusted < 1 - over_pairs.LEVEL else ""
    return f"{mark}{its.value:+.3f}{mark}{interval}, p {its.adjusted:.3f} ({its.lineages})"


def pairs_table(pairs: Sequence[Found]) -> Iterator[str]:
    """Show the models of every pair, and their merges by uniform task arithmetic."""
    titles = ("uniform task arithmetic, strength: accuracy @ tokens", "‖δ‖ / ‖θ0‖", "variants", "hours")
    names = ("base", *(["parent"] if any(pair.ends["parent"] for pair in pairs) else []), "long")
    yield from head("pair", *names, *titles)
    for pair in pairs:
        ends = [f"{end[0]:.2f} @ {end[1]:.1f}" if (end := pair.ends[name]) else "not asked" for name in names]
        uniform = pair.row(REFERENCE)
        its = uniform.points if uniform else ()
        points = ", ".join(f"{strength:.2f}: {accuracy:.2f} @ {tokens:.0f}" for strength, accuracy, tokens in its)
        kept = ["not kept" if value is None else f"{value:.2g}" for value in (pair.distance, pair.hours)]
        yield line(pair.name, *ends, points, kept[0], str(len(pair.rows)), kept[1])


def aims_table(pairs: Sequence[Found]) -> Iterator[str]:
    """Show whether a method that people have is above the chord, and as good as the best variant."""
    yield from head("pair", "best area", *(f"{name}: gain, share of the best area" for name in PRESETS))
    for pair in pairs:
        best = max(pair.rows, key=lambda row: row.area)
        cells = []
        for row in map(pair.row, PRESETS):
            cells.append(f"{_interval(pair.above(row))}, {row.area / best.area:.1%}" if row else "not run")
        yield line(f"{pair.name}{_luck([pair])}", f"{best.area:.3f}, {best.variant}", *cells)


def summary_table(kinds: Kinds) -> Iterator[str]:
    """Show every variant's area minus uniform task arithmetic's, over the pairs of a kind, and how near the best it is.

    The last cell is the widest gap on any of its fronts, in parts of the way from base to long.
    """
    yield from head("variant", *_titles(kinds), "share of the best area: worst, mean (pairs)", "widest gap")
    pairs = [pair for its in kinds.values() for pair in its]
    missing = []
    for variant in VARIANTS:
        rows = [row for pair in pairs if (row := pair.row(variant)) is not None]
        if not rows:
            missing.append(variant)
            continue
        cells = ["0"] * len(kinds) if variant == REFERENCE else _over_kinds(kinds, variant, "against")
        gap = max((row.gap for row in rows if row.gap is not None), default=None)
        yield line(variant, *cells, _shares(pairs, variant), "not kept" if gap is None else f"{gap:.2f}")
    yield from _not_run(missing)


def trimmed_table(kinds: Kinds) -> Iterator[str]:
    """Show what a coefficient for each layer adds to trimming: the area minus mergekit's ties', of one density."""
    yield from head("variant", *_titles(kinds))
    for variant in _trimmed(kinds):
        yield line(variant, *_over_kinds(kinds, variant, "trimmed"))


def _trimmed(kinds: Kinds) -> list[str]:
    rows = [row for pairs in kinds.values() for pair in pairs for row in pair.rows]
    return [name for name in TRIMMED if any(row.trimmed for row in rows if row.variant == name)]


def _titles(kinds: Kinds) -> list[str]:
    return [f"{kind} ({len(pairs)})" for kind, pairs in kinds.items()]


def _over_kinds(kinds: Kinds, variant: str, difference: str) -> Iterator[str]:
    for pairs in kinds.values():
        rows = [row for pair in pairs if (row := pair.row(variant)) is not None]
        apart = [its for row in rows if (its := getattr(row, difference)) is not None]
        yield _counted(apart, len(pairs))


def _shares(pairs: Sequence[Found], variant: str) -> str:
    shares = [
        row.area / max(other.area for other in pair.rows) for pair in pairs if (row := pair.row(variant)) is not None
    ]
    return f"{min(shares):.1%}, {np.mean(shares):.1%} ({len(shares)})"


def _counted(apart: Sequence[Difference], pairs: int) -> str:
    if not apart:
        return "not run"
    some = "" if len(apart) == pairs else f" of {len(apart)}"
    known = [its.sign for its in apart if its.sign is not None]
    of_known = f" of {len(known)}" if len(known) < len(apart) else ""
    counts = [f"{known.count(sign)}{of_known} {name}" for sign, name in ((1, "up"), (-1, "down")) if sign in known]
    return ", ".join([f"{_spread([its.value for its in apart])}{some}", *counts])


def explored_table(pairs: Sequence[Found]) -> Iterator[str]:
    """Show the gains above the chord on pairs of development. The front's widest gap is in brackets."""
    yield from head("variant", *(pair.name for pair in pairs))
    for variant in dict.fromkeys([*LISTED, *EXPLORED]):
        rows = [pair.row(variant) for pair in pairs]
        if any(rows):
            cells = (
                f"{_interval(pair.above(row))} ({row.gap:.2f})" if row else "not run"
                for pair, row in zip(pairs, rows, strict=True)
            )
            yield line(variant, *cells)


def short_table(found: Mapping[str, Kinds]) -> Iterator[str]:
    """Show the mean of some variants' areas minus uniform task arithmetic's, bold where all intervals are above 0."""
    columns = [
        (f"{KINDS_IN_SHORT.get(kind, kind)}, {side} ({len(pairs)})", pairs)
        for side, kinds in found.items()
        for kind, pairs in kinds.items()
    ]
    yield from head("", *(title for title, _ in columns))
    for variant, title in IN_SHORT.items():
        cells = []
        for _, pairs in columns:
            apart = [row.against for pair in pairs if (row := pair.row(variant)) is not None and row.against]
            mark = "**" if apart and all(its.sign == 1 for its in apart) else ""
            some = f" ({len(apart)})" if len(apart) < len(pairs) else ""
            mean = float(np.mean([its.value for its in apart])) if apart else 0.0
            cells.append(f"{mark}{mean:+.3f}{mark}{some}" if apart else "not run")
        yield line(title, *cells)


def variants_table(pairs: Sequence[Found]) -> Iterator[str]:
    """Show what every variant gains above the chord, over the pairs of a kind."""
    yield from head("variant", *_seeds(pairs), f"mean ± spread{_luck(pairs)}", "above 0")
    missing = []
    for variant in VARIANTS:
        rows = [pair.row(variant) for pair in pairs]
        gains = [pair.above(row) if row else None for pair, row in zip(pairs, rows, strict=True)]
        if not any(gains):
            missing.append(variant)
            continue
        each = [f"{gain.value:+.3f}" if gain else "not run" for gain in gains]
        signs = [gain.sign for gain in gains if gain and gain.sign is not None]
        above = f"{sum(sign > 0 for sign in signs)} of {len(signs)}" if signs else "not known"
        yield line(variant, *each, _spread([gain.value for gain in gains if gain]), above)
    yield from _not_run(missing)


def _not_run(variants: Sequence[str]) -> Iterator[str]:
    if variants:
        yield from ("", f"Not run: {'; '.join(variants)}.")


def _seeds(pairs: Sequence[Found]) -> list[str]:
    return [f"seed {pair.seed}" + (f", {pair.one_sided} steps" if pair.one_sided else "") for pair in pairs]


def _luck(pairs: Sequence[Found]) -> str:
    """Return the words that mark gains in the sample."""
    return " (luck included)" if any(row.gain is None for pair in pairs for row in pair.rows) else ""


def prose_table(pairs: Sequence[Found]) -> Iterator[str]:
    """Show what an unrelated text costs base, long model, and the worst merge of every variant."""
    yield from head("model", *_seeds(pairs))
    for name in ("base", "long"):
        yield line(name, *(f"{pair.prose[name]:.4f}" for pair in pairs))
    for variant in VARIANTS:
        costs = [row.prose if (row := pair.row(variant)) else None for pair in pairs]
        if any(costs):
            yield line(variant, *("not run" if cost is None else f"{cost:.4f}" for cost in costs))


def fidelity_table(pairs: Sequence[Found]) -> Iterator[str]:
    """Show how well each signal says what moving a part of the model does."""
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


def page(found: Mapping[str, Kinds], developed: Sequence[Found] = ()) -> Iterator[str]:
    """Write all tables, each under a heading."""
    for side, kinds in found.items():
        pairs = [pair for its in kinds.values() for pair in its]
        if side == ONE_SIDED:
            yield from ("", "### Over the one-sided pairs", "", *over_table(pairs))
        yield from ("", f"### The pairs, {side}", "", *pairs_table(pairs))
        yield from ("", f"### The aim, {side}", "", *aims_table(pairs))
        yield from ("", f"### All variants beside uniform task arithmetic, {side}", "", *summary_table(kinds))
        if _trimmed(kinds):
            yield from ("", f"### What a coefficient for each layer adds to trimming, {side}", "")
            yield from trimmed_table(kinds)
        if measured := [pair for pair in pairs if pair.fidelity]:
            yield from ("", f"### Fidelity, {side}", "", *fidelity_table(measured))
        for kind, its in kinds.items():
            yield from ("", f"### Above the chord: {kind}, {side}", "", *variants_table(its))
            if all(pair.prose for pair in its):
                yield from ("", f"### An unrelated text: {kind}, {side}", "", *prose_table(its))
    if developed:
        yield from ("", "### Exploration, on pairs of development", "", *pairs_table(developed))
        yield from ("", *explored_table(developed))
    yield ""


def draw(found: Mapping[str, Kinds], path: Path) -> None:
    """Draw a pair of every kind: accuracy against tokens of some variants, the chord, and the way by the parent.

    The pairs are one-sided if there are any.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    side, kinds = next(iter(found.items()))
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(3.4 * len(kinds), 3.3), squeeze=False, layout="constrained"
    )
    for panel, (kind, pairs) in zip(panels[0], kinds.items(), strict=True):
        pair = max(pairs, key=lambda pair: sum(len(row.points) > 0 for row in pair.rows if row.variant in DRAWN))
        panel.plot(*_at(pair.base, pair.long), color="0.6", linestyle=(0, (6, 3)), label="chord", zorder=1)
        if parent := pair.ends["parent"]:
            way = _at(pair.base, parent, pair.long)
            panel.plot(*way, color="0.75", linewidth=3, label="base, parent, long", zorder=0)
        for number, variant in enumerate(DRAWN):
            if (its := pair.row(variant)) is not None and its.points:
                _, accuracy, tokens = zip(*sorted(its.points, key=lambda point: point[2]), strict=True)
                style = {"marker": "osD^vX"[number], "linestyle": DASHES[number], "color": f"C{number}"}
                panel.plot(tokens, accuracy, markersize=5, linewidth=1, alpha=0.8, label=variant, **style)
        panel.set(title=f"{kind}, {side}, {_seeds([pair])[0]}", xlabel="mean tokens", ylabel="accuracy")
        panel.title.set_fontsize(9)
    fullest = max(panels[0], key=lambda panel: len(panel.get_legend_handles_labels()[1]))
    fullest.legend(fontsize=7, frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


DASHES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)))


def _at(*ends: tuple[float, float]) -> tuple[list[float], list[float]]:
    """Return tokens and accuracy of models, as a plot takes them."""
    return [tokens for _, tokens in ends], [accuracy for accuracy, _ in ends]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(KEPT.glob("*.json")))
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this page")
    parser.add_argument("--short", type=Path, metavar="FILE", help="put the short table into this page")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found = sides([load(path) for path in arguments.files])
    tables = page(found, [load(path) for path in sorted(DEVELOPMENT.glob("*.json"))])
    if arguments.write:
        put(arguments.write, COMMAND, list(tables))
    else:
        print("\n".join(tables))
    if arguments.short:
        put(arguments.short, f"{COMMAND} --short", ["", *short_table(found), ""])
    if arguments.figure:
        draw(found, arguments.figure)


if __name__ == "__main__":
    main()
