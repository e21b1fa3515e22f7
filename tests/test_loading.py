"""Where a model goes: whole onto an accelerator, spread over several, or streamed; stand-ins take their places."""

import gc
from types import SimpleNamespace

import pytest
import tiny
import torch
from mergekit.options import MergeOptions

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.fisher import loading
from mergekit_fim.fisher import measure as measuring
from mergekit_fim.fisher.engine import autograd_engine
from mergekit_fim.fisher.loading import Placement, load_model
from mergekit_fim.fisher.measure import measure
from mergekit_fim.fisher.weights import ResidentWeights, StreamedWeights
from mergekit_fim.models.inputs import open_model

SETTINGS = FisherSettings(samples=3, seq_len=8)
GIB = 1 << 30
META = torch.device("meta")  # stands for an accelerator: tensors can be put there, and none has data


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


def load(base, where: Placement):
    return load_model(base, None, MergeOptions(quiet=True), where)


@pytest.mark.parametrize(("spare", "fits"), [(1024, True), (-1024, False)])
def test_one_accelerator_holds_the_model_if_a_gigabyte_and_a_tenth_is_left(spare, fits, base, size, monkeypatch):
    asked = []

    def mem_get_info(device):
        asked.append(device)
        return int(1.1 * size) + GIB + spare, 80 * GIB  # free, all

    monkeypatch.setattr(torch, "get_device_module", lambda _device: SimpleNamespace(mem_get_info=mem_get_info))
    loaded = load(base, Placement(META, spread=False, streamed=False))
    assert asked == [META]
    assert loaded.placement == Placement(META, spread=False, streamed=not fits)
    assert isinstance(loaded.weights, ResidentWeights if fits else StreamedWeights)
    assert not hasattr(loaded.model, "hf_device_map")


def fitting(base, monkeypatch, *sizes: int) -> tuple[dict | None, dict[str, int]]:
    """The device map of the model over accelerators with so many bytes, and the bytes of what the map names."""
    monkeypatch.setattr(loading, "get_max_memory", lambda: {**dict(enumerate(sizes)), "cpu": 64 * GIB})
    model = loading._without_weights(base, torch.float32, False)
    layers = loading.decoder_layers(model, base)
    found = loading._fitting(model, layers, Placement(META, spread=True, streamed=False))
    parameters = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    parts = {
        part: sum(count for name, count in parameters.items() if f"{name}.".startswith(f"{part}."))
        for part in found or {}
    }
    return found, parts


def of(usable: float) -> int:
    """An accelerator's memory of which so much is for weights."""
    return int((usable + GIB) / 0.9) + 16


def test_several_accelerators_hold_it_together(base, size, monkeypatch):
    found, parts = fitting(base, monkeypatch, of(0.7 * size), of(0.7 * size))
    assert set(found.values()) == {torch.device("meta", 0), torch.device("meta", 1)}
    assert sum(parts.values()) == size
    for device in set(found.values()):
        assert sum(parts[part] for part in found if found[part] == device) <= 0.7 * size
    # No decoder layer is split.
    for index in range(5):
        assert [part for part in found if f"{part}.".startswith(f"model.layers.{index}.")] == [f"model.layers.{index}"]


@pytest.mark.filterwarnings("ignore:Current model requires .* bytes of buffer for offloaded layers")  # accelerate's
@pytest.mark.parametrize("sizes", [(0.3, 0.3), (0.7, 0.1), (-0.5, -0.5)])
def test_accelerators_that_do_not_hold_it_with_their_reserve(sizes, base, size, monkeypatch):
    """Without the reserve all of these would."""
    assert fitting(base, monkeypatch, *(of(part * size) for part in sizes))[0] is None
    monkeypatch.setattr(loading, "_RESERVE", 0)
    assert fitting(base, monkeypatch, *(of(part * size) for part in sizes))[0] is not None


def test_accelerators_that_do_not_hold_it_have_it_streamed_to_the_first(base, size, monkeypatch):
    monkeypatch.setattr(loading, "get_max_memory", lambda: {0: of(0.3 * size), 1: of(0.3 * size), "cpu": 64 * GIB})
    loaded = load(base, Placement(META, spread=True, streamed=False))
    assert loaded.placement == Placement(META, spread=False, streamed=True)
    assert isinstance(loaded.weights, StreamedWeights)


def test_a_model_over_two_devices_runs(base, size, monkeypatch):
    """With accelerate's own map and hooks; the two devices are the CPU under two names."""
    monkeypatch.setattr(loading, "get_max_memory", lambda: {0: of(0.7 * size), 1: of(0.7 * size), "cpu": 64 * GIB})
    original, maps = loading._fitting, []

    def on_cpu(*args):
        names = ["cpu", torch.device("cpu")]
        maps.append({name: names[device.index] for name, device in original(*args).items()})
        assert set(maps[-1].values()) == set(names)
        return maps[-1]

    monkeypatch.setattr(loading, "_fitting", on_cpu)
    loaded = load(base, Placement(META, spread=True, streamed=False))
    assert loaded.placement == Placement(META, spread=True, streamed=False)
    assert loaded.model.hf_device_map == maps[0]
    for name, device in maps[0].items():
        assert loaded.model.get_submodule(name)._hf_hook.execution_device == device
    for engine in ({}, {"engine": autograd_engine}):
        found = measure(loaded.model, loaded.layers, SETTINGS, weights=loaded.weights, quiet=True, **engine)
        model = tiny.build(tiny.config("llama"))
        expected = measure(model, list(model.model.layers), SETTINGS, engine=autograd_engine, quiet=True)
        for a, b in zip(found.layers, expected.layers, strict=True):
            assert a.squared_norms == pytest.approx(b.squared_norms, rel=1e-5)


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
