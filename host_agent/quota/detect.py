"""Which memory controller this machine has, and where: version 1 if mounted, else version 2.

On a hybrid machine both hierarchies are mounted and the memory controller is in one of them.
/proc/self/mountinfo: proc_pid_mountinfo(5).
"""

from pathlib import Path
from typing import Final

from host_agent.quota.base import QuotaBackend, check_cgroup_path
from host_agent.quota.cgroup1 import Cgroup1Backend
from host_agent.quota.cgroup2_backend import Cgroup2Backend
from host_agent.quota.delegation import HOW, OWN_CGROUP, delegated_home
from host_agent.quota.errors import QuotaUnavailable

MOUNTINFO: Final = Path("/proc/self/mountinfo")
ROOT_NAME: Final = "memballoon"


def detect(
    root_path: str = ROOT_NAME, *, mountinfo: Path = MOUNTINFO, own_cgroup: Path = OWN_CGROUP
) -> QuotaBackend:
    """The back end for VMs below `root_path`; makes nothing yet (see `prepare`).

    The path counts from what was delegated to this process (version 2, delegation.py), else from
    the hierarchy's top. With a leading slash it counts from the top in any case; what is above its
    last name has to be there then and is taken for delegated. Raises QuotaUnavailable.
    """
    check_cgroup_path(root_path)
    version_1, version_2 = memory_mounts(mountinfo.read_text())
    from_top = root_path.startswith("/")
    path = root_path.removeprefix("/")
    if version_1 is not None:
        root = version_1 / path
        return Cgroup1Backend(root, root.parent if from_top else version_1)
    if version_2 is None:
        raise QuotaUnavailable(
            "no cgroup hierarchy with the memory controller is mounted: mount cgroup2 on "
            "/sys/fs/cgroup, or let this container see the host's"
        )
    if from_top:
        base = (version_2 / path).parent
    else:
        base = delegated_home(version_2, own_cgroup.read_text()) or version_2
    delegated = base != version_2
    root = base / Path(path).name if from_top else base / path
    _check_memory(base, delegated)
    return Cgroup2Backend(root, base, delegated=delegated)


def _check_memory(base: Path, delegated: bool) -> None:
    try:
        if "memory" in (base / "cgroup.controllers").read_text().split():
            return
    except FileNotFoundError:
        raise QuotaUnavailable(
            f"there is no cgroup {base}: have it made and delegated first, or leave out the "
            f"leading slash of cgroup_root"
        ) from None
    advice = "boot without cgroup_disable=memory, or have it delegated to this container"
    if delegated:
        advice = f"have it delegated ({HOW}; in a unit: Delegate=memory)"
    raise QuotaUnavailable(f"{base} has no memory controller: {advice}")


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
