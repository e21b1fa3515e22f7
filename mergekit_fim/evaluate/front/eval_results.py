"""What a run shows -> its results as the Hub reads them in a model's card: `model-index`."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_fim.evaluate.front.findings import Findings

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def eval_results(findings: Findings, run: str, problems: Sequence[Mapping[str, Any]]) -> "Iterator[EvalResult]":
    """Give a run's accuracy and mean tokens on each source of problems, of which `sweep.json` says `problems`."""
    from huggingface_hub import EvalResult

    for its in problems:
        shown = findings.by_source.get(its["source"], findings.summary)[run]
        for metric, value in (("accuracy", shown.accuracy.value), ("mean answer tokens", shown.tokens_mean)):
            yield EvalResult(
                task_type="text-generation",
                metric_type=metric.replace(" ", "_"),
                metric_name=metric,
                metric_value=value,
                **_dataset(its),
            )


def _dataset(problems: Mapping[str, Any]) -> dict[str, Any]:
    """Name a source as the Hub names datasets. A local file or folder goes by the last part of its path."""
    rest = {name: value for name, value in problems.items() if name not in ("kind", "source", "path")}
    kind, source = problems.get("kind"), str(problems["source"])
    local = os.path.basename(os.path.normpath(source))
    if kind == "hf":
        name, config, split = (rest.pop(part) for part in ("dataset", "config", "split"))
        name = os.path.basename(os.path.normpath(name)) if os.path.exists(name) else name
        named = " ".join(filter(None, (name, config, split)))
        told = {"type": name, "name": named, "config": config or None, "split": split}
    elif kind == "reasoning-gym":
        told = {"type": kind, "name": f"{kind} {rest.pop('task')}", "config": source.removeprefix(f"{kind}:")}
    elif kind == "file":
        told = {"type": local, "name": local, "revision": rest.pop("sha256")}
    else:
        told = {"type": source, "name": source}
    return {f"dataset_{part}": value for part, value in {**told, "args": rest}.items()}
