"""A run's answers -> a log of inspect_ai's, in the process of `served`."""

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.problems.grading import CLOSE, OPEN
from mergekit_fim.evaluate.records import LENGTH


def write(path: str, answers: str, entry: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Write the answers in a file as a log in Inspect's own format, to `path`.

    The entry is what `sweep.json` says of the run, and the identity what it says of the sweep.

    Raises:
        FimError: it can't be written.
    """
    from inspect_ai import log, model

    with open(answers, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    options = {name: identity[name] for name in ("max_tokens", "temperature", "seed")}
    sources = [its["source"] for its in identity["problems"]]
    task = ", ".join(sources)
    samples = [_sample(row, entry["run"], len(sources)) for row in rows]
    ids = [*dict.fromkeys(sample.id for sample in samples)]
    now = datetime.now(timezone.utc).isoformat()
    spec = log.EvalSpec(
        created=now,
        task=task,
        model=entry["run"],
        model_generate_config=model.GenerateConfig(**options),
        dataset=log.EvalDataset(name=task, samples=len(ids), sample_ids=ids),
        config=log.EvalConfig(epochs=identity["samples"]),
        packages=entry["versions"],
        metadata={"family": entry["method"], **{k: entry[k] for k in ("run", "settings", "engine") if k in entry}},
    )
    graded = [row["correct"] for row in rows if row["correct"] is not None]
    accuracy = log.EvalMetric(name="accuracy", value=sum(graded) / len(graded))
    score = log.EvalScore(name="correct", scorer="correct", scored_samples=len(graded), metrics={"accuracy": accuracy})
    made = log.EvalLog(
        status="success",
        eval=spec,
        results=log.EvalResults(total_samples=len(rows), completed_samples=len(rows), scores=[score]),
        stats=log.EvalStats(started_at=now, completed_at=now, model_usage={entry["run"]: _usage(rows)}),
        samples=samples,
    )
    try:
        log.write_eval_log(made, path, format="eval")
    except OSError as error:
        raise FimError(f"{path}: can't be written ({error.strerror or error}); free some space") from error


def _sample(row: Mapping[str, Any], run: str, sources: int) -> Any:
    """Turn an answer into a sample; its id is the problem's number, with the source where there are several."""
    from inspect_ai import log, model
    from inspect_ai.scorer import CORRECT, INCORRECT, Score

    thought, _, said = row["text"].rpartition(CLOSE)
    if row["unclosed"]:
        thought, said = row["text"], ""
    content = [model.ContentReasoning(reasoning=thought.replace(OPEN, "", 1))] if thought else []
    message = model.ChatMessageAssistant(content=[*content, model.ContentText(text=said)], model=run)
    choice = model.ChatCompletionChoice(message=message, stop_reason="max_tokens" if row["ended"] == LENGTH else "stop")
    usage, scores = _usage([row]), {}
    if row["correct"] is not None:
        value = CORRECT if row["correct"] else INCORRECT
        scores["correct"] = Score(value=value, answer=row["found"], explanation=row["note"])
    return log.EvalSample(
        id=row["index"] if sources == 1 else f"{row['source']}, {row['index']}",
        epoch=row["sample"] + 1,
        input=row["prompt"],
        target=row.get("expected") or "",
        messages=[model.ChatMessageUser(content=row["prompt"]), message],
        output=model.ModelOutput(model=run, choices=[choice], usage=usage, time=row["seconds"]),
        scores=scores,
        model_usage={run: usage},
        total_time=row["seconds"],
        metadata={"unclosed": row["unclosed"], "note": row["note"]},
    )


def _usage(rows: list[Any]) -> Any:
    from inspect_ai.model import ModelUsage

    given, written = (sum(row.get(name) or 0 for row in rows) for name in ("prompt_tokens", "tokens"))
    return ModelUsage(input_tokens=given, output_tokens=written, total_tokens=given + written)
