# Needs Linux, Python 3.10 to 3.13, make, and a package index that pip can reach.
#   make serve                start the server on the demo model
#   make test                 the quick tests: 7 minutes on 2 cores
#   make test-all             the slow ones: processes, builds, long runs
#   make gpu-rig              Paddle tensors in CUDA memory, with Paddle's CPU wheel, g++ and nvcc
#   make custom-ops           the operators in C++, for the Paddle of .venv; needs g++, and nvcc for
#                             CUDA kernels: without it Triton's serve
# Another interpreter: make PYTHON=python3.12 ...; flags of the server: make serve ARGS="--port 9000"
PYTHON ?= python3
ARGS ?=
# processes of `make test`; each may take 5 GB
WORKERS ?= 2
# each round of `make soak` draws new random cases; its other parts take the seed, so that another
# one gives others. All of it in some minutes: make soak ROUNDS=1 CASES=200 SECONDS=10 SIEGE=--quick \
# MODES='--requests 8 --longest 200'
ROUNDS ?= 20
CASES ?= 10000
SEED ?= 0
SECONDS ?= 600
SIEGE ?=
MODES ?= --requests 32 --longest 800
VENV := .venv
NUMPY1 := build/numpy1
DOCS := build/docs-venv
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: serve test test-all test-numpy1 test-oracle lint bench bench-gpu soak gpu-rig custom-ops docs
.DELETE_ON_ERROR:

serve: $(VENV)/.cpu
	$(BIN)/python -m fd_dsa.serve $(ARGS)

# -m in ARGS replaces the selection
test: $(VENV)/.dev
	@echo "about 7 minutes on 2 idle cores; left out: slow tests (make test-all), live parity with" \
	  "Hugging Face (make test-oracle), what needs a GPU"
	$(PYTEST) -m "not slow and not oracle" $(ARGS)

test-all: $(VENV)/.dev
	$(PYTEST) -m "slow and not oracle" $(ARGS)

# FastDeploy asks for no NumPy, so the plug-in is tested beside an old one too, which Python 3.13
# has no wheel of, and with the oldest Paddle
test-numpy1:
	"$(PYTHON)" -m venv $(NUMPY1)
	$(NUMPY1)/bin/python -m pip install --disable-pip-version-check --quiet --editable . \
	  numpy==1.26.4 paddlepaddle==3.3.0 setuptools hypothesis openai pytest pytest-timeout pytest-xdist
	$(NUMPY1)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  tests/fastdeploy_plugin tests/fakes $(ARGS)

test-oracle: $(VENV)/.oracle
	$(BIN)/python -m pytest -m oracle $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

bench: $(VENV)/.oracle
	$(BIN)/python -m benchmarks.engine_cpu $(ARGS)
	for name in server_overhead growth memory_use step_profile stream_gaps; do \
	  $(BIN)/python -m benchmarks.$$name || exit 1; done

# with the Python that holds torch for CUDA, not that of .venv
bench-gpu:
	$(PYTHON) -m benchmarks.gpu_run $(ARGS)

soak: $(VENV)/.dev
	for round in $$(seq $(ROUNDS)); do \
	  $(BIN)/python -m pytest -q -x tests/step tests/engine tests/v4_prepare $(ARGS) || exit 1; done
	$(BIN)/python -m tests.soak.histories --first $(SEED)0000 --histories $(CASES)
	$(BIN)/python -m tests.soak.fuzz --first $(SEED)00000 --requests $(CASES)0
	$(BIN)/python -m tests.soak.modes $(MODES) --seed $(SEED)
	FD_DSA_BATCH_INVARIANT=1 $(BIN)/python -m tests.soak.modes $(MODES) --seed $(SEED)
	$(BIN)/python -m tests.soak.streams --seconds $(SECONDS) --seed $(SEED)
	$(BIN)/python -m tests.soak.siege $(SIEGE)
	$(BIN)/python -m tests.soak.siege --large $(SIEGE)

gpu-rig: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu_rig $(ARGS)

custom-ops: $(VENV)/.cpu
	$(PIP) --no-build-isolation ./custom_ops
	@$(BIN)/python -W ignore -c 'from fd_dsa.custom_ops import build; \
	  print("fd_dsa_ops is", build().state, build().reason + ("" if build().kernels else \
	  "; the Triton kernels serve top-k and sparse MLA on GPUs"))'

# the builder needs Python 3.11 and nothing of the package, so it has a small environment of its own
docs: $(DOCS)/.made
	rm -rf build/pages build/docs && mkdir -p build/pages
	cp -r README*.md CHANGELOG.md CONTRIBUTING.md LICENSE docs build/pages
	$(DOCS)/bin/zensical build --strict --clean
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
$(VENV)/.cpu: EXTRAS := cpu
$(VENV)/.dev: EXTRAS := cpu,dev
$(VENV)/.oracle: EXTRAS := cpu,dev,oracle
$(VENV)/.cpu $(VENV)/.dev $(VENV)/.oracle: $(VENV)/.made pyproject.toml setup.py
	@echo "installing fd_dsa[$(EXTRAS)] into $(VENV)"
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
