"""A VM's directories inside the scope that systemd keeps for a container; cgroup version 2.

    docker-<id>.scope      systemd's: limits that are written here are undone by its next reload
      <vm>                 limit = quota + overhead
        workload           limit W <= quota
          container        the container's processes; its limit is a page above the VM's size
        driver

Inside of a scope that was made with Delegate=yes systemd changes nothing. Once the scope hands the
memory controller down it can have no processes of its own: so whoever is to join it (`docker exec`)
is refused by the kernel, and joins the cgroup of the container's process 1 instead (runc 1.0 and
newer), below W.

Whoever is in the scope is moved while it stands still: nothing that it charges later is outside.
systemd, docs/CGROUP_DELEGATION.md; runc, libcontainer/process_linux.go.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from host_agent.quota.base import Part
from host_agent.quota.cgroup2_levels import hand_down_memory, kill_one_at_a_time, set_swap_max
from host_agent.quota.cgroup2_swap import SWAP_MAX

CONTAINER: Final = "container"
"""Of the workload's directory: a cgroup that hands memory down to it has no processes itself."""


@dataclass(frozen=True, slots=True)
class ScopeLimits:
    """What is in force in there before anybody runs."""

    vm_bytes: int
    workload_bytes: int
    container_bytes: int
    swap_bytes: int


def make_in_scope(scope: Path, name: str, limits: ScopeLimits) -> Path:
    """Make the VM's directories and move all processes of the scope in; the VM's own directory.

    What is there of an attempt before is used. Raises OSError, QuotaUnavailable.
    """
    directory = scope / name
    workload = directory / Part.WORKLOAD
    container = workload / CONTAINER
    for path in (container, directory / Part.DRIVER):
        path.mkdir(parents=True, exist_ok=True)
    while pids := (scope / "cgroup.procs").read_text().split():
        for pid in pids:
            move_process(pid, container)
    for path in (scope, directory, workload):
        hand_down_memory(path)
    for path, limit_bytes in (
        (directory, limits.vm_bytes),
        (workload, limits.workload_bytes),
        (container, limits.container_bytes),
    ):
        (path / "memory.max").write_text(f"{limit_bytes}\n")
    if (directory / SWAP_MAX).exists():
        set_swap_max(directory, limits.swap_bytes)
    kill_one_at_a_time(directory)
    return directory


def move_process(pid: str, cgroup: Path) -> None:
    """Move one process; one that has ended meanwhile is no error. Raises OSError."""
    try:
        (cgroup / "cgroup.procs").write_text(f"{pid}\n")
    except ProcessLookupError:
        return
