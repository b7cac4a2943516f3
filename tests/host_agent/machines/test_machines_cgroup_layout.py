"""Names of cgroups for both of an engine's cgroup drivers."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.machines.cgroup_layout import (
    hierarchy_of,
    parent_path,
    slice_name,
    slice_path,
)
from host_agent.machines.other_hierarchies import cgroup_hierarchies, remove_elsewhere


def test_a_parent_for_the_cgroupfs_driver() -> None:
    root = Path("/sys/fs/cgroup/memory")
    assert parent_path(root / "memballoon/web1/workload", root) == "/memballoon/web1/workload"


@pytest.mark.parametrize(
    ("parts", "name", "path"),
    [
        (("memballoon",), "memballoon.slice", "memballoon.slice"),
        (
            ("memballoon", "web1", "workload"),
            "memballoon-web1-workload.slice",
            "memballoon.slice/memballoon-web1.slice/memballoon-web1-workload.slice",
        ),
        # What systemd-escape(1) says: a dash would be a level of its own.
        (("m", "a-b"), r"m-a\x2db.slice", r"m.slice/m-a\x2db.slice"),
        (("m", "é~"), r"m-\xc3\xa9\x7e.slice", r"m.slice/m-\xc3\xa9\x7e.slice"),
        (("m", ".a.b"), r"m-\x2ea.b.slice", r"m.slice/m-\x2ea.b.slice"),
    ],
)
def test_a_parent_for_the_systemd_driver(parts: tuple[str, ...], name: str, path: str) -> None:
    assert slice_name(*parts) == name
    assert slice_path(*parts) == Path(path)


NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,31}", fullmatch=True)


@given(st.lists(st.tuples(NAMES, NAMES), min_size=2, max_size=2, unique=True))
def test_two_vms_never_share_a_slice(pairs: list[tuple[str, str]]) -> None:
    one, two = (slice_name(*pair) for pair in pairs)
    assert one != two
    assert one.count("-") == two.count("-") == 1


@pytest.mark.parametrize("parts", [(), ("a", ""), ("",)])
def test_a_level_without_a_name(parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="a name at every level"):
        slice_name(*parts)


def test_hierarchies_are_read_from_mountinfo() -> None:
    text = (
        "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
        "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        "1 1 0:1 / /proc rw - proc proc rw\n"
    )
    assert list(cgroup_hierarchies(text)) == [
        Path("/sys/fs/cgroup/cpu"),
        Path("/sys/fs/cgroup/unified"),
    ]


@pytest.mark.effects
def test_namesakes_go_from_the_other_hierarchies_alone(cgroup_name: str) -> None:
    mounts = list(cgroup_hierarchies(Path("/proc/self/mountinfo").read_text()))
    own, *others = [mount for mount in mounts if mount.name != "cpuset"]
    if not others:
        pytest.skip("there is one cgroup hierarchy on this machine, so no namesakes")
    made = [mount / cgroup_name for mount in (own, *others)]
    child = subprocess.Popen(["sleep", "1000"])
    try:
        for path in made:
            path.mkdir()
        for path in made[:2]:
            (path / "vm1").mkdir()
        assert hierarchy_of(own / cgroup_name / "vm1") == own
        (made[1] / "vm1" / "cgroup.procs").write_text(f"{child.pid}")
        assert not remove_elsewhere(own / cgroup_name)
        assert [path for path in made if path.exists()] == made[:2]  # its own, and one in use
        child.kill()
        child.wait()
        assert remove_elsewhere(own / cgroup_name)
        assert [path for path in made if path.exists()] == made[:1]
        assert (own / cgroup_name / "vm1").exists()
    finally:
        child.kill()
        child.wait()
        for path in made:
            for directory in (path / "vm1", path):
                if directory.exists():
                    directory.rmdir()
