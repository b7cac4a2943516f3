"""The machine's swap space, which all VMs share, and whether the kernel counts it by cgroup.

proc(5) for /proc/swaps: name, type, size, used and priority; sizes in KiB, counted from the line's
end because a name may contain spaces.
"""

from pathlib import Path
from typing import Final

from host_agent.quota.cgroup_tree import child_directories
from protocol.units import KIB

SWAPS: Final = Path("/proc/swaps")
_ACCOUNTS: Final = ("memory.memsw.limit_in_bytes", "memory.swap.max")
_LIMITS: Final = ("memory.limit_in_bytes", "memory.max")


def free_swap_bytes(swaps: Path = SWAPS) -> int:
    """What is left over all swap areas; 0 where there is none, or none can be seen."""
    try:
        lines = swaps.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
        areas = [line.rsplit(None, 3) for line in lines]
        return sum((int(size) - int(used)) * KIB for _, size, used, _ in areas)
    except (OSError, ValueError):
        return 0


def is_accounted(root: Path) -> bool | None:
    """Whether cgroups beside `root`, an agent's, have limits of swap; None if there are none.

    The topmost directory of version 2 has no limits at all, so its children are looked at.
    """
    top = root.parent
    for directory in (root, top, *child_directories(top)):
        if any((directory / name).exists() for name in _LIMITS):
            return any((directory / name).exists() for name in _ACCOUNTS)
    return None
