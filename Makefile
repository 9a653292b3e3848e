# Everything a fresh machine needs is python3 (3.10 or newer, with venv) and a C++17 compiler.

PYTHON ?= python3
# The release that we test with; where pip does not know it, the newest that suits pyproject.toml is taken.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml setup.py $(wildcard csrc/native/*)
CXX_FILES := $(wildcard csrc/native/*.cpp csrc/native/*.hpp)

.PHONY: demo test bench lint types layers format clean install

demo: $(STAMP)
	$(BIN)/snapshotd drill

# conftest.py fails what leaves a file in /dev/shm, a process, a thread or a socket, and looks again at the very end.
test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/copy.py --check
	$(BIN)/python benchmarks/stall.py --check

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

types: $(STAMP)
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 snapshotd client/snapshotd_client

layers: $(STAMP)
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet '$(TORCH)' || echo "pip found no $(TORCH) here; any torch that pyproject.toml allows will do."
	$(BIN)/python -m pip install --quiet 'setuptools>=77' wheel 'pybind11>=2.13'
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[dev,test]'
	touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -f snapshotd/*.so client/snapshotd_client/*.so
	find snapshotd client tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
