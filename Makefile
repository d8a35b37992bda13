# Two commands for a fresh machine with Python 3.11 or newer: `make demo` and `make test` set everything up themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types setup clean

demo: $(VENV)/run.stamp
	$(BIN)/loratune demo $(ARGS)

test: $(VENV)/test.stamp lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not gpu" tests

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test.stamp
	$(BIN)/mypy -p loratune

setup: $(VENV)/test.stamp

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("loratune needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: the constraint admits a CPU build, and nothing after it pulls in another.
$(VENV)/run.stamp: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
