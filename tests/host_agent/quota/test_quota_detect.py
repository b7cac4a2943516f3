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


def unit(point: Path, name: str, controllers: str = "memory") -> Path:
    directory = point / "system.slice" / name
    directory.mkdir(parents=True)
    (directory / "cgroup.controllers").write_text(controllers + "\n")
    (directory / "cgroup.procs").write_text("")
    return directory


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Directories that systemd has delegated; not every file system keeps attributes."""
    found: set[Path] = set()
    monkeypatch.setattr("host_agent.quota.delegation.is_delegated", found.__contains__)
    return found


def test_what_was_delegated_to_this_process(tmp_path: Path, marked: set[Path]) -> None:
    point = version_2(tmp_path, "memory")
    mine = unit(point, "mine.service")
    own, mounts = tmp_path / "own", mountinfo(tmp_path, V2.format(point=point))

    def base(cgroup: str, root_path: str = "a") -> Path:
        own.write_text(f"1:name=systemd:/elsewhere\n0::/{cgroup}\n")
        found = detect(root_path, mountinfo=mounts, own_cgroup=own)
        assert isinstance(found, Cgroup2Backend)
        assert found.delegated == (found.base != point)
        return found.base

    assert base("system.slice/mine.service") == point
    marked.add(mine)
    assert base("system.slice/mine.service") == mine
    assert base("system.slice/mine.service/agent") == mine
    # Further down or elsewhere is somebody else, however it was started.
    assert base("system.slice/mine.service/shell") == point
    assert base("system.slice/mine.service/agent/agent") == point
    assert base("") == point
    # Said by hand it is so, whoever asks.
    assert base("", "/system.slice/mine.service/a") == mine
    assert base("system.slice/mine.service", "/a") == point


@pytest.mark.parametrize("path", ["lab/agents/a", "/system.slice/mine.service/a", "a"])
def test_where_the_root_is(path: str, tmp_path: Path) -> None:
    point = version_2(tmp_path, "memory")
    mine = unit(point, "mine.service")
    mounts = mountinfo(tmp_path, V2.format(point=point))
    own = tmp_path / "own"
    own.write_text("0::/\n")
    found = detect(path, mountinfo=mounts, own_cgroup=own)
    assert found.root == point / path.removeprefix("/")
    lab = point / "lab"
    assert found.between == ((lab, lab / "agents") if path.startswith("lab") else ())
    assert found.base == (mine if path.startswith("/") else point)


@pytest.mark.parametrize("path", ["", "/", "a/", "a//b", "../a", "a/..", "/a/../b", "a b", "a/b@"])
def test_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="path of a cgroup"):
        detect(path)


def test_what_was_not_delegated_is_said_with_what_to_do(tmp_path: Path, marked: set[Path]) -> None:
    point = version_2(tmp_path, "memory")
    marked.add(unit(point, "bare.service", "cpu pids"))
    mounts = mountinfo(tmp_path, V2.format(point=point))
    own = tmp_path / "own"
    own.write_text("0::/system.slice/bare.service\n")
    with pytest.raises(QuotaUnavailable, match=r"no memory controller.*systemd-run -p Delegate"):
        detect(mountinfo=mounts, own_cgroup=own)
    with pytest.raises(QuotaUnavailable, match=r"no cgroup .*/gone: .*leading slash"):
        detect("/gone/a", mountinfo=mounts, own_cgroup=own)


def test_only_what_is_between_is_removed_and_only_if_empty(tmp_path: Path) -> None:
    backend = Cgroup2Backend(tmp_path / "a" / "b" / "root", tmp_path)
    backend.root.mkdir(parents=True)
    (tmp_path / "a" / "other").mkdir()
    backend.remove_root()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]


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
