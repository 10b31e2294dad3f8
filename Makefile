# Everything that one does with this repository, by one word each. `make help` lists the words.

PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check
PYTEST := .venv/bin/python -m pytest
# Two processes, a file of tests each: most tests wait for processes that they start. docs/adr/0028-tests-in-two-processes.md
TOGETHER = OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile -m "not slow and not faults and not alone"
ALONE = $(PYTEST) -m "alone and not slow and not faults" $$(grep -rl --include='test_*.py' pytest.mark.alone tests)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo test test-quick faults slow soak check lint types imports format bench wheel clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# What .venv was made from. The stamp carries this sum in its name, so an unchanged tree costs one cksum.
INPUTS := pyproject.toml constraints.txt
STAMP := .venv/.installed-$(firstword $(shell cat $(INPUTS) | cksum))
# `make install PYTHON=python3.12` rebuilds .venv where it holds another version; a plain `make install` keeps what is there.
PYTHON_WAS_CHOSEN := $(if $(filter command environment,$(origin PYTHON)),yes)

REQUIRE_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
  echo "softlabels needs Python 3.11 or newer; '$(PYTHON)' answers: $$($(PYTHON) --version 2>&1 | head -n 1)" >&2; \
  echo "Name one that is: make install PYTHON=python3.12" >&2; exit 1; }

install: ## make .venv with the pinned versions (PYTHON=python3.12 chooses the interpreter); quick when nothing changed
ifeq ($(PYTHON_WAS_CHOSEN),yes)
	@$(REQUIRE_PYTHON)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != tuple(map(int, sys.argv[1].split("."))))' \
	  "$$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo 0.0)" 2>/dev/null \
	  || rm -f .venv/.installed-* .venv/bin/pip
endif
	@if [ -x .venv/bin/python ] && [ -e $(STAMP) ]; then exit 0; fi; $(MAKE) --no-print-directory $(STAMP)

$(STAMP):
	@$(REQUIRE_PYTHON)
	@rm -f .venv/.installed-*
	@if [ ! -x .venv/bin/python ] || [ ! -x .venv/bin/pip ]; then \
	  echo "install: making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear .venv; fi
	@echo "install: the pip that constraints.txt pins"
	@$(PIP) install -qq --upgrade pip -c constraints.txt
	@echo "install: the tools that build, check and test"
	@$(PIP) install -qq --group dev -c constraints.txt
	@echo "install: softlabels, editable, with the [demo] extra (torch is the large one: minutes on a slow line)"
	@$(PIP) install -qq --no-build-isolation -e '.[demo]' -c constraints.txt
	@touch $@
	@echo "install: done, .venv has $$(.venv/bin/python --version)"

demo: install ## the main job, real: train teachers on MNIST, store, serve, distil a student
	.venv/bin/softlabels demo

test: install ## the whole test suite, without what is marked slow or faults
	$(TOGETHER)
	$(ALONE)

test-quick: install ## the tests that need no server process, no wheel and no training
	$(TOGETHER) -q --ignore=tests/e2e --ignore=tests/packaging

faults: install ## kill writers, fail system calls, lose power, try every pair of layer and operation; minutes (needs strace)
	.venv/bin/python -m pytest -m faults tests/faults -q -rs

slow: install ## the exactness suites at full size: ranks, workers, kills of trainers, slow links; minutes
	.venv/bin/python -m pytest -m slow -q -rs --ignore=tests/soak --timeout=3000

soak: install ## a million requests, a million generated faults, a thousand slow readers, a bad network; hours
	.venv/bin/python -m pytest -m slow tests/soak tests/e2e/test_faulty_network.py -q -rs --timeout=28800

check: install ## everything that must hold: format, lint, types, import directions, tests
	@$(MAKE) --no-print-directory lint types imports test
	@echo "== all good"

lint: install ## ruff: format and rules
	@echo "== ruff format"
	@.venv/bin/ruff format --check .
	@echo "== ruff check"
	@.venv/bin/ruff check .

types: install ## mypy (strict) and pyright over the three packages
	@echo "== mypy"
	@.venv/bin/mypy
	@echo "== pyright"
	@.venv/bin/pyright

imports: install ## who may import whom
	@echo "== import-linter"
	@.venv/bin/lint-imports

format: install ## rewrite files into the house format
	.venv/bin/ruff check --fix-only --quiet .
	.venv/bin/ruff format .

# Every benchmarks/bench_NAME.py is `make bench-NAME`, and `make bench` runs them all.
BENCHES := $(patsubst benchmarks/bench_%.py,%,$(wildcard benchmarks/bench_*.py))
.PHONY: $(addprefix bench-,$(BENCHES))

bench: $(addprefix bench-,$(BENCHES)) ## run every benchmarks/bench_*.py; `make bench-NAME` runs one
	@[ -n "$(BENCHES)" ] || echo "bench: there are no benchmarks yet (benchmarks/bench_*.py)"

$(addprefix bench-,$(BENCHES)): bench-%: benchmarks/bench_%.py install
	.venv/bin/python -m benchmarks.bench_$*

wheel: install ## build the wheel into dist/
	.venv/bin/python -m build --wheel --no-isolation

clean: ## remove build outputs and caches; keeps .venv and runs/
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
