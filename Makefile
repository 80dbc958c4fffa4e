# Everything runs in .venv, which is set up on first use and again whenever pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup baby tiktok test faults check verify clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# A run that failed ends with its reason as make's own last line (hence $(error); a failing recipe would end with "Error 1").
baby tiktok: %: run-%
	$(if $(shell cat $(VENV)/.reason),$(error $(shell tail -n 1 $(VENV)/.reason)))

run-%: setup
	@$(BIN)/ckd-fed run simulations/$* 2> $(VENV)/.reason && : > $(VENV)/.reason || { \
	  [ -s $(VENV)/.reason ] || echo "simulations/$* failed without giving a reason" > $(VENV)/.reason; sed '$$d' $(VENV)/.reason; }

test: setup
	$(BIN)/python -m pytest

# Not part of the tests: mutated replies and files in process, a simulation ended and resumed, processes killed under a real federation.
faults: setup
	$(BIN)/python tests/faults/mutations.py
	$(BIN)/python -m pytest tests/faults/resume_simulation.py
	$(BIN)/python tests/faults/process_faults.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

verify: setup
	$(BIN)/ckd-fed verify tests/reference/*.npz tests/reference/backbones/*.npz

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
