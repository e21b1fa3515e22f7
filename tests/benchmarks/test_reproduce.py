"""Every command and every piece of Python of docs/reproduce.md, from the page, on stand-ins of the same shape."""

import collections
import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
import tiny
from click.testing import CliRunner
from environments import ROOT, blocks

from mergekit_fim.cli import main
from mergekit_fim.evaluate.problems.sources import open_problems

pytestmark = pytest.mark.slow

PAIRS = {
    "1.5b": ("Qwen/Qwen2.5-Math-1.5B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "Qwen/Qwen2.5-Math-1.5B-Instruct"),
    "7b": ("Qwen/Qwen2.5-Math-7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "Qwen/Qwen2.5-Math-7B-Instruct"),
}
QWEN3 = ("Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Thinking-2507")
# The two families' templates, as far as a single question needs them.
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)

# Rows as the data sets have them, each with a right answer as a model writes it.
GSM8K = [
    ({"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 72"}, "72"),
    ({"question": "How much?", "answer": "It is $1,250.\n#### 1,250"}, "1250"),
    ({"question": "How far?", "answer": "-3 miles\n#### -3"}, "-3"),
]
MATH500 = [
    ({"problem": "Polar?", "solution": "...", "answer": r"\left( 3, \frac{\pi}{2} \right)"}, r"(3, \pi/2)"),
    ({"problem": "Who?", "solution": "...", "answer": r"\text{Evelyn}"}, r"\text{Evelyn}"),
    ({"problem": "Find it.", "solution": "...", "answer": "p - q"}, "p-q"),
]
TOOLKIT = {
    "minerva_math": [
        ({"problem": "Size?", "solution": r"\[s=\frac{45}{3600} 7200=\boxed{1.6} \mathrm{~cm}\]", "idx": 0}, "1.6"),
        ({"problem": "Power?", "solution": r"So $L=\boxed{4.5e33}$ erg.", "idx": 1}, r"4.5 \times 10^{33}"),
        (
            {"problem": "Angle?", "solution": r"First \boxed{7}, then \boxed{\arcsin{1.3 \sin{\theta_w}}}.", "idx": 2},
            r"\arcsin(1.3 \sin\theta_w)",
        ),
    ],
    "olympiadbench": [
        ({"id": 1, "question": "Find k.", "solution": ["..."], "final_answer": ["2"]}, "2"),
        ({"id": 2, "question": "Both?", "solution": ["..."], "final_answer": ["$\\frac{1}{3}, 4$"]}, "4, 1/3"),
        ({"id": 3, "question": "When?", "solution": ["..."], "final_answer": ["$x>5$"]}, "x > 5"),
    ],
    "college_math": [
        ({"data_topic": "a", "question": "Simplify.", "answer": "$-3 \\sqrt{2}$"}, r"-3\sqrt{2}"),
        ({"data_topic": "b", "question": "Expand.", "answer": "$10-4 n$"}, "10-4n"),
        ({"data_topic": "c", "question": "Solve.", "answer": "$2$ or $-3$"}, "2, -3"),
    ],
    "aime24": [
        ({"id": 60, "problem": "Minutes?", "answer": "204"}, "204"),
        ({"id": 61, "problem": "Alice?", "answer": "33"}, "033"),
        ({"id": 62, "problem": "Product?", "answer": 540}, "540"),
    ],
}
RIGHT = {
    "hf:openai/gsm8k:main:test": GSM8K,
    "hf:HuggingFaceH4/MATH-500:test": MATH500,
    **{f"{name}.jsonl": rows for name, rows in TOOLKIT.items()},
}
# Of which of their fields.
QUESTION_AND_ANSWER = {
    "hf:openai/gsm8k:main:test": {"question", "answer"},
    "hf:HuggingFaceH4/MATH-500:test": {"problem", "answer"},
    "minerva_math.jsonl": {"problem", "solution"},
    "olympiadbench.jsonl": {"question", "final_answer"},
    "college_math.jsonl": {"question", "answer"},
    "aime24.jsonl": {"problem", "answer"},
}
LIMITS = {"10240": "4", "32768": "6", "1": "1"}  # the page's limits of tokens, and the stand-ins'


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """A folder in which every name of the page is that of something small."""
    folder = tmp_path_factory.mktemp("reproduce")
    shutil.copytree(ROOT / "example_configs", folder / "example_configs")
    qwen, deepseek = tiny.tokenizer(chat_template=QWEN), tiny.tokenizer(chat_template=DEEPSEEK)
    for size, (base, long, instruct) in PAIRS.items():
        short = tiny.config("qwen2", vocab_size=100, tie_word_embeddings=size == "1.5b", max_position_embeddings=256)
        wide = tiny.config("qwen2", vocab_size=100, tie_word_embeddings=False, max_position_embeddings=512)
        model = tiny.build(short)
        for name, made, tokenizer in (
            (base, model, qwen),
            (long, tiny.tuned(model, 1, cfg=wide), deepseek),
            (instruct, tiny.tuned(model, 2), qwen),
        ):
            tiny.save(made, folder / name)
            tokenizer.save_pretrained(folder / name)
    model = tiny.build(tiny.config("qwen3", vocab_size=100, tie_word_embeddings=True, max_position_embeddings=512))
    for name, made in zip(QWEN3, (model, tiny.tuned(model, 1)), strict=True):
        tiny.save(made, folder / name)
        qwen.save_pretrained(folder / name)
    for name, config, rows in (("openai/gsm8k", "main", GSM8K), ("HuggingFaceH4/MATH-500", "default", MATH500)):
        (folder / name).mkdir(parents=True)
        datasets.Dataset.from_list([row for row, _ in rows]).to_parquet(folder / name / "test.parquet")
        card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: test\n    path: test.parquet\n---\n"
        (folder / name / "README.md").write_text(card, encoding="utf-8")
    for name, rows in TOOLKIT.items():
        path = folder / "Qwen2.5-Math" / "evaluation" / "data" / name / "test.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row, _ in rows), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _there(stand_ins, monkeypatch):
    monkeypatch.chdir(stand_ins)


TEXT = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
PYTHON = blocks("reproduce.md", "python")
SHELL = [block.replace("\\\n", " ") for block in blocks("reproduce.md", "sh")]
CONVERT, CHECK, AVERAGE, VOTE = range(4)


def run_python(block: int) -> None:
    exec(compile(PYTHON[block], "docs/reproduce.md", "exec"), {})


def the_only_block(*words: str) -> str:
    (found,) = (block for block in SHELL if all(word in shlex.split(block) for word in words))
    return found


def sweep(command: str, *more: str) -> tuple[dict, list[dict], list[str]]:
    """Run a command of the page, with `more` options: what is in its sweep.json, its answers, and its words."""
    program, name, *words = shlex.split(command)
    assert (program, name) == ("mergekit-fim", "sweep")
    words.remove("--cuda")
    at = words.index("--max-tokens") + 1
    limit = LIMITS[words[at]]
    quietly = ("--quiet", "--no-write-model-card")  # mergekit asks the Hub for what is in a card
    result = CliRunner().invoke(main, ["sweep", *words[:at], limit, *words[at + 1 :], *more, *quietly])
    assert result.exit_code == 0, result.output
    out = Path(words[1])
    record = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    assert record["identity"]["max_tokens"] == int(limit)
    assert record["identity"]["system"] == r"Please reason step by step, and put your final answer within \boxed{}."
    assert record["findings"]["ungradable"] == []
    answers = [answer for path in sorted((out / "answers").iterdir()) for answer in lines(path)]
    assert {answer["correct"] for answer in answers} <= {True, False}
    assert not (out / "models").exists()
    return record, answers, words


# In place of the page's own five strengths, which the first sweep has.
FEWER = ("--set", "alpha_mean=0.5")


def named(words: list[str], option: str) -> list[str]:
    return [value for word, value in itertools.pairwise(words) if word == option]


def rows(record: dict) -> list[str]:
    return [run["run"] for run in record["findings"]["summary"]["runs"]]


def rows_at_half(size: str) -> list[str]:
    """The rows that the page lists, of one strength."""
    (listed,) = blocks("reproduce.md", "text")
    kept = [row for row in listed.splitlines() if "=" not in row or row.endswith("=0.5")]
    return [row.replace("1.5B", size.upper()) for row in kept]


@pytest.fixture(scope="module")
def converted(stand_ins):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(stand_ins)
        run_python(CONVERT)


def test_all_of_the_page_is_run():
    assert len(PYTHON) == 4
    assert len(SHELL) == 14
    assert [block.count("mergekit-fim ") for block in SHELL] == [1, 3, 2, 1, 0, *[1] * 9]
    assert SHELL[4] == "git clone --depth 1 https://github.com/QwenLM/Qwen2.5-Math\n"


def test_one_command():
    """A tied base beside an untied long model, and twelve merges. The second time nothing is new."""
    record, answers, _ = sweep(SHELL[0])
    merges = {"fim_kron alpha_mean": 6, "task_arithmetic weight": 6}
    assert dict(collections.Counter(row.split("=")[0] for row in rows(record)[2:])) == merges
    assert rows(record)[:2] == ["base", "long"]
    assert len(answers) == 14 * 3
    assert sum(merges.values()) == 12
    assert "merges of six strengths by `fim_kron` and by uniform task" in TEXT
    with open("Qwen/Qwen2.5-Math-1.5B/config.json", encoding="utf-8") as file:
        assert json.load(file)["tie_word_embeddings"] is True
    assert sweep(SHELL[0])[1] == answers


def test_the_task_vectors():
    pairs = [(base, long) for base, long, _ in PAIRS.values()] + [QWEN3]
    for command, pair in zip(SHELL[1].splitlines(), pairs, strict=True):
        program, *words = shlex.split(command)
        assert (program, words[0], *words[1:3]) == ("mergekit-fim", "delta", *pair)
        result = CliRunner().invoke(main, [*words, "--quiet"])
        assert result.exit_code == 0, result.output
        content = json.loads(Path(words[-1]).read_text(encoding="utf-8"))
        assert (content["base_model"], content["model"]) == pair
        # What the page explains is what the table shows.
        explained = re.findall(r"^- \*([^*]+)\*(?: beside \*(\w+)\*)?:", TEXT, re.M)
        assert all(title in result.output for titles in explained for title in titles)


def in_loop(block: str) -> list[str]:
    """The commands of a loop over pairs, written out."""
    pairs, body = re.fullmatch(r"for pair in ([^;]+); do\n(.*)\ndone\n", block, re.S).groups()
    return [line.replace("$pair", pair) for pair in pairs.split() for line in body.splitlines()]


STRENGTHS = ("0.4", "0.8")


@pytest.mark.parametrize("pair", ["l2s-1.5b", "qwen3-4b", "l2s-7b"])
def test_generated_problems(pair):
    first, second = (command for command in in_loop(SHELL[2]) if f"first-{pair}" in shlex.split(command))
    assert named(shlex.split(first), "--n") == ["100"]
    few = ("--n", "2")
    sweep(first, *few)
    record, answers, _ = sweep(second, *few)
    expected = ["base", "long"]
    expected += [f"fim_ties alpha_mean={s} density=0.2" for s in STRENGTHS]
    expected += [f"linear weight={s}" for s in STRENGTHS]
    expected += [f"ties weight={s} density=0.2" for s in STRENGTHS]
    sparse = "density=0.02 lambda=4.0"
    expected += [f"{name}={s} {sparse}" for name in ("fim_ties alpha_mean", "ties weight") for s in STRENGTHS]
    assert sorted(rows(record)) == sorted(expected)
    assert len(answers) == 2 * len(expected)


@pytest.mark.parametrize("pair", ["l2s-1.5b", "qwen3-4b", "l2s-7b"])
def test_generated_problems_by_fim_kron(pair):
    (command,) = (command for command in in_loop(SHELL[3]) if f"kron-{pair}" in shlex.split(command))
    record, _, _ = sweep(command, "--n", "2")
    assert sorted(rows(record)) == sorted(["base", "long", *(f"fim_kron alpha_mean={s}" for s in STRENGTHS)])


def test_the_table_of_data_sets():
    cells = [line.split("|")[1:-1] for line in TEXT.splitlines() if re.match(r"\| \w+( Math)? \| [\d,]+ \|", line)]
    assert len(cells) == len(RIGHT)
    for (_, _, place, fields, _), (source, rows) in zip(cells, RIGHT.items(), strict=True):
        named_source = source.removesuffix(".jsonl").removeprefix("hf:").split(":")
        assert re.findall(r"`([^`]+)`", place) == named_source
        assert re.findall(r"`(\w+)`", fields) == [name for name in rows[0][0] if name in QUESTION_AND_ANSWER[source]]
    problems = sum(int(count.replace(",", "")) for _, count, *_ in cells)
    assert f"These are {problems:,} answers a row" in TEXT


def test_the_problems_are_read_and_graded(converted, capsys):
    for source, expected in RIGHT.items():
        found = open_problems(source, n=0, seed=0)
        assert [p.question for p in found.problems] == [row.get("question", row.get("problem")) for row, _ in expected]
        assert found.ungradable == {}
        for problem, (_, right) in zip(found.problems, expected, strict=True):
            assert found.grade(problem, rf"So it is $\boxed{{{right}}}$.").correct is True, (source, right)
            assert found.grade(problem, r"So it is $\boxed{123456}$.").correct is False
    (rounded,) = [p for p in open_problems("minerva_math.jsonl", n=0, seed=0).problems if p.answer == "1.6"]
    assert found.grade(rounded, r"\boxed{1.60004}").correct is False  # right for the toolkit
    run_python(CHECK)
    shown = capsys.readouterr().out
    assert re.findall(r"^(\S+): 3 problems, 0 of which", shown, re.M) == list(RIGHT)


def test_the_first_check(converted):
    record, answers, words = sweep(the_only_block("check"))
    assert named(words, "--problems") == list(RIGHT)
    assert rows(record) == ["base", "long", "Qwen2.5-Math-1.5B-Instruct", "fim_ties sharpness=1.0"]
    assert len(answers) == 4 * 18  # as the page has it
    assert {answer["tokens"] for answer in answers} == {1}


@pytest.fixture(scope="module")
def greedy(converted, stand_ins) -> dict:
    """What both commands leave in the folder of the greedy runs."""
    first, second = (block for block in SHELL if "greedy-1.5b" in shlex.split(block))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(stand_ins)
        _, before, words = sweep(first)
        record, after, again = sweep(second)
    assert named(words, "--problems") == named(again, "--problems") == list(RIGHT)
    assert named(words, "--n") == ["0"]
    answers = {(*answer.values(),) for answer in after}
    assert {(*answer.values(),) for answer in before} < answers  # added to, not made anew
    # The merges have the base's template: of all these runs, only the long model's prompts begin a thought.
    long = lines(stand_ins / "greedy-1.5b" / "answers" / "long.jsonl")
    assert [a["prompt"] for a in after if a["prompt"].endswith("<think>\n")] == [a["prompt"] for a in long]
    return record


def test_the_six_benchmarks(greedy):
    (listed,) = blocks("reproduce.md", "text")
    assert rows(greedy) == listed.splitlines()
    assert list(greedy["findings"]["by_source"]) == list(RIGHT)
    assert all(rows({"findings": {"summary": s}}) == rows(greedy) for s in greedy["findings"]["by_source"].values())
    assert greedy["identity"]["temperature"] == 0
    assert [its["problems"] for its in greedy["identity"]["problems"]] == [3] * 6


def test_the_mean_of_the_six(greedy, capsys):
    run_python(AVERAGE)
    shown = capsys.readouterr().out.splitlines()
    assert [line[:32].rstrip() for line in shown] == rows(greedy)
    # As many problems of each, so that the mean of the means is that of all.
    for line, run in zip(shown, greedy["findings"]["summary"]["runs"], strict=True):
        accuracy, tokens = re.fullmatch(r"([\d.]+) +(\d+) tokens", line[32:].strip()).groups()
        assert float(accuracy) == pytest.approx(100 * run["accuracy"]["value"], abs=0.051)
        assert float(tokens) == pytest.approx(run["tokens_mean"], abs=0.51)


@pytest.mark.parametrize("size", PAIRS)
def test_sixteen_answers(size, converted):
    record, answers, words = sweep(the_only_block(f"aime24-{size}"), *FEWER)
    assert named(words, "--problems") == ["aime24.jsonl"]
    assert (record["identity"]["samples"], record["identity"]["temperature"]) == (16, 0.3)
    assert rows(record) == rows_at_half(size)
    assert len(answers) == 6 * 3 * 16


def test_the_vote(stand_ins, tmp_path, monkeypatch, capsys):
    """The right answer is the commonest in two problems of four, there in a third, and in the last there is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "aime24-1.5b" / "answers").mkdir(parents=True)
    found = {0: ["204", "204", "7", None], 1: ["7", "7", "33", None], 2: [None] * 4, 3: ["1", "25", "25", "0"]}
    right = {0: "204", 1: "33", 2: "540", 3: "25"}
    content = [
        {"index": index, "found": text, "correct": text == right[index]} for index in found for text in found[index]
    ]
    (tmp_path / "aime24-1.5b" / "answers" / "long.jsonl").write_text("".join(json.dumps(a) + "\n" for a in content))
    run_python(VOTE)
    assert capsys.readouterr().out.split() == ["long", "2", "of", "4"]


def test_the_7b_pair(converted):
    record, answers, words = sweep(the_only_block("greedy-7b"), *FEWER)
    assert named(words, "--problems") == list(RIGHT)
    assert rows(record) == rows_at_half("7b")
    assert len(answers) == 6 * 18


def test_a_pair_of_today(converted):
    record, answers, words = sweep(the_only_block("example_configs/qwen3-4b-fim-ties.yml", "linear"))
    assert named(words, "--problems") == ["hf:HuggingFaceH4/MATH-500:test", "aime24.jsonl"]
    counts = collections.Counter(run["method"] for run in record["runs"])
    assert counts.keys() == {None, "fim_ties", "linear", "ties"}
    assert counts[None] == 2
    assert all(4 <= count <= 7 for method, count in counts.items() if method)
    assert "linear weight=0.8" in rows(record)
    assert len(answers) == 6 * sum(counts.values())
    known = set(rows(record))
    record, _, _ = sweep(the_only_block("example_configs/qwen3-4b-fim-ties.yml", "density=0.02"))
    new = [run for run in record["runs"] if run["run"] not in known]
    assert known < set(rows(record))
    assert {run["method"] for run in new} == {"fim_ties", "ties"}
    assert {(run["settings"]["density"], run["settings"]["lambda"]) for run in new} == {(0.02, 4.0)}


def test_the_long_models_tokenizer(converted):
    copy, echo, command = the_only_block("thinking-1.5b").splitlines()
    program, *words = shlex.split(copy)
    assert program == "cp"
    shutil.copy(*words)
    program, line, arrow, path = shlex.split(echo)
    assert (program, arrow) == ("echo", ">>")
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    record, answers, _ = sweep(command, *FEWER)
    prompts = {Path(entry["answers"]).stem: lines(Path("thinking-1.5b", entry["answers"])) for entry in record["runs"]}
    thinking = {run for run, its in prompts.items() if all(answer["prompt"].endswith("<think>\n") for answer in its)}
    assert thinking == set(prompts) - {"base", "Qwen2.5-Math-1.5B-Instruct"}
    assert len(answers) == 6 * 3
