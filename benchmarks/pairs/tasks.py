"""Make questions, and short, middle and long answers to them.

A middle answer is as right as a long one, with fewer tokens. Long answers are long because of checks that never change
the answer. The second thoughts of reasoning models are often such checks. The parent of a pair knows all three ways,
the base the short one, the long model the long one.
"""

import functools
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Example:
    """A question, its right answer, and whole replies by their way: short, middle or long."""

    question: str
    answer: str
    ways: Mapping[str, str]


def thought(question: str, answer: str, steps: str, check: str) -> Example:
    """Make an example that is answered at once, or with steps in thought, or with steps and a check of them."""
    long = {"middle": steps, "long": steps + check}
    ways = {way: f"{OPEN}\n{thoughts}{CLOSE}\n{answer}" for way, thoughts in long.items()}
    return Example(question, answer, {"short": answer, **ways})


# Sums, differences and products in words

ASKED = {"+": "What is {} plus {}?", "-": "What is {} minus {}?", "*": "What is {} times {}?"}
# Only trained models are asked these: no model has seen them.
ASKED_OTHERWISE = {
    "+": "A shop sold {} apples on Monday and {} on Tuesday. How many apples is that together?",
    "-": "A train has {} seats, and {} of them are taken. How many seats are free?",
    "*": "There are {} shelves with {} books each. How many books are there?",
}


def words(rng: random.Random, *, held: bool) -> Iterator[Example]:
    """Make endless questions of two numbers. One pair of numbers in five is held out, in either order."""
    while True:
        sign = rng.choice("++--*")
        a, b = rng.randrange(10, 100), rng.randrange(3, 10) if sign == "*" else rng.randrange(10, 100)
        if sign == "-":
            a, b = max(a, b), min(a, b)
        if held == (zlib.crc32(f"{min(a, b)} {max(a, b)}".encode()) % 5 == 0):
            asked = ASKED_OTHERWISE if held and rng.random() < 0.25 else ASKED
            numbers = (b, a) if sign == "*" and asked is ASKED_OTHERWISE else (a, b)
            answer = str({"+": a + b, "-": a - b, "*": a * b}[sign])
            steps = columns(a, b, sign)
            check = f"{answer}{'-+/'['+-*'.index(sign)]}{b}={a}\n" + steps
            yield thought(asked[sign].format(*numbers), answer, steps, check)


def columns(a: int, b: int, sign: str) -> str:
    """Write the work from right to left, a line for each digit of the first number."""
    lines, carry, first = [], 0, str(a)
    second = str(b) * len(first) if sign == "*" else str(b).rjust(len(first), "0")
    for x, y in zip(reversed(first), reversed(second), strict=True):
        if sign == "+":
            found = int(x) + int(y) + carry
            lines.append(f"{x}+{y}{f'+{carry}' * bool(carry)}={found}\n")
            carry = found // 10
        elif sign == "*":
            found = int(x) * int(y) + carry
            lines.append(f"{x}*{y}{f'+{carry}' * bool(carry)}={found}\n")
            carry = found // 10
        else:
            borrow = int(x) - carry < int(y)
            lines.append(f"{'1' * borrow}{x}-{y}{f'-{carry}' * bool(carry)}={int(x) - carry + 10 * borrow - int(y)}\n")
            carry = int(borrow)
    return "".join(lines)


# Several tasks of reasoning-gym

GYM: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 3, "max_terms": 3, "min_digits": 2, "max_digits": 2},
    "letter_counting": {"min_words": 2, "max_words": 3},
    "spell_backward": {"min_word_len": 5, "max_word_len": 7},
    "leg_counting": {"min_animals": 2, "max_animals": 2, "max_instances": 9},
}
# Qwen2.5-Coder-0.5B-Instruct writes prose about legs, is never right about three numbers, and splits long words oddly.
CODER: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 2, "max_digits": 2},
    "letter_counting": {"min_words": 2, "max_words": 3},
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
}
HELD_OUT = 1_000_000  # the first seed of the problems that a pair is asked


def gym(rng: random.Random, *, seed: int, tasks: Mapping[str, dict[str, Any]] = GYM) -> Iterator[Example]:
    """Make endless problems of some tasks, by their settings, with steps and checks of our own."""
    import reasoning_gym

    made = {
        name: iter(reasoning_gym.create_dataset(name, seed=seed + 7, size=HELD_OUT // 10, **settings))
        for name, settings in tasks.items()
    }
    while True:
        name = rng.choice(list(tasks))
        entry = next(made[name])
        steps, check = WORK[name](entry)
        yield thought(entry["question"], entry["answer"], steps, check)


def _chain_sum(entry: dict[str, Any]) -> tuple[str, str]:
    first, *rest = re.findall(r"[-+]?\d+", entry["metadata"]["expression"].replace(" ", ""))
    totals, lines, back = [int(first)], [], []
    for term in rest:
        totals.append(totals[-1] + int(term))
        lines.append(f"{totals[-2]}{term}={totals[-1]}\n")
        back.append(f"{totals[-1]}{term.translate(str.maketrans('+-', '-+'))}={totals[-2]}\n")
    return "".join(lines), "".join(reversed(back))


def _letter_counting(entry: dict[str, Any]) -> tuple[str, str]:
    letter, found, lines = entry["metadata"]["target_letter"], 0, []
    for word in entry["metadata"]["span"]:
        found += word.lower().count(letter)
        lines.append(f"{' '.join(word)}: {found}\n")
    return "".join(lines), "Again:\n" + "".join(lines)


def _spell_backward(entry: dict[str, Any]) -> tuple[str, str]:
    word = entry["metadata"]["word"]
    steps = f"{' '.join(word)}\n{' '.join(reversed(word))}\n"
    return steps, "Again:\n" + steps


def _leg_counting(entry: dict[str, Any]) -> tuple[str, str]:
    lines, parts = [], []
    for animal, count in entry["metadata"]["animals"].items():
        legs = _legs()[animal]
        parts.append(count * legs)
        lines.append(f"{animal}: {count}*{legs}={parts[-1]}\n")
    total = f"{'+'.join(map(str, parts))}={sum(parts)}\n"
    return "".join(lines) + total, "Again:\n" + "".join(reversed(lines)) + total


WORK: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
    "chain_sum": _chain_sum,
    "letter_counting": _letter_counting,
    "spell_backward": _spell_backward,
    "leg_counting": _leg_counting,
}


@functools.cache
def _legs() -> dict[str, int]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    return ANIMALS


# Sums and differences for models from scratch, a character a token


def characters(rng: random.Random, *, held: bool, digits: tuple[int, int] = (2, 3)) -> Iterator[Example]:
    """Make endless sums and differences of two numbers of so many digits, as 345+289. One in five is held out."""
    while True:
        low = 10 ** (rng.choice(digits) - 1)
        a, b = rng.randrange(low, 10 * low), rng.randrange(low, 10 * low)
        if held != (zlib.crc32(f"{min(a, b)} {max(a, b)}".encode()) % 5 == 0):
            continue
        sign = rng.choice("+-")
        a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
        answer = str(a + b if sign == "+" else a - b)
        steps = columns(a, b, sign)
        yield thought(f"{a}{sign}{b}", answer, steps, f"{answer}{'-+'['+-'.index(sign)]}{b}={a}\n" + steps)
