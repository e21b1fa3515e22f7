"""Let a pair answer, and sum it up: `python -m benchmarks.evidence KIND SEED FOLDER [VARIANT...]`.

Run it from the repository's root. It makes the pair first, unless it is there. With `--one-sided STEPS` it trains the
long model from the base. Without names it runs all variants, in their order.

It keeps the answers of all variants run so far in docs/evidence/KIND-SEED.npz, or KIND-SEED-one-sided-STEPS.npz. What
they show goes beside them, as JSON. `python -m benchmarks.evidence.tables` makes docs/evidence.md from these files.
Seeds of development go to docs/evidence/development instead, and also run what is explored.
"""

import argparse
import logging
import platform
import time
from pathlib import Path

import torch
import transformers

from benchmarks.evidence.answers import MODELS, save_answers
from benchmarks.evidence.fronts import RUNS, Pair, distance
from benchmarks.evidence.summary import DEVELOPMENT, KEPT, REFERENCE, Found, ends, file_of, rows, save
from benchmarks.evidence.variants import EXPLORED, GONE, LISTED, VARIANTS
from benchmarks.pairs.recipes import KINDS, make, seconds
from mergekit_fim.prepass.measured import measured_once

SEEDS_OF_DEVELOPMENT = (7, 8)  # methods are made on these pairs, so what they show is no evidence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path, help="a folder outside the repository")
    parser.add_argument("variants", nargs="*")
    parser.add_argument(
        "--one-sided", type=int, metavar="STEPS", help="train the long model from the base, in so many steps"
    )
    parser.add_argument("--n", type=int, default=200, help="how many problems (200)")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"merges of each variant ({RUNS})")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the two files here (docs/evidence)")
    arguments = parser.parse_intermixed_args()
    develops = arguments.seed in SEEDS_OF_DEVELOPMENT
    known = {**VARIANTS, **(EXPLORED if develops else {})}
    every = dict.fromkeys([*LISTED, *EXPLORED] if develops else VARIANTS)
    names = arguments.variants or [name for name in every if name not in GONE]
    if gone := [name for name in names if name in GONE]:
        parser.error(f"{gone[0]} can't be answered any more: {GONE[gone[0]]}")
    if unknown := ", ".join(set(names) - set(known)):
        parser.error(f"expected some of {', '.join(known)}, found {unknown}")
    if arguments.runs < RUNS and arguments.keep is None:
        parser.error(
            f"expected at least {RUNS} merges of each variant, found {arguments.runs}; name a folder by --keep"
        )
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    kind = KINDS[arguments.kind]
    torch.manual_seed(arguments.seed)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    make(kind, arguments.kind, arguments.seed, arguments.folder, arguments.one_sided)
    began = time.time()
    pair = Pair(arguments.folder, kind, arguments.n)
    with measured_once():
        for name in names:
            pair.front(name, known[name], arguments.runs)
    fronts = {name: pair.known(name, variant, arguments.runs) for name, variant in known.items()}
    fronts = {name: runs for name, runs in fronts.items() if runs}
    if REFERENCE in fronts:
        answers = pair.answers(fronts)
        found = Found(
            kind=arguments.kind,
            seed=arguments.seed,
            one_sided=arguments.one_sided,
            ends=ends(answers),
            prose={name: answers.prose[name] for name in MODELS if name in answers.prose},
            distance=round(distance(arguments.folder), 6),
            hours=round(seconds(arguments.folder) / 3600, 2),
            source=f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}",
            fidelity={},
            rows=rows(answers),
        )
        folder = arguments.keep or (DEVELOPMENT if develops else KEPT)
        kept = folder / file_of(arguments.kind, arguments.seed, arguments.one_sided)
        folder.mkdir(parents=True, exist_ok=True)
        save_answers(kept.with_suffix(".npz"), answers)
        save(kept.with_suffix(".json"), found)
    print(f"{arguments.folder.name}: {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
