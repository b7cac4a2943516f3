"""One contract for all back ends: the same tests on real cgroups and on the fake."""

import errno
import time
from pathlib import Path

import pytest
from quota_rigs import DEADLINE_S, CgroupRig, Rig, readable, wait_for

from host_agent.quota.base import Part, QuotaBackend, VmQuota
from host_agent.quota.errors import LimitRefused, NoRoom, QuotaError, StillBusy, VmExists, VmGone
from protocol.units import MIB

HELD_S = 2.0
"""Six processes that version 2 only slows are killed before that, even under emulation."""


def workload_limit_mib(quota: VmQuota) -> float:
    return quota.read().workload_limit_bytes / MIB


def usage_mib(quota: VmQuota) -> float:
    return quota.read().workload_usage_bytes / MIB


def test_the_contract_speaks_of_every_method() -> None:
    """Those of swap are in test_quota_swap.py."""
    files = (Path(__file__), Path(__file__).with_name("test_quota_swap.py"))
    suite = "".join(path.read_text(encoding="utf-8") for path in files)
    methods = VmQuota.__abstractmethods__ | QuotaBackend.__abstractmethods__
    assert len(methods) > 20
    assert {name for name in methods if f".{name}" not in suite} == set()


def test_preparing_twice_is_no_error(rig: Rig) -> None:
    rig.create()
    rig.backend.prepare()
    assert rig.backend.names() == ("vm1",)


def test_both_limits_are_in_force_before_anybody_is_there(rig: Rig) -> None:
    quota = rig.create(quota_mib=96, overhead_mib=24)
    reading = quota.read()
    assert reading.vm_limit_bytes == 120 * MIB
    assert reading.workload_limit_bytes == 96 * MIB
    assert quota.processes(Part.WORKLOAD) == quota.processes(Part.DRIVER) == ()
    assert rig.backend.names() == ("vm1",)


def test_a_second_vm_of_that_name_is_refused_and_the_first_left_alone(rig: Rig) -> None:
    quota = rig.create(quota_mib=96)
    with pytest.raises(VmExists, match="vm1"):
        rig.create(quota_mib=32)
    assert workload_limit_mib(quota) == 96


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "x" * 64, "a\n", "ü"])
def test_names_that_would_leave_the_root_are_refused(rig: Rig, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        rig.create(name=name)
    assert rig.backend.names() == ()


def test_a_limit_is_whole_pages(rig: Rig) -> None:
    with pytest.raises(ValueError, match="pages"):
        rig.backend.create("vm1", 96 * MIB + 1, 0)
    quota = rig.create()
    for change in (quota.raise_quota, quota.make_room, quota.lower_quota, quota.raise_workload):
        with pytest.raises(ValueError, match="pages"):
            change(64 * MIB + 1)


def test_raising_the_quota_raises_both(rig: Rig) -> None:
    quota = rig.create(quota_mib=96, overhead_mib=24)
    quota.raise_quota(128 * MIB)
    assert quota.read().vm_limit_bytes == 152 * MIB
    assert quota.read().workload_limit_bytes == 128 * MIB


def test_a_raise_may_leave_room_for_frames_on_their_way(rig: Rig) -> None:
    quota = rig.create(quota_mib=96, overhead_mib=24)
    quota.make_room(64 * MIB)
    quota.raise_quota(128 * MIB, workload_bytes=80 * MIB)
    assert quota.read().vm_limit_bytes == 152 * MIB
    assert workload_limit_mib(quota) == 80
    quota.raise_quota(128 * MIB, workload_bytes=72 * MIB)
    assert workload_limit_mib(quota) == 80
    with pytest.raises(ValueError, match="above quota"):
        quota.raise_quota(128 * MIB, workload_bytes=129 * MIB)


def test_a_raise_never_lowers(rig: Rig) -> None:
    quota = rig.create(quota_mib=96)
    with pytest.raises(ValueError, match="lower"):
        quota.raise_quota(64 * MIB)
    assert quota.read().workload_limit_bytes == 96 * MIB


def test_room_not_used_is_given_back(rig: Rig) -> None:
    quota = rig.create(quota_mib=96)
    quota.make_room(64 * MIB)
    quota.raise_workload(80 * MIB)
    assert workload_limit_mib(quota) == 80
    quota.raise_workload(72 * MIB)
    assert workload_limit_mib(quota) == 80  # a raise never lowers
    with pytest.raises(ValueError, match="above quota"):
        quota.raise_workload(97 * MIB)
    quota.raise_quota(96 * MIB)
    assert workload_limit_mib(quota) == 96


def test_room_in_an_empty_guest(rig: Rig) -> None:
    quota = rig.create(quota_mib=96)
    quota.make_room(32 * MIB)
    assert workload_limit_mib(quota) == 32
    quota.make_room(64 * MIB)  # nothing to do: W is lower already
    assert workload_limit_mib(quota) == 32


def test_no_room_in_anonymous_memory(rig: Rig) -> None:
    quota = rig.create(quota_mib=96)
    tenant = rig.hold(quota, 64)
    wait_for(tenant.done, "64 MiB are held")
    with pytest.raises(NoRoom, match="ask for less"):
        quota.make_room(48 * MIB)
    assert workload_limit_mib(quota) == 96
    assert tenant.alive()
    assert quota.oom_kills_total == 0


def test_clean_cache_makes_room(rig: Rig) -> None:
    quota = rig.create(quota_mib=96)
    tenant = rig.fill_cache(quota, 64)
    wait_for(tenant.done, "64 MiB are cached")
    assert usage_mib(quota) > 60
    quota.make_room(32 * MIB)
    assert workload_limit_mib(quota) == 32
    assert usage_mib(quota) <= 32
    assert tenant.alive()


@pytest.mark.parametrize("armed", [False, True])
def test_a_guest_that_streams_through_a_file_makes_room(rig: Rig, armed: bool) -> None:
    quota = rig.create(quota_mib=96)
    tenant = rig.stream(quota, 160)
    wait_for(tenant.done, "the file is there")
    wait_for(lambda: usage_mib(quota) > 88, "the guest is full of cache")
    if armed:
        quota.arm_dry_events()
    for limit_mib in (80, 64, 48):
        quota.make_room(limit_mib * MIB)
        assert workload_limit_mib(quota) == limit_mib
        assert not quota.dry_state().under_oom
    assert tenant.alive()
    assert quota.oom_kills_total == 0


def test_a_hopeless_request_leaves_the_cache_alone(rig: Rig) -> None:
    quota = rig.create(quota_mib=128)
    tenants = [rig.hold(quota, 64), rig.fill_cache(quota, 32)]
    wait_for(lambda: all(tenant.done() for tenant in tenants), "memory is in use")
    before_mib = usage_mib(quota)
    with pytest.raises(NoRoom):
        quota.make_room(32 * MIB)
    assert usage_mib(quota) > before_mib - 8
    assert workload_limit_mib(quota) == 128


def test_the_vms_limit_follows_a_claim(rig: Rig) -> None:
    quota = rig.create(quota_mib=96, overhead_mib=24)
    with pytest.raises(LimitRefused, match="make room first"):
        quota.lower_quota(64 * MIB)
    assert quota.read().vm_limit_bytes == 120 * MIB
    quota.make_room(64 * MIB)
    quota.lower_quota(64 * MIB)
    assert quota.read().vm_limit_bytes == 88 * MIB


def test_the_vms_limit_stays_while_the_driver_still_holds_the_pages(rig: Rig) -> None:
    quota = rig.create(quota_mib=96, overhead_mib=24)
    quota.make_room(32 * MIB)
    driver = rig.hold(quota, 64, Part.DRIVER)
    wait_for(driver.done, "the driver holds 64 MiB")
    with pytest.raises(LimitRefused, match="driver"):
        quota.lower_quota(32 * MIB)
    assert quota.read().vm_limit_bytes == 120 * MIB
    assert driver.alive()


def test_a_dry_guest_hangs_until_it_is_given_memory(rig: Rig) -> None:
    quota = rig.create(quota_mib=48)
    event = quota.arm_dry_events()
    assert not readable(event)
    tenant = rig.hold(quota, 80)
    assert readable(event, DEADLINE_S)
    wait_for(lambda: quota.dry_state().under_oom, "the guest is dry")
    assert tenant.alive()
    assert not tenant.done()
    quota.raise_quota(128 * MIB)
    wait_for(tenant.done, "the guest goes on")
    state = quota.dry_state()
    assert not state.under_oom
    assert state.kills_total == 0
    assert not readable(event)


@pytest.mark.parametrize("processes", [1, 6])
def test_a_dry_guest_is_held_for_as_long_as_it_is_looked_at(rig: Rig, processes: int) -> None:
    """Nobody has anything to give: it waits, and longer than a slowed guest would last."""
    quota = rig.create(quota_mib=64)
    quota.arm_dry_events()
    tenant = rig.hold(quota, 120, processes=processes)
    wait_for(lambda: quota.dry_state().under_oom, "the guest is dry")
    until_s = time.monotonic() + HELD_S
    while time.monotonic() < until_s:
        time.sleep(0.02)
        assert quota.dry_state().under_oom
    assert tenant.alive()
    assert not tenant.done()
    with pytest.raises(NoRoom):
        quota.make_room(60 * MIB)
    assert quota.dry_state().under_oom
    quota.raise_quota(192 * MIB)
    wait_for(tenant.done, "the guest goes on")
    assert tenant.alive()
    assert quota.oom_kills_total == 0


def test_a_dry_guest_goes_on_with_unused_room(rig: Rig) -> None:
    quota = rig.create(quota_mib=128)
    quota.make_room(48 * MIB)
    quota.arm_dry_events()
    tenant = rig.hold(quota, 80)
    wait_for(lambda: quota.dry_state().under_oom, "the guest is dry")
    quota.raise_workload(128 * MIB)
    wait_for(tenant.done, "the guest goes on")
    assert quota.oom_kills_total == 0


def test_a_guest_that_is_not_dry_raises_no_event(rig: Rig) -> None:
    quota = rig.create(quota_mib=96)
    event = quota.arm_dry_events()
    tenant = rig.hold(quota, 32)
    wait_for(tenant.done, "32 MiB are held")
    assert not readable(event)
    assert not quota.dry_state().under_oom


@pytest.mark.effects
def test_a_system_call_that_needs_memory_in_a_dry_guest(real_rig: CgroupRig) -> None:
    """Version 1 can hold page faults alone; here nobody is killed, and there nobody told no."""
    quota = real_rig.create(quota_mib=48)
    event = quota.arm_dry_events()
    tenant = real_rig.take_by_system_calls(quota, 64)
    if real_rig.backend.cgroup_version == 1:
        wait_for(lambda: not tenant.alive(), "it was told no")
        assert tenant.process.returncode == errno.ENOMEM
    else:
        assert readable(event, DEADLINE_S)
        wait_for(lambda: quota.dry_state().under_oom, "the guest is dry")
        assert not tenant.done()
        quota.raise_quota(128 * MIB)
        wait_for(tenant.done, "the guest goes on")
    assert quota.oom_kills_total == 0


def test_without_memory_to_give_the_kernel_decides(rig: Rig) -> None:
    quota = rig.create(quota_mib=48)
    quota.arm_dry_events()
    tenant = rig.hold(quota, 80)
    wait_for(lambda: quota.dry_state().under_oom, "the guest is dry")
    quota.let_kernel_decide()
    wait_for(lambda: not tenant.alive(), "the kernel has killed")
    wait_for(lambda: quota.dry_state().kills_total == 1, "the kill is counted")
    assert not quota.dry_state().under_oom
    assert workload_limit_mib(quota) == 48


def test_the_kernel_kills_one_process_and_the_vm_goes_on(rig: Rig) -> None:
    quota = rig.create(quota_mib=64)
    small = rig.hold(quota, 8)
    wait_for(small.done, "8 MiB are held")
    greedy = rig.hold(quota, 96)
    wait_for(lambda: not greedy.alive(), "the kernel has killed")
    wait_for(lambda: quota.oom_kills_total == 1, "the kill is counted")
    assert small.alive()
    another = rig.hold(quota, 16)
    wait_for(another.done, "it goes on")
    assert small.alive()


def test_a_reservation_is_protected_where_the_kernel_can(rig: Rig) -> None:
    quota = rig.create(quota_mib=96)

    def protected(quota: VmQuota) -> list[float]:
        """What it should be, or nothing on version 1."""
        return [] if quota.protected_bytes is None else [quota.protected_bytes / MIB]

    if rig.protects:
        assert protected(quota) == [0]
    quota.protect(32 * MIB)
    assert protected(quota) == [32] * rig.protects
    quota.protect(128 * MIB)  # more than it has now
    assert protected(quota) == [128] * rig.protects
    # A quota that moves leaves it alone, and it is nothing to make room against.
    tenant = rig.fill_cache(quota, 64)
    wait_for(tenant.done, "64 MiB are cached")
    quota.make_room(32 * MIB)
    quota.lower_quota(32 * MIB)
    quota.raise_quota(64 * MIB)
    again = rig.backend.open_existing("vm1", quota.overhead_bytes)
    assert protected(again) == [128] * rig.protects
    again.protect(0)
    assert protected(quota) == [0] * rig.protects
    again.close()
    with pytest.raises(ValueError, match="pages"):
        quota.protect(1)


def test_armed_again_it_hangs_again(rig: Rig) -> None:
    quota = rig.create(quota_mib=48)
    event = quota.arm_dry_events()
    quota.let_kernel_decide()
    quota.rearm()
    tenant = rig.hold(quota, 80)
    wait_for(lambda: quota.dry_state().under_oom, "the guest is dry")
    assert tenant.alive()
    assert quota.arm_dry_events() == event


def test_kill_all_ends_even_those_that_hang(rig: Rig) -> None:
    quota = rig.create(quota_mib=48)
    quota.arm_dry_events()
    tenants = [rig.hold(quota, 80), rig.hold(quota, 80), rig.hold(quota, 8, Part.DRIVER)]
    wait_for(lambda: quota.dry_state().under_oom, "the guest is dry")
    wait_for(lambda: len(quota.processes(Part.WORKLOAD)) == 2, "both have joined")
    wait_for(lambda: len(quota.processes(Part.DRIVER)) == 1, "the driver has joined")
    with pytest.raises(StillBusy, match="kill"):
        quota.remove(timeout_s=0.05)
    assert rig.backend.names() == ("vm1",)
    quota.kill_all()
    assert quota.processes(Part.WORKLOAD) == quota.processes(Part.DRIVER) == ()
    wait_for(lambda: not any(tenant.alive() for tenant in tenants), "all are dead")
    assert quota.oom_kills_total == 0  # we killed them, not the OOM killer
    quota.remove()
    assert rig.backend.names() == ()


def test_taking_down_twice_is_no_error(rig: Rig) -> None:
    quota = rig.create()
    for _ in range(2):
        quota.kill_all()
        quota.remove()
    quota.close()
    rig.backend.remove_root()
    rig.backend.remove_root()


def test_the_root_stays_while_a_vm_is_there(rig: Rig) -> None:
    rig.create()
    with pytest.raises(StillBusy, match="vm1"):
        rig.backend.remove_root()
    assert rig.backend.names() == ("vm1",)


def test_a_removed_vm_says_so(rig: Rig) -> None:
    quota = rig.create()
    other = rig.backend.open_existing("vm1", quota.overhead_bytes)
    quota.remove()
    for gone in (quota, other):
        with pytest.raises(VmGone):
            gone.read()
        with pytest.raises(VmGone):
            gone.raise_quota(128 * MIB)
        with pytest.raises(VmGone):
            gone.make_room(4 * MIB)
        with pytest.raises(VmGone):
            gone.driver_inode()
        with pytest.raises(VmGone):
            gone.protect(4 * MIB)
    other.close()
    with pytest.raises(VmGone):
        rig.backend.open_existing("vm1", 0)


def test_an_agent_that_restarts_finds_what_was_in_force(rig: Rig) -> None:
    first = rig.create(quota_mib=96, overhead_mib=24)
    first.make_room(64 * MIB)
    first.arm_dry_events()
    first.close()
    second = rig.backend.open_existing("vm1", 24 * MIB)
    assert second.read().vm_limit_bytes == 120 * MIB
    assert workload_limit_mib(second) == 64
    event = second.arm_dry_events()
    tenant = rig.hold(second, 80)
    assert readable(event, DEADLINE_S)
    second.raise_workload(96 * MIB)
    wait_for(tenant.done, "the guest goes on")


def test_each_vm_has_an_inode_of_its_own(rig: Rig) -> None:
    inodes = {rig.create(name=f"vm{number}").driver_inode() for number in range(3)}
    assert len(inodes) == 3


def test_every_error_is_a_quota_error_on_one_line(rig: Rig) -> None:
    quota = rig.create()
    with pytest.raises(QuotaError) as caught:
        quota.lower_quota(4 * MIB)
    assert "\n" not in str(caught.value)
