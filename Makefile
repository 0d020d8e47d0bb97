# Every target makes the environment it needs in .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-browser test-network lint format bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

# torch comes first and by its exact version: where the index has a CPU build of it, a range would miss that one and pull
# gigabytes of CUDA libraries.
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.ready ## ten clients teach one adapter eight tasks, in about a minute
	@$(BIN)/sheepfold run

# A process a core, each with one thread: models this small gain nothing from a second one. Files in their own order: the
# one by numbers of tests leaves those with few and long ones for the end, when the other process is done.
test: $(VENV)/.ready ## the plain suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not slow and not browser and not network" tests

test-slow: $(VENV)/.ready ## all cases of all methods; kill -9 at twenty random moments; Dolly
	@$(BIN)/python -m pytest -m "slow and not network" tests

test-browser: $(VENV)/.ready ## pages in headless Chromium
	@$(BIN)/python -m pytest -m "browser and not network" tests

# The bits of a run depend on how many threads share a sum; the processes that these tests start have one each.
test-network: $(VENV)/.ready ## server and clients as processes; kill -9 of each; two hosts, which needs root
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "network" tests

lint: $(VENV)/.ready ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.ready ## let ruff rewrite
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.ready ## ours beside others' ways, as ratios in one run, in ten minutes (benchmarks/README.md)
	@$(BIN)/python benchmarks/all.py

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
