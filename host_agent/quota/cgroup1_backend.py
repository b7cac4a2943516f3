"""The directory of a version 1 memory hierarchy in which the VMs are made."""

import time
from contextlib import ExitStack

from host_agent.quota.base import (
    SETTLE_TIMEOUT_S,
    Part,
    QuotaBackend,
    VmQuota,
    check_limit,
    check_name,
)
from host_agent.quota.cgroup1 import Cgroup1Quota
from host_agent.quota.cgroup1_room import LIMIT
from host_agent.quota.cgroup_tree import names_below, remove_tree
from host_agent.quota.errors import QuotaError, QuotaUnavailable, StillBusy, VmExists


class Cgroup1Backend(QuotaBackend):
    """All VMs below one directory of a version 1 memory hierarchy."""

    cgroup_version = 1

    def prepare(self) -> None:
        """Make the root directory; its parent must be in a hierarchy that adds up."""
        try:
            self.root.mkdir(exist_ok=True)
            hierarchical = (self.root / "memory.use_hierarchy").read_text().strip()
        except OSError as error:
            raise QuotaUnavailable(
                f"cannot make {self.root} ({error.strerror}): run as root on a mounted memory "
                f"hierarchy that is writable"
            ) from error
        if hierarchical != "1":
            raise QuotaUnavailable(
                f"{self.root} does not add up its children: write 1 to memory.use_hierarchy above"
            )

    def create(self, name: str, quota_bytes: int, overhead_bytes: int) -> VmQuota:
        """Directory, limit, directories, limit; undone on failure."""
        directory = self.root / check_name(name)
        vm_limit_bytes = check_limit(quota_bytes) + check_limit(overhead_bytes)
        with ExitStack() as undo:
            try:
                directory.mkdir()
                undo.callback(remove_tree, directory, time.monotonic() + SETTLE_TIMEOUT_S)
                (directory / LIMIT).write_text(f"{vm_limit_bytes}")
                for part in Part:
                    (directory / part).mkdir()
                (directory / Part.WORKLOAD / LIMIT).write_text(f"{quota_bytes}")
                quota = Cgroup1Quota(directory, overhead_bytes)
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
        return Cgroup1Quota(self.root / check_name(name), overhead_bytes)

    def names(self) -> tuple[str, ...]:
        """Directories with both parts."""
        return names_below(self.root)

    def remove_root(self) -> None:
        """rmdir, unless a VM is left."""
        if names := self.names():
            raise StillBusy(f"{self.root} still has VMs, remove them first: {', '.join(names)}")
        remove_tree(self.root, time.monotonic() + SETTLE_TIMEOUT_S)
