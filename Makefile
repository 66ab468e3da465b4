# Every target makes the environment it needs in .venv and can be run again at any time.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint types docs build bench mini clean
BENCHMARKS := step_cost microbatch kl_dro theorem1 safety published_package scaling

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/.examples ## SGD against ABSGD on digits: table, figure, JSON under results/ (half a minute)
	$(BIN)/python -m examples.digits.main

test: .venv/.test ## the tests, with coverage
	$(BIN)/python -m pytest -n 2 --dist loadgroup --cov --cov-report=term-missing:skip-covered

lint: .venv/.dev ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv/.dev ## the documentation site, into site/
	$(BIN)/python -m sphinx -W --keep-going -q docs site

build: .venv/.dev ## sdist and wheel, into dist/
	$(BIN)/python -m build

bench: .venv/.bench ## the benchmarks, and their tables in benchmarks/README.md (installs PyTorch, downloads its data)
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit; done
	$(BIN)/python -m benchmarks.report

mini: .venv/.examples ## CIFAR-10-LT with a small ResNet on the CPU, all methods (an hour; downloads CIFAR-10)
	$(BIN)/python -m examples.cifar_lt.sweep --preset mini --columns cifar10-lt-100 --out results --data-dir data
	$(BIN)/python -m examples.cifar_lt.report results/mini

clean: ## remove the environment and everything built
	rm -rf .venv dist site .pytest_cache .ruff_cache .hypothesis .coverage*

.venv/bin/python:
	$(if $(PYTHON),,$(error No Python 3.11 or newer found; set PYTHON=/path/to/python3))
	$(PYTHON) -m venv .venv

.venv/.%: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@
