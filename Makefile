# `make demo` and `make test` set up what they need and run it; a second time they start at once.
# PYTHON is any Python >= 3.12; everything else is installed into .venv.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test slurm check format clean

setup: $(VENV)/installed

$(VENV)/installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
	  || { echo 'Python >= 3.12 is needed; name one: make PYTHON=/path/to/python3.12' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/megatron-growth demo --out runs/demo

test: check slurm
	$(BIN)/python -m pytest

# Launches are tested on a real SLURM, of Debian's packages; without it those tests skip and say so.
# The headers and gcc are for the stand-in that takes Pyxis' options.
slurm:
	@{ PATH=$$PATH:/usr/sbin command -v slurmctld && command -v gcc && [ -e /usr/include/slurm/spank.h ]; } >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	       && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge \
	            slurm-wlm-basic-plugins libslurm-dev gcc libc6-dev >/dev/null; } \
	  || echo 'SLURM is not installed, or not whole, and could not be: tests/slurm will skip' >&2

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
