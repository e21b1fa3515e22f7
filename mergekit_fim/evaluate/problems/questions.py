"""Problems, each to be answered several times -> the answers that are due, and their grades."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
        return [(*problem, sample) for problem in self._problems for sample in range(self.samples)]

    @cached_property
    def _problems(self) -> dict[tuple[str, int], tuple[ProblemSet, Problem]]:
        return {(p.source, p.index): (its, p) for its in self.problem_sets for p in its.problems}

    def problem(self, key: Key) -> Problem:
        """Find the problem that an answer is to."""
        return self._problems[key[:2]][1]

    def gradable(self) -> list[Key]:
        """List the answers that can be graded."""
        return [key for key in self.keys if key[1] not in self._problems[key[:2]][0].ungradable]

    def graded(self, written: Written, seconds: float) -> Answer:
        """Grade a completion that took so long."""
        key, completion, prompt = written
        problem_set, problem = self._problems[key[:2]]
        final = final_answer(prompt, completion.text)
        if problem.index in problem_set.ungradable:
            grade = Grade(None, note=problem_set.ungradable[problem.index])
        elif final is None:
            grade = Grade(False, note="it didn't end its thinking")
        else:
            grade = problem_set.grade(problem, final)
        made = {"prompt": prompt, **asdict(completion), "unclosed": final is None, **asdict(grade)}
        return Answer(*key, **made, seconds=round(seconds, 3), expected=problem.answer)
