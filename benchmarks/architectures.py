"""Merge a tiny model of every kind in the installed transformers, by mergekit's own method and by ours.

    make architectures
    PYTHONPATH=tests/helpers python -m benchmarks.architectures qwen3_5 jamba   # run these again

Each model runs in a process of its own, so an error or a hang becomes a row. Each row is kept at once in a file of JSON
lines, so the same command goes on where it was stopped. `--write docs/architectures.md` puts the table there.
"""

import argparse
import contextlib
import json
import os
import re
import select
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
import zoo
from click.testing import CliRunner
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml

from benchmarks.pages import put
from mergekit_fim import FisherSettings
from mergekit_fim.fisher.engine import autograd_engine
from mergekit_fim.fisher.measure import measure_checkpoint
from mergekit_fim.models.inputs import open_model

ROOT = Path(__file__).parents[1]
METHODS = ("task_arithmetic", "fim_ta", "fim_ties")
BY_MODULES = " by modules"  # every module merged by itself, where a model has several
SETTINGS = FisherSettings(samples=2, seq_len=8, seed=2)
SECONDS = 120


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def modules(folder: Path) -> dict[str, int]:
    """Return the modules of mergekit's definition of a model, with their numbers of layers."""
    models = [{"model": str(folder / "long")}]
    config = {"merge_method": "fim_ta", "base_model": str(folder / "base"), "models": models}
    definition = get_architecture_info(MergeConfiguration.model_validate(config), MergeOptions())
    own = transformers.AutoConfig.from_pretrained(folder / "base")
    return {name: module.architecture.num_layers(own) for name, module in definition.modules.items()}


def merged(kind: str, folder: Path, auto: Any) -> dict[str, Any]:
    """Merge by the stock command, and return what becomes of the merge."""
    method = kind.removesuffix(BY_MODULES)
    config: dict[str, Any] = {"merge_method": method, "base_model": str(folder / "base"), "dtype": "float32"}
    config["models"] = [{"model": str(folder / "long"), "parameters": {} if "fim" in method else {"weight": 0.5}}]
    if "fim" in method:
        config["parameters"] = {"fisher_samples": SETTINGS.samples, "fisher_seq_len": SETTINGS.seq_len}
    if kind != method:
        models = config.pop("models")
        config["modules"] = {name: {"models": models} for name in modules(folder)}
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    out = folder / kind
    result = CliRunner().invoke(
        mergekit_yaml, [str(folder / "config.yml"), str(out), "--no-write-model-card", "--no-copy-tokenizer"]
    )
    if result.exit_code:
        own = [line for line in result.output.splitlines() if line.startswith("Error: ")]
        error = own[-1].removeprefix("Error: ") if own else said(result.exception or RuntimeError())
        if not own and result.exc_info:
            traceback.print_exception(*result.exc_info)
        return {"error": error.replace(str(folder) + "/", ""), "traceback": not own}
    model, info = auto.from_pretrained(out, output_loading_info=True)
    found = {key: sorted(map(str, names)) for key, names in info.items() if names}
    found_report = out / "fim_report.json"
    report = json.loads(found_report.read_text()) if found_report.exists() else {}
    return {
        "info": found,
        "generates": generates(model),
        "added": len(report.get("added_tensors", [])),
        "unlike": unlike(model, folder, auto) if method != "fim_ties" else [],
    }


def generates(model: Any) -> str:
    """Generate one token; return the error, or an empty text."""
    with contextlib.suppress(AttributeError):
        model.generation_config.eos_token_id = None
    try:
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1, do_sample=False)
    except Exception as error:
        return said(error)
    return ""


def unlike(model: Any, folder: Path, auto: Any) -> list[str]:
    """Name the tensors that aren't the base's plus a multiple of the task vector, as transformers loads all three."""
    base, long = (auto.from_pretrained(folder / name).state_dict() for name in ("base", "long"))
    found = []
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            delta, moved = (x.double().flatten() - base[name].double().flatten() for x in (long[name], value))
            part = float(delta @ moved / (delta @ delta).clamp_min(1e-30))
            if float((moved - part * delta).norm()) > 1e-4 * float(delta.norm()) or not 1e-4 < part < 1:
                found.append(name)
    return found


def difference(folder: Path) -> dict[str, Any]:
    """Return the largest relative difference of a squared gradient norm between fast and reference engine."""
    options = MergeOptions(quiet=True)
    LoaderCache().setup(options)
    base = open_model(str(folder / "base"), None, options)
    fast = measure_checkpoint(base, SETTINGS, "float32", options, running=torch.float32)

    def reference(model: Any, layers: Any, samples: Any, progress: Any, weights: Any = None, warn: Any = None) -> Any:
        from mergekit_fim.fisher.engine import NotSupportedError
        from mergekit_fim.fisher.weights import ResidentWeights

        if not isinstance(weights, ResidentWeights | None):
            raise NotSupportedError
        return autograd_engine(model, layers, samples, progress)

    slow = measure_checkpoint(
        base, SETTINGS, "float32", options, running=torch.float32, engine=reference, reference=autograd_engine
    )
    pairs = [
        (a, b)
        for x, y in zip(fast.layers, slow.layers, strict=True)
        for a, b in zip(x.squared_norms, y.squared_norms, strict=True)
    ]
    return {
        "difference": max(abs(a - b) / b if b else abs(a - b) for a, b in pairs),
        "layers": len(fast.layers),
        "warnings": [line.replace(str(folder) + "/", "") for line in fast.warnings],
    }


def row(name: str, tell: Any) -> None:
    """Try one model, and tell each result as soon as it is found."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        os.environ["MERGEKIT_FIM_CACHE"] = str(folder / "cache")
        try:
            base = zoo.build(name)
            with torch.no_grad():
                ids = torch.randint(0, 90, (1, SETTINGS.seq_len), generator=torch.Generator().manual_seed(0))
                base(input_ids=ids, use_cache=False).logits.sum().item()
                tell({"generates": generates(base)})
            base.save_pretrained(folder / "base")
            zoo.tuned(base).save_pretrained(folder / "long")
        except Exception as error:
            tell({"made": said(error)})
            return
        tell({"made": ""})
        kinds = [*METHODS]
        if name in zoo.VISION:
            try:
                found = modules(folder)
                tell({"modules": found})
                kinds += [kind + BY_MODULES for kind in METHODS[:2] if len(found) > 1]
            except Exception as error:
                tell({"modules": said(error)})
        for kind in kinds:
            try:
                tell({kind: merged(kind, folder, zoo.auto_class(name))})
            except Exception as error:
                traceback.print_exc()
                tell({kind: {"error": f"loading: {said(error)}", "traceback": True}})
        try:
            tell({"fisher": difference(folder)})
        except Exception as error:
            tell({"fisher": {"error": said(error).replace(str(folder) + "/", "")}})


def guarded(name: str, log: Path | None) -> dict[str, Any]:
    """Make the row of a model in a process of its own, whatever happens there."""
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        sink = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        with os.fdopen(writing, "w") as stream:
            row(name, lambda part: (stream.write(json.dumps(part) + "\n"), stream.flush()))
        os._exit(0)
    os.close(writing)
    found = {"name": name, "versions": versions()}
    text = b""
    while True:
        left = start + SECONDS - time.monotonic()
        if left <= 0 or not select.select([reading], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            found["died"] = f"took more than {SECONDS} s"
            break
        part = os.read(reading, 1 << 16)
        if not part:
            break
        text += part
    os.close(reading)
    _, status = os.waitpid(child, 0)
    for line in text.decode().splitlines():
        found |= json.loads(line)
    if status and "died" not in found:
        found["died"] = f"the process ended with status {status}"
    return found | {"seconds": round(time.monotonic() - start, 1)}


def versions() -> dict[str, str]:
    return {package: version(package) for package in ("transformers", "mergekit")}


def made_of(found: dict[str, Any] | None, base_generates: str) -> str:
    """Say in a few words what became of a merge."""
    if found is None:
        return "not reached"
    if "error" in found:
        error = re.sub(r"^(base|long): ", "", found["error"])
        return ("fails: " if found["traceback"] else "refused: ") + (error[:177] + "..." if len(error) > 180 else error)
    what = {"missing_keys": "lacks {} tensors", "unexpected_keys": "has {} others"}
    words = [what.get(kind, "{} of other shapes").format(len(names)) for kind, names in found["info"].items()]
    words += [f"{len(found['unlike'])} tensors of other values"] if found["unlike"] and not words else []
    words += ["can't generate"] if found["generates"] and not base_generates else []
    added = f", {found['added']} tensors added" if found["added"] else ""
    return ", ".join(words) or f"whole{added}"


def tables(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Write two tables, the second of the models that see. Count the models of each kind."""
    by = ", ".join(f"{package} {number}" for package, number in versions().items())
    yield from part({name: found for name, found in rows.items() if name not in zoo.VISION}, f"models ({by})")
    yield ""
    yield from part({name: found for name, found in rows.items() if name in zoo.VISION}, "models that see, too")


def part(rows: dict[str, dict[str, Any]], what: str) -> Iterator[str]:
    """Write one of the tables, after a line that counts its rows."""
    lines, counts = [], dict.fromkeys(("unmade", "both", "ours", "stock", "neither"), 0)
    for name in sorted(rows):
        found = rows[name]
        modules = [", ".join(sorted(found["modules"]))] if isinstance(found.get("modules"), dict) else ["none"]
        first = f"| `{name}` | " if name not in zoo.VISION else f"| `{name}` | {modules[0]} | "
        if found.get("made", found.get("died", "died")):
            counts["unmade"] += 1
            reason = re.sub(r"\s+", " ", found.get("made") or found["died"])[:150].replace("|", "\\|").replace("`", "'")
            lines.append(f"{first}not made: {reason} | | | |")
            continue
        stock, *ours = (made_of(found.get(method), found["generates"]) for method in METHODS)
        fisher = found.get("fisher", {})
        differs = fisher.get("difference", 1.0)
        works = all(text.startswith("whole") for text in ours) and differs < 1e-4
        counts[("both" if works else "stock") if stock == "whole" else "ours" if works else "neither"] += 1
        notes = ["measured with all of it in memory"] if fisher.get("warnings") else []
        notes += ["neither base nor merged model generates" if found["generates"] else ""]
        notes += [found.get("died", "")]
        for method in METHODS:
            by_modules = found.get(method + BY_MODULES)
            if by_modules and made_of(by_modules, found["generates"]) != made_of(found[method], found["generates"]):
                notes.append(f"{method}{BY_MODULES}: {made_of(by_modules, found['generates'])}")
        alike = sorted(ours[0].split()) == sorted(ours[1].split())  # modules are listed in any order
        shown = (
            ours[0]
            if alike or not any(text.startswith("whole") for text in ours)
            else f"fim_ta: {ours[0]}; fim_ties: {ours[1]}"
        )
        number = f"{differs:.0e}" if "difference" in fisher and not fisher["warnings"] else ""
        cells = (stock, shown, number, "; ".join(note for note in notes if note))
        lines.append(first + " | ".join(cell.replace("|", "\\|").replace("`", "'") for cell in cells) + " |")
    yield (
        f"{len(rows)} {what}: {counts['both']} are merged whole by all three methods, {counts['ours']} by "
        f"`fim_ta` and `fim_ties` only, {counts['stock']} by `task_arithmetic` only, {counts['neither']} by none; "
        f"{counts['unmade']} could not be made so small, or not at all."
    )
    yield ""
    of_modules = ["| mergekit's modules ", "| --- "] if rows.keys() & zoo.VISION.keys() else ["", ""]
    yield f"| model {of_modules[0]}| `task_arithmetic` | `fim_ta` and `fim_ties` | difference | |"
    yield f"| --- {of_modules[1]}| --- | --- | --- | --- |"
    yield from lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="model types (all that the state file lacks)")
    parser.add_argument("--state", type=Path, default=ROOT / ".demo" / "architectures.jsonl")
    parser.add_argument("--log", type=Path, help="write the models' own output here")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this page")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    options.state.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    if options.state.exists():
        kept = [json.loads(line) for line in options.state.read_text().splitlines()]
        rows = {r["name"]: r for r in kept if r["versions"] == versions()}
    for name in options.names or [name for name in (*zoo.NAMES, *zoo.VISION) if name not in rows]:
        rows[name] = guarded(name, options.log)
        with options.state.open("a") as file:
            file.write(json.dumps(rows[name]) + "\n")
        print(
            name, json.dumps({k: v for k, v in rows[name].items() if k not in ("name", "versions")})[:600], flush=True
        )
    if options.write:
        put(options.write, "make architectures", list(tables(rows)))


if __name__ == "__main__":
    main()
