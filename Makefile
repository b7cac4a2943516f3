# The two commands of the README are `make demo` and `make test`; `make help` lists the others.
# Everything is installed into .venv, and again only when pyproject.toml has changed.

.DEFAULT_GOAL := help
.PHONY: help demo test test-vm soak lint bench clean

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
VM_ARGS ?=
# What depends on the cgroup version. Of the tests that need version 1 each says so itself.
VM_TESTS ?= tests/host_agent/quota tests/host_agent/audit tests/host_agent/machines \
    tests/host_agent/test_watchdog.py tests/host_agent/test_doctor.py \
    tests/guest_driver/test_vitals.py tests/scenarios

help:
	@echo 'make demo    see memory move between mock VMs (as root)'
	@echo 'make test    run the test suite (as root; what cannot run is named at the end)'
	@echo 'make test-vm run what depends on cgroup v2 in a VM that has it, and test the VM bed (as root)'
	@echo 'make soak    run the tests that take minutes'
	@echo 'make lint    ruff and mypy'
	@echo 'make bench   measure this machine'
	@echo 'make clean   remove .venv and all caches'

demo: $(INSTALLED)
	@$(BIN)/balloon demo $(DEMO_ARGS)

test: $(INSTALLED)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# The image is built once (two minutes); a boot takes ten seconds.
test-vm: $(INSTALLED)
	@$(BIN)/python tests/vm/bed.py setup
	@$(BIN)/python tests/vm/bed.py build
	@$(BIN)/python tests/vm/bed.py run --timeout-s 2400 --memory-mib 3072 $(VM_ARGS) -- \
	    python -m pytest $(VM_TESTS) $(PYTEST_ARGS)
	@MEMBALLOON_VM=1 $(BIN)/python -m pytest tests/vm

soak: $(INSTALLED)
	@$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict

bench: $(INSTALLED)
	@$(BIN)/balloon bench $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find protocol guest_driver host_agent tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A candidate is run, not only looked for: a version manager's shim is on PATH for interpreters
# that aren't there. ensurepip is looked for because Debian ships it apart from python3.
$(INSTALLED): pyproject.toml
	@newest=; python=; \
	for candidate in python3.14 python3.13 python3.12 python3.11 python3; do \
	    $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    newest=$${newest:-$$candidate}; \
	    $$candidate -c 'import ensurepip, venv' 2>/dev/null || continue; \
	    python=$$candidate; break; \
	done; \
	if [ -z "$$newest" ]; then \
	    echo 'memballoon needs Python 3.11 or newer on PATH: apt-get install python3 python3-venv' >&2; \
	    exit 2; \
	fi; \
	if [ -z "$$python" ]; then \
	    echo "$$newest has no venv module: apt-get install $${newest}-venv" >&2; \
	    exit 2; \
	fi; \
	echo "setting up $(VENV) with $$python (once)"; \
	$$python -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --root-user-action=ignore -e '.[dev]'
	@touch $@
