"""Quotas on the memory controller of cgroup version 2, below a delegated directory.

The kernel never refuses a limit here: memory.max below need kills. So room is made as
cgroup2_room.py says, and the VM's limit is lowered only when everything that the workload may
still use fits under it.

Running dry. Version 2 cannot hold a task at its limit: it kills. So dry events come from a soft
wall below it: memory.high = W - W/32 (4 MiB at least, a quarter of W at most). Above the wall the
kernel reclaims and, where that does not help, slows each allocation by 64 s x (excess/limit)^2 per
256 KiB a CPU: nothing at 1 % above, 60 ms at W. That leaves about a second in a guest of 512 MiB,
against 11 ms that an event may be late. Dry means: above the wall, and what cannot be reclaimed
is near it (NEAR_WALL_BYTES) too. A guest that streams through its page cache touches the wall all
the time and is not dry.

Slowing is not holding: by that formula the wall of a guest of 128 MiB is 0.4 s thick, and six
processes that allocate at once were through one in less than 2 s, on a machine ten times slower. So
a dry guest that `dry_state` finds halfway through it is frozen (cgroup.freeze) until a raise,
`let_kernel_decide`, or a look that finds it dry no more. Its other tasks stand still as well, which
version 1 spares them until they need memory.

memory.high left below need nearly stops a guest, so an unanswered event must end in
`let_kernel_decide` (high = max, thawed), and the watchdog does the same for a dead agent.

Swap is left as whoever made the cgroups set it. The wall costs a guest 3 % of W in comfort.
Kernel's Documentation/admin-guide/cgroup-v2.rst; mm/memcontrol.c, calculate_high_delay.
"""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from host_agent.quota.base import (
    DEATH_TIMEOUT_S,
    MAKE_ROOM_TIMEOUT_S,
    SETTLE_TIMEOUT_S,
    UNLIMITED_BYTES,
    DryState,
    Part,
    QuotaReading,
    VmQuota,
    check_limit,
    check_within,
)
from host_agent.quota.cgroup2_room import (
    NEAR_WALL_BYTES,
    Cgroup2Room,
    limit_text,
    reclaimable_bytes,
)
from host_agent.quota.cgroup_tree import pids_below, remove_tree, wait_until
from host_agent.quota.control_file import ControlFile, FileOpener, parse_counters
from host_agent.quota.errors import LimitRefused, QuotaError, StillBusy, VmGone
from host_agent.quota.inotify import drain, watch_file
from host_agent.quota.raise_guard import RaiseGuard
from protocol.units import MIB, PAGE_BYTES

WALL_FRACTION: Final = 32
WALL_MIN_BYTES: Final = 4 * MIB


def soft_wall_bytes(limit_bytes: int) -> int:
    """Where memory.high stands for a limit while dry events are armed; whole pages."""
    margin_bytes = min(max(limit_bytes // WALL_FRACTION, WALL_MIN_BYTES), limit_bytes // 4)
    return (limit_bytes - margin_bytes) // PAGE_BYTES * PAGE_BYTES


class Cgroup2Quota(VmQuota):
    """One VM's directories below a version 2 hierarchy."""

    def __init__(
        self, directory: Path, overhead_bytes: int, open_file: FileOpener = ControlFile
    ) -> None:
        super().__init__(directory, overhead_bytes)
        workload, driver = directory / Part.WORKLOAD, directory / Part.DRIVER
        self._guard = RaiseGuard()
        self._event_fd: int | None = None
        self._armed = False
        self._held = False
        with ExitStack() as opened:

            def control(path: Path, *, writable: bool = False) -> ControlFile:
                file = open_file(path, writable=writable, waits=False)
                opened.callback(file.close)
                return file

            self._vm_max = control(directory / "memory.max", writable=True)
            self._vm_current = control(directory / "memory.current")
            self._vm_events = control(directory / "memory.events")
            self._vm_kill = control(directory / "cgroup.kill", writable=True)
            self._vm_populated = control(directory / "cgroup.events")
            self._workload_max = control(workload / "memory.max", writable=True)
            self._workload_high = control(workload / "memory.high", writable=True)
            self._workload_current = control(workload / "memory.current")
            self._workload_stat = control(workload / "memory.stat")
            self._workload_freeze = control(workload / "cgroup.freeze", writable=True)
            self._driver_current = control(driver / "memory.current")
            self._room = Cgroup2Room(workload, self._guard, open_file)
            opened.callback(self._room.close)
            self._files = opened.pop_all()

    def read(self) -> QuotaReading:
        """Four reads; "max" is UNLIMITED_BYTES."""
        return QuotaReading(
            vm_limit_bytes=self._vm_max.read_bytes_count(),
            workload_limit_bytes=self._workload_max.read_bytes_count(),
            workload_usage_bytes=self._workload_current.read_bytes_count(),
            driver_usage_bytes=self._driver_current.read_bytes_count(),
        )

    def raise_quota(self, quota_bytes: int, workload_bytes: int | None = None) -> None:
        """The VM's limit, then the workload's, then the soft wall."""
        vm_limit_bytes = check_limit(quota_bytes) + self.overhead_bytes
        limit_bytes = check_within(workload_bytes, quota_bytes)
        with self._guard.raising() as raised:
            old_bytes = self._vm_max.read_bytes_count()
            if vm_limit_bytes < old_bytes:
                raise ValueError(f"{vm_limit_bytes} would lower {self.name} from {old_bytes}")
            _write_limit(self._vm_max, vm_limit_bytes)
            self._raise_workload(limit_bytes, raised)

    def raise_workload(self, limit_bytes: int) -> None:
        """The workload's limit, then the soft wall."""
        check_limit(limit_bytes)
        with self._guard.raising() as raised:
            check_within(limit_bytes, self._vm_max.read_bytes_count() - self.overhead_bytes)
            self._raise_workload(limit_bytes, raised)

    def _raise_workload(self, limit_bytes: int, raised: Callable[[int], None]) -> None:
        limit_bytes = max(limit_bytes, self._workload_max.read_bytes_count())
        _write_limit(self._workload_max, limit_bytes)
        raised(limit_bytes)
        _write_limit(self._workload_high, self._wall_bytes(limit_bytes))
        self._let_go()

    def _wall_bytes(self, limit_bytes: int) -> int:
        return soft_wall_bytes(limit_bytes) if self._armed else UNLIMITED_BYTES

    def make_room(self, limit_bytes: int, timeout_s: float = MAKE_ROOM_TIMEOUT_S) -> None:
        """The safe shrink: 0.35 s for a workload that fits."""
        deadline_s = time.monotonic() + timeout_s
        self._room.make(check_limit(limit_bytes), deadline_s, self._wall_bytes, lambda: self._held)

    def lower_quota(self, quota_bytes: int, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
        """Only if W and what else the VM holds fit: writing memory.max below need kills."""
        vm_limit_bytes = check_limit(quota_bytes) + self.overhead_bytes
        workload_bytes = self._workload_max.read_bytes_count()
        if workload_bytes > quota_bytes:
            raise LimitRefused(
                f"the workload of {self.name} may use {workload_bytes} bytes, more than the new "
                f"quota {quota_bytes}: make room first"
            )

        def fits() -> bool:
            # Not usage alone: the workload may grow up to W the moment after. What the VM holds
            # beside it is the driver's use and charges of cgroups that are gone.
            beside_bytes = (
                self._vm_current.read_bytes_count() - self._workload_current.read_bytes_count()
            )
            return workload_bytes + max(beside_bytes, 0) <= vm_limit_bytes

        if not wait_until(fits, time.monotonic() + timeout_s):
            raise LimitRefused(
                f"cannot lower {self.name} to {vm_limit_bytes} bytes without killing in it: "
                f"is the driver using more than its overhead of {self.overhead_bytes}?"
            )
        _write_limit(self._vm_max, vm_limit_bytes)

    def arm_dry_events(self) -> int:
        """memory.high at the soft wall and inotify on memory.events. May block: see `rearm`."""
        if self._event_fd is None:
            event_fd = watch_file(self.directory / Part.WORKLOAD / "memory.events")
            self._files.callback(os.close, event_fd)
            self._event_fd = event_fd
        self.rearm()
        return self._event_fd

    def dry_state(self) -> DryState:
        """`under_oom`: above the soft wall, with next to nothing left to reclaim.

        Holds the workload where it is about to pass the wall: look every few milliseconds while
        it is dry.
        """
        if self._event_fd is not None:
            drain(self._event_fd)
        wall_bytes = self._workload_high.read_bytes_count()
        current_bytes = self._workload_current.read_bytes_count()
        fixed_bytes = current_bytes - reclaimable_bytes(self._workload_stat)
        dry = current_bytes >= wall_bytes and fixed_bytes + NEAR_WALL_BYTES >= wall_bytes
        if dry and self._armed and current_bytes >= self._hold_line_bytes(wall_bytes):
            self._hold()
        else:
            self._let_go()
        return DryState(under_oom=dry, kills_total=self.oom_kills_total)

    def _hold_line_bytes(self, wall_bytes: int) -> int:
        return (wall_bytes + self._workload_max.read_bytes_count()) // 2

    def _hold(self) -> None:
        """Freeze, unless room is being made: that needs the freezer, and looks at `_held` first.

        It says so before it looks, we say so before we look: so never both at once.
        """
        self._held = True
        if self._guard.is_shrinking:
            self._held = False
        else:
            self._workload_freeze.write(1)

    def _let_go(self) -> None:
        if self._held:
            self._workload_freeze.write(0)
            self._held = False

    def let_kernel_decide(self) -> None:
        """high = max: the workload meets W itself, and the kernel kills inside it."""
        self._armed = False
        _write_limit(self._workload_high, UNLIMITED_BYTES)
        self._let_go()

    def rearm(self) -> None:
        """The soft wall again. Kernels before 6.16 may reclaim during the write: use a thread."""
        self._armed = True
        # A make_room under way has its own wall, lower, and ends with the right one.
        while not self._guard.is_shrinking:
            limit_bytes = self._workload_max.read_bytes_count()
            _write_limit(self._workload_high, soft_wall_bytes(limit_bytes))
            # A raise from the event loop may have come in between, with a higher wall.
            if self._workload_max.read_bytes_count() == limit_bytes:
                return

    @property
    def oom_kills_total(self) -> int:
        """memory.events of the VM's directory, which adds up all below it, gone or not."""
        return parse_counters(self._vm_events.read()).get("oom_kill", 0)

    def processes(self, part: Part) -> tuple[int, ...]:
        """Read from cgroup.procs of the part and all below it."""
        self._vm_kill.fileno()  # VmGone once we let go
        return pids_below(self.directory / part)

    def driver_inode(self) -> int:
        """st_ino of the driver's directory."""
        try:
            return (self.directory / Part.DRIVER).stat().st_ino
        except FileNotFoundError as missing:
            raise VmGone(f"{self.directory} is gone: was it removed by somebody else?") from missing

    def kill_all(self, timeout_s: float = DEATH_TIMEOUT_S) -> None:
        """cgroup.kill, which takes forks and frozen tasks with it."""

        def none_left() -> bool:
            return parse_counters(self._vm_populated.read()).get("populated", 0) == 0

        deadline_s = time.monotonic() + timeout_s
        try:
            if none_left():
                return
            self._vm_kill.write(1)
            # A throttled task that dies should not be made to reclaim on its way out.
            _write_limit(self._workload_high, UNLIMITED_BYTES)
            if wait_until(none_left, deadline_s):
                return
        except VmGone:
            return
        pids = ", ".join(map(str, pids_below(self.directory)))
        raise StillBusy(
            f"processes of {self.name} do not die (pids: {pids}): are they stuck in a device or a "
            f"network file system?"
        )

    def remove(self, timeout_s: float = DEATH_TIMEOUT_S) -> None:
        """rmdir, children first, until the kernel lets go."""
        remove_tree(self.directory, time.monotonic() + timeout_s)
        self.close()

    def close(self) -> None:
        """A make_room under way gives up at its next step; waits for that."""
        self._guard.close(self._files.close)
        self._event_fd = None


def _write_limit(file: ControlFile, limit_bytes: int) -> None:
    try:
        file.write(limit_text(limit_bytes))
    except OSError as error:
        raise QuotaError(f"cannot write {limit_bytes} to {file.path}: {error}") from error
