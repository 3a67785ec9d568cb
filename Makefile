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

# Compiling kernels for chips that are not here; the list of programs is tests/pallas_kernels/programs/. QUICK=1 takes the few of every change.
COMPILE := JAX_PLATFORMS=cpu $(BIN)/python -m tests.pallas_kernels.programs $(if $(QUICK),--quick)

# The slower commands run all of their tests, or the Kth of N shares.
SHARE ?= 1/1

.PHONY: demo test test-more test-all test-tpu-compile test-gpu-compile test-gpu-interpreter test-campaign test-interop gpu-wheels gpu-rehearsal libtpu cuda-compiler docs lint format clean

demo: $(READY)
	$(BIN)/python main.py compare mqar.small

test: $(READY)
	$(BIN)/python -m pytest -m "not more and not slow and not wide and not gpu_interpreter" -n 2 --dist worksteal

# What is too slow for `make test`: the wider cases, and what trains, which needs code that is optimised.
# Without a registry that has libtpu, what needs it is skipped, and says so.
test-more: $(READY)
	$(BIN)/python -m recollect.pallas_kernels.compilers tpu --optional
	$(BIN)/python -m pytest -m "more and not slow and not wide and not gpu_interpreter" --share $(SHARE) -n 2 --dist worksteal --ignore tests/interop
	XLA_FLAGS= $(BIN)/python -m pytest -m "slow and not wide and not gpu_interpreter" --share $(SHARE) -n 2 --dist worksteal

# Everything: also wide grids, a thousand command lines drawn anew, and every program for every chip.
test-all: test test-more test-interop
	$(BIN)/python -m pytest -m "wide and not gpu_interpreter" -n 2 --dist worksteal
	FUZZ=1000 $(BIN)/python -m pytest -n 0 tests/test_fuzz.py
	$(MAKE) test-tpu-compile test-gpu-compile QUICK=
	.ci/gpu-interpreter --wide

test-tpu-compile: libtpu
	$(COMPILE) --chip v5e --chip v5p --chip v6e

test-gpu-compile: cuda-compiler
	$(COMPILE) --chip h100

# Faults done to small runs, which must lose nothing; SHORT= does 60 instead of 13.
test-campaign: SHORT ?= 1
test-campaign: $(READY)
	$(BIN)/python -m tests.campaign $(if $(SHORT),--short)

test-gpu-interpreter:
	.ci/gpu-interpreter --share=$(SHARE)

# Exported models in transformers on torch, in an environment of its own; where a registry lacks them, skipped.
test-interop: $(READY)
	test .venv-interop/ready -nt requirements-interop.txt || { $(PYTHON) -m venv .venv-interop && .venv-interop/bin/python -m pip install --quiet \
		--disable-pip-version-check -r requirements-interop.txt && touch .venv-interop/ready; } \
		|| { rm -rf .venv-interop; echo "note: tests beside transformers are skipped: it could not be installed"; }
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m "not wide" -n 2 --dist loadfile tests/interop

# What a bare machine with a GPU lacks, to travel with the working tree; then both calls of benchmarks/first_contact, simulated, with faults.
gpu-wheels: $(READY)
	.ci/gpu-wheels $(BIN)/python

gpu-rehearsal: $(READY)
	.ci/gpu-interpreter --rehearse

libtpu: $(READY)
	$(BIN)/python -m recollect.pallas_kernels.compilers tpu

cuda-compiler: $(READY)
	$(BIN)/python -m recollect.pallas_kernels.compilers cuda

# The pages of docs/ and the API, as a site in build/site; a broken link or reference is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

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
	rm -rf .venv .venv-* .accelerators build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
