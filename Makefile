PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
export TOKENIZERS_PARALLELISM := false

.PHONY: help env demo test check format families bench bench-sweep bench-gpu torture zoo slurm-up slurm-down clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

env: $(VENV)/.installed ## make .venv and install the package with pinned dependencies

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not there; set PYTHON to a Python 3.11 or newer"; exit 2; }
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: env ## compress, repair and compare the two shipped models; ends with the path of a report
	$(BIN)/rerail demo

test: env check ## environment, then every check

check: ## format, lint, types, import contracts, tests, house rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

format: ## rewrite files in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

families: env ## every MoE family of transformers the whole way, to docs/families.md; ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python tests/family_table.py

bench: env ## speed and memory as ratios of one run, to bench.json
	$(BIN)/python experiments/bench/bench.py --out bench.json

bench-sweep: env ## 24 cells through the local Slurm against the same cells alone; an hour
	$(BIN)/python experiments/bench/sweep.py --out sweep.json

bench-gpu: ## tests and bench on one GPU, in 8 minutes; any Python with torch 2.11 and the package's needs will do
	PYTHONPATH=src $(GPU_PYTHON) -m pytest -o filterwarnings=default --durations=5 tests/gpu
	PYTHONPATH=src $(GPU_PYTHON) experiments/bench/gpu.py --out bench_gpu.json --page experiments/gpu.md

torture: env ## kill a small sweep 100 times at random moments; it must end as if nothing had been
	OMP_NUM_THREADS=1 $(BIN)/python experiments/torture.py --kills 100

slurm-up: ## start a two-node Slurm on this machine, for rerail -m ... +slurm=local
	@$(PYTHON) slurm/local/up >/dev/null

slurm-down: ## stop it, and nothing else
	@$(PYTHON) slurm/local/down

clean: ## remove what was made, but not the environment
	rm -rf outputs multirun build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
