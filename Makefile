# Each target sets this machine up by itself (scripts/setup.sh: quick when nothing changed).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint docs sizes bench clean

PY := .venv/bin/python
# One compute thread per process: several tests share the cores, and results do not depend on them.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Hundreds of processes are started: none compiles again what another has, whatever is set outside.
TEST_ENV += PYTHONDONTWRITEBYTECODE=
# One more than two cores: half of what the tests do is waiting.
JOBS ?= 3

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## system programs, .venv and pinned packages
	@scripts/setup.sh

demo: setup ## an agent with the shipped model solves tasks in a sandbox
	@$(PY) -m fathom demo

test: setup ## the whole CPU test suite
	@$(TEST_ENV) $(PY) -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

test-all: ## the same with everything that tests can use: QEMU, a browser, a registry; full VMs
	@scripts/setup.sh everything
	@$(TEST_ENV) $(PY) -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)
	@$(TEST_ENV) $(PY) -m pytest -q -m full_vm $(ARGS)

lint: ## style, types and import layers
	@scripts/setup.sh lint
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@PATH="$(CURDIR)/.venv/bin:$$PATH" lint-imports
	@$(PY) -m pyright

docs: setup ## rebuild the generated pages: docs/paper-map.md, docs/cli.md
	@$(PY) docs/build.py

sizes: setup ## lines of code by package, and what has grown too large
	@$(PY) scripts/sizes.py

bench: setup ## speed on this machine: decoding, beside transformers, and commands in a sandbox
	@$(PY) -m fathom bench

clean: ## remove .venv and every cache
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
