"""Prompts -> tokens, and tokens -> completions: what engines that run a model have in common."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from mergekit_fim.errors import FimError, reason
from mergekit_fim.evaluate.answers.prompts import Prompt
from mergekit_fim.evaluate.records import LENGTH, STOP, Completion
from mergekit_fim.models.checkpoint import explained


@dataclass(frozen=True, eq=False)
class Reader:
    """What reads a model's prompts and its answers; messages call the model by `name`."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    stop: tuple[int, ...]  # the tokens that end an answer, sorted
    context: int | None  # how many tokens of prompt and answer together it takes; None where that isn't known
    vocabulary: int  # how many tokens it knows

    def ids(self, prompt: Prompt) -> list[int]:
        """Read a prompt's tokens.

        Raises:
            FimError: it is empty, isn't text, has a token that the model doesn't know, or leaves no room for an answer.
        """
        where = f"{prompt.source}, problem {prompt.index}"
        try:
            ids = self.tokenizer.encode(prompt.text, add_special_tokens=prompt.special, verbose=False)
        except Exception as error:  # such as of text that isn't Unicode
            raise FimError(f"{where}: the tokenizer of {self.name} can't read the prompt ({reason(error)})") from error
        if not ids:
            raise FimError(f"{where}: the prompt is empty; expected one token at least for {self.name} to go on from")
        if max(ids) >= self.vocabulary:
            raise FimError(
                f"{where}: the tokenizer gives token {max(ids)}, but {self.name} knows {self.vocabulary}; expected "
                "the model's own tokenizer"
            )
        if self.context is not None and len(ids) >= self.context:
            raise FimError(
                f"{where}: the prompt has {len(ids)} tokens, which leaves no room for an answer: {self.name} takes "
                f"{self.context} with it; leave that problem out"
            )
        return ids

    def room(self, ids: Sequence[int], max_tokens: int) -> int:
        """Count the tokens that may follow a prompt's."""
        return max_tokens if self.context is None else min(max_tokens, self.context - len(ids))

    def completion(self, ids: Sequence[int], written: Sequence[int]) -> Completion:
        """Read what the model wrote after a prompt's tokens, one token at least."""
        ended = STOP if written[-1] in self.stop else LENGTH
        shown = list(written[:-1] if ended == STOP else written)
        text = self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Completion(str(text), len(written), ended, len(ids))


def load_tokenizer(name: str, path: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer from its folder or the Hub; messages call the model by `name`.

    Raises:
        FimError: there is none that can be loaded.
    """
    what = f"{name}: expected a model with a tokenizer, found none that can be loaded"
    with explained(what, "put the tokenizer's files into its folder"):
        return transformers.AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)


def stop_tokens(configs: Iterable[Any], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Gather the tokens that end an answer: all that the configs and the tokenizer name, and the chat template's."""
    named = [getattr(config, "eos_token_id", None) for config in configs]
    named += [tokenizer.eos_token_id, _end_of_turn(tokenizer)]
    lists = [ids if isinstance(ids, (list, tuple)) else [ids] for ids in named if ids is not None]
    return tuple(sorted({token for ids in lists for token in ids}))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Find the special token with which the chat template ends what the assistant says, if there is one."""
    said = "2b7e151628aed2a6"
    turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": said}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # there is none, or it raises something; who makes the prompts by it says so
        return None
    ids = tokenizer.encode(text.rpartition(said)[2].lstrip(), add_special_tokens=False)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    return ids[0] if said in text and ids and ids[0] in special else None
