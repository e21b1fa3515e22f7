"""Problems, each to be answered several times -> the answers that are due, and their grades."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mergekit_fim.evaluate.problems.grading import final_answer
from mergekit_fim.evaluate.records import Answer, Grade, Key, Problem, ProblemSet, Written


@dataclass(frozen=True, eq=False)
class Questions:
    """All the problems of a sweep, each to be answered `samples` times."""

    problem_sets: Sequence[ProblemSet]
    samples: int

    @cached_property
    def keys(self) -> list[Key]:
        """Every answer that a run is to give, in order."""
        problems = (problem for problem_set in self.problem_sets for problem in problem_set.problems)
        return [(problem.source, problem.index, sample) for problem in problems for sample in range(self.samples)]

    @cached_property
    def _problems(self) -> dict[tuple[str, int], tuple[ProblemSet, Problem]]:
        return {
            (p.source, p.index): (problem_set, p) for problem_set in self.problem_sets for p in problem_set.problems
        }

    def problem(self, key: Key) -> Problem:
        """The problem that an answer is to."""
        return self._problems[key[:2]][1]

    def gradable(self, source: str | None = None) -> list[list[Key]]:
        """The problems of a source, or of all, whose answers can be graded: the keys [problem, sample]."""
        return [
            [(problem.source, problem.index, sample) for sample in range(self.samples)]
            for problem_set, problem in self._problems.values()
            if source in (None, problem.source) and problem.index not in problem_set.ungradable
        ]

    def graded(self, written: Written, seconds: float) -> Answer:
        """The answer in a completion that took so long."""
        key, completion, prompt = written
        problem_set, problem = self._problems[key[:2]]
        final, unclosed = final_answer(prompt, completion.text)
        if final is not None or problem.index in problem_set.ungradable:
            grade = problem_set.grade(problem, final or "")
        else:
            grade = Grade(False, note="it didn't end its thinking")
        return Answer(
            *key,
            prompt=prompt,
            text=completion.text,
            tokens=completion.tokens,
            ended=completion.ended,
            unclosed=unclosed,
            correct=grade.correct,
            found=grade.found,
            note=grade.note,
            seconds=round(seconds, 3),
        )
