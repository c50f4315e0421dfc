# Every target does its own set-up. All it needs is make and a Python >= 3.11 with venv.
#   make demo                     convert the tiny checkpoint of the tests and generate with it
#   make test ARGS="-k attention" the tests; ARGS goes to pytest
#   make check                    lint, format, types, import floors

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

DEMO_SOURCE := tests/golden/llada2_tiny_f32
DEMO_TARGET := build/demo/llada2_tiny
DEMO_PROMPTS := tests/golden/demo_prompts.jsonl

.DEFAULT_GOAL := help
.PHONY: help demo test test-tpu check format wheel venv clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo "make demo      convert a tiny checkpoint and generate with it, step by step"
	@echo "make test      run the tests (ARGS=... goes to pytest)"
	@echo "make test-tpu  compile for a TPU topology (needs no TPU)"
	@echo "make check     lint, format, types and import floors"
	@echo "make format    mend what ruff can mend, and format"
	@echo "make wheel     build a wheel in dist/"
	@echo "make venv      make $(VENV) with everything for development"
	@echo "make clean     remove $(VENV), builds and caches"

demo: $(VENV)/.installed-run
	rm -rf $(DEMO_TARGET)
	$(BIN)/llada-convert import $(DEMO_SOURCE) $(DEMO_TARGET)
	$(BIN)/llada-convert inspect $(DEMO_TARGET)
	$(BIN)/llada-generate $(DEMO_TARGET) --token-ids $(DEMO_PROMPTS) --show-denoising

test: $(VENV)/.installed-dev
	$(BIN)/pytest -n 2 $(ARGS)

test-tpu: $(VENV)/.installed-tpu
	$(BIN)/pytest -m tpu_compile $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# build/lib would carry files deleted since into the wheel.
wheel: $(VENV)/.installed-dev
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m build --wheel --outdir dist

venv: $(VENV)/.installed-dev

clean:
	rm -rf $(VENV) build dist *.egg-info convert/*.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find llada_jax convert tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps say which extras the environment has. Each is redone when pyproject.toml changes.
$(VENV)/.installed-run: pyproject.toml | $(BIN)/python
	$(PIP) install -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[dev]'
	@touch $(VENV)/.installed-run $@

$(VENV)/.installed-tpu: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[dev,tpu]'
	@touch $(VENV)/.installed-run $(VENV)/.installed-dev $@

# Debian ships python3 without ensurepip; `python3 -m venv` then leaves half an environment.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: $(PYTHON) not found; install Python >= 3.11 or name one: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: llada-jax needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
	    "name a newer one: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv module; run: apt-get install python3-venv" >&2; \
	  exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
