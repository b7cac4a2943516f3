"""Quotas on the memory controller of cgroup version 1.

How room is made without killing and without swapping is in cgroup1_room.py.

Swap. Memory and swap together are limited to the limit and the VM's swap, at both levels, and that
moves with the limit: cgroup1_limit.py.

Running dry. `memory.oom_control` = 1 hangs a task that touches memory at the limit until the limit
is raised or the flag is 0 again (a system call that needs memory gets ENOMEM instead). The flag is
inherited by cgroups made below later: these must have no limit below W, since nobody listens there.

Kernel's Documentation/admin-guide/cgroup-v1/memory.rst, sections 6, 9 and 10.
"""

import errno
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from host_agent.quota.base import (
    DEATH_TIMEOUT_S,
    MAKE_ROOM_TIMEOUT_S,
    SETTLE_TIMEOUT_S,
    DryState,
    Part,
    QuotaBackend,
    QuotaReading,
    SwapReading,
    VmQuota,
    check_limit,
    check_name,
    check_within,
)
from host_agent.quota.cgroup1_limit import (
    LIMIT,
    MEMSW_LIMIT,
    USAGE,
    Cgroup1Limit,
    restore_swappiness,
    set_swappiness,
)
from host_agent.quota.cgroup1_room import Cgroup1Room
from host_agent.quota.cgroup_tree import (
    POLL_INTERVAL_S,
    kill_below,
    names_below,
    pids_below,
    remove_empty,
    remove_tree,
    subtree,
    wait_until,
)
from host_agent.quota.control_file import ControlFile, parse_counters
from host_agent.quota.errors import (
    NO_SWAP_ACCOUNTING,
    LimitRefused,
    QuotaError,
    QuotaUnavailable,
    StillBusy,
    VmExists,
    VmGone,
)
from host_agent.quota.phases import ShrinkPhases
from host_agent.quota.raise_guard import RaiseGuard

OOM_CONTROL: Final = "memory.oom_control"


class Cgroup1Quota(VmQuota):
    """One VM's directories below a version 1 memory hierarchy."""

    def __init__(self, directory: Path, overhead_bytes: int, swap_bytes: int = 0) -> None:
        super().__init__(directory, overhead_bytes, swap_bytes)
        workload, driver = directory / Part.WORKLOAD, directory / Part.DRIVER
        self._guard = RaiseGuard()
        self._event_fd: int | None = None
        self._nested_kills: dict[int, int] = {}  # by inode: such a cgroup may go, its kills stay
        with ExitStack() as opened:

            def control(path: Path, *, writable: bool = False) -> ControlFile:
                file = ControlFile(path, writable=writable)
                opened.callback(file.close)
                return file

            self._vm_limit = Cgroup1Limit(directory, swap_bytes)
            opened.callback(self._vm_limit.close)
            self._workload_limit = Cgroup1Limit(workload, swap_bytes)
            opened.callback(self._workload_limit.close)
            self._workload_usage = control(workload / USAGE)
            self._driver_usage = control(driver / USAGE)
            self._oom_control = control(workload / OOM_CONTROL, writable=True)
            self._oom_counters = (
                control(directory / OOM_CONTROL),
                control(driver / OOM_CONTROL),
                self._oom_control,
            )
            self._room = Cgroup1Room(workload, self._guard, swap_bytes)
            opened.callback(self._room.close)
            self._files = opened.pop_all()

    def read(self) -> QuotaReading:
        """Four reads of 1 us."""
        return QuotaReading(
            vm_limit_bytes=self._vm_limit.read_bytes_count(),
            workload_limit_bytes=self._workload_limit.read_bytes_count(),
            workload_usage_bytes=self._workload_usage.read_bytes_count(),
            driver_usage_bytes=self._driver_usage.read_bytes_count(),
        )

    def read_swap(self) -> SwapReading | None:
        """From the workload's memsw; exact to the 64 pages that each CPU charges ahead."""
        return self._workload_limit.read_swap()

    def restore_swap(self) -> None:
        """Swappiness, then memsw at both levels. May reclaim cache."""
        restore_swappiness(self.directory, self.swap_bytes)
        self._workload_limit.restore_sum()
        self._vm_limit.restore_sum()

    def raise_quota(self, quota_bytes: int, workload_bytes: int | None = None) -> None:
        """The VM's limit first, then the workload's: two writes of 1 us for each, memsw's too."""
        vm_limit_bytes = check_limit(quota_bytes) + self.overhead_bytes
        limit_bytes = check_within(workload_bytes, quota_bytes)
        with self._guard.raising() as raised:
            old_bytes = self._vm_limit.read_bytes_count()
            if vm_limit_bytes < old_bytes:
                raise ValueError(f"{vm_limit_bytes} would lower {self.name} from {old_bytes}")
            self._vm_limit.raise_to(vm_limit_bytes)
            self._raise_workload(limit_bytes, raised)

    def raise_workload(self, limit_bytes: int) -> None:
        """Two writes of 1 us."""
        check_limit(limit_bytes)
        with self._guard.raising() as raised:
            check_within(limit_bytes, self._vm_limit.read_bytes_count() - self.overhead_bytes)
            self._raise_workload(limit_bytes, raised)

    def _raise_workload(self, limit_bytes: int, raised: Callable[[int], None]) -> None:
        limit_bytes = max(limit_bytes, self._workload_limit.read_bytes_count())
        self._workload_limit.raise_to(limit_bytes)
        raised(limit_bytes)

    def make_room(
        self, limit_bytes: int, timeout_s: float = MAKE_ROOM_TIMEOUT_S, swap_bytes: int = 0
    ) -> ShrinkPhases:
        """EBUSY from the kernel is NoRoom."""
        deadline_s = time.monotonic() + timeout_s
        return self._room.make(check_limit(limit_bytes), deadline_s, swap_bytes)

    def lower_quota(self, quota_bytes: int, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
        """EBUSY from the kernel is tried again until `timeout_s`, then LimitRefused."""
        vm_limit_bytes = check_limit(quota_bytes) + self.overhead_bytes
        workload_bytes = self._workload_limit.read_bytes_count()
        if workload_bytes > quota_bytes:
            raise LimitRefused(
                f"the workload of {self.name} may use {workload_bytes} bytes, more than the new "
                f"quota {quota_bytes}: make room first"
            )
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return self._vm_limit.lower_to(vm_limit_bytes)
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() >= deadline_s:
                    raise LimitRefused(
                        f"cannot lower {self.name} to {vm_limit_bytes} bytes ({error.strerror}): "
                        f"is the driver using more than its overhead of {self.overhead_bytes}?"
                    ) from error
            time.sleep(POLL_INTERVAL_S)

    def protect(self, reservation_bytes: int) -> None:
        """Nothing: memory.soft_limit_in_bytes is a hint for kswapd, no guarantee."""
        check_limit(reservation_bytes)
        self._vm_limit.read_bytes_count()  # VmGone where there is nobody to protect

    @property
    def protected_bytes(self) -> int | None:
        """This version protects nobody."""
        return None

    def arm_dry_events(self) -> int:
        """oom_control = 1 and an eventfd on it."""
        if self._event_fd is None:
            event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._files.callback(os.close, event_fd)
            registration = f"{event_fd} {self._oom_control.fileno()}"
            (self.directory / Part.WORKLOAD / "cgroup.event_control").write_text(registration)
            self._event_fd = event_fd
        self.rearm()
        return self._event_fd

    def dry_state(self) -> DryState:
        """`under_oom` is the kernel's own flag: a task hangs at the limit now."""
        if self._event_fd is not None:
            with suppress(BlockingIOError):
                os.eventfd_read(self._event_fd)
        under_oom = parse_counters(self._oom_control.read())["under_oom"] > 0
        return DryState(under_oom=under_oom, kills_total=self.oom_kills_total)

    def let_kernel_decide(self) -> None:
        """oom_control = 0: hung tasks go on, or one of them is killed."""
        self._oom_control.write(0)
        self._release_nested()

    def rearm(self) -> None:
        """oom_control = 1."""
        self._oom_control.write(1)

    def _release_nested(self) -> None:
        """Cgroups made below while the flag was 1 have inherited it."""
        for path in subtree(self.directory):
            with suppress(FileNotFoundError, OSError):
                (path / OOM_CONTROL).write_text("0")

    @property
    def oom_kills_total(self) -> int:
        """Sum over all cgroups of the VM, those gone since the last look included."""
        # Each cgroup counts its own alone. Nested ones are rare, and may go.
        own = sum(parse_counters(file.read())["oom_kill"] for file in self._oom_counters)
        for part in Part:
            for path in subtree(self.directory / part):
                if path.name == part and path.parent == self.directory:
                    continue
                with suppress(OSError):
                    counters = parse_counters((path / OOM_CONTROL).read_text())
                    self._nested_kills[path.stat().st_ino] = counters.get("oom_kill", 0)
        return own + sum(self._nested_kills.values())

    def processes(self, part: Part) -> tuple[int, ...]:
        """Read from cgroup.procs of the part and all below it."""
        self._oom_control.fileno()  # VmGone once we let go
        return pids_below(self.directory / part)

    def driver_inode(self) -> int:
        """st_ino of the driver's directory."""
        try:
            return (self.directory / Part.DRIVER).stat().st_ino
        except FileNotFoundError as missing:
            raise VmGone(f"{self.directory} is gone: was it removed by somebody else?") from missing

    def kill_all(self, timeout_s: float = DEATH_TIMEOUT_S) -> None:
        """Signal, release whoever hangs, look again."""

        def none_left() -> bool:
            if not kill_below(self.directory):
                return True
            # After the signal, not before: else the kernel would kill one of them for us and
            # count it as an OOM kill. Kernels before 4.x need it to let a hung task die at all.
            self._release_nested()
            return False

        if not wait_until(none_left, time.monotonic() + timeout_s):
            pids = ", ".join(map(str, pids_below(self.directory)))
            raise StillBusy(
                f"processes of {self.name} do not die (pids: {pids}; 0 is one that this pid "
                f"namespace cannot see): are they stuck in a device or a network file system?"
            )

    def remove(self, timeout_s: float = DEATH_TIMEOUT_S) -> None:
        """rmdir, children first, until the kernel lets go."""
        deadline_s = time.monotonic() + timeout_s
        remove_tree(self.directory, deadline_s)
        self.close()

    def close(self) -> None:
        """A make_room under way gives up at its next step; waits for that."""
        self._guard.close(self._files.close)
        self._event_fd = None


class Cgroup1Backend(QuotaBackend):
    """All VMs below one directory of a version 1 memory hierarchy."""

    cgroup_version = 1

    def prepare(self) -> None:
        """Make the root directory; its parent must be in a hierarchy that adds up."""
        try:
            for directory in (*self.between, self.root):
                directory.mkdir(exist_ok=True)
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

    def create(
        self, name: str, quota_bytes: int, overhead_bytes: int, swap_bytes: int = 0
    ) -> VmQuota:
        """Directory, limits, directories, limits; undone on failure."""
        directory = self.root / check_name(name)
        vm_limit_bytes = check_limit(quota_bytes) + check_limit(overhead_bytes)
        with ExitStack() as undo:
            try:
                directory.mkdir()
                undo.callback(remove_tree, directory, time.monotonic() + SETTLE_TIMEOUT_S)
                accounted = (directory / MEMSW_LIMIT).exists()
                if check_limit(swap_bytes) and not accounted:
                    raise QuotaError(f"{name} can't have swap: {NO_SWAP_ACCOUNTING}")
                for part in Part:
                    (directory / part).mkdir()
                set_swappiness(directory, swap_bytes)
                workload = directory / Part.WORKLOAD
                for path, limit_bytes in ((directory, vm_limit_bytes), (workload, quota_bytes)):
                    (path / LIMIT).write_text(f"{limit_bytes}")
                    if accounted:
                        (path / MEMSW_LIMIT).write_text(f"{limit_bytes + swap_bytes}")
                quota = Cgroup1Quota(directory, overhead_bytes, swap_bytes)
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
        """Open the files of a VM that is there."""
        return Cgroup1Quota(directory or self.root / check_name(name), overhead_bytes, swap_bytes)

    def names(self) -> tuple[str, ...]:
        """Directories with both parts."""
        return names_below(self.root)

    def remove_root(self) -> None:
        """rmdir, unless a VM is left."""
        if names := self.names():
            raise StillBusy(f"{self.root} still has VMs, remove them first: {', '.join(names)}")
        remove_tree(self.root, time.monotonic() + SETTLE_TIMEOUT_S)
        remove_empty(self.between)
