# Everything one needs, in a venv of the project's own (.venv). Needs Python 3.11+ and a C++20 compiler.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup demo demo-quick test bench bench-quick gpu-check gpu-bench lint format docs sanitize slice clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup: $(READY)  ## make .venv, install the locked requirements, build the package

$(READY): requirements.lock pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"realm_fast needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]} (set PYTHON=...)")'
	@command -v $${CXX:-c++} >/dev/null || { echo "realm_fast needs a C++20 compiler; none was found (set CXX=...)"; exit 1; }
	@echo "== setting up $(VENV): locked requirements, then the package with its native module"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $(READY)

demo: $(READY)  ## the main job on real text, from corpus to report (runs/demo/run/report.html)
	$(BIN)/realm-fast demo --out runs/demo

demo-quick: $(READY)  ## the same, much smaller: under three minutes
	$(BIN)/realm-fast demo --quick --fresh --out runs/demo-quick

test: $(READY)  ## all tests
	$(BIN)/python -m pytest

bench: $(READY)  ## the benchmarks: the machine's limits, then each kernel beside its peers
	$(BIN)/realm-fast bench roofline
	$(BIN)/realm-fast bench mips
	$(BIN)/realm-fast bench marginal

bench-quick: $(READY)  ## small benchmark cases under pytest-benchmark
	$(BIN)/python -m pytest benchmarks --benchmark-only

lint: $(READY)  ## ruff, clang-format, mypy on the public surface
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inl' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/mypy

format: $(READY)  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inl' 'csrc/*.cu' 'csrc/*.cuh')

gpu-check: $(READY)  ## correctness on a GPU: pytest -m gpu, compute-sanitizer where it is
	$(BIN)/python -m realm_fast.benchmarks.gpu.check

gpu-bench: $(READY)  ## ours beside its peers on a GPU
	$(BIN)/python -m realm_fast.benchmarks.gpu.bench

sanitize: $(READY)  ## native tests under address+undefined and thread sanitizers, and with AVX-512 emulated
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tests/native/run_sanitizers.sh

slice:  ## every file of one kernel: make slice S=mips_topk
	@test -n "$(S)" || { echo "which one? make slice S=mips_topk"; exit 2; }
	@git ls-files | grep -E '(^|/)(test_|bench_)?$(S)([/._]|$$)'

clean:  ## remove builds, caches and .venv
	rm -rf build $(VENV) realm_fast/_native*.so *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
