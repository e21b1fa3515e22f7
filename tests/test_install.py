"""What is released, and the start-up hook: installs, uninstalling, cost, and mergekits that are missing or broken."""

import contextlib
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import yaml
from environments import ROOT, Environment, files, make_environment, pip
from loaded import Loaded
from markdown_it import MarkdownIt
from merges import config_for, ends_in_one_line
from packaging.requirements import Requirement

import mergekit_fim

pytestmark = pytest.mark.slow

REGISTERED = "from mergekit import merge_methods as m; print([x.spec.name for x in m.registered_methods()][-3:])"


def names(python: Environment | Loaded, before: str = "") -> str:
    done = python.run("-c", before + REGISTERED)
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize("editable", [False, True])
def test_install_and_uninstall(editable, source, tmp_path):
    environment = make_environment(tmp_path / "venv")
    before = files(environment)
    is_there = (
        "import sys, importlib.util as u; print('mergekit_fim' in sys.modules, bool(u.find_spec('mergekit_fim')))"
    )
    assert environment.run("-I", "-c", is_there).stdout == "False False\n"
    mode = ["--editable"] if editable else []
    pip(environment, "install", "--no-deps", "--no-build-isolation", "--quiet", *mode, str(source))
    assert names(environment) == "['fim_ties', 'fim_ta', 'fim_kron']"
    where = environment.run("-c", "import mergekit_fim; print(mergekit_fim.__file__)").stdout
    assert where.startswith(str(source)) is editable
    hooks = "import sys; print('mergekit_fim' in {type(finder).__module__ for finder in sys.meta_path})"
    for variables, hooked in (({}, "True\n"), ({"MERGEKIT_FIM_DISABLE": "1"}, "False\n")):
        assert environment.run("-c", hooks, env=variables).stdout == hooked
    pip(environment, "uninstall", "--yes", "--quiet", "mergekit-fim")
    assert environment.run("-I", "-c", is_there).stdout == "False False\n"
    assert files(environment) == before


def build(what: str, source: Path, folder: Path) -> Path:
    code = "import sys, hatchling.build as b; print(getattr(b, f'build_{sys.argv[1]}')(sys.argv[2]))"
    command = [sys.executable, "-c", code, what, str(folder)]
    return folder / subprocess.run(command, cwd=source, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


def test_wheel_and_sdist_carry_the_start_up_files(sdist, wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        found = sorted(archive.namelist())
        assert archive.read("mergekit_fim.start").decode().strip() == "mergekit_fim:install"
    assert "mergekit_fim.pth" in found
    assert "mergekit_fim/py.typed" in found
    assert not [name for name in found if name.startswith("mergekit_fim/") and name.endswith((".pth", ".start"))]
    # The sdist builds the same wheel.
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    with zipfile.ZipFile(build("wheel", unpacked, tmp_path)) as archive:
        assert sorted(archive.namelist()) == found


def test_an_index_takes_wheel_and_sdist(sdist, wheel):
    command = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", str(sdist), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("PASSED")) == (0, 2), done.stdout + done.stderr


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


class Page:
    """A description as an index shows it: its words, links, pictures, and the names of its headings."""

    def __init__(self, markdown: str) -> None:
        self.words, self.links, self.pictures, self.names = "", [], [], set()
        tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(markdown)
        for before, token in zip([None, *tokens], tokens, strict=False):
            if before is not None and before.type == "heading_open":
                self.names.add("#" + re.sub(r"[^\w -]", "", token.content.lower()).replace(" ", "-"))
            for part in [token, *(token.children or [])]:
                if part.type == "image":
                    self.pictures.append(part.attrs["src"])
                elif part.type == "link_open":
                    self.links.append(part.attrs["href"])
                elif part.type != "inline":
                    self.words += part.content


@pytest.mark.parametrize("address", ["", "https://forge.example/someone/mergekit-fim"])
def test_the_description_works_away_from_the_repository(address, source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    project = tmp_path / "source" / "pyproject.toml"
    text, count = re.subn(r'^repository = ".*"$', f'repository = "{address}"', project.read_text(), flags=re.M)
    assert count == 1
    project.write_text(text)
    made = metadata(build("wheel", tmp_path / "source", tmp_path))
    assert made["Description-Content-Type"] == "text/markdown"
    here, there = Page((ROOT / "README.md").read_text(encoding="utf-8")), Page(made.get_payload(decode=True).decode())
    assert "".join(there.words.split()) == "".join(here.words.split())
    assert len(here.pictures) > 0
    assert not {link for link in there.links if link.startswith("#")} - there.names
    for found in [*there.links, *there.pictures]:
        assert found.startswith(("https://", "#"))
        path = found.removeprefix(f"{address}/blob/HEAD/").removeprefix(f"{address}/raw/HEAD/").split("#")[0]
        assert not address or not found.startswith(address) or (ROOT / path).exists()
    assert len(there.pictures) == (len(here.pictures) if address else 0)
    assert len(there.links) == (len(here.links) if address else sum(x.startswith(("#", "http")) for x in here.links))
    assert [url.split(", ")[1] for url in made.get_all("Project-URL", [])] == (
        [address, f"{address}/blob/HEAD/CHANGELOG.md", f"{address}/issues"] if address else []
    )


def test_versions_agree(wheel):
    """One version, one list of Pythons, and what is tested within what may be installed."""
    made = metadata(wheel)
    assert made["Version"] == mergekit_fim.__version__
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1] == made["Version"]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    pythons = [c.split()[-1] for c in made.get_all("Classifier") if re.search(r"Python :: 3\.\d+$", c)]
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == pythons
    assert made["Requires-Python"] == f">={pythons[0]}"
    allowed = {r.name: r.specifier for r in map(Requirement, made.get_all("Requires-Dist")) if not r.marker}
    pins = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    for pin in map(Requirement, pins):
        (version,) = (its.version for its in pin.specifier)
        assert pin.name not in allowed or version in allowed[pin.name], pin
    # What these two change in the next such version is unknown.
    assert "6.0.0" not in allowed["transformers"]
    assert "0.2.0" not in allowed["mergekit"]


def test_the_start_file_names_a_callable(installed, loaded):
    """What Python 3.15 does with it (PEP 829): resolve the name, call it."""
    code = (
        "import sys, pkgutil; sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != '_Finder']; "
        "pkgutil.resolve_name(open(sys.argv[1]).read().strip())(); "
    )
    done = loaded.run("-c", code + REGISTERED, str(installed.site_packages / "mergekit_fim.start"))
    assert done.stdout.strip() == "['fim_ties', 'fim_ta', 'fim_kron']"


def test_start_up_imports_nothing_heavy(installed):
    code = "import sys; print(sorted(m for m in sys.modules if m.split('.')[0] in {heavy}))"
    heavy = {"torch", "mergekit", "transformers", "click", "typing", "logging", "importlib.metadata"}
    found = installed.run("-c", code.format(heavy=heavy)).stdout.strip()
    without = installed.run("-c", code.format(heavy=heavy), env={"MERGEKIT_FIM_DISABLE": "1"}).stdout.strip()
    assert found == without == "[]"
    ours = installed.run("-c", "import sys; print(sorted(m for m in sys.modules if 'fim' in m))").stdout.strip()
    assert ours == "['mergekit_fim']"


def test_where_site_does_not_run(installed, tmp_path):
    """`python -S`, and folders on PYTHONPATH: importing the package first does it, and so does importing it late."""
    path = os.pathsep.join([str(installed.site_packages), *sys.path])
    late = "import mergekit.plan, mergekit_fim; assert mergekit.plan.MergePlanner.plan_to_disk.mergekit_fim; "
    with contextlib.closing(Loaded(installed.python, tmp_path, "-S", PYTHONPATH=path)) as python:
        assert names(python, before="import mergekit_fim; ") == "['fim_ties', 'fim_ta', 'fim_kron']"
        assert names(python, before=late) == "['fim_ties', 'fim_ta', 'fim_kron']"
        assert "fim" not in names(python)


@pytest.fixture
def bare(wheel, tmp_path) -> Environment:
    """The package, and nothing that it depends on."""
    environment = make_environment(tmp_path / "bare", dependencies=False)
    pip(environment, "install", "--no-deps", "--no-index", "--quiet", str(wheel))
    return environment


def fake_mergekit(environment: Environment, **modules: str) -> None:
    package = environment.site_packages / "mergekit"
    (package / "merge_methods").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "merge_methods" / "__init__.py").write_text("from mergekit.merge_methods import registry\n")
    (package / "merge_methods" / "registry.py").write_text(textwrap.dedent(modules["registry"]))
    (package / "plan.py").write_text(textwrap.dedent(modules["plan"]))


def test_without_mergekit(bare):
    done = bare.run("-c", "import mergekit_fim; print('ok')")
    assert (done.stdout, done.stderr) == ("ok\n", "")
    done = bare.run("-c", "import mergekit.plan", check=False)
    assert done.stderr.strip().endswith("ModuleNotFoundError: No module named 'mergekit'")


def test_an_incompatible_mergekit_warns_once_and_works(bare):
    fake_mergekit(bare, registry="methods = {}", plan="class Planner: pass")
    done = bare.run("-c", "import mergekit.merge_methods, mergekit.plan; print(mergekit.plan.Planner.__name__)")
    assert done.stdout == "Planner\n"
    assert len(done.stderr.splitlines()) == 1
    assert "fim_ties, fim_ta and fim_kron are not available" in done.stderr
    assert ">=0.1.5,<0.2" in done.stderr
    strict = bare.run("-W", "error", "-c", "import mergekit.plan; print('ok')")
    assert strict.stdout == "ok\n"


def test_a_mergekit_that_raises_on_import_raises_that(bare):
    fake_mergekit(bare, registry="raise RuntimeError('broken mergekit')", plan="1 / 0")
    for module, error in (("merge_methods", "RuntimeError: broken mergekit"), ("plan", "ZeroDivisionError")):
        done = bare.run("-c", f"import mergekit.{module}", check=False)
        assert done.returncode == 1
        assert error in done.stderr.splitlines()[-1]
        assert "not available" not in done.stderr


def test_a_planner_of_another_shape_is_a_clear_error(monkeypatch, pair, merge):
    from mergekit.plan import MergePlanner

    original = MergePlanner.__init__

    def without_options(self, *args, **kwargs):
        original(self, *args, **kwargs)
        del self.options

    monkeypatch.setattr(MergePlanner, "__init__", without_options)
    target, result = merge(config_for(pair))
    ends_in_one_line(result, "mergekit>=0.1.5,<0.2", "options", absent=target)


def test_mergekits_modules_look_as_they_would_without_us():
    import mergekit.merge as merge
    import mergekit.merge_methods.registry as registry
    import mergekit.plan as plan

    for module in (merge, registry, plan):
        assert type(module.__spec__.loader).__module__ == "_frozen_importlib_external"
        assert module.__loader__ is module.__spec__.loader
