"""What having the package installed, and using it, leaves as it was: stock methods, the process, models, the disk."""

import inspect
import logging
import os
import pkgutil
import random
import signal
import sys
import threading
import warnings

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from environments import files, make_environment, pip
from mergekit.merge_methods import registered_methods
from merges import config_for

import mergekit_fim
from mergekit_fim.cli import main
from mergekit_fim.config.parameters import FisherSettings
from mergekit_fim.fisher import measure as fisher
from mergekit_fim.fisher.engine import autograd_engine

# Every registered method but ours, on models and parameters that it takes by its own contract.
STOCK = """
import sys
from mergekit.merge_methods import registered_methods
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

base, *tuned, out = sys.argv[1:]
parameters = {"weight": 0.6, "t": 0.3, "density": 0.5, "gamma": 0.1, "epsilon": 0.1}
for method in registered_methods():
    spec, contract = method.spec, method.spec.contract
    print(spec.name, flush=True)
    if spec.name in ("fim_ties", "fim_ta", "fim_kron"):
        continue
    needs_base = contract.base.value == "required"
    count = min(2, (contract.max_inputs or 3) - needs_base)
    names = {parameter.name for parameter in spec.parameters}
    config = {
        "merge_method": spec.name,
        "models": [{"model": model} for model in tuned[:count]],
        "parameters": {name: value for name, value in parameters.items() if name in names},
        "dtype": "float32",
    }
    if needs_base:
        config["base_model"] = base
        config["models"].insert(0, {"model": base})
    options = MergeOptions(quiet=True, copy_tokenizer=False, random_seed=3)
    run_merge(MergeConfiguration.model_validate(config), f"{out}/{spec.name}", options)
assert ("mergekit_fim.merging.methods" in sys.modules) == (spec.name == "fim_kron")
assert "mergekit_fim.prepass.run" not in sys.modules
"""


def test_stock_methods_do_not_change(unhooked, loaded, pair, tmp_path):
    """All of mergekit's methods, with the hook and without it, in two processes: the same bytes of every file."""
    script = tmp_path / "stock.py"
    script.write_text(STOCK)
    names = {}
    for kind, python in (("with", loaded), ("without", unhooked)):
        arguments = [str(script), str(pair.base), str(pair.long), str(pair.third), str(tmp_path / kind)]
        names[kind] = python.run(*arguments).stdout.split()
    assert names["with"] == [*names["without"], "fim_ties", "fim_ta", "fim_kron"]
    assert names["with"] == [method.spec.name for method in registered_methods()]
    found = {k: {p.relative_to(tmp_path / k): p.read_bytes() for p in (tmp_path / k).glob("*/*")} for k in names}
    for content in found.values():
        for path in content:
            if path.name == "README.md":  # mergekit's model card lists the models in any order
                content[path] = b"\n".join(sorted(content[path].splitlines()))
    assert found["with"] == found["without"]
    models = {path.parent.name: content for path, content in found["with"].items() if path.suffix == ".safetensors"}
    assert list(models) != []
    assert set(models) == set(names["without"])
    assert len(set(models.values())) > 12  # real merges: only some come to the same, such as those of DARE's kind


def state() -> dict[str, object]:
    """What a process has only one of."""
    loggers = [logging.getLogger(name) for name in (None, "mergekit", "mergekit_fim", "transformers", "py.warnings")]
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "init": (torch.nn.Linear.__init__, torch.nn.Module.register_parameter, torch.nn.init.kaiming_uniform_),
        "random": (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())),
        "loggers": [(x.level, x.handlers[:], x.filters[:], x.propagate, x.disabled) for x in loggers],
        "logging": (logging.root.manager.disable, logging.raiseExceptions),
        "warnings": (warnings.filters[:], warnings.showwarning),
        "hooks": (sys.excepthook, sys.displayhook, sys.unraisablehook, threading.excepthook, sys.getprofile()),
        "imports": (sys.meta_path[:], sys.path_hooks[:], sys.path[:]),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(s) for s in sorted(signal.valid_signals())],
        "folder": os.getcwd(),
        "limits": sys.getrecursionlimit(),
        # tqdm's, which any use of tqdm starts, is not ours.
        "running": [t.name for t in threading.enumerate() if type(t).__name__ != "TMonitor"],
        "streams": (sys.stdin, sys.stdout, sys.stderr),
    }


def assert_unchanged(before: dict[str, object]) -> None:
    after = state()
    assert [name for name in before if before[name] != after[name]] == []


IMPORTS = """
import logging, os, pkgutil, random, signal, sys, threading, warnings
import numpy as np
import mergekit.merge, mergekit.scripts.run_yaml, matplotlib, torch, transformers, accelerate, tqdm, huggingface_hub

{state}
before = state()
import mergekit_fim
for module in pkgutil.walk_packages(mergekit_fim.__path__, "mergekit_fim."):
    if module.name != "mergekit_fim.__main__":
        __import__(module.name)
after = state()
print([name for name in before if before[name] != after[name]])
hooked = [finder for finder in sys.meta_path if type(finder).__module__ == "mergekit_fim"]
print(len(hooked), [finder for finder in sys.meta_path if finder not in hooked] == before["imports"][0])
"""


def test_importing_all_of_it_changes_nothing_but_the_hook(unhooked, loaded, tmp_path):
    """With the hook switched off there isn't even that; with it, one finder is on `sys.meta_path`, put there once."""
    script = tmp_path / "imports.py"
    script.write_text(IMPORTS.format(state=inspect.getsource(state)))
    off = unhooked.run(str(script)).stdout.splitlines()
    assert off == ["[]", "0 True"]
    on = loaded.run(str(script)).stdout.splitlines()
    assert on == ["[]", "1 False"]  # the finder was there before


@pytest.mark.parametrize("labels", ["inputs", "sampled"])
@pytest.mark.parametrize("command", ["merge", "plan", "fisher"])
def test_a_command_leaves_the_process_as_it_was(command, labels, pair, merge, tmp_path):
    parameters = {"fisher_samples": 2, "fisher_seq_len": 8, "fisher_labels": labels}
    config = config_for(pair, parameters=parameters)
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    merge.ok(config_for(pair, "linear", parameters={"weight": 1.0}), out="stock")  # what mergekit itself sets up
    options = ["-o", str(tmp_path / "f.json"), "--samples", "2", "--seq-len", "8", "--labels", labels]
    # The first run of a kind imports what it needs, other packages' with effects of their own among them.
    for run in range(2):
        before = state()
        if command == "merge":
            merge.ok(config, out=f"out{run}")
            before["environment"]["MERGEKIT_FIM_CACHE"] = os.environ["MERGEKIT_FIM_CACHE"]  # set by `merge`
        else:
            (tmp_path / "c.yml").write_text(str(config))
            arguments = {"plan": ["plan", str(tmp_path / "c.yml")], "fisher": ["fisher", str(pair.base), *options]}
            result = CliRunner().invoke(main, [*arguments[command], "--no-cache"])
            assert result.exit_code == 0, result.output
        assert_unchanged(before)


def test_a_failed_measurement_leaves_the_process_as_it_was(pair, merge, monkeypatch):
    def broken(*_args):
        raise OSError("no such luck")

    merge.ok(config_for(pair), out="first")
    monkeypatch.setattr("mergekit_fim.fisher.batched._Layer.backward", broken)
    before = state()
    _, result = merge(config_for(pair))
    assert str(result.exception) == "no such luck"
    before["environment"]["MERGEKIT_FIM_CACHE"] = os.environ["MERGEKIT_FIM_CACHE"]
    assert_unchanged(before)


def hooks_of(parameter: torch.Tensor) -> list[int]:
    return [len(getattr(parameter, name) or ()) for name in ("_backward_hooks", "_post_accumulate_grad_hooks")]


def fingerprints(model: torch.nn.Module) -> dict[str, object]:
    """All that a measurement might leave on a model."""
    hooks = [name for name in vars(model) if name.endswith("_hooks") or name.endswith("_with_kwargs")]
    return {
        "modules": [
            (name, module.training, sorted(vars(module)), [(h, len(getattr(module, h))) for h in hooks])
            for name, module in model.named_modules()
        ],
        "forward": [vars(module).get("forward") for module in model.modules()],
        "parameters": [
            (name, id(p), p.data_ptr(), p.requires_grad, id(p.grad), *hooks_of(p))
            for name, p in model.named_parameters()
        ],
        "values": [value.clone().tolist() for value in model.state_dict().values()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "buffers": [(name, id(buffer), buffer._version) for name, buffer in model.named_buffers()],
        "config": model.config.to_dict(),
        "padding": [getattr(module, "padding_idx", None) for module in model.modules()],
    }


@pytest.fixture
def used():
    """A model in the middle of being trained, one that the user has put marks of his own on."""
    model = tiny.build(tiny.config("llama"))
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    model.model.layers[3].register_forward_hook(lambda *_args: None)
    original = model.model.layers[2].mlp.forward
    model.model.layers[2].mlp.forward = lambda x: original(x)
    return model


SMALL = FisherSettings(samples=2, seq_len=8)


@pytest.mark.parametrize("engine", [autograd_engine, fisher.batched_engine])
def test_a_model_is_given_back_as_it_was(engine, used):
    torch.manual_seed(7)
    before, process = fingerprints(used), state()
    fisher.measure_model(used, list(used.model.layers), SMALL, engine=engine, quiet=True)
    assert fingerprints(used) == before
    assert_unchanged(process)


POINTS = [
    "torch.nn.Embedding.forward",
    "transformers.models.llama.modeling_llama.LlamaMLP.forward",
    "mergekit_fim.fisher.batched._Run._tail",
    "mergekit_fim.fisher.rules.Recorder._on_gradient",
    "mergekit_fim.fisher.batched._Layer._sequence",
    "mergekit_fim.fisher.batched.squared_norm",
    "mergekit_fim.fisher.engine.squared_norm",
    "mergekit_fim.fisher.engine.sequence_loss",
]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("point", POINTS)
def test_a_model_is_given_back_as_it_was_when_it_goes_wrong(point, error, used, monkeypatch):
    """Wherever it does: at the `nth` call of something that the engine runs, once only for the embedding."""
    engine = autograd_engine if ".engine." in point else fisher.batched_engine
    if point.endswith("_sequence"):  # only without rules
        monkeypatch.setattr("mergekit_fim.fisher.batched.rule_for", lambda _module: None)
    before, process = fingerprints(used), state()
    for nth in (1,) if "Embedding" in point else (1, 2):
        with monkeypatch.context() as patch:
            original, calls = pkgutil.resolve_name(point), []

            def broken(*args, original=original, calls=calls, nth=nth, **options):
                calls.append(1)
                if len(calls) >= nth:
                    raise error("no such luck")
                return original(*args, **options)

            patch.setattr(point, broken)
            with pytest.raises(error, match="no such luck"):
                fisher.measure_model(used, list(used.model.layers), SMALL, engine=engine, quiet=True)
        assert fingerprints(used) == before
        assert_unchanged(process)


def test_uninstalling_leaves_nothing(wheel, tmp_path):
    """The command, the hook, the metadata: pip's own list of files is complete, and all of them go."""
    environment = make_environment(tmp_path / "venv")
    scripts = environment.python.parent
    before, commands = files(environment), set(os.listdir(scripts))
    pip(environment, "install", "--no-deps", "--no-index", "--quiet", str(wheel))
    installed, metadata = files(environment) - before, f"mergekit_fim-{mergekit_fim.__version__}.dist-info"
    tops = {path.split("/")[0] for path in installed}
    assert tops == {"mergekit_fim", "mergekit_fim.pth", "mergekit_fim.start", metadata}
    assert set(os.listdir(scripts)) - commands == {"mergekit-fim"}
    assert environment.run(str(scripts / "mergekit-fim"), "--version").stdout.endswith(f"{mergekit_fim.__version__}\n")
    # Compiled files, which pip didn't write, go as well.
    environment.run("-c", "import mergekit_fim.cli", env={"PYTHONDONTWRITEBYTECODE": ""})
    pip(environment, "uninstall", "--yes", "--quiet", "mergekit-fim")
    assert files(environment) == before
    assert set(os.listdir(scripts)) == commands
    assert not (environment.site_packages / "mergekit_fim").exists()
    query = "import importlib.metadata as m; print([d.name for d in m.distributions() if 'fim' in (d.name or '')])"
    assert environment.run("-S", "-c", query).stdout.strip() == "[]"
