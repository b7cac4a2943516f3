"""The delegated directory of cgroup version 2 in which the VMs are made.

Two rules of version 2 matter: a controller must be handed down level by level
(cgroup.subtree_control), and a cgroup that hands one down has no processes of its own.
Kernel's Documentation/admin-guide/cgroup-v2.rst, "Top-down Constraint" and "No Internal Process
Constraint".
"""

import errno
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
from host_agent.quota.cgroup_tree import names_below, remove_tree
from host_agent.quota.errors import QuotaError, QuotaUnavailable, StillBusy, VmExists

NEEDED_FILES: Final = ("memory.reclaim", "cgroup.kill")
"""Files newer than the rest: memory.reclaim is of Linux 5.19."""


class Cgroup2Backend(QuotaBackend):
    """All VMs below one directory of a version 2 hierarchy."""

    cgroup_version = 2

    def prepare(self) -> None:
        """Make the root and hand the memory controller down to it, from the mount point on."""
        try:
            self.root.mkdir(exist_ok=True)
        except OSError as error:
            raise QuotaUnavailable(
                f"cannot make {self.root} ({error.strerror}): run as root, or name a directory "
                f"that was delegated to this user"
            ) from error
        above = [path for path in self.root.parents if (path / "cgroup.controllers").exists()]
        for directory in (*reversed(above), self.root):
            hand_down_memory(directory)
        missing = [name for name in NEEDED_FILES if not (self.root / name).exists()]
        if missing:
            raise QuotaUnavailable(
                f"{self.root} has no {missing[0]}: Linux 5.19 or newer is needed"
            )

    def create(self, name: str, quota_bytes: int, overhead_bytes: int) -> VmQuota:
        """Directory, limit, controller handed down, directories, limit; undone on failure."""
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
                quota = Cgroup2Quota(directory, overhead_bytes)
            except FileExistsError as error:
                raise VmExists(
                    f"{directory} exists: remove that VM first or pick another name"
                ) from error
            except OSError as error:
                raise QuotaError(f"cannot make the cgroups of {name}: {error}") from error
            undo.pop_all()
        return quota

    def open_existing(self, name: str, overhead_bytes: int) -> VmQuota:
        """Open the files of a VM that is there."""
        return Cgroup2Quota(self.root / check_name(name), overhead_bytes)

    def names(self) -> tuple[str, ...]:
        """Directories with both parts."""
        return names_below(self.root)

    def remove_root(self) -> None:
        """Rmdir, unless a VM is left. What was handed down above stays so."""
        if names := self.names():
            raise StillBusy(f"{self.root} still has VMs, remove them first: {', '.join(names)}")
        remove_tree(self.root, time.monotonic() + SETTLE_TIMEOUT_S)


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
