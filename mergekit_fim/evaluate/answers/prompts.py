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
    """What a model is to go on from, for one sample of a source's problem."""

    source: str
    index: int
    sample: int
    text: str  # the prompt, or the messages as JSON
    special: bool  # whether the tokenizer adds special tokens, such as BOS; the text of a chat template has its own
    messages: tuple[Message, ...] | None = field(default=None, hash=False)  # for a server's own chat template

    @property
    def key(self) -> Key:
        """Which answer it is for. What is sampled depends on this, the seed and the text."""
        return self.source, self.index, self.sample


@dataclass(frozen=True, eq=False)
class Template:
    """How questions become prompts."""

    kind: str  # "chat" for a model's own, "file" for the user's
    text: str  # in Jinja
    where: str  # messages say that it is from there
    render: Callable[[Problem], str]  # may fail as templates do

    @property
    def record(self) -> dict[str, str]:
        """What tells it from others."""
        return {"kind": self.kind, "sha256": hashlib.sha256(self.text.encode("utf-8", "replace")).hexdigest()}

    def prompt(self, problem: Problem) -> str:
        """Make a problem's prompt.

        Raises:
            FimError: the template fails.
        """
        try:
            return self.render(problem)
        except Exception as error:  # whatever a template does
            raise FimError(
                f"{self.where} fails on problem {problem.index} of {problem.source} ({reason(error)}); change the "
                "template, or what it is given"
            ) from error


def prompts(questions: Questions, keys: Iterable[Key], template: Template | None) -> list[Prompt]:
    """Make what is to be answered, by a template, or where there is none as messages."""
    if template is None:
        turns = [(key, questions.problem(key).messages) for key in keys]
        return [Prompt(*key, json.dumps(its, ensure_ascii=False), special=False, messages=its) for key, its in turns]
    special = template.kind == "file"
    return [Prompt(*key, template.prompt(questions.problem(key)), special=special) for key in keys]


def chat_template(name: str, tokenizer: Any) -> Template:
    """Take a model's own template, up to where its answer begins; messages call the model by `name`.

    Raises:
        FimError: it has none.
    """
    try:
        text = tokenizer.get_chat_template()
    except Exception:  # ValueErrors, of none and of several without a default
        raise FimError(
            f"{name}: expected a model with a chat template, found none; pass one with --template, a file in Jinja "
            "that is given `question` and `system`"
        ) from None

    def render(problem: Problem) -> str:
        return str(tokenizer.apply_chat_template([*problem.messages], tokenize=False, add_generation_prompt=True))

    return Template("chat", text, f"{name}: its chat template", render)


def file_template(path: str) -> Template:
    """Read the user's: Jinja that is given `question`, `system` (None where there is none), and `messages`.

    Raises:
        FimError: it can't be read, or isn't Jinja.
    """
    from jinja2 import StrictUndefined, TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # As transformers renders chat templates: a template is code, and one from elsewhere is not to read files.
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        template = environment.from_string(text)
        variables = meta.find_undeclared_variables(environment.parse(text))
    except OSError as error:
        raise FimError(f"{path}: can't be read ({error.strerror or error}); check the name") from error
    except (UnicodeDecodeError, TemplateError) as error:
        raise FimError(
            f"{path}: expected a template in Jinja, in UTF-8, found something else ({reason(error)}); correct it"
        ) from error
    if not variables & {"question", "messages"}:
        raise FimError(f"{path}: expected a template with {{{{ question }}}} in it, found none; add it")

    def render(problem: Problem) -> str:
        if problem.shots and "messages" not in variables:
            raise ValueError("the problem has answered examples, which a template has as `messages`")
        return template.render(question=problem.question, system=problem.system, messages=problem.messages)

    return Template("file", text, path, render)
