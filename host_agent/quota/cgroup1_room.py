"""Making room in a workload with cgroup version 1: lower W, never kill, swap what is allowed.

The kernel is kind here: a limit below what can be reclaimed is refused with EBUSY and nobody is
killed. Two things need care all the same.

Swap. Lowering a limit may swap the guest's anonymous memory out, which is no room but a debt. So
`memory.swappiness` is 0 for the workload, and for each cgroup below it since the kernel asks the
one whose pages it looks at, while room is made; and what it was before afterwards. The workload's
own is put back last: as long as it is not what the VM's own directory says, some may be missing,
for an agent after this one or the watchdog to put right.

Where some swapping is allowed, swappiness stays, and memory and swap together are lowered ahead of
each step to what may be left after it: so no more is swapped at any instant than is allowed.

The cache. EBUSY comes only after all the cache has been thrown away for nothing. A look at the
statistics first refuses what cannot succeed, while the cache is still there.

Kernel's Documentation/admin-guide/cgroup-v1/memory.rst, sections 4.1 and 5.3.
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from host_agent.quota.base import SWAP_MIN_BYTES, UNLIMITED_BYTES
from host_agent.quota.cgroup1_limit import SWAPPINESS, USAGE, Cgroup1Limit
from host_agent.quota.cgroup_tree import subtree
from host_agent.quota.control_file import ControlFile, parse_counters
from host_agent.quota.errors import NoRoom, QuotaError
from host_agent.quota.phases import PhaseClock, ShrinkPhases
from host_agent.quota.raise_guard import RaiseGuard, ShrinkTicket
from protocol.units import MIB, PAGE_BYTES

SHRINK_STEP_BYTES: Final = 16 * MIB
"""Reclaim in one system call: 0.1 ms of clean cache, 10 ms of dirty. Between two steps the
deadline and a raise from the event loop are looked at."""

BATCH_PAGES_A_CPU: Final = 64
"""Pages that each CPU charges ahead (MEMCG_CHARGE_BATCH), and by which statistics lag."""


class Cgroup1Room:
    """Lowers the limit of one workload."""

    def __init__(self, workload: Path, guard: RaiseGuard, swap_bytes: int) -> None:
        self._workload = workload
        self._guard = guard
        self._swap_bytes = swap_bytes
        with ExitStack() as opened:
            # Descriptors of its own: the kernel's mutexes of these are held during reclaim.
            self._limit = Cgroup1Limit(workload, swap_bytes)
            opened.callback(self._limit.close)
            self._usage = ControlFile(workload / USAGE)
            opened.callback(self._usage.close)
            self._stat = ControlFile(workload / "memory.stat")
            opened.callback(self._stat.close)
            self._kernel_usage = ControlFile(workload / "memory.kmem.usage_in_bytes")
            opened.callback(self._kernel_usage.close)
            self._files = opened.pop_all()

    def make(self, limit_bytes: int, deadline_s: float, swap_bytes: int = 0) -> ShrinkPhases:
        """Lower W to `limit_bytes`, as `VmQuota.make_room` says."""
        clock = PhaseClock()
        with self._guard.shrinking(self._limit.read_bytes_count, self._limit.raise_to) as ticket:
            if limit_bytes >= ticket.old_limit_bytes:
                return clock.phases()
            swapped_bytes = self._swapped_bytes()
            more_bytes = min(swap_bytes, self._swap_bytes - swapped_bytes)
            if more_bytes < SWAP_MIN_BYTES:
                more_bytes = 0
            self._check_reclaimable(limit_bytes, more_bytes)
            clock.ended("look")
            with ExitStack() as held:
                if not more_bytes:
                    held.enter_context(self._without_swapping())
                self._shrink(limit_bytes, ticket, deadline_s, swapped_bytes, more_bytes)
            clock.ended("write")
        return clock.phases()

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _shrink(
        self,
        to_bytes: int,
        ticket: ShrinkTicket,
        deadline_s: float,
        swapped_bytes: int,
        more_bytes: int,
    ) -> None:
        usage_bytes = self._usage.read_bytes_count() // PAGE_BYTES * PAGE_BYTES
        at_bytes = min(ticket.old_limit_bytes, max(usage_bytes, to_bytes))
        # Memory and swap can't be limited to less than memory is: a longer step would leave a gap.
        step_bytes = min(SHRINK_STEP_BYTES, more_bytes or SHRINK_STEP_BYTES)
        if more_bytes:
            self._lower(at_bytes, to_bytes, ticket)
        while True:
            next_bytes = max(to_bytes, at_bytes - step_bytes)
            sum_bytes = None
            if more_bytes:
                sum_bytes = max(at_bytes, next_bytes + swapped_bytes + more_bytes)
            self._lower(next_bytes, to_bytes, ticket, sum_bytes)
            at_bytes = next_bytes
            if at_bytes == to_bytes:
                break
            if time.monotonic() >= deadline_s:
                raise NoRoom(
                    f"{self._workload} takes too long to reclaim down to {to_bytes} bytes; "
                    f"try later"
                )
        if self._swapped_bytes() > swapped_bytes + more_bytes + SWAP_MIN_BYTES:
            # The watchdog let it swap again, this agent having stood still for too long.
            raise NoRoom(f"{self._workload} has swapped while room was made in it; try later")

    def _lower(
        self, limit_bytes: int, to_bytes: int, ticket: ShrinkTicket, sum_bytes: int | None = None
    ) -> None:
        """One step; `sum_bytes` is what memory and swap may be during it, where that matters."""
        try:
            if sum_bytes is not None:
                self._limit.lower_sum(sum_bytes, 0)
            self._limit.memory.write(limit_bytes)
            if limit_bytes == to_bytes:
                self._limit.lower_sum(to_bytes)
        except OSError as error:
            self._guard.check(ticket)  # a raise that came before is why the kernel says no
            if error.errno != errno.EBUSY:
                raise QuotaError(f"cannot lower {self._workload}: {error}") from error
            raise NoRoom(
                f"{self._workload} cannot be lowered to {to_bytes} bytes: its kernel found "
                f"nothing more to reclaim at {limit_bytes}; ask for less"
            ) from error
        self._guard.check(ticket)

    def _swapped_bytes(self) -> int:
        reading = self._limit.read_swap()
        return 0 if reading is None else reading.used_bytes

    def _check_reclaimable(self, limit_bytes: int, swap_bytes: int) -> None:
        """NoRoom, with the cache still there, if even all of the cache would not be enough.

        An upper bound of what can go: all pages on the file lists and all kernel memory, what may
        be swapped out, and what the statistics may lag behind.
        """
        usage_bytes = self._usage.read_bytes_count()
        stat = parse_counters(self._stat.read())
        lag_bytes = 2 * BATCH_PAGES_A_CPU * (os.cpu_count() or 1) * PAGE_BYTES
        fixed_bytes = usage_bytes - (
            stat.get("total_inactive_file", UNLIMITED_BYTES)
            + stat.get("total_active_file", UNLIMITED_BYTES)
            + self._kernel_usage.read_bytes_count()
            + lag_bytes
            + swap_bytes
        )
        if fixed_bytes > limit_bytes:
            raise NoRoom(
                f"{self._workload} holds at least {fixed_bytes} bytes that cannot be dropped "
                f"and of which {swap_bytes} may be swapped out, and was asked to do "
                f"with {limit_bytes}; ask for less"
            )

    @contextmanager
    def _without_swapping(self) -> Iterator[None]:
        before: list[tuple[Path, str]] = []
        try:
            for path in subtree(self._workload):
                file = path / SWAPPINESS
                # A nested cgroup may go at any time, and its pages with it.
                with suppress(OSError):
                    before.append((file, file.read_text()))
                    file.write_text("0")
            yield
        finally:
            for file, value in reversed(before):
                with suppress(OSError):
                    file.write_text(value)
