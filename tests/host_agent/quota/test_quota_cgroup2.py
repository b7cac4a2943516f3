"""What only version 2's own way of making room has to stand, on the real thing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from quota_rigs import CgroupRig, make_rig, wait_for

from host_agent.quota.errors import NoRoom
from protocol.units import MIB

pytestmark = pytest.mark.effects


@pytest.fixture
def rig2(scratch: Path) -> Iterator[CgroupRig]:
    made = make_rig("cgroup2", scratch)
    assert isinstance(made, CgroupRig)
    try:
        yield made
    finally:
        made.down()


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
