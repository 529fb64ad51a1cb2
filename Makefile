# Two commands do everything on a fresh machine: `make demo` and `make test`. Both stand on `make venv`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: venv demo test lint clean

venv: $(VENV)/.installed

# torch first and pinned: a loose range could bring a version that torchvision does not work with.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

demo: venv
	$(BIN)/unit-fast demo

# The second run takes the Triton kernels through Triton's interpreter, which must be chosen before Python starts.
# One process a core with one thread each: threads that wait for each other would take most of the time.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test: venv
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels tests/model/test_fused_model.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info
