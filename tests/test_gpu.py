"""On an accelerator, what other tests hold on the CPU: `pytest -m gpu`, or `make gpu` with the figures that go with it.

MERGEKIT_FIM_TEST_DEVICE=cpu runs them on the CPU, without the limits on memory, to see that they run at all.
"""

import contextlib
import gc
import os
from collections.abc import Iterator

import pytest
import reference
import tiny
import torch
from kinds import KINDS, add_masks, configure
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from merges import config_for, trim

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.fisher import batched, loading
from mergekit_fim.fisher import measure as measuring
from mergekit_fim.fisher.batched import batched_engine
from mergekit_fim.fisher.engine import autograd_engine
from mergekit_fim.fisher.loading import Placement
from mergekit_fim.fisher.measure import measure_checkpoint
from mergekit_fim.merging.trim import find_threshold
from mergekit_fim.models.inputs import open_model
from mergekit_fim.norms import squared_distance, squared_norm
from mergekit_fim.prepass.task_vectors import LayerPair, TaskVectorSweep


def found_device() -> torch.device | None:
    if name := os.environ.get("MERGEKIT_FIM_TEST_DEVICE"):
        return torch.device(name)
    current = torch.accelerator.current_accelerator(check_available=True)
    return None if current is None or current.type == "mps" else current


FOUND = found_device()
DEVICE = FOUND or torch.device("cpu")
ON_CPU = DEVICE.type == "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(FOUND is None, reason="torch sees no accelerator with float64"),
]
several = pytest.mark.skipif(ON_CPU or torch.accelerator.device_count() < 2, reason="one accelerator, or none")
SETTINGS = FisherSettings(samples=4, seq_len=12, seed=3)
# On the CPU other tests hold the numbers in every dtype. Here it is seen that these tests run.
DTYPES = ["float32"] if ON_CPU else ["float32", "bfloat16", "float16"]


@pytest.fixture
def place(monkeypatch):
    """Chooses how the model is held on the device, whatever the options."""

    def choose(*, streamed: bool, spread: bool = False) -> None:
        where = Placement(DEVICE, spread=spread, streamed=streamed)
        monkeypatch.setattr(loading, "placement", lambda options: where)

    monkeypatch.setattr(loading, "running_dtype", lambda wanted, device: wanted)  # on the CPU, too
    return choose


def norms_of(path, settings=SETTINGS, **options):
    LoaderCache.loaders.clear()
    base = open_model(str(path), None, MergeOptions())
    found = measure_checkpoint(base, settings, None, MergeOptions(quiet=True), **options)
    return found, torch.tensor([layer.squared_norms for layer in found.layers], dtype=torch.float64)


def on_the_cpu(path, settings=SETTINGS):
    """The reference engine's, in float32."""
    with pytest.MonkeyPatch.context() as patch:
        cpu = Placement(torch.device("cpu"), spread=False, streamed=False)
        patch.setattr(loading, "placement", lambda options: cpu)
        return norms_of(path, settings, engine=autograd_engine, running=torch.float32)[1]


@pytest.mark.parametrize("held", ["resident", "streamed"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("name", KINDS)
def test_the_engine_agrees_with_the_reference(name, dtype, held, place, tmp_path):
    kind = KINDS[name]
    path = tiny.save(tiny.build(configure(kind.kind, kind.changes)), tmp_path / "m", getattr(torch, dtype))
    if kind.masks:
        add_masks(path)
    place(streamed=held == "streamed")
    measured, found = norms_of(path)
    assert measured.dtype == dtype
    place(streamed=False)
    _, expected = norms_of(path, engine=autograd_engine)
    narrow = dtype == "bfloat16"
    # In 16 bits, and with experts that rounding may send tokens to, layers agree and single sequences need not.
    tolerance = {"rtol": 0.1, "atol": 0.0} if narrow else {"rtol": 1e-3, "atol": 0.0}
    torch.testing.assert_close(found.mean(1), expected.mean(1), **tolerance)
    torch.testing.assert_close(found.mean(1), on_the_cpu(path).mean(1), **tolerance | {"rtol": 0.2 if narrow else 1e-3})
    if not narrow:
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=0.0)


def test_sampled_labels(place, tmp_path):
    """Quantiles next to the border of two tokens may fall on either side; nearly all don't."""
    path = tiny.save(tiny.build(tiny.config("llama")), tmp_path / "m")
    settings = FisherSettings(4, 12, 3, "sampled")
    place(streamed=False)
    torch.testing.assert_close(norms_of(path, settings)[1], on_the_cpu(path, settings), rtol=1e-2, atol=0.0)


# Memory


def allocated() -> int:
    """Bytes on the device that something refers to; but for those of cuBLAS, which it keeps for the next product."""
    gc.collect()
    if ON_CPU:
        return 0
    if DEVICE.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
    torch.get_device_module(DEVICE).empty_cache()
    return torch.get_device_module(DEVICE).memory_allocated(DEVICE)


@contextlib.contextmanager
def limited(bytes_on_gpu: float, *, resident: bool, sequences: int) -> Iterator[None]:
    """An accelerator without more memory than this, which doesn't say so; on the CPU, what would fail there fails."""
    if not ON_CPU:
        allocated()
        module = torch.get_device_module(DEVICE)
        module.set_per_process_memory_fraction(bytes_on_gpu / module.mem_get_info(DEVICE)[1])
        try:
            yield
        finally:
            module.set_per_process_memory_fraction(1.0)
        return
    with pytest.MonkeyPatch.context() as patch:
        measure = batched._Run.measure

        def short(self, samples, device):
            held = not isinstance(self.weights, loading.StreamedWeights)
            if len(samples.input_ids) > sequences or (held and not resident):
                raise torch.OutOfMemoryError
            return measure(self, samples, device)

        patch.setattr(batched._Run, "measure", short)
        patch.setattr(measuring, "is_out_of_memory", lambda error: isinstance(error, torch.OutOfMemoryError))
        if not resident:  # there is no falling back on a CPU: nothing is streamed where it was to be resident
            load = measuring.load_to_run
            patch.setattr(measuring, "load_to_run", lambda b, d, o, w, **k: load(b, d, o, STREAMED, **k))
        yield


STREAMED = Placement(DEVICE, spread=False, streamed=True)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """As large as memory limits can tell from what libraries take for themselves: 0.9 GB."""
    size = 1 if ON_CPU else 16
    shape = {
        "hidden_size": 64 * size,
        "intermediate_size": 256 * size,
        "num_hidden_layers": 12,
        "vocab_size": 1000 * size,
    }
    config = tiny.config("llama", **shape, max_position_embeddings=2048)
    return tiny.save(tiny.build(config, spread=False), tmp_path_factory.mktemp("large") / "m")


def bytes_of(path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def test_a_model_that_does_not_fit_is_streamed(large, place, monkeypatch):
    """Which shows when it is loaded: what is free says nothing of the limit."""
    place(streamed=False)
    _, expected = norms_of(large)
    kept = []
    original = loading._streamed
    monkeypatch.setattr(loading, "_streamed", lambda *args: kept.append(args[3]) or original(*args))
    with limited(0.6 * bytes_of(large), resident=False, sequences=8):
        measured, found = norms_of(large)
    assert [where.device.type for where in kept] == [DEVICE.type]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.0)
    assert measured.warnings == ()


@pytest.mark.parametrize("held", ["resident", "streamed"])
def test_a_batch_that_does_not_fit_is_halved(held, large, place, monkeypatch):
    settings = FisherSettings(samples=8, seq_len=64 if ON_CPU else 1024)
    place(streamed=held == "streamed")
    peaks = []
    for tokens in (8 * settings.seq_len, 4 * settings.seq_len):
        before = allocated()
        if not ON_CPU:
            torch.get_device_module(DEVICE).reset_peak_memory_stats(DEVICE)
        with monkeypatch.context() as patch:
            patch.setattr(batched, "_TOKENS", tokens)
            patch.setattr(batched, "_TOKENS_ON_ACCELERATORS", tokens)
            measured, expected = norms_of(large, settings)
        assert measured.warnings == ()
        peaks.append(0 if ON_CPU else torch.get_device_module(DEVICE).max_memory_allocated(DEVICE) - before)
    with limited(allocated() + 0.5 * sum(peaks), resident=True, sequences=4):
        measured, found = norms_of(large, settings)
    (warning,) = measured.warnings
    assert "memory ran short for 8 sequences at a time, " in warning
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.0)


def test_nothing_is_left_allocated(pair, merge, large, place):
    """After a measurement and a merge, but for what the libraries set up once."""
    place(streamed=False)
    config = config_for(pair)
    norms_of(large)
    merge.ok(config, *options("--cuda"), out="first")
    before = allocated()
    norms_of(large)
    merge.ok(config, *options("--cuda"), out="second")
    assert allocated() == before


# Numbers


def test_float16_that_overflows(place, tmp_path):
    """As in `test_activations_that_overflow`; on an accelerator it is measured in bfloat16."""
    model = tiny.build(tiny.config("llama"))
    with torch.no_grad():
        for projection in (model.model.layers[3].mlp.up_proj, model.model.layers[3].mlp.down_proj):
            projection.weight.mul_(1e4)
    path = tiny.save(model, tmp_path / "m", torch.float16)
    place(streamed=False)
    measured, found = norms_of(path)
    assert measured.dtype == ("float32" if ON_CPU else "bfloat16")
    (warning,) = measured.warnings
    assert "overflows in float16" in warning
    torch.testing.assert_close(found.mean(1), on_the_cpu(path).mean(1), rtol=0.2, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_are_those_of_the_cpu(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3_000_001, generator=generator).to(dtype) for _ in range(2))
    assert float(squared_norm(a.to(DEVICE))) == pytest.approx(float(squared_norm(a)), rel=1e-7)
    expected = squared_distance(a, b)
    for x, y in ((a.to(DEVICE), b), (a, b.to(DEVICE)), (a.to(DEVICE), b.to(DEVICE))):
        assert squared_distance(x, y) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entries", [7, 100_000, (1 << 24) + 12_345])
def test_trimming_is_that_of_the_cpu(entries, dtype):
    """To the last entry, also where many are equal, and over several runs."""
    generator = torch.Generator().manual_seed(entries)
    base = torch.randn(entries, generator=generator).to(dtype)
    delta = (base + 0.01 * torch.randn(entries, generator=generator).to(dtype)).float() - base.float()
    for density in (0.2, 0.9):
        on_device = delta.to(DEVICE)
        assert torch.equal(trim(on_device, density).cpu(), trim(delta, density))
        found, expected = (
            find_threshold(lambda run, d=d: d[run].clone(), entries, density, d.device) for d in (on_device, delta)
        )
        assert (found is None) is (expected is None)
        if found is not None:
            assert found.magnitude == expected.magnitude
            assert torch.equal(found.dropped.cpu(), expected.dropped)
    assert trim(delta, 0.2).count_nonzero() == max(1, int(0.2 * entries))


def test_task_vectors_are_those_of_the_cpu(pair):
    base, long = (open_model(str(path), None, MergeOptions()) for path in (pair.base, pair.long))
    pairs = {long: [LayerPair(i, i) for i in range(5)]}
    expected = TaskVectorSweep(base, pairs, None).norms(quiet=True)[long.reference]
    found = TaskVectorSweep(base, pairs, None, [DEVICE]).norms(quiet=True)[long.reference]
    assert found.layers == pytest.approx(dict(expected.layers), rel=1e-7)
    assert found.other == pytest.approx(expected.other, rel=1e-7)


# Merges


def options(case: str) -> list[str]:
    """The stock command's, or on the CPU what is like them there."""
    given = case.split()
    if not ON_CPU:
        return ["--device", str(DEVICE) if DEVICE.type != "cuda" else "cuda", *given[1:]] if "--cuda" in case else given
    return [option for option in given if option != "--cuda"]


CASES = ["--cuda", "--cuda --low-cpu-memory", "--multi-gpu", "--gpu-rich", *["--cuda --read-to-gpu"][ON_CPU:]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
def test_whole_merges_are_those_of_the_cpu(method, case, dtype, pair, merge, request):
    """With three models, gates and calibration; float32 to within rounding, in 16 bits to within one step."""
    models = [{"model": str(pair.long)}, {"model": str(pair.third), "parameters": {"weight": 0.7}}]
    changes = {"models": models, "dtype": dtype, "parameters": {"norm_tolerance": 1e-4, "gate_scale": 0.7}}
    config = config_for(pair, method, **changes)
    plain, _ = merge.ok(config)
    if ON_CPU and ("--multi-gpu" in case or "--gpu-rich" in case):
        request.getfixturevalue("two_accelerators")
    out, _ = merge.ok(config, *options(case), out="gpu")
    alphas = [[row["alpha"] for m in reference.report(p)["models"] for row in m["layers"]] for p in (out, plain)]
    assert alphas[0] == pytest.approx(alphas[1], abs=1e-4 if dtype == "float32" else 5e-2)
    # With the CPU's coefficients: what is left is the merge's own rounding.
    config["parameters"]["fisher"] = str(write_fisher(plain, pair, merge, dtype))
    plain, _ = merge.ok(config, out="plain-saved")
    again, _ = merge.ok(config, *options(case), out="gpu-saved")
    found, expected = (reference.load(path) for path in (again, plain))
    assert found.keys() == expected.keys()
    step = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}[dtype]
    differing = entries = 0
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value), rtol=step, atol=1e-6)
        differing += int((found[name] != value).sum())
        entries += value.size
    assert dtype == "float32" or differing < 0.01 * entries


def write_fisher(plain, pair, merge, dtype):
    """The measurement of the merge on the CPU, as a file."""
    from mergekit_fim import api

    path = merge.folder / "fisher.json"
    if not path.exists():
        api.write_measurement(api.measure(pair.base, dtype=dtype, cache=False), path)
    return path


def test_two_runs_give_the_same_bytes(pair, merge, place, tmp_path):
    for method in ("fim_ties", "fim_ta"):
        outs = [merge.ok(config_for(pair, method), *options("--cuda"), out=f"{method}-{i}")[0] for i in range(2)]
        for name in ("model.safetensors", "fim_report.json"):
            assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    path = tiny.save(tiny.build(tiny.config("qwen3")), tmp_path / "m", torch.bfloat16)
    for streamed in (False, True):
        place(streamed=streamed)
        assert torch.equal(norms_of(path)[1], norms_of(path)[1])


# Several at once


@several
@pytest.mark.parametrize("roomy", [True, False])
def test_several_accelerators(roomy, large, place, monkeypatch):
    """Also where one of them would hold the model."""
    place(streamed=False)
    _, expected = norms_of(large)
    place(streamed=False, spread=True)
    kept = []
    original = measuring.load_to_run
    monkeypatch.setattr(measuring, "load_to_run", lambda *a, **k: kept.append(original(*a, **k)) or kept[-1])
    if not roomy:
        usable = int(0.9 * bytes_of(large) * 1.1) + (1 << 30)
        monkeypatch.setattr(loading, "_free", lambda devices: [usable] * len(devices))
    for engine in (batched_engine, autograd_engine):
        _, found = norms_of(large, engine=engine)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.0)
    for loaded in kept:
        assert len({p.device for p in loaded.model.parameters()}) > 1
