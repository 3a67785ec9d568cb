# `make demo` and `make test` need nothing but Python 3.11 (or newer) and make: they set up a virtual environment first.
# Another interpreter: PYTHON=/path/to/python3.12 make test (it gets an environment of its own, .venv-3.12).

ifdef PYTHON
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
else
PYTHON := $(shell command -v python3.11 || command -v python3 || command -v python)
VENV := .venv
endif
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test test-slow lint format clean

demo: $(READY)
	$(BIN)/python main.py compare mqar.small

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(READY)
	XLA_FLAGS= $(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("error: Python %d.%d is too old: 3.11 or newer is needed" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -e .
	touch $(READY)

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
