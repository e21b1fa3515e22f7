"""An answer and what was expected -> a grade. All but `final_answer` runs in the process of `served`."""

import functools
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from mergekit_fim.errors import reason
from mergekit_fim.evaluate.records import Grade

# Only so many characters at the end of an answer are looked at: math-verify's patterns take time that grows faster
# than the text, and answers in the form that reasoning-gym's tasks ask for have up to 4,100 characters.
LOOKED_AT = 10_000
NOTHING = "no number or expression found"

OPEN, CLOSE = "<think>", "</think>"
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\s*\{")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")

# A plain number: a currency before it, thousands apart, a fraction or percent are all read.
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?:\\?[$€£¥₹])?\s*(?P<digits>\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
    r"(?P<exponent>[eE][+-]?\d{1,3})?(?P<rest>\s*/\s*0*[1-9]\d*|\s*\\?%)?"
)
# A number with what it counts: words of two letters or more, or metres; nothing follows that may be mathematics.
_UNIT = re.compile(r"\s+(?=[^\W\d_]{2}|m(?:\^[23]|[²³]|/s))[^\d$\\=+*^<>]*(?:\^[23])?\.?")
# What math-verify would misread without a word.
_MISREAD = (
    (re.compile(r"\d\s+\d+\s*/\s*\d+"), "a mixed number; write it as one fraction, or with \\frac"),
    (re.compile(r"\\(?:overline|dot)\b"), "a repeating decimal; write it as a fraction"),
)
_MARKED = re.compile(r"\\boxed\b|\$[^$]+\$|\\\(|\\\[")
_COMMANDS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{3,}|pi")


def final_answer(prompt: str, text: str) -> str | None:
    """Cut the thinking off a text; None where it didn't end.

    The answer is what follows the last `</think>`; the whole text where it doesn't think. Thinking begins with
    `<think>`, which some templates already write at the end of the prompt.
    """
    _, closed, answer = text.rpartition(CLOSE)
    return None if OPEN in answer or (not closed and prompt.rstrip().endswith(OPEN)) else answer


def why_ungradable(expected: str) -> str | None:
    """Say why math-verify can't grade answers against this one; None where it can."""
    number = _plain_number(expected)
    is_short = number is not None and len(number) <= 100  # so long as sources are, most have nothing else
    return None if is_short else _gold(expected)[1]


def grade_math(expected: str, answer: str) -> Grade:
    """Grade by math-verify: numbers, LaTeX, sets, intervals and the like that are equal.

    The answer is looked for in the last `<answer>...</answer>` of the last `LOOKED_AT` characters, or in all of these.
    math-verify takes the last `\\boxed{...}`, else what stands after "answer", else the last number or LaTeX between
    dollars. `_gold` reads the expected answer.
    """
    gold, why = _gold(expected)
    if why is not None:
        return Grade(None, note=why)
    parsed = _parse(_tagged(_end(answer)))
    if len(parsed) == 1 and isinstance(parsed[0], str):  # \boxed{3.}: found, and not understood as LaTeX
        parsed = _parse(parsed[0])
    if not parsed or isinstance(parsed[0], str):
        return Grade(False, note=NOTHING)
    from math_verify import verify

    return Grade(bool(verify(list(gold), parsed, timeout_seconds=None)), _written(parsed))


def grade_by_scorer(score: Callable[[str], float], expected: str | None, answer: str) -> Grade:
    """Grade by a task's own scorer, from 0 to 1, which must give 1.

    The scorer gets the content of the last `<answer>...</answer>`; without one that of the last `\\boxed{...}`; without
    either the whole answer; without blanks at its ends. Where that isn't right and the expected answer is a number, the
    scorer gets the number that math-verify finds in the same text.
    """
    end = _end(answer)
    found = _tagged(end)
    if found == end:
        boxed = last_boxed(found)
        found = found if boxed is None else _TEXT.sub(r"\1", boxed)
    candidates = [found.strip()]
    if expected is not None and _plain_number(expected) is not None:
        parsed = _parse(candidates[0])
        if parsed and not isinstance(parsed[0], str):
            candidates.append(_written(parsed))
    note = None
    for candidate in candidates:
        try:
            if candidate and score(candidate) > 1 - 1e-9:
                return Grade(True, candidate)
        except Exception as error:  # anything at all, by 106 scorers that others wrote
            note = f"the task's own scorer failed: {reason(error)}"
    return Grade(False, candidates[-1] or None, note if candidates[-1] else "the answer is empty")


def last_boxed(text: str) -> str | None:
    """Find the content of the last `\\boxed{...}` whose braces are closed."""
    for start in reversed([match.end() for match in _BOXED.finditer(text)]):
        depth = 1
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0) if text[at - 1] != "\\" else 0
            if depth == 0:
                return text[start:at]
    return None


def _end(answer: str) -> str:
    """Keep the end of an answer, from the beginning of a line where there is one: half a formula is another formula."""
    if len(answer) <= LOOKED_AT:
        return answer
    end = answer[-LOOKED_AT:]
    return end.partition("\n")[2] or end


def _tagged(end: str) -> str:
    return (_TAGGED.findall(end) or [end])[-1]


@functools.lru_cache(maxsize=10_000)
def _gold(expected: str) -> tuple[tuple[Any, ...], str | None]:
    """Read an expected answer for math-verify, or say why there is none.

    Of GSM8K's solutions, what follows the last `####` is read. A number is read as one, alone or before words
    (`17 years old`). What has a `\\boxed{...}`, or mathematics between `$...$`, `\\(...\\)` or `\\[...\\]`, is searched
    like an answer. Anything else is read as LaTeX, whole, as MATH's answers are. Words there that aren't in
    `\\text{...}` would be read as products of letters, and so aren't read at all.
    """
    from sympy import nan, zoo

    text = _same(expected.rpartition("####")[2].strip())
    number = _plain_number(text)
    why = next((f"the expected answer has {what}" for pattern, what in _MISREAD if pattern.search(text)), None)
    if not text:
        why = "the expected answer is empty"
    elif number is not None:
        text, why = number, None
    elif why is None and not _MARKED.search(text):
        bare = _COMMANDS.sub(" ", text)
        word = _WORD.search(re.sub(r"\b(?:and|or)\b", " ", bare)) or re.fullmatch(r"[^\W\d_]{2,}\.?", bare.strip())
        text, why = f"${text}$", "the expected answer has words; mathematics is written as $...$" if word else None
    parsed = () if why else tuple(_parse(text))
    if why is None and (not parsed or isinstance(parsed[0], str)):
        why = "math-verify finds no number or expression in the expected answer"
    elif why is None and getattr(parsed[0], "has", lambda *_: False)(nan, zoo):
        why = "the expected answer's value isn't defined"
    return parsed, why


def _same(text: str) -> str:
    """Replace the minus sign, and LaTeX's thin spaces between digits: math-verify reads neither."""
    return re.sub(r"(?<=[\d,])\s*\\[,!]\s*(?=\d)", "", text.replace("−", "-"))


def _plain_number(text: str) -> str | None:
    """Write a number in digits alone; None where `text` isn't a number, nor one with what it counts."""
    text = _same(text.rpartition("####")[2].strip())
    match = _NUMBER.match(text)
    if match is None or not (match.end() == len(text) or _UNIT.fullmatch(text, match.end())):
        return None
    digits = match["digits"].replace(",", "").replace(" ", "").rstrip(".")
    if match["exponent"]:
        digits = format(Decimal(digits + match["exponent"]), "f")
    percent = "%" if re.fullmatch(r"\s*\\?%|\s+(?:percent|pct)\.?", text[match.end("digits") :]) else ""
    fraction = "".join((match["rest"] or "").split()) if not percent else ""
    return f"{match['sign'].strip('+')}{digits}{fraction}{percent}"


def _parse(text: str) -> list[Any]:
    """Let math-verify find a value and its text; the text alone where it isn't understood; or nothing.

    Its own time limit needs signals, which only a main thread has: `served` has another.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(_same(text), targets, parsing_timeout=None)


def _written(parsed: list[Any]) -> str:
    """Write what math-verify found: a number as such, as the text of `**7**` would be `7**`."""
    from sympy import Rational

    return str(parsed[0]) if isinstance(parsed[0], Rational) else str(parsed[-1])
