# The two commands of the README are `make demo` and `make test`; `make help` lists the others.
# Everything is installed into .venv, and again only when pyproject.toml has changed.

.DEFAULT_GOAL := help
.PHONY: help demo test test-vm soak lint bench bench-sim bench-vm clean

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
VM_ARGS ?=
# What depends on the cgroup version. Of the tests that need version 1 each says so itself. Of the
# scenarios those that take memory from end to end: emulated, each takes half a minute.
VM_TESTS ?= tests/host_agent/quota tests/host_agent/audit tests/host_agent/machines \
    tests/host_agent/test_watchdog.py tests/host_agent/test_doctor.py \
    tests/guest_driver/test_vitals.py tests/scenarios/test_inflate_deflate.py \
    tests/scenarios/test_runs_dry.py tests/scenarios/test_reservations.py \
    tests/scenarios/test_agent_dies.py::test_a_guest_that_runs_dry_without_an_agent_waits_for_the_next_one \
    tests/scenarios/test_delegation.py::test_the_agent_lives_inside_what_was_delegated
# With a Docker engine and systemd there; in such an order that both VMs have as much to do.
VM_ENGINE_TESTS ?= \
    tests/scenarios/test_under_systemd.py::test_the_agent_as_a_unit_with_delegation \
    tests/containers/test_attached.py::test_a_container_takes_its_place_and_its_driver_the_sibling \
    tests/scenarios/test_under_systemd.py::test_limits_at_the_top_outlast_a_reload \
    tests/containers/test_docker_launch.py::test_a_launch_waits_until_others_have_given \
    tests/containers/test_compose_version_2.py \
    tests/containers/test_systemd_driver.py

help:
	@echo 'make demo    see memory move between mock VMs (as root)'
	@echo 'make test    run the test suite (as root; what cannot run is named at the end)'
	@echo 'make test-vm run what depends on cgroup v2 in a VM that has it, and test the VM bed (as root)'
	@echo 'make soak    run the tests that take minutes'
	@echo 'make lint    ruff and mypy'
	@echo 'make bench   measure this machine'
	@echo 'make bench-sim measure how far the simulator goes on this machine'
	@echo 'make bench-vm measure memballoon beside virtio-balloon, each in a VM (as root)'
	@echo 'make clean   remove .venv and all caches'

demo: $(INSTALLED)
	@$(BIN)/balloon demo $(DEMO_ARGS)

test: $(INSTALLED)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# The image is built once (a minute or two). The bed's own tests come first: if it is broken, the
# suite in it says nothing.
test-vm: $(INSTALLED)
	@$(BIN)/python tests/vm/bed.py setup
	@$(BIN)/python tests/vm/bed.py build
	@$(BIN)/python tests/vm/bed.py build --image engine
	@MEMBALLOON_VM=1 $(BIN)/python -m pytest tests/vm
	@$(BIN)/python tests/vm/bed.py suite --timeout-s 1500 --memory-mib 2560 $(VM_ARGS) -- \
	    --durations=10 $(VM_TESTS) $(PYTEST_ARGS)
	@$(BIN)/python tests/vm/bed.py suite --image engine --timeout-s 900 --memory-mib 2560 $(VM_ARGS) \
	    -- --durations=10 $(VM_ENGINE_TESTS) $(PYTEST_ARGS)

soak: $(INSTALLED)
	@$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict

bench: $(INSTALLED)
	@$(BIN)/balloon bench $(BENCH_ARGS)

bench-sim: $(INSTALLED)
	@$(BIN)/python -m host_agent.simulator.scale $(BENCH_ARGS)

bench-vm: $(INSTALLED)
	@$(BIN)/python tests/vm/bed.py setup
	@$(BIN)/python tests/vm/bench_vm.py $(BENCH_ARGS)

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
