"""The demonstration as a user runs it: to its end, interrupted, and killed."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import scenario_rig
from scenario_rig import PATIENCE_S, Rig, until_blocking

pytestmark = pytest.mark.effects

END_DEADLINE_S = 3 * PATIENCE_S

IN_MAIN = "from host_agent.cli import main; open({path!r}, 'w').close(); main()"
"""Before that the interrupt is Python's own business."""


def cgroups_of(child: "subprocess.Popen[str]") -> list[Path]:
    """The demonstration's own root: its name is in its watchdog's command line."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"PPid:\t{child.pid}\n" in status.read_text():
                words = status.with_name("cmdline").read_text().split("\0")
                if "--root" in words:
                    found.append(Path(words[words.index("--root") + 1]))
        except OSError:
            continue
    return found


def watchdogs_root(child: "subprocess.Popen[str]", rig: Rig) -> Path:
    """The root that its watchdog watches, once it has one; the rig clears it away at the end."""
    until_blocking(lambda: cgroups_of(child), "its watchdog")
    (rig.cgroup,) = cgroups_of(child)
    return rig.cgroup


@pytest.mark.parametrize("turn", range(4))
def test_interrupted_at_any_moment_it_removes_everything(
    rig: Rig, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_s = random.uniform(0.0, 2.0 if turn < 2 else 5.0)
    print(f"after {after_s} s")
    begun = rig.base / "begun"
    monkeypatch.setattr(scenario_rig, "BALLOON", IN_MAIN.format(path=str(begun)))
    child = rig.balloon("demo", "--scale", "small")
    until_blocking(begun.exists, "the command to begin")
    if turn >= 2:
        watchdogs_root(child, rig)
    end_s = time.monotonic() + after_s
    while time.monotonic() < end_s:
        for root in cgroups_of(child):
            rig.cgroup = root
        time.sleep(0.01)
    # A terminal sends it to the whole group.
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=END_DEADLINE_S) in (130, -signal.SIGINT)
    assert "Traceback" not in rig.stderr()
    rig.assert_nothing_left()


@pytest.mark.parametrize("after_s", [0.0, 3.0])
def test_killed_the_watchdog_removes_everything(rig: Rig, after_s: float) -> None:
    child = rig.balloon("demo", "--scale", "small")
    root = watchdogs_root(child, rig)
    time.sleep(after_s)
    child.kill()
    child.wait()
    until_blocking(lambda: not root.exists(), "the watchdog to remove all", END_DEADLINE_S)
    rig.assert_nothing_left()


def test_to_its_end(rig: Rig) -> None:
    child = rig.balloon("demo", "--scale", "small", "--json")
    output, _ = child.communicate(timeout=240)
    assert child.returncode == 0, rig.stderr() + output
    outcome = json.loads(output)
    assert outcome["holds"]
    assert outcome["oom_kills"] == 0
    assert outcome["highest_sum_of_limits_bytes"] <= outcome["pool_bytes"]
    assert len(outcome["acts"]) == 5
    assert not any(act["failures"] for act in outcome["acts"])
