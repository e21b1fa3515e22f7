"""The fronts of a pair -> what each variant is worth above the chord, and beside uniform task arithmetic.

What all pairs show is kept in docs/evidence/, a file for each, as a pair itself takes hours to make and to ask.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.evidence.variants import TRIMMED
from mergekit_fim.evaluate.front import Estimate, Outcomes, summarize

REFERENCE = "task_arithmetic"
KEPT = Path("docs/evidence")


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
        gain: that above the chord's, each half of the problems choosing what the other half measures.
        against: the area minus that of uniform task arithmetic; None for itself.
        trimmed: the area minus that of mergekit's ties of the same density; None without trimming, or where that
            wasn't run.
        points: every merge's strength, accuracy and mean tokens; none where they weren't kept.
        prose: the most that any of the merges takes for an unrelated text, in nats a token; None where not measured.
    """

    variant: str
    area: float
    gain: Difference
    against: Difference | None
    trimmed: Difference | None = None
    points: tuple[tuple[float, float, float], ...] = ()
    prose: float | None = None


@dataclass(frozen=True)
class Found:
    """What a pair shows.

    Attributes:
        kind: its recipe.
        seed: of its training.
        ends: accuracy and mean tokens of base and long.
        rows: of all variants that were run.
        prose: what an unrelated text costs base and long, in nats a token; empty where not measured.
        distance: ‖δ‖ / ‖θ0‖ of the decoder layers; None where it wasn't kept.
        hours: of a core, that training and answers took; None where that wasn't kept.
        source: where all this was measured.
        fidelity: by `benchmarks.fidelity`: correlations [end] by signal and by what is moved; empty before it has run.
    """

    kind: str
    seed: int
    ends: Mapping[str, tuple[float, float]]
    rows: tuple[Row, ...]
    prose: Mapping[str, float]
    distance: float | None
    hours: float | None
    source: str
    fidelity: Mapping[str, Mapping[str, list[float]]]

    @property
    def name(self) -> str:
        return f"{self.kind} {self.seed}"

    def row(self, variant: str) -> Row | None:
        """What was found of a variant; None where it wasn't run."""
        return next((row for row in self.rows if row.variant == variant), None)


def rows(
    base: Outcomes, long: Outcomes, fronts: Mapping[str, Sequence[Outcomes]], prose: Mapping[str, float]
) -> tuple[Row, ...]:
    """Every variant's row, each beside its references alone, so that no row depends on what else was run."""

    def beside(variant: str, reference: str | None) -> Difference | None:
        if reference not in fronts or reference == variant:
            return None
        summary = summarize([base, long, *fronts[variant], *fronts[reference]], base.run, long.run)
        return Difference.of(summary.differences[0].difference)

    found = []
    for variant, runs in fronts.items():
        summary = summarize([base, long, *runs], base.run, long.run)
        area = next(area for area in summary.areas if area.method == variant)
        its = [run for run in summary.runs if run.method == variant]
        assert area.held_out is not None
        found.append(
            Row(
                variant,
                _short(area.area.value),
                Difference.of(area.held_out),
                beside(variant, REFERENCE),
                beside(variant, TRIMMED.get(variant)),
                tuple(
                    (float(run.settings["strength"]), _short(run.accuracy.value), _short(run.tokens_mean))
                    for run in its
                ),
                max((prose[run.run] for run in its if run.run in prose), default=None),
            )
        )
    return tuple(found)


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
            _difference(row["gain"]),
            _difference(row["against"]) if row["against"] else None,
            _difference(row["trimmed"]) if row["trimmed"] else None,
            tuple(tuple(point) for point in row["points"]),
            row["prose"],
        )
        for row in content.pop("rows")
    ]
    ends = {name: tuple(end) for name, end in content.pop("ends").items()}
    return Found(**content, ends=ends, rows=tuple(kept))


def _difference(content: Mapping[str, Any]) -> Difference:
    interval = content["interval"]
    return Difference(content["value"], content["sign"], tuple(interval) if interval else None)


def _short(value: float) -> float:
    return round(value, 4)
