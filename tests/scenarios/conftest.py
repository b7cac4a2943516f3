"""Places for an agent and its mock VMs, and the certainty that nothing is left of them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from scenario_rig import Rig


@pytest.fixture
def rig(cgroup_name: str) -> Iterator[Rig]:
    made = Rig(cgroup_name)
    try:
        yield made
        made.assert_nothing_left()
    finally:
        made.take_down()
