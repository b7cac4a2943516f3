"""How much memory the guest needs: a pure estimate from one look at its statistics to the next.

It owns the control law and its thresholds; it knows no files, no clock and no host.

The law, from top to bottom:

1. Pinned memory is what no reclaim can take without swap: usage less both file lists, and never
   less than the anonymous lists, the unevictable one and the kernel's own.
2. The working set is usage less the inactive file list, and never less than what is pinned. The
   kernel sorts cache into active and inactive by use, so the inactive list is the idle part...
3. ...unless evicted cache is read again. While more than REFAULT_NOISE_BYTES came back within
   the last REFAULT_WINDOW_S or so, a cycle longer than the cache may be running through the
   inactive list: then all of the cache counts as used, and what came back within the window
   tells how much more is wanted. One window is about one round of a workload, so that the
   figure neither misses a slow one by much nor multiplies a fast one: what is still missing
   after a step refaults again, and gives the next step.
4. At the limit (within AT_LIMIT_SHARE of it, or of the wall where there is one) anonymous memory
   that grows is projected ahead by GROWTH_LOOKAHEAD_S, since there its growth eats the cache, and
   then kills. And what came back from swap within the window is wanted on top, as evicted cache
   is: it has pushed out something else.
5. Need is the sum, plus headroom: HEADROOM_SHARE of it, at least HEADROOM_MIN_BYTES. Room for
   the next fork, and for the error of the kernel's page counters.
6. Demand rises to need at once and falls towards it with DEMAND_HALF_LIFE_S, and is bounded by
   the assigned size. Fast up, slow down: the other way round quota oscillates (evict, refault,
   grow, look idle, evict). The memory is of the sum, not of its parts, so that cache which has
   come back is not counted twice, once as wanted and once as used.

Statistics that the kernel does not give leave their term out, always to the side of more need;
without usage there is no estimate (None), and the memory of the last one is kept.

What it can't see: cache that was active once and is idle now stays on the active list until
something is reclaimed. It counts as used until then. That is what `Urgency.SHORT` is for.

Sources: senpai (Meta) for refaults as the sign of having taken too much, MOM's balloon.rules for
naming thresholds, Waldspurger 2002 (section 5.3) for fast-up, slow-down averages.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Final

from guest_driver.vitals import GuestMemory
from protocol.units import MIB

HEADROOM_MIN_BYTES: Final = 4 * MIB
HEADROOM_SHARE: Final = 0.05
"""A few per cent let a small program start without reclaim; below 80 MiB the minimum does."""

REFAULT_WINDOW_S: Final = 1.0
"""Time constant of the memory of refaults, and of swapping."""

REFAULT_NOISE_BYTES: Final = 1 * MIB
"""Refaults within the window that are no news: a log file opened again, a program's start."""

SWAP_NOISE_BYTES: Final = 1 * MIB
"""Pages swapped, in or out, within the window that are no news."""

AT_LIMIT_SHARE: Final = 0.985
"""Usage this near to the limit meets it with the next batch of pages (2 CPUs x 256 KiB)."""

GROWTH_LOOKAHEAD_S: Final = 2.0
"""How far anonymous growth is projected: a round of target, offer and grant, with reserve."""

DEMAND_HALF_LIFE_S: Final = 5.0
"""Half of what was needed and is not any more is forgotten in this time."""

OOM_KILL_CAUTION_S: Final = 30.0
"""After a kill for lack of memory the guest is thought to be starving for this long: the killed
program starts again and wants its memory back."""


@dataclass(frozen=True, slots=True)
class DemandEstimate:
    """What the guest needs, as of `clock_s`, and what the next estimate has to know of this one.

    `working_set_bytes`, `pinned_bytes`, `demand_bytes`: None where usage was unknown.
    `last` is the look it was made from; the fields named `recent_` are sums that fade
    with REFAULT_WINDOW_S.
    """

    clock_s: float
    working_set_bytes: int | None = None
    pinned_bytes: int | None = None
    demand_bytes: int | None = None
    last: GuestMemory = field(default_factory=GuestMemory)
    remembered_bytes: float = 0.0
    recent_refault_bytes: float = 0.0
    recent_swap_bytes: float = 0.0
    recent_swap_in_bytes: float = 0.0
    recent_growth_bytes: float = 0.0
    oom_kill_at_s: float | None = None

    @property
    def is_refaulting(self) -> bool:
        """Evicted page cache is being read again, beyond noise."""
        return self.recent_refault_bytes > REFAULT_NOISE_BYTES

    @property
    def is_swapping(self) -> bool:
        """Anonymous memory goes to swap or comes back, beyond noise. Old swap is not swapping."""
        return self.recent_swap_bytes > SWAP_NOISE_BYTES

    @property
    def oom_kill_age_s(self) -> float | None:
        """Seconds since a kill that was seen to happen, None when none was."""
        return None if self.oom_kill_at_s is None else self.clock_s - self.oom_kill_at_s

    @property
    def was_killed_recently(self) -> bool:
        """The kernel killed one of the guest's tasks within OOM_KILL_CAUTION_S."""
        return self.oom_kill_age_s is not None and self.oom_kill_age_s < OOM_KILL_CAUTION_S


def headroom_bytes(needed_bytes: float) -> float:
    """Bytes to keep free above `needed_bytes`."""
    return max(HEADROOM_MIN_BYTES, HEADROOM_SHARE * needed_bytes)


def pinned_bytes(memory: GuestMemory) -> int | None:
    """Bytes that can't be dropped without swap; None without usage.

    Unknown file lists count as pinned. The lists of the LRU are disjoint, unlike the anon and
    unevictable figures, which both contain locked anonymous pages.
    """
    if memory.usage_bytes is None:
        return None
    files_bytes = (memory.inactive_file_bytes or 0) + (memory.active_file_bytes or 0)
    anon_lists_bytes = (memory.inactive_anon_bytes or 0) + (memory.active_anon_bytes or 0)
    unmovable_bytes = max(
        anon_lists_bytes + (memory.unevictable_bytes or 0),
        (memory.anon_bytes or 0) + (memory.shmem_bytes or 0),
    )
    return max(memory.usage_bytes - files_bytes, unmovable_bytes + (memory.kernel_bytes or 0))


def working_set_bytes(memory: GuestMemory) -> int | None:
    """Usage less idle (inactive) file pages, at least what is pinned; None without usage."""
    pinned = pinned_bytes(memory)
    if memory.usage_bytes is None or pinned is None:
        return None
    return max(memory.usage_bytes - (memory.inactive_file_bytes or 0), pinned)


def next_estimate(
    previous: DemandEstimate | None, memory: GuestMemory, clock_s: float, assigned_bytes: int
) -> DemandEstimate:
    """The estimate after one more look at the guest.

    `previous` is the result of the last call (None at first), `clock_s` the guest's monotonic
    clock at `memory`, `assigned_bytes` the guest's size as a VM, which bounds the demand.
    """
    before = previous or DemandEstimate(clock_s=clock_s)
    elapsed_s = max(0.0, clock_s - before.clock_s)
    fade = math.exp(-elapsed_s / REFAULT_WINDOW_S)
    last = before.last

    swapped_in_bytes = _rise(last.refault_anon_bytes_total, memory.refault_anon_bytes_total)
    swapped_bytes = _rise(last.swap_used_bytes, memory.swap_used_bytes) + swapped_in_bytes
    refaulted_bytes = _rise(last.refault_bytes_total, memory.refault_bytes_total)
    grown_bytes = _rise(last.anon_bytes, memory.anon_bytes)
    killed = _rise(last.oom_kills_total, memory.oom_kills_total) > 0
    estimate = DemandEstimate(
        clock_s=max(clock_s, before.clock_s),
        last=memory,
        remembered_bytes=before.remembered_bytes,
        recent_refault_bytes=before.recent_refault_bytes * fade + refaulted_bytes,
        recent_swap_bytes=before.recent_swap_bytes * fade + swapped_bytes,
        recent_swap_in_bytes=before.recent_swap_in_bytes * fade + swapped_in_bytes,
        recent_growth_bytes=before.recent_growth_bytes * fade + grown_bytes,
        oom_kill_at_s=clock_s if killed else before.oom_kill_at_s,
    )
    return _with_demand(estimate, memory, elapsed_s, assigned_bytes)


def _with_demand(
    estimate: DemandEstimate, memory: GuestMemory, elapsed_s: float, assigned_bytes: int
) -> DemandEstimate:
    working_set = working_set_bytes(memory)
    demand_bytes = None
    remembered_bytes = estimate.remembered_bytes
    if working_set is not None:
        need_bytes = _need_bytes(estimate, memory, working_set)
        excess_bytes = remembered_bytes - need_bytes
        if excess_bytes > 0:
            need_bytes += excess_bytes * 0.5 ** (elapsed_s / DEMAND_HALF_LIFE_S)
        # Remembered as bounded, or a peak beyond the assigned size would have to fade first.
        remembered_bytes = min(need_bytes, float(assigned_bytes))
        demand_bytes = math.ceil(remembered_bytes)
    return replace(
        estimate,
        working_set_bytes=working_set,
        pinned_bytes=pinned_bytes(memory),
        demand_bytes=demand_bytes,
        remembered_bytes=remembered_bytes,
    )


def _need_bytes(estimate: DemandEstimate, memory: GuestMemory, working_set: int) -> float:
    """Steps 3 to 5 of the law: what the guest needs at this moment, without memory."""
    need_bytes = float(working_set)
    if estimate.is_refaulting:
        need_bytes = max(need_bytes, memory.usage_bytes or 0) + estimate.recent_refault_bytes
    if _is_at_limit(memory):
        growth_bytes_per_s = estimate.recent_growth_bytes / REFAULT_WINDOW_S
        need_bytes += growth_bytes_per_s * GROWTH_LOOKAHEAD_S
        if estimate.recent_swap_in_bytes > SWAP_NOISE_BYTES:
            need_bytes += estimate.recent_swap_in_bytes
    return need_bytes + headroom_bytes(need_bytes)


def _is_at_limit(memory: GuestMemory) -> bool:
    limits = [limit for limit in (memory.limit_bytes, memory.wall_bytes) if limit is not None]
    return bool(limits) and (memory.usage_bytes or 0) >= AT_LIMIT_SHARE * min(limits)


def _rise(before: int | None, now: int | None) -> int:
    """How much a figure rose; 0 when unknown at either end, or fallen (a new cgroup)."""
    if before is None or now is None:
        return 0
    return max(0, now - before)
