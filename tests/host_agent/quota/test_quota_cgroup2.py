"""What only version 2's own way of making room has to stand, on the real thing."""

from contextlib import closing

import pytest
from quota_rigs import CgroupRig, wait_for

from host_agent.quota.errors import NoRoom
from protocol.units import MIB

pytestmark = pytest.mark.effects


def test_a_workload_that_swings_above_it_is_refused_and_lives(rig2: CgroupRig) -> None:
    """At most instants it would fit; a moment later it would have been killed."""
    quota = rig2.create(quota_mib=96)
    tenant = rig2.swing(quota, 64)
    wait_for(tenant.done, "it swings")
    for _ in range(4):
        with pytest.raises(NoRoom):
            quota.make_room(40 * MIB)
    assert quota.read().workload_limit_bytes == 96 * MIB
    assert tenant.alive()
    assert quota.oom_kills_total == 0


def test_a_reservation_survives_what_the_host_reclaims(rig2: CgroupRig) -> None:
    """Half of what two guests cache is taken from above: the one with a reservation keeps it."""
    promised, other = rig2.create(96, name="promised"), rig2.create(96, name="other")
    promised.protect(64 * MIB)
    tenants = [rig2.fill_cache(promised, 64), rig2.fill_cache(other, 64)]
    wait_for(lambda: all(tenant.done() for tenant in tenants), "128 MiB are cached")
    for quota in (promised, other):
        assert quota.read().workload_usage_bytes > 60 * MIB
    for _ in range(12):
        try:
            (rig2.backend.root / "memory.reclaim").write_text(str(4 * MIB))
        except OSError:  # all that it may take is taken
            break
    assert promised.read().workload_usage_bytes > 60 * MIB
    assert other.read().workload_usage_bytes < 32 * MIB


def root_claim(rig: CgroupRig) -> int:
    return int((rig.backend.root / "memory.min").read_text())


def test_the_root_claims_what_its_vms_claim(rig2: CgroupRig) -> None:
    """Or nothing of it would count; and not more, which a recursive mount would give to all."""
    quotas = [rig2.create(name=name) for name in ("a", "b")]
    for quota in quotas:
        quota.protect(32 * MIB)
        assert quota.protected_bytes == 32 * MIB
    assert root_claim(rig2) == 64 * MIB
    quotas[0].protect(16 * MIB)
    assert root_claim(rig2) == 48 * MIB
    quotas[1].remove()
    assert root_claim(rig2) == 16 * MIB
    # What whoever delegated the root has not promised, the agent can't.
    (rig2.backend.root / "memory.min").write_text(str(4 * MIB))
    assert quotas[0].protected_bytes == 4 * MIB


def test_a_vm_whose_kernel_would_kill_all_is_put_right(rig2: CgroupRig) -> None:
    quota = rig2.create()
    files = [
        path / "memory.oom.group"
        for path in (quota.directory, quota.directory / "workload", quota.directory / "driver")
    ]
    assert [file.read_text() for file in files] == ["0\n"] * 3
    (quota.directory / "workload" / "cgroup.subtree_control").write_text("+memory")
    nested = quota.directory / "workload" / "container"
    nested.mkdir()
    for file in (*files, nested / "memory.oom.group"):
        file.write_text("1")
    rig2.backend.open_existing("vm1", quota.overhead_bytes).close()
    assert [file.read_text() for file in files] == ["0\n"] * 3
    assert (nested / "memory.oom.group").read_text() == "1\n"


def test_a_vm_that_was_left_frozen_is_thawed(rig2: CgroupRig) -> None:
    """Its agent and the watchdog died together, while it was held or room was made in it."""
    quota = rig2.create()
    freezer = quota.directory / "workload" / "cgroup.freeze"
    freezer.write_text("1")
    with closing(rig2.backend.open_existing("vm1", quota.overhead_bytes)) as next_agents:
        next_agents.arm_dry_events()
        assert not next_agents.dry_state().under_oom
    assert freezer.read_text() == "0\n"


def test_a_dry_vm_that_was_left_frozen_stays_so(rig2: CgroupRig) -> None:
    """It has little more than half of its wall left: it would not live until it is answered."""
    quota = rig2.create(quota_mib=64)
    quota.arm_dry_events()
    tenant = rig2.hold(quota, 120)
    freezer = quota.directory / "workload" / "cgroup.freeze"

    def is_frozen() -> bool:
        quota.dry_state()
        return freezer.read_text() == "1\n"

    wait_for(is_frozen, "the guest is held")
    quota.close()
    next_agents = rig2.backend.open_existing("vm1", quota.overhead_bytes)
    assert freezer.read_text() == "1\n"
    next_agents.arm_dry_events()
    assert freezer.read_text() == "1\n"
    assert next_agents.dry_state().under_oom
    assert freezer.read_text() == "1\n"
    next_agents.raise_quota(192 * MIB)
    wait_for(tenant.done, "the guest goes on")
    assert next_agents.oom_kills_total == 0
    next_agents.close()
