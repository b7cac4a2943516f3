"""What to do about a target: how many pages the guest can spare now, or why it can't. Pure.

The driver alone knows how the guest is doing, so it has the first word: it offers no more than
what can go without swapping and without an OOM kill. The host's limit write is the second test.

What may go (`spare_bytes`), all of it less the safety margin:

CALM   what lies beyond the demand estimate: unused quota, and idle clean cache. No cache at all
       while it refaults, since then none of it is known to be idle.
SHORT  all unused quota, and clean cache down to a small floor, refaulting or not: shortage
       costs speed, not lives.

Anonymous memory only where the wish allows some to be swapped out, memory is short, and swap is
left: then as much of it, beyond what may go anyhow, as the wish and the swap allow. Old swap is no
trouble, but a guest that swaps now gives nothing: so one offer of that kind is followed by a pause
that shows whether what went is missed. Dirty pages, and those under writeback, are no quick gift
and count as used. Where there is swap, active cache counts as used too: the kernel would balance
it against anonymous pages and swap some of them out.

Nothing is offered to a guest that swaps now, that stalls for memory, or of which the kernel has
just killed a task; and never more than leaves the guest its floor. What the kernel does not tell
counts against offering.
"""

import math
from dataclasses import dataclass
from typing import Final

from guest_driver.demand import DemandEstimate, headroom_bytes, pinned_bytes
from guest_driver.vitals import GuestMemory
from protocol.guest_floor import floor_bytes
from protocol.units import MIB, PAGE_BYTES, bytes_of, pages_of
from protocol.vocabulary import RefusalReason, Urgency

MARGIN_MIN_BYTES: Final = 2 * MIB
MARGIN_SHARE: Final = 0.02
"""Usage is exact only to 64 pages a CPU, and the guest goes on allocating while the offer is on
its way to the host and back."""

CACHE_FLOOR_BYTES: Final = 4 * MIB
"""Cache left to the guest when memory is short; more where more is mapped, since that is the text
of running programs, and a guest that has to read its own code again from disk stands still."""

CALM_FULL_PRESSURE_PERCENT: Final = 2.0
"""All tasks stalled for memory for 0.2 of the last 10 s: something is wrong already."""

SHORT_FULL_PRESSURE_PERCENT: Final = 20.0
"""Higher when memory is short: the reclaim of the offer before this one counts in it as well."""

SWAP_KEPT_BYTES: Final = 4 * MIB
"""Swap left to the guest: it may swap by itself while the offer is on its way."""

MIN_OFFER_PAGES: Final = 256
"""1 MiB. Less isn't worth two limit writes and a verification, unless it is all that's wished."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the host wants: the balloon's size as it should be and as it is, in pages.

    `swap_pages` may be swapped out for it.
    """

    target_pages: int
    current_pages: int
    urgency: Urgency
    swap_pages: int = 0

    @property
    def missing_pages(self) -> int:
        """Pages still to be given; 0 at the target or beyond it."""
        return max(0, self.target_pages - self.current_pages)


@dataclass(frozen=True, slots=True)
class Decision:
    """Offer `pages`; or, if that is 0, refuse.

    `reason` says what cut the offer and is None only where the whole wish is offered; `detail`
    is for people. To keep the offer, `swap_pages` have to be swapped out.
    """

    pages: int
    reason: RefusalReason | None = None
    detail: str = ""
    swap_pages: int = 0


@dataclass(frozen=True, slots=True)
class Spare:
    """Bytes that could go now, at least 0, and what keeps the rest.

    `balance_bytes` is the same below 0, where something would have to go before anything is to
    spare; None where nothing is to go at all.
    """

    spare_bytes: int
    reason: RefusalReason
    detail: str
    balance_bytes: int | None = None


def decide(
    wish: Wish, memory: GuestMemory, estimate: DemandEstimate, assigned_bytes: int
) -> Decision:
    """Answer a wish.

    `estimate` is the one made from `memory`; `assigned_bytes` is the guest's size as a VM, so
    that its quota is that less the balloon, or the limit that is set, whichever is lower.
    """
    if wish.missing_pages == 0:
        return Decision(0, RefusalReason.AT_TARGET, "the balloon is as large as wanted")
    found = spare(memory, estimate, wish.current_pages, assigned_bytes, wish.urgency)
    floor = floor_bytes(assigned_bytes)
    above_floor_bytes = max(0, _quota_bytes(memory, wish.current_pages, assigned_bytes) - floor)

    swappable_bytes = _swappable_bytes(wish, memory, found)
    spare_bytes = found.spare_bytes
    if swappable_bytes and found.balance_bytes is not None:
        spare_bytes = max(0, found.balance_bytes + swappable_bytes)

    pages = min(wish.missing_pages, pages_of(above_floor_bytes), pages_of(spare_bytes))
    if pages < min(MIN_OFFER_PAGES, wish.missing_pages):
        pages = 0
    swap_pages = _swap_pages(pages, found, swappable_bytes)
    by_swapping = f"{_mib(bytes_of(swap_pages))} are swapped out for it" if swap_pages else ""
    if pages == wish.missing_pages:
        return Decision(pages, detail=by_swapping, swap_pages=swap_pages)
    if above_floor_bytes < spare_bytes:
        reason = RefusalReason.FLOOR
        detail = f"{_mib(floor)} stay with a guest of {_mib(assigned_bytes)}"
    else:
        reason, detail = _why_no_more(wish, memory, found)
    detail = f"{detail}; {by_swapping}" if by_swapping else detail
    return Decision(pages, reason, detail, swap_pages)


def _swappable_bytes(wish: Wish, memory: GuestMemory, found: Spare) -> int:
    """What may be swapped out now for a wish; 0 unless memory is short and the guest is well."""
    if wish.urgency is not Urgency.SHORT or found.balance_bytes is None:
        return 0
    most_bytes = min(bytes_of(wish.swap_pages), _swap_left_bytes(memory), _anon_bytes(memory))
    return most_bytes if most_bytes >= bytes_of(MIN_OFFER_PAGES) else 0


def _swap_left_bytes(memory: GuestMemory) -> int:
    return max(0, (memory.swap_free_bytes or 0) - SWAP_KEPT_BYTES)


def _anon_bytes(memory: GuestMemory) -> int:
    """What could be swapped at all: locked pages are on neither list."""
    return (memory.inactive_anon_bytes or 0) + (memory.active_anon_bytes or 0)


def _swap_pages(pages: int, found: Spare, swappable_bytes: int) -> int:
    """How many pages have to be swapped out for an offer of `pages`."""
    if not pages or not swappable_bytes or found.balance_bytes is None:
        return 0
    needed_bytes = bytes_of(pages) - found.balance_bytes
    if needed_bytes <= 0:
        return 0
    # The kernel's counters can't tell less: so few are allowed for.
    return max(-(-needed_bytes // PAGE_BYTES), MIN_OFFER_PAGES)


def _why_no_more(wish: Wish, memory: GuestMemory, found: Spare) -> tuple[RefusalReason, str]:
    """What keeps the rest of a wish, in reason and detail, where swap may have to do with it."""
    left_bytes = _swap_left_bytes(memory)
    if found.balance_bytes is None or wish.urgency is not Urgency.SHORT:
        return found.reason, found.detail
    if not wish.swap_pages:
        may_not = ", and its balloon may not swap" if left_bytes else ""
        return found.reason, found.detail + may_not
    if left_bytes < min(bytes_of(wish.swap_pages), _anon_bytes(memory)):
        left = f"only {_mib(left_bytes)} of swap are" if left_bytes else "no swap is"
        return RefusalReason.NO_SWAP, f"{found.detail}, and {left} left for it"
    return found.reason, found.detail


def most_to_give_bytes(
    memory: GuestMemory, estimate: DemandEstimate, current_pages: int, assigned_bytes: int
) -> int:
    """What the guest would give now if memory were short, floor included: for the vitals.

    Without swapping: that is for the host to allow, wish by wish.
    """
    found = spare(memory, estimate, current_pages, assigned_bytes, Urgency.SHORT)
    quota_bytes = _quota_bytes(memory, current_pages, assigned_bytes)
    return max(0, min(found.spare_bytes, quota_bytes - floor_bytes(assigned_bytes)))


def spare(
    memory: GuestMemory,
    estimate: DemandEstimate,
    current_pages: int,
    assigned_bytes: int,
    urgency: Urgency,
) -> Spare:
    """What the guest could give now, floor aside: see the top of this module."""
    if (trouble := _trouble(memory, estimate, urgency)) is not None:
        return trouble
    quota_bytes = _quota_bytes(memory, current_pages, assigned_bytes)
    pinned = pinned_bytes(memory)
    if memory.usage_bytes is None or pinned is None:
        return Spare(0, RefusalReason.WORKING_SET, "how much memory is in use is unknown")
    cache_bytes = _droppable_cache_bytes(memory)
    reason = RefusalReason.WORKING_SET
    if urgency is Urgency.SHORT:
        cache_bytes -= min(cache_bytes, _cache_floor_bytes(memory))
        kept_bytes = float(max(memory.usage_bytes - cache_bytes, pinned))
        detail = f"{_mib(kept_bytes)} of {_mib(quota_bytes)} is in use and cannot be dropped"
    else:
        if estimate.is_refaulting:
            cache_bytes = 0
            reason = RefusalReason.REFAULTING
        in_use_bytes = max(memory.usage_bytes - cache_bytes, pinned)
        demand_bytes = estimate.demand_bytes
        if demand_bytes is None:
            demand_bytes = math.ceil(memory.usage_bytes + headroom_bytes(memory.usage_bytes))
        kept_bytes = float(max(in_use_bytes, demand_bytes))
        detail = f"{_mib(kept_bytes)} of {_mib(quota_bytes)} is needed"
        if estimate.is_refaulting:
            detail += ": evicted page cache is being read again"
    margin = max(MARGIN_MIN_BYTES, MARGIN_SHARE * quota_bytes)
    # The wall moves down with the limit: what lies between them is no use to anybody.
    usable_bytes = quota_bytes if memory.wall_bytes is None else min(quota_bytes, memory.wall_bytes)
    balance_bytes = math.floor(usable_bytes - kept_bytes - margin)
    return Spare(max(0, balance_bytes), reason, detail, balance_bytes)


def _trouble(memory: GuestMemory, estimate: DemandEstimate, urgency: Urgency) -> Spare | None:
    """A state in which the guest gives nothing at all, if it is in one."""
    if estimate.was_killed_recently:
        age_s = estimate.oom_kill_age_s or 0.0
        detail = f"a task was killed for lack of memory {age_s:.0f} s ago"
        return Spare(0, RefusalReason.PRESSURE, detail)
    if estimate.is_swapping:
        detail = f"{_mib(estimate.recent_swap_bytes)} were swapped in the last second"
        return Spare(0, RefusalReason.SWAPPING, detail)
    full_percent = memory.pressure_full_avg10
    calm = urgency is Urgency.CALM
    most_percent = CALM_FULL_PRESSURE_PERCENT if calm else SHORT_FULL_PRESSURE_PERCENT
    if full_percent is not None and full_percent >= most_percent:
        detail = f"all tasks stalled for memory {full_percent:.0f} % of the last 10 s"
        return Spare(0, RefusalReason.PRESSURE, detail)
    return None


def _quota_bytes(memory: GuestMemory, current_pages: int, assigned_bytes: int) -> int:
    """The lower of the limit that is set and of what the balloon has left of the guest's size."""
    quota_bytes = max(0, assigned_bytes - bytes_of(current_pages))
    return quota_bytes if memory.limit_bytes is None else min(quota_bytes, memory.limit_bytes)


def _droppable_cache_bytes(memory: GuestMemory) -> int:
    """Clean file pages that reclaim would take without touching anonymous ones."""
    if memory.dirty_bytes is None or memory.writeback_bytes is None:
        return 0
    files_bytes = memory.inactive_file_bytes or 0
    if memory.swap_free_bytes == 0:
        files_bytes += memory.active_file_bytes or 0
    return max(0, files_bytes - memory.dirty_bytes - memory.writeback_bytes)


def _cache_floor_bytes(memory: GuestMemory) -> int:
    return max(CACHE_FLOOR_BYTES, memory.mapped_file_bytes or 0)


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / MIB:.0f} MiB"
