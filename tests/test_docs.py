"""The examples of the documentation run, and its numbers are those of the package."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import mergekit_fim


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.S | re.M)


def test_the_python_examples(pair, tmp_path, monkeypatch, capsys):
    shutil.copytree(pair.base, tmp_path / "base")
    shutil.copytree(pair.long, tmp_path / "long")
    monkeypatch.chdir(tmp_path)
    examples = blocks("python.md", "python")
    assert len(examples) == 5
    namespace: dict = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), namespace)
    assert (tmp_path / "merged" / "fim_report.json").exists()
    promised = re.search(r"print\(error\)  # (.*)", examples[-1])[1]
    assert capsys.readouterr().out.splitlines()[-1] == promised


def test_the_python_interface_is_what_the_docs_name():
    from mergekit_fim import api

    assert sorted(mergekit_fim._API) == sorted(api.__all__)
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for name in api.__all__:
        assert getattr(mergekit_fim, name) is getattr(api, name)
        assert name in dir(mergekit_fim)
        assert name in text
    with pytest.raises(AttributeError, match="nothing"):
        mergekit_fim.nothing()


def test_the_table_of_costs_is_what_the_script_prints():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "scale.py")], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
