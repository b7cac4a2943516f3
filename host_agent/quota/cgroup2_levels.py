"""What every level of a VM's directories needs, wherever they are; cgroup version 2.

A controller must be handed down level by level, and a cgroup that hands one down has no processes
of its own: see cgroup2_backend.py.
"""

import errno
from pathlib import Path

from host_agent.quota.base import Part
from host_agent.quota.cgroup2_swap import SWAP_MAX
from host_agent.quota.errors import QuotaUnavailable, VmGone


def hand_down_memory(directory: Path) -> None:
    """Enable the memory controller for the children of `directory`. Raises QuotaUnavailable."""
    try:
        if "memory" in (directory / "cgroup.subtree_control").read_text().split():
            return
        if "memory" not in (directory / "cgroup.controllers").read_text().split():
            raise QuotaUnavailable(
                f"{directory} has no memory controller: have it delegated (with systemd: "
                f"Delegate=memory) or boot without cgroup_disable=memory"
            )
        (directory / "cgroup.subtree_control").write_text("+memory\n")
    except OSError as error:
        advice = "give this user the right to write there"
        if error.errno == errno.EBUSY:
            advice = "move its own processes to a child cgroup first"
        raise QuotaUnavailable(
            f"cannot hand the memory controller down from {directory} ({error.strerror}): {advice}"
        ) from error


def kill_one_at_a_time(directory: Path) -> None:
    """memory.oom.group = 0 in a VM and both of its parts.

    A machine that is out of memory kills one process and goes on; with 1 its kernel would kill
    all. Of the driver's part the pseudo-process is to die alone, so that the driver can tell.
    What an engine made below the workload keeps its own: a container is the engine's to kill.
    """
    for path in (directory, *(directory / part for part in Part)):
        (path / "memory.oom.group").write_text("0\n")


def set_swap_max(vm: Path, swap_bytes: int) -> None:
    """What the VM may swap: its workload all of it, its driver nothing. OSError, VmGone."""
    for path, value in ((vm, swap_bytes), (vm / Part.WORKLOAD, swap_bytes), (vm / Part.DRIVER, 0)):
        try:
            (path / SWAP_MAX).write_text(f"{value}\n")
        except FileNotFoundError as missing:
            raise VmGone(f"{path} is gone: was it removed by somebody else?") from missing
