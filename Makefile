# Needs Linux, Python 3.10 to 3.13, make, and a package index that pip can reach; `make` lists the
# targets. Another interpreter: make PYTHON=python3.12 ...
PYTHON ?= python3
ARGS ?=
# processes of `make test`; each may take 5 GB
WORKERS ?= 3
# each round of `make soak` draws new random cases; its other parts take the seed, so that another
# one gives others. All of it in some minutes: make soak ROUNDS=1 CASES=200 SECONDS=10 SIEGE=--quick \
# MODES='--requests 8 --longest 200'
ROUNDS ?= 20
CASES ?= 10000
SEED ?= 0
SECONDS ?= 600
SIEGE ?=
MODES ?= --requests 32 --longest 800
# a test file of each package, for `make smoke`; together 45 seconds of processor time
SMOKE = $(addprefix tests/,accuracy/test_scores.py attention/test_batching.py \
  chat/test_template_features.py client/test_questions.py command_line/test_report.py \
  device/test_resolve.py distributed/test_host.py engine/test_engine.py \
  fastdeploy_plugin/test_status.py models/test_checkpoint.py offline/test_llm.py \
  ops/test_operators.py processes/test_processes.py runner/test_step.py \
  serve/test_chat.py startup/test_memory.py \
  step/test_buffers.py triton_runtime/test_bound.py v4_model/test_config.py \
  v4_prepare/test_prepare.py test_doctor.py)
VENV := .venv
NUMPY1 := build/numpy1
DOCS := build/docs-venv
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# without compiled files each server that a test starts compiles the package again, for seconds
unexport PYTHONDONTWRITEBYTECODE

# a target that uses .venv keeps the Python that .venv was made with
ifneq ($(origin PYTHON),file)
ifneq ($(wildcard $(VENV)/.made),)
ifneq ($(filter-out help docs bench-gpu test-numpy1,$(MAKECMDGOALS)),)
$(info make: PYTHON=$(PYTHON) is not used, $(VENV) exists; rm -r $(VENV) first to use it)
endif
endif
endif

.DEFAULT_GOAL := help
.PHONY: help serve smoke test test-all test-numpy1 test-oracle lint bench bench-gpu soak gpu-rig custom-ops docs
.DELETE_ON_ERROR:

help: ## this list
	@echo "make TARGET [ARGS=...] [PYTHON=python3.12] [WORKERS=3]; .venv is made on first use"
	@sed -n 's/^\([a-z0-9-]*\):.* ## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

serve: $(VENV)/.serve ## start the server on the demo model; flags: make serve ARGS="--port 9000"
	$(BIN)/python -m fd_dsa.serve $(ARGS)

smoke: $(VENV)/.dev ## one quick test file of each package: under a minute on 2 cores
	$(PYTEST) -m "not slow and not oracle" $(SMOKE) $(ARGS)

# -m in ARGS replaces the selection
test: $(VENV)/.dev ## the quick tests: 7 minutes on 2 cores
	@echo "about 7 minutes on 2 idle cores; left out: slow tests (make test-all), live parity with" \
	  "Hugging Face (make test-oracle), what needs a GPU"
	$(PYTEST) -m "not slow and not oracle" $(ARGS)

test-all: $(VENV)/.all ## the slow tests: processes, builds, long runs
	$(PYTEST) -m "slow and not oracle" $(ARGS)

# FastDeploy asks for no NumPy, so the plug-in is tested beside an old one too, which Python 3.13
# has no wheel of, and with the oldest Paddle
test-numpy1: ## the plug-in beside NumPy 1.26 and the oldest Paddle
	"$(PYTHON)" -m venv $(NUMPY1)
	$(NUMPY1)/bin/python -m pip install --disable-pip-version-check --quiet --editable . \
	  numpy==1.26.4 paddlepaddle==3.3.0 setuptools 'triton>=3.3,<3.10' \
	  hypothesis openai pytest pytest-timeout pytest-xdist
	$(NUMPY1)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  tests/fastdeploy_plugin tests/fakes $(ARGS)

test-oracle: $(VENV)/.oracle ## live comparison with Hugging Face; installs torch
	$(PYTEST) -m oracle $(ARGS)

lint: $(VENV)/.dev ## style, types, spelling and prose of all files, subjects of new commits
	$(BIN)/pre-commit run --all-files --show-diff-on-failure
	$(BIN)/python tools/commit_subject.py --new

bench: $(VENV)/.oracle ## benchmarks on this CPU
	$(BIN)/python -m benchmarks.engine_cpu $(ARGS)
	for name in server_overhead growth step_profile stream_gaps; do \
	  $(BIN)/python -m benchmarks.$$name || exit 1; done

# with the Python that holds torch for CUDA, not that of .venv
bench-gpu: ## tests and benchmarks of the kernels on one GPU
	$(PYTHON) -m benchmarks.gpu_run $(ARGS)

soak: $(VENV)/.dev ## new random cases for hours; make soak ROUNDS=1 CASES=200 is short
	for round in $$(seq $(ROUNDS)); do \
	  $(BIN)/python -m pytest -q -x --hypothesis-profile soak tests/device \
	  tests/step tests/engine tests/v4_prepare $(ARGS) || exit 1; done
	$(BIN)/python -m tests.soak.histories --first $(SEED)0000 --histories $(CASES)
	$(BIN)/python -m tests.soak.host_tier --first $(SEED)0000 --histories $(CASES)
	$(BIN)/python -m tests.soak.captured --first $(SEED)0000 --histories $(ROUNDS)
	$(BIN)/python -m tests.soak.captured_v4 --first $(SEED)0000 --histories $(ROUNDS)
	$(BIN)/python -m tests.soak.fuzz --first $(SEED)00000 --requests $(CASES)0
	$(BIN)/python -m tests.soak.grammars --cases $(CASES)
	$(BIN)/python -m tests.soak.modes $(MODES) --seed $(SEED)
	FD_DSA_BATCH_INVARIANT=1 $(BIN)/python -m tests.soak.modes $(MODES) --seed $(SEED)
	FD_DSA_BATCH_INVARIANT=1 $(BIN)/python -m tests.soak.speculation --first $(SEED)0000 --groups $(ROUNDS)
	$(BIN)/python -m tests.soak.streams --seconds $(SECONDS) --seed $(SEED)
	$(BIN)/python -m tests.soak.siege $(SIEGE)
	$(BIN)/python -m tests.soak.siege --large $(SIEGE)

gpu-rig: $(VENV)/.dev ## Paddle tensors in CUDA memory, with Paddle's CPU wheel, g++ and nvcc
	$(BIN)/python -m pytest -m gpu_rig $(ARGS)

custom-ops: $(VENV)/.serve ## the operators in C++ for the Paddle of .venv; needs g++, for CUDA nvcc
	$(PIP) --quiet --no-build-isolation ./custom_ops
	@$(BIN)/python -W ignore -c 'from fd_dsa.custom_ops import build; \
	  print("fd_dsa_ops is", build().state, build().reason + ("" if build().kernels else \
	  "; the Triton kernels serve top-k and sparse MLA on GPUs"))'

# the builder needs Python 3.11 and reads the package without its dependencies, so it has a small
# environment of its own
docs: $(DOCS)/.made ## the documentation as a site, in build/docs
	$(DOCS)/bin/python tools/docs_site.py
	@echo "the pages are in build/docs: $(DOCS)/bin/python -m http.server -d build/docs"

$(DOCS)/.made: pyproject.toml
	@"$(PYTHON)" -c 'import tomllib' || { echo "make: the pages need Python 3.11 or later; name" \
	  "one: make docs PYTHON=python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(DOCS)
	"$(PYTHON)" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"] \
	  ["optional-dependencies"]["docs"], sep="\n")' > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install --disable-pip-version-check --quiet -r $(DOCS)/requirements.txt
	@touch $@

# a stamp is the extras that .venv holds; a newer pyproject.toml makes pip look again
$(VENV)/.serve: EXTRAS := cpu,structured
$(VENV)/.serve: SIZE := 0.25 GB to download, 1 GB on disk, one to ten minutes
$(VENV)/.dev: EXTRAS := cpu,dev
$(VENV)/.dev: SIZE := 0.7 GB to download, 3 GB on disk, two to fifteen minutes
$(VENV)/.all: EXTRAS := cpu,dev,integrations
$(VENV)/.all: SIZE := 0.8 GB to download, 3.4 GB on disk, two to fifteen minutes
$(VENV)/.oracle: EXTRAS := cpu,dev,oracle
$(VENV)/.oracle: SIZE := several GB, since torch's default wheel brings CUDA (docs/quickstart.md)
$(VENV)/.serve $(VENV)/.dev $(VENV)/.all $(VENV)/.oracle: $(VENV)/.made pyproject.toml setup.py
	@echo "installing fd_dsa[$(EXTRAS)] into $(VENV): $(SIZE)"
	$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.made:
	@command -v "$(PYTHON)" >/dev/null || { echo "make: $(PYTHON) not found; install Python" \
	  "3.10 to 3.13 or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "make: fd_dsa needs Python 3.10 to 3.13, $(PYTHON) is $$("$(PYTHON)" -V 2>&1);" \
	  "name another one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make" \
	  "virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv)" \
	  "or name another one: make PYTHON=/path/to/python3" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@
