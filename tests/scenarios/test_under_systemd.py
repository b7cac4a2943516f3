"""The agent on a machine that systemd runs: in a unit of its own, and beside all units.

In the VM bed alone (its image `engine`): these tests reload the manager.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scenario_rig import BALLOON, Rig, spec, until_blocking
from test_delegation import answers, config

from protocol.units import MIB
from tests.conftest import missing_systemd

pytestmark = [
    pytest.mark.effects,
    pytest.mark.skipif(missing_systemd() is not None, reason=f"{missing_systemd()}"),
]

TOP = Path("/sys/fs/cgroup")
START_S = 300.0
"""Emulated, an agent's imports alone take half a minute of a processor that is its own."""

RELOAD = ("systemctl", "daemon-reload")


def call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout.strip()


@pytest.fixture
def unit(rig: Rig) -> Iterator[str]:
    name = f"{rig.cgroup.name}.service"
    try:
        yield name
    finally:
        # What it is good for is over: it need not be there any more.
        subprocess.run(["systemctl", "stop", name], capture_output=True, check=False)
        subprocess.run(["systemctl", "reset-failed", name], capture_output=True, check=False)


def limits(cgroup: Path) -> dict[str, str]:
    return {
        str(path): path.read_text()
        for name in ("memory.max", "memory.min", "cgroup.subtree_control")
        for path in sorted(cgroup.rglob(name))
    }


def test_the_agent_as_a_unit_with_delegation(rig: Rig, unit: str) -> None:
    """As the README has it: systemd-run -p Delegate=yes balloon agent."""
    place = TOP / "system.slice" / unit
    rig.cgroup = place / "vms"
    agent = ("agent", "--config", config(rig, "vms"))
    call(
        "systemd-run", f"--unit={unit}", "-p", "Delegate=yes", sys.executable, "-c", BALLOON, *agent
    )
    # Looked at by what costs nothing: emulated, a command takes a second from the agent's start.
    socket_path = rig.run_dir / "control.sock"
    until_blocking(lambda: socket_path.exists() or not place.exists(), "its socket", START_S)
    until_blocking(lambda: answers(rig) or not place.exists(), "the agent to answer")
    pid = call("systemctl", "show", "-P", "MainPID", unit)
    assert pid in (place / "agent" / "cgroup.procs").read_text().split(), journal(unit)
    assert (place / "cgroup.procs").read_text() == ""
    with rig.client() as client:
        assert client.launch(spec("a", 64)).connected
        before = limits(place)
        assert rig.quota("a", 64) == rig.limit("a", "workload") == 64 * MIB
        call(*RELOAD)
        assert limits(place) == before
        client.stop("a")
    call("systemctl", "stop", unit)
    assert call("systemctl", "show", "-P", "Result", unit) == "success", journal(unit)
    assert not place.exists()


def test_limits_at_the_top_outlast_a_reload(rig: Rig) -> None:
    """The agent's root is no unit: systemd has it in no book, and leaves it alone."""

    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(spec("a", 64, container="somebodys"))
            before = limits(rig.cgroup)
            assert rig.limit("a", "workload") == 64 * MIB
            call(*RELOAD)
            call("systemd-run", "--wait", "true")
            assert limits(rig.cgroup) == before

    rig.play(scenario)


def journal(unit: str) -> str:
    return call("journalctl", "--no-pager", "-u", unit)
