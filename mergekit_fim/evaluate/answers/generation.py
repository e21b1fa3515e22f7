"""A model and prompts -> completions by transformers, in batches that rows leave as they end and others join."""

import math
from collections.abc import Generator, Sequence
from typing import Any

import torch
import transformers
from accelerate.utils import get_max_memory, release_memory
from accelerate.utils.memory import clear_device_cache
from mergekit.options import MergeOptions
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from mergekit_fim.errors import FimError, is_out_of_memory
from mergekit_fim.evaluate.answers.batches import Batch, Row, joined, kept, padded
from mergekit_fim.evaluate.answers.draws import Chooser
from mergekit_fim.evaluate.answers.engine import Decoding, ModelFiles
from mergekit_fim.evaluate.answers.loading import LanguageModel, greedy, load_model
from mergekit_fim.evaluate.answers.prompts import Prompt
from mergekit_fim.evaluate.records import Completion

# Tokens between two looks at which rows have ended, at most, and the part of the rows that must have ended for a look
# before that.
_PIECE, _QUORUM = 256, 8
# Rows at once unless told. On a CPU, a small model wrote with 8, 16, 32 and 64 of them 600, 730, 800 and 960 tokens a
# second (benchmarks/generation.py), each for twice the memory of the last. On accelerators it wasn't measured.
_ROWS_ON_CPU, _ROWS_ON_ACCELERATOR = 32, 128
# Tokens of prompts that go through the model at once, one row's at least: their activations and masks aren't counted.
_PREFILL = 8192


class Transformers:
    """The engine that is always there: it loads each model anew."""

    def __init__(self, options: MergeOptions, dtype: torch.dtype) -> None:
        self._options, self._dtype = options, dtype
        self._model: LanguageModel | None = None

    def open(self, files: ModelFiles) -> dict[str, Any]:
        """See `Engine`."""
        self._model = load_model(files.name, files.path, files.tokenizer, self._options, self._dtype, files.revision)
        network = self._model.model
        return {
            "engine": {"name": "transformers", "version": transformers.__version__, "options": {}},
            "device": str(network.device),
            "dtype": str(network.dtype),
            "stop": list(self._model.stop),
        }

    def answers(self, prompts: Sequence[Prompt], decoding: Decoding) -> Generator[tuple[Prompt, Completion]]:
        """See `Engine`."""
        assert self._model is not None
        return complete(self._model, prompts, decoding)

    def close(self) -> None:
        """See `Engine`."""
        self._model = None
        release_memory()


def complete(
    model: LanguageModel, prompts: Sequence[Prompt], decoding: Decoding
) -> Generator[tuple[Prompt, Completion]]:
    """Let a model answer prompts, many at once, those with the longest prompts first.

    Rows that have ended leave their batch, and others join it; where the model's cache doesn't allow that, batches are
    made anew, of what was written so far. The budget of memory for the cache, half of what is free, halves where memory
    runs out, and what was under way is put back.

    In float32, an answer doesn't depend on what is beside it in a batch, but where two tokens are as likely as each
    other up to rounding, which is coarser in 16 bits. Accelerators are handled as the merge handles them, but this was
    tested on CPUs only.

    Raises:
        FimError: a prompt can't be answered (see `Reader.ids`), not even one row fits in memory, or the logits aren't
            numbers. The first is raised at once.
    """
    read = [(prompt, model.ids(prompt)) for prompt in prompts]
    rows = [Row(prompt, ids, model.room(ids, decoding.max_tokens)) for prompt, ids in read]
    return _completions(model, rows, decoding)


def _completions(model: LanguageModel, waiting: list[Row], decoding: Decoding) -> Generator[tuple[Prompt, Completion]]:
    """Generate until nothing waits: see `complete`."""
    most = decoding.batch or (_ROWS_ON_CPU if model.model.device.type == "cpu" else _ROWS_ON_ACCELERATOR)
    budget = _free_memory(model.model) / 2
    batch: Batch | None = None
    live: list[Row] = []  # the batch's rows that haven't ended
    while waiting or live:
        stay, new = _seated(model, live, waiting, most, budget)
        rows = [*stay, *new]
        waiting = [row for row in (*live, *waiting) if row not in rows]
        try:
            batch = _written_on(model, batch, stay, new, decoding, is_last=not waiting)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                prompt = rows[0].prompt
                raise FimError(
                    f"{model.name}: memory ran out at the {rows[0].length} tokens of {prompt.source}, problem "
                    f"{prompt.index}, alone; lower --max-tokens, or use a device with more memory; the answers so far "
                    "are kept, and the same command goes on"
                ) from error
            batch, budget = None, _needed(model, rows) / 2
        for row in rows:
            if row.ended:
                yield row.prompt, model.completion(row.ids, row.written)
        live = [row for row in rows if not row.ended]
        if batch is None:  # they go on later from what they wrote
            waiting, live = [*waiting, *live], []
            release_memory()  # which the traceback of an error may have held


def _seated(
    model: LanguageModel, live: list[Row], waiting: list[Row], most: int, budget: float
) -> tuple[list[Row], list[Row]]:
    """Choose who is in the next batch, one row at least: who stays, those that wrote most first, and who joins."""
    stay = sorted(live, key=lambda row: -len(row.written))
    while len(stay) > 1 and _needed(model, stay) > budget:
        stay.pop()
    new: list[Row] = []
    for row in sorted(waiting, key=lambda row: -row.length):
        rows = [*stay, *new, row]
        if len(rows) > most or (len(rows) > 1 and _needed(model, rows) > budget):
            break
        if new and ((len(new) + 1) * new[0].length > _PREFILL or not (model.pads or row.length == new[0].length)):
            break
        new.append(row)
    return stay, new


def _needed(model: LanguageModel, rows: list[Row]) -> float:
    """Count the bytes of the cache of some rows, before they are looked at again."""
    steps = _PIECE if model.joins else math.inf
    width = max(row.length + min(steps, row.limit - len(row.written)) for row in rows)
    return len(rows) * (model.row_bytes + width * model.token_bytes)


def _free_memory(model: PreTrainedModel) -> float:
    """Count the bytes that are free for the cache, on all the devices that the model is on."""
    clear_device_cache()
    free = {str(device): size for device, size in get_max_memory().items()}
    if model.device.type in ("cpu", "mps"):
        return free[model.device.type]
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()} & free.keys() - {"cpu"}
    places = places or {str(model.device.index or 0)}
    return min(free[place] for place in places) * len(places)


def _written_on(
    model: LanguageModel, batch: Batch | None, stay: list[Row], new: list[Row], decoding: Decoding, *, is_last: bool
) -> Batch | None:
    """Write on in the rows of a batch that stay, or begin with those that are new; None if none can join them."""
    if not model.joins:  # at half of the rows, what the others wrote is worth being read again
        enough = len(new) if is_last else (len(new) + 1) // 2
        _advanced(model, Batch(new), max(row.limit for row in new), enough, decoding)
        return None
    if batch and len(stay) < len(batch.rows):
        batch = kept(batch, stay) if stay else None
    if batch and not new:
        return _advanced(model, batch, _PIECE, max(1, len(stay) // _QUORUM), decoding)
    return joined(batch, _advanced(model, Batch(new), 1, len(new), decoding))


def _advanced(model: LanguageModel, batch: Batch, most: int, enough: int, decoding: Decoding) -> Batch:
    """Write on, until `enough` rows have ended, one is at its limit, or `most` tokens were written."""
    steps = min(most, min(row.limit - len(row.written) for row in batch.rows))
    ids, mask = padded(batch.rows, model.model.device)
    cache = {} if batch.cache is None else {"past_key_values": batch.cache}
    written = [(row.prompt.key, len(row.written)) for row in batch.rows]
    chooser = Chooser(written, decoding.temperature, decoding.seed)
    ending = _Enough(torch.tensor(model.stop, dtype=ids.dtype, device=ids.device), enough)
    hooks = {"logits_processor": LogitsProcessorList([chooser]), "stopping_criteria": StoppingCriteriaList([ending])}
    generate: Any = model.model.generate
    out = generate(ids, attention_mask=mask, generation_config=greedy(steps), **hooks, **cache)
    if bool(chooser.unusable):
        raise FimError(f"{model.name}: some logits aren't numbers; try another dtype, and check the model's weights")
    for row, tokens in zip(batch.rows, out.sequences[:, ids.shape[1] :].tolist(), strict=True):
        row.take(tokens, model.stop)
    return Batch(batch.rows, out.past_key_values if model.joins else None)


class _Enough(StoppingCriteria):
    """Ends a batch, all its rows at once, when some number of them have ended."""

    def __init__(self, stop: torch.Tensor, enough: int) -> None:
        self._stop, self._enough = stop, enough
        self._ended: torch.Tensor | bool = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._ended = torch.isin(input_ids[:, -1], self._stop) | self._ended
        return (self._ended.sum() >= self._enough).expand(len(input_ids))
