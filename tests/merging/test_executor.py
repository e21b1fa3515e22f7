"""Merges on accelerators by mergekit's executors: no result lost, no tensor twice over the bus, no devices mixed."""

import queue
import threading
import time

import pytest
import tiny
import torch
from mergekit.graph import Executor
from mergekit.io.tasks import LoadTensor
from mergekit.merge import MultiGPUExecutor
from mergekit.merge_methods import TensorGroup, get
from merges import config_for, ends_in_one_line, trim
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.fisher.batched import batched_engine
from mergekit_fim.fisher.samples import draw_samples
from mergekit_fim.merging import executor
from mergekit_fim.norms import squared_distance, squared_norm


@pytest.fixture
def late(two_accelerators, monkeypatch, request):
    """The thread that takes the workers' results takes some, and comes to the rest when they have ended."""
    original, some, queues = MultiGPUExecutor.__init__, request.param, []

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)

        class Late(queue.Queue):
            taken = 0

            def get(late, *args, **kwargs):
                while late.taken == some and not threading.Event.is_set(self.done_event):
                    time.sleep(0.001)
                result = super().get(*args, **kwargs)
                late.taken += 1
                return result

        self.task_completion_queue = Late()
        queues.append(self.task_completion_queue)

    monkeypatch.setattr(MultiGPUExecutor, "__init__", init)
    return queues


@pytest.mark.parametrize("late", [0, 1, 50, 130], indirect=True)
@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
def test_results_that_are_taken_late_are_not_lost(method, late, pair, merge):
    plain, _ = merge.ok(config_for(pair, method))
    out, _ = merge.ok(config_for(pair, method), "--multi-gpu", out="multi")
    for name in ("model.safetensors", "fim_report.json"):
        assert (out / name).read_bytes() == (plain / name).read_bytes()
    assert [results.empty() for results in late] == [True]


@pytest.mark.parametrize("late", [50], indirect=True)
def test_without_the_guard_they_are_lost(late, pair, merge, monkeypatch):
    """If this fails, mergekit was mended, and the guard may go."""
    monkeypatch.setattr(executor, "deliver_all", lambda: None)
    monkeypatch.setattr(executor, "ReplaceModel", type("Nothing", (), {}))  # where an earlier test has put it in place
    merge(config_for(pair), "--multi-gpu", out="multi")  # an error or not: that hangs on which of them are lost
    assert [results.empty() for results in late] == [False]


def test_an_executor_of_another_kind_is_refused(two_accelerators, pair, merge, monkeypatch):
    original = MultiGPUExecutor.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.task_completion_queue = []

    monkeypatch.setattr(MultiGPUExecutor, "__init__", init)
    _, result = merge(config_for(pair), "--multi-gpu", out="multi")
    ends_in_one_line(result, "--multi-gpu: expected the executor of mergekit 0.1.5", "merge with --cuda")


def test_the_executors_of_other_methods_stay_as_they_are(two_accelerators, pair, merge, monkeypatch):
    executor.deliver_all()
    kinds = []
    monkeypatch.setattr(MultiGPUExecutor, "run", lambda self, quiet: kinds.append(type(self.done_event)) or iter(()))
    models = [{"model": str(pair.long), "parameters": {"weight": 0.5}}]
    merge.ok(config_for(pair, "task_arithmetic", models=models), "--multi-gpu")
    merge.ok(config_for(pair, "fim_ta"), "--multi-gpu", out="ours")
    assert kinds == [threading.Event, executor._AllTaken]


@pytest.mark.parametrize("options", [["--read-to-gpu"], ["--low-cpu-memory", "--read-to-gpu"], []])
def test_every_tensor_goes_once_over_the_bus(options, pair, merge, monkeypatch):
    """mergekit reads it on the CPU, and its executor brings it to the device, as nothing else does."""
    devices, moved = set(), []
    execute, move = LoadTensor.execute, Executor._move_tensors
    monkeypatch.setattr(LoadTensor, "execute", lambda self: devices.add(self.device) or execute(self))
    monkeypatch.setattr(
        Executor,
        "_move_tensors",
        lambda self, value, device, *rest: moved.append(device) or move(self, value, device, *rest),
    )
    merge.ok(config_for(pair), *options)
    assert devices == {None}
    assert moved != []


class Mixed(AssertionError):
    pass


class OneDevice(TorchFunctionMode):
    """Takes some tensors of the CPU for those of an accelerator, and sees that no operation mixes the two.

    What comes out of one is one too, and so is what is made for a device that is named, or brought to one. What is made
    without one isn't, nor what is brought back to the CPU. Of others, such as gradients, nothing is known.
    """

    def __init__(self, there=()):
        super().__init__()
        self.kept = list(there)  # all of them, so that nothing else gets their addresses
        self.known = {t.untyped_storage().data_ptr(): True for t in there}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, torch.Tensor) and t.numel() and t.ndim]
        places = {self.known.get(t.untyped_storage().data_ptr()) for t in tensors} - {None}
        device = any(isinstance(leaf, torch.device) for leaf in leaves)
        brought = function is torch.Tensor.cpu or (function is torch.Tensor.to and device)
        if len(places) > 1 and not brought:
            raise Mixed(str(function))
        result = function(*args, **kwargs)
        if brought:
            result = result.clone()
        if brought or places or not tensors:
            place = function is not torch.Tensor.cpu if brought else places.pop() if places else device
            for made in tree_leaves(result):
                if isinstance(made, torch.Tensor) and made.numel() and made.ndim:
                    self.known[made.untyped_storage().data_ptr()] = place
                    self.kept.append(made)
        return result


def test_mixed_devices_are_noticed():
    a, b = torch.ones(3), torch.ones(3)
    with OneDevice([a]):
        assert float(((a + 1) * 2).sum()) == 12
        torch.zeros(3, device=a.device).add_(a)
        for other in (torch.zeros(3), torch.arange(3), a.cpu()):
            with pytest.raises(Mixed):
                a * 2 + other
        assert float((a + b.to(a.device)).sum()) == 6


@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"])
@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
def test_a_merge_leaves_its_device_for_numbers_only(method, name):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 60, 600, generator=generator)
    # Steps that leave many entries equal, and more of them than the sample that the threshold is looked for in.
    tuned = [base + torch.randint(-9, 10, base.shape, generator=generator) / 8 for _ in range(2)]
    alphas = {"alpha": [0.9, 0.4], "weight": [1.0, 0.5], "norm_tolerance": 1e-4, "gate_scale": 0.7}
    group = TensorGroup.from_tensors([base, *tuned], base_index=0, name=name)
    parameters = alphas | ({"density": [0.2, 0.5]} if method == "fim_ties" else {})
    expected = get(method)([group], parameters=parameters)[0]
    with OneDevice([base, *tuned]):
        found = get(method)([group], parameters=parameters)[0]
    assert torch.equal(found, expected)


def test_trimming_and_norms_leave_their_device_for_numbers_only():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-9, 10, (300_000,), generator=generator) / 8
    other = values.flip(0)
    expected = trim(values, 0.3), squared_norm(values), squared_distance(values, other)
    with OneDevice([values, other]):
        found = trim(values, 0.3), squared_norm(values), squared_distance(values, other)
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]


@pytest.mark.parametrize("labels", ["inputs", "sampled"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mixtral"])
def test_the_engine_leaves_its_device_for_numbers_only(kind, labels):
    model = tiny.build(tiny.config(kind))
    layers = list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)
    samples = draw_samples(FisherSettings(3, 12, 0, labels), tiny.VOCAB)
    expected = batched_engine(model, layers, samples, lambda _n: None)
    parts = [samples.input_ids] if samples.uniforms is None else [samples.input_ids, samples.uniforms]
    mode = OneDevice([*model.parameters(), *model.buffers()])
    mode.known |= {part.untyped_storage().data_ptr(): False for part in parts}
    with mode:
        found = batched_engine(model, layers, samples, lambda _n: None)
    assert torch.equal(found, expected)
    assert len(mode.known) > 100
