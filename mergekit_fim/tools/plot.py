"""A report or a measurement -> a figure: per decoder layer, Fisher information, task-vector norm and coefficient."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_fim.errors import FimError
from mergekit_fim.files import REPORT_FORMAT, read_json, written_whole
from mergekit_fim.measurements.file import FORMAT, from_json, layers_as_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")

# Okabe and Ito's colours, which colour-blind readers tell apart, from dark to light; a marker and a dash of its own for
# readers in greyscale.
_STYLES = [
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#56B4E9", "v", "-"),
    ("#E69F00", "P", "--"),
]
_INK = "#333333"


@dataclass(frozen=True)
class FisherCurve:
    """The Fisher information of one base model: [layer] index, value and standard error (None for one sequence)."""

    name: str
    layers: tuple[int, ...]
    fisher: tuple[float, ...]
    stderr: tuple[float | None, ...]


@dataclass(frozen=True)
class ModelCurve:
    """One fine-tuned model: [layer] the base's layer, ‖δ‖ and α; α outside the decoder layers."""

    name: str
    layers: tuple[int, ...]
    norms: tuple[float, ...]
    alphas: tuple[float, ...]
    alpha_other: float | None


@dataclass(frozen=True)
class Curves:
    """What a figure shows."""

    title: str
    fisher: tuple[FisherCurve, ...]
    models: tuple[ModelCurve, ...]


def read_curves(path: str) -> Curves:
    """Read what there is to draw in a merge's report or in a measurement's file.

    Raises:
        FimError: it is neither, or has nothing to draw.
    """
    content = read_json(path, path)
    kind = content.get("format") if isinstance(content, dict) else None
    if kind == FORMAT:
        found = from_json(content, path)
        return Curves(found.model.id, (_fisher_curve(found.model.id, layers_as_json(found.fisher)),), ())
    if kind != REPORT_FORMAT:
        raise FimError(
            f"{path}: expected a report of a merge ({REPORT_FORMAT}) or a measurement ({FORMAT}), found "
            f"{kind or 'neither'}; name a fim_report.json or what `mergekit-fim fisher` wrote"
        )
    return report_curves(content, path)


def report_curves(report: Mapping[str, Any], where: str) -> Curves:
    """What there is to draw in a report.

    Raises:
        FimError: it has nothing to draw, or isn't one that this package wrote.
    """
    try:
        bases = {report["base_model"]: report["fisher"], **report["fisher_of_other_bases"]}
        fisher = [_fisher_curve(name, part["layers"]) for name, part in bases.items() if part]
        models = [_model_curve(model) for model in report["models"] if model["layers"]]
        title = f"{report['method']} into {_short(report['base_model'])}"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FimError(f"{where}: the report is damaged ({error!r}); merge or plan again") from error
    if not fisher:
        raise FimError(f"{where}: nothing to draw, as every alpha of this merge was set by hand; set fewer by hand")
    return Curves(title, tuple(fisher), tuple(models))


def _fisher_curve(name: str, layers: Sequence[Mapping[str, Any]]) -> FisherCurve:
    errors = tuple(None if layer["fisher_stderr"] is None else float(layer["fisher_stderr"]) for layer in layers)
    return FisherCurve(
        str(name),
        tuple(int(layer["index"]) for layer in layers),
        tuple(float(layer["fisher"]) for layer in layers),
        errors,
    )


def _model_curve(model: Mapping[str, Any]) -> ModelCurve:
    layers = model["layers"]
    return ModelCurve(
        str(model["model"]),
        tuple(int(layer.get("base_index", layer["index"])) for layer in layers),
        tuple(math.sqrt(float(layer["task_vector_sq_norm"])) for layer in layers),
        tuple(float(layer["alpha"]) for layer in layers),
        model["alpha_other"],
    )


def check_figure(path: str) -> None:
    """Check that a figure can be drawn for a file name, before the work that it is for.

    Raises:
        FimError: its format is another one, or matplotlib isn't installed.
    """
    ending = os.path.splitext(path)[1].lower().removeprefix(".")
    if ending not in FORMATS:
        raise FimError(f"{path}: expected a file name that ends in {' or '.join('.' + f for f in FORMATS)}; change it")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FimError(
            "drawing needs matplotlib, which isn't installed; run: pip install 'mergekit-fim[plot]'"
        ) from None


def write_figure(curves: Curves, path: str) -> None:
    """Draw a figure into a PNG or SVG file, by the ending of its name; atomically, and the same bytes every time.

    Raises:
        FimError: `check_figure`, or the file can't be written.
    """
    check_figure(path)
    import matplotlib

    ending = os.path.splitext(path)[1].lower().removeprefix(".")
    with matplotlib.rc_context({"svg.hashsalt": "mergekit-fim"}), written_whole(path) as part:
        metadata = {"Date": None} if ending == "svg" else {"Software": None}
        draw(curves).savefig(part, format=ending, dpi=150, metadata=metadata)


def draw(curves: Curves) -> "Figure":
    """Draw Fisher information, task-vector norms and coefficients below one another, over the decoder layers."""
    from matplotlib.figure import Figure

    count = 3 if curves.models else 1
    figure = Figure(figsize=(8.0, 1.0 + 2.3 * count), layout="constrained")
    panels: list[Axes] = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    figure.suptitle(curves.title, color=_INK, fontsize=11)
    last = max(layer for base in curves.fisher for layer in base.layers)
    ticks: dict[float, str] = {layer: str(layer) for layer in range(0, last + 1, math.ceil((last + 1) / 15))}
    _draw_fisher(panels[0], curves.fisher)
    if curves.models:
        outside = last + max(1.5, 0.05 * last)
        _draw_norms(panels[1], curves.models)
        _draw_alphas(panels[2], curves.models, outside)
        ticks[outside] = "outside"
    for panel in panels:
        panel.grid(True, color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(colors=_INK, labelsize=9)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[-1].set_xlabel("decoder layer", color=_INK)
    panels[-1].set_xticks(list(ticks), list(ticks.values()))
    return figure


def _draw_fisher(panel: "Axes", bases: Sequence[FisherCurve]) -> None:
    for base, (_, marker, dash) in zip(bases, _cycle(len(bases)), strict=True):
        drawn = [i for i, value in enumerate(base.fisher) if value > 0]  # zero has no place on a log axis
        x, y = [base.layers[i] for i in drawn], [base.fisher[i] for i in drawn]
        errors = [base.stderr[i] or 0.0 for i in drawn]
        down = [min(error, 0.99 * value) for error, value in zip(errors, y, strict=True)]
        panel.errorbar(
            x,
            y,
            yerr=[down, errors],
            color=_INK,
            marker=marker,
            linestyle=dash,
            markersize=4,
            linewidth=1.2,
            elinewidth=1.0,
            capsize=2.5,
            label=_short(base.name),
        )
    panel.set_yscale("log")
    if not any(value > 0 for base in bases for value in base.fisher):
        panel.set_ylim(0.1, 1)  # nothing to draw
    panel.set_ylabel("Fisher information F\n± standard error", color=_INK)
    if len(bases) > 1:
        panel.legend(fontsize=8, frameon=False)


def _draw_norms(panel: "Axes", models: Sequence[ModelCurve]) -> None:
    _draw_lines(panel, models, [model.norms for model in models])
    panel.set_ylim(0, 1.15 * max(norm for model in models for norm in model.norms) or 1.0)
    panel.set_ylabel("task-vector norm ‖δ‖", color=_INK)
    panel.legend(fontsize=8, frameon=False)


def _draw_alphas(panel: "Axes", models: Sequence[ModelCurve], outside: float) -> None:
    """The coefficients, and at `outside` on the axis of the layers those of the tensors outside them."""
    _draw_lines(panel, models, [model.alphas for model in models])
    for model, (colour, marker, _) in zip(models, _cycle(len(models)), strict=True):
        if model.alpha_other is not None:
            panel.plot([outside], [model.alpha_other], color=colour, marker=marker, markersize=5, fillstyle="none")
    low = min(0.0, *(alpha for model in models for alpha in model.alphas))
    high = max(1.0, *(alpha for model in models for alpha in model.alphas))
    panel.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    panel.set_ylabel("merge coefficient α", color=_INK)


def _draw_lines(panel: "Axes", models: Sequence[ModelCurve], values: Sequence[Sequence[float]]) -> None:
    names = _short_names([model.name for model in models])
    for model, name, y, (colour, marker, dash) in zip(models, names, values, _cycle(len(models)), strict=True):
        panel.plot(
            model.layers,
            y,
            color=colour,
            marker=marker,
            linestyle=dash,
            markersize=4,
            linewidth=1.2,
            label=name,
        )


def _cycle(count: int) -> list[tuple[str, str, str]]:
    return [_STYLES[i % len(_STYLES)] for i in range(count)]


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
