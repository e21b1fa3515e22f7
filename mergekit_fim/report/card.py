"""Our section in a merged model's card: made from `fim_report.json`, at the end of mergekit's README.md."""

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from mergekit_fim.config.parameters import PARAMETERS, Scope
from mergekit_fim.errors import reason
from mergekit_fim.files import REPORT_NAME, read_json, write_text
from mergekit_fim.text import escaped, markdown_table

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

LOG = logging.getLogger("mergekit_fim")

_BEGIN, _END, _MEASURED = "<!-- mergekit-fim -->", "<!-- /mergekit-fim -->", "### Measured"
_SECTION = re.compile(rf"^{_BEGIN}\n(?P<body>.*?)^{_END}\n?", re.M | re.S)
_FIGURE = re.compile(r"^!\[.*\]\((.*)\)$", re.M)
_ALT_KRON = "Per decoder layer: the directions' merge coefficients, from the least to the largest, and their mean"
_ALT = "Per decoder layer: Fisher information, norm of the task vector, and merge coefficient"


def write_section(
    folder: str, *, figure: str | None = None, measured: str | None = None, results: "Iterable[EvalResult]" = ()
) -> None:
    """Append our section to the card of a merged model, or replace the section in it. What isn't given stays.

    A failure is only a warning, since the model is finished. A folder without a card is left as it is.

    Args:
        folder: the merged model's. Without a `fim_report.json` (a merge by mergekit's own methods) the section has only
            `measured`.
        figure: the name of a figure in the folder, for a card that has the section.
        measured: Markdown of what a sweep measured of the model, such as its row of the front with the table's head.
        results: what the Hub is to read in the card's head, as `model-index`.
    """
    path, report = os.path.join(folder, "README.md"), os.path.join(folder, REPORT_NAME)
    if not os.path.isfile(path):
        return
    with _warned():
        with open(path, encoding="utf-8") as file:
            text = file.read()
        old = _SECTION.search(text)
        if old is None and figure is not None:
            return
        own, _, old_measured = (old["body"] if old else "").partition(f"\n{_MEASURED}\n\n")
        old_figure = _FIGURE.search(own)
        section = render_section(
            read_json(report) if os.path.exists(report) else None,
            figure=quote(figure) if figure is not None else old_figure and old_figure[1],
            measured=measured if measured is not None else old_measured.rstrip("\n") or None,
        )
        new = text[: old.start()] + section + text[old.end() :] if old else f"{text.rstrip()}\n\n{section}"
        if found := list(results):
            from huggingface_hub import ModelCard, ModelCardData

            card = ModelCard(new)
            data = cast(ModelCardData, card.data)
            data.model_name, data.eval_results = os.path.basename(folder), found
            new = str(card)
        write_text(path, new)


def new_section(folder: str) -> str:
    """Make our section for a card that the caller writes beside a report; empty, with a warning, if that fails."""
    with _warned():
        return render_section(read_json(os.path.join(folder, REPORT_NAME)))
    return ""


@contextlib.contextmanager
def _warned() -> Iterator[None]:
    """Warn of whatever goes wrong."""
    try:
        yield
    except Exception as error:
        LOG.warning("the merged model is whole, but its card has no section of mergekit-fim's (%s)", reason(error))


def render_section(report: Mapping[str, Any] | None, *, figure: str | None = None, measured: str | None = None) -> str:
    """Make the section as Markdown: of a report, with the address of a figure, and what a sweep measured."""
    blocks = [_BEGIN] if report is None else [_BEGIN, *_report_blocks(report, figure)]
    blocks += [] if measured is None else [_MEASURED, measured.strip("\n")]
    return "\n\n".join([*blocks, _END]) + "\n"


def _report_blocks(report: Mapping[str, Any], figure: str | None) -> Iterator[str]:
    versions = report["versions"]
    is_by_hand = not (report["fisher"] or report["fisher_of_other_bases"] or "kron" in report)
    yield "## Merge coefficients"
    yield from _kron_blocks(report, figure) if "kron" in report else _layer_blocks(report, figure)
    yield "### Settings"
    names = ("model", "base_model", "weight", "density", "alpha")
    yield markdown_table(names, ([_value(model[name]) for name in names] for model in report["models"]))
    unused = {name for name, p in PARAMETERS.items() if p.scope is Scope.MERGE} if is_by_hand else set()
    used = {name: value for name, value in report["settings"].items() if value is not None and name not in unused}
    yield markdown_table(("setting", "value"), ((f"`{name}`", _value(value)) for name, value in used.items()))
    if report["warnings"]:
        yield "### Warnings"
        yield "\n".join(f"- {escaped(warning)}" for warning in report["warnings"])
    yield "### How to repeat it"
    yield "With the configuration above, which lies beside this card:"
    yield "```sh\nmergekit-fim merge mergekit_config.yml merged   # or: mergekit-yaml mergekit_config.yml merged\n```"
    yield f"Made with {', '.join(f'{name} {version}' for name, version in versions.items())}."


def _layer_blocks(report: Mapping[str, Any], figure: str | None) -> Iterator[str]:
    """Say what `fim_ties` or `fim_ta` did: the coefficient of each layer."""
    settings = report["settings"]
    bases = {report["base_model"]: report["fisher"], **report["fisher_of_other_bases"]}
    yield (
        f"Merged by `{report['method']}` of mergekit-fim {report['versions']['mergekit-fim']}, after FIM-Merging "
        "([arXiv 2603.21705](https://arxiv.org/abs/2603.21705)): each decoder layer has a merge coefficient α of "
        "its own, which follows from its score F · ‖δ‖², the base's Fisher information on random tokens times the "
        "squared norm of the task vector δ." + ("" if any(bases.values()) else " Here every α was set by hand.")
    )
    if figure is not None:
        yield f"![{_ALT}]({figure})"
    for model in report["models"]:
        if model["layers"]:
            fisher = bases[model["base_model"]]
            yield f"### {escaped(model['model'])} into {escaped(model['base_model'])}"
            yield (
                f"Fisher information of the base in {fisher['dtype']}, on {settings['fisher_samples']} × "
                f"{settings['fisher_seq_len']} random tokens; `outside`: embeddings, final norm and output head."
            )
            yield markdown_table(("layer", "Fisher", "±", "‖δ‖", "score", "α"), _layers(model, fisher), "--:")


def _layers(model: Mapping[str, Any], fisher: Mapping[str, Any]) -> Iterator[list[str]]:
    measured = {layer["index"]: layer for layer in fisher["layers"]}
    for layer in model["layers"]:
        its = measured[layer.get("base_index", layer["index"])]
        yield [
            _name(layer),
            f"{its['fisher']:.3e}",
            "" if its["fisher_stderr"] is None else f"{its['fisher_stderr']:.1e}",
            f"{math.sqrt(layer['task_vector_sq_norm']):.3g}",
            f"{layer['score']:.2e}",
            f"{layer['alpha']:.3f}",
        ]
    yield ["outside", "", "", "", "", f"{model['alpha_other']:.3f}"]


def _kron_blocks(report: Mapping[str, Any], figure: str | None) -> Iterator[str]:
    """Say what `fim_kron` did: the coefficients of each layer's directions."""
    kron, its = report["kron"], report["kron"]["factors"][0]["settings"]
    yield (
        f"Merged by `{report['method']}` of mergekit-fim {report['versions']['mergekit-fim']}: each direction of a "
        f"matrix has a coefficient of its own, which follows from its size in the inputs of every linear layer at the "
        f"base and at the fine-tuned models, on {its['samples']} × {its['seq_len']} random tokens (Kronecker factors "
        "as in K-FAC, [arXiv 1503.05671](https://arxiv.org/abs/1503.05671); by inputs alone a weighted RegMean, "
        "[arXiv 2212.09849](https://arxiv.org/abs/2212.09849)). Below stand their mean and standard deviation, the "
        "least and the largest, and how many directions are told apart, of attention and of MLP."
    )
    if figure is not None:
        yield f"![{_ALT_KRON}]({figure})"
    head = ("layer", "‖δ‖", "α", *("mean", "±", "least", "largest", "number") * 2)
    for model in kron["models"]:
        yield f"### {escaped(model['model'])} into {escaped(model['base_model'])}"
        yield markdown_table(head, _kron_layers(model), "--:")


def _kron_layers(model: Mapping[str, Any]) -> Iterator[list[str]]:
    for layer in model["layers"]:
        row = [_name(layer), f"{math.sqrt(layer['task_vector_sq_norm']):.3g}", f"{layer['alpha']:.3f}"]
        for part in (layer["parts"].get(name) for name in ("attention", "mlp")):
            numbers = [] if part is None else [part[name] for name in ("mean", "std", "least", "largest")]
            row += [""] * 5 if part is None else [*(f"{n:.3f}" for n in numbers), f"{part['directions']:.0f}"]
        yield row
    yield ["outside", "", f"{model['alpha_other']:.3f}", *[""] * 10]


def _name(layer: Mapping[str, Any]) -> str:
    """Write the base's number of a layer, and the model's own if slices make it another."""
    return f"{layer['base_index']} (from {layer['index']})" if "base_index" in layer else f"{layer['index']}"


def _value(value: Any) -> str:
    return "" if value is None else escaped(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
