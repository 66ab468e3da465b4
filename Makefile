# Every target makes the environment it needs in .venv and can be run again at any time.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
# make test JAX=0.9.0 OPTAX=0.2.7: with these versions, in an environment of their own.
JAX :=
OPTAX :=
VENV := .venv$(addprefix -jax,$(JAX))$(addprefix -optax,$(OPTAX))
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint types docs build wheel bench cifar clean
BENCHMARKS := $(filter-out __init__ report,$(basename $(notdir $(wildcard benchmarks/*.py))))

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.examples ## SGD against ABSGD on digits: tables, figure, JSON under results/ (about two minutes)
	$(BIN)/python -m examples.digits.main

test: $(VENV)/.test ## the tests, with coverage
	$(BIN)/python -m pytest -n 2 --dist loadgroup --cov --cov-report=term-missing:skip-covered

lint: $(VENV)/.dev ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.dev ## the documentation site, into site/
	$(BIN)/python -m sphinx -W --keep-going -q docs site

build: $(VENV)/.dev ## sdist and wheel, into dist/
	rm -rf dist
	$(BIN)/python -m build

wheel: build ## the wheel, installed in an empty environment, imports without a warning
	$(BIN)/python -m venv --clear .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet dist/*.whl
	.venv-wheel/bin/python -I -W error -c 'import absgd_jax; print(absgd_jax.__version__)'

bench: $(VENV)/.bench ## the benchmarks, and their tables in benchmarks/README.md (installs PyTorch, downloads its data)
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit; done
	$(BIN)/python -m benchmarks.report

cifar: $(VENV)/.examples ## CIFAR-10-LT with SGD and ABSGD on the CPU (downloads CIFAR-10; stop and go on at will)
	$(BIN)/python -m examples.cifar_lt sweep --tables 1 --methods sgd absgd --data-dir data --out results
	$(BIN)/python -m examples.cifar_lt report results/fast

clean: ## remove the environments and everything built
	rm -rf .venv .venv-* dist site jupyter_execute .pytest_cache .ruff_cache .hypothesis .coverage*

$(VENV)/bin/python:
	$(if $(PYTHON),,$(error No Python 3.11 or newer found; set PYTHON=/path/to/python3))
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$*]' $(addprefix jax==,$(JAX)) $(addprefix optax==,$(OPTAX))
	-$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib # on all cores; pip does it on one
	@touch $@
