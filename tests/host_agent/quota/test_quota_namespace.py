"""A container's cgroup namespace: when it is a border, and what is said where it can't be left.

That it is left is test_compose_version_2.py's, with a real engine.
"""

from pathlib import Path

import pytest

from host_agent.quota import namespace
from host_agent.quota.errors import QuotaUnavailable
from host_agent.quota.namespace import is_outside, join_namespace_of_init

TOP = Path("/sys/fs/cgroup")
MOUNT = "41 31 0:38 {root} /sys/fs/cgroup rw,relatime - {kind} cgroup rw{options}\n"


@pytest.mark.parametrize(
    ("root", "kind", "options", "outside"),
    [
        ("/../..", "cgroup2", ",nsdelegate,memory_recursiveprot", True),
        ("/..", "cgroup2", ",nsdelegate", True),
        ("/../..", "cgroup2", "", False),
        ("/", "cgroup2", ",nsdelegate", False),
        ("/mine", "cgroup2", ",nsdelegate", False),
        ("/../..", "cgroup", ",memory", False),
    ],
)
def test_the_hosts_hierarchy_is_outside(root: str, kind: str, options: str, outside: bool) -> None:
    other = MOUNT.format(root="/..", kind="cgroup2", options=",nsdelegate").replace(str(TOP), "/cg")
    text = other + MOUNT.format(root=root, kind=kind, options=options)
    assert is_outside(TOP, text) is outside


def test_who_can_not_join_is_told_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is no namespace; and none at all, as without the host's pids."""
    monkeypatch.setattr(namespace, "NAMESPACE_OF_INIT", tmp_path / "cgroup")
    for _ in range(2):
        with pytest.raises(QuotaUnavailable, match="start it with `--cgroupns=host`"):
            join_namespace_of_init()
        (tmp_path / "cgroup").touch()
