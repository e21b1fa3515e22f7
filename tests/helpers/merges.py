"""Merges by the stock command in this process, configs for them, and how they end."""

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.scripts.run_yaml import main as mergekit_yaml
from warm import Outcome

from mergekit_fim.cli import main
from mergekit_fim.merging.trim import find_threshold, runs, trim_run


@dataclass(frozen=True)
class Pair:
    base: Path
    long: Path
    third: Path


@dataclass(frozen=True)
class Merge:
    """A merge by the stock command, in this process.

    With `fresh`, each has a cache of its own, so that two merges that are compared are both measured.
    """

    folder: Path
    fresh: bool = True

    def __call__(self, config: dict | str, *options: str, out: str = "out") -> tuple[Path, Result]:
        source = self.folder / f"{out}.yml"
        source.write_text(config if isinstance(config, str) else yaml.safe_dump(config), encoding="utf-8")
        target = self.folder / out
        if self.fresh:  # the fixture `cache_folder` undoes it
            folder = Path(os.environ["MERGEKIT_FIM_CACHE"]).parent
            os.environ["MERGEKIT_FIM_CACHE"] = tempfile.mkdtemp(dir=folder)
        arguments = [str(source), str(target), "--no-write-model-card", "--no-copy-tokenizer", *options]
        return target, CliRunner().invoke(mergekit_yaml, arguments)

    def ok(self, config: dict | str, *options: str, out: str = "out") -> tuple[Path, Result]:
        target, result = self(config, *options, out=out)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return target, result


def config_for(pair: Pair, method: str = "fim_ties", **changes) -> dict:
    return {
        "merge_method": method,
        "base_model": str(pair.base),
        "models": [{"model": str(pair.long)}],
        "dtype": "float32",
    } | changes


def run(*arguments: object, ok: bool = True):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert not ok or result.exit_code == 0, result.output
    return result


Finished = Result | Outcome | subprocess.CompletedProcess


def ends_in_one_line(result: Finished, *words: str, absent: Path | None = None) -> str:
    """The command failed with one line for its user, which has `words` in it, and left nothing at `absent`."""
    if isinstance(result, Result):
        assert isinstance(result.exception, SystemExit), repr(result.exception)
    status = {Result: "exit_code", Outcome: "status", subprocess.CompletedProcess: "returncode"}[type(result)]
    assert getattr(result, status) == 1, result
    lines = result.stderr.splitlines()
    assert sum(line.startswith("Error: ") for line in lines) == 1, result.stderr
    line = lines[-1]  # nothing comes after it
    assert line.startswith("Error: "), result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert line.isprintable()
    assert len(line) < 1200
    for word in words:
        assert word in line, line
    assert absent is None or not absent.exists()
    return line


def unwrapped(result: Result) -> str:
    """What was printed, without the line breaks that fit it to the terminal."""
    return " ".join(result.output.split())


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """A task vector of any shape with all but its largest entries set to zero, run by run as the merge does it."""
    flat = delta.reshape(-1)
    threshold = find_threshold(lambda run: flat[run].clone(), len(flat), density, delta.device)
    return torch.cat([trim_run(flat[r].clone(), r, threshold) for r in runs(len(flat), delta.device)]).view(delta.shape)
