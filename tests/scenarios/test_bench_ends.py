"""The bench interrupted and killed: its plain loop has a cgroup too, and that goes as well."""

import signal
import subprocess
from pathlib import Path

import pytest
from scenario_rig import PATIENCE_S, Rig, until_blocking

pytestmark = pytest.mark.effects

END_DEADLINE_S = 3 * PATIENCE_S


def measuring(rig: Rig) -> "subprocess.Popen[str]":
    """A bench whose plain loop is in its cgroup, below the root of the bench's own agent."""
    roots = Path(rig.cgroup).parent
    before = set(roots.glob("memballoon-bench-*"))
    child = rig.balloon("bench", "--scale", "small")

    def loops() -> list[Path]:
        found = set(roots.glob("memballoon-bench-*")) - before
        for root in found:
            rig.cgroup = root  # cleared away by the rig, whatever happens
        return [procs for root in found for procs in root.glob("plain-*/cgroup.procs")]

    until_blocking(lambda: any(procs.read_text() for procs in loops()), "its plain loop")
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_removes_everything(rig: Rig, number: signal.Signals) -> None:
    child = measuring(rig)
    child.send_signal(number)
    assert child.wait(timeout=END_DEADLINE_S) == 130
    # At most the line's end that click puts below a ^C, where that comes when all is removed.
    assert rig.stderr().strip() == ""
    assert not rig.cgroup.exists()
    rig.assert_nothing_left()


def test_killed_the_watchdog_removes_everything(rig: Rig) -> None:
    child = measuring(rig)
    child.kill()
    child.wait()
    until_blocking(lambda: not rig.cgroup.exists(), "the watchdog to remove all", END_DEADLINE_S)
    rig.assert_nothing_left()
