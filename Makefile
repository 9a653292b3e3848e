# Everything a fresh machine needs is python3 (3.10 or newer, with venv) and a C++17 compiler.

PYTHON ?= python3
# The release that we test with; where pip does not know it, the newest that suits pyproject.toml is taken.
TORCH ?= torch==2.13.0
PROCESSES ?= 3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml setup.py $(wildcard csrc/native/* csrc/cuda/*.*)
CXX_FILES := $(wildcard csrc/native/*.cpp csrc/native/*.hpp csrc/cuda/*.cpp csrc/cuda/*.hpp csrc/cuda/*.cu csrc/cuda/*.cuh \
               tests/cuda/sim/*.cpp tests/cuda/sim/*.hpp)

.PHONY: demo test drills soak chaos fuzz cuda-test cuda-mutants cuda-gate bench lint types layers format clean install

demo: $(STAMP)
	$(BIN)/snapshotd drill

# conftest.py fails what leaves a file in /dev/shm, a process, a thread or a socket, and looks again at the very end.
# Half of the suite waits for processes, so three files run side by side; PROCESSES=0 runs one after the other.
test: $(STAMP)
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile $(PYTEST_ARGS)

# The command's fire drills of four nodes and of five, each of them twenty trainers that import torch.
drills: $(STAMP)
	$(BIN)/python -m pytest -m drill $(PYTEST_ARGS) tests/cluster/test_drill.py

# Histories of simulated clusters until told; ends with 1 where an invariant broke or a state was never reached.
SECONDS ?= 300
soak: $(STAMP)
	$(BIN)/python -m tests.sim --seconds $(SECONDS)

# Random faults against a real cluster, in namespaces of its own where there are root, util-linux and iproute2 (packet
# loss and one-way partitions: iptables too). CHAOS_ARGS="--seed 1 --round 7" plays one round again.
chaos: $(STAMP)
	$(BIN)/python -m tests.chaos --seconds $(SECONDS) $(CHAOS_ARGS)

# The CUDA module where there is no GPU: in the simulator, against planted bugs, and by its machine code. Needs nvcc.
cuda-test: $(STAMP)
	$(BIN)/python -m pip install --quiet 'nvidia-cuda-nvrtc>=13'
	$(BIN)/python -m pytest -q -m cuda tests/cuda

cuda-mutants: $(STAMP)
	$(BIN)/python -m tests.cuda.mutants

cuda-gate: $(STAMP)
	$(BIN)/python -m pip install --quiet 'nvidia-cuda-nvdisasm>=13'
	$(BIN)/python -m tests.cuda.gate

# Every parser, for so long in all; findings go to tests/fuzz/corpus and end it with status 1.
fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet atheris || echo "pip found no atheris for this Python: mutation without coverage"
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

bench: $(STAMP)
	$(BIN)/python benchmarks/copy.py --check
	$(BIN)/python benchmarks/stall.py --check
	$(BIN)/python benchmarks/stall.py --nodes 3 --check
	$(BIN)/python benchmarks/rebuild.py --check
	$(BIN)/python benchmarks/secure.py --check
	$(BIN)/python benchmarks/commits.py --check
	$(BIN)/python benchmarks/adopt.py --check
	$(BIN)/python benchmarks/spread.py --check
	$(BIN)/python benchmarks/codec.py --check

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
