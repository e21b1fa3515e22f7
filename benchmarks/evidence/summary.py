"""The fronts of a pair -> what each variant is worth above the chord, and beside uniform task arithmetic."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_fim.evaluate.front import Estimate, Outcomes, summarize

REFERENCE = "task_arithmetic"


@dataclass(frozen=True)
class Row:
    """A variant on a pair, in units of accuracy; an interval is of 95 %, by a bootstrap over problems.

    Attributes:
        variant: its name.
        runs: merges that its front is of.
        area: the front's mean height between base and long.
        gain: that above the chord's mean height, with the bias of a front.
        held_out: the gain without it [value, low, high].
        against: the area minus that of uniform task arithmetic [value, low, high]; None for itself.
        best: the most that a single merge is above the chord.
        points: every merge's strength, accuracy and mean tokens.
        prose: the most that any of the merges takes for an unrelated text, in nats a token; None where not measured.
    """

    variant: str
    runs: int
    area: float
    gain: float
    held_out: tuple[float, float, float]
    against: tuple[float, float, float] | None
    best: float
    points: list[tuple[float, float, float]]
    prose: float | None


def rows(
    base: Outcomes, long: Outcomes, fronts: Mapping[str, Sequence[Outcomes]], prose: Mapping[str, float]
) -> list[Row]:
    """Every variant's row, each beside the reference alone, so that no row depends on what else was run."""
    found = []
    for variant, runs in fronts.items():
        others = [] if variant == REFERENCE else list(fronts[REFERENCE])
        summary = summarize([base, long, *runs, *others], base.run, long.run)
        area = next(area for area in summary.areas if area.method == variant)
        its = [run for run in summary.runs if run.method == variant]
        assert area.held_out is not None
        found.append(
            Row(
                variant,
                len(runs),
                area.area.value,
                area.gain,
                _triple(area.held_out),
                _triple(summary.differences[0].difference) if others else None,
                max(run.above_chord.value for run in its if run.above_chord is not None),
                [(float(run.settings["strength"]), run.accuracy.value, run.tokens_mean) for run in its],
                max((prose[run.run] for run in its if run.run in prose), default=None),
            )
        )
    return found


def _triple(estimate: Estimate) -> tuple[float, float, float]:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.value, estimate.low, estimate.high


def save(
    path: Path, kind: str, seed: int, ends: Mapping[str, Any], rows: Sequence[Row], prose: Mapping[str, float]
) -> None:
    """What a pair shows, for the tables over pairs; of prose only what it costs the ends."""
    its = {name: prose[name] for name in ends if name in prose}
    content = {"kind": kind, "seed": seed, "ends": dict(ends), "prose": its, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
