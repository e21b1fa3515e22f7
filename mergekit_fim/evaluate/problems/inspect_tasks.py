"""Tasks of inspect_ai, in the process of `served`: what they ask a model, and how they score what it answers."""

import asyncio
import functools
import json
import os
from typing import Any

from mergekit_fim.errors import FimError, brief, reason
from mergekit_fim.evaluate.records import Grade, Message

# Stands for the model that answers. It is Inspect's own, and never asked: `_Played` answers in its place.
_MODEL = "mockllm/model"
NO_ANSWER = "(no answer)"
# What a task may ask of a generation and a sweep doesn't do.
_REFUSED = ("system_message", "stop_seqs", "num_choices", "logprobs", "prompt_logprobs", "response_schema")


@functools.lru_cache(maxsize=16)
def _task(task: str, config: str, copy: int) -> Any:
    """Make a task; several copies show what isn't the same each time."""
    os.environ["INSPECT_EVAL_MODEL"] = _MODEL
    where, arguments = f"inspect:{task}", json.loads(config)
    try:
        # Inspect has no public name for this but in `eval`, which takes a second for each answer.
        from inspect_ai._eval.loader import load_tasks, resolve_task_args

        tasks = load_tasks([task], arguments)
        unknown = [name for its in tasks for name in arguments if name not in resolve_task_args(its)]
    except (Exception, SystemExit) as error:  # of the task's own code
        raise FimError(
            f"{where}: expected a task of inspect_ai's, found one that can't be made of {brief(config)} "
            f"({reason(error)}); check its name, its arguments and the connection, and install the package that has it"
        ) from error
    if len(tasks) != 1:
        raise FimError(
            f"{where}: expected a task of inspect_ai's, found {len(tasks)}; write inspect:PACKAGE/TASK or "
            "inspect:FILE.py@TASK, and install the package that has it, such as inspect-evals"
        )
    if unknown:
        raise FimError(f"{where}: expected arguments that the task has, found {', '.join(map(brief, unknown))}")
    return tasks[0]


def samples(task: str, config: str) -> int:
    """Count a task's samples.

    Raises:
        FimError: there are none, or answering them takes more than a model.
    """
    made = _task(task, config, 0)
    count = len(made.dataset)
    needs = None
    if made.sandbox is not None or any(sample.sandbox or sample.files or sample.setup for sample in made.dataset):
        needs = "a sandbox"
    elif not made.scorer:
        needs = "a scorer"
    elif not count:
        needs = "samples, of which it has none"
    if needs:
        raise FimError(f"inspect:{task}: expected a task that a model alone can answer, found one that needs {needs}")
    return count


def problem(task: str, config: str, index: int) -> dict[str, Any]:
    """Find what a task asks of a model for one sample, and the answer that it expects, by a stub's answer.

    Raises:
        FimError: it asks for something else than one text, fails, or asks something else each time.
    """
    where = f"inspect:{task}, sample {index}"
    first, second = (_problem(_task(task, config, copy), index, where) for copy in (0, 1))
    if first != second:
        raise FimError(
            f"{where}: expected a task that asks the same each time, found one that draws without a seed; pass a seed "
            "in its arguments, if it takes one"
        )
    return first


def _problem(task: Any, index: int, where: str) -> dict[str, Any]:
    sample, played = task.dataset[index], _Played(task, NO_ANSWER)
    value: Any = None
    try:
        value = _loop().run_until_complete(played.score(sample)).value
    except (Exception, SystemExit) as error:  # of the task's solver or scorer
        if not played.needs:
            raise FimError(
                f"{where}: expected a task that runs, found one whose {played.step} fails ({reason(error)}); correct it"
            ) from error
    if isinstance(value, (dict, list)):
        played.needs = "several scores for an answer"
    elif not played.asked and not played.needs:
        played.needs = "no model"
    if played.needs:
        raise FimError(
            f"{where}: expected a task of one generation for each sample and a scorer of one number, found one that "
            f"needs {played.needs}; take another task"
        )
    target = sample.target if isinstance(sample.target, str) else ", ".join(sample.target)
    return {"messages": played.asked, "target": target}


def grade(task: str, config: str, index: int, answer: str) -> Grade:
    """Score an answer by the task's first scorer, which must give 1 (`C`)."""
    from inspect_ai.scorer import value_to_float

    made = _task(task, config, 0)
    try:
        score = _loop().run_until_complete(_Played(made, answer).score(made.dataset[index]))
        number = value_to_float()(score.value)
    except Exception as error:  # of the task's solver or scorer
        return Grade(False, note=f"the task's own scorer failed: {reason(error)}")
    note = None if number in (0, 1) else f"the score is {number:g}, and only 1 is right"
    return Grade(abs(number - 1) < 1e-9, score.answer, note)


def ready(task: str, config: str) -> None:
    """Do what no answer's seconds are for, and what isn't allowed while one is graded."""
    _task(task, config, 0)
    _loop()


class _Played:
    """A task that gets the same answer to whatever it asks, of whichever model."""

    def __init__(self, task: Any, answer: str) -> None:
        self._task, self._answer = task, answer
        self.asked: list[Message] = []  # the messages of its one generation
        self.needs = ""  # what it asked for that a sweep doesn't have
        self.step = "solver"  # or "scorer": who is at work

    async def score(self, sample: Any) -> Any:
        """Let the task ask about a sample, and score the answer, as Inspect's `eval` does; raise what it raises."""
        from inspect_ai.model import ChatMessageUser, GenerateConfig, Model, ModelName
        from inspect_ai.scorer import Target
        from inspect_ai.solver import TaskState, chain

        def turns(text: Any) -> list[Any]:
            return [ChatMessageUser(content=text)] if isinstance(text, str) else list(text)

        async def ask(_: Any, input: Any, tools: Any = (), *__: Any, config: Any = None, **___: Any) -> Any:
            return self._given(turns(input), tools, config or GenerateConfig())

        async def generate(state: Any, tool_calls: Any = None, cache: Any = None, **config: Any) -> Any:
            state.output = self._given(state.messages, state.tools, GenerateConfig(**config))
            state.messages.append(state.output.message)
            return state

        Model.generate = ask  # of every model that a task makes: none is asked in this process
        sample, target = sample.model_copy(deep=True), Target(sample.target)
        its = {"choices": sample.choices, "metadata": sample.metadata}
        state = TaskState(ModelName(_MODEL), sample.id or 0, 1, sample.input, turns(sample.input), target, **its)
        setup = [self._task.setup] if self._task.setup else []
        state = await chain(*setup, self._task.solver)(state, generate)
        self.step = "scorer"
        return await self._task.scorer[0](state, target)

    def _given(self, messages: Any, tools: Any, config: Any) -> Any:
        from inspect_ai.model import ModelOutput

        config = self._task.config.merge(config)
        parts = [part.type for message in messages if not isinstance(message.content, str) for part in message.content]
        needs = {
            "a model to score its answers": self.step == "scorer",
            "several generations for a sample": bool(self.asked),
            "tools": bool(tools) or any(message.role == "tool" for message in messages),
            "a model that takes more than text": any(part != "text" for part in parts),
            "an answer that goes on from what it begins": not messages or messages[-1].role != "user",
            **{f"`{name}` of a generation": bool(getattr(config, name, None)) for name in _REFUSED},
        }
        self.needs = next((what for what, is_so in needs.items() if is_so), "")
        if self.needs:
            raise RuntimeError(self.needs)
        self.asked = [{"role": message.role, "content": message.text} for message in messages]
        return ModelOutput.from_content(_MODEL, self._answer)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()
