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


class _Chat(BaseModel):
    finish_reason: str | None = None
    message: _Message


class _Text(BaseModel):
    finish_reason: str | None = None
    text: str


class _Answer(BaseModel, Generic[T]):
    choices: Annotated[list[T], Field(min_length=1)]
    usage: _Usage


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


def listed(response: str) -> list[str] | None:
    """Read the names in a list of models, if it is one."""
    try:
        return [model.id for model in _Models.model_validate_json(response).data]
    except ValidationError:
        return None


def completion(response: str, max_tokens: int, *, is_chat: bool) -> Completion:
    """Read what a server answered to a chat or a prompt, its thinking included.

    Raises:
        FimError: it isn't an answer, of `max_tokens` at most.
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
        answer = (_Answer[_Chat] if is_chat else _Answer[_Text]).model_validate_json(checked, strict=True)
    except ValidationError as error:
        raise FimError(f"not an answer in OpenAI's format: {misfit(error, content)}") from None
    tokens, choice = answer.usage.completion_tokens, answer.choices[0]
    for_another_reason = LENGTH if tokens >= max_tokens else STOP
    ended = {"stop": STOP, "length": LENGTH}.get(choice.finish_reason or "", for_another_reason)
    text = _whole(choice.message, ended) if isinstance(choice, _Chat) else choice.text
    if tokens > max_tokens + 1 or (text and not tokens):  # one more: a server may not count the one that ends a turn
        raise FimError(
            f"expected an answer of at most {max_tokens} tokens, and their number, found {len(text)} characters of "
            f"{brief(tokens)} tokens"
        )
    return Completion(text, tokens, ended, answer.usage.prompt_tokens)


def _whole(message: _Message, ended: str) -> str:
    """Put a message's thinking back in its place, as the model wrote it."""
    thought, content = message.reasoning_content or message.reasoning, message.content or ""
    if not thought or content.lstrip().startswith("<think>"):  # some servers give it in both places
        return content
    return f"<think>{thought}" if not content and ended == LENGTH else f"<think>{thought}</think>{content}"
