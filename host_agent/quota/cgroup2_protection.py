"""Reservations as the kernel protects them: memory.min, from the workload up to the agent's root.

While the host reclaims, memory.min is what it leaves alone: page cache, and with swap anonymous
memory, up to the reservation. It is hierarchical: what a cgroup claims counts up to what the one
above it claims. So the VM's directory claims what its workload does, and the root the sum of its
VMs. Not "max": where cgroup2 is mounted with memory_recursiveprot, as systemd does, what nobody
below claims would protect everything below.

Above the root nothing is written: that is not the agent's. In a delegated directory the protection
ends where whoever delegated it sets no memory.min (systemd: MemoryMin= of the unit).

min and not low: a reservation can never be taken. The pool bounds the sum of all reservations, and
the host keeps what is beside the pool. A guest's own limits are no matter: the kernel protects
nobody from reclaim that starts at the cgroup's own limit, so room is made as without it.

Kernel's Documentation/admin-guide/cgroup-v2.rst, "memory.min" and "Memory Ownership".
"""

from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Final

from host_agent.quota.base import UNLIMITED_BYTES
from host_agent.quota.cgroup_tree import child_directories
from host_agent.quota.control_file import parse_limit
from host_agent.quota.errors import QuotaError

MIN: Final = "memory.min"

_root_lock: Final = Lock()
"""VMs come and go in several threads; a sum read by one must not be written after another's."""


def protect_root(root: Path) -> None:
    """Let the root claim the sum of what its VMs claim. Raises QuotaError.

    Does nothing where the root is gone, or is the hierarchy's own top, which claims nothing.
    """
    with _root_lock:
        total_bytes = sum(claimed_bytes(child) for child in child_directories(root))
        try:
            if claimed_bytes(root) != total_bytes:
                (root / MIN).write_text(f"{total_bytes}\n")
        except FileNotFoundError:
            return
        except OSError as error:
            raise QuotaError(f"cannot protect {total_bytes} bytes in {root}: {error}") from error


def protected_bytes(workload: Path) -> int:
    """What the kernel protects of the workload: the least that it and those above it claim."""
    least_bytes = claimed_bytes(workload)
    for above in workload.parents:
        if not (above / MIN).exists():  # the hierarchy's top, which is no limit
            break
        least_bytes = min(least_bytes, claimed_bytes(above))
    return least_bytes


def claimed_bytes(directory: Path) -> int:
    """Its own memory.min; 0 for a cgroup that is gone or has none."""
    with suppress(OSError):
        return min(parse_limit((directory / MIN).read_text()), UNLIMITED_BYTES)
    return 0
