"""Making room in a workload with cgroup version 1: lower W, never kill, never swap.

The kernel is kind here: a limit below what can be reclaimed is refused with EBUSY and nobody is
killed. Two things need care all the same.

Swap. Lowering a limit may swap the guest's anonymous memory out, which is no room but a debt. So
`memory.swappiness` is 0 for the workload, and for each cgroup below it since the kernel asks the
one whose pages it looks at, while room is made; and what it was before afterwards.

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

from host_agent.quota.base import UNLIMITED_BYTES
from host_agent.quota.cgroup_tree import subtree
from host_agent.quota.control_file import ControlFile, parse_counters
from host_agent.quota.errors import NoRoom, QuotaError
from host_agent.quota.raise_guard import RaiseGuard, ShrinkTicket
from protocol.units import MIB, PAGE_BYTES

LIMIT: Final = "memory.limit_in_bytes"
USAGE: Final = "memory.usage_in_bytes"
SWAPPINESS: Final = "memory.swappiness"

SHRINK_STEP_BYTES: Final = 16 * MIB
"""Reclaim in one system call: 0.1 ms of clean cache, 10 ms of dirty. Between two steps the
deadline and a raise from the event loop are looked at."""

BATCH_PAGES_A_CPU: Final = 64
"""Pages that each CPU charges ahead (MEMCG_CHARGE_BATCH), and by which statistics lag."""


class Cgroup1Room:
    """Lowers the limit of one workload."""

    def __init__(self, workload: Path, guard: RaiseGuard) -> None:
        self._workload = workload
        self._guard = guard
        with ExitStack() as opened:
            # A descriptor of its own: the kernel's mutex of this one is held during reclaim.
            self._limit = ControlFile(workload / LIMIT, writable=True)
            opened.callback(self._limit.close)
            self._usage = ControlFile(workload / USAGE)
            opened.callback(self._usage.close)
            self._stat = ControlFile(workload / "memory.stat")
            opened.callback(self._stat.close)
            self._kernel_usage = ControlFile(workload / "memory.kmem.usage_in_bytes")
            opened.callback(self._kernel_usage.close)
            self._files = opened.pop_all()

    def make(self, limit_bytes: int, deadline_s: float) -> None:
        """Lower W to `limit_bytes`, as `VmQuota.make_room` says."""
        with self._guard.shrinking(self._limit.read_bytes_count, self._limit.write) as ticket:
            if limit_bytes >= ticket.old_limit_bytes:
                return
            self._check_reclaimable(limit_bytes)
            with self._without_swapping():
                self._shrink(limit_bytes, ticket, deadline_s)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _shrink(self, to_bytes: int, ticket: ShrinkTicket, deadline_s: float) -> None:
        usage_bytes = self._usage.read_bytes_count() // PAGE_BYTES * PAGE_BYTES
        step_bytes = min(ticket.old_limit_bytes, max(usage_bytes, to_bytes))
        while True:
            step_bytes = max(to_bytes, step_bytes - SHRINK_STEP_BYTES)
            try:
                self._limit.write(step_bytes)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise QuotaError(f"cannot lower {self._limit.path}: {error}") from error
                raise NoRoom(
                    f"{self._workload} cannot be lowered to {to_bytes} bytes: its kernel found "
                    f"nothing more to reclaim at {step_bytes}; ask for less"
                ) from error
            self._guard.check(ticket)
            if step_bytes == to_bytes:
                return
            if time.monotonic() >= deadline_s:
                raise NoRoom(
                    f"{self._workload} takes too long to reclaim down to {to_bytes} bytes; "
                    f"try later"
                )

    def _check_reclaimable(self, limit_bytes: int) -> None:
        """NoRoom, with the cache still there, if even all of the cache would not be enough.

        An upper bound of what can go: all pages on the file lists and all kernel memory, plus
        what the statistics may lag behind.
        """
        usage_bytes = self._usage.read_bytes_count()
        stat = parse_counters(self._stat.read())
        lag_bytes = 2 * BATCH_PAGES_A_CPU * (os.cpu_count() or 1) * PAGE_BYTES
        fixed_bytes = usage_bytes - (
            stat.get("total_inactive_file", UNLIMITED_BYTES)
            + stat.get("total_active_file", UNLIMITED_BYTES)
            + self._kernel_usage.read_bytes_count()
            + lag_bytes
        )
        if fixed_bytes > limit_bytes:
            raise NoRoom(
                f"{self._workload} holds at least {fixed_bytes} bytes that cannot be reclaimed "
                f"without swapping, and was asked to do with {limit_bytes}; ask for less"
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
            for file, value in before:
                with suppress(OSError):
                    file.write_text(value)
