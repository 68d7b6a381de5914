# Two commands need no other set-up: `make demo` and `make test`. Both make their own .venv.
PYTHON ?= python3
BIN := .venv/bin

# Each process takes whole files, in the order of tests/conftest.py: the long ones first.
SHARED := --dist loadfile --no-loadscope-reorder
# One process more than there are cores, at most four: tests wait for disks, for servers and for other processes.
ONE_MORE = $(shell $(PYTHON) -c 'import os; print(min((os.cpu_count() or 1) + 1, 4))')

.PHONY: demo test test-slow planted-bugs lint types imports docs check gpu gpu-bundle clean

demo: .venv/.installed
	$(BIN)/maesil demo --out demo

test: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED) --numprocesses $(ONE_MORE) -m "not slow"

# The slow lane: tests that take long, and repetitions of what a test of the fast lane sees, too. CI runs both lanes.
test-slow: .venv/.installed-test
	$(BIN)/python -m pytest $(SHARED) --numprocesses auto --maxprocesses 4 -m slow

# Bugs planted in copies of the source, one at a time: a test must see each.
planted-bugs: .venv/.installed-test
	PYTHONPATH=.:tests $(BIN)/python -m planted.lane

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed-test
	$(BIN)/mypy maesil

imports: .venv/.installed-test
	$(BIN)/lint-imports --no-cache

docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint types imports docs test test-slow planted-bugs

# One folder for a bare machine with a GPU: the source, a small store, wheels. See docs/how-to/gpu.md.
gpu-bundle: .venv/.installed-test
	PYTHONPATH=. $(BIN)/python tests/gpu/bundle.py

# In that folder: nine minutes on the GPU, then gpu.json and gpu.md. Needs python3 (or PYTHON=...) with torch, Triton, numpy.
gpu:
	$(PYTHON) tests/gpu/run.py

clean:
	rm -rf .venv demo site build gpu-bundle *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ .venv/.installed

.venv/.installed-docs: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@ .venv/.installed
