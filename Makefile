# The two commands of the README, each complete on a fresh machine: they make the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= passive
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184

.PHONY: compare test environment clean

compare: $(VENV)/.installed
	$(BIN)/python -m benchmarks compare --task digits

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

environment: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
