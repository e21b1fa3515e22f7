"""Measure what the pre-pass and the merges cost, beside the ways that they replace, on a synthetic pair of models.

    python benchmarks/cost.py                        # the shape of Qwen2.5-1.5B: 7 GB of disk, about 15 minutes
    python benchmarks/cost.py --shape 7b --only fim_ties,ties
    python benchmarks/cost.py --layers 56 --only fast
    python benchmarks/cost.py --device cuda          # on a GPU, with bars beside the figures
    OMP_WAIT_POLICY=passive python benchmarks/cost.py --busy    # beside a process that keeps one core busy

Every side runs in a process of its own. The pair is in the system's file cache if half the memory holds it. Memory is
the peak of anonymous pages, sampled every 20 ms. Mapped files don't count: the system can drop them at any time. On an
accelerator, times are taken when it has done its work. Its memory is the peak of torch's allocator.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

SHAPES = {
    "tiny": {"vocab": 1000, "hidden": 64, "inter": 192, "layers": 4, "heads": 4, "kv": 2, "tied": True},
    "1.5b": {"vocab": 151936, "hidden": 1536, "inter": 8960, "layers": 28, "heads": 12, "kv": 2, "tied": True},
    "7b": {"vocab": 152064, "hidden": 3584, "inter": 18944, "layers": 28, "heads": 28, "kv": 4, "tied": False},
}
SIDES = ["matmul", "paper", "reference", "fast", "ties", "by_hand", "fim_ties", "task_arithmetic", "fim_ta"]
SIDES += ["fim_kron", "fim_kron_8x64"]  # on its own default of tokens, and on 8 x 64
# Of the 1.5b shape, what fim_kron may take of the time of stock `ties`, and its memory; of the 7b shape its minutes.
KRON_BARS = {"fim_kron": 0.75, "fim_kron_8x64": 0.75}
KRON_MEMORY = {"1.5b": 5.0, "7b": 7.0}
KRON_MINUTES = {"7b": 8.0}
# An accelerator also loads the base by transformers, and does the pre-pass with weights streamed to 8 GB.
ON_ACCELERATORS = ["load", "streamed"]
MEASURING = ["matmul", "paper", "reference", "fast", *ON_ACCELERATORS]
LITTLE_MEMORY = 8e9
SEQUENCES, LENGTH = 8, 64


def make_pair(folder: Path, shape: dict, dtype_name: str) -> None:
    """Write base/ and long/: Qwen2 models of random weights, the second near the first."""
    import accelerate
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.Qwen2Config(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inter"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        tie_word_embeddings=shape["tied"],
        max_position_embeddings=4096,
        architectures=["Qwen2ForCausalLM"],
        dtype=dtype_name,
    )
    with accelerate.init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    dtype = getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1 << 24, generator=generator)
    tensors: tuple[dict, dict] = ({}, {})
    names: dict[str, str] = {}
    shards = 0

    def flush() -> None:
        nonlocal shards
        shards += 1
        file = f"model-{shards:05d}.safetensors"
        for part, which in zip(tensors, ("base", "long"), strict=True):
            save_file(part, folder / which / file, metadata={"format": "pt"})
            names.update(dict.fromkeys(part, file))
            part.clear()

    for which in ("base", "long"):
        (folder / which).mkdir(parents=True)
        config.save_pretrained(folder / which)
    for name, parameter in model.named_parameters():
        pair = []
        for scale in (0.02, 0.003):
            start = int(torch.randint(0, len(normal), (), generator=generator))
            pair.append(scale * normal.roll(start).repeat(-(-parameter.numel() // len(normal)))[: parameter.numel()])
        base = (pair[0] + 1 if "norm" in name else pair[0]).view(parameter.shape).to(dtype)
        tensors[0][name], tensors[1][name] = base, (base.float() + pair[1].view(parameter.shape)).to(dtype)
        if sum(t.nbytes for t in tensors[0].values()) > 2**30:
            flush()
    flush()
    for which in ("base", "long"):
        index = {"metadata": {}, "weight_map": names}
        (folder / which / "model.safetensors.index.json").write_text(json.dumps(index))


def worker(side: str, folder: Path, dtype_name: str, device: str) -> dict:
    """Run one side in its own process: seconds without start and imports, squared norms [layer, sequence]."""
    import torch
    import transformers

    dtype = getattr(torch, dtype_name)
    if side == "matmul":
        return {"gflops": {d: rate(folder, getattr(torch, d), device) for d in {"float32", dtype_name}}}
    if side in ("fast", "streamed"):
        return fast(folder, dtype_name, device, side) | on_device(device)
    from mergekit_fim import FisherSettings
    from mergekit_fim.fisher.engine import autograd_engine
    from mergekit_fim.fisher.measure import measure_model
    from mergekit_fim.fisher.samples import draw_samples

    transformers.utils.logging.disable_progress_bar()
    begin = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype, device_map=device)
    loaded = now(device)
    if side == "load":
        return {"load": loaded - begin} | on_device(device)
    settings = FisherSettings(SEQUENCES, LENGTH)
    layers = list(model.model.layers)
    if side == "reference":
        found = measure_model(model, layers, settings, engine=autograd_engine, quiet=True)
        norms = [layer.squared_norms for layer in found.layers]
    else:  # as the paper describes it, by plain PyTorch
        columns = []
        for ids in draw_samples(settings, model.config.vocab_size).input_ids.to(device):
            model.zero_grad()
            model(input_ids=ids[None], labels=ids[None]).loss.backward()
            columns.append([sum(float(p.grad.float().square().sum()) for p in layer.parameters()) for layer in layers])
        norms = [list(row) for row in zip(*columns, strict=True)]
    return {"load": loaded - begin, "measure": now(device) - loaded, "norms": norms} | on_device(device)


def now(device: str) -> float:
    """Return the clock's seconds once the device has done its work."""
    import torch

    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def on_device(device: str) -> dict:
    """Return the accelerator's name, and the peak of its memory in GB."""
    import torch

    if torch.device(device).type != "cuda":
        return {}
    return {"accelerator": torch.cuda.get_device_name(device), "gpu_gb": torch.cuda.max_memory_allocated(device) / 1e9}


def fast(folder: Path, dtype_name: str, device: str, side: str = "fast") -> dict:
    """Run the pre-pass. `run` is the measurement without loading; streamed weights are loaded while it runs."""
    import torch
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions

    from mergekit_fim import FisherSettings
    from mergekit_fim.fisher import loading
    from mergekit_fim.fisher.loading import load_to_run, placement
    from mergekit_fim.fisher.measure import measure_model
    from mergekit_fim.models.inputs import open_model
    from mergekit_fim.prepass.task_vectors import LayerPair, TaskVectorSweep

    options = MergeOptions(device=device, quiet=True)
    LoaderCache().setup(options)
    where = placement(options)
    if device != "cpu":
        torch.zeros(1, device=device)  # start the driver before the clock
    if side == "streamed" and device != "cpu":
        module = torch.get_device_module(device)
        module.set_per_process_memory_fraction(LITTLE_MEMORY / module.mem_get_info()[1])
        free = loading._free
        loading._free = lambda devices: [min(size, int(LITTLE_MEMORY)) for size in free(devices)]
    begin = time.perf_counter()
    base, tuned = (open_model(str(folder / which), None, options) for which in ("base", "long"))
    pairs = [LayerPair(layer.index, layer.index) for layer in base.layout.layers]
    sweep = TaskVectorSweep(base, {tuned: pairs}, dtype_name, where.devices())
    loaded = load_to_run(base, dtype_name, options, where, beside=sweep)
    ready = now(device)
    settings = FisherSettings(SEQUENCES, LENGTH)
    found = measure_model(loaded.model, loaded.layers, settings, weights=loaded.weights, quiet=True)
    measured = now(device)
    sweep.norms(quiet=True)
    end = now(device)
    return {
        "load": ready - begin,
        "run": measured - ready,
        "measure": end - begin,
        "dtype": found.dtype,
        "streamed": loaded.placement.streamed,
        "norms": [layer.squared_norms for layer in found.layers],
    }


def rate(folder: Path, dtype: "object", device: str) -> float:
    """Return the GFLOP/s of the MLP's product for all the tokens, the best of many."""
    import torch

    config = json.loads((folder / "base" / "config.json").read_text())
    a = torch.randn(SEQUENCES * LENGTH, config["hidden_size"], device=device).to(dtype)
    b = torch.randn(config["intermediate_size"], config["hidden_size"], device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + 3
    while time.perf_counter() < end:
        begin = time.perf_counter()
        torch.nn.functional.linear(a, b)
        if device != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * a.shape[0] * a.shape[1] * b.shape[0] / best / 1e9


def floor_flops(shape: dict) -> tuple[float, float]:
    """Return the operations of a forward and a backward pass to activations, without and with recomputed layers."""
    kv = shape["hidden"] // shape["heads"] * shape["kv"]
    layer = shape["hidden"] * (2 * shape["hidden"] + 2 * kv + 3 * shape["inter"])
    tokens = SEQUENCES * LENGTH
    once, head = 2 * tokens * layer * shape["layers"], 2 * tokens * shape["hidden"] * shape["vocab"]
    return 2 * once + 2 * head, 3 * once + 2 * head


@contextlib.contextmanager
def one_core_busy() -> Iterator[None]:
    """Run a process that computes without end."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def run(command: list[str], log: Path) -> tuple[float, float]:
    """Run a command. Return its seconds, and the peak of its anonymous memory in GB."""
    begin, peak = time.perf_counter(), 0
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - begin, peak / 1e9


def anonymous(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


# The model's parameters in each merge. `by_hand` is stock `ties` by this package, without a pre-pass.
OWN = {
    "ties": "{density: 0.2, weight: 1.0}",
    "fim_ties": "{density: 0.2}",
    "by_hand": "{density: 0.2, weight: 1.0, alpha: 1.0}",
    "task_arithmetic": "{weight: 0.5}",
    "fim_ta": "{}",
    "fim_kron": "{}",
    "fim_kron_8x64": "{}",
}


def merge_config(side: str, folder: Path, dtype: str) -> str:
    shared = "{}"
    if side.startswith("fim"):
        shared = "{fisher_cache: false}"  # every side measures anew
    if side == "fim_kron_8x64":
        shared = "{fisher_cache: false, fisher_samples: 8}"
    elif side == "by_hand":
        shared = "{gate_scale: 1, norm_tolerance: 0}"
    method = "fim_ties" if side == "by_hand" else re.sub("(?<=fim_kron)_.*", "", side)
    return (
        f"merge_method: {method}\nbase_model: {folder / 'base'}\nmodels:\n"
        f"  - model: {folder / 'long'}\n    parameters: {OWN[side]}\nparameters: {shared}\ndtype: {dtype}\n"
    )


def warm(folder: Path) -> bool:
    """Bring the pair into the system's file cache, so no side pays for the disk. Return False if it doesn't fit."""
    files = [path for which in ("base", "long") for path in (folder / which).glob("*.safetensors")]
    if sum(path.stat().st_size for path in files) > psutil.virtual_memory().total / 2:
        return False
    for path in files:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    return True


def measure_side(side: str, folder: Path, args: argparse.Namespace) -> dict:
    log = folder / f"{side}.log"
    warm(folder)
    if side in MEASURING:
        result = folder / f"{side}.json"
        options = ["--dtype", args.dtype, "--device", args.device]
        command = [sys.executable, __file__, "--worker", side, "--folder", str(folder), *options]
        seconds, peak = run(command, log)
        return {"whole": seconds, "peak_gb": peak, **json.loads(result.read_text())}
    config, out = folder / f"{side}.yml", folder / "merged"
    config.write_text(merge_config(side, folder, args.dtype))
    shutil.rmtree(out, ignore_errors=True)
    command = [str(Path(sys.executable).parent / "mergekit-yaml"), str(config), str(out), "--no-write-model-card"]
    command += [] if args.device == "cpu" else ["--device", args.device]
    seconds, peak = run([*command, "--no-copy-tokenizer", "--quiet"], log)
    shutil.rmtree(out)
    return {"whole": seconds, "peak_gb": peak}


def difference(found: list, expected: list) -> float:
    """Return the largest relative difference of a layer's Fisher information."""
    return max(abs(sum(a) / sum(b) - 1) for a, b in zip(found, expected, strict=True))


def table(results: dict, shape: dict, device: str, name: str) -> str:
    on_gpu = any("gpu_gb" in found for found in results.values())
    more = (" peak memory on the accelerator |", " --- |") if on_gpu else ("", "")
    lines = [f"| side | seconds | of which measuring | peak anonymous memory |{more[0]}"]
    lines.append(f"| --- | --- | --- | --- |{more[1]}")
    for side, found in results.items():
        if side != "matmul":
            own = f"{found['measure']:.1f}" if "measure" in found else ""
            last = f" {found['gpu_gb']:.2f} GB |" if "gpu_gb" in found else " |" * on_gpu
            lines.append(f"| {side} | {found['whole']:.1f} | {own} | {found['peak_gb']:.2f} GB |{last}")
    lines.append("")

    def ratio(text: str, a: float, b: float) -> None:
        lines.append(f"- {text}: {a / b:.2f}")

    have = results.keys()
    if {"fast", "paper"} <= have:
        ratio("pre-pass / the paper's eight passes", results["fast"]["measure"], results["paper"]["measure"])
    if {"fast", "reference"} <= have:
        ratio("pre-pass / reference engine", results["fast"]["measure"], results["reference"]["measure"])
    for side in ("fast", "streamed"):
        if {side, "reference"} <= have:
            worst = difference(results[side]["norms"], results["reference"]["norms"])
            lines.append(f"- {side}: largest difference of a layer's Fisher from the reference engine's: {worst:.1e}")
    if {"fast", "matmul"} <= have:
        rates = results["matmul"]["gflops"]
        lines.append("- matrix products: " + ", ".join(f"{r:.0f} GFLOP/s in {d}" for d, r in sorted(rates.items())))
        speed = rates[results["fast"]["dtype"]] * 1e9
        for text, flops in zip(("without", "with"), floor_flops(shape), strict=True):
            floor = flops / speed
            ratio(f"pre-pass / arithmetic alone ({floor:.1f} s, {text} recomputing)", results["fast"]["measure"], floor)
    for side in sorted({"fim_ties", "by_hand"} & have if "ties" in have else set()):
        ratio(f"{side} / ties, whole commands", results[side]["whole"], results["ties"]["whole"])
    if {"fim_ta", "task_arithmetic", "fast"} <= have:
        both = results["task_arithmetic"]["whole"] + results["fast"]["measure"]
        ratio("fim_ta / (task_arithmetic + pre-pass), whole commands", results["fim_ta"]["whole"], both)
    lines += kron_bars(results, name)
    if device != "cpu":
        lines += ["", *bars(results)]
    return "\n".join(lines)


def kron_bars(results: dict, name: str) -> list[str]:
    """List what fim_kron takes beside its bars, for the sides that were run, on the whole shapes."""
    lines = []
    for side in KRON_BARS.keys() & results.keys():
        found, said = results[side], []
        if "ties" in results:
            ratio, most = found["whole"] / results["ties"]["whole"], KRON_BARS[side] if name == "1.5b" else None
            said.append(f"{ratio:.2f} of ties' time{_held(ratio, most)}")
        if name in KRON_MINUTES:
            minutes = found["whole"] / 60
            said.append(f"{minutes:.1f} minutes{_held(minutes, KRON_MINUTES[name])}")
        said.append(f"{found['peak_gb']:.2f} GB{_held(found['peak_gb'], KRON_MEMORY.get(name))}")
        lines.append(f"- {side}: {', '.join(said)}")
    return sorted(lines)


def _held(found: float, most: float | None) -> str:
    return "" if most is None else f" (at most {most:g}: {'held' if found <= most else 'NOT held'})"


def bars(results: dict) -> list[str]:
    """List what was measured on an accelerator beside the bars, for the sides that were run."""
    rows = []

    def row(text: str, found: float, bar: float | None, unit: str) -> None:
        held = "" if bar is None else "yes" if found <= bar else "**no**"
        rows.append(f"| {text} | {found:.2f}{unit} | {'' if bar is None else f'{bar:g}{unit}'} | {held} |")

    load = results.get("load", {}).get("load")
    for side in ("fast", "streamed"):
        if side not in results:
            continue
        found = results[side]
        kind = f"within {LITTLE_MEMORY / 1e9:g} GB" if side == "streamed" else "one accelerator"
        kind += ", streamed" if found["streamed"] else ", resident"
        if not found["streamed"]:
            row(f"{kind}: measurement without loading", found["run"], 2.0 if side == "fast" else None, " s")
        if load:
            bar = 1.5 if side == "fast" else 2.0
            row(f"{kind}: pre-pass / loading the base ({load:.2f} s)", found["measure"] / load, bar, "")
    if "streamed" in results and "fast" in results:
        both = results["streamed"]["measure"] / results["fast"]["measure"]
        row("streamed / resident pre-pass", both, None, "")
    return ["| on the accelerator | measured | at most | held |", "| --- | --- | --- | --- |", *rows] if rows else []


def sides(device: str) -> list[str]:
    """Return the sides that make sense on a device. Check that the device is there."""
    if device == "cpu":
        return SIDES
    import torch

    current = torch.accelerator.current_accelerator(check_available=True)
    if current is None or current.type != torch.device(device).type:
        raise SystemExit(f"--device {device}: torch sees {current.type if current else 'no accelerator'}")
    return [*SIDES[:3], "load", *SIDES[3:4], "streamed", *SIDES[4:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--layers", type=int, help="another number of decoder layers")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--only", help="some of " + ",".join([*SIDES, *ON_ACCELERATORS]))
    parser.add_argument("--folder", type=Path, help="where to make the pair, or where one is; it is kept")
    parser.add_argument(
        "--json", type=Path, help="write the figures here, too, with the norms of every layer and sequence"
    )
    parser.add_argument("--busy", action="store_true", help="run beside a process that keeps one core busy")
    parser.add_argument("--worker", choices=MEASURING, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.worker:
        found = worker(args.worker, args.folder, args.dtype, args.device)
        (args.folder / f"{args.worker}.json").write_text(json.dumps(found))
        return
    wanted = args.only.split(",") if args.only else sides(args.device)
    shape = SHAPES[args.shape] | ({"layers": args.layers} if args.layers else {})
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.folder or Path(scratch)).absolute()
        if not (folder / "base").exists():
            print(f"making a pair of shape {args.shape} with {shape['layers']} layers in {folder}", file=sys.stderr)
            make_pair(folder, shape, args.dtype)
        results = {}
        for side in wanted:
            print(f"{side} ...", file=sys.stderr, flush=True)
            try:
                with one_core_busy() if args.busy else contextlib.nullcontext():
                    results[side] = measure_side(side, folder, args)
            except SystemExit as error:
                if args.device == "cpu":
                    raise
                print(
                    f"  left out: {error}", file=sys.stderr, flush=True
                )  # a small GPU doesn't hold the gradients of 7B
                continue
            print(f"  {results[side]['whole']:.1f} s", file=sys.stderr, flush=True)
    device = next((found["accelerator"] for found in results.values() if "accelerator" in found), args.device)
    cores = f"{os.cpu_count()} cores, one of them busy" if args.busy else f"{os.cpu_count()} cores"
    print(f"{args.shape}, {shape['layers']} layers, {args.dtype}, {device}, {cores}\n")
    print(table(results, shape, args.device, args.shape))
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "memory": psutil.virtual_memory().total}
    content = {"shape": shape, "dtype": args.dtype, "device": args.device, "machine": machine, "results": results}
    if args.json:
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    for found in results.values():
        found.pop("norms", None)
    print("\n" + json.dumps(content))


if __name__ == "__main__":
    main()
