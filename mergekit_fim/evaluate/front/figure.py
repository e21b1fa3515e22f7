"""A sweep's summary -> a figure: accuracy against mean tokens."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from mergekit_fim.evaluate.front.table import problems
from mergekit_fim.evaluate.records import ordered_by
from mergekit_fim.report.figure import INK, STYLES, check_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Run = Mapping[str, Any]

# Where a label may stand beside its point, in points.
_PLACES = [
    (x * far, y * far)
    for far in (10, 16, 24, 34)
    for x, y in ((-0.7, 1), (0, 1), (0.7, 1), (1, 0), (0.7, -1), (0, -1), (-0.7, -1), (-1, 0))
]


def write_figure(summary: Mapping[str, Any], path: str) -> None:
    """Draw a summary, as JSON has it, into a PNG or SVG file, by its ending: atomically, the same bytes every time."""
    check_figure(path)
    save_figure(draw(summary), path)


def draw(summary: Mapping[str, Any]) -> "Figure":
    """Draw every run with the interval of its accuracy, each method's joined by strength, the chord and the front.

    The axis of tokens is linear, so that the chord is the straight line that it is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.2), layout="constrained")
    panel: Axes = figure.subplots()
    runs: list[Run] = list(summary["runs"])
    _draw_front(panel, summary)
    labels: list[tuple[Run, str, str]] = []
    for i, method in enumerate(dict.fromkeys(run["method"] for run in runs if run["method"] is not None)):
        own = [run for run in runs if run["method"] == method]
        colour, marker, dash = STYLES[i % len(STYLES)]
        for k, line in enumerate(_lines(own)):
            _draw_points(panel, line, color=colour, marker=marker, linestyle=dash, label=None if k else method)
        labels += [(run, text, colour) for run, text in zip(own, _values(own), strict=True)]
    for run in (run for run in runs if run["method"] is None):
        marker, size = ("*", 11) if run["run"] in (summary["base"], summary["long"]) else ("X", 8)
        _draw_points(panel, [run], color=INK, marker=marker, linestyle="", markersize=size)
        labels.append((run, run["run"], INK))
    panel.set_xlim(0, 1.06 * max(run["tokens_mean"] for run in runs) or 1.0)
    panel.set_title(f"accuracy against length on {problems(summary['problems'])}", color=INK, fontsize=11)
    panel.set_xlabel("mean tokens of an answer", color=INK)
    panel.set_ylabel("accuracy, with its 95 % interval", color=INK)
    panel.grid(True, color="#E5E5E5", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(colors=INK, labelsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=4)
    figure.draw_without_rendering()  # the axes get their places
    _label(figure, panel, labels)
    return figure


def _draw_front(panel: "Axes", summary: Mapping[str, Any]) -> None:
    base, long = (next(run for run in summary["runs"] if run["run"] == summary[end]) for end in ("base", "long"))
    last, height = summary["front"][-1]
    front = zip(*summary["front"], (max(long["tokens_mean"], last), height), strict=True)
    panel.plot(*front, color="#BBBBBB", linewidth=4, solid_capstyle="butt", label="front of all runs")
    if summary["no_chord"] is None:
        chord = zip(*((run["tokens_mean"], run["accuracy"]["value"]) for run in (base, long)), strict=True)
        label = "chord: base and long mixed at random"
        panel.plot(*chord, color=INK, linestyle=(0, (5, 4)), linewidth=1, label=label)


def _draw_points(panel: "Axes", runs: Sequence[Run], **style: Any) -> None:
    tokens, accuracy = [run["tokens_mean"] for run in runs], [run["accuracy"] for run in runs]
    known = [(t, a["low"], a["high"]) for t, a in zip(tokens, accuracy, strict=True) if a["low"] is not None]
    if known:
        panel.vlines(*zip(*known, strict=True), color=style["color"], linewidth=1, alpha=0.35)
    panel.plot(tokens, [a["value"] for a in accuracy], **{"markersize": 5, "linewidth": 1.2, "zorder": 3} | style)


def _lines(runs: Sequence[Run]) -> list[list[Run]]:
    """Put a method's runs in lines by strength, a line for each choice of the other settings."""

    def others(run: Run) -> str:
        return str({**run["settings"], ordered_by(run["settings"]): None})

    def strength(run: Run) -> tuple[bool, float, str]:
        value = run["settings"].get(ordered_by(run["settings"]))
        number = isinstance(value, (int, float))
        return not number, float(value) if number else 0.0, str(value)

    return [sorted(line, key=strength) for _, line in groupby(sorted(runs, key=others), key=others)]


def _values(runs: Sequence[Run]) -> list[str]:
    """Tell a method's runs apart: write the values of the settings that vary."""
    names = list(dict.fromkeys(name for run in runs for name in run["settings"]))
    varied = [name for name in names if len({str(run["settings"].get(name)) for run in runs}) > 1] or names
    texts = [[run["settings"].get(name) for name in varied] for run in runs]
    return [", ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in text if x is not None) for text in texts]


def _label(figure: "Figure", panel: "Axes", labels: Sequence[tuple[Run, str, str]]) -> None:
    """Write each run's text in its colour beside its point, where it is on no point and no other label."""
    from matplotlib.transforms import Bbox

    scale, inside = figure.dpi / 72, panel.bbox
    taken = []
    for run, *_ in labels:
        point = panel.transData.transform((run["tokens_mean"], run["accuracy"]["value"]))
        reach = scale * (5 if run["method"] is not None else 9)
        taken.append(Bbox([point - reach, point + reach]))
    for run, text, colour in labels:
        is_merge = run["method"] is not None
        label = panel.annotate(
            text,
            (run["tokens_mean"], run["accuracy"]["value"]),
            (0, 0),
            textcoords="offset points",
            parse_math=False,  # a name may have a $ in it
            color=colour,
            fontsize=8 if is_merge else 10,
            fontweight="normal" if is_merge else "bold",
            ha="center",
            va="center",
            zorder=4,
        )
        box = label.get_window_extent()
        half = max(0.0, box.width / scale / 2 - 3)  # a long name stands beside its point, not across it
        places = [(x + half * ((x > 0) - (x < 0)), y) for x, y in _PLACES]
        boxes = [box.translated(x * scale, y * scale) for x, y in places]
        hidden = [its.count_overlaps(taken) + (its.x0 < inside.x0 or its.x1 > inside.x1) for its in boxes]
        best = hidden.index(min(hidden))
        label.set_position(places[best])
        taken.append(boxes[best])
