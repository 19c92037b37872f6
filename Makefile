# Everything happens in .venv; nothing is needed beforehand but python3 (>= 3.11) and make.
PYTHON  ?= python3
WORKERS ?= 2

BIN     := .venv/bin
# Without compiling: of the ten thousand modules that come with torch, most are never imported.
INSTALL := $(BIN)/python -m pip install --no-compile -c constraints-cpu.txt
INPUTS  := pyproject.toml constraints-cpu.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: .venv/installed  ## set up .venv and run the demonstration
	$(BIN)/fxinvert demo

# Passive waiting: torch's OpenMP threads otherwise spin, and on a shared machine that is ten times slower.
test: .venv/installed-dev  ## run the whole test suite, slow tests too (WORKERS=2 processes)
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(WORKERS)

lint: .venv/installed-dev  ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: .venv/installed-dev  ## build the documentation, strictly, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove build products and caches (not .venv)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find . -name .venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv .venv

# The stamps are older than INPUTS exactly when something must be installed again. The interpreter is an order-only
# prerequisite: it is a link to the system's, whose date says nothing.
.venv/installed: $(INPUTS) | $(BIN)/python
	$(INSTALL) -e .
	touch $@

# The dev install holds everything that the plain one does.
.venv/installed-dev: $(INPUTS) | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	touch $@ .venv/installed
