"""A VM that goes on inside a scope, as systemd makes them for containers."""

import errno
import os
import time
from pathlib import Path

import pytest
from quota_rigs import CgroupRig, FakeRig, ProcessTenant, readable, wait_for

from host_agent.quota.base import Part, VmQuota
from host_agent.quota.cgroup2_scope import CONTAINER
from host_agent.quota.cgroup_tree import kill_below, remove_tree
from host_agent.quota.control_file import ControlFile
from host_agent.quota.errors import QuotaError, VmGone
from protocol.units import MIB, PAGE_BYTES

SIZE_BYTES = 128 * MIB
REST = 'import os, signal; os.write(1, b"done"); signal.pause()'


def newcomer(rig: CgroupRig, scope: Path) -> ProcessTenant:
    """A scope with a process in it, made below a directory that hands memory down."""
    scope.mkdir()
    tenant = rig.start(scope / "cgroup.procs", REST)
    wait_for(tenant.done, "it is there")
    return tenant


def pids(directory: Path) -> list[int]:
    return [int(pid) for pid in (directory / "cgroup.procs").read_text().split()]


def enter(quota: VmQuota, scope: Path) -> None:
    quota.enter_scope(scope, 96 * MIB, 80 * MIB, SIZE_BYTES)


@pytest.mark.effects
def test_it_goes_on_there_with_its_limits_and_whoever_is_in_there(rig2: CgroupRig) -> None:
    quota = rig2.create(quota_mib=64)
    home, scope = quota.directory, rig2.backend.root / "docker-f.scope"
    events = quota.arm_dry_events()
    tenant = newcomer(rig2, scope)
    (scope / "cgroup.freeze").write_text("1")
    enter(quota, scope)

    assert quota.directory == scope / "vm1"
    assert not home.exists()
    container = quota.directory / Part.WORKLOAD / CONTAINER
    assert pids(container) == [tenant.process.pid]
    limits = [
        int((path / "memory.max").read_text())
        for path in (quota.directory, container.parent, container)
    ]
    assert limits == [96 * MIB + quota.overhead_bytes, 80 * MIB, SIZE_BYTES + PAGE_BYTES]
    # So an engine that joins the scope is sent to where its process 1 is.
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        (scope / "cgroup.procs").write_text(f"{os.getpid()}")

    (scope / "cgroup.freeze").write_text("0")
    quota.raise_quota(100 * MIB)
    reading = quota.read()
    assert reading.vm_limit_bytes == 100 * MIB + quota.overhead_bytes
    assert reading.workload_limit_bytes == 100 * MIB
    quota.make_room(64 * MIB)
    assert quota.read().workload_limit_bytes == 64 * MIB
    quota.dry_state()
    assert not readable(events)
    rig2.start(container / "cgroup.procs", "x = bytearray(80 << 20)")
    wait_for(lambda: readable(events, 0.1) and quota.dry_state().under_oom, "it to run dry")
    quota.let_kernel_decide()
    wait_for(lambda: quota.oom_kills_total == 1, "a kill")

    quota.protect(32 * MIB)
    assert (scope / "memory.min").read_text() == "0\n"
    assert quota.protected_bytes is None
    again = rig2.backend.open_existing("vm1", quota.overhead_bytes, directory=scope / "vm1")
    assert again.read() == quota.read()
    again.close()


@pytest.mark.effects
def test_its_scope_may_go_and_another_one_come(rig2: CgroupRig) -> None:
    """As an engine does it that starts a container again."""
    quota = rig2.create(quota_mib=64)
    scope = rig2.backend.root / "docker-f.scope"
    quota.arm_dry_events()
    newcomer(rig2, scope)
    enter(quota, scope)
    wait_for(lambda: not kill_below(scope), "it is dead")
    remove_tree(scope, time.monotonic() + 10)

    # Nobody is in it who could want memory, and it has not ended.
    assert not quota.dry_state().under_oom
    quota.let_kernel_decide()
    quota.rearm()
    with pytest.raises(VmGone):
        quota.raise_quota(100 * MIB)

    tenant = newcomer(rig2, scope)
    enter(quota, scope)
    assert pids(scope / "vm1" / Part.WORKLOAD / CONTAINER) == [tenant.process.pid]
    assert quota.read().workload_limit_bytes == 80 * MIB
    assert (scope / "vm1" / Part.WORKLOAD / "memory.high").read_text() != "max\n"
    quota.kill_all()
    quota.remove()
    assert not (scope / "vm1").exists()


def test_only_version_2_has_what_that_needs(tmp_path: Path) -> None:
    rig = FakeRig()
    with pytest.raises(QuotaError, match="only version 2"):
        enter(rig.create(), tmp_path)
    rig.down()


def test_a_control_file_goes_on_with_another_one(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1\n")
    other.write_text("22\n")
    file = ControlFile(one, writable=True)
    number = file.fileno()
    file.move_to(other)
    file.write(33)
    assert (file.fileno(), file.path, file.read()) == (number, other, "33\n")
    assert one.read_text() == "1\n"
    with pytest.raises(VmGone, match="is not there"):
        file.move_to(tmp_path / "none")
    assert file.read() == "33\n"
    file.close()
    with pytest.raises(VmGone, match="was closed"):
        file.move_to(one)
