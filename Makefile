# Everything here needs a POSIX shell, Python 3.10 or newer, a C and C++ compiler, and GNU make 3.81 or newer.
PYTHON ?= python3
ACCEL ?=
MODEL ?=
BUCKETS ?=
ARGS ?=

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.ready
# Without ACCEL an environment keeps the accelerators that it was set up with.
SAVED_ACCEL := $(shell cat $(VENV)/.accel 2>/dev/null)
WANTED_ACCEL := $(if $(ACCEL),$(ACCEL),$(SAVED_ACCEL))
# An environment is of use only where it was made: its scripts name their interpreter by its full path.
MADE_HERE := $(shell test -x $(VENV_PYTHON) && test "`cat $(STAMP) 2>/dev/null`" = "`pwd -P`" && echo yes)

PIP_INSTALL := $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check
PIP_FAILED := echo "error: pip could not install what abcli needs; its own words are above" >&2; \
  echo "check the network and pip's configuration, then run make setup again" >&2; exit 1

ifneq ($(MADE_HERE)/$(WANTED_ACCEL),yes/$(SAVED_ACCEL))
OUTDATED := outdated
endif

.DEFAULT_GOAL := help
.PHONY: help setup model chat serve test peers dist check-dist docs check lint format-check types layers bench format clean distclean outdated

help: ## show this list
	@echo "usage: make TARGET [VARIABLE=value ...]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "variables:"
	@echo "  PYTHON=python3.12    the Python to make the environment with (3.10 or newer)"
	@echo "  ACCEL=cuda,rpc       cpu, blas, cuda, hip, metal, rpc, sycl, vulkan; kept until another is given"
	@echo "  MODEL=FILE BUCKETS=6 for make chat and make serve, else as abcli chat takes them"
	@echo "  ARGS='...'           handed on by chat, serve, test, peers and bench"

setup: $(STAMP) ## make .venv with everything in it; the first time builds llama.cpp (minutes)

$(STAMP): pyproject.toml constraints.txt scripts/build_native.py $(OUTDATED)
	@if test -f $(STAMP) && test "`cat $(STAMP)`" != "`pwd -P`"; then rm -rf $(VENV); fi
	@if ! $(VENV_PYTHON) -m pip --version >/dev/null 2>&1; then \
	  command -v "$(PYTHON)" >/dev/null || { \
	    echo "error: $(PYTHON) is not there"; \
	    echo "install Python 3.10 or newer, or name one with PYTHON=/path/to/python3"; exit 1; } >&2; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: Python 3.10 or newer is needed, but $(PYTHON) is `$(PYTHON) --version 2>&1`"; \
	    echo "install a newer one and name it, for example PYTHON=python3.12"; exit 1; } >&2; \
	  "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "error: $(PYTHON) comes without venv or ensurepip"; \
	    echo "on Debian and Ubuntu: apt install python3-venv"; exit 1; } >&2; \
	  "$(PYTHON)" -m venv --clear $(VENV); \
	fi
	@$(PIP_INSTALL) 'pip>=22' || { $(PIP_FAILED); }
	@$(VENV_PYTHON) scripts/build_native.py --accel "$(WANTED_ACCEL)"
	@$(PIP_INSTALL) -c constraints.txt -e '.[dev]' || { $(PIP_FAILED); }
	@printf '%s\n' "$(WANTED_ACCEL)" > $(VENV)/.accel
	@pwd -P > $(STAMP)

model: $(STAMP) ## fetch the default model into models/ (94 MiB, once)
	@$(VENV_PYTHON) scripts/fetch_default_model.py

ifeq ($(MODEL),)
chat: model
else
chat: $(STAMP)
endif
chat: ## chat with the default model, or with MODEL=FILE
	@$(VENV_PYTHON) scripts/at_the_terminal.py $(VENV)/bin/abcli chat $(if $(MODEL),"$(MODEL)") $(if $(BUCKETS),--buckets $(BUCKETS)) $(ARGS)

ifeq ($(MODEL),)
serve: model
else
serve: $(STAMP)
endif
serve: ## serve the default model, or MODEL=FILE, to clients of OpenAI's protocol
	@$(VENV)/bin/abcli serve $(if $(MODEL),"$(MODEL)") $(if $(BUCKETS),--buckets $(BUCKETS)) $(ARGS)

# Ray is large and not to be had everywhere; where it is missing the tests that need it are skipped, and say so.
test: model ## run the tests
	@$(VENV_PYTHON) -c 'import ray' 2>/dev/null || $(PIP_INSTALL) -c constraints.txt -e '.[ray]' || \
	  echo "Ray cannot be installed here: the tests of abcli batch --ray will be skipped" >&2
	@$(VENV_PYTHON) scripts/fetch_public_templates.py || \
	  echo "the tests that read the public chat templates will be skipped" >&2
	@$(VENV_PYTHON) -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

peers: dist model ## test with the tools of others, in an environment of their own (900 MB)
	@$(VENV_PYTHON) scripts/run_peers.py $(ARGS)

dist: $(STAMP) ## build what is published, a source archive and a wheel with man pages, into dist/
	@rm -rf dist
	@$(VENV_PYTHON) scripts/make_man_pages.py
	@$(VENV_PYTHON) -m uv build --quiet --python $(VENV_PYTHON) --out-dir dist

check-dist: dist model ## install what is published with pip, pipx and uv, and let it answer
	@$(VENV_PYTHON) scripts/check_packages.py

docs: $(STAMP) ## build the pages of docs/ as a site, into build/site
	@$(VENV_PYTHON) -c 'import mkdocs' 2>/dev/null || $(PIP_INSTALL) -c constraints.txt -e '.[docs]' || { $(PIP_FAILED); }
	@NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --quiet
	@echo "the site is build/site/index.html"

check: lint format-check types layers ## lint, formatting, types and the order of the layers

lint: $(STAMP)
	@$(VENV_PYTHON) -m ruff check .

format-check: $(STAMP)
	@$(VENV_PYTHON) -m ruff format --check .

types: $(STAMP)
	@$(VENV_PYTHON) -m mypy

layers: $(STAMP)
	@$(VENV_PYTHON) -m pytest -q tests/test_layers.py

bench: model ## measure speed and memory on this machine
	@$(VENV)/bin/abcli bench $(ARGS)

format: $(STAMP) ## let ruff format the code and fix what it can
	@$(VENV_PYTHON) -m ruff format .
	@$(VENV_PYTHON) -m ruff check --fix .

clean: ## remove caches and build products
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find abcli tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "left alone: $(VENV), models/*.gguf and the built wheels in your cache directory"

distclean: clean ## clean, and remove .venv and .venv-peers
	@rm -rf $(VENV) .venv-peers
	@echo "removed: $(VENV), .venv-peers"
