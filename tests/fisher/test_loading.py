"""Where a model goes: whole onto an accelerator, over several, or streamed; stand-ins take their places: the meta
device, where tensors have no data, and the CPU under several names."""

import contextlib
import gc
from types import SimpleNamespace

import accelerate
import pytest
import tiny
import torch
from mergekit.options import MergeOptions

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.fisher import loading
from mergekit_fim.fisher import measure as measuring
from mergekit_fim.fisher.engine import autograd_engine
from mergekit_fim.fisher.loading import RESERVE, DevicePlan, Placement, load_to_run, plan_devices
from mergekit_fim.fisher.measure import measure_checkpoint, measure_model
from mergekit_fim.fisher.weights import ResidentWeights, StreamedWeights
from mergekit_fim.models import parallel
from mergekit_fim.models.inputs import InputModel, open_model

SETTINGS = FisherSettings(samples=3, seq_len=8)
META = torch.device("meta")  # stands for an accelerator: tensors can be put there, and none has data
CPUS = (torch.device("cpu"), torch.device("cpu:0"))  # two names of one device, which torch keeps apart
NAMES = ("cpu", torch.device("cpu"))  # likewise for accelerate, which doesn't know a tensor on cpu:0 for one there
SPREAD = Placement(META, spread=True, streamed=False)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save(tiny.build(tiny.config("llama")), tmp_path_factory.mktemp("loading") / "model")


@pytest.fixture
def base(path):
    return open_model(str(path), None, MergeOptions())


@pytest.fixture(scope="module")
def size(path) -> int:
    """Bytes of the weights."""
    return sum(p.numel() * 4 for p in tiny.build(tiny.config("llama")).parameters())


def of(usable: float) -> int:
    """An accelerator's free memory of which so much is for weights."""
    return int(usable * 1.1) + RESERVE + 16


# The choice


@pytest.fixture(scope="module")
def seven() -> torch.nn.Module:
    """A model of 17 GiB, without its weights: 26 layers of half a GiB each, and its ends of 2 GiB each."""
    with torch.device("meta"):
        ends = [torch.nn.Embedding(1 << 15, 1 << 14), torch.nn.Linear(1 << 14, 1 << 15, bias=False)]
        layers = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(8, 1, 7_895_000) for _ in range(26))
        return torch.nn.Sequential(ends[0], layers, ends[1])


def test_what_is_chosen(seven):
    gib = 1 << 30

    def chosen(*free):
        plan = plan_devices(seven, list(seven[1]), [int(f * gib) for f in free])
        held = [0.0] * len(free)
        for name, parameter in seven.named_parameters():
            for module in (m for m in plan.device_map if m in ("", name) or name.startswith(f"{m}.")):
                held[plan.device_map[module]] += parameter.nbytes / gib
        assert all(part == 0 or part <= (its - 1) / 1.1 for part, its in zip(held, free, strict=True))
        assert not plan.device_map or sum(held) == pytest.approx(17, rel=0.01)
        return plan.devices, held

    assert chosen(80) == ((0,), [pytest.approx(17, rel=0.01)])
    assert chosen(16) == ((0,), [0.0])  # streamed
    # As evenly as undivided layers and ends allow, also where one of them holds it.
    for free in ((80, 80), (12, 12), (40, 12)):
        devices, held = chosen(*free)
        assert devices == (0, 1)
        assert min(held) > 6
    assert chosen(80, 80, 80, 80)[0] == (0, 1, 2, 3)
    # One that holds nothing is passed over.
    assert chosen(14, 0.5, 14)[0] == (0, 2)
    # The first keeps room for the largest part, unless it holds all of it.
    assert chosen(20, 1.2)[0] == (0,)
    # Together they have the room, but the embedding is larger than any of them.
    assert chosen(*[1.6] * 200) == ((0,), [0.0] * 200)
    assert chosen(8, 10) == ((1,), [0.0, 0.0])
    # Less than the reserve: the roomiest is tried all the same, and says so when it can't.
    assert chosen(0.2, 0.3) == ((1,), [0.0, 0.0])


def test_a_plan_in_words():
    assert "accelerators 0, 2 hold the base together, by a device map" in str(DevicePlan((0, 2), {"a": 0, "b": 2}))
    assert "accelerator 1 holds the base whole" in str(DevicePlan((1,), {"": 1}))
    assert "accelerator 1 gets the base streamed" in str(DevicePlan((1,), {}))


# Where the model goes


def load(base, where: Placement):
    return load_to_run(base, None, MergeOptions(quiet=True), where)


def accelerators(monkeypatch, *free: int) -> list[torch.device]:
    """So many meta devices with so much memory: which were asked for it."""
    asked = []

    def mem_get_info(device):
        asked.append(device)
        return free[device.index or 0], 80 << 30  # free, all

    module = SimpleNamespace(mem_get_info=mem_get_info, empty_cache=lambda: None)
    monkeypatch.setattr(torch, "get_device_module", lambda _device: module)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(free))
    return asked


@pytest.mark.parametrize(("spare", "fits"), [(1024, True), (-1024, False)])
def test_one_accelerator_holds_the_model_if_a_gigabyte_and_a_tenth_is_left(spare, fits, base, size, monkeypatch):
    asked = accelerators(monkeypatch, int(1.1 * size) + (1 << 30) + spare)
    loaded = load(base, Placement(META, spread=False, streamed=False))
    assert asked == [META]
    assert loaded.placement == Placement(META, spread=False, streamed=not fits)
    assert isinstance(loaded.weights, ResidentWeights if fits else StreamedWeights)
    assert not hasattr(loaded.model, "hf_device_map")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sizes", [(0.9, 0.9), (2.0, 2.0), (0.7, 0.9), (0.9, 0.0, 0.9), (0.7, 0.7, 0.7)])
def test_several_accelerators_hold_it_together(sizes, tied, kind, tmp_path, monkeypatch):
    model = tiny.build(tiny.config(kind, tie_word_embeddings=tied))
    base = open_model(str(tiny.save(model, tmp_path / "m")), None, MergeOptions())
    bytes_of = {name: p.nbytes for name, p in model.named_parameters()}
    free = [of(part * sum(bytes_of.values())) for part in sizes]
    accelerators(monkeypatch, *free)
    maps, placed = [], {}
    monkeypatch.setattr(loading.accelerate, "dispatch_model", lambda model, devices, main_device: maps.append(devices))
    original = loading.put

    def put(model, name, device, value, dtype):
        placed[name] = device
        original(model, name, META, value, dtype)  # without a number, or no parameter would stay one

    monkeypatch.setattr(loading, "put", put)
    loaded = load(base, SPREAD)
    assert not loaded.placement.streamed
    (device_map,) = maps
    accelerate.utils.check_device_map(loaded.model, device_map)
    assert len(set(device_map.values())) > 1
    for device in set(device_map.values()):
        on_it = sum(size for name, size in bytes_of.items() if placed[name] == device)
        assert 0 < 1.1 * on_it + RESERVE <= free[device.index]
    for layer in loaded.layers:  # none is divided
        (name,) = [name for name, module in loaded.model.named_modules() if module is layer]
        assert [part for part in device_map if part.startswith(name)] == [name]
        assert {device for its, device in placed.items() if its.startswith(f"{name}.")} == {device_map[name]}
    if tied:
        ends = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
        names = [name for name, module in loaded.model.named_modules() if module in ends]
        assert len({device_map[name] for name in names}) == 1


def test_accelerators_that_do_not_hold_it_have_it_streamed_to_the_roomiest(base, size, monkeypatch):
    accelerators(monkeypatch, of(0.3 * size), of(0.4 * size))
    loaded, places = load(base, SPREAD), set()
    assert loaded.placement == Placement(torch.device("meta", 1), spread=False, streamed=True)
    assert isinstance(loaded.weights, StreamedWeights)
    monkeypatch.setattr("mergekit_fim.fisher.weights.put", lambda part, name, device, *_: places.add(device))
    with loaded.weights.layer(loaded.layers[0]):
        assert places == {torch.device("meta", 1)}


def test_the_plan_before_loading_is_that_of_loading(base, size, monkeypatch):
    accelerators(monkeypatch, of(0.7 * size), of(0.7 * size))
    monkeypatch.setattr(loading, "placement", lambda options: SPREAD)
    assert loading.device_plan(base, None, MergeOptions()).devices == (0, 1)
    monkeypatch.setattr(loading, "placement", lambda options: Placement(CPUS[0], spread=False, streamed=True))
    assert loading.device_plan(base, None, MergeOptions()) is None


# Running it there: the devices are the CPU under two names


@pytest.fixture
def two_cpus(monkeypatch):
    """Two accelerators with room for so much: what `load_to_run` does with them is real, but that both are the CPU."""

    def having(*usable: float, names=CPUS) -> Placement:
        monkeypatch.setattr(Placement, "devices", lambda self: names if self.spread else (self.device,))
        monkeypatch.setattr(loading, "_free", lambda devices: [of(u) for u in usable[: len(devices)]])
        monkeypatch.setattr(parallel, "readers", lambda devices: 3)
        monkeypatch.setattr(loading, "readers", lambda devices: 3)
        return Placement(META, spread=True, streamed=False)

    return having


def reference_norms():
    model = tiny.build(tiny.config("llama"))
    return measure_model(model, list(model.model.layers), SETTINGS, engine=autograd_engine, quiet=True).layers


def test_a_model_over_two_devices_runs(base, size, two_cpus):
    """With accelerate's own map and hooks."""
    loaded = load(base, two_cpus(0.9 * size, 0.9 * size, names=NAMES))
    assert set(loaded.model.hf_device_map.values()) == set(NAMES)
    for name, device in loaded.model.hf_device_map.items():
        assert loaded.model.get_submodule(name)._hf_hook.execution_device == device
    assert loaded.placement == Placement(loaded.model.hf_device_map["model.embed_tokens"], spread=True, streamed=False)
    for engine in ({}, {"engine": autograd_engine}):
        found = measure_model(loaded.model, loaded.layers, SETTINGS, weights=loaded.weights, quiet=True, **engine)
        for a, b in zip(found.layers, reference_norms(), strict=True):
            assert a.squared_norms == pytest.approx(b.squared_norms, rel=1e-5)


def test_a_base_over_two_devices_is_read_once(base, size, two_cpus, monkeypatch):
    """Each tensor is read by one of several threads, goes over one bus, and is shown beside once."""
    where, read, seen, at, freed = two_cpus(2 * size, 2 * size, names=NAMES), [], [], [], []
    on = loading.CheckpointTensors.on
    monkeypatch.setattr(loading.CheckpointTensors, "on", lambda self, n, d: at.append(str(d)) or on(self, n, d))
    monkeypatch.setattr(loading, "placement", lambda options: where)
    monkeypatch.setattr(loading, "running_dtype", lambda dtype, device: dtype)
    original = InputModel.load
    monkeypatch.setattr(InputModel, "load", lambda self, t, d: read.append(t.name) or original(self, t, d))
    monkeypatch.setattr(measuring, "_free_memory", lambda where: freed.extend(where.devices()))
    beside = lambda tensor, values: seen.append(tensor.name)  # noqa: E731
    found = measure_checkpoint(base, SETTINGS, None, MergeOptions(quiet=True), beside=beside)
    for a, b in zip(found.layers, reference_norms(), strict=True):
        assert a.squared_norms == pytest.approx(b.squared_norms, rel=1e-5)
    assert len(read) == len(set(read)) == len(list(tiny.build(tiny.config("llama")).parameters()))
    assert sorted(seen) == sorted(read)
    assert len(at) == len(read)
    assert freed == list(NAMES)


@pytest.mark.parametrize("usable", [(2.0, 2.0), (0.7, 0.7), (2.0, 0.1)])
def test_allocations_that_fail_while_it_is_loaded(usable, base, size, two_cpus, monkeypatch):
    """The memory that was free is gone: the model is streamed, in the end."""
    where, tried = two_cpus(*(part * size for part in usable)), []
    monkeypatch.setattr(loading, "placement", lambda options: where)
    monkeypatch.setattr(loading, "running_dtype", lambda dtype, device: dtype)
    original = loading.put

    def put(model, name, device, value, dtype):
        tried.append(name)
        if len(tried) == 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(model, name, device, value, dtype)

    monkeypatch.setattr(loading, "put", put)
    streamed, freed = [], []
    original_streamed = loading._streamed

    def watched(model, layers, tensors, where, rows):
        streamed.append(where)
        return original_streamed(model, layers, tensors, CPU_PLACE, rows)

    monkeypatch.setattr(loading, "_streamed", watched)
    monkeypatch.setattr(measuring, "_free_memory", lambda where: freed.append((where.devices(), len(streamed))))
    found = measure_checkpoint(base, SETTINGS, None, MergeOptions(quiet=True))
    assert len(streamed) == 1
    assert freed == [(CPUS, 0), (CPUS, 1)]  # before it is loaded anew, and at the end
    for a, b in zip(found.layers, reference_norms(), strict=True):
        assert a.squared_norms == pytest.approx(b.squared_norms, rel=1e-5)


CPU_PLACE = Placement(torch.device("cpu"), spread=False, streamed=True)


@pytest.mark.parametrize(
    "message", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"]
)
def test_a_device_smaller_than_a_layer(message, base, monkeypatch):
    """Not even streamed: one line that says so."""
    monkeypatch.setattr(loading, "_free", lambda devices: [1 << 20])
    monkeypatch.setattr(loading, "placement", lambda options: Placement(META, spread=False, streamed=False))
    monkeypatch.setattr(measuring, "_free_memory", lambda where: None)

    @contextlib.contextmanager
    def layer(self, module):
        raise RuntimeError(message)
        yield

    original = loading._streamed
    monkeypatch.setattr(loading, "_streamed", lambda m, ls, tensors, _, rows: original(m, ls, tensors, CPU_PLACE, rows))
    monkeypatch.setattr(StreamedWeights, "layer", layer)
    with pytest.raises(measuring.FimError, match=r"meta has too little memory .* that of one decoder layer"):
        measure_checkpoint(base, SETTINGS, None, MergeOptions(quiet=True))


def test_pickled_checkpoints_are_read_by_one_thread(base, monkeypatch):
    from mergekit.io.tasks import LoaderCache

    cuda = torch.device("cuda")
    assert parallel.readers([cuda, cuda]) == 2 * parallel.readers([cuda]) > 2
    assert parallel.readers([torch.device("cpu")]) == 1
    monkeypatch.setattr(LoaderCache().get(base.reference).index, "is_safetensors", False)
    assert parallel.readers([cuda]) == 1


def test_threads_have_mergekits_settings_and_stop_at_an_error():
    from mergekit.io.tasks import LoaderCache

    LoaderCache().setup(MergeOptions(lora_merge_cache="here"))
    assert list(parallel.in_threads(3, lambda i: (i, LoaderCache().lora_cache_dir), range(5))) == [
        (i, "here") for i in range(5)
    ]
    done = []

    def work(i):
        done.append(i)
        raise ValueError(i)

    for threads in (1, 2):
        with pytest.raises(ValueError, match="0"):
            list(parallel.in_threads(threads, work, range(1000)))
    assert len(done) < 1000


def test_memory_is_given_back_by_the_accelerator_that_had_it(monkeypatch):
    done = []

    def module(device):
        return SimpleNamespace(empty_cache=lambda: done.append(str(device)))

    monkeypatch.setattr(torch, "get_device_module", module)
    monkeypatch.setattr(gc, "collect", lambda: done.append("collect"))
    measuring._free_memory(CPU_PLACE)
    assert done == []
    measuring._free_memory(Placement(torch.device("cuda:1"), spread=False, streamed=False))
    assert done == ["collect", "cuda:1"]  # what only cycles hold is let go first
