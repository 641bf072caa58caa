# Two commands on a fresh machine with Python 3.11, 3.12 or 3.13, make and a compiler:
#   make quickstart   the main job: a student learns from a teacher, two ranks, about two minutes
#                     (ENGINE=sglang: rollouts by the real SGLang server, whose environment is made first;
#                     TEACHER=server: the teacher on such a server; TEACHER=dedicated: on two ranks of its own;
#                     TEACHER=file: it scores the data's responses once, and the student learns from these scores)
#   make test         the whole test suite, about an hour
# and besides: make check (lint, types, and all tests without ranks, servers or other processes: two to four minutes, the
#   first time a minute longer, because mypy then reads torch),
#   make test-megatron (the tests that touch Megatron-core, 5 minutes: for another version of it),
#   make faults (causes every fault of docs/faults.md and prints the table), make chaos (a run of 200 steps with ten random
#   faults, and the same command after each),
#   make verify (prints measured errors), make lint, make format, make clean, and
#   make sglang-env   the SGLang server's own environment, for machines without a GPU (docs/sglang.md)
#   make experiment   the whole way of an experiment with tiny models: data, responses, TrOPD, benchmark, table
#   make benchmark-env   evalscope's own environment (docs/benchmarks.md: 1 minute, 1.2 GB), and
#   make test-benchmarks   the tests that need it, which make test leaves out where it was not made
# Each makes its own environment in .venv first; SGLang has one of its own, because it pins other versions.
# The environment is made with the newest Python of these that runs; PYTHON chooses another, VENV another place (with
# PYTHON=python3.12 VENV=.venv-3.12 it stands beside the first).  PIP_FLAGS are pip's own options, for example an index
# that has CPU-only torch.
PYTHONS := python3.13 python3.12 python3.11
VENV ?= .venv
SGLANG_VENV ?= .venv-sglang
BENCHMARK_VENV ?= .venv-benchmark
ENGINE ?= embedded
TEACHER ?= colocated
PIP_FLAGS ?=
# Processes that share the tests.  A test file, and all tests on SGLang servers, stay in one of them.
WORKERS ?= 2
BIN := $(VENV)/bin
IN_WORKERS := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

runs = $(shell $(1) -c "" 2>/dev/null && echo $(1))
minor = $(shell $(1) -c "import sys; print(sys.version_info.minor)" 2>/dev/null)
MADE := $(wildcard $(BIN)/python)
ifndef PYTHON
  PYTHON := $(or $(MADE),$(firstword $(foreach python,$(PYTHONS),$(call runs,$(python)))))
endif
MINOR := $(call minor,$(PYTHON))
ifeq (,$(filter 11 12 13,$(MINOR)))
  $(error PYTHON is "$(PYTHON)", which is not or does not run as one of $(PYTHONS); set PYTHON)
endif
ifneq (,$(MADE))
  ifneq ($(MINOR),$(call minor,$(MADE)))
    $(error $(VENV) was made with Python 3.$(call minor,$(MADE)), PYTHON is 3.$(MINOR): remove $(VENV), or set VENV too)
  endif
endif
CONSTRAINTS := requirements/constraints-python3.$(if $(filter 11,$(MINOR)),11,12).txt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c $(CONSTRAINTS)
SGLANG_INSTALL := $(SGLANG_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)

# Files whose tests print a measured error.
VERIFY := model_parity vocab_parallel vocab_parallel_main_grad objectives_head head_memory kernels training_layouts \
	context_parallel context_slices training_methods training_oracle training_resume training_experts expert_gradients \
	teacher placement_layouts several_teachers student_topk weights_planned sglang_servers sglang_planned

# Files whose tests touch Megatron-core, or what it changes for others.
MEGATRON := platform attention kernels model_parity vocab_parallel vocab_parallel_main_grad vocab_parallel_teacher teacher \
	training_layouts training_bf16 training_resume same_run convert_checkpoint expert_gradients sglang_loader \
	train_command training_resume_experts training_release training_sleep training_virtual_stages context_parallel \
	megatron_flags dedicated

.PHONY: quickstart experiment faults chaos test test-megatron test-benchmarks check sglang-env benchmark-env lint format verify clean

quickstart: $(VENV)/.runtime $(if $(filter sglang server,$(ENGINE) $(TEACHER)),$(SGLANG_VENV)/.ready)
	$(BIN)/python tools/quickstart.py --engine $(ENGINE) --teacher $(TEACHER) --sglang-python $(SGLANG_VENV)/bin/python $(ARGS)

experiment: $(VENV)/.runtime $(SGLANG_VENV)/.ready $(BENCHMARK_VENV)/.ready
	$(BIN)/python tools/run_experiment.py --sglang-python $(SGLANG_VENV)/bin/python \
		--evalscope-python $(BENCHMARK_VENV)/bin/python $(ARGS)

test: $(VENV)/.test $(SGLANG_VENV)/.ready
	$(BIN)/python -m pytest $(IN_WORKERS) --durations 25 --durations-min 10 $(ARGS)

test-megatron: $(VENV)/.test $(SGLANG_VENV)/.ready
	$(BIN)/python -m pytest $(IN_WORKERS) $(addprefix tests/test_,$(addsuffix .py,$(MEGATRON))) $(ARGS)

test-benchmarks: $(VENV)/.test $(SGLANG_VENV)/.ready $(BENCHMARK_VENV)/.ready
	$(BIN)/python -m pytest -n 0 tests/test_benchmark_command.py tests/test_benchmark_server.py $(ARGS)

check: lint
	$(BIN)/python -m pytest -q -m "not slow" $(IN_WORKERS) $(ARGS)

faults: $(VENV)/.test $(SGLANG_VENV)/.ready
	$(BIN)/python -m tools.faults.run $(ARGS) -- $(IN_WORKERS)

chaos: $(VENV)/.runtime
	$(BIN)/python -m tools.faults.chaos $(ARGS)

verify: $(VENV)/.test $(SGLANG_VENV)/.ready
	$(BIN)/python -m pytest -q $(addprefix tests/test_,$(addsuffix .py,$(VERIFY))) $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements/runtime.txt $(CONSTRAINTS) pyproject.toml | $(VENV)/bin/python
	$(INSTALL) -r requirements/runtime.txt
	$(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

# Triton, for its interpreter, stays out of site-packages where torch did not bring it: torch and Megatron look for it
# there.
$(VENV)/.test: requirements/test.txt $(VENV)/.runtime
	$(INSTALL) -r requirements/test.txt
	$(BIN)/python -c "import triton" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --upgrade \
			--target $(VENV)/triton triton==3.8.0  # not the one that comes with a torch for CUDA, so no -c
	touch $@

sglang-env: $(SGLANG_VENV)/.ready

# sglang's own requirements are for CUDA; requirements/sglang-cpu.txt has what it imports without a GPU, and
# tools/sglang_cpu the packages that it imports but does not call; one takes the place of the Triton that comes with a
# torch for CUDA.
$(SGLANG_VENV)/.ready: requirements/sglang-cpu.txt $(wildcard tools/sglang_cpu/*.toml tools/sglang_cpu/*/*.py)
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_INSTALL) -r requirements/sglang-cpu.txt
	$(SGLANG_INSTALL) --no-deps sglang==0.5.23 xgrammar==0.2.7
	$(SGLANG_VENV)/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes triton 2>/dev/null
	$(SGLANG_INSTALL) --no-deps --no-build-isolation --force-reinstall ./tools/sglang_cpu
	rm -rf tools/sglang_cpu/build tools/sglang_cpu/*.egg-info
	$(SGLANG_VENV)/bin/python -c "import sglang.launch_server"
	touch $@

benchmark-env: $(BENCHMARK_VENV)/.ready

$(BENCHMARK_VENV)/.ready: requirements/benchmark-evalscope.txt
	$(PYTHON) -m venv $(BENCHMARK_VENV)
	$(BENCHMARK_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r $<
	$(BENCHMARK_VENV)/bin/python -c "import evalscope"
	touch $@

clean:
	rm -rf $(VENV) $(SGLANG_VENV) $(BENCHMARK_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
