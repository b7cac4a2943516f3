"""The kernel's sum of quotas: what counts, and that memory on the move is not counted twice."""

import threading
from pathlib import Path

import pytest
from quota_rigs import CgroupRig, wait_for

from host_agent.quota.kernel_sum import KernelSum, KernelSumReading
from protocol.units import MIB


def plain_vm(root: Path, name: str, vm_mib: int, workload_mib: int) -> None:
    for directory, limit_mib in ((root / name, vm_mib), (root / name / "workload", workload_mib)):
        directory.mkdir(parents=True)
        (directory / "memory.max").write_text(f"{limit_mib * MIB}\n")
    (root / name / "driver").mkdir()


def test_the_larger_of_both_limits_counts(tmp_path: Path) -> None:
    plain_vm(tmp_path, "room-made", vm_mib=100, workload_mib=40)
    plain_vm(tmp_path, "whole", vm_mib=100, workload_mib=90)
    plain_vm(tmp_path, "wrong", vm_mib=100, workload_mib=95)
    reading = KernelSum(tmp_path, 10 * MIB).read()
    assert reading.stable
    assert reading.quota_bytes == {
        "room-made": 90 * MIB,
        "whole": 90 * MIB,
        "wrong": 95 * MIB,
    }
    assert reading.sum_bytes == 275 * MIB


def test_a_vm_of_unknown_overhead_counts_in_full(tmp_path: Path) -> None:
    plain_vm(tmp_path, "known", 100, 90)
    plain_vm(tmp_path, "new", 100, 90)
    assert KernelSum(tmp_path, {"known": 10 * MIB}).read().sum_bytes == 190 * MIB


def test_no_root_is_nothing(tmp_path: Path) -> None:
    assert KernelSum(tmp_path / "none", 0).read().sum_bytes == 0


@pytest.mark.effects
def test_vms_come_and_go(real_rig: CgroupRig) -> None:
    total = KernelSum(real_rig.backend.root, 24 * MIB)
    assert total.read().sum_bytes == 0
    first, second = real_rig.create(name="vm1"), real_rig.create(name="vm2", quota_mib=64)
    assert total.read().quota_bytes == {"vm1": 96 * MIB, "vm2": 64 * MIB}
    first.remove()
    assert total.read().quota_bytes == {"vm2": 64 * MIB}
    real_rig.create(name="vm1", quota_mib=32)
    assert total.read().sum_bytes == 96 * MIB
    second.raise_quota(80 * MIB)
    assert total.read().sum_bytes == 112 * MIB
    total.close()


@pytest.mark.effects
def test_memory_on_the_move_is_never_seen_twice(real_rig: CgroupRig) -> None:
    """Two guests pass 32 MiB to and fro, free first; no stable sum may pass what both have."""
    pool_bytes = 160 * MIB
    pair = [real_rig.create(quota_mib=96, name="vm1"), real_rig.create(quota_mib=64, name="vm2")]
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            giver, taker = pair
            giver.make_room(64 * MIB)
            giver.lower_quota(64 * MIB)
            taker.raise_quota(96 * MIB)
            pair.reverse()
            stop.wait(0.0005)

    thread = threading.Thread(target=move)
    thread.start()
    total = KernelSum(real_rig.backend.root, 24 * MIB)
    readings: list[KernelSumReading] = []

    def enough() -> bool:
        readings.append(total.read())
        # It did move.
        return len(readings) >= 1500 and len({now.quota_bytes["vm1"] for now in readings}) == 2

    try:
        wait_for(enough, "1500 readings", pause_s=0)
    finally:
        stop.set()
        thread.join()
        total.close()
    stable = [reading.sum_bytes for reading in readings if reading.stable]
    assert len(stable) > len(readings) // 2
    assert set(stable) <= {pool_bytes, pool_bytes - 32 * MIB}
