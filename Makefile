# Everything that is done with this repository, on a machine that has Python 3.11 or newer and make (3.81 will do).
#
#   make demo     a virtual environment, then the main job on real data with 4 workers
#   make test     the same set-up, then the tests of every layer (some minutes)
#   make test-all   all tests that need nothing but this machine: every fault, every cluster, the gateway
#   make test-examples   every example with its own library, installed below .venv/examples (minutes, the first time)
#   make test-kubernetes   the tests on a real Kubernetes: the cluster that KUBECONFIG names (docs/kubernetes.md says how)
#   make test-gpu   the tests on real GPUs, with the PyTorch that is in .venv (docs/gpus.md says how)
#   make lint     format, lint and type checks
#   make bench    the benchmark against the bare floor and the peers (minutes; BENCH="--help" shows its options)
#   make clean    remove what the above made

# The first Python of these that is new enough; `make PYTHON=/path/to/python demo` decides otherwise.
ifndef PYTHON
PYTHON := $(shell for candidate in python3 python3.13 python3.12 python3.11 python; do \
    $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$candidate && break; done)
endif
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
CPUS := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# Tests wait for processes more than they compute, so even two cores keep three of them busy.
TEST_WORKERS ?= $(shell test $(CPUS) -gt 2 && echo $(CPUS) || echo 3)
TESTS ?=
HERE := not examples and not kubernetes and not gpu
BENCH ?=

# A shell may forbid bytecode; then every handler process would compile its imports again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-extended test-all test-examples test-kubernetes test-gpu install-kubernetes lint format bench clean install

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py

# Tests that are named are run, also those of make test-all.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(if $(TESTS),-m "$(HERE)") $(TESTS)

# What make test leaves out; tests/tiers.py says what that is.
test-extended: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -m "extended and $(HERE)" $(TESTS)

test-all: test test-extended

# Two at a time: they wait for downloads and for processes.
test-examples: $(VENV)/.installed-test
	CORTEX_DASK_EXAMPLES=$(abspath $(VENV))/examples $(BIN)/python -m pytest -n 2 -m examples $(or $(TESTS),tests/examples tests/contract)

# They wait for pods: three at a time, but those that count GPUs one after the other.
KUBERNETES_TEST_WORKERS ?= 3

test-kubernetes: install-kubernetes
	$(BIN)/python -m pytest -n $(KUBERNETES_TEST_WORKERS) --dist loadgroup -m kubernetes $(or $(TESTS),tests/kubernetes tests/clusters)

# One after the other: each of them wants the whole device.
test-gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m gpu $(or $(TESTS),tests/gpu)

# Before the image is made of it, where that is made of this virtual environment.
install-kubernetes: $(VENV)/.installed-test $(VENV)/.installed-kubernetes

lint: $(VENV)/.installed-test $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/run.py $(BENCH)

install: $(VENV)/.installed

# The stamps: one for what users need, one with the tests' tools, one with the linters'. uv installs where it is at hand;
# it does not read pip's configuration, so pip has the last word.
comma := ,
define pip-install
	$(if $(UV),$(UV) pip install --quiet --python $(BIN)/python --editable '.$(1)' ||) $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(1)'
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true # some packages ship templates that do not compile
	@touch $@
endef

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "cortex_dask needs Python 3.11 or newer and found none; install one, or name it: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "cortex_dask needs Python 3.11 or newer, and $(PYTHON) is %d.%d; name another: make PYTHON=/path/to/python $(MAKECMDGOALS)" % sys.version_info[:2])'
	@echo "Making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	@echo "Installing cortex_dask into $(VENV)"
	$(call pip-install)

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml
	@echo "Installing cortex_dask with what its tests need into $(VENV)"
	$(call pip-install,[test])
	@touch $(VENV)/.installed

$(VENV)/.installed-kubernetes: $(VENV)/.created pyproject.toml
	@echo "Installing what the tests on Kubernetes need into $(VENV)"
	$(call pip-install,[test$(comma)kubernetes])

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml
	@echo "Installing cortex_dask with what its checks need into $(VENV)"
	$(call pip-install,[dev])
	@touch $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
