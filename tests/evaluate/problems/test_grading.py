"""Answers and what was expected: what is found, what is right, what can't be graded, and what an answer can't do."""

import concurrent.futures
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mergekit_fim.errors import FimError
from mergekit_fim.evaluate.problems import grader, grading
from mergekit_fim.evaluate.records import Grade


def math(expected: str, answer: str) -> Grade:
    return grader.grade("math", expected=expected, answer=answer)


def score(task: str, answer: str, index: int = 0) -> Grade:
    return grader.grade("score", answer=answer, index=index, task=task, config="{}", seed=0, size=4)


def made(task: str, index: int = 0) -> dict:
    return grader.carried_out("problem", task, index=index, task=task, config="{}", seed=0, size=4)


@pytest.mark.parametrize(
    ("prompt", "text", "answer"),
    [
        ("2+3?", "It is 5.", "It is 5."),
        ("2+3?", "", ""),
        ("2+3?", "<think>2 and 3</think>It is 5.", "It is 5."),
        ("2+3?<think>\n", "2 and 3</think>It is 5.", "It is 5."),
        ("2+3?<think>\n\n</think>\n\n", "It is 5.", "It is 5."),
        ("Think between <think> and </think>. 2+3?", "It is 5.", "It is 5."),
        ("What does <think> mean?", "It opens.", "It opens."),
        ("2+3?", "<think>a</think>b<think>c</think>d", "d"),
        ("2+3?", "<think>2 and 3 are 5", None),
        ("2+3?<think>\n", "2 and 3 are 5", None),
        ("2+3?<think>", "", None),
        ("2+3?", "<think>a</think>b<think>c", None),
    ],
)
def test_the_final_answer_follows_the_thinking(prompt, text, answer):
    assert grading.final_answer(prompt, text) == answer


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed {a \} b}", r"a \} b"),
        (r"\boxed{1} and \boxed{2", "1"),
        ("{1}", None),
    ],
)
def test_the_last_box_has_balanced_braces(text, content):
    assert grading.last_boxed(text) == content


# expected answers, with answers that are the same and answers that aren't
EXPECTED = [
    ("72", ["72", "So 70 + 2 = 72.", r"\boxed{72}", "72.0", "**72**", "<answer>72</answer>", "$72$"], ["27", "-72"]),
    ("1,234", ["1234", "1,234", r"\boxed{1{,}234}", r"1\,234"], ["1.234", "234"]),
    ("1 234", ["1234"], ["235"]),
    ("-3.5", ["-3.5", "−3.5", r"$-\frac{7}{2}$"], ["3.5"]),
    ("50%", ["50%", "0.5", r"$50\%$"], ["5"]),
    ("50 percent", ["0.5"], ["5"]),
    ("$18", ["$18", r"\boxed{\$18}", r"\boxed{18.}", "18 dollars"], ["8"]),
    ("-$5", ["-5"], ["5"]),
    ("3/4", ["3/4", "0.75", r"\frac{3}{4}"], ["4/3"]),
    ("12 cm", ["12 cm", "12", r"\boxed{12\text{ cm}}"], ["1200"]),
    ("12 m^2", ["12 m^2", "12"], ["144"]),
    ("17 years old", ["He is 17."], ["71"]),
    ("1e3", ["1000"], ["1"]),
    ("so 3 + 4 = 7\n#### 1,072", ["1072"], ["7"]),
    (r"\frac{1}{2}", ["1/2", "0.5"], ["2"]),
    (r"\left( 3, \frac{\pi}{2} \right)", [r"$(3, \pi/2)$"], ["3"]),
    ("x^2+1", ["$1 + x^2$"], ["$x^2$", "1"]),
    (r"(-\infty, 2]", [r"\boxed{(-\infty,2]}"], [r"\boxed{(-\infty,2)}", "2"]),
    (r"2\sqrt{3}", [r"$\sqrt{12}$"], ["2"]),
    (r"Hence \boxed{\frac{3}{2}}.", ["1.5"], ["3"]),
    ("6 or 7", [r"\boxed{7, 6}"], ["6"]),
    ("x=5", ["5", "$x = 5$"], ["4"]),
    (r"\text{Evelyn}", [r"\boxed{Evelyn}", r"\boxed{\text{Evelyn}}"], [r"\boxed{Sam}"]),
]


@pytest.mark.parametrize(("expected", "same", "others"), EXPECTED, ids=[row[0] for row in EXPECTED])
def test_math(expected, same, others):
    assert grader.why_ungradable(expected) is None
    assert [answer for answer in same if not math(expected, answer).correct] == []
    assert [answer for answer in others if math(expected, answer).correct is not False] == []


@pytest.mark.parametrize(
    ("expected", "why"),
    [
        ("yes", "words"),
        ("no", "words"),
        ("Paris", "words"),
        ("12 oranges and 3 apples", "words"),
        ("2pi", "words"),
        ("", "empty"),
        ("so it is\n#### ", "empty"),
        ("1 1/2", "mixed number"),
        (r"0.\overline{3}", "repeating decimal"),
        ("½", "math-verify finds no"),
        ("$$", "math-verify finds no"),
        ("1" * 5000, "math-verify finds no"),
        ("1/0", "isn't defined"),
    ],
)
def test_what_cannot_be_graded_against(expected, why):
    assert why in grader.why_ungradable(expected)
    grade = math(expected, "1")
    assert grade.correct is None
    assert why in grade.note


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("So 3 + 4 = 7. The answer is 7.", "7"),
        (r"We get \boxed{7}. Check: 3 + 5 = 8.", "7"),
        ("<answer>7</answer> as 3 + 5 = 8", "7"),
        ("<answer>6</answer> no, <answer>7</answer>", "7"),
        ("He pays $7", "7"),
        ("In total 7 hours", "7"),
    ],
)
def test_what_is_taken_for_the_answer(answer, found):
    assert math("7", answer) == Grade(True, found)


@pytest.mark.parametrize("answer", ["", "I don't know.", "yes", "<answer></answer> 7", "\\" * 100, "$$$", "\x00"])
def test_an_answer_without_a_number(answer):
    assert math("7", answer) == Grade(False, None, grading.NOTHING)


def test_only_the_end_of_a_long_answer_is_looked_at():
    long = "so we add 1 to x. " * 60_000
    assert math("5", f"{long}\nThe answer is 5.").correct
    assert math("5", f"The answer is 5.\n{'?' * grading.LOOKED_AT}") == Grade(False, None, grading.NOTHING)
    # Half a formula at the cut would be another one.
    assert math("5", f"$3{' ' * grading.LOOKED_AT}$\n5").correct
    assert math("7", "1" * 1_000_000).correct is False


@pytest.mark.parametrize("answer", ["9^9^9^9^9", "10**10**10", "$9^{9^{9^9}}$", "$" + "{" * 4000 + "}" * 4000 + "$"])
def test_an_answer_that_takes_for_ever_is_wrong(answer, monkeypatch):
    assert math("5", "5").correct  # the process is there
    monkeypatch.setattr(grader, "GRADING_SECONDS", 1)
    grade = math("5", answer)
    assert grade.correct is False
    assert "couldn't be graded within 1 seconds" in grade.note
    monkeypatch.undo()
    assert math("5", "5") == Grade(True, "5")


@pytest.mark.slow
def test_threads_grade_too(monkeypatch):
    """math-verify's own time limit works in no thread but the main one."""
    answers = {"5": True, "6": False, "9^9^9^9^9": False, "5.0": True}
    monkeypatch.setattr(grader, "GRADING_SECONDS", 3)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        grades = list(pool.map(lambda answer: math("5", answer).correct, list(answers) * 2))
    assert grades == list(answers.values()) * 2


def test_the_process_that_grades_is_started_again():
    ours = grader.Grader()
    ask = {"do": "math", "expected": "5"}
    assert ours.ask(**ask, answer="5")["correct"]
    ours._process.kill()
    ours._process.wait()
    assert ours.ask(**ask, answer="5")["correct"]
    ours.close()
    assert ours.ask(**ask, answer="5")["correct"]
    ours.close()


def test_an_interrupted_question_leaves_no_reply_for_the_next(monkeypatch):
    ours = grader.Grader()
    ask = {"do": "math", "expected": "5"}
    assert ours.ask(**ask, answer="5")["correct"]
    process = ours._process

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(ours._process, "stdout", SimpleNamespace(readline=interrupted, close=process.stdout.close))
    with pytest.raises(KeyboardInterrupt):
        ours.ask(**ask, answer="5")
    assert ours.ask(**ask, answer="6")["correct"] is False
    ours.close()


def test_a_process_that_cannot_start_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    ours = grader.Grader()
    with pytest.raises(FimError, match="couldn't be started"):
        ours.ask("math", expected="5", answer="5")


# Those of each kind: numbers, words, lists, grids, fractions, code, logic, games, graphs.
TASKS = [
    *("chain_sum", "basic_arithmetic", "gcd", "prime_factorization", "fraction_simplification", "gsm_symbolic"),
    *("decimal_arithmetic", "simple_equations", "polynomial_multiplication", "bitwise_arithmetic", "base_conversion"),
    *("number_sorting", "word_sorting", "spiral_matrix", "letter_counting", "spell_backward", "caesar_cipher"),
    *("leg_counting", "syllogism", "knights_knaves", "family_relationships", "countdown", "mini_sudoku", "sokoban"),
    *("graph_color", "shortest_path", "n_queens", "calendar_arithmetic", "time_intervals", "string_insertion"),
]


@pytest.mark.parametrize("task", TASKS)
def test_reasoning_gym_takes_its_own_answers(task):
    problems = [made(task, index) for index in range(4)]
    assert {problem["why"] for problem in problems} == {None}
    answers = [problem["answer"] for problem in problems]
    graded = 0
    for index, answer in enumerate(answers):
        if answer is None:  # any right answer will do
            assert score(task, "(none)", index).correct is False
            continue
        for written in (answer, f"I think.\n<answer>{answer}</answer>", f"So $\\boxed{{{answer}}}$ it is."):
            assert score(task, written, index).correct, written
            graded += 1
        others = [other for other in answers if other not in (answer, None)]
        assert not any(score(task, other, index).correct for other in others) or task in ("syllogism", "shortest_path")
    assert graded or task == "graph_color"


@pytest.mark.parametrize(
    "written",
    ["The sum is {}.", "{} apples", r"\boxed{{{} \text{{ apples}}}}", r"\boxed{{\text{{{}}}}}", "x = {}"],
)
def test_reasoning_gym_takes_the_number_of_a_text(written):
    answer = made("chain_sum")["answer"]
    grade = score("chain_sum", written.format(answer))
    assert grade.correct
    assert grade.found == answer
    assert not score("chain_sum", written.format(int(answer) + 1)).correct


def test_part_of_a_score_is_not_right():
    answer = made("word_sorting")["answer"]
    assert not score("word_sorting", f"It is {answer}").correct  # gets a part
    assert score("word_sorting", "").note == "the answer is empty"


def test_a_scorer_that_takes_anything_grades_nothing():
    """The task's scorer compares bool('False') with bool('True')."""
    assert made("game_of_life_halting")["why"] == "the task's own scorer takes anything for right"


def test_a_scorer_that_raises():
    def scorer(answer: str) -> float:
        raise IndexError("list index out of range")

    grade = grading.grade_by_scorer(scorer, "word", "an answer")
    assert grade == Grade(False, "an answer", "the task's own scorer failed: IndexError: list index out of range")


@pytest.mark.parametrize(
    ("task", "code"),
    [
        ("spiral_matrix", "__import__('os').system('touch {0}')"),
        ("spiral_matrix", "[open({0!r}, 'w').write('1')]"),
        ("spiral_matrix", "__import__('pathlib').Path({0!r}).touch()"),
        ("countdown", "open({0!r}, 'w')"),
        ("countdown", "eval(\"__import__('subprocess').run(['touch', {0!r}])\")"),
        ("n_queens", "__import__('os').mkdir({0!r})"),
    ],
)
def test_code_in_an_answer_is_kept_from_files_and_processes(task, code, tmp_path):
    """Some scorers evaluate the answer."""
    target = tmp_path / "made"
    grade = score(task, code.format(str(target)))
    assert grade.correct is False
    assert "the answer is code" in grade.note
    assert not target.exists()


def test_a_scorer_is_limited_in_time(monkeypatch):
    made("countdown")
    monkeypatch.setattr(grader, "GRADING_SECONDS", 1)
    assert "couldn't be graded" in score("countdown", "9**9**9**9").note


def test_this_process_imports_none_of_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "1+1?", "answer": "$2$"}\n')
    code = (
        "import sys\n"
        "from mergekit_fim.evaluate.problems import grader, grading, sources\n"
        "found = sources.open_problems('a.jsonl', n=0, seed=0)\n"
        "assert found.grade(found.problems[0], '2').correct\n"
        "sources.open_problems('reasoning-gym:chain_sum', n=1, seed=0)\n"
        "heavy = ('torch', 'transformers', 'mergekit', 'math_verify', 'sympy', 'reasoning_gym', 'datasets', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("[]\n", "")
