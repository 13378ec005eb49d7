# paft: `make demo` and `make test` work from a fresh clone. PYTHON chooses the interpreter, VENV the environment.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.paft-installed

# More threads than cores slow small matrix products many times over.
OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS

.PHONY: help install demo test test-cluster lint bench soak clean

help:
	@echo "make install  create $(VENV) with the tested versions"
	@echo "make demo     train, merge and compare on the embedded base model"
	@echo "make test     run the tests"
	@echo "make test-cluster  the tests on a Ray cluster of three nodes in this machine"
	@echo "make lint     ruff and pyright"
	@echo "make bench    make the table of the README again, and a run on Ray (an hour on 2 cores)"
	@echo "make soak     kill, starve and feed rubbish to paft (about an hour): benchmarks/reliability.md"
	@echo "make clean    remove caches, builds and unfinished outputs; keep $(VENV) and what was trained"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("paft needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)
	@printf 'installing into $(VENV) (torch, transformers, trl, peft: minutes the first time) '
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
		-c constraints.txt -e '.[dev]' 2>$(VENV)/pip-stderr.log \
		| awk '/^ *(Collecting|Downloading) / { printf "."; fflush() } END { print "" }' \
		|| { cat $(VENV)/pip-stderr.log >&2; exit 1; }
	@touch $@
	@echo "installed; the command is $(BIN)/paft"

demo: $(STAMP)
	@$(BIN)/paft run demo --resume

test: $(STAMP)
	@$(BIN)/python -m pytest -q -n auto --dist loadfile

test-cluster: $(STAMP)
	@$(BIN)/python -m pytest -q -m cluster

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

soak: $(STAMP)
	@$(BIN)/python benchmarks/reliability.py

bench: $(STAMP)
	@$(BIN)/python benchmarks/compare_table.py
	@$(BIN)/python benchmarks/on_ray.py

clean:
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +
	@find . -path ./$(VENV) -prune -o -path ./.git -prune -o \( -name '.*.partial' -o -name '.*.old' \) -type d -exec rm -rf {} +
