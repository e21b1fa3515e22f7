"""A sweep's summary -> a figure: accuracy against mean tokens."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_fim.evaluate.records import ordered_by
from mergekit_fim.report.figure import INK, STYLES, check_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

Run = Mapping[str, Any]

# Where a label may stand beside its point, in points.
_PLACES = [
    (x * far, y * far)
    for far in (8, 12, 18, 26)
    for x, y in ((-0.7, 1), (0, 1), (0.7, 1), (1, 0), (0.7, -1), (0, -1), (-0.7, -1), (-1, 0))
]


def write_figure(summary: Mapping[str, Any], path: str) -> None:
    """Draw a summary into a PNG or SVG file, by the ending of its name; atomically, and the same bytes every time.

    Args:
        summary: as `statistics.as_json` gives it.
        path: the file.

    Raises:
        FimError: the ending is another one, matplotlib isn't installed, or the file can't be written.
    """
    check_figure(path)
    save_figure(draw(summary), path)


def draw(summary: Mapping[str, Any]) -> "Figure":
    """Draw every run with the interval of its accuracy, each method's joined by strength, the chord and the front.

    The axis of tokens is linear, so that the chord is the straight line that it is.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panel: Axes = figure.subplots()
    runs: list[Run] = list(summary["runs"])
    ends = {run["run"]: run for run in runs if run["run"] in (summary["base"], summary["long"])}
    base, long = ends[summary["base"]], ends[summary["long"]]
    most = max(run["tokens_mean"] for run in runs)
    last, height = summary["front"][-1]
    front = [*summary["front"], (max(long["tokens_mean"], last), height)]
    panel.plot(
        *zip(*front, strict=True), color="#BBBBBB", linewidth=4, solid_capstyle="butt", label="front of all runs"
    )
    if summary["no_chord"] is None:
        points = [(run["tokens_mean"], run["accuracy"]["value"]) for run in (base, long)]
        panel.plot(
            *zip(*points, strict=True),
            color=INK,
            linestyle=(0, (5, 4)),
            linewidth=1,
            label="chord: base and long mixed at random",
        )
    labels = []
    methods = list(dict.fromkeys(run["method"] for run in runs if run["method"] is not None))
    for i, method in enumerate(methods):
        own = [run for run in runs if run["method"] == method]
        colour, marker, dash = STYLES[i % len(STYLES)]
        for k, line in enumerate(_lines(own)):
            _draw_points(panel, line, colour, marker, dash, size=5, label=method if k == 0 else None)
        labels += [_label(panel, run, text, colour) for run, text in zip(own, _values(own), strict=True)]
    for run in runs:
        if run["method"] is None:
            size = 11 if run["run"] in ends else 8
            _draw_points(panel, [run], INK, "*" if run["run"] in ends else "X", "", size=size, label=None)
            labels.append(_label(panel, run, run["run"], INK, size=10, weight="bold"))
    panel.set_xlabel("mean tokens of an answer", color=INK)
    panel.set_ylabel("accuracy, with its 95 % interval", color=INK)
    panel.set_xlim(0, 1.06 * most or 1.0)
    panel.grid(True, color="#E5E5E5", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(colors=INK, labelsize=9)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.legend(fontsize=8.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=4)
    count = "1 problem" if summary["problems"] == 1 else f"{summary['problems']:,} problems"
    panel.set_title(f"accuracy against length on {count}", color=INK, fontsize=11)
    _part_labels(figure, panel, labels, runs)
    return figure


def _draw_points(
    panel: "Axes", runs: Sequence[Run], colour: str, marker: str, dash: str, size: float, label: str | None
) -> None:
    tokens = [run["tokens_mean"] for run in runs]
    accuracy = [run["accuracy"] for run in runs]
    known = [(t, a) for t, a in zip(tokens, accuracy, strict=True) if a["low"] is not None]
    panel.vlines(
        [t for t, _ in known], [a["low"] for _, a in known], [a["high"] for _, a in known],
        color=colour, linewidth=1, alpha=0.35,
    )  # fmt: skip
    values = [a["value"] for a in accuracy]
    panel.plot(
        tokens,
        values,
        color=colour,
        marker=marker,
        linestyle=dash,
        markersize=size,
        linewidth=1.2,
        label=label,
        zorder=3,
    )


def _lines(runs: Sequence[Run]) -> list[list[Run]]:
    """A method's runs by strength: a line for each choice of the others."""

    def rest(run: Run) -> str:
        by = ordered_by(run["settings"])
        return str([setting for setting in run["settings"].items() if setting[0] != by])

    def strength(run: Run) -> tuple[bool, float, str]:
        first = run["settings"].get(ordered_by(run["settings"]))
        number = isinstance(first, (int, float))
        return not number, float(first) if number else 0.0, str(first)

    return [sorted(line, key=strength) for _, line in groupby(sorted(runs, key=rest), key=rest)]


def _values(runs: Sequence[Run]) -> list[str]:
    """What tells a method's runs apart: the values of the settings that vary."""
    names = list(dict.fromkeys(name for run in runs for name in run["settings"]))
    varied = [name for name in names if len({str(run["settings"].get(name)) for run in runs}) > 1] or names
    texts = [[run["settings"].get(name) for name in varied] for run in runs]
    return [", ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in text if x is not None) for text in texts]


def _label(panel: "Axes", run: Run, text: str, colour: str, size: float = 8, weight: str = "normal") -> "Annotation":
    at = (run["tokens_mean"], run["accuracy"]["value"])
    return panel.annotate(
        text,
        at,
        (0, 0),
        textcoords="offset points",
        parse_math=False,  # a name may have a $ in it
        color=colour,
        fontsize=size,
        fontweight=weight,
        ha="center",
        va="center",
        zorder=4,
    )


def _part_labels(figure: "Figure", panel: "Axes", labels: Sequence["Annotation"], runs: Sequence[Run]) -> None:
    """Move every label beside its point to where it is on no point and no other label, and on few lines."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # the axes get their places
    scale = figure.dpi / 72
    taken = []
    for run in runs:
        x, y = panel.transData.transform((run["tokens_mean"], run["accuracy"]["value"]))
        reach = scale * (4 if run["method"] is not None else 7)
        taken.append(Bbox([[x - reach, y - reach], [x + reach, y + reach]]))
    drawn = [line.get_xydata() for line in panel.lines]
    drawn += [bar for bars in panel.collections for bar in bars.get_segments()]  # type: ignore[attr-defined]
    inked = np.concatenate([_along(panel.transData.transform(points)) for points in drawn])
    bounds = panel.get_window_extent()
    for label in labels:
        box = label.get_window_extent()
        half = max(0.0, box.width / 2 - 3 * scale)  # a long name stands beside its point, not across it
        best = None
        for x, y in _PLACES:
            moved = box.translated(x * scale + half * float(np.sign(x)), y * scale)
            crossed = ((inked > moved.min) & (inked < moved.max)).all(axis=1).sum()
            outside = moved.x0 < bounds.x0 or moved.x1 > bounds.x1
            cost = 1000 * (moved.count_overlaps(taken) + outside) + crossed + math.hypot(x, y)
            if best is None or cost < best[0]:
                best = cost, moved
        assert best is not None
        label.set_position(((best[1].x0 - box.x0) / scale, (best[1].y0 - box.y0) / scale))
        taken.append(best[1])


def _along(points: Any) -> Any:
    """Points a pixel or so apart along a line through `points` [point, 2]."""
    parts = [points[:1]]
    for start, end in pairwise(points):
        steps = 2 + int(np.abs(end - start).max())
        parts.append(start + np.linspace(0, 1, steps)[:, None] * (end - start))
    return np.concatenate(parts)
