"""Tasks of inspect_ai: what they ask, that they score as Inspect's own `eval` does, and which are refused."""

import importlib.util
from pathlib import Path

import pytest
from inspecting import inspect

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.answers.prompts import file_template
from mergekit_fim.evaluate.problems import grader
from mergekit_fim.evaluate.problems.sources import open_problems
from mergekit_fim.evaluate.records import Grade, ProblemSet

TASKS = '''
from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, MemoryDataset, Sample, json_dataset
from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, ContentImage, ContentText
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import Score, accuracy, choice, match, model_graded_qa, scorer
from inspect_ai.solver import basic_agent, chain_of_thought, generate, multiple_choice, prompt_template, self_critique
from inspect_ai.solver import solver, system_message, use_tools
from inspect_ai.tool import tool


def four(**fields):
    return MemoryDataset([Sample(input=f"What is {i} + 4?", target=str(i + 4), **fields) for i in range(4)])


@task
def letters(seed: int = 3):
    names = ["5", "6", "7"]
    data = MemoryDataset([Sample(input=f"Which is {names[i]}?", choices=names, target="ABC"[i]) for i in range(3)])
    data.shuffle_choices(seed=seed)
    solvers = [system_message("Be brief."), multiple_choice(cot=True)]
    return Task(dataset=data, solver=solvers, scorer=choice(), epochs=4)


@task
def shots():
    turns = [ChatMessageSystem(content="Add."), ChatMessageUser(content="1 + 1?"), ChatMessageAssistant(content="2")]
    samples = [Sample(input=[*turns, ChatMessageUser(content="3 + 4?")], target=["7", "seven"])]
    return Task(dataset=samples, scorer=match())


@task
def local():
    data = json_dataset("data.jsonl", FieldSpec(input="q", target="a"))
    return Task(dataset=data, solver=[prompt_template("{prompt} Say it."), generate()], scorer=match(numeric=True))


@scorer(metrics=[accuracy()])
def own(value=None, error=None, model=None):
    async def score(state, target):
        if error and state.output.completion != error:
            raise KeyError("no such answer")
        if model:
            await get_model(model).generate("Is it right?")
        return Score(value=float(len(state.output.completion)) / 8 if value is None else value, answer="it")

    return score


@task
def parts():
    return Task(dataset=four(id="the same"), scorer=[own(), match()])


@task
def failing_later():
    return Task(dataset=four(), scorer=own(error="(no answer)"))


@task
def slow():
    async def solve(state, generate):
        state = await generate(state)
        while state.output.completion == "forever":
            pass
        return state

    return Task(dataset=four(), solver=solver(lambda: solve)(), scorer=match())


@tool
def look():
    async def execute(place: str):
        """Look.

        Args:
            place: where
        """
        return place

    return execute


# Refused


@task
def graded():
    return Task(dataset=four(), scorer=model_graded_qa())


@task
def graded_by_another():
    return Task(dataset=four(), scorer=own(model="mockllm/other"))


@task
def critic():
    return Task(dataset=four(), solver=[generate(), self_critique()], scorer=match())


@task
def tools():
    return Task(dataset=four(), solver=[use_tools(look()), generate()], scorer=match())


@task
def agent():
    return Task(dataset=four(), solver=basic_agent(tools=[look()]), scorer=match())


@task
def boxed():
    return Task(dataset=four(), scorer=match(), sandbox="docker")


@task
def boxes():
    return Task(dataset=four(sandbox="local"), scorer=match())


@task
def empty():
    return Task(dataset=MemoryDataset([]), scorer=match())


@task
def unscored():
    return Task(dataset=four())


@task
def silent():
    return Task(dataset=four(), solver=chain_of_thought(), scorer=match())


@task
def stopped():
    return Task(dataset=four(), scorer=match(), config=GenerateConfig(stop_seqs=["\\n\\n"]))


@task
def seen():
    image = [ContentText(text="What is it?"), ContentImage(image="data:image/png;base64,AAAA")]
    return Task(dataset=[Sample(input=[ChatMessageUser(content=image)], target="7")], scorer=match())


@task
def begun():
    turns = [ChatMessageUser(content="3 + 4?"), ChatMessageAssistant(content="It is")]
    return Task(dataset=[Sample(input=turns, target="7")], scorer=match())


@task
def shuffled():
    data = MemoryDataset([Sample(input="Which?", choices=[str(i) for i in range(20)], target="A")])
    data.shuffle_choices()
    return Task(dataset=data, solver=multiple_choice(), scorer=choice())


@task
def several():
    return Task(dataset=four(), scorer=own(value={"a": 1.0, "b": 0.0}))


@task
def raising():
    raise ValueError("no data\\nat all")


@task
def leaving():
    raise SystemExit(3)


@task
def bad_solver():
    return Task(dataset=four(), solver=multiple_choice(), scorer=choice())


@task
def bad_scorer():
    return Task(dataset=four(), scorer=own(error="it"))
'''

EVAL = """
import json, sys
from inspect_ai import eval
from inspect_ai.model import ModelOutput, ModelUsage, get_model
source, arguments, texts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
found = []
for text in texts:
    output = ModelOutput.from_content("m", text)
    output.usage = ModelUsage()
    model = get_model("mockllm/model", custom_outputs=lambda *_: output, memoize=False)
    (log,) = eval(source, model=model, task_args=arguments, epochs=1, display="none", log_dir="logs")
    assert log.status == "success", log.error.message
    scores = {sample.id: list(sample.scores.values())[0].value for sample in log.samples}
    found.append([scores[i] for i in log.eval.dataset.sample_ids])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "tasks.py").write_text(TASKS)
    (folder / "data.jsonl").write_text("".join(f'{{"q": "{i} + 9?", "a": "{i + 9}"}}\n' for i in range(5)))
    return folder


def source(tasks: Path, name: str) -> str:
    return f"inspect:{tasks}/tasks.py@{name}"


def refused(name: str, *words: str) -> None:
    with pytest.raises(FimError) as error:
        open_problems(name, n=2, seed=0)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 1000
    for word in words:
        assert word in message, message


def check_scores(found: ProblemSet, spec: str, arguments: dict, texts: list[str], folder: Path) -> None:
    """The grades are the scores of Inspect's own `eval`, of right and wrong answers both."""
    values = inspect(EVAL, spec, arguments, texts, folder=folder)
    for text, scores in zip(texts, values, strict=True):
        grades = [found.grade(problem, text).correct for problem in found.problems]
        assert grades == [score in ("C", 1, 1.0) for score in scores], text
    assert {score for scores in values for score in scores} >= {"C", "I"}


def test_multiple_choice(tasks):
    found = open_problems(source(tasks, "letters"), n=0, seed=0, system="Think.")
    assert [(p.index, p.system, p.shots) for p in found.problems] == [(i, "Be brief.", ()) for i in range(3)]
    assert "'ANSWER: $LETTER'" in found.problems[0].question
    for problem, number in zip(found.problems, "567", strict=True):
        assert f"Which is {number}?" in problem.question
        assert f"{problem.answer}) {number}" in problem.question
    assert {name: found.description[name] for name in ("kind", "config", "rows")} == {
        "kind": "inspect",
        "config": "{}",
        "rows": 3,
    }
    texts = ["ANSWER: A", "I think so.\n\nANSWER: B", "ANSWER: C\nor so", "B", ""]
    check_scores(found, f"{tasks}/tasks.py@letters", {}, texts, tasks)
    right = f"ANSWER: {found.problems[0].answer}"
    assert found.grade(found.problems[0], right) == Grade(True, found.problems[0].answer)


def test_arguments_and_a_sample(tasks):
    other = open_problems(source(tasks, 'letters:{"seed": 8}'), n=2, seed=1)
    assert len(other.problems) == 2
    plain = {p.index: p for p in open_problems(source(tasks, "letters"), n=0, seed=0).problems}
    assert [p.question != plain[p.index].question for p in other.problems].count(True) > 0
    again = open_problems(source(tasks, 'letters:{"seed": 8}'), n=2, seed=1)
    assert (again.problems, again.description) == (other.problems, other.description)


def test_local_data_and_a_prompt_template(tasks):
    found = open_problems(source(tasks, "local"), n=0, seed=0, system="Think.")
    assert [(p.question, p.answer, p.system) for p in found.problems] == [
        (f"{i} + 9? Say it.", str(i + 9), "Think.") for i in range(5)
    ]
    check_scores(found, f"{tasks}/tasks.py@local", {}, ["It is 9.", "The answer is 12", "nine", "13.0"], tasks)


def test_answered_examples(tasks, tmp_path):
    (problem,) = open_problems(source(tasks, "shots"), n=0, seed=0).problems
    assert problem.messages == (
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3 + 4?"},
    )
    assert problem.answer == "7, seven"
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    assert file_template(str(path)).prompt(problem) == "Add.|1 + 1?|2|3 + 4?|"
    path.write_text("{{ question }}")
    with pytest.raises(FimError, match="answered examples, which a template has as `messages`"):
        file_template(str(path)).prompt(problem)


def test_scores_between(tasks):
    found = open_problems(source(tasks, "parts"), n=1, seed=0)
    assert found.grade(found.problems[0], "12345678") == Grade(True, "it")
    assert found.grade(found.problems[0], "1234") == Grade(False, "it", "the score is 0.5, and only 1 is right")
    assert found.grade(found.problems[0], "1" * 16) == Grade(False, "it", "the score is 2, and only 1 is right")
    assert found.grade(found.problems[0], "") == Grade(False, "it")


def test_answers_that_a_scorer_cannot_take(tasks, monkeypatch):
    found = open_problems(source(tasks, "failing_later"), n=1, seed=0)
    grade = found.grade(found.problems[0], "5")
    assert (grade.correct, grade.note) == (False, "the task's own scorer failed: KeyError: 'no such answer'")
    found = open_problems(source(tasks, "slow"), n=1, seed=0)
    right = found.problems[0].answer
    assert found.grade(found.problems[0], right).correct
    monkeypatch.setattr(grader, "GRADING_SECONDS", 1)
    assert found.grade(found.problems[0], "forever").note.startswith("the answer couldn't be graded within")
    monkeypatch.undo()
    assert found.grade(found.problems[0], right).correct  # by a new process


def test_tasks_of_a_package(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages"  # where Inspect takes modules for installed
    about = folder / "sums-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "sums.py").write_text(TASKS)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sums\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[inspect_ai]\nsums = sums\n")
    monkeypatch.syspath_prepend(folder)
    grader.GRADER.close()  # the next has this path
    try:
        found = open_problems("inspect:sums/letters", n=1, seed=0)
        assert found.grade(found.problems[0], f"ANSWER: {found.problems[0].answer}").correct
        assert found.description["sums"] == "1.0"
        refused("inspect:sums/none", "inspect:sums/none", "found 0", "install the package")
    finally:
        grader.GRADER.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("graded", ["@graded, sample 1: ", "a model to score its answers"]),
        ("graded_by_another", ["a model to score its answers"]),
        ("critic", ["several generations"]),
        ("tools", ["needs tools"]),
        ("agent", ["needs tools"]),
        ("boxed", ["a sandbox"]),
        ("boxes", ["a sandbox"]),
        ("empty", ["can't be made", "has no samples"]),
        ("unscored", ["a scorer"]),
        ("silent", ["no model"]),
        ("stopped", ["`stop_seqs` of a generation"]),
        ("seen", ["more than text"]),
        ("begun", ["goes on from what it begins"]),
        ("shuffled", ["draws without a seed", "pass a seed"]),
        ("several", ["several scores"]),
        ("raising", ["can't be made of {}", "no data at all"]),
        ("leaving", ["can't be made of {}", "3"]),
        ("bad_solver", ["whose solver fails", "choices"]),
        ("bad_scorer", ["whose scorer fails", "no such answer"]),
        ('letters:{"sede": 1}', ["arguments that the task has, found sede"]),
        ('letters:{"seed": "x', ["JSON object"]),
        ("none", ["none", "check its name"]),
    ],
)
def test_tasks_that_are_refused(name, words, tasks):
    refused(source(tasks, name), *words)


@pytest.mark.parametrize("name", ["", "nowhere.py@x", "no_such_package/x", "a:b:c"])
def test_names_of_no_task(name):
    refused(f"inspect:{name}", f"inspect:{name}", "expected a task of inspect_ai's", "the package that has it")


def test_without_inspect_ai(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "inspect_ai" else find(name))
    refused("inspect:a/b", "inspect-ai isn't installed", "pip install 'mergekit-fim[inspect]'")


# Of inspect-evals, on data of the same shape as theirs, which the network has

STAND_INS = """
import csv, importlib
from inspect_ai import task
from inspect_ai.dataset import MemoryDataset

gpqa = importlib.import_module("inspect_evals.gpqa.gpqa")
gsm8k = importlib.import_module("inspect_evals.gsm8k.gsm8k")


@task
def gpqa_stand_in(cot: bool = True):
    fields = ["Record ID", "Question", "Correct Answer", "High-level domain", "Subdomain"]
    fields += [f"Incorrect Answer {i}" for i in (1, 2, 3)]
    with open("gpqa.csv", "w") as file:
        rows = csv.DictWriter(file, fields)
        rows.writeheader()
        for i in range(4):
            rows.writerow({name: f"{name} of {i}" for name in fields} | {"High-level domain": "Physics"})
    gpqa.download = lambda *_: None
    gpqa.GPQA_DIAMOND_CACHE_PATH = "gpqa.csv"
    return gpqa.gpqa_diamond(cot=cot)


@task
def gsm8k_stand_in(fewshot: int = 2):
    def hf_dataset(path, split, sample_fields, limit=None, **_):
        rows = [{"question": f"{split}: {i} + 5?", "answer": f"Count.\\n#### {i + 5}"} for i in range(4)]
        return MemoryDataset([sample_fields(row) for row in rows[:limit]])

    gsm8k.hf_dataset = hf_dataset
    return gsm8k.gsm8k(fewshot=fewshot)
"""


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    if importlib.util.find_spec("inspect_evals") is None:
        pytest.skip("inspect-evals needs Python 3.11 or newer")
    folder = tmp_path_factory.mktemp("evals")
    (folder / "evals.py").write_text(STAND_INS)
    return folder


def test_gpqa_diamond_of_inspect_evals(stand_ins):
    found = open_problems(f"inspect:{stand_ins}/evals.py@gpqa_stand_in", n=0, seed=0)
    assert [problem.index for problem in found.problems] == [0, 1, 2, 3]
    for i, problem in enumerate(found.problems):
        assert "Think step by step" in problem.question
        assert f"{problem.answer}) Correct Answer of {i}\n" in problem.question + "\n"
    texts = [f"Hm.\nANSWER: {letter}" for letter in "ABCD"]
    check_scores(found, f"{stand_ins}/evals.py@gpqa_stand_in", {}, texts, stand_ins)


def test_gsm8k_of_inspect_evals(stand_ins):
    found = open_problems(f'inspect:{stand_ins}/evals.py@gsm8k_stand_in:{{"fewshot": 3}}', n=0, seed=0)
    assert found.problems[0].system.count("Reasoning:\nCount.") == 3
    assert [problem.answer for problem in found.problems] == ["5", "6", "7", "8"]
    assert "test: 2 + 5?" in found.problems[2].question
    texts = ["ANSWER: 5", "It is so.\n\nANSWER: 7", "8 or so", "none"]
    check_scores(found, f"{stand_ins}/evals.py@gsm8k_stand_in", {"fewshot": 3}, texts, stand_ins)
