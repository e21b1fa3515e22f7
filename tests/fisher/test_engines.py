"""The fast engine against the reference engine: models, formats, micro-batches, and what it must not trust."""

import contextlib
import weakref
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import transformers
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import nn

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.fisher import batched, head
from mergekit_fim.fisher import loading as placement
from mergekit_fim.fisher import measure as fisher
from mergekit_fim.fisher.batched import batched_engine
from mergekit_fim.fisher.engine import NotSupportedError, autograd_engine
from mergekit_fim.fisher.loading import Placement, load_to_run
from mergekit_fim.fisher.measure import measure_checkpoint, measure_model
from mergekit_fim.fisher.rules import GramCache, product_squared_norm
from mergekit_fim.fisher.samples import Samples, draw_samples
from mergekit_fim.fisher.weights import ResidentWeights, StreamedWeights
from mergekit_fim.models.inputs import open_model
from mergekit_fim.processes import together
from mergekit_fim.processes.together import shared_engine

SETTINGS = FisherSettings(samples=5, seq_len=12, seed=3)


def layers_of(model):
    return list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)


def both(model, settings=SETTINGS):
    samples = draw_samples(settings, tiny.VOCAB)
    model.eval()
    expected = autograd_engine(model, layers_of(model), samples, lambda _n: None)
    return batched_engine(model, layers_of(model), samples, lambda _n: None), expected


@pytest.mark.parametrize("labels", ["inputs", "sampled"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "mixtral"])
def test_float32(kind, labels):
    found, expected = both(tiny.build(tiny.config(kind)), FisherSettings(5, 12, 3, labels))
    assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gpt2"])
def test_bfloat16(kind):
    found, expected = both(tiny.build(tiny.config(kind)).bfloat16())
    assert found.mean(0).numpy() == pytest.approx(expected.mean(0).numpy(), rel=2e-2)


@pytest.mark.parametrize("tokens", [1, 24, 40])
def test_micro_batches(tokens, monkeypatch):
    monkeypatch.setattr(batched, "_TOKENS", tokens)
    found, expected = both(tiny.build(tiny.config("llama")))
    assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-5)


def test_no_weight_gradient_is_formed_where_the_rules_hold(monkeypatch):
    model = tiny.build(tiny.config("qwen3"))
    calls = []
    original = batched._Layer._by_autograd
    monkeypatch.setattr(
        batched._Layer,
        "_by_autograd",
        lambda self, *args, first_only=False: calls.append(first_only) or original(self, *args, first_only=first_only),
    )
    both(model)
    assert calls == [True]  # the check of the one kind of layer, on one sequence


class Clipped(nn.Module):
    """Uses its projection's result in a way that hides whether it is there."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).relu()


class Gated(Clipped):
    def forward(self, x):
        y = self.inner(x)
        return y * y.sigmoid()


@pytest.mark.parametrize("kind", [Clipped, Gated])
def test_a_last_projection_whose_result_is_needed(kind):
    model = tiny.build(tiny.config("llama"))
    for layer in model.model.layers:
        layer.mlp.down_proj = kind(layer.mlp.down_proj)
    found, expected = both(model)
    assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-4)


def test_long_sequences_take_the_product_itself():
    generator = torch.Generator().manual_seed(0)
    for length, inputs, outputs in [(4, 9, 7), (50, 9, 7), (33, 2, 40)]:
        a = torch.randn(3, length, inputs, generator=generator)
        b = torch.randn(3, length, outputs, generator=generator)
        expected = torch.einsum("nti,nto->nio", a.double(), b.double()).square().sum((1, 2))
        assert product_squared_norm(a, b, GramCache()).numpy() == pytest.approx(expected.numpy(), rel=1e-5)
    found, expected = both(tiny.build(tiny.config("llama")), FisherSettings(2, 100, 0))
    assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-5)


def test_the_vocabulary_is_never_whole(monkeypatch):
    sizes = []
    original = head.Head.__call__
    monkeypatch.setattr(head, "_LOGITS", 5 * 11 * 10)
    monkeypatch.setattr(head.Head, "__call__", lambda self, h, a, b: sizes.append(b - a) or original(self, h, a, b))
    for labels in ("inputs", "sampled"):
        sizes.clear()
        found, expected = both(tiny.build(tiny.config("gemma2")), FisherSettings(5, 12, 3, labels))
        assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-5)
        assert max(sizes[3:]) == 10  # after the three of the check whether chunks are possible
        assert sum(sizes[3:]) == (1 if labels == "inputs" else 2) * tiny.VOCAB


def test_a_tail_that_mixes_the_vocabulary():
    model = tiny.build(tiny.config("llama"))
    original = model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits - 0.3 * output.logits.mean(-1, keepdim=True).tanh() * output.logits
        return output

    model.forward = forward
    for labels in ("inputs", "sampled"):
        found, expected = both(model, FisherSettings(5, 12, 3, labels))
        assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-5)


class Twice(nn.Module):
    """A projection that is used twice, and once by its weight alone: no rule holds, and one call looks like a rule."""

    def __init__(self, inner, functional):
        super().__init__()
        self.inner, self.functional = inner, functional

    def forward(self, x):
        once = self.inner(x)
        return once + (
            nn.functional.linear(x, self.inner.weight).tanh() if self.functional else self.inner(-2 * x).tanh()
        )


class Scale(nn.Module):
    def __init__(self, inner, size):
        super().__init__()
        self.inner = inner
        self.table = nn.Embedding(4, size)
        self.kernel = nn.Parameter(torch.randn(size, size, 1))

    def forward(self, x):
        ids = torch.arange(x.shape[1]) % 4
        return self.inner(x + self.table(ids.expand(len(x), -1)) + x @ self.kernel[..., 0])


@pytest.mark.parametrize("change", ["twice", "functional", "parameter", "embedding"])
def test_modules_without_a_rule_or_that_break_it(change):
    model = tiny.build(tiny.config("llama"))
    for layer in model.model.layers[1:3]:
        if change in ("twice", "functional"):
            layer.mlp.up_proj = Twice(layer.mlp.up_proj, change == "functional")
        else:
            layer.mlp.down_proj = Scale(layer.mlp.down_proj, 48)
            if change == "embedding":
                layer.mlp.down_proj.kernel = nn.Parameter(torch.zeros(0, 0, 1), requires_grad=False)
                layer.mlp.down_proj.forward = lambda x, m=layer.mlp.down_proj: m.inner(
                    x + m.table((torch.arange(x.shape[1]) % 4).expand(len(x), -1))
                )
    found, expected = both(model)
    assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-4)


def test_an_argument_that_has_the_sequences_elsewhere():
    """Bloom's alibi has heads and sequences on one axis: none can be split off, so the reference engine measures it."""
    shape = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    model = tiny.build(transformers.BloomConfig(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=None))
    with pytest.raises(NotSupportedError):
        batched_engine(model, layers_of(model), draw_samples(SETTINGS, tiny.VOCAB), lambda _n: None)
    found = measure_model(model, layers_of(model), SETTINGS, quiet=True)
    assert found == measure_model(model, layers_of(model), SETTINGS, engine=autograd_engine, quiet=True)


def test_layers_that_hand_on_more_than_their_result():
    """State that passes the layers by can't be recomputed layer by layer: the reference engine measures the model."""
    model = tiny.build(tiny.config("llama"))
    shared = model.model.layers[2].mlp
    model.model.layers[3].mlp = shared
    with pytest.raises(NotSupportedError):
        batched_engine(model, layers_of(model), draw_samples(SETTINGS, tiny.VOCAB), lambda _n: None)
    found = measure_model(model, layers_of(model), SETTINGS, quiet=True)
    expected = measure_model(model, layers_of(model), SETTINGS, engine=autograd_engine, quiet=True)
    assert found == expected


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("storage", ["one file", "shards", "bin"])
def test_streamed_from_the_checkpoint(kind, storage, tied, tmp_path):
    model = tiny.build(tiny.config(kind, tie_word_embeddings=tied), spread=False)
    options = {"max_shard_size": "30KB"} if storage == "shards" else {}
    tiny.save(model, tmp_path / "m", **options)
    if storage == "bin":
        (file,) = (tmp_path / "m").glob("*.safetensors")
        from safetensors.torch import load_file

        torch.save(load_file(file), tmp_path / "m" / "pytorch_model.bin")
        file.unlink()
    base = open_model(str(tmp_path / "m"), None, MergeOptions())
    seen: dict[str, torch.Tensor] = {}

    def beside(tensor, values):
        assert torch.equal(seen.setdefault(tensor.name, values), values)

    found = measure_checkpoint(base, SETTINGS, None, MergeOptions(quiet=True), beside=beside)
    expected = measure_model(model, layers_of(model), SETTINGS, engine=autograd_engine, quiet=True)
    in_layers = [tensor.name for layer in base.layout.layers for tensor in layer.tensors]
    assert [name for name in seen if name in in_layers] != []
    assert seen.keys() >= {name for name in in_layers if name not in base.absent}
    assert [layer.parameters for layer in found.layers] == [layer.parameters for layer in expected.layers]
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert a.squared_norms == pytest.approx(b.squared_norms, rel=1e-4)
    assert found.warnings == ()


def test_one_layer_is_in_memory_at_a_time(tmp_path, monkeypatch):
    path = tiny.save(tiny.build(tiny.config("llama")), tmp_path / "m", torch.bfloat16)
    base = open_model(str(path), None, MergeOptions())
    where = Placement(torch.device("cpu"), spread=False, streamed=True)
    loaded = load_to_run(base, None, MergeOptions(), where, running=torch.float32)
    weights = loaded.weights
    assert isinstance(weights, StreamedWeights)
    original = StreamedWeights.layer
    most = []

    def layer(self, module):
        context = original(self, module)

        class Watched:
            def __enter__(self):
                context.__enter__()
                most.append(sum(any(p.device.type != "meta" for p in x.parameters()) for x in loaded.layers))
                assert {p.dtype for p in module.parameters()} == {torch.float32}

            def __exit__(self, *error):
                context.__exit__(*error)

        return Watched()

    monkeypatch.setattr(StreamedWeights, "layer", layer)
    found = measure_model(loaded.model, loaded.layers, SETTINGS, weights=weights, quiet=True)
    assert set(most) == {1}
    assert all(p.device.type == "meta" for x in loaded.layers for p in x.parameters())
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = measure_model(model, layers_of(model), SETTINGS, engine=autograd_engine, quiet=True)
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert a.squared_norms == pytest.approx(b.squared_norms, rel=1e-4)


def test_resident_and_streamed_agree(tmp_path):
    path = tiny.save(tiny.build(tiny.config("qwen2", tie_word_embeddings=True)), tmp_path / "m")
    base = open_model(str(path), None, MergeOptions())
    norms = []
    for streamed in (True, False):
        where = Placement(torch.device("cpu"), spread=False, streamed=streamed)
        loaded = load_to_run(base, None, MergeOptions(quiet=True), where)
        found = measure_model(loaded.model, loaded.layers, SETTINGS, weights=loaded.weights, quiet=True)
        norms.append([layer.squared_norms for layer in found.layers])
    # Mapped and copied weights lie differently in memory, which matrix products may round differently for.
    assert np.array(norms[0]) == pytest.approx(np.array(norms[1]), rel=1e-5)


def test_a_model_that_runs_out_of_memory_is_halved(tmp_path, monkeypatch):
    path = tiny.save(tiny.build(tiny.config("llama")), tmp_path / "m")
    base = open_model(str(path), None, MergeOptions())
    expected = measure_checkpoint(base, SETTINGS, None, MergeOptions(quiet=True))
    sizes = []
    original = batched._Run.measure

    def small(self, samples: Samples, device):
        sizes.append(len(samples.input_ids))
        if len(samples.input_ids) > 2:
            raise torch.OutOfMemoryError
        return original(self, samples, device)

    monkeypatch.setattr(batched._Run, "measure", small)
    LoaderCache.loaders.clear()
    found = measure_checkpoint(base, SETTINGS, None, MergeOptions(quiet=True))
    assert sizes == [5, 3, 2, 2, 1]
    assert expected.warnings == ()
    (warning,) = found.warnings
    assert warning.startswith(f"{path}: memory ran short for 5 sequences at a time, 2 at a time were measured")
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert a.squared_norms == pytest.approx(b.squared_norms, rel=1e-5)


def test_what_any_of_several_processes_warns_of_is_known_in_all(monkeypatch):
    model = tiny.build(tiny.config("llama"))
    samples = draw_samples(SETTINGS, tiny.VOCAB)
    whole = batched_engine(model, layers_of(model), samples, lambda _n: None)
    others = [((whole[3:], ["short of memory", "too"]), "", ""), ((whole[:0], ["too"]), "", "")]
    monkeypatch.setattr(together, "gather_object", lambda own: [*own, *others])

    class State:
        num_processes = 3

        @contextlib.contextmanager
        def split_between_processes(self, items):
            yield items[:3]

    def engine(*args):
        args[-1]("short of memory")
        return batched_engine(*args[:-1])

    lines = []
    found = shared_engine(State(), engine)(model, layers_of(model), samples, lambda _n: None, None, lines.append)
    assert found.numpy() == pytest.approx(whole.numpy(), rel=1e-5)
    assert lines == ["short of memory", "too"]


def loads(monkeypatch, fits: bool) -> tuple[list[tuple[str, bool, weakref.ref]], list[tuple[str, int]]]:
    """Make a stand-in for an accelerator, the CPU in fact.

    Returns:
        Where models are loaded, whether streamed, the models; and where memory is freed, after how many were loaded.
    """
    loaded, freed = [], []
    original = placement.load_to_run
    wanted = Placement(torch.device("cuda"), spread=False, streamed=False)
    cpu = torch.device("cpu")

    def load(base, dtype, options, where, **keywords):
        assert [ref for *_, ref in loaded if ref() is not None] == []  # two at a time may be one too many
        streamed = where.streamed or (where.device.type == "cuda" and not fits)
        found = original(base, dtype, options, replace(where, device=cpu, streamed=streamed), **keywords)
        loaded.append((where.device.type, streamed, weakref.ref(found.model)))
        return replace(found, placement=replace(where, streamed=streamed))

    monkeypatch.setattr(fisher, "load_to_run", load)
    monkeypatch.setattr(fisher, "_free_memory", lambda where: freed.append((where.device.type, len(loaded))))
    monkeypatch.setattr(placement, "placement", lambda options: wanted)
    monkeypatch.setattr(placement, "running_dtype", lambda dtype, device: torch.float32)
    return loaded, freed


def test_a_model_too_large_for_its_place_is_streamed_and_nothing_is_left_of_it(tmp_path, monkeypatch):
    path = tiny.save(tiny.build(tiny.config("llama")), tmp_path / "m")
    base = open_model(str(path), None, MergeOptions())
    expected = measure_checkpoint(base, SETTINGS, None, MergeOptions(quiet=True))
    loaded, freed = loads(monkeypatch, fits=True)
    original = batched._Run.measure

    def small(self, samples: Samples, device):
        if isinstance(self.weights, ResidentWeights):
            raise torch.OutOfMemoryError
        assert loaded[0][2]() is None  # what didn't do is gone
        return original(self, samples, device)

    monkeypatch.setattr(batched._Run, "measure", small)
    found = measure_checkpoint(base, SETTINGS, None, MergeOptions(quiet=True))
    assert [where[:2] for where in loaded] == [("cuda", False), ("cuda", True)]
    assert loaded[1][2]() is None
    assert freed == [("cuda", 1), ("cuda", 2)]  # between the two, and at the end
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert a.squared_norms == pytest.approx(b.squared_norms, rel=1e-5)


@pytest.mark.parametrize("fits", [True, False])
def test_a_model_that_must_be_in_memory_and_is_too_large_for_the_accelerator(fits, tmp_path, monkeypatch):
    """Whether that is known beforehand or not."""
    path = tiny.save(tiny.build(tiny.config("llama")), tmp_path / "m")
    base = open_model(str(path), None, MergeOptions())
    expected = measure_checkpoint(base, SETTINGS, None, MergeOptions(quiet=True))
    loaded, freed = loads(monkeypatch, fits=fits)

    def unsupported(self, samples: Samples, device):
        raise NotSupportedError

    def reference(*args):
        if loaded[-1][0] == "cuda":
            raise torch.OutOfMemoryError
        return autograd_engine(*args)

    monkeypatch.setattr(batched._Run, "measure", unsupported)
    found = measure_checkpoint(base, SETTINGS, None, MergeOptions(quiet=True), reference=reference)
    assert loaded[-1][:2] == ("cpu", False)
    assert [at for _, at in freed] == [*range(1, len(loaded)), len(loaded)]
    assert (freed[0], freed[-1]) == (("cuda", 1), ("cuda", len(loaded)))
    assert "measured on the CPU" in found.warnings[-1]
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert a.squared_norms == pytest.approx(b.squared_norms, rel=1e-4)


def test_progress_counts_every_layer_of_every_sequence():
    model = tiny.build(tiny.config("llama"))
    steps = []
    batched_engine(model, layers_of(model), draw_samples(SETTINGS, tiny.VOCAB), steps.append)
    assert sum(steps) == 2 * 5 * SETTINGS.samples


def test_a_measurement_leaves_the_model_unpatched():
    model = tiny.build(tiny.config("llama"))
    parameters = dict(model.named_parameters())
    measure_model(model, layers_of(model), SETTINGS, quiet=True)
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]
    assert not [name for name, module in model.named_modules() if module._forward_hooks]
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())
