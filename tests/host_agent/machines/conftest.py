"""Cgroups and directories of mock VMs, and the certainty that nothing is left of them."""

import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from machine_rig import PATIENCE_S, MachineRig, memory_root


@pytest.fixture
def rig() -> Iterator[MachineRig]:
    if os.geteuid():
        pytest.skip("needs root: namespaces and cgroups")
    name = f"mbtest-{secrets.token_hex(4)}"
    cgroup, base = memory_root() / name, Path("/var/tmp") / name
    made = MachineRig(cgroup, base)
    try:
        made.set_up()
        yield made
        wait_for(lambda: not made.processes(), "processes are left behind")
        assert name not in Path("/proc/self/mountinfo").read_text()
    finally:
        made.take_down()
        shutil.rmtree(base, ignore_errors=True)


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
