"""`python -m mergekit_fim`."""

from mergekit_fim.cli import main

main(prog_name="python -m mergekit_fim")
