"""Demand with reservation and shares: the default policy.

1. Each guest needs its demand, at least its reservation, at most its assigned size.
2. If the needs fit the host (pool minus reserve), every guest gets what it needs, and the rest is
   divided by shares up to the assigned sizes: memory that nobody uses helps nobody.
3. If they do not fit, the host is short: every guest keeps its reservation, and the rest is divided
   by shares up to the needs. The plan says by how much the host is short.

Guests without shares come last, in both cases: they get what the others leave.

What a guest says that it can't spare is not taken from it, since the guest decides: planning to
take it would only leave others waiting for memory that does not come. Should all of them together
claim more than there is, that is not believed, and only the reservations are kept.

A guest that can't be moved (no driver connected, or stuck) keeps what it has, and one that the
operator pinned gets what was asked for; the others share what is left.

Small differences are left alone: if every guest is within `STEP_PAGES` of its target and nothing is
owed to the host reserve, the plan is to keep everything as it is, so that a noisy estimate does not
make memory wander. A pin and a reservation are promises and not estimates: they are kept exactly.
"""

from collections.abc import Callable
from typing import Final

from host_agent.ledger.snapshot import GuestSnapshot, HostSnapshot
from host_agent.policy.fill import Bounds, fill
from host_agent.policy.plan import Plan, QuotaTarget
from protocol.units import MIB, pages_of

STEP_PAGES: Final = pages_of(2 * MIB)
"""Differences up to this are not worth a move: about what a guest's estimate swings by."""


def plan(snapshot: HostSnapshot) -> Plan:
    """The quotas that the guests of `snapshot` should have.

    The targets of movable guests add up to at most what the immovable and pinned ones leave of
    pool minus reserve, except where reservations alone exceed that.
    """
    pinned = {
        g.name: _within(g, g.pinned_pages) for g in snapshot.guests if g.pinned_pages is not None
    }
    stuck = {g.name: g.quota_pages for g in snapshot.guests if not g.movable}
    wanted, shortage = _divide(snapshot, pinned | stuck, _unsparable_pages)
    entitled, _ = _divide(snapshot, pinned, lambda guest: guest.reservation_pages)
    kept = {g.name: g.quota_pages for g in snapshot.guests}
    quotas = kept if _is_settled(snapshot, wanted) else wanted
    names = sorted(quotas)
    targets = tuple(QuotaTarget(name, quotas[name], entitled[name]) for name in names)
    return Plan(targets, shortage)


def _divide(
    snapshot: HostSnapshot, fixed: dict[str, int], least: Callable[[GuestSnapshot], int]
) -> tuple[dict[str, int], int]:
    """Quotas by name with those in `fixed` as they are, and the shortage, in pages.

    Nobody gets less than its `least`, if all of these fit.
    """
    others = [g for g in snapshot.guests if g.name not in fixed]
    left = snapshot.shareable_pages - sum(fixed.values())
    lows = {g.name: least(g) for g in others}
    if sum(lows.values()) > left:
        lows = {g.name: g.reservation_pages for g in others}
    needs = {g.name: max(_need_pages(g), lows[g.name]) for g in others}
    shortage = max(sum(needs.values()) - left, 0)
    if shortage:
        parts = {g.name: Bounds(lows[g.name], needs[g.name], g.shares) for g in others}
    else:
        parts = {g.name: Bounds(needs[g.name], g.assigned_pages, g.shares) for g in others}
    return fill(left, parts) | fixed, shortage


def _unsparable_pages(guest: GuestSnapshot) -> int:
    """What can't be taken from the guest: its reservation, and what it says that it can't spare."""
    if guest.spare_pages is None:
        return guest.reservation_pages
    return _within(guest, guest.quota_pages - guest.spare_pages)


def _within(guest: GuestSnapshot, pages: int) -> int:
    """`pages`, but at least the guest's reservation and at most its size."""
    return min(max(pages, guest.reservation_pages), guest.assigned_pages)


def _need_pages(guest: GuestSnapshot) -> int:
    """Demand within reservation and size; a guest that has not said keeps what it has."""
    demand = guest.quota_pages if guest.demand_pages is None else guest.demand_pages
    return _within(guest, demand)


def _is_settled(snapshot: HostSnapshot, wanted: dict[str, int]) -> bool:
    quotas = sum(g.quota_pages for g in snapshot.guests)
    return quotas <= snapshot.shareable_pages and all(
        _is_near(g, wanted[g.name]) for g in snapshot.guests
    )


def _is_near(guest: GuestSnapshot, wanted_pages: int) -> bool:
    """Whether the guest may stay as it is. A pin and a reservation are promises: kept exactly."""
    promised = guest.pinned_pages is not None or guest.quota_pages < guest.reservation_pages
    if promised or guest.quota_pages == 0:  # a guest that has nothing yet can't start with nothing
        return guest.quota_pages == wanted_pages
    return abs(wanted_pages - guest.quota_pages) <= STEP_PAGES
