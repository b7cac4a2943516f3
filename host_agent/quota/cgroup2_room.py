"""Making room in a workload with cgroup version 2, where lowering memory.max below need kills.

So memory.max is written only while the workload stands still and fits:

    swap.max = swap in use      reclaim must not swap: that is no room but a debt; where some
                                swapping is allowed, so much above what is in use
    look                        a no, with the cache still there, if it can't succeed
    reclaim, 4 MiB at a time    while it runs; 20 refusals in a row are a no
    high = wall                 whoever grows again now reclaims for himself, or is slowed
    settle 200 ms, if need be   does it live with that? No if what it needs touches the wall
    freeze                      nothing can be allocated now
    check                       usage <= wall? What came back is reclaimed, for 5 ms at most
    max = limit, thaw           written only here, only then; else thawed, and tried again
    on a no, high as before; then swap.max = the VM's

**Why it never kills.** A write of memory.max kills if usage stays above it: here usage is at most
the wall, which is at most the limit, and nothing of the workload runs between the look and the
write. Afterwards it may grow into its limit, as at any other time. What it meets first is the wall,
that is memory.high, below the limit: there it reclaims, is slowed, and a dry event is told, which
the agent answers by giving memory back (cgroup2.py, dry.py). Version 1 is no different: a shrink
that turns out too small is answered when the guest runs dry.

**When it must settle.** Usage at one instant is not need: of workloads that swing, five of eight
were caught at a low. So it is waited for 200 ms whether the workload lives below the wall, and as
long again while it only grows, where that mistake would be dear: if no dry events are armed, since
nobody would answer, and if what cannot be reclaimed is near the wall already (NEAR_WALL_BYTES),
since then it is likely. `high` events alone are no sign of need: a guest that streams through its
page cache touches the wall all the time, and is the first that has something to give.

**What it costs the guest.** It stands still from the freeze to the thaw: `ShrinkPhases.frozen_s`.
Reclaim of more than came back meanwhile happens while it runs.

`wall` is where the soft wall of the dry events stands below `limit` (cgroup2.py), so a workload
that was shrunk is not dry at once. memory.high below need nearly stops a workload without swap: it
is put back however this ends.
Kernel's Documentation/admin-guide/cgroup-v2.rst, "Memory Interface Files" and "cgroup.freeze".
"""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from host_agent.quota.base import UNLIMITED_BYTES
from host_agent.quota.cgroup2_swap import Cgroup2Swap
from host_agent.quota.control_file import ControlFile, FileOpener, parse_counters
from host_agent.quota.errors import NoRoom, QuotaError
from host_agent.quota.phases import PhaseClock, ShrinkPhases
from host_agent.quota.raise_guard import RaiseGuard, ShrinkTicket
from protocol.units import MIB, PAGE_BYTES

RECLAIM_STEP_BYTES: Final = 4 * MIB
"""Kernel 6.1 reclaims far more than asked when asked for much."""

RECLAIM_REFUSALS_MAX: Final = 20
FROZEN_STEP_BYTES: Final = 1 * MIB
"""Smaller while the workload stands still: a step is not interrupted."""

SETTLE_S: Final = 0.2
SETTLE_TRIES: Final = 3
SETTLE_WINDOWS_MAX: Final = 20
"""4 s: on a slow machine a workload takes long from the low of its swing to the wall."""

GROWTH_BYTES: Final = 1 * MIB
SETTLE_LOOKS: Final = 10
"""A workload that swings is slowed at the wall for longer than lies between two of these."""

FROZEN_REFUSALS_MAX: Final = 3
"""Frozen, a guest stands still: what does not go at once stays."""

FROZEN_SLICE_S: Final = 0.005
"""No step of reclaim begins later after the freeze; then the workload is thawed and runs."""

FROZEN_TRIES: Final = 10

FREEZE_TIMEOUT_S: Final = 0.2
"""A task that waits for a disk, or is slowed above the wall (2 s at most), freezes when it has
waited; and the others stand still meanwhile."""

FREEZE_LOOK_S: Final = 0.00005
FREEZE_LOOK_MAX_S: Final = 0.002
"""Pauses between looks whether it is frozen, doubled each time: the workload waits as well."""

LAG_BYTES: Final = 4 * MIB
"""memory.stat is brought up to date every 2 s or when much has changed: tolerate this much."""

NEAR_WALL_BYTES: Final = 4 * MIB
"""File pages that reclaim does not get even in need (mapped code in use), and statistics' lag."""


class Cgroup2Room:
    """Lowers the limit of one workload."""

    def __init__(
        self,
        workload: Path,
        guard: RaiseGuard,
        open_file: FileOpener,
        settle_s: float = SETTLE_S,
        *,
        swap_bytes: int = 0,
    ) -> None:
        self._workload = workload
        self._guard = guard
        self._settle_s = settle_s
        self._files: list[ControlFile] = []
        self._swap = Cgroup2Swap(workload, open_file, swap_bytes)

        def control(name: str) -> ControlFile:
            file = open_file(workload / name, writable=True)
            self._files.append(file)
            return file

        try:
            # Descriptors of their own: the kernel holds their mutexes during reclaim.
            self._max, self._high = control("memory.max"), control("memory.high")
            self._reclaim = control("memory.reclaim")
            self._freeze = control("cgroup.freeze")
            self._current = self._readable(open_file, "memory.current")
            self._stat = self._readable(open_file, "memory.stat")
            # Not memory.events: a container below may have a wall of its own, and touch that.
            self._memory_events = self._readable(open_file, "memory.events.local")
            self._cgroup_events = self._readable(open_file, "cgroup.events")
        except BaseException:
            self.close()
            raise

    def make(
        self,
        limit_bytes: int,
        deadline_s: float,
        wall_of: Callable[[int], int],
        is_held: Callable[[], bool],
        swap_bytes: int = 0,
    ) -> ShrinkPhases:
        """Lower W to `limit_bytes`, as `VmQuota.make_room` says.

        `wall_of` gives the soft wall for a limit, UNLIMITED_BYTES while no dry events are armed.
        `is_held` says whether a dry workload is frozen until it is given memory.
        """

        clock = PhaseClock()

        def put_back(bytes_before: int) -> None:
            self._max.write(bytes_before)
            self._high.write(limit_text(wall_of(bytes_before)))
            self._swap.let_go()

        with self._guard.shrinking(self._max.read_bytes_count, put_back) as ticket:
            if limit_bytes >= ticket.old_limit_bytes:
                return clock.phases()
            is_armed = wall_of(limit_bytes) < UNLIMITED_BYTES
            wall_bytes = min(limit_bytes, wall_of(limit_bytes))
            if is_held():
                raise self._no_room(wall_bytes, "it has run dry")
            swap_most_bytes = self._swap.hold(swap_bytes)
            self._check_reclaimable(wall_bytes, swap_most_bytes)
            clock.ended("look")
            if not swap_most_bytes:
                # In small steps swap fills with pages that are not out yet, and then it is full.
                self._reclaim_gently(wall_bytes, ticket)
            self._high.write(wall_bytes)
            self._guard.check(ticket)
            self._reclaim_down_to(wall_bytes, ticket, deadline_s)
            clock.ended("reclaim")
            if not is_armed or self._needs(wall_bytes):
                self._settle(wall_bytes, ticket, deadline_s)
                clock.ended("settle")
            self._lower(limit_bytes, wall_bytes, ticket, deadline_s, clock)
            self._swap.check()
            self._high.write(limit_text(wall_of(limit_bytes)))
            self._guard.check(ticket)
            self._swap.let_go()
        return clock.phases()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
        self._swap.close()

    def _check_reclaimable(self, wall_bytes: int, swap_bytes: int) -> None:
        """NoRoom, with the cache still there, if even all of the cache would not be enough."""
        fixed_bytes = self._current.read_bytes_count() - reclaimable_bytes(self._stat) - LAG_BYTES
        fixed_bytes -= swap_bytes
        if fixed_bytes > wall_bytes:
            raise self._no_room(wall_bytes, f"at least {fixed_bytes} cannot be reclaimed")

    def _reclaim_gently(self, wall_bytes: int, ticket: ShrinkTicket) -> None:
        """What is too much, step by step: the write of memory.high takes more than it needs.

        Only as many steps as that, however much comes back: nothing stops the workload yet.
        """
        steps = -(-(self._current.read_bytes_count() - wall_bytes) // RECLAIM_STEP_BYTES)
        for _ in range(steps):
            excess_bytes = self._current.read_bytes_count() - wall_bytes
            if excess_bytes <= 0 or not self._reclaim_step(min(RECLAIM_STEP_BYTES, excess_bytes)):
                return
            self._guard.check(ticket)

    def _reclaim_down_to(self, wall_bytes: int, ticket: ShrinkTicket, deadline_s: float) -> None:
        refusals = 0
        while (excess_bytes := self._current.read_bytes_count() - wall_bytes) > 0:
            got_it = self._reclaim_step(min(RECLAIM_STEP_BYTES, excess_bytes))
            refusals = 0 if got_it or self._swap.moves(self._current) else refusals + 1
            self._guard.check(ticket)
            if refusals >= RECLAIM_REFUSALS_MAX:
                raise self._no_room(wall_bytes, f"{excess_bytes} too many cannot be reclaimed")
            if time.monotonic() >= deadline_s:
                raise self._no_room(wall_bytes, "reclaim takes too long")

    def _reclaim_step(self, step_bytes: int) -> bool:
        """False if the kernel got less than that; it has tried hard then."""
        try:
            self._reclaim.write(max(step_bytes, PAGE_BYTES))
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise QuotaError(f"cannot reclaim in {self._workload}: {error}") from error
            return False
        return True

    def _settle(self, wall_bytes: int, ticket: ShrinkTicket, deadline_s: float) -> None:
        """Wait until the workload lives below the wall for a while; its cache may touch it."""
        refused = 0
        for _ in range(SETTLE_WINDOWS_MAX):
            before = self._high_events()
            fixed_bytes = [self._fixed_bytes()]
            for _ in range(SETTLE_LOOKS):
                time.sleep(self._settle_s / SETTLE_LOOKS)
                self._guard.check(ticket)
                fixed_bytes.append(self._fixed_bytes())
            if max(fixed_bytes) + NEAR_WALL_BYTES > wall_bytes and self._high_events() != before:
                refused += 1
                if refused == SETTLE_TRIES:
                    break
                self._reclaim_down_to(wall_bytes, ticket, deadline_s)
            elif fixed_bytes[-1] < max(fixed_bytes[0] + GROWTH_BYTES, *fixed_bytes):
                return  # else it was on its way up all the time: where to is not seen yet
        raise self._no_room(wall_bytes, "it keeps growing back")

    def _needs(self, wall_bytes: int) -> bool:
        """What cannot be reclaimed reaches to the wall, or nearly."""
        return self._fixed_bytes() + NEAR_WALL_BYTES > wall_bytes

    def _fixed_bytes(self) -> int:
        return self._current.read_bytes_count() - reclaimable_bytes(self._stat)

    def _lower(
        self,
        limit_bytes: int,
        wall_bytes: int,
        ticket: ShrinkTicket,
        deadline_s: float,
        clock: PhaseClock,
    ) -> None:
        """Freeze, check, write: the one place where memory.max falls."""
        for _ in range(FROZEN_TRIES):
            with self._frozen(clock):
                fits = self._fits(wall_bytes)
                clock.ended("check")
                if fits:
                    self._guard.check(ticket)
                    self._max.write(limit_bytes)
                    self._guard.check(ticket)
                    clock.ended("write")
                    return
            self._reclaim_down_to(wall_bytes, ticket, deadline_s)
            clock.ended("reclaim")
        raise self._no_room(wall_bytes, "it grows faster than it can be reclaimed from")

    def _fits(self, wall_bytes: int) -> bool:
        """In a frozen workload: down to the wall if that takes moments. NoRoom if it never will."""
        refusals = 0
        until_s = time.monotonic() + FROZEN_SLICE_S
        while (usage_bytes := self._current.read_bytes_count()) > wall_bytes:
            if time.monotonic() >= until_s:
                return False
            got_it = self._reclaim_step(min(FROZEN_STEP_BYTES, usage_bytes - wall_bytes))
            refusals = 0 if got_it else refusals + 1
            if refusals >= FROZEN_REFUSALS_MAX:
                raise self._no_room(wall_bytes, f"it grew to {usage_bytes} again")
        return True

    def _high_events(self) -> int:
        return parse_counters(self._memory_events.read()).get("high", 0)

    @contextmanager
    def _frozen(self, clock: PhaseClock) -> Iterator[None]:
        """Nothing in the workload runs inside this block; it is thawed however it ends."""
        with clock.frozen():
            self._freeze.write(1)
            try:
                self._await_frozen()
                clock.ended("freeze")
                yield
            finally:
                self._freeze.write(0)
                clock.ended("thaw")

    def _await_frozen(self) -> None:
        until_s = time.monotonic() + FREEZE_TIMEOUT_S
        pause_s = FREEZE_LOOK_S
        while parse_counters(self._cgroup_events.read()).get("frozen", 0) != 1:
            if time.monotonic() >= until_s:
                raise NoRoom(
                    f"{self._workload} cannot be frozen: a task waits for a disk, or is slowed at "
                    f"its limit; try later"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, FREEZE_LOOK_MAX_S)

    def _no_room(self, wall_bytes: int, why: str) -> NoRoom:
        return NoRoom(f"{self._workload} cannot do with {wall_bytes} bytes: {why}; ask for less")

    def _readable(self, open_file: FileOpener, name: str) -> ControlFile:
        file = open_file(self._workload / name)
        self._files.append(file)
        return file


def reclaimable_bytes(stat_file: ControlFile) -> int:
    """Upper bound of what reclaim without swap can free: file pages and kernel caches."""
    stat = parse_counters(stat_file.read())
    return sum(stat.get(key, 0) for key in ("inactive_file", "active_file", "slab_reclaimable"))


def limit_text(limit_bytes: int) -> str:
    """A limit as version 2 writes it."""
    return "max" if limit_bytes >= UNLIMITED_BYTES else str(limit_bytes)
