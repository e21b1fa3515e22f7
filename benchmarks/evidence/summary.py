"""A pair's answers -> what each variant gains above the chord, and beside uniform task arithmetic.

A pair takes hours to make and to ask. So docs/evidence/ keeps two files of each: NAME.npz has its answers, NAME.json
what follows from them. Where the statistics have changed, `python -m benchmarks.evidence.summary` makes NAME.json anew
from NAME.npz, without any model. Pairs without answers stay as they are.
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
DEVELOPMENT = KEPT / "development"  # pairs that methods are made on


@dataclass(frozen=True)
class Difference:
    """A difference of accuracies, with a bootstrap over problems.

    Attributes:
        value: the difference.
        sign: 1 where its interval of 95 % is above 0, -1 where it is below, 0 where it contains 0; None if not known.
        interval: that interval; None if it wasn't kept.
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
        gain: the area above the chord's, held out: see `mergekit_fim.evaluate.front.statistics`. None if the answers
            weren't kept.
        against: the area minus uniform task arithmetic's; None for uniform task arithmetic itself.
        trimmed: the area minus the area of mergekit's ties of the same density; None without trimming, or if that
            wasn't run.
        points: every merge's strength, accuracy and mean tokens; empty if they weren't kept.
        prose: the most that an unrelated text costs any of the merges, in nats a token; None if not measured.
        gap: the widest gap between neighbours on the way from base to long, in parts of that way in tokens; None if
            the points weren't kept.
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
        seed: the seed of its training.
        one_sided: steps in which the long model was trained from the base; None if both were trained from a parent.
        ends: accuracy and mean tokens of base, long and parent; None for a parent that wasn't asked, or isn't there.
        rows: the rows of all variants that were run.
        prose: what an unrelated text costs base and long, in nats a token; empty if not measured.
        distance: ‖δ‖ / ‖θ0‖ of the decoder layers; None if it wasn't kept.
        hours: the hours of a core that training and answers took; None if that wasn't kept.
        source: the machine on which all this was measured.
        fidelity: correlations [end] by signal and what is moved, from `benchmarks.fidelity`; empty before it has run.
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
        """Return the base's accuracy and mean tokens."""
        return _known(self.ends["base"])

    @property
    def long(self) -> tuple[float, float]:
        """Return the long model's accuracy and mean tokens."""
        return _known(self.ends["long"])

    def row(self, variant: str) -> Row | None:
        """Return the row of a variant; None if it wasn't run."""
        return next((row for row in self.rows if row.variant == variant), None)

    def above(self, row: Row) -> Difference:
        """Return a row's gain above the chord: held out, or in the sample if the answers weren't kept.

        In the sample the luckiest merges make the front too high. So that gain has neither sign nor interval.
        """
        if row.gain is not None:
            return row.gain
        return Difference(_short(row.area - (self.base[0] + self.long[0]) / 2), None, None)


def file_of(kind: str, seed: int, one_sided: int | None) -> str:
    """Return the name of a pair's files, without their endings."""
    return f"{kind}-{seed}" + ("" if one_sided is None else f"-one-sided-{one_sided}")


def ends(answers: Answers) -> dict[str, tuple[float, float] | None]:
    """Return accuracy and mean tokens of base, long and parent."""
    found = {name: (_short(run.correct.mean()), _short(run.tokens.mean())) for name, run in answers.models.items()}
    return {name: found.get(name) for name in MODELS}


def rows(answers: Answers) -> tuple[Row, ...]:
    """Make every variant's row."""
    return tuple(row(answers, variant) for variant in answers.fronts)


def row(answers: Answers, variant: str) -> Row:
    """Make a variant's row from it and its references alone. So no row depends on what else was run."""
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
    """Return the widest gap between neighbours on the way from base to long, in parts of it. All are in mean tokens."""
    places = sorted(min(max((its - base) / (long - base), 0.0), 1.0) for its in tokens)
    return max(after - before for before, after in itertools.pairwise([0.0, *places, 1.0]))


def save(path: Path, found: Found) -> None:
    """Write a line for each row, so a diff shows which rows changed. What was known of fidelity stays."""
    if not found.fidelity and path.exists():
        found = replace(found, fidelity=load(path).fidelity)
    content = asdict(found)
    each = ",\n".join(f"  {json.dumps(row)}" for row in content.pop("rows"))
    rest = "".join(f' "{key}": {json.dumps(value, ensure_ascii=False)},\n' for key, value in content.items())
    path.write_text(f'{{\n{rest} "rows": [\n{each}\n ]\n}}\n', encoding="utf-8")


def load(path: Path) -> Found:
    """Read what `save` wrote."""
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
    parser.add_argument("files", nargs="*", type=Path, default=sorted(KEPT.rglob("*.npz")), help="files of answers")
    for path in parser.parse_args().files:
        answers, kept = load_answers(path), path.with_suffix(".json")
        save(kept, replace(load(kept), ends=ends(answers), rows=rows(answers)))


if __name__ == "__main__":
    main()
