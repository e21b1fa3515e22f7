"""Where a model goes: whole onto an accelerator, a replica on each, spread over them, or streamed; stand-ins take
their places: the meta device, where tensors have no data, and the CPU under several names."""

import contextlib
import gc
import itertools
from types import SimpleNamespace

import accelerate
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergekit.options import MergeOptions

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.fisher import loading
from mergekit_fim.fisher import measure as measuring
from mergekit_fim.fisher.batched import batched_engine
from mergekit_fim.fisher.devices import RESERVE, DevicePlan, Way, _room, plan_devices
from mergekit_fim.fisher.engine import autograd_engine
from mergekit_fim.fisher.loading import Placement, load_model
from mergekit_fim.fisher.measure import measure, measure_checkpoint
from mergekit_fim.fisher.weights import ResidentWeights, StreamedWeights
from mergekit_fim.models import parallel
from mergekit_fim.models.inputs import InputModel, open_model

SETTINGS = FisherSettings(samples=3, seq_len=8)
META = torch.device("meta")  # stands for an accelerator: tensors can be put there, and none has data
CPUS = (torch.device("cpu"), torch.device("cpu:0"))  # two names of one device, which torch keeps apart
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


def test_what_is_chosen():
    gib = 1 << 30
    seven = [2 * gib, *[gib // 2] * 26, 2 * gib]  # 17 GiB
    layer = seven[1]

    def chosen(free, blocks=seven, sequences=8):
        plan = plan_devices([int(f * gib) for f in free], blocks, sequences)
        return plan.way, plan.devices

    assert chosen([80]) == (Way.WHOLE, (0,))
    assert chosen([16]) == (Way.STREAMED, (0,))
    assert chosen([80] * 8) == (Way.REPLICAS, tuple(range(8)))
    assert chosen([80] * 8, sequences=3) == (Way.REPLICAS, (0, 1, 2))
    assert chosen([80] * 8, sequences=1) == (Way.WHOLE, (0,))
    assert chosen([8, 80, 16, 24]) == (Way.REPLICAS, (1, 3))
    assert chosen([8, 80, 16]) == (Way.WHOLE, (1,))
    assert chosen([12, 12]) == (Way.SPREAD, (0, 1))
    assert chosen([8, 8, 8]) == (Way.SPREAD, (0, 1, 2))
    assert chosen([8, 10]) == (Way.STREAMED, (1,))
    # Together they have the room, but a layer, or the embedding, is larger than any of them.
    assert chosen([1.2] * 200, [layer] * 38) == (Way.STREAMED, (0,))
    assert chosen([1.6] * 38, [layer] * 38) == (Way.SPREAD, tuple(range(38)))
    assert chosen([1.6] * 200) == (Way.STREAMED, (0,))
    # One that holds no block is passed over.
    assert chosen([12, 0.5, 12]) == (Way.SPREAD, (0, 2))
    # Evenly, but for what they can hold.
    assert [plan_devices([12 * gib] * 2, seven, 8).holders.count(device) for device in (0, 1)] == [14, 14]
    assert plan_devices([4 * gib, 40 * gib], [gib] * 37, 8).holders == (0,) * 2 + (1,) * 35
    # Less than the reserve: the roomiest is tried all the same, and says so when it can't.
    assert chosen([0.2, 0.3]) == (Way.STREAMED, (1,))


@given(
    st.lists(st.integers(0, 40 << 30), min_size=1, max_size=5),
    st.lists(st.integers(1, 4 << 30), min_size=1, max_size=12),
    st.integers(1, 9),
)
def test_whatever_is_chosen_fits(free, blocks, sequences):
    plan = plan_devices(free, blocks, sequences)
    rooms = [_room(size) for size in free]
    fits = [device for device, its in enumerate(rooms) if sum(blocks) <= its]
    assert set(plan.devices) <= set(range(len(free)))
    if plan.way in (Way.WHOLE, Way.REPLICAS):
        assert list(plan.devices) == fits[:sequences]
        assert (len(plan.devices) > 1) is (plan.way is Way.REPLICAS)
        return
    assert fits == []
    # By trying all the ways to cut the blocks into runs, one for each device.
    cuts = itertools.combinations_with_replacement(range(len(blocks) + 1), len(free) - 1)
    together = any(
        all(sum(blocks[a:b]) <= its for a, b, its in zip((0, *cut), (*cut, len(blocks)), rooms, strict=True))
        for cut in cuts
    )
    assert (plan.way is Way.SPREAD) is together
    if together:
        assert set(plan.holders) == set(plan.devices)
        for device in plan.devices:
            assert sum(b for b, holder in zip(blocks, plan.holders, strict=True) if holder == device) <= rooms[device]


def test_a_plan_in_words():
    assert "accelerators 0, 2 hold a replica" in str(DevicePlan(Way.REPLICAS, (0, 2)))
    assert {str(DevicePlan(way, (1,)))[:13] for way in (Way.WHOLE, Way.STREAMED)} == {"accelerator 1"}
    assert "device map" in str(DevicePlan(Way.SPREAD, (0, 1)))


# Where the model goes


def load(base, where: Placement, sequences: int = 1):
    return load_model(base, None, MergeOptions(quiet=True), where, sequences=sequences)


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
    loaded = load(base, Placement(META, spread=False, streamed=False), 8)
    assert asked == [META]
    assert loaded.placement == Placement(META, spread=False, streamed=not fits)
    assert isinstance(loaded.weights, ResidentWeights if fits else StreamedWeights)
    assert not hasattr(loaded.model, "hf_device_map")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sizes", [(0.8, 0.8), (0.5, 0.9), (0.6, 0.0, 0.9), (0.5, 0.5, 0.5)])
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
        assert 0 < on_it <= _room(free[device.index])
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
    plan = loading.device_plan(base, None, MergeOptions(), 8)
    assert (plan.way, plan.devices) == (Way.SPREAD, (0, 1))
    monkeypatch.setattr(loading, "placement", lambda options: Placement(CPUS[0], spread=False, streamed=True))
    assert loading.device_plan(base, None, MergeOptions(), 8) is None


# Running it there: the devices are the CPU under two names


@pytest.fixture
def two_cpus(monkeypatch):
    """Two accelerators with room for so much: what `load_model` does with them is real, but that both are the CPU."""

    def having(*usable: float, names=CPUS) -> Placement:
        monkeypatch.setattr(Placement, "devices", lambda self: names if self.spread else (self.device,))
        monkeypatch.setattr(loading, "_free", lambda devices: [of(u) for u in usable[: len(devices)]])
        monkeypatch.setattr(parallel, "readers", lambda devices: 3)
        monkeypatch.setattr(loading, "readers", lambda devices: 3)
        return Placement(META, spread=True, streamed=False)

    return having


def reference_norms():
    model = tiny.build(tiny.config("llama"))
    return measure(model, list(model.model.layers), SETTINGS, engine=autograd_engine, quiet=True).layers


def test_a_model_over_two_devices_runs(base, size, two_cpus):
    """With accelerate's own map and hooks."""
    names = ("cpu", torch.device("cpu"))  # accelerate doesn't know cpu:0 for the device of a tensor there
    loaded = load(base, two_cpus(0.7 * size, 0.7 * size, names=names), 8)
    assert set(loaded.model.hf_device_map.values()) == set(names)
    for name, device in loaded.model.hf_device_map.items():
        assert loaded.model.get_submodule(name)._hf_hook.execution_device == device
    assert loaded.placement == Placement(loaded.model.hf_device_map["model.embed_tokens"], spread=True, streamed=False)
    assert loaded.replicas == ()
    for engine in ({}, {"engine": autograd_engine}):
        found = measure(loaded.model, loaded.layers, SETTINGS, weights=loaded.weights, quiet=True, **engine)
        for a, b in zip(found.layers, reference_norms(), strict=True):
            assert a.squared_norms == pytest.approx(b.squared_norms, rel=1e-5)


@pytest.mark.parametrize("reference", [False, True])
def test_replicas_share_the_sequences(reference, base, size, two_cpus, monkeypatch):
    """Each tensor is read once, by one of several threads, and shown beside once."""
    where, read, seen, ran, at = two_cpus(2 * size, 2 * size), [], [], [], []
    on = loading.CheckpointTensors.on
    monkeypatch.setattr(loading.CheckpointTensors, "on", lambda self, n, d: at.append(str(d)) or on(self, n, d))
    monkeypatch.setattr(loading, "placement", lambda options: where)
    monkeypatch.setattr(loading, "running_dtype", lambda dtype, device: dtype)
    original = InputModel.load
    monkeypatch.setattr(InputModel, "load", lambda self, t, d: read.append(t.name) or original(self, t, d))
    loads, freed = [], []

    def watched(*args, **options):
        loads.append(load_model(*args, **options))
        return loads[-1]

    def engine(model, layers, samples, *rest):
        ran.append((model, samples.input_ids))
        return (autograd_engine if reference else batched_engine)(model, layers, samples, *rest)

    monkeypatch.setattr(measuring, "load_model", watched)
    monkeypatch.setattr(measuring, "_free_memory", freed.append)
    options = MergeOptions(quiet=True)
    beside = lambda tensor, values: seen.append(tensor.name)  # noqa: E731
    found = measure_checkpoint(base, SETTINGS, None, options, engine=engine, beside=beside)
    for a, b in zip(found.layers, reference_norms(), strict=True):
        assert a.squared_norms == pytest.approx(b.squared_norms, rel=1e-5)
    (loaded,) = loads
    assert [replica.device for replica in loaded.replicas] == list(CPUS)
    assert loaded.replicas[0].model is loaded.model
    assert {id(model) for model, _ in ran} == {id(replica.model) for replica in loaded.replicas}
    assert sorted(len(ids) for _, ids in ran) == [1, 2]
    assert len(read) == len(set(read)) == len(list(loaded.model.parameters()))
    assert sorted(seen) == sorted(read)
    assert {at.count(str(device)) for device in CPUS} == {len(read) // 2}  # half over either's bus
    assert freed == list(CPUS)
    parameters = [dict(replica.model.named_parameters()) for replica in loaded.replicas]
    for name, parameter in parameters[0].items():
        assert torch.equal(parameters[1][name], parameter)


def test_what_a_replica_raises_or_warns_of_is_that_of_all(base, size, two_cpus):
    loaded = load(base, two_cpus(2 * size, 2 * size), 3)

    def warns(model, layers, samples, progress, weights, warn):
        warn("short of memory")
        progress(len(samples.input_ids))
        return torch.zeros(len(samples.input_ids), len(layers))

    def fails(model, *rest):
        if model is loaded.replicas[1].model:
            raise torch.OutOfMemoryError
        return warns(model, *rest)

    samples = measuring.draw_samples(SETTINGS, tiny.VOCAB)
    steps, lines = [], []
    over = measuring.over_replicas
    norms = over(loaded.replicas, warns)(loaded.model, loaded.layers, samples, steps.append, None, lines.append)
    assert norms.shape == (3, 5)
    assert lines == ["short of memory"]
    assert sorted(steps) == [1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        over(loaded.replicas, fails)(loaded.model, loaded.layers, samples, steps.append, None, lines.append)
    assert over(loaded.replicas[:1], fails) is fails


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
    monkeypatch.setattr(measuring, "_free_memory", lambda device: freed.append((device, len(streamed))))
    found = measure_checkpoint(base, SETTINGS, None, MergeOptions(quiet=True))
    assert len(streamed) == 1
    assert freed == [(device, n) for n in (0, 1) for device in CPUS]  # before it is loaded anew, and at the end
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
    monkeypatch.setattr(measuring, "_free_memory", lambda device: None)

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
    measuring._free_memory(torch.device("cpu"))
    assert done == []
    measuring._free_memory(torch.device("cuda:1"))
    assert done == ["collect", "cuda:1"]  # what only cycles hold is let go first
