"""A source of problems, as the user names it -> the problems, and who grades their answers."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import random
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mergekit_fim.errors import FimError, brief, reason, require, shown
from mergekit_fim.evaluate.problems import grader
from mergekit_fim.evaluate.records import Grade, Problem, ProblemSet

FORMS = "a JSONL file, reasoning-gym:TASK[:JSON], hf:DATASET[:CONFIG][:SPLIT] or inspect:TASK[:JSON]"

# Files that `datasets` reads, by how their names end.
_BUILDERS = {"jsonl": "json", "json": "json", "parquet": "parquet", "csv": "csv"}
_LONGEST_LINE = 1 << 20  # bytes; a file without line ends would fill the memory
_OBJECT = TypeAdapter(dict[str, Any])


def open_problems(
    source: str,
    *,
    n: int,
    seed: int,
    system: str | None = None,
    question_field: str | None = None,
    answer_field: str | None = None,
) -> ProblemSet:
    """Read, or make, the problems of a source, which is one of `FORMS`; docs/problems.md has the rules.

    All that it has where `n` is 0, else a sample by `seed`, in the source's order. The model is told `system` before
    the question, unless a row has a `system` of its own. The names of the fields are of files and datasets.

    Raises:
        FimError: there are none such, or a row isn't a problem.
    """
    if n < 0:
        raise FimError(f"{source}: expected a number of problems of 0 (all) or more, found {n}")
    require("math_verify", "sweep")
    if source.startswith("reasoning-gym:"):
        return _made(source, n, seed, system)
    if source.startswith("inspect:"):
        return _inspected(source, n, seed, system)
    if source.startswith("hf:"):
        rows, names, description = _dataset(source, question_field, answer_field)
        chosen = _sample(len(rows), n, seed)
        problems = [_problem(source, i, rows[i], names, system, f"{source}, row {i}") for i in chosen]
        description["fingerprint"] = _fingerprint(problems)
    else:
        every, checksum = _of_file(source, (question_field or "question", answer_field or "answer"), system)
        problems = [every[i] for i in _sample(len(every), n, seed)]
        description = {"kind": "file", "path": source, "sha256": checksum, "rows": len(every)}
    if not problems:
        raise FimError(f"{source}: expected a problem in each line or row, found none; add problems, or name others")
    ungradable = {problem.index: why for problem in problems if (why := grader.why_ungradable(problem.answer))}

    def grade(problem: Problem, answer: str) -> Grade:
        return grader.grade("math", expected=problem.answer, answer=answer)

    return ProblemSet(source, tuple(problems), grade, description, ungradable)


def warnings_of(problem_set: ProblemSet) -> list[str]:
    """Tell what a user should know of a source."""
    source, count = problem_set.source, len(problem_set.problems)
    again = count - len({problem.question for problem in problem_set.problems})
    warnings = []
    if again:
        warnings.append(
            f"{source}: {again} of {count} questions are there before; they count each time, and intervals, which "
            "take problems for independent, are too narrow"
        )
    for index, why in list(problem_set.ungradable.items())[:1]:
        warnings.append(
            f"{source}: answers to {len(problem_set.ungradable)} of {count} problems can't be graded, the first being "
            f"problem {index}: {why}"
        )
    return warnings


def _sample(count: int, n: int, seed: int) -> Iterable[int]:
    """Choose `n` of `count` rows, in order."""
    return sorted(random.Random(seed).sample(range(count), n)) if 0 < n < count else range(count)


def _problem(
    source: str, index: int, row: Mapping[str, Any], names: tuple[str, str], system: str | None, where: str
) -> Problem:
    """Make a problem of a row of a file or a dataset, or raise what is wrong with it."""
    for name in names:
        if name not in row:
            raise FimError(f"{where}: expected the field `{name}`, found {', '.join(map(brief, row)) or 'none'}")
    question, answer = (row[name] for name in names)
    own = row.get("system")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = format(Decimal(repr(answer)), "f")
    kinds = ((names[0], question, "text"), (names[1], answer, "text or a number"), ("system", own or "", "text"))
    for name, value, kind in kinds:
        if not isinstance(value, str):
            raise FimError(f"{where}, `{name}`: expected {kind}, found {shown(value)}")
    if not question.strip():
        raise FimError(f"{where}, `{names[0]}`: expected a question, found {shown(question)}; remove the row")
    return Problem(source, index, question, answer, own or system)


def _object(text: bytes, what: str, remedy: str) -> dict[str, Any]:
    """Read a JSON object, or say that `text` is something else."""
    try:
        return _OBJECT.validate_json(text)
    except ValidationError as error:
        why = error.errors(include_url=False)[0]["msg"]
        found = shown(text.decode("utf-8", "replace"))
        raise FimError(f"{what}: expected a JSON object, found {found} ({why}); {remedy}") from None


def _of_file(path: str, names: tuple[str, str], system: str | None) -> tuple[list[Problem], str]:
    """Read all problems of a JSONL file, and its checksum."""
    if not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "no file of this name"
        raise FimError(f"{path}: expected {FORMS}, found {what}; check the name")
    checksum = hashlib.sha256()
    problems: list[Problem] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), 1):
                if len(line) > _LONGEST_LINE:
                    raise FimError(
                        f"{path}, line {number}: expected a problem of at most {_LONGEST_LINE >> 20} MB, found a "
                        "longer line; write one object a line"
                    )
                checksum.update(line)
                where, text = f"{path}, line {number}", line.removeprefix(b"\xef\xbb\xbf").strip()
                if text:
                    row = _object(text, where, "write one object a line, in UTF-8")
                    problems.append(_problem(path, len(problems), row, names, system, where))
    except OSError as error:
        raise FimError(f"{path}: can't be read ({error.strerror or error}); check the file") from error
    return problems, checksum.hexdigest()


def _made(source: str, n: int, seed: int, system: str | None) -> ProblemSet:
    """Make problems by reasoning-gym."""
    require("reasoning_gym", "sweep")
    task, _, text = source.removeprefix("reasoning-gym:").partition(":")
    if not n:
        raise FimError(f"{source}: expected a number of problems, found 0 (all), and reasoning-gym has no end of them")
    config = _arguments(source, text)
    for name in config.keys() & {"seed", "size"}:
        raise FimError(f"{source}: `{name}` is set by the number of problems and the seed; remove it here")
    asked: dict[str, Any] = {"task": task, "config": json.dumps(config, sort_keys=True), "seed": seed}
    made = [grader.carried_out("problem", f"{source}, problem {i}", index=i, size=n, **asked) for i in range(n)]
    problems = [Problem(source, i, its["question"], its["answer"] or "", system) for i, its in enumerate(made)]
    description = {"kind": "reasoning-gym", **asked, "version": importlib.metadata.version("reasoning-gym")}
    description["fingerprint"] = _fingerprint(problems)

    def grade(problem: Problem, answer: str) -> Grade:
        return grader.grade("score", answer=answer, index=problem.index, size=n, **asked)

    ungradable = {i: its["why"] for i, its in enumerate(made) if its["why"]}
    return ProblemSet(source, tuple(problems), grade, description, ungradable)


def _arguments(source: str, text: str) -> dict[str, Any]:
    """Read what follows a task's name, if anything does."""
    encoded = text.encode("utf-8", "replace") or b"{}"
    return _object(encoded, source, 'write it after the task, such as :{"max_terms": 3}')


def _inspected(source: str, n: int, seed: int, system: str | None) -> ProblemSet:
    """Take the problems of a task of inspect_ai's, whose scorer grades the answers."""
    require("inspect_ai", "inspect")
    task, _, text = source.removeprefix("inspect:").partition(":{")
    asked = {"task": task, "config": json.dumps(_arguments(source, text and "{" + text), sort_keys=True)}
    count = grader.carried_out("inspect_samples", source, **asked)
    problems = []
    for index in _sample(count, n, seed):
        its = grader.carried_out("inspect_problem", source, index=index, **asked)
        *before, last = its["messages"]
        own = before.pop(0)["content"] if before and before[0]["role"] == "system" else system
        problems.append(Problem(source, index, last["content"], its["target"], own, tuple(before)))
    text = json.dumps([(problem.index, problem.messages, problem.answer) for problem in problems])
    description = {"kind": "inspect", **asked, "rows": count, "version": importlib.metadata.version("inspect-ai")}
    description["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
    place = task.split("@" if "@" in task else "/")[0]  # a file or a package
    if os.path.isfile(place):
        with open(place, "rb") as file:
            description["sha256"] = hashlib.sha256(file.read()).hexdigest()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
        description[place] = importlib.metadata.version(place)

    def grade(problem: Problem, answer: str) -> Grade:
        return grader.grade("inspect_score", answer=answer, index=problem.index, **asked)

    return ProblemSet(source, tuple(problems), grade, description, {})


def _dataset(
    source: str, question_field: str | None, answer_field: str | None
) -> tuple[Any, tuple[str, str], dict[str, str | int]]:
    """Load a dataset: its rows, the question's and the answer's column, and what a record needs to repeat it."""
    require("datasets", "sweep")
    import datasets

    name, *parts = source.removeprefix("hf:").split(":")
    if not name or len(parts) > 2:
        raise FimError(f"{source}: expected hf:DATASET[:CONFIG][:SPLIT]; write it like that")
    shows_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        config, split, rows = _loaded(source, name, parts)
    except FimError:
        raise
    except Exception as error:  # of the Hub, the file system, arrow and datasets' own, which has dozens
        raise FimError(
            f"{source}: can't be loaded as a dataset ({reason(error)}); check the name, and the connection if it is on "
            "the Hub"
        ) from error
    finally:
        if shows_bars:
            datasets.enable_progress_bars()
    columns = rows.column_names
    question = question_field or ("problem" if "problem" in columns and "question" not in columns else "question")
    names = (question, answer_field or "answer")
    for column in names:
        if column not in columns:
            raise FimError(
                f"{source}: expected the column `{column}`, found {', '.join(map(brief, columns))}; name "
                "the question's field and the answer's"
            )
    wanted = [column for column in dict.fromkeys((*names, "system")) if column in columns]
    description: dict[str, str | int] = {"kind": "hf", "dataset": name, "config": config or "", "split": split}
    description |= {"version": importlib.metadata.version("datasets"), "rows": len(rows)}
    return rows.select_columns(wanted), names, description


def _loaded(source: str, name: str, parts: list[str]) -> tuple[str | None, str, Any]:
    """Load a dataset's configuration, split and rows.

    A single part after the name is a configuration where the dataset has one of that name, else a split.
    """
    import datasets

    is_saved = any(os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json"))
    if len(parts) == 2 and parts[0] and (is_saved or os.path.isfile(name)):
        raise FimError(f"{source}: {name} has no configurations, but found {shown(parts[0])}; remove it")
    if is_saved:  # by `save_to_disk`: load_dataset refuses the one kind, and takes the other's splits from file names
        saved = datasets.load_from_disk(name)
        splits = {str(saved.split or "all"): saved} if isinstance(saved, datasets.Dataset) else dict(saved)
        split = _split(source, list(splits), parts)
        return None, split, splits[split]
    if os.path.isfile(name):
        builder = _BUILDERS.get(os.path.splitext(name)[1].lstrip("."))
        if builder is None:
            raise FimError(f"{source}: expected a file that ends in {', '.join(_BUILDERS)}, or a folder; name another")
        # `load_dataset` would do, but it counts its uses at a server.
        return None, _split(source, ["all"], parts), getattr(datasets.Dataset, f"from_{builder}")(name)
    if len(parts) == 1 and parts[0] in datasets.get_dataset_config_names(name):
        parts = [parts[0], ""]
    config = (parts[0] or None) if len(parts) == 2 else None
    split = _split(source, datasets.get_dataset_split_names(name, config), parts)
    return config, split, datasets.load_dataset(name, config, split=split)


def _split(source: str, splits: list[str], parts: list[str]) -> str:
    """Take the split that was named; else `test`, else the only one."""
    named = parts[-1] if parts else ""
    split = named or (splits[0] if len(splits) == 1 else "test")
    if split not in splits:
        raise FimError(
            f"{source}: expected a configuration or one of the splits {', '.join(splits)}, found "
            f"{shown(named) if named else 'no split `test`'}; name one, as in {source}:{splits[0]}"
        )
    return split


def _fingerprint(problems: Iterable[Problem]) -> str:
    """Sum up questions and answers: another version of a library or a dataset may have others under the same name."""
    text = "".join(json.dumps([problem.index, problem.question, problem.answer]) for problem in problems)
    return hashlib.sha256(text.encode()).hexdigest()
