"""What passes between the stages of an evaluation: problems, completions, grades and answers. Records alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# How a completion ended: by a token that ends a turn, or at the limit of tokens.
STOP, LENGTH = "stop", "length"

Key = tuple[str, int, int]  # of an answer: source, index, sample
Message = dict[str, str]  # with `role` and `content`

# What methods call their strength.
_STRENGTHS = ("alpha_mean", "alpha", "weight", "t", "lambda")


def ordered_by(settings: Mapping[str, Any]) -> str:
    """Name the setting that orders the merges of a family: the strength, else the first one; empty without any."""
    return next((name for name in _STRENGTHS if name in settings), next(iter(settings), ""))


@dataclass(frozen=True)
class Problem:
    """A question of a source, its number there from 0, the expected answer, and what the model is told before."""

    source: str
    index: int
    question: str
    answer: str
    system: str | None = None
    shots: tuple[Message, ...] = field(default=(), hash=False)  # turns before the question, such as answered examples

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation that the model is to go on with."""
        told = ({"role": "system", "content": self.system},) if self.system else ()
        return (*told, *self.shots, {"role": "user", "content": self.question})


@dataclass(frozen=True)
class Grade:
    """What became of an answer; the fields are those of `Answer`."""

    correct: bool | None
    found: str | None = None
    note: str | None = None


@dataclass(frozen=True, eq=False)
class ProblemSet:
    """The problems of one source, in its order, and who grades their answers."""

    source: str
    problems: tuple[Problem, ...]
    grade: Callable[[Problem, str], Grade]  # of a problem and its final answer: the text without its thinking
    description: dict[str, str | int]  # what it takes beside the name to repeat them, such as versions and checksums
    ungradable: dict[int, str]  # why an expected answer can't be graded against, by its problem's index


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    text: str  # without the tokens that ended it, with special tokens such as <think>
    tokens: int  # how many the model wrote, by its own tokenizer, with one that ended it
    ended: str  # `STOP` or `LENGTH`
    prompt_tokens: int | None = field(default=None, compare=False)  # of the prompt; None where that isn't known


# Of which answer, what was written, and what the model was given.
Written = tuple[Key, Completion, str]


@dataclass(frozen=True)
class Answer:
    """A graded completion: a row of `answers/RUN.jsonl`, with these fields in this order."""

    source: str
    index: int
    sample: int  # which of several answers to the same problem, from 0
    prompt: str  # what the model was given: the text after its chat template; for a server, the messages as JSON
    text: str
    tokens: int
    ended: str
    unclosed: bool  # whether it began to think and didn't end it
    correct: bool | None  # None where the problem can't be graded
    found: str | None  # what was taken for the answer; None where nothing could be
    note: str | None  # why it couldn't be graded, if so
    seconds: float  # its share of the time that generating took
    prompt_tokens: int | None = None
    expected: str | None = None  # the expected answer; None in rows of earlier versions


class Row(NamedTuple):
    """A graded answer as a front takes it, whoever asked. Where something isn't known it is None."""

    run: str
    method: str | None  # the family of the run; None for a model as it is
    settings: Mapping[str, Any]  # what tells the run from the others of its family
    source: str
    problem: str  # what tells the problem from the others of its source
    sample: int
    correct: float  # from 0 to 1
    tokens: float
    truncated: bool | None = None  # whether it ended at the limit of tokens
    unclosed: bool | None = None  # whether it began to think and didn't end it
    empty: bool | None = None  # whether it had no text
    seconds: float | None = None  # its share of the time that the run took


def row_of(entry: Mapping[str, Any], answer: Answer) -> Row:
    """Turn an answer of a sweep's run into a row; the entry is what `sweep.json` says of the run."""
    return Row(
        entry["run"],
        entry["method"],
        entry["settings"],
        answer.source,
        str(answer.index),
        answer.sample,
        correct=answer.correct is True,
        tokens=answer.tokens,
        truncated=answer.ended == LENGTH,
        unclosed=answer.unclosed,
        empty=not answer.text.strip(),
        seconds=answer.seconds,
    )
