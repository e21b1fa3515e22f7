"""A log of Inspect -> its rows, one at a time."""

from collections.abc import Iterator
from typing import Any

from mergekit_fim.errors import FimError, brief, reason, require, shown
from mergekit_fim.evaluate.records import Row


def read_log(path: str) -> Iterator[Row]:
    """Read the rows of an `.eval` log: of each sample its id, epoch, first score, and output tokens in all its turns.

    The task is the source. The run is called by the log's metadata `run`, else by its model; metadata `family` and
    `strength` say what it is of.

    Raises:
        FimError: it can't be read, isn't complete, or a sample has no score from 0 to 1 or no count of tokens.
    """
    require("inspect_ai", "inspect")
    from inspect_ai.log import read_eval_log, read_eval_log_samples
    from inspect_ai.scorer import value_to_float

    try:
        head = read_eval_log(path, header_only=True).eval
        run, family, settings = _run(path, head)
        for sample in read_eval_log_samples(path):
            where = f"{path}, sample {brief(sample.id)}, epoch {sample.epoch}"
            usage = sample.model_usage.get(head.model) or sample.output.usage
            if usage is None:
                raise FimError(f"{where}: expected a count of output tokens, found none; use a model that counts them")
            value = next((its.value for its in (sample.scores or {}).values()), None)
            score = value_to_float()(value) if isinstance(value, (str, int, float)) else -1.0
            if not 0 <= score <= 1:
                raise FimError(
                    f"{where}: expected a score from 0 to 1, or C, P or I, found {shown(value)}; score it anew"
                )
            yield Row(
                run=run,
                method=family,
                settings=settings,
                source=head.task,
                problem=str(sample.id),
                sample=sample.epoch - 1,
                correct=score,
                tokens=usage.output_tokens,
                truncated=sample.output.stop_reason == "max_tokens",
                empty=not sample.output.completion.strip(),
            )
    except FimError:
        raise
    except Exception as error:  # of zip files, JSON, pydantic, and Inspect's own of logs that lack samples
        raise FimError(
            f"{path}: expected a complete log of Inspect, found one that can't be read ({reason(error)}); finish the "
            "evaluation, or leave it out"
        ) from error


def _run(path: str, head: Any) -> tuple[str, str | None, dict[str, float]]:
    """Tell which run a log is of, its family and its settings, which a sweep's own logs have in full."""
    told = head.metadata or {}
    strength, family = told.get("strength"), told.get("family")
    if strength is not None and not (isinstance(strength, (int, float)) and abs(strength) < float("inf")):
        raise FimError(f"{path}: expected a number as the metadata `strength`, found {shown(strength)}; correct it")
    settings = told.get("settings") or ({} if strength is None else {"strength": float(strength)})
    return str(told.get("run", head.model)), None if family is None else str(family), settings
