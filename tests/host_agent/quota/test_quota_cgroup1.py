"""What only version 1 has: swappiness, memsw, descriptors and mutexes, nested cgroups."""

import errno
import os
import resource
import threading
from pathlib import Path

import pytest
from quota_rigs import HOLD, CgroupRig, readable, wait_for

from host_agent.quota.base import Part, VmQuota
from host_agent.quota.cgroup1 import Cgroup1Backend, Cgroup1Quota
from host_agent.quota.control_file import ControlFile
from host_agent.quota.errors import LimitRefused, NoRoom, QuotaError, QuotaUnavailable
from protocol.units import MIB

pytestmark = pytest.mark.effects


class Hooked:
    """A control file that calls back before or after each write, as another thread would come."""

    def __init__(self, file: ControlFile) -> None:
        self.file = file
        self.before = self.after = lambda value: None

    def write(self, value: int | str) -> None:
        self.before(value)
        self.file.write(value)
        self.after(value)

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


def hook_shrink(quota: VmQuota) -> Hooked:
    assert isinstance(quota, Cgroup1Quota)
    hooked = Hooked(quota._room._limit.memory)
    quota._room._limit.memory = hooked  # type: ignore[assignment]
    return hooked


def in_thread(call: object) -> None:
    thread = threading.Thread(target=call)  # type: ignore[arg-type]
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive(), "a raise waited for the shrink"


def swappiness(directory: Path) -> int:
    return int((directory / "memory.swappiness").read_text())


def test_swapping_is_off_while_room_is_made_and_back_afterwards(rig1: CgroupRig) -> None:
    quota = rig1.create(quota_mib=96)
    workload = quota.directory / Part.WORKLOAD
    nested = workload / "container"
    nested.mkdir()
    (workload / "memory.swappiness").write_text("37")
    (nested / "memory.swappiness").write_text("41")
    seen: list[tuple[int, int]] = []
    hook_shrink(quota).before = lambda _: seen.append((swappiness(workload), swappiness(nested)))
    quota.make_room(64 * MIB)
    assert set(seen) == {(0, 0)}
    assert (swappiness(workload), swappiness(nested)) == (37, 41)
    # Also where the kernel finds out that there is no room.
    tenant = rig1.start(nested / "cgroup.procs", HOLD, str(32 * MIB))
    wait_for(tenant.done, "32 MiB are held")
    quota._room._check_reclaimable = lambda *_: None  # type: ignore[attr-defined]
    seen.clear()
    with pytest.raises(NoRoom, match="kernel found nothing"):
        quota.make_room(16 * MIB)
    assert (0, 0) in seen
    assert (swappiness(workload), swappiness(nested)) == (37, 41)
    assert quota.read().workload_limit_bytes == 64 * MIB


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_raise_wins_over_a_shrink(rig1: CgroupRig, moment: str) -> None:
    quota = rig1.create(quota_mib=96)
    hooked = hook_shrink(quota)

    def raise_once(value: object) -> None:
        if value == 32 * MIB:
            in_thread(lambda: quota.raise_quota(112 * MIB))

    setattr(hooked, moment, raise_once)
    with pytest.raises(NoRoom, match="given memory"):
        quota.make_room(32 * MIB)
    assert quota.read().workload_limit_bytes == 112 * MIB


def test_a_raise_does_not_wait_for_writeback(rig1: CgroupRig) -> None:
    """The kernel holds the mutex of the shrink's descriptor during reclaim, not the raise's."""
    quota = rig1.create(quota_mib=256)
    tenant = rig1.fill_cache(quota, 192, "dirty")
    wait_for(tenant.done, "192 MiB are dirty")
    outcome: list[object] = []

    def shrink() -> None:
        try:
            outcome.append(quota.make_room(16 * MIB))
        except NoRoom as error:
            outcome.append(error)

    thread = threading.Thread(target=shrink)
    thread.start()
    wait_for(lambda: bool(outcome) or quota.read().workload_limit_bytes < 256 * MIB, "a first step")
    quota.raise_quota(272 * MIB)
    still_shrinking = not outcome
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert quota.read().workload_limit_bytes == 272 * MIB
    if still_shrinking:
        assert isinstance(outcome[0], NoRoom)


def test_the_deadline_is_kept_between_steps(rig1: CgroupRig) -> None:
    quota = rig1.create(quota_mib=128)
    tenant = rig1.fill_cache(quota, 96)
    wait_for(tenant.done, "96 MiB are cached")
    with pytest.raises(NoRoom, match="too long"):
        quota.make_room(32 * MIB, timeout_s=0)
    assert quota.read().workload_limit_bytes == 128 * MIB


def test_closing_stops_a_shrink(rig1: CgroupRig) -> None:
    quota = rig1.create(quota_mib=128)
    tenant = rig1.fill_cache(quota, 96)
    wait_for(tenant.done, "96 MiB are cached")
    closer = threading.Thread(target=quota.close)

    def close_once(_: object) -> None:
        if not closer.ident:
            closer.start()
            assert isinstance(quota, Cgroup1Quota)
            wait_for(lambda: quota._guard._closing, "close has begun")

    hook_shrink(quota).after = close_once
    with pytest.raises(NoRoom, match="let go"):
        quota.make_room(32 * MIB)
    closer.join(timeout=10)
    again = rig1.backend.open_existing("vm1", quota.overhead_bytes)
    assert again.read().workload_limit_bytes == 128 * MIB


def test_creation_is_all_or_nothing(rig1: CgroupRig) -> None:
    """Out of descriptors half way: a real failure, after all directories were made."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 4, hard))
    try:
        with pytest.raises(QuotaError, match="vm1"):
            rig1.create()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert list(rig1.backend.root.glob("vm*")) == []
    lowest_free_again = os.dup(0)
    os.close(lowest_free_again)
    assert lowest_free_again == lowest_free
    rig1.create()


def test_kills_in_nested_cgroups_count_even_when_these_are_gone(rig1: CgroupRig) -> None:
    quota = rig1.create(quota_mib=32)
    nested = quota.directory / Part.WORKLOAD / "container"
    nested.mkdir()
    tenant = rig1.start(nested / "cgroup.procs", HOLD, str(64 * MIB))
    wait_for(lambda: not tenant.alive(), "the kernel has killed")
    wait_for(lambda: quota.oom_kills_total == 1, "the kill is counted")
    nested.rmdir()
    assert quota.oom_kills_total == 1


def test_a_nested_cgroup_that_inherited_the_flag_is_released_too(rig1: CgroupRig) -> None:
    """It has a limit of its own, where nobody listens; the whole VM is let go all the same."""
    quota = rig1.create(quota_mib=96)
    event = quota.arm_dry_events()
    nested = quota.directory / Part.WORKLOAD / "container"
    nested.mkdir()
    (nested / "memory.limit_in_bytes").write_text(str(32 * MIB))
    tenant = rig1.start(nested / "cgroup.procs", HOLD, str(64 * MIB))
    wait_for(lambda: "under_oom 1" in (nested / "memory.oom_control").read_text(), "it hangs")
    assert not readable(event)
    assert quota.processes(Part.WORKLOAD) == (tenant.process.pid,)
    quota.let_kernel_decide()
    wait_for(lambda: not tenant.alive(), "the kernel has killed")


def test_a_starter_joins_by_writing_its_pid(rig1: CgroupRig) -> None:
    quota = rig1.create()
    driver = rig1.hold(quota, 8, Part.DRIVER)
    wait_for(driver.done, "8 MiB are held")
    assert quota.processes(Part.DRIVER) == (driver.process.pid,)
    assert quota.read().driver_usage_bytes >= 8 * MIB
    assert quota.driver_inode() == os.stat(quota.directory / "driver").st_ino


def test_no_directory_to_be_had_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(QuotaUnavailable, match="run as root") as caught:
        Cgroup1Backend(tmp_path / "no" / "hierarchy").prepare()
    assert "\n" not in str(caught.value)
    with pytest.raises(QuotaUnavailable, match="writable"):
        Cgroup1Backend(tmp_path / "plain").prepare()


def test_a_raise_that_finds_memsw_lowered_tries_again(rig1: CgroupRig) -> None:
    """The last write of a shrink that is about to give up comes between the two of the raise."""
    quota = rig1.create(quota_mib=64, swap_mib=32)
    if quota.read_swap() is None:
        pytest.skip("this kernel does not account for swap")
    assert isinstance(quota, Cgroup1Quota)
    memsw = quota.directory / Part.WORKLOAD / "memory.memsw.limit_in_bytes"
    hooked = Hooked(quota._workload_limit.memory)
    quota._workload_limit.memory = hooked  # type: ignore[assignment]
    late = iter([96 * MIB, 80 * MIB])
    hooked.before = lambda _: memsw.write_text(str(next(late))) if late.__length_hint__() else None
    quota.raise_quota(128 * MIB)
    assert late.__length_hint__() == 0
    assert quota.read().workload_limit_bytes == 128 * MIB
    assert int(memsw.read_text()) == 160 * MIB


@pytest.mark.parametrize("swap_mib", [0, 32])
def test_memsw_of_the_vm_moves_with_its_limit(rig1: CgroupRig, swap_mib: int) -> None:
    quota = rig1.create(quota_mib=96, overhead_mib=24, swap_mib=swap_mib)
    if quota.read_swap() is None:
        pytest.skip("this kernel does not account for swap")

    def assert_memsw_mib(limit_mib: int) -> None:
        assert quota.read().vm_limit_bytes == limit_mib * MIB
        memsw = (quota.directory / "memory.memsw.limit_in_bytes").read_text()
        assert int(memsw) == (limit_mib + swap_mib) * MIB

    assert_memsw_mib(120)
    quota.make_room(64 * MIB)
    assert_memsw_mib(120)
    quota.lower_quota(64 * MIB)
    assert_memsw_mib(88)
    quota.raise_quota(128 * MIB)
    assert_memsw_mib(152)


def test_a_limit_of_which_memsw_can_not_follow_is_put_back(rig1: CgroupRig) -> None:
    quota = rig1.create(quota_mib=96, overhead_mib=24, swap_mib=32)
    assert isinstance(quota, Cgroup1Quota)
    if quota._vm_limit.memsw is None:
        pytest.skip("this kernel does not account for swap")
    quota.make_room(64 * MIB)
    hooked = Hooked(quota._vm_limit.memsw)

    def refuse(value: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    hooked.before = refuse
    quota._vm_limit.memsw = hooked  # type: ignore[assignment]
    with pytest.raises(LimitRefused, match="driver"):
        quota.lower_quota(64 * MIB, timeout_s=0.02)
    assert quota.read().vm_limit_bytes == 120 * MIB
    assert swap_limit_mib(quota.directory) == 32


def swap_limit_mib(directory: Path) -> float:
    limits = (directory / name for name in ("memory.memsw.limit_in_bytes", "memory.limit_in_bytes"))
    memsw, memory = (int(path.read_text()) for path in limits)
    return (memsw - memory) / MIB
