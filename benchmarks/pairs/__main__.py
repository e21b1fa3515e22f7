"""Make a base and a long model that merge: `python -m benchmarks.pairs KIND SEED FOLDER`, from the repository's root.

What is there already is left alone. docs/evidence.md has what these pairs are and how they merge.
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
    parser.add_argument("folder", type=Path, help="outside the repository; gets parent, base and long")
    parser.add_argument(
        "--one-sided", type=int, metavar="STEPS", help="train the long model from the base, so many steps"
    )
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(arguments.seed)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    make(KINDS[arguments.kind], arguments.kind, arguments.seed, arguments.folder, arguments.one_sided)


if __name__ == "__main__":
    main()
