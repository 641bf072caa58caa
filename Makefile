# Two commands on a fresh machine with Python 3.11, make and a compiler:
#   make quickstart   the main job: a student learns from a teacher, two ranks, about two minutes
#   make test         the whole test suite
# and besides: make verify (prints measured errors), make lint, make format, make clean.
# Each makes its own environment in .venv first.  Set PYTHON to choose another interpreter, and PIP_FLAGS
# for pip's own options (for example an index that has CPU-only torch).
PYTHON ?= python3.11
VENV := .venv
PIP_FLAGS ?=
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c requirements/constraints.txt

.PHONY: quickstart test lint format verify clean

quickstart: $(VENV)/.runtime
	$(BIN)/python tools/quickstart.py $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

verify: $(VENV)/.test
	$(BIN)/python -m pytest -q tests/test_model_parity.py tests/test_vocab_parallel.py tests/test_training_layouts.py \
		tests/test_training_resume.py tests/test_teacher.py $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements/runtime.txt requirements/constraints.txt pyproject.toml | $(VENV)/bin/python
	$(INSTALL) -r requirements/runtime.txt
	$(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.test: requirements/test.txt $(VENV)/.runtime
	$(INSTALL) -r requirements/test.txt
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
