# SPDX-License-Identifier: Apache-2.0
# Everything here works from a bare clone with Python 3.11 or newer and make. `make help` lists the targets.

VENV   ?= .venv
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
ARGS   ?=
# How long each fuzz target runs under `make fuzz`.
FUZZ_SECONDS ?= 60

NATIVE_SOURCES := $(wildcard src/openkcm/_fast/*.pyx src/openkcm/_fast/*.pxd src/openkcm/_fast/*.h)
BOOTSTRAP      := VENV=$(VENV) scripts/bootstrap

# What lies on the caller's path must not stand in for what is tested here.
unexport PYTHONPATH PYTHONHOME
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo demo-regions test test-slow soak lint format native debug sanitize free-threaded fuzz bench bench-more wheel clean distclean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
	    printf '  make %-13s %s\n' "$$name" "$$text"; done

# --- the environment: each stamp stands for a step that is done ------------------------------------------------

$(VENV)/.base: pyproject.toml scripts/bootstrap
	$(BOOTSTRAP) system $(if $(filter demo demo-regions native,$(MAKECMDGOALS)),,tests)
	$(BOOTSTRAP) python pkcs11
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BOOTSTRAP) system tests
	$(BOOTSTRAP) python dev
	@touch $@

$(VENV)/.native: $(VENV)/.base setup.py $(NATIVE_SOURCES)
	@mkdir -p build
	@echo "Building the native layer (build/native.log)"
	@OPENKCM_BUILD=require $(BIN)/python setup.py build_ext --inplace >build/native.log 2>&1 \
	    || { cat build/native.log; exit 1; }
	@grep 'warning: .*\[-W' build/native.log || true
	@touch $@

# --- the two commands ------------------------------------------------------------------------------------------

demo: $(VENV)/.native  ## Two airlines' real flights under their own root keys; one pulls the plug
	@$(BIN)/openkcm demo $(ARGS)

demo-regions: $(VENV)/.native  ## Two regions under load on one screen: unplugged, killed, restarted
	$(BOOTSTRAP) python demo
	@$(BIN)/openkcm demo-regions $(ARGS)

# Tests that hold a promise under load, which a busy machine would break: they run alone.
ALONE := $(patsubst %,tests/adversarial/test_%.py,memory_scan starvation threads unplug)

# One backend's tests: two at a time, and then those that run alone.
define backend_tests
echo "== the $(2) backend"; \
OPENKCM_BACKEND=$(1) $(PYTEST) -n 2 $(3) $(ALONE:%=--ignore=%) \
    tests/unit tests/contract tests/fuzz tests/adversarial </dev/null || status=1; \
OPENKCM_BACKEND=$(1) $(PYTEST) $(filter-out $(patsubst --ignore=%,%,$(3)),$(ALONE)) </dev/null || status=1;
endef

# What has to hold whichever engine does AES-256-GCM.
CIPHER_TESTS := $(patsubst %,tests/unit/test_%.py,crypto vectors golden streams rows gateway) \
    tests/contract/test_backends_agree.py tests/fuzz

# Tests of what knows nothing of the backends run with the native one alone.
ONCE := $(patsubst %,--ignore=tests/adversarial/test_%.py,columns_side_by_side crash starvation unplug) \
    $(patsubst %,--ignore=tests/unit/test_%.py,bench bootstrap cli_demo cli_interrupts cli_unplug credentials \
    failover instruction_counts joining listening liveness readme refusals roots session_table)

# What knows nothing of the backends runs once: providers, stores, servers, and their faults. ARGS runs just what it names, on both backends.
test: $(VENV)/.native $(VENV)/.dev  ## The test suite: providers, stores and servers, then all else once on each backend
ifeq ($(ARGS),)
	@status=0; \
	echo "== roots of trust, stores and servers"; \
	$(PYTEST) -n 4 tests/roots tests/service </dev/null || status=1; \
	$(PYTEST) -n 2 tests/faults </dev/null || status=1; \
	$(call backend_tests,fast,native) \
	echo "== the native backend on OpenSSL alone"; \
	OPENKCM_BACKEND=fast OPENKCM_AES=evp $(PYTEST) -n 2 $(CIPHER_TESTS) </dev/null || status=1; \
	$(call backend_tests,python,Python,$(ONCE)) \
	exit $$status
else
	@status=0; \
	OPENKCM_BACKEND=fast $(PYTEST) $(ARGS) </dev/null || status=1; \
	OPENKCM_BACKEND=python $(PYTEST) $(ARGS) </dev/null || status=1; \
	exit $$status
endif

lint: $(VENV)/.dev  ## ruff check, ruff format --check and mypy --strict (src and bench)
	@status=0; \
	$(BIN)/ruff check --output-format concise . || status=1; \
	$(BIN)/ruff format --check --output-format concise . || status=1; \
	$(BIN)/mypy --strict src || status=1; \
	MYPYPATH=src:tests:bench $(BIN)/mypy --strict --follow-imports=silent $(wildcard bench/*.py bench/ours/*.py bench/cloop/*.py) || status=1; \
	exit $$status

format: $(VENV)/.dev  ## Let ruff sort the imports and set the layout
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

native: $(VENV)/.native  ## Build the native layer in place

test-slow: $(VENV)/.native $(VENV)/.dev  ## The tests that take minutes (a million XAES vectors and the like)
	OPENKCM_BACKEND=fast $(PYTEST) -m slow --timeout=0 $(ARGS) </dev/null

soak: $(VENV)/.native $(VENV)/.dev  ## Hours of load
	OPENKCM_BACKEND=fast $(PYTEST) -m soak --timeout=0 $(ARGS) </dev/null

# A build of its own below build/, which stands before src on the path.
define special_build
@echo "Building the native layer (build/$(1).log)"
@mkdir -p build
@$(2) OPENKCM_BUILD=require $(BIN)/python setup.py build --build-base build/$(1) --build-lib build/$(1)/lib \
    >build/$(1).log 2>&1 || { cat build/$(1).log; exit 1; }
@grep 'warning: .*\[-W' build/$(1).log || true
endef

debug: $(VENV)/.base $(VENV)/.dev  ## Unit tests on a build with Cython's checks and C assertions
	$(call special_build,debug,OPENKCM_DEBUG=1)
	PYTHONPATH=$(CURDIR)/build/debug/lib OPENKCM_BACKEND=fast \
	    $(PYTEST) tests/unit $(ARGS) </dev/null

# Leaks are not looked for: the interpreter itself keeps memory to its end. PYTHONMALLOC lets the sanitizer see each
# object's bounds.
sanitize: $(VENV)/.base $(VENV)/.dev  ## Unit and thread tests under the address and undefined-behaviour sanitizers
	$(call special_build,sanitize,OPENKCM_SANITIZE=1)
	PYTHONPATH=$(CURDIR)/build/sanitize/lib OPENKCM_BACKEND=fast OPENKCM_SANITIZE=1 \
	    PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libstdc++.so)" \
	    $(PYTEST) --timeout=1200 tests/unit $(wildcard tests/adversarial/test_*thread*.py) $(ARGS) </dev/null

# An environment of its own, below build/: the packages of the other one are for another interpreter.
free-threaded:  ## Threads and columns on an interpreter without a GIL: PYTHON=/path/to/python3.14t
	@$(or $(PYTHON),python3.14t) scripts/free_threaded.py $(ARGS)

fuzz: $(VENV)/.native $(VENV)/.dev  ## Each fuzz target for FUZZ_SECONDS (default 60)
	@set -e; for target in tests/fuzz/fuzz_*.py; do \
	    name=$$(basename "$$target" .py); name=$${name#fuzz_}; mkdir -p "build/fuzz/$$name"; \
	    echo "== $$name"; \
	    $(BIN)/python tests/fuzz/run.py "$$name" "build/fuzz/$$name" "tests/fuzz/corpus/$$name" \
	        -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=build/fuzz/ -print_final_stats=1 $(ARGS) </dev/null; done

bench: $(VENV)/.native $(VENV)/.dev  ## OpenKCM beside its peers, into docs/benchmarks (ARGS=--quick for a look)
	@$(BIN)/python bench $(ARGS)

# What concerns OpenKCM alone; a script each. Not with ARGS, which each would read as its own.
bench-more: $(VENV)/.native $(VENV)/.dev  ## Files, probes, neighbours, large vaults, key stores and subjects, timed
	@set -e; for script in tables probes isolation scale key_stores subjects; do \
	    echo "== $$script"; $(BIN)/python bench/$$script.py; done

wheel: $(VENV)/.dev  ## A wheel for this machine and an sdist, in dist/
	OPENKCM_BUILD=require $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python setup.py --quiet sdist

clean:  ## Remove what was built, and keep the environment
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .demo src/openkcm.egg-info
	rm -f src/openkcm/_fast/*.so src/openkcm/_fast/*.c src/openkcm/_fast/*.html $(VENV)/.native
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Remove the environment too
	rm -rf $(VENV)
