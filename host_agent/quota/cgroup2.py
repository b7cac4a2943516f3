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
`let_kernel_decide`, or a look that finds it dry no more. The next agent finds it so, and lets it go
when it has looked. Its other tasks stand still as well, which
version 1 spares them until they need memory.

memory.high left below need nearly stops a guest, so an unanswered event must end in
`let_kernel_decide` (high = max, thawed), and the watchdog does the same for a dead agent.

Swap. `memory.swap.max` is what the VM has of it, at both levels, and does not move with W; the
driver has none. The wall costs a guest 3 % of W in comfort.
Kernel's Documentation/admin-guide/cgroup-v2.rst; mm/memcontrol.c, calculate_high_delay.
"""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
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
    SwapReading,
    VmQuota,
    check_limit,
    check_within,
)
from host_agent.quota.cgroup2_levels import set_swap_max
from host_agent.quota.cgroup2_protection import MIN, protect_root, protected_bytes
from host_agent.quota.cgroup2_room import (
    NEAR_WALL_BYTES,
    Cgroup2Room,
    limit_text,
    reclaimable_bytes,
)
from host_agent.quota.cgroup2_scope import ScopeLimits, make_in_scope
from host_agent.quota.cgroup2_swap import SWAP_CURRENT, SWAP_MAX
from host_agent.quota.cgroup_tree import pids_below, remove_tree, wait_until
from host_agent.quota.control_file import ControlFile, FileOpener, parse_counters
from host_agent.quota.errors import LimitRefused, QuotaError, StillBusy, VmGone
from host_agent.quota.inotify import drain, watch_also, watch_file
from host_agent.quota.phases import ShrinkPhases
from host_agent.quota.raise_guard import RaiseGuard
from host_agent.quota.swap_space import free_swap_bytes
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
        self,
        directory: Path,
        overhead_bytes: int,
        open_file: FileOpener = ControlFile,
        swap_bytes: int = 0,
        in_scope: bool = False,
    ) -> None:
        super().__init__(directory, overhead_bytes, swap_bytes)
        self._in_scope = in_scope
        self._kills_before = 0
        self._kills_seen = 0
        self._opened: list[ControlFile] = []

        def opening(path: Path, *, writable: bool = False, waits: bool = True) -> ControlFile:
            file = open_file(path, writable=writable, waits=waits)
            self._opened.append(file)
            return file

        workload, driver = directory / Part.WORKLOAD, directory / Part.DRIVER
        self._guard = RaiseGuard()
        self._event_fd: int | None = None
        self._armed = False
        with ExitStack() as opened:

            def control(path: Path, *, writable: bool = False) -> ControlFile:
                file = opening(path, writable=writable, waits=False)
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
            # Of one that an agent or its watchdog held: thawed unseen, it may be through its wall
            # before it is answered.
            self._held = self._workload_freeze.read_bytes_count() == 1
            self._claims = (
                control(directory / MIN, writable=True),
                control(workload / MIN, writable=True),
            )
            self._driver_current = control(driver / "memory.current")
            # Absent where the kernel doesn't account for swap.
            self._swap = (
                (control(workload / SWAP_MAX), control(workload / SWAP_CURRENT))
                if (workload / SWAP_MAX).exists()
                else None
            )
            self._room = Cgroup2Room(workload, self._guard, opening, swap_bytes=swap_bytes)
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

    def read_swap(self) -> SwapReading | None:
        """memory.swap.current and memory.swap.max."""
        if self._swap is None:
            return None
        limit_bytes, used_bytes = (file.read_bytes_count() for file in self._swap)
        return SwapReading(used_bytes=used_bytes, limit_bytes=limit_bytes)

    def restore_swap(self) -> None:
        """memory.swap.max at both levels. The kernel takes it below use, and swaps no more then."""
        if self._swap is None:
            return
        set_swap_max(self.directory, self.swap_bytes)
        reading = self.read_swap()
        if reading is not None and reading.used_bytes > self.swap_bytes:
            raise LimitRefused(
                f"the workload of {self.name} has swapped {reading.used_bytes} bytes out, more "
                f"than the {self.swap_bytes} bytes of swap that it has; it may swap no more"
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
        old_bytes = self._workload_max.read_bytes_count()
        limit_bytes = max(limit_bytes, old_bytes)
        _write_limit(self._workload_max, limit_bytes)
        raised(limit_bytes)
        _write_limit(self._workload_high, self._wall_bytes(limit_bytes))
        if limit_bytes > old_bytes:  # an attempt that ends in vain is no memory
            self._let_go()

    def _wall_bytes(self, limit_bytes: int) -> int:
        return soft_wall_bytes(limit_bytes) if self._armed else UNLIMITED_BYTES

    def make_room(
        self, limit_bytes: int, timeout_s: float = MAKE_ROOM_TIMEOUT_S, swap_bytes: int = 0
    ) -> ShrinkPhases:
        """The safe shrink: milliseconds where there is room, 0.2 s more where it is doubtful."""
        deadline_s = time.monotonic() + timeout_s
        return self._room.make(
            check_limit(limit_bytes), deadline_s, self._wall_bytes, lambda: self._held, swap_bytes
        )

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

    def protect(self, reservation_bytes: int) -> None:
        """memory.min of the workload, the VM, and the sum of all VMs at the root."""
        check_limit(reservation_bytes)
        for claim in self._claims:
            _write_limit(claim, reservation_bytes)
        self._protect_root()

    def _protect_root(self) -> None:
        # A scope's own memory.min is systemd's.
        if not self._in_scope:
            protect_root(self.directory.parent)

    @property
    def protected_bytes(self) -> int | None:
        """The least memory.min from the workload up to the top; a scope of systemd's has none."""
        return None if self._in_scope else protected_bytes(self.directory / Part.WORKLOAD)

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
        under_oom = False
        with self._while_there():
            under_oom = self._is_dry()
            self._kills_seen = self.oom_kills_total
        return DryState(under_oom, self._kills_seen)

    def _while_there(self) -> AbstractContextManager[None]:
        """A scope goes with its container, and its VM goes on in the next one: `enter_scope`."""
        return suppress(VmGone) if self._in_scope else nullcontext()

    def _is_dry(self) -> bool:
        wall_bytes = self._workload_high.read_bytes_count()
        current_bytes = self._workload_current.read_bytes_count()
        fixed_bytes = current_bytes - reclaimable_bytes(self._workload_stat)
        dry = current_bytes >= wall_bytes and fixed_bytes + NEAR_WALL_BYTES >= wall_bytes
        if dry and self.swap_bytes:
            # As on version 1 it swaps what it has of swap before anybody is asked for memory.
            dry = fixed_bytes + NEAR_WALL_BYTES - self._swappable_bytes() >= wall_bytes
        if dry and self._armed and current_bytes >= self._hold_line_bytes(wall_bytes):
            self._hold()
        else:
            self._let_go()
        return dry

    def _swappable_bytes(self) -> int:
        # By the limit that is in force: while room is made there is none to be had. Locked and
        # kernel memory is on neither list, and no swap helps a guest that holds nothing else.
        reading = self.read_swap()
        left_bytes = 0 if reading is None else reading.limit_bytes - reading.used_bytes
        stat = parse_counters(self._workload_stat.read())
        anon_bytes = stat.get("inactive_anon", 0) + stat.get("active_anon", 0)
        return min(max(left_bytes, 0), free_swap_bytes(), anon_bytes)

    def _hold_line_bytes(self, wall_bytes: int) -> int:
        return (wall_bytes + self._workload_max.read_bytes_count()) // 2

    def _hold(self) -> None:
        """Freeze, unless room is being made: that needs the freezer, and looks at `_held` first.

        It says so before it looks, we say so before we look: so never both at once. One that is
        frozen already stays so: a shrink that has just begun refuses, and must not be taken for
        one that needs the freezer.
        """
        if self._held:
            return
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
        with self._while_there():
            _write_limit(self._workload_high, UNLIMITED_BYTES)
            self._let_go()

    def rearm(self) -> None:
        """The soft wall again. Kernels before 6.16 may reclaim during the write: use a thread."""
        self._armed = True
        with self._while_there():
            self._raise_wall()
            if self._held:  # a watchdog that was not told for a while has let it go
                self._workload_freeze.write(1)

    def _raise_wall(self) -> None:
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
        return self._kills_before + parse_counters(self._vm_events.read()).get("oom_kill", 0)

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
        self._protect_root()

    def enter_scope(
        self, scope: Path, quota_bytes: int, workload_bytes: int, size_bytes: int
    ) -> None:
        """The directories in there, then every open file; those before are removed."""
        limits = ScopeLimits(
            vm_bytes=check_limit(quota_bytes) + self.overhead_bytes,
            workload_bytes=check_within(workload_bytes, quota_bytes),
            container_bytes=check_limit(size_bytes) + PAGE_BYTES,
            swap_bytes=self.swap_bytes,
        )
        left = self.directory
        with self._guard.moving():
            try:
                directory = make_in_scope(scope, self.name, limits)
                for file in self._opened:
                    file.move_to(directory / file.path.relative_to(left))
                if self._event_fd is not None:
                    watch_also(self._event_fd, directory / Part.WORKLOAD / "memory.events")
            except OSError as error:
                raise QuotaError(f"{self.name} can't enter {scope}: {error}") from error
            self.directory = directory
            self._held = False
            self._kills_before = self._kills_seen
        if left != directory:
            remove_tree(left, time.monotonic() + SETTLE_TIMEOUT_S)
        self._in_scope = True
        if self._armed:
            self.rearm()

    def close(self) -> None:
        """A make_room under way gives up at its next step; waits for that."""
        self._guard.close(self._files.close)
        self._event_fd = None


def _write_limit(file: ControlFile, limit_bytes: int) -> None:
    try:
        file.write(limit_text(limit_bytes))
    except OSError as error:
        raise QuotaError(f"cannot write {limit_bytes} to {file.path}: {error}") from error
