"""What a run needs of whatever answers it."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from mergekit_fim.evaluate.answers.prompts import Prompt
from mergekit_fim.evaluate.records import Completion


@dataclass(frozen=True)
class Decoding:
    """How answers are made."""

    max_tokens: int  # of an answer, if the model's context has room for them
    temperature: float = 0.0  # what scores are divided by before a token is drawn; at 0, the likeliest is taken
    seed: int = 0  # of the draws, together with source, index and sample of the prompt
    batch: int | None = None  # answers at a time, at most; None for as many as will do


@dataclass(frozen=True, eq=False)
class ModelFiles:
    """A model that can be opened: its name in messages, its folder or name and revision on the Hub, its tokenizer."""

    name: str
    path: str
    revision: str | None
    tokenizer: PreTrainedTokenizerBase


class Engine(Protocol):
    """Answers prompts by one model at a time."""

    def open(self, files: ModelFiles) -> dict[str, Any]:
        """Load a model, in place of the one before, and say what a sweep's record is to have of it.

        Raises:
            FimError: it can't be loaded.
        """

    def answers(self, prompts: Sequence[Prompt], decoding: Decoding) -> Generator[tuple[Prompt, Completion]]:
        """Answer prompts, each as soon as it has ended, in no order.

        Raises:
            FimError: a prompt can't be answered, or the model fails. What was given before is good.
        """

    def close(self) -> None:
        """Give back the memory that the model takes."""
