"""The layout holds what it says: who may import whom, what stays light, and what of mergekit isn't public."""

import ast
import functools
import importlib
import re
import subprocess
import sys

import pytest
from environments import ROOT
from merges import config_for, ends_in_one_line

PACKAGE = ROOT / "mergekit_fim"
# Each may import what stands below it, and itself. Those of one line don't know one another.
FLOORS = [
    {"__main__"},
    {"api", "cli"},
    {"evaluate.sweep"},
    {"evaluate.conclusion"},
    {"evaluate.one_run"},
    {"evaluate.models", "evaluate.wanted"},
    {"evaluate.runs", "evaluate.answers", "evaluate.results"},
    {"evaluate.problems", "evaluate.folder", "evaluate.front"},
    {"evaluate.records"},
    {"hook", "tools"},
    {"report"},
    {"prepass"},
    {"processes"},
    {"fisher", "merging"},
    {"models"},
    {"measurements"},
    {"config"},
    {"files"},
    {"coefficients", "norms", "text", "errors"},
]
# Records, and reading and comparing them: no part of these may need a machine that has torch.
LIGHT = ("mergekit_fim.measurements.compare", "mergekit_fim.measurements.store", "mergekit_fim.report.figure")
HEAVY = ("torch", "accelerate", "transformers", "mergekit", "mergekit_fim.fisher", "mergekit_fim.models")


@functools.cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.Module) -> set[str]:
    """Everything that a module imports, wherever in it, by its whole name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported(tree: ast.Module) -> set[str]:
    """The modules of the package that a module imports, or imports something from."""
    names = {name.removeprefix("mergekit_fim.") for name in imports(tree) if name.startswith("mergekit_fim.")}
    names -= {"__version__", "install"}
    return {name if name in modules() else name.rpartition(".")[0] for name in names}


def place(module: str) -> tuple[int, str]:
    """The floor of a module, from the top, and the room: the folder, or what is named for itself."""
    for floor, rooms in enumerate(FLOORS):
        for room in rooms:
            if module == room or module.startswith(f"{room}."):
                return floor, room
    raise AssertionError(f"{module} has no place in the house")


@pytest.mark.parametrize("module", [name for name in modules() if name != "__init__"])
def test_imports_go_down(module):
    tree = modules()[module]
    if PACKAGE.joinpath(*module.split(".")).is_dir():
        assert tree.body == []  # importing a folder imports nothing
        return
    floor, room = place(module)
    for other in imported(tree):
        below, next_door = place(other)
        assert below > floor or next_door == room, f"{module} ({room}) imports {other}, which isn't below it"


def test_tests_mirror_the_package():
    """A folder of tests for each room; no test module is imported, and what several use is in `helpers`."""
    tests = ROOT / "tests"
    folders = {str(path.parent.relative_to(tests)) for path in tests.rglob("test_*.py")} - {"."}
    rooms = {str(path.parent.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert folders <= rooms | {"benchmarks"}
    for path in tests.rglob("*.py"):
        found = imports(ast.parse(path.read_text(encoding="utf-8")))
        assert not [
            name for name in found if name.split(".")[0] in ("conftest", "tests") or name.startswith("test_")
        ], path


def test_functions_fit_on_a_screen():
    """The reference engine alone is longer: it follows the paper from top to bottom."""
    long = {
        node.name
        for tree in modules().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    }
    assert long == {"autograd_engine"}


def test_no_circle_within_a_room():
    graph = {name: imported(tree) - {name} for name, tree in modules().items() if name != "__init__"}
    while graph:
        free = {name for name, others in graph.items() if not others & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in free}


def test_measurements_are_read_and_compared_without_torch(tmp_path):
    code = (
        "import sys, mergekit_fim\n"
        f"import {', '.join(LIGHT)}\n"
        "from mergekit_fim.cli import main\n"
        "settings = mergekit_fim.FisherSettings(samples=2)\n"
        "from mergekit_fim.measurements.record import FisherMeasurement, LayerFisher, ModelIdentity\n"
        "layers = tuple(LayerFisher(i, 3, (1.0 + i, 2.0)) for i in range(3))\n"
        "fisher = FisherMeasurement(9, 'float32', settings, layers)\n"
        "made = mergekit_fim.Measurement.of(fisher, ModelIdentity('m', None, None, 3, 9, 'a-b'))\n"
        "mergekit_fim.write_measurement(made, 'a.json')\n"
        "assert mergekit_fim.read_measurement('a.json') == made\n"
        "scores = mergekit_fim.importance_scores([x.fisher for x in layers], [1.0] * 3)\n"
        "assert len(mergekit_fim.merge_coefficients(scores, mergekit_fim.Mapping())) == 3\n"
        "main(['compare', 'a.json', 'a.json'], standalone_mode=False)\n"
        f"print([name for name in sys.modules if name in {HEAVY!r} or name.startswith({HEAVY[-2:]!r})])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Spearman 1.000" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def private_parts() -> set[str]:
    """What the package uses of mergekit by names that begin with an underscore, or by changing it."""
    found = set()
    for name, tree in modules().items():
        aliases = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mergekit"
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mergekit":
                found |= {f"{name}: {alias.name}" for alias in node.names if alias.name.startswith("_")}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                if node.attr.startswith("_") or isinstance(node.ctx, ast.Store):
                    found.add(f"{name}: {node.attr}")
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr"):
                target, attribute = node.args[:2]
                if isinstance(target, ast.Name) and target.id in aliases and isinstance(attribute, ast.Constant):
                    found |= {f"{name}: {attribute.value}"} if str(attribute.value).startswith("_") else set()
    return found


def test_the_private_parts_of_mergekit_are_those_that_the_hook_lists():
    page = ast.get_docstring(modules()["hook.planner"]) or ""
    listed = set(re.findall(r"`(?:mergekit\.merge|MergePlanner|MultiGPUExecutor)?\.(\w+)`", page))
    assert listed == {"plan_to_disk", "run_merge", "__init__", "_model_out_config"}
    assert private_parts() == {
        "hook.run_merge: run_merge",
        "merging.executor: __init__",
        "tools.plan: _model_out_config",
    }
    source = (PACKAGE / "hook" / "planner.py").read_text(encoding="utf-8")
    assert set(re.findall(r"planner\.(\w+) = \1$", source, re.M)) == {"plan_to_disk"}


def test_a_mergekit_without_the_private_part_is_refused(pair, monkeypatch):
    from mergekit import merge

    import mergekit_fim

    monkeypatch.delattr(merge, "_model_out_config")
    with pytest.raises(mergekit_fim.FimError, match=r"supports mergekit>=0\.1\.5,<0\.2"):
        mergekit_fim.resolve(config_for(pair))


def test_a_planner_of_other_attributes_is_refused(pair, merge, monkeypatch):
    from mergekit_fim.hook import methods

    monkeypatch.setattr(methods, "_PLANNER_ATTRIBUTES", (*methods._PLANNER_ATTRIBUTES, "new_config"))
    target, result = merge(config_for(pair))
    ends_in_one_line(result, "mergekit>=0.1.5,<0.2", "new_config;", "install a supported mergekit", absent=target)


def test_the_planner_is_hooked_once():
    from mergekit.plan import MergePlanner

    from mergekit_fim.hook import planner

    before = MergePlanner.plan_to_disk
    importlib.reload(planner)
    assert MergePlanner.plan_to_disk == before
