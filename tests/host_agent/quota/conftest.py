"""Rigs: a root of its own for each test, taken down whatever happens."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from quota_rigs import CgroupRig, Rig, make_rig
from swap_file import swap_file


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory on a disk: on tmpfs there would be no page cache to evict."""
    with tempfile.TemporaryDirectory(prefix="mbtest-", dir="/var/tmp") as directory:
        yield Path(directory)


@pytest.fixture(
    params=[
        "fake",
        pytest.param("cgroup1", marks=pytest.mark.effects),
        pytest.param("cgroup2", marks=pytest.mark.effects),
    ]
)
def rig(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Rig]:
    made = make_rig(request.param, scratch)
    try:
        yield made
    finally:
        made.down()


@pytest.fixture(params=["cgroup1", "cgroup2"])
def real_rig(request: pytest.FixtureRequest, scratch: Path) -> Iterator[CgroupRig]:
    made = make_rig(request.param, scratch)
    assert isinstance(made, CgroupRig)
    try:
        yield made
    finally:
        made.down()


@pytest.fixture(
    params=[
        "fake",
        pytest.param("cgroup1", marks=pytest.mark.effects),
        pytest.param("cgroup2", marks=pytest.mark.effects),
    ]
)
def swap_rig(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Rig]:
    """A rig on a machine that has swap space."""
    with ExitStack() as stack:
        made = make_rig(request.param, scratch)
        try:
            if request.param != "fake":
                stack.enter_context(swap_file())
            yield made
        finally:
            made.down()  # before the swap file: what is in it has to go somewhere


@pytest.fixture(params=["cgroup1", "cgroup2"])
def real_swap_rig(request: pytest.FixtureRequest, scratch: Path) -> Iterator[CgroupRig]:
    with ExitStack() as stack:
        made = make_rig(request.param, scratch)
        assert isinstance(made, CgroupRig)
        try:
            stack.enter_context(swap_file())
            yield made
        finally:
            made.down()


@pytest.fixture
def rig1(scratch: Path) -> Iterator[CgroupRig]:
    made = make_rig("cgroup1", scratch)
    assert isinstance(made, CgroupRig)
    try:
        yield made
    finally:
        made.down()


@pytest.fixture
def rig2(scratch: Path) -> Iterator[CgroupRig]:
    made = make_rig("cgroup2", scratch)
    assert isinstance(made, CgroupRig)
    try:
        yield made
    finally:
        made.down()
