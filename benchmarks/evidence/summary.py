"""A pair's answers -> what each variant is worth above the chord, and beside uniform task arithmetic.

What all pairs show is kept in docs/evidence/, two files for each, as a pair itself takes hours to make and to ask:
NAME.npz has its answers, NAME.json what follows from them. `python -m benchmarks.evidence.summary` makes the second of
the first again, where the statistics have changed, without any model. Pairs without answers stay as they are.
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.evidence.answers import MODELS, Answers, load_answers
from benchmarks.evidence.variants import TRIMMED
from mergekit_fim.evaluate.front.bootstrap import Estimate
from mergekit_fim.evaluate.front.statistics import AreaDifference, summarize

REFERENCE = "task_arithmetic"
KEPT = Path("docs/evidence")
DEVELOPMENT = KEPT / "development"  # of pairs that methods are made on


@dataclass(frozen=True)
class Difference:
    """What a bootstrap over problems says of a difference of accuracies.

    Attributes:
        value: the difference.
        sign: 1 or -1 where its interval of 95 % is above or below 0, 0 where it has 0 within; None where not known.
        interval: that interval; None where it wasn't kept.
    """

    value: float
    sign: int | None
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, estimate: Estimate) -> "Difference":
        assert estimate.low is not None
        assert estimate.high is not None
        low, high = estimate.low, estimate.high
        return cls(_short(estimate.value), (low > 0) - (high < 0), (_short(low), _short(high)))


@dataclass(frozen=True)
class Row:
    """A variant on a pair, in units of accuracy.

    Attributes:
        variant: its name.
        area: the front's mean height between base and long.
        gain: that above the chord's, held out: see `mergekit_fim.evaluate.front.statistics`. None where the answers
            weren't kept.
        against: the area minus that of uniform task arithmetic; None for itself.
        trimmed: the area minus that of mergekit's ties of the same density; None without trimming, or where that
            wasn't run.
        points: every merge's strength, accuracy and mean tokens; none where they weren't kept.
        prose: the most that any of the merges takes for an unrelated text, in nats a token; None where not measured.
        gap: the widest that is left between neighbours on the way from base to long, in parts of that way in tokens;
            None where the points weren't kept.
    """

    variant: str
    area: float
    gain: Difference | None
    against: Difference | None
    trimmed: Difference | None = None
    points: tuple[tuple[float, float, float], ...] = ()
    prose: float | None = None
    gap: float | None = None


@dataclass(frozen=True)
class Found:
    """What a pair shows.

    Attributes:
        kind: its recipe.
        seed: of its training.
        one_sided: steps in which the long model was trained from the base; None where both were trained from a parent.
        ends: accuracy and mean tokens of base, long and parent; None of a parent that wasn't asked, or isn't.
        rows: of all variants that were run.
        prose: what an unrelated text costs them, in nats a token; empty where not measured.
        distance: ‖δ‖ / ‖θ0‖ of the decoder layers; None where it wasn't kept.
        hours: of a core, that training and answers took; None where that wasn't kept.
        source: where all this was measured.
        fidelity: by `benchmarks.fidelity`: correlations [end] by signal and by what is moved; empty before it has run.
    """

    kind: str
    seed: int
    one_sided: int | None
    ends: Mapping[str, tuple[float, float] | None]
    rows: tuple[Row, ...]
    prose: Mapping[str, float]
    distance: float | None
    hours: float | None
    source: str
    fidelity: Mapping[str, Mapping[str, list[float]]]

    @property
    def name(self) -> str:
        return f"{self.kind} {self.seed}" + ("" if self.one_sided is None else f", one-sided {self.one_sided}")

    @property
    def base(self) -> tuple[float, float]:
        """The base's accuracy and mean tokens."""
        return _known(self.ends["base"])

    @property
    def long(self) -> tuple[float, float]:
        """The long model's."""
        return _known(self.ends["long"])

    def row(self, variant: str) -> Row | None:
        """What was found of a variant; None where it wasn't run."""
        return next((row for row in self.rows if row.variant == variant), None)

    def above(self, row: Row) -> Difference:
        """What a row's front has above the chord: held out, or in the sample where the answers weren't kept.

        The second has neither sign nor interval, as the luckiest merges make the front higher than it is.
        """
        if row.gain is not None:
            return row.gain
        return Difference(_short(row.area - (self.base[0] + self.long[0]) / 2), None, None)


def file_of(kind: str, seed: int, one_sided: int | None) -> str:
    """What a pair's files are called, but for their endings."""
    return f"{kind}-{seed}" + ("" if one_sided is None else f"-one-sided-{one_sided}")


def ends(answers: Answers) -> dict[str, tuple[float, float] | None]:
    """Where base, long and parent came out."""
    found = {name: (_short(run.correct.mean()), _short(run.tokens.mean())) for name, run in answers.models.items()}
    return {name: found.get(name) for name in MODELS}


def rows(answers: Answers) -> tuple[Row, ...]:
    """Every variant's row."""
    return tuple(row(answers, variant) for variant in answers.fronts)


def row(answers: Answers, variant: str) -> Row:
    """A variant's row, beside its references alone: no row depends on what else was run."""
    base, long = answers.models["base"], answers.models["long"]
    beside = [name for name in (REFERENCE, TRIMMED.get(variant)) if name in answers.fronts and name != variant]
    runs = [run for name in dict.fromkeys([variant, *beside]) for run in answers.fronts[name]]
    summary = summarize([base, long, *runs], base.run, long.run)
    area = next(area for area in summary.areas if area.method == variant)
    its = [run for run in summary.runs if run.method == variant]
    assert area.held_out is not None
    return Row(
        variant,
        _short(area.area.value),
        Difference.of(area.held_out),
        _beside(summary.differences, variant, REFERENCE),
        _beside(summary.differences, variant, TRIMMED.get(variant)),
        tuple((float(run.settings["strength"]), _short(run.accuracy.value), _short(run.tokens_mean)) for run in its),
        max((answers.prose[run.run] for run in its if run.run in answers.prose), default=None),
        _short(widest_gap(base.tokens.mean(), long.tokens.mean(), [run.tokens_mean for run in its])),
    )


def _beside(differences: Sequence[AreaDifference], variant: str, reference: str | None) -> Difference | None:
    return next((Difference.of(x.difference) for x in differences if (x.first, x.second) == (variant, reference)), None)


def widest_gap(base: float, long: float, tokens: Sequence[float]) -> float:
    """The widest gap between neighbours on the way from base to long, in parts of it; all are in mean tokens."""
    places = sorted(min(max((its - base) / (long - base), 0.0), 1.0) for its in tokens)
    return max(after - before for before, after in itertools.pairwise([0.0, *places, 1.0]))


def save(path: Path, found: Found) -> None:
    """A line for each row, so that a change of one is seen as one; what was known of fidelity stays."""
    if not found.fidelity and path.exists():
        found = replace(found, fidelity=load(path).fidelity)
    content = asdict(found)
    each = ",\n".join(f"  {json.dumps(row)}" for row in content.pop("rows"))
    rest = "".join(f' "{key}": {json.dumps(value, ensure_ascii=False)},\n' for key, value in content.items())
    path.write_text(f'{{\n{rest} "rows": [\n{each}\n ]\n}}\n', encoding="utf-8")


def load(path: Path) -> Found:
    """What `save` wrote."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    kept = [
        Row(
            row["variant"],
            row["area"],
            _difference(row["gain"]) if row["gain"] else None,
            _difference(row["against"]) if row["against"] else None,
            _difference(row["trimmed"]) if row["trimmed"] else None,
            tuple(tuple(point) for point in row["points"]),
            row["prose"],
            row["gap"],
        )
        for row in content.pop("rows")
    ]
    its = {name: tuple(end) if end else None for name, end in content.pop("ends").items()}
    return Found(**content, ends=its, rows=tuple(kept))


def _difference(content: Mapping[str, Any]) -> Difference:
    interval = content["interval"]
    return Difference(content["value"], content["sign"], tuple(interval) if interval else None)


def _known(end: tuple[float, float] | None) -> tuple[float, float]:
    assert end is not None
    return end


def _short(value: float) -> float:
    return round(float(value), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(KEPT.rglob("*.npz")), help="of answers")
    for path in parser.parse_args().files:
        answers, kept = load_answers(path), path.with_suffix(".json")
        save(kept, replace(load(kept), ends=ends(answers), rows=rows(answers)))


if __name__ == "__main__":
    main()
