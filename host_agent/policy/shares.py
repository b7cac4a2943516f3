"""Demand with reservation and shares: the default policy.

1. Each guest needs its demand, at least its reservation, at most its assigned size.
2. If the needs fit the host (pool minus reserve), every guest gets what it needs, and the rest is
   divided by shares up to the assigned sizes: memory that nobody uses helps nobody.
3. If they do not fit, the host is short: every guest keeps its reservation, and the rest is divided
   by shares up to the needs. The plan says by how much the host is short.

A guest that can't be moved (no driver connected, or stuck) keeps what it has, and one that the
operator pinned gets what was asked for; the others share what is left.

Small differences are left alone: if every guest is within `STEP_PAGES` of its target and nothing is
owed to the host reserve, the plan is to keep everything as it is, so that a noisy estimate does not
make memory wander.
"""

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
    fixed = {g.name: quota for g in snapshot.guests if (quota := _fixed_pages(g)) is not None}
    others = [g for g in snapshot.guests if g.name not in fixed]
    left = max(snapshot.shareable_pages - sum(fixed.values()), 0)
    needs = {g.name: _need_pages(g) for g in others}
    shortage = max(sum(needs.values()) - left, 0)
    if shortage:
        parts = {
            g.name: Bounds(min(g.reservation_pages, needs[g.name]), needs[g.name], g.shares)
            for g in others
        }
    else:
        parts = {g.name: Bounds(needs[g.name], g.assigned_pages, g.shares) for g in others}
    wanted = fill(left, parts) | fixed
    if _is_settled(snapshot, wanted):
        kept = {g.name: g.quota_pages for g in snapshot.guests}
    else:
        kept = wanted
    targets = tuple(QuotaTarget(name, kept[name], wanted[name]) for name in sorted(wanted))
    return Plan(targets, shortage)


def _fixed_pages(guest: GuestSnapshot) -> int | None:
    if not guest.movable:
        return guest.quota_pages
    if guest.pinned_pages is not None:
        return min(max(guest.pinned_pages, guest.reservation_pages), guest.assigned_pages)
    return None


def _need_pages(guest: GuestSnapshot) -> int:
    """Demand within reservation and size; a guest that has not said keeps what it has."""
    demand = guest.quota_pages if guest.demand_pages is None else guest.demand_pages
    return min(max(demand, guest.reservation_pages), guest.assigned_pages)


def _is_settled(snapshot: HostSnapshot, wanted: dict[str, int]) -> bool:
    quotas = sum(g.quota_pages for g in snapshot.guests)
    return quotas <= snapshot.shareable_pages and all(
        abs(wanted[g.name] - g.quota_pages) <= STEP_PAGES for g in snapshot.guests
    )
