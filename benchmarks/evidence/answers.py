"""Keep what a pair's models and merges answered, in a small file. All of the pair's statistics rest on it.

A file, `docs/evidence/NAME.npz`, holds only arrays, and is read without pickle:

- `runs`, `variants`, `strengths`: a run's name, variant and strength [run]. A model as it is has "" and NaN;
- `correct`: whether an answer is right, eight problems a byte [run, byte];
- `tokens`: how long an answer is [run, problem];
- `prose`: what an unrelated text costs, in nats a token; NaN where not measured [run].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergekit_fim.evaluate.front.bootstrap import Outcomes

MODELS = ("base", "long", "parent")


@dataclass(frozen=True, eq=False)
class Answers:
    """A pair's answers, one to each problem.

    Attributes:
        models: base, long and, where there is one, parent.
        fronts: every variant's runs, by strength.
        prose: what an unrelated text costs a run, in nats a token. Runs that weren't asked are missing.
    """

    models: Mapping[str, Outcomes]
    fronts: Mapping[str, Sequence[Outcomes]]
    prose: Mapping[str, float]


def save_answers(path: Path, answers: Answers) -> None:
    """Keep all that figures are computed from: whether an answer is right, and how long it is."""
    runs = [*answers.models.values(), *(run for front in answers.fronts.values() for run in front)]
    tokens = np.stack([run.tokens[:, 0] for run in runs])
    np.savez_compressed(
        path,
        runs=np.array([run.run for run in runs]),
        variants=np.array([run.method or "" for run in runs]),
        strengths=np.array([float(run.settings.get("strength", np.nan)) for run in runs]),
        correct=np.packbits(np.stack([run.correct[:, 0] for run in runs]), axis=1),
        tokens=tokens.astype(np.min_scalar_type(int(tokens.max()))),
        prose=np.array([answers.prose.get(run.run, np.nan) for run in runs]),
    )


def load_answers(path: Path) -> Answers:
    """Read what `save_answers` kept."""
    with np.load(path) as file:
        kept = {name: file[name] for name in file.files}
    tokens = kept["tokens"].astype(np.int64)
    correct = np.unpackbits(kept["correct"], axis=1, count=tokens.shape[1]).astype(bool)
    models: dict[str, Outcomes] = {}
    fronts: dict[str, list[Outcomes]] = {}
    for row, (run, variant) in enumerate(zip(map(str, kept["runs"]), map(str, kept["variants"]), strict=True)):
        settings = {"strength": float(kept["strengths"][row])} if variant else {}
        found = Outcomes(run, variant or None, settings, correct[row][:, None], tokens[row][:, None])
        if variant:
            fronts.setdefault(variant, []).append(found)
        else:
            models[run] = found
    prose = {str(run): float(nats) for run, nats in zip(kept["runs"], kept["prose"], strict=True) if np.isfinite(nats)}
    return Answers(models, fronts, prose)
