# Two commands do everything on a fresh machine: `make demo` and `make test`. Both stand on `make venv`, which installs what
# training and prediction need, and on a machine with an NVIDIA driver what a GPU needs; the tests add their tools.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

# Whether to install for an NVIDIA GPU: yes or no.
GPU ?= $(if $(shell command -v nvidia-smi || ls -d /proc/driver/nvidia 2>/dev/null),yes,no)

.PHONY: venv demo test lint clean

venv: $(VENV)/.installed

# torch first and pinned: a loose range could bring a version that torchvision does not work with. Python's own index has for
# Linux on x86 no torch without CUDA; an index that pip is configured with may have one, under a version of its own.
ifeq ($(GPU) $(shell uname -sm),no Linux x86_64)
pinned = $(shell sed -n 's/^$(1)==//p' constraints.txt)
TORCH = $(PIP) "torch==$(call pinned,torch)+cpu" "torchvision==$(call pinned,torchvision)+cpu" 2>/dev/null || \
	{ echo "$(NO_CPU_BUILD)"; $(PIP) torch torchvision; }
NO_CPU_BUILD := No CPU build of torch in the indexes that pip is configured with: 3.3 of 6 GB to come are NVIDIA's, for a GPU \
that this machine does not have. To save them, add the index of CPU builds that PyTorch's page 'Get started' names to pip \
(pip config set global.extra-index-url URL) and run make clean venv.
else
TORCH = $(PIP) torch torchvision
endif
EXTRAS := $(if $(filter yes,$(GPU)),[gpu])

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch"; $(TORCH)
	$(PIP) --editable ".$(EXTRAS)"
	touch $@

$(VENV)/.testable: $(VENV)/.installed
	$(PIP) --editable ".[test]"
	touch $@

demo: venv
	$(BIN)/unit-fast demo

# The second run takes the Triton kernels through Triton's interpreter, which must be chosen before Python starts.
# One process a core with one thread each: threads that wait for each other would take most of the time.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test: $(VENV)/.testable
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels tests/model/test_fused_model.py

lint: $(VENV)/.testable
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info
