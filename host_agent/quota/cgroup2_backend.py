"""The delegated directory of cgroup version 2 in which the VMs are made.

Two rules of version 2 matter: a controller must be handed down level by level
(cgroup.subtree_control), and a cgroup that hands one down has no processes of its own.
Kernel's Documentation/admin-guide/cgroup-v2.rst, "Top-down Constraint" and "No Internal Process
Constraint".
"""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from host_agent.quota.base import (
    SETTLE_TIMEOUT_S,
    Part,
    QuotaBackend,
    VmQuota,
    check_limit,
    check_name,
)
from host_agent.quota.cgroup2 import Cgroup2Quota
from host_agent.quota.cgroup2_levels import hand_down_memory, kill_one_at_a_time, set_swap_max
from host_agent.quota.cgroup2_swap import SWAP_MAX
from host_agent.quota.cgroup_tree import names_below, remove_empty, remove_tree
from host_agent.quota.delegation import leave_for_leaf
from host_agent.quota.errors import (
    NO_SWAP_ACCOUNTING,
    QuotaError,
    QuotaUnavailable,
    StillBusy,
    VmExists,
)

NEEDED_FILES: Final = ("memory.reclaim", "cgroup.kill")
"""Files newer than the rest: memory.reclaim is of Linux 5.19."""


class Cgroup2Backend(QuotaBackend):
    """All VMs below one directory of a version 2 hierarchy."""

    cgroup_version = 2

    def __init__(self, root: Path, base: Path | None = None, *, delegated: bool = False) -> None:
        """`delegated`: what is above the base is somebody else's, and left as it is."""
        super().__init__(root, base)
        self.delegated = delegated

    def prepare(self) -> None:
        """Make the root and hand the memory controller down to it, from the mount point on.

        From the base on where that was delegated; this process leaves it for a leaf below then.
        """
        above: tuple[Path, ...] = (self.base, *self.between)
        if self.delegated:
            leave_for_leaf(self.base)
        else:
            parents = (path for path in self.root.parents if (path / "cgroup.controllers").exists())
            above = tuple(reversed(tuple(parents)))
        try:
            for directory in (*self.between, self.root):
                directory.mkdir(exist_ok=True)
        except OSError as error:
            raise QuotaUnavailable(
                f"cannot make {self.root} ({error.strerror}): run as root, or name a directory "
                f"that was delegated to this user"
            ) from error
        for directory in (*above, self.root):
            hand_down_memory(directory)
        missing = [name for name in NEEDED_FILES if not (self.root / name).exists()]
        if missing:
            raise QuotaUnavailable(
                f"{self.root} has no {missing[0]}: Linux 5.19 or newer is needed"
            )

    def create(
        self, name: str, quota_bytes: int, overhead_bytes: int, swap_bytes: int = 0
    ) -> VmQuota:
        """Directory, limit, controller handed down, directories, limits; undone on failure."""
        directory = self.root / check_name(name)
        vm_limit_bytes = check_limit(quota_bytes) + check_limit(overhead_bytes)
        with ExitStack() as undo:
            try:
                directory.mkdir()
                undo.callback(remove_tree, directory, time.monotonic() + SETTLE_TIMEOUT_S)
                (directory / "memory.max").write_text(f"{vm_limit_bytes}\n")
                hand_down_memory(directory)
                for part in Part:
                    (directory / part).mkdir()
                (directory / Part.WORKLOAD / "memory.max").write_text(f"{quota_bytes}\n")
                if (directory / SWAP_MAX).exists():
                    set_swap_max(directory, check_limit(swap_bytes))
                elif swap_bytes:
                    raise QuotaError(f"{name} can't have swap: {NO_SWAP_ACCOUNTING}")
                kill_one_at_a_time(directory)
                quota = Cgroup2Quota(directory, overhead_bytes, swap_bytes=swap_bytes)
            except FileExistsError as error:
                raise VmExists(
                    f"{directory} exists: remove that VM first or pick another name"
                ) from error
            except OSError as error:
                raise QuotaError(f"cannot make the cgroups of {name}: {error}") from error
            undo.pop_all()
        return quota

    def open_existing(
        self,
        name: str,
        overhead_bytes: int,
        swap_bytes: int = 0,
        directory: Path | None = None,
    ) -> VmQuota:
        """Open the files of a VM that is there. Who was held stays so until `dry_state`."""
        home = self.root / check_name(name)
        directory = home if directory is None else directory
        quota = Cgroup2Quota(
            directory, overhead_bytes, swap_bytes=swap_bytes, in_scope=directory != home
        )
        try:
            kill_one_at_a_time(directory)
        except OSError as error:
            quota.close()
            raise QuotaError(f"cannot take over the cgroups of {name}: {error}") from error
        return quota

    def names(self) -> tuple[str, ...]:
        """Directories with both parts."""
        return names_below(self.root)

    def remove_root(self) -> None:
        """Rmdir, unless a VM is left. What was handed down above stays so."""
        if names := self.names():
            raise StillBusy(f"{self.root} still has VMs, remove them first: {', '.join(names)}")
        remove_tree(self.root, time.monotonic() + SETTLE_TIMEOUT_S)
        remove_empty(self.between)
