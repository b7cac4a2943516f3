"""Which memory controller this machine has, and where: version 1 if mounted, else version 2.

On a hybrid machine both hierarchies are mounted and the memory controller is in one of them.
/proc/self/mountinfo: proc_pid_mountinfo(5).
"""

from pathlib import Path
from typing import Final

from host_agent.quota.base import QuotaBackend, check_name
from host_agent.quota.cgroup1 import Cgroup1Backend
from host_agent.quota.cgroup2_backend import Cgroup2Backend
from host_agent.quota.errors import QuotaUnavailable

MOUNTINFO: Final = Path("/proc/self/mountinfo")
ROOT_NAME: Final = "memballoon"


def detect(
    root_name: str = ROOT_NAME, *, delegated: Path | None = None, mountinfo: Path = MOUNTINFO
) -> QuotaBackend:
    """The back end for VMs below `<hierarchy>/<root_name>`; makes nothing yet (see `prepare`).

    `delegated` is the directory, in a mounted memory hierarchy of either version, that is used in
    place of the hierarchy's own top. Raises QuotaUnavailable.
    """
    check_name(root_name)
    version_1, version_2 = memory_mounts(mountinfo.read_text())
    if delegated is not None:
        if version_1 is not None and delegated.is_relative_to(version_1):
            return Cgroup1Backend(delegated / root_name)
        if version_2 is not None and delegated.is_relative_to(version_2):
            return Cgroup2Backend(delegated / root_name)
        raise QuotaUnavailable(
            f"{delegated} is in no mounted cgroup hierarchy with memory; such are: "
            f"{version_1 or 'no version 1'}, {version_2 or 'no version 2'}"
        )
    if version_1 is not None:
        return Cgroup1Backend(version_1 / root_name)
    if version_2 is not None:
        if "memory" in (version_2 / "cgroup.controllers").read_text().split():
            return Cgroup2Backend(version_2 / root_name)
        raise QuotaUnavailable(
            f"{version_2} has no memory controller: boot without cgroup_disable=memory, or have "
            f"it delegated to this container"
        )
    raise QuotaUnavailable(
        "no cgroup hierarchy with the memory controller is mounted: mount cgroup2 on "
        "/sys/fs/cgroup, or let this container see the host's"
    )


def memory_mounts(mountinfo: str) -> tuple[Path | None, Path | None]:
    """Mount points (version 1 with the memory controller, version 2) named in `mountinfo`."""
    version_1: Path | None = None
    version_2: Path | None = None
    for line in mountinfo.splitlines():
        mount, separator, source = line.partition(" - ")
        fields, kind = mount.split(" "), source.split(" ")
        if not separator or len(fields) < 5 or len(kind) < 3:
            continue
        point = Path(_unescaped(fields[4]))
        if kind[0] == "cgroup" and "memory" in kind[2].split(","):
            version_1 = version_1 or point
        elif kind[0] == "cgroup2":
            version_2 = version_2 or point
    return version_1, version_2


def _unescaped(field: str) -> str:
    """The kernel writes space, tab, newline and backslash as octal."""
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(octal, character)
    return field
