# Two commands do everything, each alone and on a fresh machine: `make demo` (the main job) and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml $(wildcard kernels/*)

.PHONY: demo test test-nnunet openmmlab test-openmmlab lint clean

demo: $(VENV)/.demo
	$(BIN)/python tools/demo_brain.py

test: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	# One thread a worker: oversubscribed OpenMP threads wait for one another.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

# In an environment of its own, because nnunetv2 wants an older timm.
test-nnunet:
	$(MAKE) VENV=$(VENV)-nnunet $(VENV)-nnunet/.nnunet
	$(VENV)-nnunet/bin/python -m pytest tests/integrations/test_nnunet.py $(PYTEST_ARGS)

# OpenMMLab's packages as onedl maintains them, in an environment of their own; mmcv is built for its torch, or a wheel built
# before is taken (tools/openmmlab_wheel.py).
openmmlab:
	$(MAKE) VENV=$(VENV)-openmmlab $(VENV)-openmmlab/.openmmlab

test-openmmlab: openmmlab
	OMP_NUM_THREADS=1 $(VENV)-openmmlab/bin/python -m pytest tests/integrations/openmmlab $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-nnunet $(VENV)-openmmlab build demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Stamp files: installed again when the metadata or the native sources change.
$(VENV)/.demo: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -e ".[medical]"
	touch $@

$(VENV)/.test: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -e ".[test]"
	touch $@

$(VENV)/.nnunet: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -e ".[nnunet]" pytest pytest-timeout
	touch $@

$(VENV)/.openmmlab: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -e . pytest pytest-timeout pytest-xdist
	wheel=$$($(BIN)/python tools/openmmlab_wheel.py) && $(BIN)/python -m pip install "$$wheel" -e ".[openmmlab]"
	touch $@
