"""Swap, the same for all back ends: what a VM has of it, and when making room may use it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from quota_rigs import HOLD, CgroupRig, Rig, wait_for

from host_agent.quota import cgroup1, cgroup1_limit, cgroup2, cgroup2_backend, cgroup2_swap
from host_agent.quota.base import Part, SwapReading, VmQuota
from host_agent.quota.cgroup1 import Cgroup1Quota
from host_agent.quota.cgroup2 import Cgroup2Quota
from host_agent.quota.errors import LimitRefused, NoRoom, QuotaError
from host_agent.quota.fake import FakeVmQuota
from host_agent.quota.swap_space import free_swap_bytes, is_accounted
from protocol.units import KIB, MIB

LAG_MIB = 1.0
"""Version 1's swap is a difference of two counters, each exact to 64 pages a CPU."""

DIES_WHILE_ROOM_IS_MADE = """
import sys, time
from pathlib import Path
from host_agent.quota.{module} import {backend}
quota = {backend}(Path(sys.argv[1])).open_existing("vm1", int(sys.argv[2]), int(sys.argv[3]))
def stop(*_):
    print("swapping is off", flush=True)
    time.sleep(1000)
quota._guard.check = stop
quota.make_room(int(sys.argv[4]))
"""


def swap_of(quota: VmQuota) -> SwapReading:
    reading = quota.read_swap()
    if reading is None:
        pytest.skip("this kernel does not account for swap")
    return reading


def used_mib(quota: VmQuota) -> float:
    return swap_of(quota).used_bytes / MIB


def limit_mib(quota: VmQuota) -> float:
    return swap_of(quota).limit_bytes / MIB


def workload_limit_mib(quota: VmQuota) -> float:
    return quota.read().workload_limit_bytes / MIB


def test_a_vm_does_not_swap_unless_it_was_given_swap(swap_rig: Rig) -> None:
    quota = swap_rig.create(quota_mib=48)
    assert swap_of(quota) == SwapReading(used_bytes=0, limit_bytes=0)
    quota.arm_dry_events()
    tenant = swap_rig.hold(quota, 80)
    wait_for(lambda: quota.dry_state().under_oom, "the guest is dry")
    assert used_mib(quota) <= LAG_MIB
    quota.raise_quota(128 * MIB)
    wait_for(tenant.done, "the guest goes on")
    assert used_mib(quota) <= LAG_MIB
    with pytest.raises(NoRoom):
        quota.make_room(64 * MIB, swap_bytes=64 * MIB)
    assert used_mib(quota) <= LAG_MIB
    assert limit_mib(quota) == 0


@pytest.mark.parametrize("swap_mib", [0, 32])
def test_a_vms_swap_stays_the_same_when_its_limits_move(rig: Rig, swap_mib: int) -> None:
    quota = rig.create(quota_mib=96, overhead_mib=24, swap_mib=swap_mib)
    assert limit_mib(quota) == swap_mib
    moves = (
        lambda: quota.make_room(64 * MIB),
        lambda: quota.lower_quota(64 * MIB),
        lambda: quota.raise_quota(128 * MIB),
        lambda: quota.make_room(48 * MIB, swap_bytes=32 * MIB),
        lambda: quota.raise_workload(80 * MIB),
        lambda: quota.raise_quota(160 * MIB, workload_bytes=96 * MIB),
        lambda: quota.make_room(90 * MIB),
        lambda: quota.lower_quota(100 * MIB),
        quota.restore_swap,
    )
    for move in moves:
        move()
        assert limit_mib(quota) == swap_mib
    assert workload_limit_mib(quota) == 90
    assert quota.read().vm_limit_bytes == 124 * MIB


def test_a_guest_swaps_what_it_may_before_it_runs_dry(swap_rig: Rig) -> None:
    quota = swap_rig.create(quota_mib=48, swap_mib=64)
    quota.arm_dry_events()
    tenant = swap_rig.hold(quota, 80)

    def done() -> bool:
        assert not quota.dry_state().under_oom
        return tenant.done()

    wait_for(done, "80 MiB are held in 48")
    assert used_mib(quota) + LAG_MIB + 1 >= 80 - 48
    assert used_mib(quota) <= 64 + LAG_MIB
    assert quota.oom_kills_total == 0


def test_with_its_swap_full_a_guest_runs_dry(swap_rig: Rig) -> None:
    quota = swap_rig.create(quota_mib=48, swap_mib=16)
    quota.arm_dry_events()
    tenant = swap_rig.hold(quota, 96)
    wait_for(lambda: quota.dry_state().under_oom, "the guest is dry")
    assert used_mib(quota) <= 16 + LAG_MIB
    quota.raise_quota(128 * MIB)
    wait_for(tenant.done, "the guest goes on")
    assert quota.oom_kills_total == 0


def test_no_room_is_made_by_swapping_unless_it_is_allowed(swap_rig: Rig) -> None:
    quota = swap_rig.create(quota_mib=96, swap_mib=64)
    tenant = swap_rig.hold(quota, 64)
    wait_for(tenant.done, "64 MiB are held")
    with pytest.raises(NoRoom, match="ask for less"):
        quota.make_room(48 * MIB)
    assert used_mib(quota) <= LAG_MIB
    with pytest.raises(NoRoom, match="ask for less"):
        quota.make_room(48 * MIB, swap_bytes=8 * MIB)
    assert used_mib(quota) <= 8 + LAG_MIB
    assert workload_limit_mib(quota) == 96
    before_mib = used_mib(quota)
    quota.make_room(48 * MIB, swap_bytes=32 * MIB)
    assert used_mib(quota) + LAG_MIB >= 64 - 48
    assert used_mib(quota) <= before_mib + 32 + LAG_MIB
    assert workload_limit_mib(quota) == 48
    assert limit_mib(quota) == 64
    assert tenant.alive()
    assert quota.oom_kills_total == 0


def test_no_room_is_made_beyond_the_swap_that_is_left(swap_rig: Rig) -> None:
    quota = swap_rig.create(quota_mib=96, swap_mib=16)
    tenant = swap_rig.hold(quota, 80)
    wait_for(tenant.done, "80 MiB are held")
    with pytest.raises(NoRoom, match="ask for less"):
        quota.make_room(48 * MIB, swap_bytes=64 * MIB)
    assert used_mib(quota) <= 16 + LAG_MIB
    assert workload_limit_mib(quota) == 96
    assert limit_mib(quota) == 16
    assert tenant.alive()
    assert quota.oom_kills_total == 0


def test_a_hundred_mib_out_of_a_full_guest_are_no_reason_to_swap(swap_rig: Rig) -> None:
    """150 MiB anonymous and 40 of cache under 200: a limit of 100 alone would swap 50 or more."""
    quota = swap_rig.create(quota_mib=200, swap_mib=256)
    tenant = swap_rig.hold(quota, 150)
    wait_for(tenant.done, "150 MiB are held")
    cache = swap_rig.fill_cache(quota, 40)
    wait_for(cache.done, "40 MiB are cached")
    before_mib = used_mib(quota)
    with pytest.raises(NoRoom, match="ask for less"):
        quota.make_room(100 * MIB)
    assert used_mib(quota) - before_mib <= LAG_MIB
    assert workload_limit_mib(quota) == 200
    quota.make_room(172 * MIB)
    assert used_mib(quota) - before_mib <= LAG_MIB
    quota.make_room(100 * MIB, swap_bytes=120 * MIB)
    swapped_mib = used_mib(quota) - before_mib
    assert 50 - LAG_MIB - before_mib <= swapped_mib <= 120 + LAG_MIB
    print(f"swapped out of 150 MiB: {swapped_mib:.1f} MiB where it is allowed")
    assert tenant.alive()
    assert quota.oom_kills_total == 0


@pytest.mark.effects
def test_the_kernel_itself_is_kept_from_swapping(real_swap_rig: CgroupRig) -> None:
    """Where the look that comes first has been wrong: what the guest is doing may change after."""
    quota = real_swap_rig.create(quota_mib=96, swap_mib=96)
    assert isinstance(quota, Cgroup1Quota | Cgroup2Quota)
    tenant = real_swap_rig.hold(quota, 64)
    wait_for(tenant.done, "64 MiB are held")
    quota._room._check_reclaimable = lambda *_: None  # type: ignore[method-assign, assignment]
    with pytest.raises(NoRoom):
        quota.make_room(32 * MIB)
    assert used_mib(quota) <= LAG_MIB
    with pytest.raises(NoRoom):
        quota.make_room(32 * MIB, swap_bytes=8 * MIB)
    assert used_mib(quota) <= 8 + LAG_MIB
    assert tenant.alive()


def test_swap_beyond_what_a_vm_has_is_said(swap_rig: Rig) -> None:
    """Where an agent takes over a VM that has swapped more than its state file allows it."""
    quota = swap_rig.create(quota_mib=48, swap_mib=64)
    tenant = swap_rig.hold(quota, 80)
    wait_for(tenant.done, "80 MiB are held in 48")
    stricter = swap_rig.backend.open_existing("vm1", quota.overhead_bytes, 8 * MIB)
    swap_rig.quotas.append(stricter)
    with pytest.raises(LimitRefused, match="swap") as caught:
        stricter.restore_swap()
    assert "\n" not in str(caught.value)
    assert tenant.alive()


@pytest.mark.effects
def test_an_agent_that_died_while_room_was_made(real_swap_rig: CgroupRig) -> None:
    quota = real_swap_rig.create(quota_mib=96, swap_mib=64)
    swap_of(quota)
    workload = quota.directory / Part.WORKLOAD
    (workload / "container").mkdir()
    tenant = real_swap_rig.fill_cache(quota, 64)
    wait_for(tenant.done, "64 MiB are cached")
    is_first = isinstance(quota, Cgroup1Quota)
    places = {
        "module": "cgroup1" if is_first else "cgroup2_backend",
        "backend": "Cgroup1Backend" if is_first else "Cgroup2Backend",
    }
    child = subprocess.Popen(
        [
            *(sys.executable, "-c", DIES_WHILE_ROOM_IS_MADE.format(**places)),
            *(str(real_swap_rig.backend.root), str(quota.overhead_bytes)),
            *(str(64 * MIB), str(48 * MIB)),
        ],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"swapping is off\n"
    finally:
        child.kill()
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()

    def swapping() -> list[str]:
        if not is_first:
            return [(workload / "memory.swap.max").read_text().strip()]
        directories = (quota.directory, workload, workload / "container")
        return [(path / "memory.swappiness").read_text().strip() for path in directories]

    usual = (real_swap_rig.backend.root / "memory.swappiness").read_text() if is_first else ""
    assert swapping() == ([usual.strip(), "0", "0"] if is_first else ["0"])
    next_agents = real_swap_rig.backend.open_existing("vm1", quota.overhead_bytes, 64 * MIB)
    real_swap_rig.quotas.append(next_agents)
    next_agents.restore_swap()
    assert swapping() == ([usual.strip()] * 3 if is_first else [str(64 * MIB)])
    assert limit_mib(next_agents) == 64


@pytest.mark.effects
def test_the_driver_has_no_swap(real_swap_rig: CgroupRig) -> None:
    """Its frames are locked, and its own memory is what a balloon has to be quick with."""
    quota = real_swap_rig.create(swap_mib=64)
    swap_of(quota)
    driver = quota.directory / Part.DRIVER
    if isinstance(quota, Cgroup1Quota):
        assert (driver / "memory.swappiness").read_text() == "0\n"
    else:
        assert (driver / "memory.swap.max").read_text() == "0\n"


@pytest.mark.effects
def test_a_cgroup_of_an_engine_below_does_not_swap_either(real_swap_rig: CgroupRig) -> None:
    quota = real_swap_rig.create(quota_mib=48)
    nested = quota.directory / Part.WORKLOAD / "container"
    nested.mkdir()
    quota.arm_dry_events()
    tenant = real_swap_rig.start(nested / "cgroup.procs", HOLD, str(80 * MIB))
    wait_for(lambda: quota.dry_state().under_oom, "the guest is dry")
    assert used_mib(quota) <= LAG_MIB
    quota.raise_quota(128 * MIB)
    wait_for(tenant.done, "the guest goes on")


@pytest.mark.effects
def test_a_kernel_without_accounting_gives_no_swap(
    real_rig: CgroupRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (
        (cgroup1, "MEMSW_LIMIT"),
        (cgroup1_limit, "MEMSW_LIMIT"),
        (cgroup2, "SWAP_MAX"),
        (cgroup2_swap, "SWAP_MAX"),
        (cgroup2_backend, "SWAP_MAX"),
    ):
        monkeypatch.setattr(module, name, "memory.not.there")
    with pytest.raises(QuotaError, match="swapaccount=1") as caught:
        real_rig.create(swap_mib=64)
    assert "\n" not in str(caught.value)
    assert real_rig.backend.names() == ()
    quota = real_rig.create(quota_mib=96)
    assert quota.read_swap() is None
    quota.make_room(64 * MIB)
    quota.lower_quota(64 * MIB)
    quota.raise_quota(96 * MIB)
    quota.restore_swap()
    assert workload_limit_mib(quota) == 96


@pytest.mark.effects
def test_accounting_is_found_beside_an_agents_root(real_rig: CgroupRig) -> None:
    accounted = real_rig.create().read_swap() is not None
    assert is_accounted(real_rig.backend.root) is accounted
    assert is_accounted(real_rig.backend.root.parent / "not-made-yet") is accounted


def test_without_any_limits_accounting_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert is_accounted(tmp_path / "root") is None
    (tmp_path / "a" / "memory.max").touch()
    assert is_accounted(tmp_path / "root") is False
    (tmp_path / "a" / "memory.swap.max").touch()
    assert is_accounted(tmp_path / "root") is True


def test_what_is_left_over_all_swap_areas(tmp_path: Path) -> None:
    swaps = tmp_path / "swaps"
    assert free_swap_bytes(swaps) == 0
    swaps.write_text("Filename Type Size Used Priority\n")
    assert free_swap_bytes(swaps) == 0
    swaps.write_text(swaps.read_text() + "/dev/sda2 partition 2048 1024 -2\n/a b file 8 0 -3\n")
    assert free_swap_bytes(swaps) == 1032 * KIB
    swaps.write_text("?\n?\n")
    assert free_swap_bytes(swaps) == 0


def test_less_than_a_mib_of_swapping_is_none(swap_rig: Rig) -> None:
    quota = swap_rig.create(quota_mib=96, swap_mib=64)
    if isinstance(quota, FakeVmQuota):
        quota.vm.allocate(64 * MIB)
    else:
        tenant = swap_rig.hold(quota, 64)
        wait_for(tenant.done, "64 MiB are held")
    with pytest.raises(NoRoom):
        quota.make_room(48 * MIB, swap_bytes=MIB - 4096)
    assert used_mib(quota) <= LAG_MIB
