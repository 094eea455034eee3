# The two commands of the README, each complete on a fresh machine: they make the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= passive
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184

# Rows of these tables; those that are there with their files are not made again, cut ones go on. ImageNet is not at hand.
CONFIGS ?= $(filter-out %/baselines.toml %/claims.toml %/sparq_tables.toml %/udfc_table2.toml %/udfc_table2_vgg16.toml \
	paper_configs/imagenet_%.toml, \
	$(wildcard paper_configs/*.toml))
WORKERS ?= 1

.PHONY: compare test results environment clean

compare: $(VENV)/.installed
	$(BIN)/python -m benchmarks compare --task digits --results results/local

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy methods
	$(BIN)/python -m pytest

results: $(VENV)/.installed
	$(BIN)/python -m benchmarks sweep $(CONFIGS) --workers $(WORKERS)

environment: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
