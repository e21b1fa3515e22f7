"""A report or a measurement -> a figure: per decoder layer, Fisher information, task-vector norm and coefficient."""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from mergekit_fim.errors import FimError, require
from mergekit_fim.files import REPORT_FORMAT, read_json, written_whole
from mergekit_fim.measurements.file import FORMAT, from_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")

# Okabe and Ito's colours, which colour-blind readers tell apart, from dark to light; and for readers in greyscale a
# marker and a dash.
STYLES = [
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#56B4E9", "v", "-"),
    ("#E69F00", "P", "--"),
]
INK = "#333333"
LINE: dict[str, Any] = {"markersize": 4, "linewidth": 1.2}


def read_report(path: str) -> Mapping[str, Any]:
    """Read a merge's report; or a measurement's file, as the report of a merge without models.

    Raises:
        FimError: the file is neither.
    """
    content = read_json(path)
    kind = content.get("format") if isinstance(content, dict) else None
    if kind == FORMAT:
        from_json(content, path)
        return {"base_model": content["model"]["id"], "fisher": content, "fisher_of_other_bases": {}, "models": []}
    if kind != REPORT_FORMAT:
        raise FimError(
            f"{path}: expected a report of a merge ({REPORT_FORMAT}) or a measurement ({FORMAT}), found "
            f"{kind or 'neither'}; name a fim_report.json or what `mergekit-fim fisher` wrote"
        )
    return content


def check_figure(path: str) -> None:
    """Check before the work that a figure can be drawn into a file of this name.

    Raises:
        FimError: the ending is another one, or matplotlib isn't installed.
    """
    if _ending(path) not in FORMATS:
        raise FimError(f"{path}: expected a file name that ends in {' or '.join('.' + f for f in FORMATS)}; change it")
    require("matplotlib", "plot")


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower().removeprefix(".")


def write_figure(report: Mapping[str, Any], where: str, path: str) -> None:
    """Draw a report, which errors call `where`, into a file whose name ends in .png or .svg.

    Raises:
        FimError: see `check_figure`; or the report has nothing to draw or is damaged, or the file can't be written.
    """
    check_figure(path)
    try:
        figure = draw(report)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FimError(f"{where}: the report is damaged ({error!r}); merge or plan again") from error
    if figure is None:
        raise FimError(f"{where}: nothing to draw, as every alpha of this merge was set by hand; set fewer by hand")
    save_figure(figure, path)


def save_figure(figure: "Figure", path: str) -> None:
    """Write a figure whole or not at all, as PNG or SVG by the ending of `path`, in the same bytes every time."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "mergekit-fim"}), written_whole(path) as part:
        metadata = {"Date": None} if _ending(path) == "svg" else {"Software": None}
        figure.savefig(part, format=_ending(path), dpi=150, metadata=metadata)


def draw(report: Mapping[str, Any]) -> "Figure | None":
    """Draw Fisher information, task-vector norms and coefficients over the layers; None if there is nothing to draw."""
    if "kron" in report:
        return _draw_kron(report)
    bases = {report["base_model"]: report["fisher"], **report["fisher_of_other_bases"]}
    bases = {name: part["layers"] for name, part in bases.items() if part}
    models = [model for model in report["models"] if model["layers"]]
    if not bases:
        return None
    count = 3 if models else 1
    figure, panels = _panels(report, count, 1.0 + 2.3 * count)
    last = max(layer["index"] for layers in bases.values() for layer in layers)
    outside = last + max(1.5, 0.05 * last)  # the place of the tensors outside on the axis of the layers
    _draw_fisher(panels[0], bases)
    if models:
        norms = [[math.sqrt(layer["task_vector_sq_norm"]) for layer in model["layers"]] for model in models]
        _draw_lines(panels[1], models, norms)
        panels[1].set_ylim(0, 1.15 * max(map(max, norms)) or 1.0)
        panels[1].set_ylabel("task-vector norm ‖δ‖", color=INK)
        panels[1].legend(fontsize=8, frameon=False)
        _draw_alphas(panels[2], models, outside)
    _dress(panels, last, outside if models else None)
    return figure


def _panels(report: Mapping[str, Any], count: int, height: float) -> "tuple[Figure, list[Axes]]":
    """Make a figure with panels below one another, and what the report is of as its title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, height), layout="constrained")
    panels = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    base = report["base_model"]
    figure.suptitle(f"{report['method']} into {_short(base)}" if "method" in report else base, color=INK, fontsize=11)
    return figure, panels


def _dress(panels: "Sequence[Axes]", last: int, outside: float | None = None) -> None:
    """Add a grid, and a tick for every layer up to the last one, or for so many as there is room for."""
    for panel in panels:
        panel.grid(True, color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(colors=INK, labelsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    ticks: dict[float, str] = {layer: str(layer) for layer in range(0, last + 1, math.ceil((last + 1) / 15))}
    if outside is not None:
        ticks[outside] = "outside"
    panels[-1].set_xlabel("decoder layer", color=INK)
    panels[-1].set_xticks(list(ticks), list(ticks.values()))


def _draw_kron(report: Mapping[str, Any]) -> "Figure":
    """Draw the directions' coefficients of attention and of MLP, a strip for each layer.

    It goes from the least to the largest, darker where they are within a standard deviation of the mean, which a marker
    shows. The dotted line is the coefficient of tensors without factors.
    """
    models, parts = report["kron"]["models"], ("attention", "mlp")
    figure, panels = _panels(report, len(parts), 0.8 + 2.5 * len(parts))
    names = _short_names([model["model"] for model in models])
    thick = 0.7 / len(models)
    for panel, part in zip(panels, parts, strict=True):
        for i, (model, name, (colour, marker, _)) in enumerate(zip(models, names, cycle(STYLES), strict=False)):
            layers = [layer for layer in model["layers"] if part in layer["parts"]]
            strips = [layer["parts"][part] for layer in layers]
            x = [_index(layer) + thick * (i - (len(models) - 1) / 2) for layer in layers]
            least, largest = ([strip[end] for strip in strips] for end in ("least", "largest"))
            low = [max(strip["least"], strip["mean"] - strip["std"]) for strip in strips]
            high = [min(strip["largest"], strip["mean"] + strip["std"]) for strip in strips]
            for bottom, top, opacity, label in ((least, largest, 0.3, None), (low, high, 0.75, name)):
                height = [b - a for a, b in zip(bottom, top, strict=True)]
                panel.bar(x, height, 0.8 * thick, bottom, linewidth=0, color=colour, alpha=opacity, label=label)
            panel.plot(x, [s["mean"] for s in strips], marker, color="white", markeredgecolor=INK, markersize=4)
            left, right = ([at + side * thick for at in x] for side in (-0.5, 0.5))
            panel.hlines([layer["beta"] for layer in layers], left, right, INK, ":", linewidth=1.2)
        panel.set_ylim(-0.03, 1.03)
        panel.set_ylabel(f"{part}\ncoefficients α", color=INK)
    if len(models) > 1:
        panels[0].legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(models))
    _dress(panels, max(_index(layer) for model in models for layer in model["layers"]))
    return figure


def _draw_fisher(panel: "Axes", bases: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for (name, layers), (_, marker, dash) in zip(bases.items(), cycle(STYLES), strict=False):
        drawn = [layer for layer in layers if layer["fisher"] > 0]  # zero has no place on a log axis
        fisher = [layer["fisher"] for layer in drawn]
        errors = [layer["fisher_stderr"] or 0.0 for layer in drawn]  # a single sequence has none
        down = [min(error, 0.99 * value) for error, value in zip(errors, fisher, strict=True)]
        style = {"color": INK, "marker": marker, "linestyle": dash, "elinewidth": 1.0, "capsize": 2.5, **LINE}
        panel.errorbar([layer["index"] for layer in drawn], fisher, yerr=[down, errors], label=_short(name), **style)
    panel.set_yscale("log")
    if not any(layer["fisher"] > 0 for layers in bases.values() for layer in layers):
        panel.set_ylim(0.1, 1)  # nothing to draw
    panel.set_ylabel("Fisher information F\n± standard error", color=INK)
    if len(bases) > 1:
        panel.legend(fontsize=8, frameon=False)


def _draw_alphas(panel: "Axes", models: Sequence[Mapping[str, Any]], outside: float) -> None:
    """Draw the coefficients of the layers, and at `outside` those of the tensors outside."""
    alphas = [[layer["alpha"] for layer in model["layers"]] for model in models]
    _draw_lines(panel, models, alphas)
    for model, (colour, marker, _) in zip(models, cycle(STYLES), strict=False):
        panel.plot([outside], [model["alpha_other"]], color=colour, marker=marker, markersize=5, fillstyle="none")
    low, high = min(0.0, *map(min, alphas)), max(1.0, *map(max, alphas))
    panel.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    panel.set_ylabel("merge coefficient α", color=INK)


def _draw_lines(panel: "Axes", models: Sequence[Mapping[str, Any]], values: Sequence[Sequence[float]]) -> None:
    names = _short_names([model["model"] for model in models])
    for model, name, y, (colour, marker, dash) in zip(models, names, values, cycle(STYLES), strict=False):
        x = [_index(layer) for layer in model["layers"]]
        panel.plot(x, y, color=colour, marker=marker, linestyle=dash, label=name, **LINE)


def _index(layer: Mapping[str, Any]) -> int:
    """Read the base's number of a layer."""
    index: int = layer.get("base_index", layer["index"])
    return index


def _short(name: str) -> str:
    """Take the folders that it lies in from a model's name."""
    parts = name.rstrip("/").split("/")
    return name.rstrip("/") if len(parts) == 2 and parts[0] not in ("", ".", "..") else parts[-1]


def _short_names(names: Sequence[str]) -> list[str]:
    """Shorten names, but for so many of the folders that the models lie in as tell them apart."""
    short = [_short(name) for name in names]
    most = max((name.count("/") for name in names), default=0)
    for folders in range(1, most + 1):
        if len(set(short)) == len(set(names)):
            break
        short = ["/".join(name.rstrip("/").split("/")[-folders - 1 :]) for name in names]
    return short
