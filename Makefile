# One word for each daily task. Everything runs in .venv, which is made on first use and brought up
# to date when pyproject.toml or constraints.txt change. With PYTHON=python3 (an environment that has
# torch) no .venv is made and nothing is installed or downloaded: the extension is built in place.
#
#   TORCH_SPEC   what pip installs as torch in .venv ("torch", pinned in constraints.txt)
#   RANKS        processes of demo: by default one for each GPU, or two on the CPU
#   ARGS         further arguments of demo, test, test-all, bench, gpu-tune and of gpu-check's tests
#   OUT          where gpu-check, gpu-bench and gpu-tune write their results

TORCH_SPEC ?= torch
OUT ?= build/gpu-check

ifdef PYTHON
PY := $(PYTHON)
ENVIRONMENT :=
else
PY := .venv/bin/python
ENVIRONMENT := .venv/installed
endif
export PATH := $(if $(findstring /,$(PY)),$(abspath $(dir $(PY))):)$(PATH)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

BUILD := $(PY) setup.py --quiet build_ext --inplace

# Tests start processes by fork, which needs a parent without OpenMP threads.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest

CXX_FILES = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/native/*.cpp' 'tests/native/*.h' 'tests/native/*.hpp')

.PHONY: demo demo-modules test test-all test-modules test-amx test-aarch64 test-sanitizers \
	test-stress test-instructions test-older lint format bench gpu-check gpu-bench gpu-tune build clean

# What a target uses and an environment given by PYTHON may lack.
NEEDED = $(PY) -c 'import sys; from importlib.util import find_spec; \
	missing = [name for name in sys.argv[1:] if not find_spec(name)]; \
	remedy = "Remedy: pip install -c constraints.txt %s; or leave out PYTHON=" % " ".join(missing); \
	sys.exit("make $(1): not in this environment: %s\n%s" % (", ".join(missing), remedy) if missing else 0)'

# of GPUs a power of two, which the model's sizes can be shared by
RANKS ?= $(shell $(PY) -c 'import torch; \
	print(1 << (min(torch.cuda.device_count(), 8) or 2).bit_length() - 1)')
demo: demo-modules build
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node=$(RANKS) \
		examples/train_lm.py $(ARGS)
demo-modules: $(ENVIRONMENT)
	@$(call NEEDED,demo) numpy transformers tqdm

# These in two processes, where pytest-xdist is installed; the rest starts processes of its own.
ALONE := tests/kernels tests/integrations tests/test_docs.py tests/test_gpu_check.py \
	tests/test_packaging.py $(wildcard tests/test_benchmarks*.py tests/test_tuning*.py)
SIDE_BY_SIDE = $(shell $(PY) -c 'import xdist' 2>/dev/null && echo --numprocesses=2 --dist=worksteal)
TEST_MODULES := pytest numpy transformers triton expecttest matplotlib tqdm
test test-all: test-modules build
test-modules: $(ENVIRONMENT)
	@$(call NEEDED,test) $(TEST_MODULES)

test:
ifdef ARGS
	$(PYTEST) -m "not slow" $(ARGS)
else
	$(PYTEST) -m "not slow" $(SIDE_BY_SIDE) $(ALONE)
	$(PYTEST) -m "not slow" $(addprefix --ignore=,$(ALONE))
endif

test-all:
	$(PYTEST) $(ARGS)

# Of the tests of kernels those of the C++ ones: all but those of Triton, Gluon and the GPU.
NATIVE := -m "not slow and not gpu" -k "not (interpreter or triton or hopper or gluon or launches or \
	test_scaled_up or test_config_tables)" tests/kernels

# The level amx with its instructions emulated, on any processor with AVX-512 BF16: its products alone,
# under the sanitizers, and all tests of the CPU kernels on a copy of the packages with an extension
# of its own, for which three files are compiled again.
EMULATED := build/emulated
test-amx: $(ENVIRONMENT)
	$(PY) -m tests.native.levels --sanitize amx
	MOE_KERNELS_EMULATE_AMX=1 $(PY) setup.py --quiet build --build-base=build/emulated-base \
		--build-lib=$(EMULATED)
	@ln -sfn $(addprefix $(CURDIR)/,tests benchmarks csrc pyproject.toml) $(EMULATED)
	cd $(EMULATED) && MOE_KERNELS_CPU_CAPABILITY=amx PYTHONPATH=. $(PYTEST) $(NATIVE) $(ARGS)

# The C++ kernels under the address and the undefined behaviour sanitizer of GCC: those of every
# instruction set alone, then all in a build and a copy of the packages of their own. Building takes
# many minutes on two cores. Left out are tests of memory that the sanitizer has of its own kind, and
# one that forks beside threads that allocate, which its allocator is not made for.
SANITIZED := build/sanitized
test-sanitizers: export CXXFLAGS := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined \
	-fno-sanitize-recover=undefined
test-sanitizers: $(ENVIRONMENT)
	$(PY) -m tests.native.levels --sanitize default avx2 avx512 avx512_bf16
	$(PY) setup.py --quiet build --debug --build-base=build/sanitized-base --build-lib=$(SANITIZED)
	@ln -sfn $(addprefix $(CURDIR)/,tests benchmarks csrc pyproject.toml) $(SANITIZED)
	cd $(SANITIZED) && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		$(PYTEST) --capture=sys $(NATIVE) --ignore=tests/kernels/test_kept_buffers.py \
		--ignore=tests/kernels/test_decode_allocations.py \
		--deselect=tests/kernels/test_direct_calls.py::test_no_memory_is_the_error_of_python \
		--deselect=tests/kernels/test_threads.py::test_workers_of_a_data_loader_compute_too $(ARGS)

# The kernels of the level default on a 64-bit ARM, by a cross compiler and qemu-user, and on this
# processor: Debian has them as g++-aarch64-linux-gnu and qemu-user.
test-aarch64: $(ENVIRONMENT)
	$(PY) -m tests.native.levels default aarch64

# The ranks of the shared memory transport, those of cuda_ipc with their grids, and what ranks say of
# their failures by a group's store, as threads of one process, under the thread sanitizer and under the
# address and undefined behaviour sanitizers.
STRESS_SOURCES := tests/native/dispatch_stress.cpp \
	$(addprefix csrc/dispatch/shared_memory/,communicator.cpp heap.cpp system.cpp)
STORE_SOURCES := tests/native/store_stress.cpp \
	$(addprefix csrc/dispatch/,causes.cpp group_store.cpp meeting.cpp notices.cpp processes.cpp)
test-stress:
	@mkdir -p build
	@for sanitizers in thread address,undefined; do \
		compile="$${CXX:-g++} -std=c++20 -O1 -g -Wall -Wextra -fsanitize=$$sanitizers -Icsrc -pthread"; \
		$$compile $(STRESS_SOURCES) -o build/dispatch_stress && \
		$$compile tests/native/cuda_ipc_emulation.cpp -o build/cuda_ipc_emulation && \
		$$compile -Itests/native/torch_stand_ins $(STORE_SOURCES) -o build/store_stress && \
		for seed in 1 2 3; do \
			build/dispatch_stress 8 150 $$seed && build/cuda_ipc_emulation 40 $$seed && \
			build/store_stress 8 2 $$seed || exit 1; \
		done || exit 1; \
	done

# How many instructions the AVX2 kernels take for a small layer, against the record. Needs valgrind.
test-instructions: $(ENVIRONMENT)
	@$(PY) -m tests.native.count_instructions

# The built packages as a processor without AVX-512 runs them.
test-older: build
	@$(PY) -m tests.native.older_processor

lint: $(ENVIRONMENT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	clang-format --dry-run -Werror $(CXX_FILES)
	lint-imports --no-logo

format: $(ENVIRONMENT)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	clang-format -i $(CXX_FILES)

bench: build
	$(PY) -m benchmarks run fused_experts $(ARGS)

# On a machine with an NVIDIA GPU: PYTHON=python3 make gpu-check. Ends within BUDGET seconds, nine
# minutes, whatever happens, with what it has found by then: the build, without CUDA sources if they
# do not build, and Triton's kernels alone if nothing does; the main tables, each in a process of its
# own; the GPU's tests, to which TESTS seconds are left at least, until 30 seconds before the end. Time
# that is not taken goes to what comes after. What fails is said and counted, and the rest goes on.
# Most of the time goes into compiling kernels: that is done side by side before the tables, and the
# tests run so where pytest-xdist is installed. Ranks that share the GPU come last, in 80 seconds of
# that time: while they wait for each other by NCCL they keep it from others.
# looking for GPUs without starting the driver leaves processes free to fork
gpu-check gpu-bench gpu-tune: export PYTORCH_NVML_BASED_CUDA_CHECK ?= 1
BUDGET ?= 540
TESTS ?= 250
ONE_GPU := tests/parallel/test_one_gpu.py
gpu-check: export MOE_KERNELS_CUDA ?= on
gpu-check: $(ENVIRONMENT)
	@mkdir -p $(OUT); status=0; began=$$(date +%s); \
	left() { echo $$((began + $(BUDGET) - $$1 - $$(date +%s))); }; \
	has() { $(PY) -c "import $$1" 2> /dev/null; }; \
	timeout --kill-after=5 120 $(BUILD) > $(OUT)/build.log 2>&1 || { status=1; \
		echo "gpu-check: the build with MOE_KERNELS_CUDA=$$MOE_KERNELS_CUDA failed or took too" \
			"long, see $(OUT)/build.log; trying without CUDA sources" >&2; \
		MOE_KERNELS_CUDA=off timeout --kill-after=5 90 $(BUILD) > $(OUT)/build-off.log 2>&1 || { \
			echo "gpu-check: that failed too, see $(OUT)/build-off.log; going on with Triton's" \
				"kernels, without the extension" >&2; \
			export MOE_KERNELS_BACKEND=triton; }; }; \
	timeout --signal=INT --kill-after=5 $$(left $$(($(TESTS) + 20))) $(PY) -m benchmarks sweep main \
		--device cuda --out $(OUT) --compile 45 --limit $$(left $$(($(TESTS) + 30))) || status=1; \
	timeout --kill-after=5 20 $(PY) -m benchmarks report $(OUT) --tables \
		--out $(OUT)/report > /dev/null || status=1; \
	if has pytest; then \
		cores=$$(env -u OMP_NUM_THREADS nproc); \
		run() { \
			name=$$1; seconds=$$2; most=$$3; shift 3; options=$$(has xdist && echo \
				--numprocesses=$$((cores < most ? cores : most)) --dist=load --maxschedchunk=1); \
			options="$$options $$(has pytest_timeout && echo --timeout=75 --timeout-method=thread)"; \
			timeout --signal=INT --kill-after=20 $$seconds env --default-signal=INT $(PYTEST) \
				-m "gpu and not slow" $$options -p tests.progress --progress $(OUT)/$$name.jsonl \
				--continue-on-collection-errors --junitxml=$(OUT)/$$name.xml $(ARGS) "$$@" || \
				[ $$? -eq 5 ] || status=1; }; \
		run tests $$(left 110) 16 --first tests/kernels/test_gpu.py --ignore=$(ONE_GPU); \
		run ranks $$(left 30) 5 $(ONE_GPU); \
	else \
		echo "gpu-check needs pytest for the tests; the packages that they use are the extra" \
			"\"test\" of pyproject.toml." >&2; status=1; \
	fi; \
	tar -C $(OUT) -czf $(OUT:/=).tgz . || status=1; \
	exit $$status

# The full sweep: hours. Started again, it goes on where it was. LIMIT=SECONDS ends it earlier.
LIMIT ?= 86400
gpu-bench: build
	$(PY) -m benchmarks sweep full --device cuda --out $(OUT) --limit $(LIMIT) || status=$$?; \
	$(PY) -m benchmarks report $(OUT) --out $(OUT)/report > /dev/null || status=$$?; \
	exit $${status:-0}

# The device's table of tile shapes, an hour or more. Started again, it does the buckets left.
gpu-tune: build
	until $(PY) -m benchmarks tune --device cuda --limit $(LIMIT) --out $(OUT)/tiles.json $(ARGS); do \
		test -e $(OUT)/tiles.trying || exit 1; \
		echo "gpu-tune: a kernel did not end, or broke the device; again without it" >&2; \
	done

# CMake and ninja do only what is needed, so it is always run.
build: $(ENVIRONMENT)
	@$(BUILD)

.venv/installed: pyproject.toml constraints.txt
	@test -x .venv/bin/pip || { \
		for python in python3 python3.13 python3.12 python3.11; do \
			$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
			exec $$python -m venv .venv; \
		done; \
		echo "Python 3.11 or newer was not found on PATH." >&2; exit 1; }
	$(PY) -m pip install --quiet -c constraints.txt "$(TORCH_SPEC)" numpy setuptools cmake ninja pybind11
	$(PY) setup.py --quiet build_ext --inplace
	$(PY) -m pip install --quiet -c constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

clean:
	rm -rf build dist *.egg-info moe_kernels/_C.*.so
