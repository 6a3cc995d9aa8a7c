# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
#
#   PYTHON    the Python (3.10 or newer) that makes the environment
#   PIP_ARGS  more options for pip, e.g. an index that has PyTorch's CPU build
#   WORKERS   test processes; 0 runs the tests in one process, as a debugger wants it
#   THREADS   threads of each test process
#   PYCKPT_BUILD_CUDA=1  build the CUDA extension too when the environment is set up; see also make cuda
#   ARGS      more options for the command: make test ARGS='-k rope', make demo ARGS='--help'

PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
THREADS ?= 1
ARGS ?=
# Minutes of compiling that most work on pyckpt does not need; an install by pip builds it where it can.
export PYCKPT_BUILD_CUDA ?= 0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
# Changes when what is installed changes: the sources themselves are installed editable, the CPU kernels are compiled.
READY := $(VENV)/ready
TOOLS := $(VENV)/tools
SETUP_FILES := pyproject.toml setup.py constraints.txt pyckpt/_version.py csrc/build.py $(wildcard csrc/cpu/*)

.DEFAULT_GOAL := help
.PHONY: help setup demo test tools lint aot cuda cpu gpu bench doctor clean

help:
	@echo "make demo     train a small model on text, then compare memory and time (4 minutes with the set-up)"
	@echo "make test     run the tests, but for the slow ones; those: make test ARGS='-m slow'"
	@echo "make tools    install TRL, DeepSpeed and bitsandbytes too, and run the tests with them (3 minutes)"
	@echo "make lint     ruff and mypy"
	@echo "make aot      compile the Triton kernels for GPUs that are not here; registers, spills, shared memory"
	@echo "make cuda     build the CUDA C++ extension in place, with nvcc (3 minutes; no GPU needed)"
	@echo "make cpu      build the CPU kernels in place, as the set-up does where there is a C++ compiler (5 seconds)"
	@echo "make gpu      on a machine with a GPU: its tests and every benchmark, quickly (8 minutes, nothing installed)"
	@echo "make bench    the block's times against PyTorch's; on a GPU Llama-8B's block, and its memory"
	@echo "make doctor   versions, devices, and which backend serves each op"
	@echo "make setup    only the environment in $(VENV); the others do it themselves"
	@echo "make clean    remove $(VENV), build/, caches and runs/demo"

setup: $(READY)
	@echo "$(VENV) is ready."

$(READY): $(SETUP_FILES)
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
		sys.exit(0 if v >= (3, 10) else f"Python {v[0]}.{v[1]} is too old: make PYTHON=/path/to/python3.10 or newer")'
	@echo "Setting up $(VENV) with $$($(PYTHON) --version); the first time takes a minute or more."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools
	@echo "Installing pyckpt (editable), PyTorch, and the tools for training and testing."
	@$(PIP) --no-build-isolation -e '.[dev,train,hf,bench]'
	@touch $@

demo: $(READY)
	@echo "1/2  Training a small model on the sources of Python's standard library."
	@$(BIN)/pyckpt train --steps 400 --out runs/demo/train --overwrite $(ARGS)
	@echo "2/2  Comparing memory and time with and without checkpointing."
	@$(BIN)/pyckpt compare --budget 40 --out runs/demo/compare

test: $(READY)
	@echo "Running the tests: $(WORKERS) processes with $(THREADS) threads each."
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow" $(ARGS)

# What tests alone need, and takes longer to install than all else. DeepSpeed's set-up imports PyTorch, of which it would
# else be given another one.
$(TOOLS): $(READY) constraints.txt
	@echo "Installing TRL, DeepSpeed and bitsandbytes."
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation trl deepspeed bitsandbytes
	@touch $@

tools: $(TOOLS)
	@echo "Running the tests with TRL, DeepSpeed and bitsandbytes."
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup \
		tests/test_swap_tools.py tests/test_swap_deepspeed.py tests/test_swap_quantized.py tests/test_docs.py $(ARGS)

lint: $(READY)
	@echo "ruff check";  $(BIN)/ruff check .
	@echo "ruff format --check";  $(BIN)/ruff format --check .
	@echo "mypy pyckpt";  $(BIN)/mypy pyckpt

bench: $(READY)
	@$(BIN)/python bench/block.py $(ARGS)

aot: $(READY)
	@env -u TRITON_INTERPRET $(BIN)/python -m pyckpt.triton_kernels.aot $(ARGS)

cuda: $(READY)
	@$(BIN)/python csrc/build.py $(ARGS)

cpu: $(READY)
	@$(BIN)/python csrc/build.py --cpu $(ARGS)

# With the machine's own Python and PyTorch: a virtual environment would hide its CUDA build.
gpu:
	@$(PYTHON) bench/gpu.py $(ARGS)

doctor: $(READY)
	@$(BIN)/pyckpt doctor

clean:
	rm -rf $(VENV) build dist *.egg-info runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis pyckpt/_build.json pyckpt/*.so
	find pyckpt triton_kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
