# The whole interface: make app | test | bench | soak | rehearsal | screenshots. Each does all its own set-up in .venv.
#   PYTHON=...  the interpreter to build .venv with (3.11 or newer; found by itself when unset)
#   JOBS=3      test processes: page tests wait a lot, so one more than two cores is faster
#   MODEL=...   whose dimensions `make rehearsal` has: flux1-dev, flux2-klein, or tiny to try it
#   IMAGES=16   images that `make rehearsal` collects, and as many that it scores; at least 10
#   TESTS=...   what `make test` hands to pytest, e.g. TESTS=tests/sae

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory
.NOTPARALLEL:

PYTHON ?=
JOBS ?= 3
TESTS ?= tests
MODEL ?= flux1-dev
IMAGES ?= 16
VENV := .venv
PY := $(VENV)/bin/python

# A changed requirement changes the stamp's name, so the next target installs again and only then.
APP_STAMP := $(VENV)/.app-$(shell cat requirements.txt | cksum | tr ' ' '-')
DEV_STAMP := $(VENV)/.dev-$(shell cat requirements.txt requirements-dev.txt | cksum | tr ' ' '-')
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --progress-bar off --quiet

# Tests that are marked bench and run long; the others of that mark measure.
SOAK := $(wildcard tests/train/test_survival.py tests/ui/test_load.py)

# One thread a process: the processes are what fills the cores. CUDA stays out of tests that do not ask for it.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 GRADIO_ANALYTICS_ENABLED=False

.PHONY: help app test lint types tests browser bench soak rehearsal screenshots wheel venv

help: ## what each target does
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):[^#]*## ?/\1\t/' | expand -t 14

app: $(APP_STAMP) ## serve the page on this machine (Gradio's own environment variables apply)
	$(PY) app.py

test: lint types browser tests ## format, lint, types, import layers, every test

lint: $(DEV_STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/deno fmt --quiet --check --line-width 120 fluxsae/ui
	$(VENV)/bin/deno lint --quiet --rules-exclude=no-window,no-window-prefix fluxsae/ui
	$(VENV)/bin/lint-imports

types: $(DEV_STAMP)
	$(PY) -m mypy

browser: $(DEV_STAMP)
	@$(PY) -m tests.browser

tests: $(DEV_STAMP)
	$(TEST_ENV) $(PY) -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder --durations 15 -q $(TESTS)

bench: $(DEV_STAMP) ## measured speed: training against other tools, steering, scale (an hour)
	$(PY) -m train.benchmarks training
	$(PY) -m train.benchmarks collection
	$(PY) -m train.benchmarks feeding
	$(PY) -m train.benchmarks steering
	$(PY) -m train.benchmarks page
	$(PY) -m pytest -m bench --timeout 0 -s $(addprefix --ignore=,$(SOAK)) tests

soak: $(DEV_STAMP) ## long runs: killed at random and resumed, load on the page (an hour)
	$(PY) -m pytest -m bench --timeout 0 -s $(SOAK)

rehearsal: $(DEV_STAMP) ## every stage at a FLUX's true widths, random weights: seconds and memory (an hour, 16 GB)
	$(PY) -m train.benchmarks rehearsal --model $(MODEL) --n-images $(IMAGES)

screenshots: $(DEV_STAMP) browser ## pictures of every tab, for the README
	$(PY) -m tests.screenshots

wheel: $(DEV_STAMP) ## the wheel, in dist/
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

venv: $(DEV_STAMP) ## only the set-up

$(APP_STAMP): | $(PY)
	@echo "Installing what the app runs (5.7 GB, a few minutes on the first time)"
	$(PIP_INSTALL) -r requirements.txt
	@rm -f $(VENV)/.app-* && touch $@

$(DEV_STAMP): $(APP_STAMP)
	@echo "Installing what the tests need"
	$(PIP_INSTALL) -r requirements-dev.txt
	@rm -f $(VENV)/.dev-* && touch $@

$(PY):
	@python=; for candidate in $(if $(PYTHON),"$(PYTHON)",python3.12 python3.11 python3.13 python3 python); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    found=$$("$(or $(PYTHON),python3)" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "none that runs"); \
	    echo "fluxsae needs Python 3.11 or newer; found $(or $(PYTHON),python3): $$found."; \
	    echo "Install Python 3.12, or name one: make PYTHON=/path/to/python3.12 ..."; exit 1; \
	fi >&2; \
	echo "Building $(VENV) with $$python"; \
	"$$python" -m venv $(VENV) || { echo "The venv module is missing: on Debian and Ubuntu, apt-get install python3-venv." >&2; rm -rf $(VENV); exit 1; }
