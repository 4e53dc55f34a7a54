# Everything a newcomer needs: `make demo` and `make test` set up .venv by themselves.
#
#   PYTHON=python3.12   interpreter that .venv is made with
#   VENV=               use the environment of $(PYTHON) as it is: build in place, install nothing
#   TORCH=torch==2.13.0 what pip is asked for instead of the CPU build
#   ARGS=               arguments for the command that runs, e.g. make test ARGS="-k w4a16"

PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION = 2.13.0
ARGS ?=

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
RUN := PYTHONPATH=$(CURDIR) $(PYTHON)
PYTEST := PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest
LLMKERN := PYTHONPATH=$(CURDIR) $(PYTHON) -m llmkern
BIN :=
READY :=
else
PY := $(VENV)/bin/python
RUN := $(PY)
PYTEST := $(VENV)/bin/pytest
LLMKERN := $(VENV)/bin/llmkern
BIN := $(VENV)/bin/
READY := $(VENV)/.ready
endif

# Unless told otherwise, the CPU build: the one in pip's own places if there is one, else PyTorch's.
# The plain name would bring gigabytes of CUDA packages on Linux.
define install_torch
$(if $(TORCH),$(PY) -m pip install -q "$(TORCH)",\
  $(PY) -m pip install -q "torch==$(TORCH_VERSION)+cpu" 2>/dev/null || \
  $(PY) -m pip install -q "torch==$(TORCH_VERSION)" --index-url https://download.pytorch.org/whl/cpu)
endef

# What is built in place is for this machine alone: its instruction sets, and CUDA for its GPU, if it has
# one. The environment has the last word; `make wheel` and `pip install .` build for every machine.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
  sed 's/^9\.0$$/9.0a/' | grep -E '^([89]|[1-9][0-9])\.[0-9]a?$$' | sort -u | paste -sd ';' -)
define for_this_machine
LLMKERN_CPU_ISAS="$${LLMKERN_CPU_ISAS-native}" LLMKERN_BUILD_CUDA="$${LLMKERN_BUILD_CUDA-$(if $(GPUS),auto,0)}" \
  TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST-$(GPUS)}"
endef

# One worker per core, where the environment has pytest-xdist.
WORKERS = $(if $(shell $(PY) -c 'import xdist' 2>/dev/null && echo yes),-n logical --maxprocesses 8 --dist worksteal)

.PHONY: demo test test-fast wheel bench bench-peers real gpu lint sanitize cross clean build

demo: build
	$(LLMKERN) demo $(ARGS)

test: build
	$(PYTEST) $(WORKERS) $(ARGS)

# The inner loop: every op and module once, nothing that waits for a compiler or a whole run.
test-fast: build
	$(PYTEST) $(WORKERS) -m "not slow" $(ARGS)

# For other machines: every instruction set, and CUDA for every GPU that we build for, if nvcc is there.
wheel: $(READY)
	$(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

bench: build
	$(RUN) bench/run_all.py $(ARGS)

# Quantize, prune and compress a real pre-trained model, as far as a CPU allows; fetches 98 MB.
real: build
	$(RUN) scripts/real_model.py $(ARGS)

# The same beside bitsandbytes, and ggml built for this CPU, in an environment of their own.
bench-peers:
	$(MAKE) build VENV=.venv-peers
	bench/peers/install.sh .venv-peers
	$(MAKE) bench VENV=.venv-peers

gpu: export LLMKERN_BUILD_CUDA = 1
gpu: TORCH ?= torch==$(TORCH_VERSION)
gpu: build
	$(PYTEST) --require-gpu $(ARGS)
	$(RUN) scripts/sanitize_cuda.py
	$(RUN) bench/run_all.py --device cuda

lint: $(READY)
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	$(BIN)mypy

# The CPU kernels under AddressSanitizer and UBSan, on every instruction set that this machine has.
sanitize: SANITIZERS = -fsanitize=address,undefined
sanitize: $(READY)
	LLMKERN_BUILD_CUDA=0 LLMKERN_CPU_ISAS=native CXXFLAGS="$(SANITIZERS) -fno-sanitize-recover=undefined -O1 -g" \
	  LDFLAGS="$(SANITIZERS)" $(PY) setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONSAFEPATH=1 PYTHONPATH=build/sanitize/lib $(PY) -m pytest -q tests/ops \
	  -k "(cpu or not reference) and not opcheck and not compile" $(ARGS)

# The portable CPU kernels on aarch64, emulated: needs g++-aarch64-linux-gnu and qemu-user.
cross: $(READY)
	$(PYTEST) tests/cross $(ARGS)

# Incremental: ninja compiles what changed.
build: $(READY)
	@$(for_this_machine) $(PY) setup.py -q build_ext --inplace

$(VENV)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip "setuptools>=77" "pybind11>=2.13" ninja
	$(install_torch)
	$(for_this_machine) $(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv .venv-peers build dist *.egg-info llmkern/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf .benchmarks demo-out*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
