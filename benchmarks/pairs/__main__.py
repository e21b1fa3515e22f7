"""Make a base and a long model that merge: `python -m benchmarks.pairs KIND SEED FOLDER`, from the repository's root.

Models that are already there stay as they are. docs/evidence.md says what these pairs are and how they merge.
"""

import argparse
from pathlib import Path

import torch
import transformers

from benchmarks.pairs.recipes import KINDS, make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path, help="a folder outside the repository; it gets parent, base and long")
    parser.add_argument(
        "--one-sided", type=int, metavar="STEPS", help="train the long model from the base, in so many steps"
    )
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(arguments.seed)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    make(KINDS[arguments.kind], arguments.kind, arguments.seed, arguments.folder, arguments.one_sided)


if __name__ == "__main__":
    main()
