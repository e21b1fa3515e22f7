"""Kronecker factors: against plain hooks and autograd, by name for every architecture, as files, kept, and compared."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
import zoo
from click.testing import CliRunner
from kinds import ADDED, KINDS, configure
from launching import together
from mergekit.options import MergeOptions
from merges import ends_in_one_line
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import mergekit_fim
from mergekit_fim.cli import main
from mergekit_fim.config.parameters import KRON_SAMPLES, KRON_SEQ_LEN, FisherSettings
from mergekit_fim.errors import FimError
from mergekit_fim.fisher import batched
from mergekit_fim.fisher import factors as recording
from mergekit_fim.fisher.engine import NotSupportedError
from mergekit_fim.fisher.factors import record_factors
from mergekit_fim.fisher.loading import Placement
from mergekit_fim.fisher.samples import draw_samples
from mergekit_fim.measurements.factors import FactorsFile
from mergekit_fim.models.identity import identity
from mergekit_fim.models.inputs import open_model
from mergekit_fim.prepass import factors as measuring

SETTINGS = FisherSettings(samples=3, seq_len=8, seed=2)


def recorded(path, settings=SETTINGS, running=torch.float32):
    """What would be written, and the inputs."""
    base = open_model(str(path), None, MergeOptions())
    samples = draw_samples(settings, base.text_config.vocab_size)
    wanted = measuring.settings_on(settings, samples)
    return record_factors(base, identity(base), wanted, samples, None, MergeOptions(quiet=True), running=running)


def all_of(found) -> dict:
    """By name the inputs and whether they are transposed, or for a stack those of each expert."""
    file, inputs = found
    its = {n: [one and (inputs[one.inputs], one.transposed) for one in ls] for n, ls in file.tensors.items()}
    return {name: linears[0] if len(linears) == 1 else linears for name, linears in its.items()}


def naive(path, settings=SETTINGS, experts="eager"):
    """By hooks on a model that transformers loaded: {module: inputs}, sequence by sequence."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation=experts)
    seen: dict = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.register_forward_hook(
                lambda _m, args, _y, name=name: seen.setdefault(name, []).append(args[0].detach().flatten(0, -2))
            )
    with torch.no_grad():
        for ids in draw_samples(settings, model.config.vocab_size).input_ids:
            model(input_ids=ids[None], use_cache=False)
    return {name: torch.cat(rows) for name, rows in seen.items()}, model


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * scale)


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2", "starcoder2"])
def saved(request, tmp_path_factory):
    return tiny.save(tiny.build(tiny.config(request.param)), tmp_path_factory.mktemp("model") / "model")


def test_inputs_are_those_of_plain_hooks(saved, monkeypatch):
    monkeypatch.setattr(batched, "_TOKENS", 16)  # two micro-batches
    found, (wanted, model) = all_of(recorded(saved)), naive(saved)
    layers = {f"{name}.weight" for name in wanted if any(part.isdigit() for part in name.split("."))}
    prefix = "" if set(found) <= layers else "transformer."
    assert {prefix + name for name in found} == layers
    for name, (inputs, transposed) in found.items():
        close(inputs, wanted[(prefix + name).removesuffix(".weight")])
        assert model.get_parameter(prefix + name).shape[0 if transposed else 1] == inputs.shape[1]
        assert transposed is (model.config.model_type == "gpt2")


def test_what_is_given_the_same_shares_it(saved):
    found = all_of(recorded(saved))
    names = [name for name in found if any(part in name for part in ("k_proj", "v_proj", "up_proj"))]
    assert len({id(inputs) for inputs, _ in found.values()}) == len(found) - len(names)


def test_resident_is_as_streamed(saved, monkeypatch):
    streamed = all_of(recorded(saved))
    on_cpu = Placement(torch.device("cpu"), spread=False, streamed=False)
    monkeypatch.setattr("mergekit_fim.fisher.loading.placement", lambda options: on_cpu)
    resident = all_of(recorded(saved))
    original, calls = recording.watch_layers, []

    def unsupported(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise NotSupportedError
        return original(*args, **options)

    monkeypatch.setattr(recording, "watch_layers", unsupported)
    whole = recorded(saved)
    assert "can't be run layer by layer" in whole[0].warnings[0]
    for other in (resident, all_of(whole)):
        assert other.keys() == streamed.keys()
        for name, (inputs, transposed) in streamed.items():
            close(other[name][0], inputs)
            assert other[name][1] is transposed


def test_a_model_that_cannot_be_run_ends_in_one_line(pair, monkeypatch):
    def broken(*_args, **_options):
        raise ValueError("no such thing")

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", broken)
    with pytest.raises(
        FimError, match=r"can't be run on random tokens \(no such thing\); check its config.json"
    ) as caught:
        recorded(pair.base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_every_expert_has_the_tokens_that_it_is_given(kind, tmp_path):
    """By transformers' own choice of experts."""
    path = tiny.save(tiny.build(tiny.config(kind)), tmp_path / "model")
    found = all_of(recorded(path))
    _, model = naive(path)
    chosen: dict[int, list] = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(
            lambda _m, args, kwargs, index=index: chosen.setdefault(index, []).extend([*args, *kwargs.values()][:2]),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(input_ids=draw_samples(SETTINGS, tiny.VOCAB).input_ids, use_cache=False)
    for index, (hidden, choice) in chosen.items():
        for name in ("gate_up_proj", "down_proj"):
            key = f"model.layers.{index}.mlp.experts.{name}"
            weight = model.get_parameter(key)
            assert len(found[key]) == len(weight) == 4
            for number, linear in enumerate(found[key]):
                tokens = (choice == number).nonzero()[:, 0]
                if not len(tokens):
                    assert linear is None
                    continue
                inputs, transposed = linear
                assert len(inputs) == len(tokens)
                assert transposed is (kind == "gpt_oss")
                assert inputs.shape[1] == weight.shape[1 if transposed else 2]
                if name == "gate_up_proj":
                    rows = hidden.flatten(0, -2)[tokens]
                    close(inputs.T @ inputs, rows.T @ rows)  # in whichever order it is given them
    assert not [name for name in found if "router" in name or ".gate." in name]


def test_single_experts_of_a_checkpoint_have_the_factors_of_their_part(tmp_path):
    """deepseek_v3's are one stack in memory: a checkpoint may hold either, and its names are mergekit's."""
    model = zoo.build("deepseek_v3")
    single = tiny.save(model, tmp_path / "single")
    one = tiny.save(model, tmp_path / "one")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, one / "model.safetensors")
    parts, stacks = all_of(recorded(single)), all_of(recorded(one))
    prefix = "model.layers.1.mlp.experts"
    for number in range(4):
        gate, up, down = (parts.get(f"{prefix}.{number}.{name}_proj.weight") for name in ("gate", "up", "down"))
        both, last = (stacks[f"{prefix}.{name}"][number] for name in ("gate_up_proj", "down_proj"))
        if both is None:
            assert (gate, up, down, last) == (None,) * 4
            continue
        assert gate[0] is up[0]
        close(gate[0], both[0])
        close(down[0], last[0])
        assert not any(transposed for _, transposed in (gate, up, down))


def test_experts_that_no_token_reaches_are_named(tmp_path):
    model = zoo.build("deepseek_v3")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias[2] = -100
    single, _ = recorded(tiny.save(model, tmp_path / "single"), FisherSettings(8, 8))
    prefix = "model.layers.1.mlp.experts"
    assert sorted(single.not_reached) == [f"{prefix}.2.{name}_proj.weight" for name in ("down", "gate", "up")]
    assert f"{prefix}.1.up_proj.weight" in single.tensors
    one = tiny.save(model, tmp_path / "one")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, one / "model.safetensors")
    stacked, _ = recorded(one, FisherSettings(8, 8))
    assert sorted(stacked.not_reached) == [f"{prefix}.{name}[2]" for name in ("down_proj", "gate_up_proj")]
    assert [one is None for one in stacked.tensors[f"{prefix}.down_proj"]] == [False, False, True, False]


# What has no factors of the matrices in decoder layers, by the last parts of its name: routers, convolutions and norms;
# biases of stacks and of attention; what is multiplied from the left (Mamba's step), and XLNet's sums by `einsum`.
WITHOUT = {
    *("gate.weight", "router.weight", "gate.wg.weight", "router.gate.weight", "router.layer.weight"),
    *("conv1d.weight", "conv.weight", "q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"),
    *("q_norm.weight", "k_norm.weight", "mixer.A_log", "mamba.A_log", "self_attn.A_log"),
    *("experts.gate_up_proj_bias", "experts.down_proj_bias", "moe_statics.e_score_correction_bias"),
    *("mixer.dt_proj.weight", "mamba.dt_proj.weight"),
    *(f"rel_attn.{name}" for name in ("k", "o", "q", "r", "v", "r_r_bias", "r_w_bias", "r_s_bias", "seg_embed")),
}


@pytest.mark.parametrize("name", [*KINDS, *ADDED])
def test_the_matrices_of_every_architecture_have_factors(name, tmp_path):
    """By the names and shapes of the checkpoint, or of the stacks that mergekit makes of its experts."""
    model = tiny.build(configure(KINDS[name].kind, KINDS[name].changes)) if name in KINDS else zoo.build(name)
    path = tiny.save(model, tmp_path / "model")
    base = open_model(str(path), None, MergeOptions())
    file, inputs = recorded(path, FisherSettings(samples=2, seq_len=8))
    for layer in base.layout.layers:
        for tensor in layer.tensors:
            shape = base.load(tensor, None).shape if tensor.name not in base.absent else ()
            if len(shape) < 2:
                assert tensor.name not in file.tensors
            elif tensor.name in file.tensors:
                linears = file.tensors[tensor.name]
                assert len(linears) == (1 if len(shape) == 2 else shape[0])
                for linear in (one for one in linears if one is not None):
                    rows = inputs[linear.inputs]
                    assert rows.shape[1] == shape[-2 if linear.transposed else -1], tensor.name
                    assert rows.isfinite().all()
                    assert linear.layer == layer.index
            elif tensor.name not in file.not_reached:
                assert tensor.name in file.without
                assert any(tensor.name.endswith(f".{end}") for end in WITHOUT), tensor.name


class Odd(nn.Module):
    """Matrices that are used in other ways."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in ("plain", "again", "scaled", "copied", "rows", "idle"):
            setattr(self, name, nn.Parameter(torch.randn(6, 4, generator=generator)))
        self.stack = nn.Parameter(torch.randn(3, 4, 5, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.plain) + nn.functional.linear(x, self.again)
        y = y + nn.functional.linear(2 * x, self.again)
        y = y + nn.functional.linear(x, self.scaled * 2) + nn.functional.linear(x, self.copied.double().float())
        y = y + x @ self.rows[:3].T.repeat(1, 2)
        each = torch.stack([x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1)), 3 * x.flatten(0, 1)])
        return y + torch.bmm(each, self.stack).sum()


def test_what_is_used_otherwise_has_no_factors():
    odd, x = Odd(), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    watch = recording._Watch()
    with torch.no_grad(), watch(0, odd):
        odd(x)
    rows = x.flatten(0, 1)
    uses = {key[1:]: torch.cat([inputs for inputs, _ in its]) for key, its in watch.uses.items()}
    assert {name for _, name in watch.others} == {"scaled", "copied", "rows"}
    assert uses.keys() == {("plain", None), ("again", None), ("stack", 0), ("stack", 2)}
    torch.testing.assert_close(uses["plain", None], rows)
    torch.testing.assert_close(uses["again", None], torch.cat([rows, 2 * rows]))
    torch.testing.assert_close(uses["stack", 2], 3 * rows)


# Files, and what is kept


def measured(path, settings=SETTINGS, **more):
    options = MergeOptions(quiet=True)
    opener = lambda: open_model(str(path), None, options)  # noqa: E731
    return measuring.measured_factors(opener, settings, "float32", options, **more)


@pytest.fixture
def counted(monkeypatch):
    calls = []
    original = measuring.record_factors
    monkeypatch.setattr(measuring, "record_factors", lambda *a, **k: calls.append(a[0]) or original(*a, **k))
    return calls


def test_what_is_written_is_read(pair, tmp_path):
    file, (found, inputs) = measured(pair.base), recorded(pair.base)
    assert file.model.id == str(pair.base)
    assert (file.settings.samples, file.settings.dtype) == (3, "float32")
    assert file.tensors == found.tensors
    assert "lm_head.weight" not in file.tensors
    assert load_file(file.path).keys() == inputs.keys()
    for name, rows in inputs.items():
        assert torch.equal(file.inputs(name), rows)
    assert len(inputs) == 4 * 5
    assert file.size == Path(file.path).stat().st_size > sum(rows.nbytes for rows in inputs.values())
    with pytest.raises(FimError, match=r"none/f: can't be written \(.*No such file"):
        found.write(str(tmp_path / "none" / "f"), inputs)


def test_stacks_are_written_and_read(tmp_path):
    path = tiny.save(tiny.build(tiny.config("mixtral")), tmp_path / "model")
    settings = FisherSettings(1, 2)
    file, (found, inputs) = measured(path, settings), recorded(path, settings)
    name = "model.layers.0.mlp.experts.down_proj"
    assert file.tensors == found.tensors
    for linear in (one for one in file.tensors[name] if one is not None):
        assert torch.equal(file.inputs(linear.inputs), inputs[linear.inputs])
    assert f"{name}[" in " ".join(file.not_reached)  # two tokens reach no more than four experts of four


def test_what_was_kept_is_used_and_whatever_changes_it_is_recorded_anew(pair, cache_folder, counted, tmp_path):
    first = measured(pair.base)
    assert first.origin == ""
    again = measured(pair.base)
    assert again.origin == f"kept from an earlier recording: {first.path}"
    measured(pair.base, FisherSettings(3, 8, 2, "sampled"))  # nothing is predicted
    assert len(counted) == 1
    shutil.copytree(pair.base, tmp_path / "copy")
    assert measured(tmp_path / "copy").origin
    assert len(counted) == 1
    measured(pair.long)
    measured(pair.base, FisherSettings(3, 8, 3))
    measured(pair.base, vocab_size=50)
    assert len(counted) == 4
    assert len(list(cache_folder.iterdir())) == 4
    other = measured(pair.base, cache=False)
    assert len(counted) == 5
    assert not other.path.startswith(str(cache_folder))
    assert torch.equal(other.inputs("inputs.0"), first.inputs("inputs.0"))


@pytest.mark.parametrize("kind", ["truncated", "flipped", "of another model"])
def test_what_was_kept_and_cannot_be_trusted_is_recorded_anew(kind, pair, counted, caplog):
    path, other = (Path(measured(model).path) for model in (pair.base, pair.long))
    content = path.read_bytes()
    bad = {"truncated": content[:-5], "flipped": content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]}
    bad["of another model"] = other.read_bytes()
    path.write_bytes(bad[kind])
    assert measured(pair.base).origin == ""
    assert "measured anew" in caplog.text
    assert path.read_bytes() == content
    assert len(counted) == 3


def test_a_cache_that_cannot_be_written_costs_no_factors(pair, cache_folder, caplog):
    cache_folder.rmdir()
    cache_folder.write_text("")
    assert measured(pair.base).tensors
    assert "not kept for the next merge" in caplog.text


def changed(path, target, change=lambda content: None, tensors=None):
    """A file with other content or tensors, and (where its parts are not what is wrong) sealed again."""
    from mergekit_fim.measurements.factors import FORMAT, _checksum

    tensors = load_file(path) if tensors is None else tensors
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()[FORMAT])
    del content["checksum"]
    change(content)
    content["checksum"] = _checksum(content, tensors, tensors.__getitem__)
    save_file(tensors, target, {FORMAT: json.dumps(content)})
    return target


def test_damaged_files_are_refused_in_one_line(pair, tmp_path):
    path = measured(pair.base).path
    content, target = Path(path).read_bytes(), tmp_path / "f.safetensors"
    tensors = load_file(path)
    (tmp_path / "text").write_text("{}")
    (tmp_path / "truncated").write_bytes(content[:-1])
    (tmp_path / "flipped").write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    edited = content.replace(b'\\"samples\\": 3', b'\\"samples\\": 4')
    assert edited != content
    (tmp_path / "edited").write_bytes(edited)
    name = next(iter(tensors))
    flat = tensors | {name: tensors[name].flatten()}
    nan = tensors | {name: torch.full_like(tensors[name], torch.nan)}
    fewer = {key: tensor for key, tensor in tensors.items() if key != name}
    cases = {
        "nothing": (tmp_path / "nothing", "No such file"),
        "text": (tmp_path / "text", "expected a file of factors"),
        "folder": (tmp_path, "expected a file of factors"),
        "truncated": (tmp_path / "truncated", "expected a file of factors"),
        "flipped": (tmp_path / "flipped", "changed after it was written"),
        "edited": (tmp_path / "edited", "changed after it was written"),
        "model": (pair.base / "model.safetensors", "expected factors (format mergekit-fim/factors), found"),
        "newer": (lambda m: m.update(version=2), "expected factors of version 1, found 2"),
        "odd": (lambda m: m.update(version="x"), "expected a file of factors"),
        "no settings": (lambda m: m.pop("settings"), "settings Field required"),
        "odd tensors": (lambda m: m.update(tensors="{"), "tensors Input should be"),
        "a tensor less": (fewer, "expected a file of factors"),
        "one axis": (flat, "expected inputs of two axes, token and feature"),
        "few": (lambda m: m["settings"].update(samples=0), "`samples` must be"),
        "not finite": (nan, "expected finite numbers, found others in"),
    }
    for case, (what, words) in cases.items():
        if callable(what) and not isinstance(what, type(tmp_path)):
            what = changed(path, target, what)
        elif isinstance(what, dict):
            what = changed(path, target, tensors=what)
        with pytest.raises(FimError) as caught:
            FactorsFile.open(what)
        message = str(caught.value)
        assert message.startswith(str(what)), case
        assert words in message, case
        assert message.isprintable(), case


def test_a_value_that_is_not_finite_is_named(tmp_path, cache_folder):
    model = tiny.build(tiny.config("llama"))
    model.model.layers[2].mlp.up_proj.weight.data[3, 5] = torch.nan
    path = tiny.save(model, tmp_path / "model")
    with pytest.raises(FimError, match=r"mlp.down_proj.weight of decoder layer 2 .* isn't finite") as caught:
        measured(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert list(cache_folder.iterdir()) == []


def test_float16_that_overflows_is_recorded_in_a_wider_type(tmp_path):
    model = tiny.build(tiny.config("llama"))
    model.model.layers[2].mlp.up_proj.weight.data.mul_(3e4)
    path = tiny.save(model, tmp_path / "model", torch.float16)
    file, inputs = recorded(path, running=torch.float16)
    assert file.settings.dtype == "float32"
    assert "overflows in float16" in file.warnings[0]
    assert all(rows.dtype is torch.float32 for rows in inputs.values())


def test_memory_that_runs_short_halves_the_micro_batches(pair, monkeypatch):
    wanted = all_of(recorded(pair.base))
    most = [2]
    original = recording._Watch._copy

    def copy(self, x):
        if len(x) > most[0]:
            raise torch.OutOfMemoryError
        return original(self, x)

    monkeypatch.setattr(recording._Watch, "_copy", copy)
    found = recorded(pair.base)
    assert f"{pair.base}: memory ran short for 3 sequences at a time, 2 at a time" in found[0].warnings[0]
    for name, (inputs, _) in all_of(found).items():
        close(inputs, wanted[name][0])
    most[0] = 0
    with pytest.raises(FimError, match="cpu has too little memory") as caught:
        recorded(pair.base)
    assert "\n" not in str(caught.value)


# Commands


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_commands_record_and_compare(pair, tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for model, file in zip((pair.base, pair.long), files, strict=True):
        result = run("fisher", model, "--factors", "-o", file, "--samples", 2, "--seq-len", 8)
        assert result.exit_code == 0, result.output
        assert f"{file}: factors of 35 tensors of {model}, in float32, " in result.output
    assert "kept from" in run("fisher", pair.base, "--factors", "-o", files[0], "--samples", 2, "--seq-len", 8).output
    result = run("compare", *files)
    assert result.exit_code == 0, result.output
    assert len([line for line in result.output.splitlines() if line.strip()[:1].isdigit()]) == 5
    found = mergekit_fim.compare_factors(*map(FactorsFile.open, files))
    assert sorted(found) == list(range(5))
    name, cosine = found[3][0]
    sides = [FactorsFile.open(file) for file in files]
    first, second = (side.inputs(side.tensors[name][0].inputs).numpy().astype(np.float64) for side in sides)
    first, second = first.T @ first, second.T @ second
    wanted = np.sum(first * second) / np.linalg.norm(first) / np.linalg.norm(second)
    assert cosine == pytest.approx(wanted, rel=1e-4)
    same = mergekit_fim.compare_factors(sides[0], sides[0])
    assert all(value == pytest.approx(1) for its in same.values() for _, value in its)


def test_the_command_has_the_default_of_fim_kron(pair, tmp_path):
    file = tmp_path / "factors.safetensors"
    result = run("fisher", pair.base, "--factors", "-o", file)
    assert result.exit_code == 0, result.output
    its = FactorsFile.open(file).settings
    assert (its.samples, its.seq_len) == (KRON_SAMPLES, KRON_SEQ_LEN)


def test_the_tokens_of_the_smallest_vocabulary(pair, tmp_path):
    """What a merge of models of different vocabularies wants of each of them."""
    file, few = tmp_path / "factors.safetensors", ("--samples", 2, "--seq-len", 8, "-q")
    result = run("fisher", pair.base, "--factors", "-o", file, "--vocab-size", 20, *few)
    assert result.exit_code == 0, result.output
    settings = FisherSettings(samples=2, seq_len=8)
    plain = mergekit_fim.measure_factors(pair.base, tmp_path / "plain.safetensors", settings)
    again = mergekit_fim.measure_factors(pair.base, tmp_path / "again.safetensors", settings, vocab_size=20)
    assert FactorsFile.open(file).settings.tokens == again.settings.tokens != plain.settings.tokens
    for options, words in (
        (("--factors", "--vocab-size", 10**6), "expected tokens of its vocabulary"),
        (("--vocab-size", 20), "--vocab-size goes with --factors"),
    ):
        result = run("fisher", pair.base, "-o", tmp_path / "none", *options, *few)
        assert result.exit_code != 0
        assert words in result.output.replace("\n", " ")
        assert not (tmp_path / "none").exists()
    with pytest.raises(FimError, match="vocab_size: expected a whole number of at least 1"):
        mergekit_fim.measure_factors(pair.base, tmp_path / "none", settings, vocab_size=0)


def test_what_cannot_be_compared_ends_in_one_line(pair, tmp_path):
    options = ("--samples", 2, "--seq-len", 8, "-q")
    small = tiny.save(tiny.build(tiny.config("gpt2")), tmp_path / "gpt2")
    for name, model, more in (
        ("inputs", pair.base, ["--factors"]),
        ("other", small, ["--factors"]),
        ("fisher", pair.base, []),
    ):
        assert run("fisher", model, "-o", tmp_path / name, *more, *options).exit_code == 0
    cases = {
        ("inputs", "other"): ["expected factors of tensors of one shape", str(tmp_path / "other")],
        ("inputs", "fisher"): [str(tmp_path / "fisher"), "expected a file of factors"],
        ("fisher", "inputs"): [str(tmp_path / "fisher"), "expected a file of factors"],
        ("inputs", "nothing"): [str(tmp_path / "nothing"), "No such file"],
    }
    for files, words in cases.items():
        ends_in_one_line(run("compare", *(tmp_path / file for file in files)), *words)


def test_in_python(pair, tmp_path):
    file = mergekit_fim.measure_factors(pair.base, tmp_path / "f.safetensors", SETTINGS, dtype="float32", cache=False)
    assert file.tensors == FactorsFile.open(tmp_path / "f.safetensors").tensors


RECORDING = """
import mergekit_fim.prepass.factors as measuring
original = measuring.record_factors
def record(*args, **kwargs):
    print("recorded")
    return original(*args, **kwargs)
measuring.record_factors = record
"""


@pytest.mark.slow
def test_of_several_processes_the_main_one_records(pair, warm, tmp_path):
    options = ("--factors", "--no-cache", "--samples", "3", "--seq-len", "8", "--dtype", "float32")
    arguments = ["fisher", str(pair.base), "-o", str(tmp_path / "f.safetensors"), *options]
    first, other = together(warm, 2, *arguments, code=RECORDING)
    assert (first.status, other.status) == (0, 0), (first, other)
    assert first.stdout.startswith("recorded\n")
    assert "Recording factors of" in first.stderr
    assert (other.stdout, other.stderr) == ("", "")
    assert FactorsFile.open(tmp_path / "f.safetensors").tensors == measured(pair.base).tensors
