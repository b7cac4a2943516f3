"""A cgroup namespace of our own, which an engine gives every container with cgroup version 2.

Where version 2 is mounted with nsdelegate, as systemd does it, such a namespace is a border: a
process inside it can't move others that are outside (ENOENT), even with the whole hierarchy mounted
and all rights. An agent in a container moves the drivers of other containers; so it joins the
namespace of process 1, which is the host's in a container with the host's pids.
cgroup_namespaces(7); Documentation/admin-guide/cgroup-v2.rst, "Delegation".
"""

import ctypes
import os
from pathlib import Path
from typing import Final

from host_agent.quota.errors import QuotaUnavailable

NAMESPACE_OF_INIT: Final = Path("/proc/1/ns/cgroup")
OUTSIDE: Final = "/.."
"""How /proc/self/mountinfo names the root of a mount that is above our namespace's."""

_CLONE_NEWCGROUP: Final = 0x02000000


def is_outside(mount_point: Path, mountinfo: str) -> bool:
    """Whether the version 2 hierarchy that is mounted there goes beyond our namespace, and moving
    processes there is forbidden for that.
    """
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        fields, kind = mount.split(" "), source.split(" ")
        if kind[0] == "cgroup2" and fields[4] == str(mount_point):
            return fields[3].startswith(OUTSIDE) and "nsdelegate" in kind[2].split(",")
    return False


def join_namespace_of_init() -> None:
    """This thread, and those that it starts from now on. Raises QuotaUnavailable."""
    try:
        descriptor = os.open(NAMESPACE_OF_INIT, os.O_RDONLY | os.O_CLOEXEC)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(descriptor, _CLONE_NEWCGROUP):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise QuotaUnavailable(
            "this container has a cgroup namespace of its own, and could not move a driver to its "
            f"place ({error.strerror}): start it with `--cgroupns=host`, or with `--pid=host "
            "--cap-add=SYS_ADMIN --cap-add=SYS_PTRACE --security-opt=apparmor=unconfined`"
        ) from error
