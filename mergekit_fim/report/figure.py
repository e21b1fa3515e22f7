"""A report or a measurement -> a figure: per decoder layer, Fisher information, task-vector norm and coefficient."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_fim.errors import FimError, require
from mergekit_fim.files import REPORT_FORMAT, read_json, written_whole
from mergekit_fim.measurements.file import FORMAT, from_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")

# Okabe and Ito's colours, which colour-blind readers tell apart, from dark to light; a marker and a dash of its own for
# readers in greyscale.
STYLES = [
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#56B4E9", "v", "-"),
    ("#E69F00", "P", "--"),
]
INK = "#333333"


def read_report(path: str) -> Mapping[str, Any]:
    """Read a merge's report, or a measurement's file as the report of a merge without models.

    Raises:
        FimError: it is neither.
    """
    content = read_json(path, path)
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
    """Check that a figure can be drawn for a file name, before the work that it is for.

    Raises:
        FimError: its format is another one, or matplotlib isn't installed.
    """
    if _ending(path) not in FORMATS:
        raise FimError(f"{path}: expected a file name that ends in {' or '.join('.' + f for f in FORMATS)}; change it")
    require("matplotlib", "plot")


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower().removeprefix(".")


def write_figure(report: Mapping[str, Any], where: str, path: str) -> None:
    """Draw a figure into a PNG or SVG file, by the ending of its name; atomically, and the same bytes every time.

    Args:
        report: what is drawn.
        where: what to call it in an error.
        path: the file.

    Raises:
        FimError: `check_figure`, the report has nothing to draw or isn't one of ours, or the file can't be written.
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
    """Write a figure into a PNG or SVG file, by the ending of its name; atomically, and the same bytes every time.

    Raises:
        FimError: it can't be written.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "mergekit-fim"}), written_whole(path) as part:
        metadata = {"Date": None} if _ending(path) == "svg" else {"Software": None}
        figure.savefig(part, format=_ending(path), dpi=150, metadata=metadata)


def draw(report: Mapping[str, Any]) -> "Figure | None":
    """Draw Fisher information, task-vector norms and coefficients below one another, over the decoder layers.

    Returns:
        The figure; None where there is nothing to draw.
    """
    from matplotlib.figure import Figure

    if "kron" in report:
        return _draw_kron(report)
    bases = {report["base_model"]: report["fisher"], **report["fisher_of_other_bases"]}
    bases = {name: part["layers"] for name, part in bases.items() if part}
    models = [model for model in report["models"] if model["layers"]]
    if not bases:
        return None
    count = 3 if models else 1
    figure = Figure(figsize=(8.0, 1.0 + 2.3 * count), layout="constrained")
    panels: list[Axes] = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    base = report["base_model"]
    figure.suptitle(f"{report['method']} into {_short(base)}" if "method" in report else base, color=INK, fontsize=11)
    last = max(layer["index"] for layers in bases.values() for layer in layers)
    ticks: dict[float, str] = {layer: str(layer) for layer in range(0, last + 1, math.ceil((last + 1) / 15))}
    _draw_fisher(panels[0], bases)
    if models:
        outside = last + max(1.5, 0.05 * last)
        _draw_norms(panels[1], models)
        _draw_alphas(panels[2], models, outside)
        ticks[outside] = "outside"
    _dress(panels, ticks)
    return figure


def _dress(panels: "Sequence[Axes]", ticks: Mapping[float, str]) -> None:
    """Grid, spines and ticks as all our figures have them, over the decoder layers."""
    for panel in panels:
        panel.grid(True, color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(colors=INK, labelsize=9)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[-1].set_xlabel("decoder layer", color=INK)
    panels[-1].set_xticks(list(ticks), list(ticks.values()))


def _draw_kron(report: Mapping[str, Any]) -> "Figure":
    """A strip for each layer, of attention and of MLP: from the least coefficient to the largest, ± std., and the mean.

    The dotted line is what all that has no factors gets.
    """
    from matplotlib.figure import Figure

    models, parts = report["kron"]["models"], ("attention", "mlp")
    figure = Figure(figsize=(8.0, 0.8 + 2.5 * len(parts)), layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0])
    figure.suptitle(f"{report['method']} into {_short(report['base_model'])}", color=INK, fontsize=11)
    names = _short_names([model["model"] for model in models])
    last = max(layer.get("base_index", layer["index"]) for model in models for layer in model["layers"])
    thick = 0.7 / len(models)
    for panel, part in zip(panels, parts, strict=True):
        for i, (model, name, (colour, marker, _)) in enumerate(zip(models, names, _styles(len(models)), strict=True)):
            strips = [
                (layer.get("base_index", layer["index"]), layer["beta"], layer["parts"][part])
                for layer in model["layers"]
                if part in layer["parts"]
            ]
            x = [index + thick * (i - (len(models) - 1) / 2) for index, _, _ in strips]
            least, most = ([strip[key] for _, _, strip in strips] for key in ("least", "largest"))
            low = [max(strip["least"], strip["mean"] - strip["std"]) for _, _, strip in strips]
            high = [min(strip["largest"], strip["mean"] + strip["std"]) for _, _, strip in strips]
            for bottom, top, opacity in ((least, most, 0.3), (low, high, 0.75)):
                height = [b - a for a, b in zip(bottom, top, strict=True)]
                label = name if opacity > 0.5 else None
                panel.bar(x, height, 0.8 * thick, bottom, linewidth=0, color=colour, alpha=opacity, label=label)
            means = [strip["mean"] for _, _, strip in strips]
            panel.plot(x, means, marker, color="white", markeredgecolor=INK, markersize=4)
            betas = [beta for _, beta, _ in strips]
            panel.hlines(betas, [at - 0.5 * thick for at in x], [at + 0.5 * thick for at in x], INK, ":", linewidth=1.2)
        panel.set_ylim(-0.03, 1.03)
        panel.set_ylabel(f"{part}\ncoefficients α", color=INK)
    if len(models) > 1:
        panels[0].legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(models))
    _dress(panels, {layer: str(layer) for layer in range(0, last + 1, math.ceil((last + 1) / 15))})
    return figure


def _draw_fisher(panel: "Axes", bases: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for (name, layers), (_, marker, dash) in zip(bases.items(), _styles(len(bases)), strict=True):
        drawn = [layer for layer in layers if layer["fisher"] > 0]  # zero has no place on a log axis
        fisher = [layer["fisher"] for layer in drawn]
        errors = [layer["fisher_stderr"] or 0.0 for layer in drawn]  # none of a single sequence
        down = [min(error, 0.99 * value) for error, value in zip(errors, fisher, strict=True)]
        panel.errorbar(
            [layer["index"] for layer in drawn],
            fisher,
            yerr=[down, errors],
            color=INK,
            marker=marker,
            linestyle=dash,
            markersize=4,
            linewidth=1.2,
            elinewidth=1.0,
            capsize=2.5,
            label=_short(name),
        )
    panel.set_yscale("log")
    if not any(layer["fisher"] > 0 for layers in bases.values() for layer in layers):
        panel.set_ylim(0.1, 1)  # nothing to draw
    panel.set_ylabel("Fisher information F\n± standard error", color=INK)
    if len(bases) > 1:
        panel.legend(fontsize=8, frameon=False)


def _draw_norms(panel: "Axes", models: Sequence[Mapping[str, Any]]) -> None:
    norms = [[math.sqrt(layer["task_vector_sq_norm"]) for layer in model["layers"]] for model in models]
    _draw_lines(panel, models, norms)
    panel.set_ylim(0, 1.15 * max(map(max, norms)) or 1.0)
    panel.set_ylabel("task-vector norm ‖δ‖", color=INK)
    panel.legend(fontsize=8, frameon=False)


def _draw_alphas(panel: "Axes", models: Sequence[Mapping[str, Any]], outside: float) -> None:
    """The coefficients, and at `outside` on the axis of the layers those of the tensors outside them."""
    alphas = [[layer["alpha"] for layer in model["layers"]] for model in models]
    _draw_lines(panel, models, alphas)
    for model, (colour, marker, _) in zip(models, _styles(len(models)), strict=True):
        panel.plot([outside], [model["alpha_other"]], color=colour, marker=marker, markersize=5, fillstyle="none")
    low, high = min(0.0, *map(min, alphas)), max(1.0, *map(max, alphas))
    panel.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    panel.set_ylabel("merge coefficient α", color=INK)


def _draw_lines(panel: "Axes", models: Sequence[Mapping[str, Any]], values: Sequence[Sequence[float]]) -> None:
    names = _short_names([model["model"] for model in models])
    for model, name, y, (colour, marker, dash) in zip(models, names, values, _styles(len(models)), strict=True):
        x = [layer.get("base_index", layer["index"]) for layer in model["layers"]]
        panel.plot(x, y, color=colour, marker=marker, linestyle=dash, markersize=4, linewidth=1.2, label=name)


def _styles(count: int) -> list[tuple[str, str, str]]:
    return [STYLES[i % len(STYLES)] for i in range(count)]


def _short(name: str) -> str:
    """A model's name without the folders that it lies in."""
    parts = name.rstrip("/").split("/")
    return "/".join(parts[-2:]) if len(parts) == 2 and parts[0] not in ("", ".", "..") else parts[-1]


def _short_names(names: Sequence[str]) -> list[str]:
    """Their short names, with so many of the folders that they lie in as tell them apart."""
    short = [_short(name) for name in names]
    most = max((name.count("/") for name in names), default=0)
    for folders in range(1, most + 1):
        if len(set(short)) == len(set(names)):
            break
        short = ["/".join(name.rstrip("/").split("/")[-folders - 1 :]) for name in names]
    return short
