"""The agent in a part of the hierarchy that was delegated to it, as a unit of systemd has it.

No systemd is here: these tests make and mark the unit's cgroup as systemd would. Version 2 alone.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from scenario_rig import BALLOON, PATIENCE_S, Rig, spec, until_blocking

from host_agent.quota.cgroup_tree import kill_below, remove_tree
from host_agent.quota.detect import detect

pytestmark = pytest.mark.effects

# Joins its unit before it becomes the agent, as systemd's child does.
JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


@pytest.fixture
def top(rig: Rig) -> Path:
    if rig.version != 2:
        pytest.skip("delegation is of version 2, and this machine's memory controller is in 1")
    return rig.cgroup.parent


@pytest.fixture
def unit(rig: Rig, top: Path) -> Iterator[Path]:
    """A unit's cgroup with the memory controller, marked as delegated; below a slice."""
    place = top / f"{rig.cgroup.name}.slice" / "test.service"
    place.mkdir(parents=True)
    for above in (top, place.parent):
        (above / "cgroup.subtree_control").write_text("+memory")
    os.setxattr(place, "user.delegate", b"1")
    try:
        yield place
    finally:
        # Before the rig looks what is left: nothing of the unit can be removed with somebody in it.
        for child in rig.children:
            child.kill()
            child.wait()
        until_blocking(lambda: not kill_below(place.parent), "all of the unit to be dead")
        remove_tree(place.parent, time.monotonic() + PATIENCE_S)


def started(rig: Rig, unit: Path, *arguments: str) -> "subprocess.Popen[str]":
    """A command of `balloon` as the unit's process."""
    child = subprocess.Popen(
        ["/bin/sh", "-c", JOIN, str(unit), sys.executable, "-c", BALLOON, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=rig.stderr_path(len(rig.children)).open("w"),
        text=True,
        start_new_session=True,
    )
    rig.children.append(child)
    return child


def config(rig: Rig, cgroup_root: str) -> str:
    path = rig.base / "agent.toml"
    path.write_text(
        f'[host]\npool = "256MiB"\nrun_dir = "{rig.run_dir}"\nstate_dir = "{rig.state_dir}"\n'
        f'cgroup_root = "{cgroup_root}"\n'
    )
    return str(path)


def outside(top: Path, unit: Path) -> dict[str, str]:
    """Everything that can be written in the cgroups beside and above the unit."""
    found = {}
    for directory in (top, *(path for path in top.rglob("*") if path.is_dir())):
        if directory == unit or unit in directory.parents:
            continue
        for name in ("cgroup.procs", "cgroup.subtree_control", "memory.min", "memory.max"):
            with suppress(OSError):
                found[str(directory / name)] = (directory / name).read_text()
    return found


def answers(rig: Rig) -> bool:
    with suppress(Exception), rig.client() as client:
        client.host()
        return True
    return False


def await_answer(rig: Rig, agent: "subprocess.Popen[str]") -> None:
    until_blocking(lambda: agent.poll() is not None or answers(rig), "the agent to answer")
    assert agent.poll() is None, rig.stderr()


def test_the_agent_lives_inside_what_was_delegated(rig: Rig, top: Path, unit: Path) -> None:
    root = "lab/vms"
    rig.cgroup = unit / root
    before = outside(top, unit)
    agent = started(rig, unit, "agent", "--config", config(rig, root))
    await_answer(rig, agent)
    assert (unit / "cgroup.procs").read_text() == ""
    assert str(agent.pid) in (unit / "agent" / "cgroup.procs").read_text().split()
    with rig.client() as client:
        client.launch(spec("a", 64))
    assert rig.quota("a", 64) == 64 << 20
    assert (rig.cgroup / "memory.min").read_text() == f"{16 << 20}\n"
    assert outside(top, unit).keys() == before.keys()
    changed = {path: value for path, value in outside(top, unit).items() if before[path] != value}
    # The top lists the processes of this test, which come and go.
    assert changed.keys() <= {str(top / "cgroup.procs")}
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(timeout=PATIENCE_S) == 0, rig.stderr()
    assert [path.name for path in unit.iterdir() if path.is_dir()] == ["agent"]
    rig.assert_nothing_left()


def test_an_agent_that_looks_again_finds_the_same_place(rig: Rig, unit: Path) -> None:
    """One that was restarted in its leaf, or that systemd has put there (DelegateSubgroup=)."""
    leaf = unit / "agent"
    leaf.mkdir()
    rig.cgroup = unit / "vms"
    agent = started(rig, leaf, "agent", "--config", config(rig, "vms"))
    await_answer(rig, agent)
    assert rig.cgroup.is_dir()
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(timeout=PATIENCE_S) == 0, rig.stderr()


def test_a_place_that_was_delegated_by_hand(rig: Rig, top: Path, unit: Path) -> None:
    """The agent is started from elsewhere and told where."""
    os.removexattr(unit, "user.delegate")
    rig.cgroup = unit / "vms"
    path = f"/{rig.cgroup.relative_to(top)}"
    agent = rig.balloon("agent", "--config", config(rig, path))
    await_answer(rig, agent)
    with rig.client() as client:
        client.launch(spec("a", 64))
    assert rig.cgroup.is_dir()
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(timeout=PATIENCE_S) == 0, rig.stderr()
    assert unit.is_dir()
    assert not rig.cgroup.exists()


@pytest.mark.parametrize("fault", ["no controller", "not alone"])
def test_a_place_that_will_not_do_is_said_in_one_line(rig: Rig, unit: Path, fault: str) -> None:
    lodger = subprocess.Popen(["sleep", "infinity"])
    try:
        if fault == "no controller":
            (unit.parent / "cgroup.subtree_control").write_text("-memory")
        else:
            (unit / "cgroup.procs").write_text(str(lodger.pid))
        agent = started(rig, unit, "agent", "--config", config(rig, "vms"))
        assert agent.wait(timeout=PATIENCE_S) == 2
    finally:
        lodger.kill()
        lodger.wait()
    said = rig.stderr().strip()
    assert "\n" not in said
    assert str(unit) in said
    assert "systemd-run -p Delegate=yes balloon agent" in said
    assert ("no memory controller" if fault == "no controller" else str(lodger.pid)) in said
    assert not (unit / "vms").exists()


def test_doctor_says_where_it_stands(rig: Rig, unit: Path) -> None:
    doctor = started(rig, unit, "doctor")
    told, _ = doctor.communicate(timeout=PATIENCE_S)
    assert f"version 2 at {unit}, delegated" in " ".join(told.split())


def test_a_path_of_several_names(rig: Rig, top: Path) -> None:
    """What is between is made with the root and goes with it, also where nothing was delegated."""
    path = f"{rig.cgroup.name}/lab/vms"
    quotas = detect(path)
    quotas.prepare()
    try:
        quota = quotas.create("a", 4096, 4096)
        quota.remove()
    finally:
        quotas.remove_root()
    assert not (top / rig.cgroup.name).exists()
