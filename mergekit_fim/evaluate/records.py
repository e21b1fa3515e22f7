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


def ordered_by(settings: Mapping[str, Any]) -> str | None:
    """Name the setting that orders the merges of a family: the strength, else the first one."""
    return next((name for name in _STRENGTHS if name in settings), next(iter(settings), None))


@dataclass(frozen=True)
class Problem:
    """A question of a source, its number there from 0, the expected answer, and what the model is told before.

    Attributes:
        shots: turns between the system message and the question, such as answered examples.
    """

    source: str
    index: int
    question: str
    answer: str
    system: str | None = None
    shots: tuple[Message, ...] = field(default=(), hash=False)

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
    """The problems of one source, in its order, and who grades their answers.

    Attributes:
        grade: (problem, final answer) -> grade. The final answer is the text without its thinking.
        description: what a record of the source needs beside its name to repeat it, such as versions and checksums.
        ungradable: the problems whose expected answer can't be graded against, by index, and why.
    """

    source: str
    problems: tuple[Problem, ...]
    grade: Callable[[Problem, str], Grade]
    description: dict[str, str | int]
    ungradable: dict[int, str]


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    Attributes:
        text: without the tokens that ended it, with special tokens such as <think>.
        tokens: how many the model wrote, by its own tokenizer, with one that ended it.
        ended: `STOP` or `LENGTH`.
        prompt_tokens: how many the prompt has; None where that isn't known. It is no part of what was written.
    """

    text: str
    tokens: int
    ended: str
    prompt_tokens: int | None = field(default=None, compare=False)


# Of which answer, what was written, and what the model was given.
Written = tuple[Key, Completion, str]


@dataclass(frozen=True)
class Answer:
    """A graded completion: a row of `answers/RUN.jsonl`, with these fields in this order.

    Attributes:
        sample: which of several answers to the same problem, from 0.
        prompt: what the model was given: the text after its chat template; for a server, the messages as JSON.
        unclosed: whether it began to think and didn't end it.
        correct: whether it is right; None where the problem can't be graded.
        found: what was taken for the answer; None where nothing could be.
        note: why it couldn't be graded, if so.
        seconds: its share of the time that generating took.
        prompt_tokens: how many the prompt has; None where that isn't known.
        expected: the expected answer; None in rows of earlier versions.
    """

    source: str
    index: int
    sample: int
    prompt: str
    text: str
    tokens: int
    ended: str
    unclosed: bool
    correct: bool | None
    found: str | None
    note: str | None
    seconds: float
    prompt_tokens: int | None = None
    expected: str | None = None


class Row(NamedTuple):
    """A graded answer as a front takes it, whoever asked. Where something isn't known it is None.

    Attributes:
        run: what answered.
        method: its family; None for a model as it is.
        settings: what tells it from the others of its family.
        problem: tells the problem from the others of its source.
        sample: which of several answers to the same problem.
        correct: from 0 to 1.
        tokens: how long it is.
        truncated: whether it ended at the limit of tokens.
        unclosed: whether it began to think and didn't end it.
        empty: whether it had no text.
        seconds: its share of the time that the run took.
    """

    run: str
    method: str | None
    settings: Mapping[str, Any]
    source: str
    problem: str
    sample: int
    correct: float
    tokens: float
    truncated: bool | None = None
    unclosed: bool | None = None
    empty: bool | None = None
    seconds: float | None = None


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
