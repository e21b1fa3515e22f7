"""The Fisher engine against a deliberately naive computation, and by its meaning."""

import pytest
import reference
import tiny
import torch
from mergekit.options import MergeOptions

from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.errors import FimError
from mergekit_fim.fisher.batched import batched_engine
from mergekit_fim.fisher.engine import autograd_engine
from mergekit_fim.fisher.loading import Placement, placement, running_dtype
from mergekit_fim.fisher.measure import measure_model
from mergekit_fim.fisher.samples import Samples, draw_samples, sequence_loss

SETTINGS = FisherSettings(samples=3, seq_len=16, seed=5)


def layers_of(model):
    backbone = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    return list(backbone)


@pytest.mark.parametrize("engine", [autograd_engine, batched_engine])
@pytest.mark.parametrize("labels", ["inputs", "sampled"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "mixtral"])
def test_equals_naive_autograd(kind, labels, engine, tmp_path):
    model = tiny.build(tiny.config(kind))
    path = tiny.save(model, tmp_path / "model")
    settings = FisherSettings(3, 16, 5, labels)
    found = measure_model(model, layers_of(model), settings, engine=engine, quiet=True)
    expected = reference.fisher(path, 3, 16, 5, uniforms=labels == "sampled")
    assert len(found.layers) == len(expected) == 5
    for layer, (parameters, squared_norms) in zip(found.layers, expected, strict=True):
        assert layer.parameters == parameters
        assert layer.squared_norms == pytest.approx(squared_norms, rel=2e-5)
        mean = sum(squared_norms) / 3
        assert layer.fisher == pytest.approx(mean / parameters, rel=2e-5)
        variance = sum((s - mean) ** 2 for s in squared_norms) / 2
        assert layer.stderr == pytest.approx((variance / 3) ** 0.5 / parameters, rel=1e-4)
    if labels == "sampled":
        inputs = measure_model(model, layers_of(model), SETTINGS, quiet=True)
        assert inputs.layers[0].squared_norms != found.layers[0].squared_norms


def test_bfloat16_gradients_are_summed_in_higher_precision():
    model = tiny.build(tiny.config("qwen2", hidden_size=64, intermediate_size=512)).to(torch.bfloat16)
    found = measure_model(model, layers_of(model), SETTINGS, engine=autograd_engine, quiet=True)
    for n, ids in enumerate(draw_samples(SETTINGS, tiny.VOCAB).input_ids):
        model.zero_grad()
        sequence_loss(model(input_ids=ids[None], use_cache=False).logits[0], ids, None).backward()
        for layer, measured in zip(layers_of(model), found.layers, strict=True):
            exact = sum(float(p.grad.double().square().sum()) for p in layer.parameters())
            assert measured.squared_norms[n] == pytest.approx(exact, rel=1e-6)


def test_the_model_is_left_as_it_was():
    model = tiny.build(tiny.config("llama")).train()
    frozen = next(model.parameters()).requires_grad_(False)
    kept = model.model.norm.weight
    kept.grad = torch.ones_like(kept)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    measure_model(model, layers_of(model), SETTINGS, quiet=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert all(p.grad is None for p in model.parameters() if p is not kept)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_are_freed_as_they_arrive():
    model = tiny.build(tiny.config("llama"))
    alive = []

    def look(_parameter):
        alive.append(sum(p.grad is not None for p in model.parameters()))

    handles = [p.register_post_accumulate_grad_hook(look) for p in model.model.layers.parameters()]
    measure_model(model, layers_of(model), SETTINGS, engine=autograd_engine, quiet=True)
    for handle in handles:
        handle.remove()
    assert len(alive) == SETTINGS.samples * len(handles)
    assert max(alive) == 1


def test_tokens_follow_from_the_settings_alone():
    torch.manual_seed(1)
    first = draw_samples(FisherSettings(labels="sampled"), 1000)
    torch.manual_seed(2)
    second = draw_samples(FisherSettings(labels="sampled"), 1000)
    assert torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(first.uniforms, second.uniforms)
    assert torch.equal(first.input_ids, draw_samples(FisherSettings(), 1000).input_ids)
    expected = torch.randint(0, 1000, (8, 64), generator=torch.Generator("cpu").manual_seed(0))
    assert torch.equal(first.input_ids, expected)


def test_sampled_labels_follow_the_models_distribution():
    logits = torch.log(torch.tensor([0.5, 0.2, 0.3])).repeat(4001, 1)
    ids = torch.zeros(4001, dtype=torch.long)
    uniforms = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entropy = -(0.5 * torch.tensor(0.5).log() + 0.2 * torch.tensor(0.2).log() + 0.3 * torch.tensor(0.3).log())
    assert float(sequence_loss(logits, ids, uniforms)) == pytest.approx(float(entropy), rel=0.02)
    edge = torch.full((4000,), 1 - 1e-16, dtype=torch.float64)
    assert float(sequence_loss(logits, ids, edge)) == pytest.approx(-float(torch.tensor(0.3).log()), rel=1e-5)


def test_fisher_is_the_curvature_of_the_divergence():
    """KL(θ, θ+δ) ≈ ½ δᵀFδ for a small δ, and the engine with sampled labels estimates the trace of that same F."""
    model = tiny.build(tiny.config("llama", num_hidden_layers=2), spread=False).double()
    projection = model.model.layers[1].mlp.up_proj
    ids = draw_samples(FisherSettings(samples=1, seq_len=8), tiny.VOCAB).input_ids
    torch.manual_seed(0)
    delta = 1e-3 * torch.randn_like(projection.weight)

    # F of the sequence's summed log-likelihood, exactly: the labels of every position enumerated.
    log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    quadratic = trace = 0.0
    for position in log_p:
        for entry in position:
            (gradient,) = torch.autograd.grad(entry, projection.weight, retain_graph=True)
            probability = float(entry.detach().exp())
            quadratic += probability * float((gradient * delta).sum().detach()) ** 2
            trace += probability * float(gradient.square().sum())
    with torch.no_grad():
        projection.weight.add_(delta)
        moved = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        projection.weight.sub_(delta)
    divergence = float((log_p.exp() * (log_p - moved)).sum().detach())
    assert divergence == pytest.approx(quadratic / 2, rel=0.01)

    # The mean over positions instead of the sum divides F by the square of their number.
    uniforms = torch.rand((600, 7), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model.requires_grad_(False)
    projection.requires_grad_(True)
    norms = autograd_engine(model, [projection], Samples(ids.repeat(600, 1), uniforms), lambda _n: None)
    error = float(norms.std()) / 600**0.5
    assert abs(float(norms.mean()) - trace / 49) < 4 * error
    assert error < 0.05 * trace / 49


def test_a_value_that_is_not_finite_names_the_layer():
    model = tiny.build(tiny.config("llama"))
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(FimError, match="decoder layer 0 isn't finite"):
        measure_model(model, layers_of(model), SETTINGS, quiet=True)


def test_sixteen_bits_only_where_the_cpu_multiplies_them_much_faster(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    seconds = {torch.float32: 3.0, torch.bfloat16: 1.0, torch.float16: 2.5}
    monkeypatch.setattr("mergekit_fim.fisher.loading._seconds", seconds.__getitem__)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert running_dtype(torch.bfloat16, cpu) is torch.bfloat16
    assert running_dtype(torch.float16, cpu) is torch.float32
    assert running_dtype(torch.float64, cpu) is torch.float64
    assert running_dtype(torch.float16, cuda) is torch.float16


def test_the_place_follows_the_options(monkeypatch):
    cpu, cuda, multi = MergeOptions(), MergeOptions(device="cuda:1"), MergeOptions(multi_gpu=True)
    assert placement(cpu) == Placement(torch.device("cpu"), spread=False, streamed=True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    with pytest.raises(FimError, match="--device cuda:1 asks for an accelerator"):
        placement(cuda)
    with pytest.raises(FimError, match="--multi-gpu asks for an accelerator"):
        placement(multi)  # mergekit leaves its device at "cpu"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert placement(cpu) == Placement(torch.device("cpu"), spread=False, streamed=True)  # even where a GPU exists
    assert placement(cuda) == Placement(torch.device("cuda:1"), spread=False, streamed=False)
    assert placement(multi) == Placement(torch.device("cuda"), spread=True, streamed=False)
    with pytest.raises(FimError, match="--device cuda:2: torch sees 2 accelerators"):
        placement(MergeOptions(device="cuda:2"))
    for name in ("meta", "xpu", "mps"):
        with pytest.raises(FimError, match=f"--device {name} asks for an accelerator, but torch sees cuda"):
            placement(MergeOptions(device=name))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps"))
    with pytest.raises(FimError, match="--device mps: mps has no float64"):
        placement(MergeOptions(device="mps"))
