# `make` lists the targets. Everything is installed into .venv, never into the system.

# The interpreter that .venv is made with; by default the first of CANDIDATES that is recent enough.
PYTHON ?=
CANDIDATES := python3.11 python3.12 python3.13 python3
# Passed on: to `python -m examples.demo` by `make demo`, to pytest by `make test`, and so on.
ARGS ?=
# What `make test` collects: doctests of the package, and the tests.
TESTS ?= rpg_kernels tests
# Whole files at a time, since some build things that all their tests share. `make test WORKERS=` is
# one process, which a debugger or `-x` may want.
WORKERS ?= --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
# How `make bench` measures what a call costs in Python.
MICRO := --benchmark-timer=time.process_time --benchmark-max-time=0.2 --benchmark-warmup=on \
	--benchmark-columns=median,iqr,rounds --benchmark-sort=fullname

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The environment of `make triton-check`, which has versions of its own.
CHECK := .venv-triton
CHECKER := tools/triton_check
# The environment of `make stand-in`, which has a CUDA build of torch.
CUDA := .venv-cuda
STAND_IN := tools/cuda_stand_in
NATIVE := CMakeLists.txt tools/build_backend.py $(wildcard cmake/* csrc/*/*)
INPUTS := pyproject.toml setup.py constraints-dev.txt rpg_kernels/_version.py $(NATIVE)

export PYTHON

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint bench report gpu-check triton-check stand-in FORCE

help: ## this list
	@echo 'make TARGET [ARGS="..."] [PYTHON=python3.12]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo ## install, train on real images, compare and draw (ARGS="--data PATH" for CIFAR-10)
	$(BIN)/python -m examples.demo $(ARGS)

test: $(VENV)/.dev ## run the tests and doctests (ARGS="-x -k law"; TESTS=tests/law)
	$(BIN)/python -m pytest $(WORKERS) --doctest-modules $(TESTS) $(ARGS)

lint: $(VENV)/.dev ## check style, format and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy rpg_kernels benchmarks/harness benchmarks/accuracy \
		benchmarks/paper examples/demo tools/triton_check tools/cuda_stand_in
	$(BIN)/clang-format --dry-run --Werror $(wildcard cmake/*.cpp csrc/*/* tests/*/*/*.cpp \
		tools/*/*.cpp tools/*/*.h)

bench: $(VENV)/.dev ## correctness, memory and speed, quick (ARGS="--suite full"; results in build/bench.json)
	$(BIN)/python -m benchmarks.harness --out build/bench.json $(ARGS)
ifeq ($(strip $(ARGS)),)
	$(BIN)/python -m benchmarks.harness --suite cpu --case bert-base --batch 1 16 --out build/bench_cpu.json
endif
	$(BIN)/python -m pytest -q benchmarks $(MICRO)

report: $(VENV)/.dev ## write tables and plots from benchmarks/results (ARGS=--check fails when stale)
	$(BIN)/python -m benchmarks.harness.report $(ARGS)
	$(BIN)/python -m benchmarks.paper report $(ARGS)

# Installs nothing: for a machine without a network, whose python3 has torch and pytest.
gpu-check: ## everything that needs a GPU, in seven minutes (OUT=DIR; ARGS="--parts tests micro")
	PYTHONPATH=. $(or $(PYTHON),python3) -m tools.gpu_check --out '$(or $(OUT),build/gpu-check)' $(ARGS)

triton-check: $(CHECK)/.ready ## the Triton kernels without a GPU: bf16, races, bounds (ARGS="linear.py mutants")
	$(CHECK)/bin/python -m tools.triton_check $(ARGS)

stand-in: $(CUDA)/.ready ## a command with a pretended GPU that computes nothing (ARGS="-- COMMAND")
	$(CUDA)/bin/python -m tools.cuda_stand_in $(ARGS)

# .venv is made anew when it cannot be trusted: it is missing, its interpreter is gone, an
# installation into it was interrupted, the checkout was copied or moved (scripts and the editable
# install hold absolute paths), or PYTHON now names another interpreter.
USABLE := $(shell [ -x $(BIN)/python ] && [ ! -e $(VENV)/.installing ] \
	&& [ "$$(cat $(VENV)/.checkout 2>/dev/null)" = "$$(pwd -P)" ] \
	&& { [ -z '$(PYTHON)' ] || [ "$$(cat $(VENV)/.python 2>/dev/null)" = '$(PYTHON)' ]; } && echo yes)
ifneq ($(USABLE),yes)
$(VENV)/.created: FORCE
endif

$(VENV)/.created:
	@recent='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if [ -n "$$PYTHON" ]; then set -- "$$PYTHON"; else set -- $(CANDIDATES); fi; \
	for python; do \
		"$$python" -c "$$recent" 2>/dev/null && break; \
		python=; \
	done; \
	if [ -z "$$python" ]; then \
		echo "No Python 3.11 or later: tried $$*." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi; \
	echo "Creating $(VENV) with $$python"; \
	rm -rf $(VENV); \
	if ! "$$python" -m venv $(VENV); then \
		rm -rf $(VENV); \
		echo "'$$python -m venv' failed. Debian and Ubuntu ship it apart from Python:" >&2; \
		echo "apt-get install python3-venv" >&2; \
		exit 1; \
	fi; \
	pwd -P > $(VENV)/.checkout; \
	echo "$$python" > $(VENV)/.python; \
	touch $@

# $(VENV)/.demo and $(VENV)/.dev: the package, editable, with the extra of that name.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.created $(INPUTS)
	@echo 'Installing rpg-kernels[$(patsubst .%,%,$(@F))] into $(VENV); the first time this downloads PyTorch'
	@touch $(VENV)/.installing
	$(PIP) install --quiet -c constraints-dev.txt -e '.[$(patsubst .%,%,$(@F))]'
	@rm $(VENV)/.installing
	@$(BIN)/python -c "from rpg_kernels import native; native.available() or \
		print('Without the native module:', native.why_not())"
	@touch $@

$(CHECK)/.ready: $(VENV)/.created $(wildcard $(CHECKER)/*.txt)
	@echo 'Installing ttsem, Triton and PyTorch into $(CHECK); the first time this downloads PyTorch'
	$(BIN)/python -m venv --clear $(CHECK)
	$(CHECK)/bin/python -m pip --disable-pip-version-check install --quiet -r $(CHECKER)/requirements.txt
	$(CHECK)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
		--ignore-requires-python -r $(CHECKER)/requirements-alone.txt
	@touch $@

$(CUDA)/.ready: $(VENV)/.created $(STAND_IN)/requirements.txt
	@echo 'Installing a CUDA build of PyTorch into $(CUDA); the first time this downloads it'
	$(BIN)/python -m venv --clear $(CUDA)
	$(CUDA)/bin/python -m pip --disable-pip-version-check install --quiet -r $(STAND_IN)/requirements.txt
	@touch $@

FORCE:
