"""A source of problems, as the user names it -> the problems, and who grades their answers."""

import collections
import hashlib
import importlib.metadata
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any, BinaryIO

from mergekit_fim.errors import FimError, brief, reason, require, shown
from mergekit_fim.evaluate.problems import grader
from mergekit_fim.evaluate.records import Grade, Problem, ProblemSet

FORMS = "a JSONL file, reasoning-gym:TASK[:JSON] or hf:DATASET[:CONFIG][:SPLIT]"
LONGEST_LINE = 1 << 20  # bytes

# Files that `datasets` reads by their name's end.
_BUILDERS = {"jsonl": "json", "json": "json", "parquet": "parquet", "csv": "csv"}


def open_problems(
    source: str,
    *,
    n: int,
    seed: int,
    system: str | None = None,
    question_field: str | None = None,
    answer_field: str | None = None,
) -> ProblemSet:
    """Read, or make, the problems of a source.

    Args:
        source: a JSONL file, `reasoning-gym:TASK[:JSON]` or `hf:DATASET[:CONFIG][:SPLIT]`; docs/sweep.md has the rules.
        n: how many; 0 for all that it has. Fewer than it has are a sample by `seed`, in the source's order.
        seed: of the sample, and of what is procedural.
        system: what the model is told before the question, unless a row has a `system` of its own.
        question_field: the name of the question's field, of files and datasets.
        answer_field: likewise the answer's.

    Raises:
        FimError: there are none such, or a row isn't a problem.
    """
    if n < 0:
        raise FimError(f"{source}: expected a number of problems of 0 (all) or more, found {n}")
    if source.startswith("reasoning-gym:"):
        return _procedural(source, n, seed, system)
    require("math_verify", "sweep")
    if source.startswith("hf:"):
        problems, description = _of_dataset(source, n, seed, system, question_field, answer_field)
    else:
        problems, description = _of_file(
            source, n, seed, system, question_field or "question", answer_field or "answer"
        )
    ungradable = {problem.index: why for problem in problems if (why := grader.why_ungradable(problem.answer))}

    def grade(problem: Problem, answer: str) -> Grade:
        return grader.grade("math", expected=problem.answer, answer=answer)

    return _problem_set(source, problems, grade, description, ungradable)


def _problem_set(
    source: str,
    problems: list[Problem],
    grade: Callable[[Problem, str], Grade],
    description: dict[str, str | int],
    ungradable: dict[int, str],
) -> ProblemSet:
    def unless_ungradable(problem: Problem, answer: str) -> Grade:
        why = ungradable.get(problem.index)
        return grade(problem, answer) if why is None else Grade(None, note=why)

    again = sum(count - 1 for count in collections.Counter(problem.question for problem in problems).values())
    warnings = []
    if again:
        warnings.append(
            f"{source}: {again} of {len(problems)} questions are there before; they count each time, and intervals, "
            "which take problems for independent, are too narrow"
        )
    if ungradable:
        index, why = next(iter(ungradable.items()))
        warnings.append(
            f"{source}: answers to {len(ungradable)} of {len(problems)} problems can't be graded, the first being "
            f"problem {index}: {why}"
        )
    return ProblemSet(source, tuple(problems), unless_ungradable, description, ungradable, tuple(warnings))


def _sample(count: int, n: int, seed: int) -> Iterable[int]:
    """Which of `count` rows to take, in order."""
    return sorted(random.Random(seed).sample(range(count), n)) if 0 < n < count else range(count)


def _problem(
    source: str, index: int, row: Mapping[str, Any], names: tuple[str, str], system: str | None, where: str
) -> Problem:
    """A problem from a row of a file or a dataset.

    Raises:
        FimError: the row isn't one.
    """
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
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise FimError(f"{where}, `{name}`: expected text, found half of a character ({shown(value)})") from error
    if not question.strip():
        raise FimError(f"{where}, `{names[0]}`: expected a question, found {shown(question)}; remove the row")
    return Problem(source, index, question, answer, own or system)


# JSONL files


def _of_file(
    path: str, n: int, seed: int, system: str | None, question_field: str, answer_field: str
) -> tuple[list[Problem], dict[str, str | int]]:
    if not os.path.exists(path):
        raise FimError(f"{path}: expected {FORMS}, found no file of this name; check the name")
    if not os.path.isfile(path):
        raise FimError(
            f"{path}: expected a JSONL file, found {'a folder' if os.path.isdir(path) else 'something else'}"
        )
    problems = []
    try:
        with open(path, "rb") as file:
            count, checksum = _count(path, file)
            chosen = set(_sample(count, n, seed))
            file.seek(0)
            index = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    problem = _problem(path, index, _row(line, where), (question_field, answer_field), system, where)
                    if index in chosen:
                        problems.append(problem)
                    index += 1
    except OSError as error:
        raise FimError(f"{path}: can't be read ({error.strerror or error}); check the file") from error
    if not count:
        raise FimError(f"{path}: expected a problem a line, found an empty file")
    return problems, {"kind": "file", "path": path, "sha256": checksum, "rows": count}


def _count(path: str, file: BinaryIO) -> tuple[int, str]:
    """How many rows a file has, and its checksum; no line is longer than can be held."""
    checksum = hashlib.sha256()
    rows = number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise FimError(
                f"{path}, line {number}: expected a problem of at most {LONGEST_LINE >> 20} MB, found a longer line; "
                "write one JSON object a line"
            )
        checksum.update(line)
        rows += bool(line.strip())
    return rows, checksum.hexdigest()


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        # Objects as tuples of pairs: a dictionary has forgotten what was there twice.
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=tuple, parse_constant=_not_finite)
    except UnicodeDecodeError as error:
        raise FimError(
            f"{where}: expected UTF-8, found the byte 0x{line[error.start]:02x}; save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        hint = "a list begins here; " if line.lstrip().startswith(b"[") else ""
        raise FimError(
            f"{where}: expected a JSON object, found something else ({hint}{reason(error)}); write one object a line"
        ) from error
    if not isinstance(row, tuple):
        raise FimError(f"{where}: expected a JSON object, found {_named(row)}; write one object a line")
    found = dict(row)
    if len(found) < len(row):
        twice = next(name for name, count in collections.Counter(name for name, _ in row).items() if count > 1)
        raise FimError(f"{where}: found `{brief(twice)}` twice; remove one")
    return found


def _named(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else shown(value)


def _not_finite(constant: str) -> None:
    raise ValueError(f"the value {constant}, which isn't finite")


# reasoning-gym


def _procedural(source: str, n: int, seed: int, system: str | None) -> ProblemSet:
    require("reasoning_gym", "sweep")
    require("math_verify", "sweep")
    task, _, text = source.removeprefix("reasoning-gym:").partition(":")
    if not n:
        raise FimError(f"{source}: expected a number of problems, found 0 (all), and a procedural source has no end")
    try:
        config = json.loads(text or "{}", parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        raise FimError(
            f'{source}: expected JSON after the task, such as {{"max_terms": 3}}, found {shown(text)} ({reason(error)})'
        ) from error
    if not isinstance(config, dict):
        raise FimError(f"{source}: expected a JSON object after the task, found {_named(config)}")
    for name in config.keys() & {"seed", "size"}:
        raise FimError(f"{source}: `{name}` is set by the number of problems and the seed; remove it here")
    settings = json.dumps(config, sort_keys=True)
    entries = {"task": task, "config": settings, "seed": seed, "size": n}
    problems, ungradable = [], {}
    for index in range(n):
        try:
            made = grader.grader().ask("problem", seconds=grader.GRADING_SECONDS, index=index, **entries)
        except grader.EndedError as error:
            raise FimError(
                f"{source}: problem {index} couldn't be made within {grader.MAKING_SECONDS} seconds; take another "
                "configuration"
            ) from error
        problems.append(Problem(source, index, made["question"], made["answer"] or "", system))
        if made["why"]:
            ungradable[index] = made["why"]

    def grade(problem: Problem, answer: str) -> Grade:
        return grader.grade("score", answer=answer, index=problem.index, **entries)

    description: dict[str, str | int] = {
        "kind": "reasoning-gym",
        "task": task,
        "config": settings,
        "seed": seed,
        "version": importlib.metadata.version("reasoning-gym"),
        "fingerprint": _fingerprint(problems),
    }
    return _problem_set(source, problems, grade, description, ungradable)


# Datasets


def _of_dataset(
    source: str, n: int, seed: int, system: str | None, question_field: str | None, answer_field: str | None
) -> tuple[list[Problem], dict[str, str | int]]:
    require("datasets", "sweep")
    import datasets

    name, *parts = source.removeprefix("hf:").split(":")
    if not name or len(parts) > 2:
        raise FimError(f"{source}: expected hf:DATASET[:CONFIG][:SPLIT], found {shown(source)}")
    bars = datasets.are_progress_bars_disabled()
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
        if not bars:
            datasets.enable_progress_bars()
    columns = rows.column_names
    question = question_field or ("problem" if "problem" in columns and "question" not in columns else "question")
    answer = answer_field or "answer"
    for column in (question, answer):
        if column not in columns:
            raise FimError(
                f"{source}: expected the column `{column}`, found {', '.join(map(brief, columns))}; name "
                "the question's field and the answer's"
            )
    rows = rows.select_columns([c for c in dict.fromkeys((question, answer, "system")) if c in columns])
    if not len(rows):
        raise FimError(f"{source}: expected problems, found a split without rows")
    problems = [
        _problem(source, index, rows[index], (question, answer), system, f"{source}, row {index}")
        for index in _sample(len(rows), n, seed)
    ]
    return problems, {
        "kind": "hf",
        "dataset": name,
        "config": config or "",
        "split": split,
        "version": importlib.metadata.version("datasets"),
        "fingerprint": _fingerprint(problems),
        "rows": len(rows),
    }


def _loaded(source: str, name: str, parts: list[str]) -> tuple[str | None, str, Any]:
    """A dataset's configuration, split and rows.

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
            raise FimError(f"{source}: expected a file that ends in {', '.join(_BUILDERS)}, or a folder")
        # `load_dataset` would do, but it counts its uses at a server.
        rows = getattr(datasets.Dataset, f"from_{builder}")(name)
        return None, _split(source, ["all"], parts), rows
    config = parts[0] if parts else ""
    if len(parts) == 1:
        known = datasets.get_dataset_config_names(name)
        config, parts = (config, []) if config in known else ("", parts)
    split = _split(source, datasets.get_dataset_split_names(name, config or None), parts)
    return config or None, split, datasets.load_dataset(name, config or None, split=split)


def _split(source: str, splits: list[str], parts: list[str]) -> str:
    """The split that was named; else `test`, else the only one."""
    named = parts[-1] if parts else ""
    if named:
        if named not in splits:
            raise FimError(
                f"{source}: expected a configuration or one of the splits {', '.join(splits)}, found {shown(named)}"
            )
        return named
    if "test" in splits or len(splits) == 1:
        return "test" if "test" in splits else splits[0]
    raise FimError(f"{source}: it has no split `test`, but {', '.join(splits)}; name one, as in {source}:{splits[0]}")


def _fingerprint(problems: Iterable[Problem]) -> str:
    """A checksum of questions and answers: of what two versions of a library or a dataset may make of one name."""
    checksum = hashlib.sha256()
    for problem in problems:
        checksum.update(json.dumps([problem.index, problem.question, problem.answer]).encode())
    return checksum.hexdigest()
