"""Who connects without being a guest's driver: a container's driver that is not in its place yet,
or a stranger.

A container that somebody else started is born in its VM's `workload` cgroup, its driver with it. So
before it does anything that costs memory (charges stay behind where a process moves) it knocks: it
connects and says nothing. The kernel tells who that is, the agent moves it into the `driver` cgroup
and hangs up; what it starts from then on is the driver. A process can only do that within its own
VM, below that VM's limit.

The kernel moves whoever has a number when it is written, and a process that has knocked may end
and its number be another's. So it is held by a pidfd, and looked at before and afterwards.
"""

import logging
from pathlib import Path

from host_agent.guest import Guest
from host_agent.machines.cgroup_layout import hierarchy_of, parent_path
from host_agent.machines.identity import ProcessHandle, parent_of, pid_inside
from host_agent.quota.base import Part

LOG = logging.getLogger("memballoon.intake")

MEMORY = "memory"


def may_become_driver(guest: Guest, pid: int) -> bool:
    """Whether the kernel has this process in the workload of a VM that somebody else starts."""
    if guest.spec.container is None:
        return False
    return pid in guest.live_quota.processes(Part.WORKLOAD)


def make_driver(guest: Guest, process: ProcessHandle) -> None:
    """Move a process of the guest into its driver's cgroup; may block for milliseconds.

    Raises OSError, ProcessLookupError if it has ended; nobody was moved then.
    """
    pid = process.pid
    ended = ProcessLookupError(f"pid {pid} of its container has ended")
    # In this order: what is alive after it was found in the workload is what was found there.
    if not may_become_driver(guest, pid) or not process.is_alive():
        raise ended
    guest.live_quota.procs_path(Part.DRIVER).write_text(f"{pid}", encoding="ascii")
    if not process.is_alive():
        _put_back(guest, pid)
        raise ended


def _put_back(guest: Guest, pid: int) -> None:
    """Who has this number now was moved by mistake: it goes where its parent is, as it was born."""
    driver = guest.live_quota.procs_path(Part.DRIVER)
    if pid not in guest.live_quota.processes(Part.DRIVER):
        return
    try:
        place = memory_cgroup_of(_cgroup_text(parent_of(pid)))
        if place is not None:
            procs = hierarchy_of(driver.parent) / place.lstrip("/") / driver.name
            procs.write_text(f"{pid}", encoding="ascii")
    except OSError as error:
        LOG.error("%s: pid %d is in its driver's cgroup by mistake: %s", guest.name, pid, error)


def who_is(guest: Guest, pid: int) -> str:
    """One line about a stranger at the guest's socket, and what to do about it."""
    if pid == 0:
        return (
            "somebody connected whom this agent can't see: run the agent's container with "
            "`pid: host`"
        )
    workload = guest.live_quota.procs_path(Part.WORKLOAD).parent
    hierarchy = hierarchy_of(workload)
    parent = parent_path(workload, hierarchy)
    root = str(Path(parent).parent.parent)
    place = memory_cgroup_of(_cgroup_text(pid))
    turned_away = f"pid {pid} is not its driver: turned away"
    if place is None:
        return turned_away
    if place.startswith(f"{root}/"):
        owner = Path(place).relative_to(root).parts[0]
        if owner == guest.name:
            return turned_away
        return (
            f"{turned_away}; it belongs to {owner} ({place}): give each container its own VM's "
            "socket directory"
        )
    if pid_inside(pid) in (None, pid):
        return turned_away  # a process of the host: no container that could be started otherwise
    return (
        f"{turned_away}; it is in the cgroup {place}: start its container with the cgroup parent "
        f"{parent}"
    )


def memory_cgroup_of(text: str) -> str | None:
    """The memory cgroup that the text of a /proc/PID/cgroup names (cgroups(7)); None if none."""
    unified: str | None = None
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if MEMORY in controllers.split(","):
            return path
        if number == "0" and not controllers:
            unified = path
    return unified


def _cgroup_text(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
