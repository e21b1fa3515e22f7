"""A model and prompts -> completions by transformers, in batches that rows leave as they end and others join."""

import contextlib
import gc
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import transformers
from accelerate.utils import get_max_memory
from mergekit.options import MergeOptions
from torch import nn
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from mergekit_fim.errors import FimError, check_own_code, is_out_of_memory, reason
from mergekit_fim.evaluate.records import LENGTH, STOP, Completion
from mergekit_fim.fisher.loading import placement, running_dtype
from mergekit_fim.models.language import auto_class

# Tokens between two looks at which rows have ended, at most, and the part of the rows that must have ended for a look
# before that.
_PIECE, _QUORUM = 256, 8
# Rows at once unless told. On a CPU, a small model wrote with 8, 16, 32 and 64 of them 600, 730, 800 and 960 tokens a
# second (benchmarks/generation.py), each for twice the memory of the last. On accelerators it wasn't measured.
_ROWS_ON_CPU, _ROWS_ON_ACCELERATOR = 32, 128
# Tokens of prompts that go through the model at once, one row's at least: their activations and masks aren't counted.
_PREFILL = 8192

_KEPT = "the answers so far are kept, and the same command goes on"


@dataclass(frozen=True)
class Prompt:
    """What a model is to go on from.

    Attributes:
        source: the problem's source.
        index: the problem's number in it.
        sample: which of several answers to it. On these three, the seed and the text depends what is sampled.
        text: the prompt.
        special: whether the tokenizer adds its special tokens, such as BOS. The text of a chat template has its own.
    """

    source: str
    index: int
    sample: int
    text: str
    special: bool


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A loaded model with all that generation needs to know of it.

    Attributes:
        name: as messages call it.
        model: the model, in evaluation mode, with a generation config that sets nothing.
        tokenizer: its tokenizer.
        stop: the tokens that end an answer, sorted.
        context: how many tokens of prompt and answer together it takes; None where that isn't known.
        joins: whether its cache is keys and values by token alone, so that rows can leave and join a batch.
        pads: whether it passes over padding; else only rows of one length can be in a batch.
        row_bytes: what its cache takes for a row of any length.
        token_bytes: and for each token of it.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop: tuple[int, ...]
    context: int | None
    joins: bool
    pads: bool
    row_bytes: float
    token_bytes: float


@dataclass(eq=False)
class _Row:
    """A prompt and what was written after it so far; `limit` is how many tokens that may be."""

    prompt: Prompt
    ids: list[int]
    limit: int
    written: list[int] = field(default_factory=list)
    ended: str | None = None

    @property
    def length(self) -> int:
        return len(self.ids) + len(self.written)

    def take(self, tokens: Sequence[int], stop: frozenset[int]) -> None:
        """Write on, up to the end of the answer."""
        for token in tokens:
            self.written.append(token)
            if token in stop:
                self.ended = STOP
            elif len(self.written) == self.limit:
                self.ended = LENGTH
            if self.ended:
                return


@dataclass(frozen=True, eq=False)
class _Batch:
    """Rows that are generated together, padded on the left.

    Attributes:
        rows: what they are.
        ids: all their tokens, [row, position].
        mask: 0 where they are padding, likewise.
        cache: the model's, of all positions but the last; None where it has seen none.
    """

    rows: list[_Row]
    ids: torch.Tensor
    mask: torch.Tensor
    cache: Any = None


def load_tokenizer(name: str, path: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        name: the model, as messages call it.
        path: its folder, or its name on the Hub.
        revision: of the Hub's.
        trust_remote_code: whether it may bring code of its own.

    Raises:
        FimError: there is none that can be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # each kind of tokenizer has its own
        check_own_code(error)
        raise FimError(
            f"{name}: expected a model with a tokenizer, found none that can be loaded ({reason(error)}); put the "
            "tokenizer's files into its folder"
        ) from error
    return tokenizer


def load_model(
    name: str,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    options: MergeOptions,
    dtype: torch.dtype | None,
    revision: str | None = None,
) -> LanguageModel:
    """Load a model for generation, onto the devices that the merge's options name.

    Args:
        name: the model, as messages call it.
        path: its folder, or its name on the Hub.
        tokenizer: its tokenizer.
        options: the merge's options.
        dtype: what to run it in; None for the checkpoint's own, or float32 on a CPU that isn't slower in that.
        revision: of the Hub's.

    Raises:
        FimError: it can't be loaded, lacks weights, or there is no such device.
    """
    where = placement(options)
    devices: dict[str, Any] = {}
    if where.device.type != "cpu":
        devices = {"device_map": "auto" if where.spread else {"": where.device}}
    try:
        with _no_progress_bars():
            where_from: dict[str, Any] = {
                "revision": revision,
                "trust_remote_code": options.trust_remote_code,
                "cache_dir": options.transformers_cache,
            }
            config = transformers.AutoConfig.from_pretrained(path, **where_from)
            kind = auto_class(config, options.trust_remote_code) or transformers.AutoModelForCausalLM
            loaded: Any = kind.from_pretrained(
                path, dtype=dtype or "auto", output_loading_info=True, **where_from, **devices
            )
    except Exception as error:  # transformers, huggingface_hub, safetensors and torch have their own
        check_own_code(error)
        wanted = "memory for its weights" if is_out_of_memory(error) else "a causal language model that can be loaded"
        raise FimError(f"{name}: expected {wanted}, found none ({reason(error)})") from error
    model, found = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    if found["missing_keys"]:
        raise FimError(
            f"{name}: the checkpoint lacks {len(found['missing_keys'])} of the model's tensors, such as "
            f"{min(found['missing_keys'])}, which would be random; download or save the model again"
        )
    if dtype is None and model.dtype in (torch.bfloat16, torch.float16):
        nn.Module.to(model, running_dtype(model.dtype, where.device))
    model.eval()
    stop = _stop_tokens(model, tokenizer)
    # What it sets, such as a repetition penalty, would go into every `generate` that doesn't say otherwise.
    model.generation_config = GenerationConfig()
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    try:
        return LanguageModel(name, model, tokenizer, stop, context, *_probe(model, context))
    except Exception as error:  # whatever its own code raises
        raise FimError(f"{name}: transformers can't generate with this model ({reason(error)})") from error


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer: all that the configs and the tokenizer name, and the chat template's."""
    configs = (model.generation_config, model.config, model.config.get_text_config())
    named = [getattr(config, "eos_token_id", None) for config in configs]
    named += [tokenizer.eos_token_id, _end_of_turn(tokenizer)]
    found: set[int] = set()
    for ids in named:
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return tuple(sorted(found))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends what the assistant says, if there is one."""
    if not tokenizer.chat_template:
        return None
    said = "2b7e151628aed2a6"
    turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": said}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # whatever a template raises; who makes the prompts by it says so
        return None
    ids = tokenizer.encode(text.rpartition(said)[2].lstrip(), add_special_tokens=False)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    return ids[0] if said in text and ids and ids[0] in special else None


def _probe(model: PreTrainedModel, context: int | None) -> tuple[bool, bool, float, float]:
    """The last four attributes of `LanguageModel`, found by trying: the model alone knows what its cache is.

    A row of n tokens is continued alone, and beside one of 2n, so that it is padded.
    """
    n = max(1, min(8, (context or 16) // 2))
    ids = torch.stack([torch.arange(2 * n) % _vocabulary(model)] * 2).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, :n] = 0
    generate: Any = model.generate
    alone, both = (
        generate(ids[rows, begin:], attention_mask=mask[rows, begin:], generation_config=_config(1, output_logits=True))
        for rows, begin in ((slice(1, 2), n), (slice(2), 0))
    )
    expected, found = alone.logits[0][0].float(), both.logits[0][1].float()
    # 16 bits round otherwise in a batch; a model that reads its padding is off by as much as its logits differ.
    tolerance = 0.05 if model.dtype.itemsize >= 4 else 0.25
    pads = bool((expected - found).abs().max() <= tolerance * expected.std(correction=0))
    layers = getattr(both.past_key_values, "layers", ())
    joins = pads and isinstance(both.past_key_values, DynamicCache) and all(type(x) is DynamicLayer for x in layers)
    one, two = _nbytes(alone.past_key_values), _nbytes(both.past_key_values) / 2
    if not one:  # a cache of a kind of its own: what full attention would take, at most
        shape: Any = model.config.get_text_config()
        return joins, pads, 0.0, 2.0 * shape.num_hidden_layers * shape.hidden_size * model.dtype.itemsize
    token = max(0.0, (two - one) / n)
    return joins, pads, max(0.0, one - n * token), token


def _vocabulary(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def _nbytes(cache: Any) -> int:
    """The size of the tensors in a cache."""
    values: list[Any] = [value for layer in getattr(cache, "layers", ()) for value in vars(layer).values()]
    values += [part for value in values if isinstance(value, dict) for part in value.values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _config(steps: int, **changes: Any) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, disable_compile=True, **changes
    )


def complete(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int | None = None,
) -> Iterator[tuple[Prompt, Completion]]:
    """Let a model answer prompts, many at once.

    Those with the longest prompts come first. Once some rows of a batch have ended they leave it, and others join it;
    where the model's cache doesn't allow that, batches are made anew, of what was written so far. The budget of memory
    for the cache, half of what is free, halves where memory runs out, and what was under way is put back.

    In float32, an answer doesn't depend on what is beside it in a batch, but where two tokens are as likely as each
    other up to rounding. In 16 bits rounding is coarser, so that it does. Accelerators are handled as the merge handles
    them, but this was tested on CPUs only.

    Args:
        model: the model.
        prompts: what it is to go on from.
        max_tokens: how many tokens an answer may have, if the model's context has room for them.
        temperature: what the logits are divided by before a token is drawn; at 0, the likeliest is taken.
        seed: of the draws, together with source, index and sample of the prompt.
        batch: rows at once, at most; None for a number that suits the device.

    Returns:
        Each prompt with its completion, as soon as that has ended.

    Raises:
        FimError: a prompt is empty or leaves no room in the context, a token isn't in the model's vocabulary, not even
            one row fits in memory, or the logits aren't numbers. All but the last two are raised at once.
    """
    if max_tokens < 1 or (batch is not None and batch < 1) or not 0 <= temperature < math.inf:
        raise FimError(
            "expected at least one token and one row, and a temperature of 0 or above, found max_tokens "
            f"{max_tokens}, batch {batch}, temperature {temperature}"
        )
    rows = [_row(model, prompt, max_tokens) for prompt in prompts]
    on_cpu = model.model.device.type == "cpu"
    most = batch or (_ROWS_ON_CPU if on_cpu else _ROWS_ON_ACCELERATOR)
    return _completions(model, rows, most, lambda at: _Chooser(at, temperature, seed))


def _row(model: LanguageModel, prompt: Prompt, max_tokens: int) -> _Row:
    where = f"{prompt.source}, problem {prompt.index}"
    try:
        ids = model.tokenizer.encode(prompt.text, add_special_tokens=prompt.special, verbose=False)
    except Exception as error:  # such as of text that isn't Unicode
        raise FimError(f"{where}: the tokenizer of {model.name} can't read the prompt ({reason(error)})") from error
    if not ids:
        raise FimError(f"{where}: the prompt is empty; expected one token at least for {model.name} to go on from")
    known = _vocabulary(model.model)
    if max(ids) >= known:
        raise FimError(
            f"{where}: the tokenizer gives token {max(ids)}, but {model.name} knows {known}; expected the model's own "
            "tokenizer"
        )
    if model.context is not None and len(ids) >= model.context:
        raise FimError(
            f"{where}: the prompt has {len(ids)} tokens, which leaves no room for an answer: {model.name} takes "
            f"{model.context} with it; leave that problem out"
        )
    return _Row(prompt, ids, max_tokens if model.context is None else min(max_tokens, model.context - len(ids)))


def _completions(
    model: LanguageModel, waiting: list[_Row], most: int, choosing: Callable[[list[_Row]], "_Chooser"]
) -> Iterator[tuple[Prompt, Completion]]:
    """Generate until nothing waits: see `complete`."""
    _put_back([], waiting)
    budget = _free_memory(model.model) / 2
    batch: _Batch | None = None
    live: list[_Row] = []  # the batch's rows that haven't ended
    while waiting or live:
        if len(fitting := _fitting(model, live, budget)) < len(live):
            _put_back([row for row in live if row not in fitting], waiting)
            live = fitting
        new = _taken(model, waiting, live, most, budget)
        rows = [*live, *new]
        out_of_memory = False
        try:
            if batch and len(live) < len(batch.rows):
                batch = _kept(batch, live) if live else None
            if not new and batch:
                batch = _advanced(model, batch, _PIECE, max(1, len(rows) // _QUORUM), choosing)
            elif model.joins:
                batch = _joined(batch, _advanced(model, _started(model, new), 1, len(new), choosing))
            else:  # at half of the rows, what the others wrote is worth being read again
                enough = (len(rows) + 1) // 2 if waiting else len(rows)
                _advanced(model, _started(model, new), max(row.limit for row in new), enough, choosing)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                prompt = rows[0].prompt
                raise FimError(
                    f"{model.name}: memory ran out at the {rows[0].length} tokens of {prompt.source}, problem "
                    f"{prompt.index}, alone; lower --max-tokens, or use a device with more memory; {_KEPT}"
                ) from error
            out_of_memory, batch = True, None
        if out_of_memory:  # the error, whose traceback held what there is, is gone
            budget = _after(model, rows) / 2
            gc.collect()
            _free(model.model.device)
        for row in rows:
            if row.ended:
                yield row.prompt, _completion(model, row)
        live = [row for row in rows if not row.ended]
        if batch is None:
            _put_back(live, waiting)
            live = []


def _put_back(rows: list[_Row], waiting: list[_Row]) -> None:
    """Let rows wait again, with what they wrote; the longest come first."""
    waiting.extend(rows)
    waiting.sort(key=lambda row: -row.length)


def _completion(model: LanguageModel, row: _Row) -> Completion:
    ids = row.written[:-1] if row.ended == STOP else row.written
    text = model.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Completion(str(text), len(row.written), row.ended or LENGTH)


def _free_memory(model: PreTrainedModel) -> float:
    """Bytes that are free for the cache, on all the devices that the model is on."""
    _free(model.device)
    free = {str(device): size for device, size in get_max_memory().items()}
    if model.device.type in ("cpu", "mps"):
        return free[model.device.type]
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()} & free.keys() - {"cpu"}
    places = places or {str(model.device.index or 0)}
    return min(free[place] for place in places) * len(places)


def _free(device: torch.device) -> None:
    """Give back what torch holds and doesn't use."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def _needed(model: LanguageModel, rows: int, width: float) -> float:
    """Bytes of a cache."""
    return rows * (model.row_bytes + width * model.token_bytes)


def _fitting(model: LanguageModel, rows: list[_Row], budget: float) -> list[_Row]:
    """Those of a batch's rows that fit for another piece, one at least: those that wrote most stay."""
    kept = sorted(rows, key=lambda row: -len(row.written))
    while len(kept) > 1 and _after(model, kept) > budget:
        kept.pop()
    return kept


def _after(model: LanguageModel, rows: list[_Row]) -> float:
    """Bytes of the cache of some rows, before they are looked at again."""
    steps = _PIECE if model.joins else math.inf
    width = max(row.length + min(steps, row.limit - len(row.written)) for row in rows)
    return _needed(model, len(rows), width)


def _taken(model: LanguageModel, waiting: list[_Row], live: list[_Row], most: int, budget: float) -> list[_Row]:
    """Take from the rows that wait those that can join, one at least where there are none; the longest first."""
    new: list[_Row] = []
    if live and not model.joins:
        return new
    while waiting and len(live) + len(new) < most:
        row = waiting[0]
        rows = [*live, *new, row]
        if len(rows) > 1 and _after(model, rows) > budget:
            break
        if new and ((len(new) + 1) * new[0].length > _PREFILL or not (model.pads or row.length == new[0].length)):
            break
        new.append(waiting.pop(0))
    return new


def _started(model: LanguageModel, rows: list[_Row]) -> _Batch:
    """A batch of rows that the model hasn't seen."""
    width = max(row.length for row in rows)
    ids = [[0] * (width - row.length) + row.ids + row.written for row in rows]
    mask = [[0] * (width - row.length) + [1] * row.length for row in rows]
    device = model.model.device
    return _Batch(rows, torch.tensor(ids, device=device), torch.tensor(mask, device=device))


def _advanced(
    model: LanguageModel, batch: _Batch, most: int, enough: int, choosing: Callable[[list[_Row]], "_Chooser"]
) -> _Batch:
    """Write on, until `enough` rows have ended, one is at its limit, or `most` tokens were written."""
    steps = min(most, min(row.limit - len(row.written) for row in batch.rows))
    chooser, ending = choosing(batch.rows), _Enough(model.stop, enough)
    generate: Any = model.model.generate
    out = generate(
        batch.ids,
        attention_mask=batch.mask,
        generation_config=_config(steps),
        logits_processor=LogitsProcessorList([chooser]),
        stopping_criteria=StoppingCriteriaList([ending]),
        **({} if batch.cache is None else {"past_key_values": batch.cache}),
    )
    if bool(chooser.unusable):
        raise FimError(f"{model.name}: some logits aren't numbers; try another dtype, and check the model's weights")
    stop = frozenset(model.stop)
    for row, tokens in zip(batch.rows, out.sequences[:, batch.ids.shape[1] :].tolist(), strict=True):
        row.take(tokens, stop)
    mask = pad(batch.mask, (0, out.sequences.shape[1] - batch.ids.shape[1]), value=1)
    return _Batch(batch.rows, out.sequences, mask, out.past_key_values if model.joins else None)


def _kept(batch: _Batch, rows: list[_Row]) -> _Batch:
    """A batch of some rows of another, without the padding that all of them have."""
    index = torch.tensor([batch.rows.index(row) for row in rows], device=batch.ids.device)
    begin = batch.ids.shape[1] - max(row.length for row in rows)
    for layer in batch.cache.layers:
        at = index.to(layer.keys.device)
        layer.keys = layer.keys[at][:, :, begin:]
        layer.values = layer.values[at][:, :, begin:]
    return _Batch(rows, batch.ids[index, begin:], batch.mask[index, begin:], batch.cache)


def _joined(first: _Batch | None, second: _Batch) -> _Batch:
    """Two batches as one, padded to the longer one's length."""
    if first is None:
        return second
    width = max(first.ids.shape[1], second.ids.shape[1])
    short = [width - batch.ids.shape[1] for batch in (first, second)]

    def join(a: torch.Tensor, b: torch.Tensor, *after: int) -> torch.Tensor:
        return torch.cat([pad(a, (*after, short[0], 0)), pad(b, (*after, short[1], 0))])

    for layer, other in zip(first.cache.layers, second.cache.layers, strict=True):
        layer.keys, layer.values = join(layer.keys, other.keys, 0, 0), join(layer.values, other.values, 0, 0)
    rows = [*first.rows, *second.rows]
    return _Batch(rows, join(first.ids, second.ids), join(first.mask, second.mask), first.cache)


class _Enough(StoppingCriteria):
    """Ends a batch, all its rows at once, when some number of them have ended."""

    def __init__(self, stop: tuple[int, ...], enough: int) -> None:
        self._stop, self._enough = stop, enough
        self._ended: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self._ended is None:
            self._ids = torch.tensor(self._stop, dtype=input_ids.dtype, device=input_ids.device)
            self._ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self._ended |= torch.isin(input_ids[:, -1], self._ids)
        return (self._ended.sum() >= self._enough).expand(len(input_ids))


class _Chooser(LogitsProcessor):
    """Draws the next token of every row, and leaves nothing else to choose from; at a temperature of 0 it only looks.

    A row's draw is the inverse of its cumulative distribution at a number in [0, 1) that follows from the seed, the
    row and the step alone, so that it is the same in any batch.
    """

    def __init__(self, rows: list[_Row], temperature: float, seed: int) -> None:
        self._rows, self._temperature, self._seed = rows, temperature, seed
        self._written = [len(row.written) for row in rows]
        self._step = 0
        self.unusable: torch.Tensor | bool = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.unusable = scores.isnan().any() | self.unusable  # looked at later, in order not to wait for the device
        if not self._temperature:
            return scores
        numbers = [
            _uniform(self._seed, row.prompt, written + self._step)
            for row, written in zip(self._rows, self._written, strict=True)
        ]
        self._step += 1
        dtype = torch.float32 if scores.device.type == "mps" else torch.float64
        scaled = (scores - scores.amax(dim=-1, keepdim=True)).to(dtype) / self._temperature
        cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
        at = torch.tensor(numbers, dtype=dtype, device=scores.device)[:, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, at, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -math.inf).scatter(-1, drawn, 0.0)


def _uniform(seed: int, prompt: Prompt, step: int) -> float:
    """A number in [0, 1) for a step of an answer."""
    key = repr((seed, prompt.source, prompt.index, prompt.sample, step)).encode()
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11) / 2**53
