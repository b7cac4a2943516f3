"""A driver sees how much of its guest's memory is in use, with the rights that it has."""

import contextlib
import sys

import pytest
from scenario_rig import SLOWNESS, Rig, spec, until

from protocol.units import MIB

pytestmark = pytest.mark.effects

SAMPLES_S = 150.0 * SLOWNESS
"""There are ten seconds between samples, and a machine may be busy with much else."""

BUSY = """
block = memoryview(bytearray(80 << 20))
for at in range(0, len(block), 4096):
    block[at] = 1
while True:
    for at in range(0, 16 << 20, 4096):
        block[at] = 1
    __import__("time").sleep(0.05)
"""


def test_the_driver_of_a_mock_vm_may_look(rig: Rig) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent:
            command = (sys.executable, "-c", BUSY)
            for name in ("a", "nested"):
                await agent.launch(spec(name, 128, command=command))
            # As an engine does, which puts a container into a cgroup of its own below.
            below = rig.cgroup / "nested" / "workload" / "3f0c"
            below.mkdir()

            def is_below() -> bool:
                for pid in rig.pids("nested", "workload"):
                    with contextlib.suppress(ProcessLookupError):
                        (below / "cgroup.procs").write_text(str(pid))
                left = rig.pids("nested", "workload")
                return not left and bool(rig.pids("nested", "workload/3f0c"))

            await until(is_below, "its processes below")

            def active_bytes(name: str) -> float:
                vitals = agent.vitals(name)
                if vitals is None or vitals.active_fraction is None:
                    return 0
                return 128 * MIB * vitals.active_fraction

            for name in ("a", "nested"):
                await until(
                    lambda name=name: 16 * MIB <= active_bytes(name) <= 128 * MIB,  # type: ignore[misc]
                    lambda name=name: f"a sample of {name}: {agent.vitals(name)}",  # type: ignore[misc]
                    deadline_s=SAMPLES_S,
                )

    rig.play(scenario, deadline_s=2 * SAMPLES_S)
