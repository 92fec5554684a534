# Frugal. `make help` lists the targets; each sets up .venv by itself when it is missing or out of date.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
PROFILE ?=
PAPER ?=
SOURCE ?=
# The index of CPU builds that PyTorch's install page names, e.g. make reproduce TORCH_INDEX=<its address>
TORCH_INDEX ?=
export PATH := $(CURDIR)/.venv/bin:$(PATH)
.DEFAULT_GOAL := help
.PHONY: help setup reproduce test test-fast test-gpu lint lab bench bench-gpu report notebooks data new-paper clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  %-12s %s\n", $$1, $$2}'

setup: .venv/.complete  ## create .venv and install everything into it

.venv/.complete: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Frugal needs Python 3.11 or 3.12: install one, or name it with make PYTHON=/path/to/python"; exit 1; }
	@echo "Setting up .venv with $(PYTHON) (a few minutes, once)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),) -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

reproduce: setup  ## run every experiment and print the verdicts (PAPER=slug for one, PROFILE=smoke|cpu|gpu|paper)
	@python -m common.reproduce $(if $(PROFILE),--profile $(PROFILE),) $(if $(PAPER),--paper $(PAPER),)

test: setup  ## run all tests
	@TRITON_INTERPRET=1 python -m pytest -n 2 --dist loadgroup -q

test-fast: setup  ## run the tests that take a few seconds at most
	@TRITON_INTERPRET=1 python -m pytest -n 2 --dist loadgroup -q -m "not slow"

test-gpu: setup  ## run the kernels' tests on a CUDA GPU
	@python -c 'import torch; torch.cuda.is_available() or exit("make test-gpu needs a CUDA GPU, and torch finds none here")'
	@TRITON_INTERPRET=0 python -m pytest tests/kernels -q

lint: setup  ## check style, types and the direction of imports
	@ruff check .
	@ruff format --check .
	@mypy
	@lint-imports --no-logo

lab: setup  ## open JupyterLab on the notebooks
	@jupyter lab --notebook-dir=notebooks $(if $(filter 0,$(shell id -u)),--allow-root,)

bench: setup  ## measure decoding, training and simulation speed against their baselines
	@python -m common.bench

bench-gpu: setup  ## measure the kernels on a CUDA GPU: writes results/gpu/kernels.csv
	@TRITON_INTERPRET=0 python -m kernels.bench

report: setup  ## rebuild the pages and the README's scoreboard from the results
	@python -m common.reporting.build

notebooks: setup  ## refresh the committed notebooks from the cpu profile's results (PAPER=slug for one)
	@python -m common.reporting.notebook $(PAPER)

data: setup  ## download source files into data/ (SOURCE=name for one)
	@python -m common.data.sources $(SOURCE)

new-paper: setup  ## scaffold papers/SLUG: make new-paper SLUG=my_paper
	@python -m common.new_paper $(SLUG)

clean:  ## remove what runs have written, but neither the results in git nor .venv
	rm -rf artifacts runs .checkpoints dvc_plots results/smoke .dvc/tmp .dvc/cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
