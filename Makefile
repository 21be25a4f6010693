# Two commands to know: `make demo` and `make test`. Each creates .venv, installs into it and runs;
# the second time nothing is installed unless the package's build files changed.

VENV  ?= .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tools that the tests and the build start by name (cmake, ninja, clang-format) are the environment's own.
export PATH := $(abspath $(BIN)):$(PATH)

# Threads that spin while they wait for each other slow tiny tensors down manyfold on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE

# What the installed package depends on: a change here reinstalls (and recompiles) on the next command.
BUILD_INPUTS := pyproject.toml constraints.txt $(wildcard setup.py CMakeLists.txt) \
                $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
CXX_SOURCES  := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.PHONY: help demo test test-slow test-gpu triton36 aot aot36 bench build lint format typecheck venv clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       edit facts in the embedded model, evaluate, plot, undo"
	@echo "make test       every test that needs no GPU and is not marked slow"
	@echo "make test-slow  the slow tests            make test-gpu  the tests that need a CUDA device"
	@echo "make lint       ruff and clang-format     make typecheck mypy     make format  fix the style"
	@echo "make aot        compile every Triton kernel for sm_80 and sm_90, no GPU needed     make aot36  with Triton 3.6"
	@echo "make bench      the benchmarks            make build     compile the extension modules in place"
	@echo "make clean      remove .venv and everything built"
	@echo "PYTHON=/path/to/python3 chooses the interpreter (3.10 to 3.14); VENV=dir the environment."

demo: $(STAMP)
	$(BIN)/fastedit demo

test: $(STAMP)
	$(BIN)/pytest -m "not gpu and not slow"

# pytest exits with 5 when it ran no test; having no slow test is not a failure.
test-slow: $(STAMP)
	$(BIN)/pytest -m "slow and not gpu" || test $$? -eq 5

test-gpu: $(STAMP)
	$(BIN)/pytest -m gpu

# The Triton of the GPUs that torch 2.11 serves, beside the environment's own and never in it: the same gate again.
TRITON36 := build/triton36

$(TRITON36)/triton: | $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $(TRITON36) "triton==3.6.0" "numpy<2.4"

triton36: $(TRITON36)/triton

aot: $(STAMP)
	$(BIN)/python tests/aot_cases.py --slow

aot36: $(TRITON36)/triton
	PYTHONPATH=$(TRITON36):$(PYTHONPATH) $(BIN)/python tests/aot_cases.py --slow

bench: $(STAMP)
	$(BIN)/pytest bench --benchmark-enable --benchmark-only $(if $(FILTER),-k "$(FILTER)")

build: $(STAMP)
	$(BIN)/python setup.py build_ext --inplace

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
ifneq ($(CXX_SOURCES),)
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
endif

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
ifneq ($(CXX_SOURCES),)
	$(BIN)/clang-format -i $(CXX_SOURCES)
endif

typecheck: $(STAMP)
	$(BIN)/mypy

venv: $(STAMP)

# The first interpreter that runs and that the pinned releases support; PYTHON overrides the search, checked too.
$(STAMP): $(BUILD_INPUTS)
	@found=; \
	for python in $${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do \
	  if "$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null; then found="$$python"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  first="$${PYTHON:-python3}"; \
	  if command -v "$$first" >/dev/null; then is="$$("$$first" -V 2>&1)"; else is=missing; fi; \
	  echo "fastedit needs Python 3.10 to 3.14, and $$first is $$is: install one, or run make PYTHON=/path/to/python3" >&2; \
	  exit 2; \
	fi; \
	if ! [ -x $(BIN)/python ]; then \
	  echo "creating $(VENV) with $$("$$found" -V) and installing (a few minutes, once)"; \
	  "$$found" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; \
	fi
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info fastedit/*.so .pytest_cache .ruff_cache .mypy_cache
