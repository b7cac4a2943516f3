"""Directories that an engine makes in the other cgroup hierarchies, and nobody removes.

With cgroup version 1 an engine makes a container's parent in each hierarchy (cpu, pids, freezer and
so on), and at the end it removes the container's own directory alone. The agent owns the parents:
it removes the empty ones with the mock VM.
"""

from collections.abc import Iterator
from pathlib import Path

from host_agent.machines.cgroup_layout import hierarchy_of
from host_agent.quota.cgroup_tree import remove_empty, subtree


def cgroup_hierarchies(mountinfo: str) -> Iterator[Path]:
    """Mount points of all cgroup hierarchies in the text of /proc/self/mountinfo (proc(5))."""
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        if source.split(" ")[0] in ("cgroup", "cgroup2"):
            yield Path(mount.split(" ")[4])


def remove_elsewhere(cgroup: Path) -> bool:
    """Remove the namesakes of a cgroup in all other hierarchies, with all below them.

    Those with something in them stay; whether none did. The cgroup itself is left alone: its own
    hierarchy is not looked at. Blocks for a millisecond.
    """
    mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    own = hierarchy_of(cgroup)
    none_left = True
    for hierarchy in cgroup_hierarchies(mountinfo):
        if hierarchy != own:
            namesake = hierarchy / cgroup.relative_to(own)
            remove_empty(subtree(namesake))
            none_left = none_left and not namesake.exists()
    return none_left
