# `make test` does everything, alone and on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml $(wildcard kernels/*)

.PHONY: test lint clean

test: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) build demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Stamp files: installed again when the metadata or the native sources change.
$(VENV)/.test: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -e ".[test]"
	touch $@
