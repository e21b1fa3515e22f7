"""Answer, for a pair, and sum it up: `python -m benchmarks.evidence KIND SEED FOLDER [VARIANT...]`.

From the repository's root. The pair is made first, unless it is there. Without names, all variants are run, in their
order. What all show that have been run by then is kept in docs/evidence/KIND-SEED.json, or where `--keep` says;
docs/evidence.md is made of these files by `python -m benchmarks.evidence.tables`.
"""

import argparse
import logging
import platform
import time
from pathlib import Path

import torch
import transformers

from benchmarks.evidence.fronts import RUNS, Pair, distance
from benchmarks.evidence.summary import KEPT, REFERENCE, Found, rows, save
from benchmarks.evidence.variants import VARIANTS
from benchmarks.pairs.recipes import KINDS, make, seconds
from mergekit_fim.prepass import measured_once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path, help="outside the repository")
    parser.add_argument("variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--n", type=int, default=200, help="problems (200)")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"merges of each variant ({RUNS})")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="(docs/evidence/KIND-SEED.json)")
    arguments = parser.parse_intermixed_args()
    if unknown := ", ".join(set(arguments.variants) - set(VARIANTS)):
        parser.error(f"expected some of {', '.join(VARIANTS)}, found {unknown}")
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    kind = KINDS[arguments.kind]
    torch.manual_seed(arguments.seed)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    make(kind, arguments.kind, arguments.seed, arguments.folder)
    pair = Pair(arguments.folder, kind, arguments.n)
    began = time.time()
    with measured_once():
        for name in arguments.variants:
            pair.front(name, VARIANTS[name], arguments.runs)
    fronts = {name: pair.known(name, VARIANTS[name], arguments.runs) for name in VARIANTS}
    fronts = {name: runs for name, runs in fronts.items() if runs}
    if REFERENCE in fronts:
        prose = pair.prose()
        found = Found(
            kind=arguments.kind,
            seed=arguments.seed,
            ends={name: (p.accuracy, p.tokens) for name, p in pair.ends().items()},
            prose={name: prose[name] for name in ("base", "long") if name in prose},
            distance=round(distance(arguments.folder), 6),
            hours=round(seconds(arguments.folder) / 3600, 2),
            source=f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}",
            fidelity={},
            rows=rows(*pair.end_outcomes(), fronts, prose),
        )
        save(arguments.keep or KEPT / f"{arguments.kind}-{arguments.seed}.json", found)
    print(f"{arguments.folder.name}: {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
