"""What a server sends in OpenAI's format -> a completion, checked; or the names of its models."""

import json
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, Field, ValidationError

from mergekit_fim.errors import FimError, brief, misfit
from mergekit_fim.evaluate.records import LENGTH, STOP, Completion

T = TypeVar("T")


class _Usage(BaseModel):
    completion_tokens: Annotated[int, Field(ge=0)]
    prompt_tokens: Annotated[int, Field(ge=0)] | None = None


class _Message(BaseModel):
    content: str | None = None
    # How servers call what the model thought, where they take it out of the content.
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(BaseModel):
    finish_reason: str | None = None


class _ChatChoice(_Choice):
    message: _Message


class _TextChoice(_Choice):
    text: str


class _Answer(BaseModel, Generic[T]):
    choices: Annotated[list[T], Field(min_length=1)]
    usage: _Usage


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


def listed(response: str) -> list[str] | None:
    """The names in a list of models, if it is one."""
    try:
        return [model.id for model in _Models.model_validate_json(response).data]
    except ValidationError:
        return None


def only(names: list[str], url: str) -> str:
    """The name of a server's only model.

    Raises:
        FimError: it has several, or none.
    """
    if len(names) != 1:
        found = ", ".join(brief(name) for name in names[:10]) + (", ..." if len(names) > 10 else "")
        raise FimError(f"{url}: expected a server of one model, found {found or 'none listed'}; pass --server-model")
    return names[0]


def completion(response: str, max_tokens: int, *, is_chat: bool) -> Completion:
    """What a server answered, its thinking included.

    Args:
        response: as it sent it.
        max_tokens: that were asked for.
        is_chat: whether a chat was asked for, or a prompt's continuation.

    Raises:
        FimError: it isn't an answer, of as many tokens at most.
    """
    try:
        content = json.loads(response)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise FimError(f"expected an answer as a JSON object, found {brief(response)!r}")
    try:
        # As JSON, where no type is taken for another, but without halves of characters, which no file can have.
        checked = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
        kind = _Answer[_ChatChoice] if is_chat else _Answer[_TextChoice]
        answer = kind.model_validate_json(checked, strict=True)
    except ValidationError as error:
        raise FimError(f"not an answer in OpenAI's format: {misfit(error, content)}") from None
    tokens, choice = answer.usage.completion_tokens, answer.choices[0]
    if choice.finish_reason in ("stop", "length"):
        ended = STOP if choice.finish_reason == "stop" else LENGTH
    else:
        ended = LENGTH if tokens >= max_tokens else STOP
    text = _whole(choice.message, ended) if isinstance(choice, _ChatChoice) else choice.text
    if tokens > max_tokens + 1 or (text and not tokens):  # one more: a server may not count the one that ends a turn
        raise FimError(
            f"expected an answer of at most {max_tokens} tokens, and their number, found {len(text)} characters of "
            f"{brief(tokens)} tokens"
        )
    return Completion(text, tokens, ended, answer.usage.prompt_tokens)


def _whole(message: _Message, ended: str) -> str:
    """A message's text as the model wrote it, its thinking put back in its place."""
    thought, content = message.reasoning_content or message.reasoning, message.content or ""
    if not thought or content.lstrip().startswith("<think>"):  # some servers give it in both places
        return content
    return f"<think>{thought}" if not content and ended == LENGTH else f"<think>{thought}</think>{content}"
