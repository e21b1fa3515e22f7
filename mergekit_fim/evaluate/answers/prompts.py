"""A problem -> what a model is given: by its own chat template, by one in a file, or as messages."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from mergekit_fim.errors import FimError, reason
from mergekit_fim.evaluate.problems.questions import Questions
from mergekit_fim.evaluate.records import Key, Message, Problem


@dataclass(frozen=True)
class Prompt:
    """What a model is to go on from.

    Attributes:
        source: the problem's source.
        index: the problem's number in it.
        sample: which of several answers to it. On these three, the seed and the text depends what is sampled.
        text: the prompt, or the messages as JSON.
        special: whether the tokenizer adds its special tokens, such as BOS. The text of a chat template has its own.
        messages: for a server's own chat template; None for the text.
    """

    source: str
    index: int
    sample: int
    text: str
    special: bool
    messages: tuple[Message, ...] | None = field(default=None, hash=False)

    @property
    def key(self) -> Key:
        """Which answer it is for."""
        return self.source, self.index, self.sample


@dataclass(frozen=True, eq=False)
class Template:
    """How questions become prompts.

    Attributes:
        kind: "chat" for a model's own, "file" for the user's.
        text: in Jinja.
        prompt: a problem's prompt.
    """

    kind: str
    text: str
    prompt: Callable[[Problem], str]

    @property
    def record(self) -> dict[str, str]:
        """What tells it from others."""
        return {"kind": self.kind, "sha256": hashlib.sha256(self.text.encode("utf-8", "replace")).hexdigest()}


def prompts(questions: Questions, keys: Iterable[Key], template: Template | None) -> list[Prompt]:
    """Make what is to be answered, by a template, or where there is none as messages.

    Raises:
        FimError: the template fails on one of the problems.
    """
    if template is None:
        turns = [(key, questions.problem(key).messages) for key in keys]
        return [Prompt(*key, json.dumps(its, ensure_ascii=False), special=False, messages=its) for key, its in turns]
    special = template.kind == "file"
    return [Prompt(*key, template.prompt(questions.problem(key)), special=special) for key in keys]


def chat_template(name: str, tokenizer: Any) -> Template:
    """A model's own, up to where its answer begins.

    Args:
        name: the model's, for messages.
        tokenizer: transformers'.

    Raises:
        FimError: it has none; its `prompt`, where that fails.
    """
    try:
        text = tokenizer.get_chat_template()
    except Exception:  # ValueErrors, of none and of several without a default
        raise FimError(
            f"{name}: expected a model with a chat template, found none; pass one with --template, a file in Jinja "
            "that is given `question` and `system`"
        ) from None

    def prompt(problem: Problem) -> str:
        made = tokenizer.apply_chat_template(list(problem.messages), tokenize=False, add_generation_prompt=True)
        return str(made)

    return Template("chat", text, _guarded(prompt, f"{name}: its chat template"))


def file_template(path: str) -> Template:
    """The user's, of a file: Jinja that is given `question`, `system` (None where there is none), and `messages`.

    Raises:
        FimError: it can't be read, or isn't Jinja; its `prompt`, where that fails.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise FimError(f"{path}: can't be read ({error.strerror or error}); check the name") from error
    except UnicodeDecodeError as error:
        raise FimError(f"{path}: expected a template in UTF-8, found other bytes; save the file as UTF-8") from error
    # As transformers renders chat templates: a template is code, and one from elsewhere is not to read files.
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        template = environment.from_string(text)
    except TemplateError as error:
        raise FimError(f"{path}: expected a template in Jinja, found something else ({reason(error)})") from error
    variables = _variables(environment, text)
    if not variables & {"question", "messages"}:
        raise FimError(f"{path}: expected a template with {{{{ question }}}} in it, found none; add it")

    def prompt(problem: Problem) -> str:
        if problem.shots and "messages" not in variables:
            raise ValueError("the problem has answered examples, which a template has as `messages`")
        return template.render(question=problem.question, system=problem.system, messages=problem.messages)

    return Template("file", text, _guarded(prompt, path))


def _variables(environment: Any, text: str) -> set[str]:
    from jinja2 import meta

    return meta.find_undeclared_variables(environment.parse(text))


def _guarded(prompt: Callable[[Problem], str], where: str) -> Callable[[Problem], str]:
    def guarded(problem: Problem) -> str:
        try:
            return prompt(problem)
        except Exception as error:  # whatever a template does
            raise FimError(
                f"{where} fails on problem {problem.index} of {problem.source} ({reason(error)}); change the template, "
                "or what it is given"
            ) from error

    return guarded
