"""FIM-Merging for mergekit: merge coefficients set layer by layer by Fisher information on random tokens.

Importing this package makes mergekit accept the merge methods `fim_ties` and `fim_ta`. An ordinary installation does
that by itself at interpreter start-up (see `_autoload`), which is why nothing heavy is imported here.
"""

from mergekit_fim import _autoload

__version__ = "0.1.0"

_autoload.install()
