# Each target makes its own environment in .venv when there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test coverage test-all test-meshes test-programs test-trackers check bench docs clean

demo: $(STAMP)  ## train a small network on real digits and write a report
	$(BIN)/gradnorm demo

test: check  ## the one gate: format, lint, layers, types, tests

check: $(STAMP)
	scripts/gate $(BIN)

coverage: $(STAMP)  ## which lines the tests run, in a third more time than without
	$(BIN)/python -m pytest -n auto --dist loadfile --cov --cov-report=term -q

test-all: $(STAMP)  ## every case of every test; the gate runs a share of the long ones
	GRADNORM_EVERY_CASE=1 $(BIN)/python -m pytest -n auto --dist loadfile -q

test-meshes: $(STAMP)  ## the tests of sharding on every mesh; the gate runs a share of them
	GRADNORM_EVERY_CASE=1 $(BIN)/python -m pytest -n auto -q tests/sharding

test-programs: $(STAMP)  ## per-example norms of all models and 300 random programs; the gate runs a share
	GRADNORM_EVERY_CASE=1 $(BIN)/python -m pytest -n auto -q tests/ghost

test-trackers: $(VENV)/.installed-trackers  ## TensorBoard, W&B, MLflow, trackio read back what is written to them
	$(BIN)/python -m pytest -q -m trackers

bench: $(STAMP)  ## ratios to peers on this machine; with OPTIONS="--quick --check"
	$(BIN)/python -m benchmarks $(OPTIONS)

docs: $(VENV)/.installed-docs  ## the pages in docs/_build/html
	$(BIN)/sphinx-build -W -q -b html docs docs/_build/html

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

$(VENV)/.installed-docs: $(STAMP)
	$(BIN)/python -m pip install -q -e '.[docs]'
	touch $@

$(VENV)/.installed-trackers: $(STAMP)
	$(BIN)/python -m pip install -q -e '.[trackers]'
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build .jax_cache .pytest_cache .ruff_cache .hypothesis
