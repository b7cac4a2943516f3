"""Making room in a workload with cgroup version 2, where lowering memory.max below need kills.

So memory.max is written only when the workload is known to fit, and cannot grow meanwhile:

    swap.max = swap in use      reclaim must not swap: that is no room but a debt
    high = wall                 the kernel reclaims, and slows whoever grows; never kills
    reclaim, 4 MiB at a time    until usage <= wall; 20 refusals in a row are a no
    settle 200 ms               does it live with that? No if what it needs touches the wall
    freeze, reclaim again       nothing can be allocated now
    max = limit                 only here, only if usage <= wall
    thaw; swap.max as before; on a no, high as before

Each step was needed: without settling 3 of 8 swinging workloads were killed, with high then max
alone 6 of 8. But `high` events alone are no sign of need: a guest that streams through its page
cache touches the wall all the time, and is the first that has something to give.

`wall` is where the soft wall of the dry events stands below `limit` (cgroup2.py), so a workload
that was shrunk is not dry at once.

memory.high below need nearly stops a workload without swap: it is put back however this ends.
Kernel's Documentation/admin-guide/cgroup-v2.rst, "Memory Interface Files" and "cgroup.freeze".
"""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from host_agent.quota.base import UNLIMITED_BYTES
from host_agent.quota.cgroup_tree import wait_until
from host_agent.quota.control_file import ControlFile, FileOpener, parse_counters
from host_agent.quota.errors import NoRoom, QuotaError
from host_agent.quota.raise_guard import RaiseGuard, ShrinkTicket
from protocol.units import MIB, PAGE_BYTES

RECLAIM_STEP_BYTES: Final = 4 * MIB
"""Kernel 6.1 reclaims far more than asked when asked for much."""

RECLAIM_REFUSALS_MAX: Final = 20
SETTLE_S: Final = 0.2
SETTLE_TRIES: Final = 3
SETTLE_LOOKS: Final = 10
"""A workload that swings is slowed at the wall for longer than lies between two of these."""

FROZEN_REFUSALS_MAX: Final = 3
"""Frozen, a guest stands still: what does not go at once stays."""

FREEZE_TIMEOUT_S: Final = 1.0

LAG_BYTES: Final = 4 * MIB
"""memory.stat is brought up to date every 2 s or when much has changed: tolerate this much."""

NEAR_WALL_BYTES: Final = 4 * MIB
"""File pages that reclaim does not get even in need (mapped code in use), and statistics' lag."""


class Cgroup2Room:
    """Lowers the limit of one workload."""

    def __init__(
        self, workload: Path, guard: RaiseGuard, open_file: FileOpener, settle_s: float = SETTLE_S
    ) -> None:
        self._workload = workload
        self._guard = guard
        self._settle_s = settle_s
        self._files: list[ControlFile] = []

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
            self._memory_events = self._readable(open_file, "memory.events")
            self._cgroup_events = self._readable(open_file, "cgroup.events")
            # Absent where the kernel doesn't account for swap.
            swap = (workload / "memory.swap.max").exists()
            self._swap_max = control("memory.swap.max") if swap else None
            self._swap_current = self._readable(open_file, "memory.swap.current") if swap else None
        except BaseException:
            self.close()
            raise

    def make(
        self,
        limit_bytes: int,
        deadline_s: float,
        wall_of: Callable[[int], int],
        is_held: Callable[[], bool],
    ) -> None:
        """Lower W to `limit_bytes`, as `VmQuota.make_room` says.

        `wall_of` gives the soft wall for a limit, UNLIMITED_BYTES while no dry events are armed.
        `is_held` says whether a dry workload is frozen until it is given memory.
        """

        def put_back(bytes_before: int) -> None:
            self._max.write(bytes_before)
            self._high.write(limit_text(wall_of(bytes_before)))

        with self._guard.shrinking(self._max.read_bytes_count, put_back) as ticket:
            if limit_bytes >= ticket.old_limit_bytes:
                return
            wall_bytes = min(limit_bytes, wall_of(limit_bytes))
            if is_held():
                raise self._no_room(wall_bytes, "it has run dry")
            self._check_reclaimable(wall_bytes)
            with self._without_swapping():
                self._high.write(wall_bytes)
                self._guard.check(ticket)
                self._reclaim_down_to(wall_bytes, ticket, deadline_s)
                self._settle(wall_bytes, ticket, deadline_s)
                with self._frozen():
                    self._reclaim_down_to(wall_bytes, ticket, deadline_s, FROZEN_REFUSALS_MAX)
                    usage_bytes = self._current.read_bytes_count()
                    if usage_bytes > wall_bytes:
                        raise self._no_room(wall_bytes, f"it grew to {usage_bytes} again")
                    self._guard.check(ticket)
                    self._max.write(limit_bytes)
                    self._guard.check(ticket)
            self._high.write(limit_text(wall_of(limit_bytes)))
            self._guard.check(ticket)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def _check_reclaimable(self, wall_bytes: int) -> None:
        """NoRoom, with the cache still there, if even all of the cache would not be enough."""
        fixed_bytes = self._current.read_bytes_count() - reclaimable_bytes(self._stat) - LAG_BYTES
        if fixed_bytes > wall_bytes:
            raise self._no_room(wall_bytes, f"at least {fixed_bytes} cannot be reclaimed")

    def _reclaim_down_to(
        self,
        wall_bytes: int,
        ticket: ShrinkTicket,
        deadline_s: float,
        refusals_max: int = RECLAIM_REFUSALS_MAX,
    ) -> None:
        refusals = 0
        while (excess_bytes := self._current.read_bytes_count() - wall_bytes) > 0:
            try:
                step_bytes = min(RECLAIM_STEP_BYTES, excess_bytes)
                self._reclaim.write(max(step_bytes, PAGE_BYTES))
                refusals = 0
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise QuotaError(f"cannot reclaim in {self._workload}: {error}") from error
                refusals += 1
            self._guard.check(ticket)
            if refusals >= refusals_max:
                raise self._no_room(wall_bytes, f"{excess_bytes} too many cannot be reclaimed")
            if time.monotonic() >= deadline_s:
                raise self._no_room(wall_bytes, "reclaim takes too long")

    def _settle(self, wall_bytes: int, ticket: ShrinkTicket, deadline_s: float) -> None:
        """Wait until the workload lives below the wall for a while; its cache may touch it."""
        for _ in range(SETTLE_TRIES):
            before = self._high_events()
            needs_it = False
            for _ in range(SETTLE_LOOKS):
                time.sleep(self._settle_s / SETTLE_LOOKS)
                self._guard.check(ticket)
                fixed_bytes = self._current.read_bytes_count() - reclaimable_bytes(self._stat)
                needs_it = needs_it or fixed_bytes + NEAR_WALL_BYTES > wall_bytes
            if not needs_it or self._high_events() == before:
                return
            self._reclaim_down_to(wall_bytes, ticket, deadline_s)
        raise self._no_room(wall_bytes, "it keeps growing back")

    def _high_events(self) -> int:
        return parse_counters(self._memory_events.read()).get("high", 0)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Nothing in the workload runs inside this block; it is thawed however it ends."""
        self._freeze.write(1)
        try:
            if not wait_until(self._is_frozen, time.monotonic() + FREEZE_TIMEOUT_S):
                raise NoRoom(f"{self._workload} cannot be frozen (a task waits for a disk); later")
            yield
        finally:
            self._freeze.write(0)

    def _is_frozen(self) -> bool:
        return parse_counters(self._cgroup_events.read()).get("frozen", 0) == 1

    @contextmanager
    def _without_swapping(self) -> Iterator[None]:
        if self._swap_max is None or self._swap_current is None:
            yield
            return
        before = self._swap_max.read().split("\n", 1)[0]
        self._swap_max.write(self._swap_current.read_bytes_count())
        try:
            yield
        finally:
            self._swap_max.write(before)

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
