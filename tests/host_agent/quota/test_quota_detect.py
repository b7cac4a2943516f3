"""Which back end a machine gets, from what the kernel says is mounted."""

import os
from pathlib import Path

import pytest

from host_agent.quota.cgroup1 import Cgroup1Backend
from host_agent.quota.cgroup2_backend import Cgroup2Backend
from host_agent.quota.detect import MOUNTINFO, detect, memory_mounts
from host_agent.quota.errors import QuotaUnavailable

V1 = "35 31 0:32 / /cg/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
V1_JOINT = "35 31 0:32 / /cg/both rw - cgroup cgroup rw,cpuset,memory\n"
V1_OTHER = "33 31 0:30 / /cg/blkio rw - cgroup cgroup rw,blkio\n"
V2 = "41 31 0:38 / {point} rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"


def mountinfo(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "mountinfo"
    file.write_text("31 23 0:28 / /cg rw - tmpfs tmpfs rw\n" + "".join(lines))
    return file


def version_2(tmp_path: Path, controllers: str) -> Path:
    point = tmp_path / "unified"
    point.mkdir()
    (point / "cgroup.controllers").write_text(controllers + "\n")
    return point


def test_version_1_where_it_has_the_memory_controller(tmp_path: Path) -> None:
    point = version_2(tmp_path, "hugetlb")
    file = mountinfo(tmp_path, V1_OTHER, V1, V2.format(point=point))
    backend = detect("mine", mountinfo=file)
    assert isinstance(backend, Cgroup1Backend)
    assert backend.root == Path("/cg/memory/mine")
    assert backend.cgroup_version == 1


def test_controllers_mounted_together() -> None:
    assert memory_mounts(V1_JOINT) == (Path("/cg/both"), None)


def test_spaces_in_mount_points() -> None:
    assert memory_mounts(V2.format(point="/a\\040b")) == (None, Path("/a b"))


def test_version_2_otherwise(tmp_path: Path) -> None:
    point = version_2(tmp_path, "cpu memory pids")
    backend = detect(mountinfo=mountinfo(tmp_path, V1_OTHER, V2.format(point=point)))
    assert isinstance(backend, Cgroup2Backend)
    assert backend.root == point / "memballoon"
    assert backend.cgroup_version == 2


def test_a_delegated_directory(tmp_path: Path) -> None:
    point = version_2(tmp_path, "memory")
    file = mountinfo(tmp_path, V2.format(point=point))
    backend = detect("mine", delegated=point / "user.slice", mountinfo=file)
    assert isinstance(backend, Cgroup2Backend)
    assert backend.root == point / "user.slice" / "mine"
    with pytest.raises(QuotaUnavailable, match="no mounted cgroup"):
        detect(delegated=tmp_path / "elsewhere", mountinfo=file)


@pytest.mark.parametrize(
    ("controllers", "advice"), [(None, "mount cgroup2"), ("cpu pids", "cgroup_disable")]
)
def test_what_is_missing_is_said_with_what_to_do(
    tmp_path: Path, controllers: str | None, advice: str
) -> None:
    lines = [V1_OTHER]
    if controllers is not None:
        lines.append(V2.format(point=version_2(tmp_path, controllers)))
    with pytest.raises(QuotaUnavailable, match=advice) as caught:
        detect(mountinfo=mountinfo(tmp_path, *lines))
    assert "\n" not in str(caught.value)


def test_this_machine() -> None:
    if memory_mounts(MOUNTINFO.read_text()) == (None, None):
        pytest.skip("no cgroup hierarchy is mounted here")
    try:
        backend = detect("mbtest-unused")
    except QuotaUnavailable as unavailable:
        pytest.skip(str(unavailable))
    assert os.path.ismount(backend.root.parent)
