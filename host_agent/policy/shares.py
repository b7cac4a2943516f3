"""Demand with reservation and shares: the default policy.

1. Each guest needs its demand, at least its reservation, at most its maximum, which is its assigned
   size unless it has one of its own.
2. If the needs fit the host (pool minus reserve), every guest gets what it needs, and the rest is
   divided by shares up to the maxima: memory that nobody uses helps nobody.
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

from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np

from host_agent.ledger.columns import Bools, HostColumns, Ints
from host_agent.policy.explain import Details, Explanation
from host_agent.policy.fill import fill
from host_agent.policy.interface import Decision, Memory
from host_agent.policy.plan import Plan
from protocol.units import MIB, pages_of


@dataclass(frozen=True, slots=True)
class SharesSettings:
    """The options of `shares`."""

    step_bytes: int = 2 * MIB
    """Differences up to this are not worth a move: about what a guest's estimate swings by."""

    def __post_init__(self) -> None:
        """A step is a size."""
        if self.step_bytes < 0:
            raise ValueError("step can't be negative")


DEFAULTS: Final = SharesSettings()


@dataclass(frozen=True, slots=True)
class Shares:
    """The policy `shares`, as described above. It needs no memory."""

    settings: SharesSettings = DEFAULTS

    name: ClassVar[str] = "shares"
    source: ClassVar[str] = "weighted max-min fairness between reservation and demand"

    def decide(self, host: HostColumns, memory: Memory, now_s: float) -> Decision:
        """The quotas that the guests of `host` should have.

        The targets of movable guests add up to at most what the immovable and pinned ones leave of
        pool minus reserve, except where reservations alone exceed that.
        """
        division = _divide(host, _unsparable_pages(host))
        could_all_move = replace(host, movable=np.array(True))
        entitled = _divide(could_all_move, host.reservation_pages)
        wanted = division.quota_pages
        settled = self._is_settled(host, wanted)
        quotas = host.quota_pages if settled else wanted
        plan = Plan(host.names, quotas, division.shortage_pages, entitled.quota_pages)
        return Decision(
            plan, None, Explanation(host.names, lambda: _details(host, division, quotas, settled))
        )

    def _is_settled(self, host: HostColumns, wanted: Ints) -> bool:
        if int(host.quota_pages.sum()) > host.shareable_pages:
            return False
        # A guest that has nothing yet can't start with nothing; promises are kept exactly.
        exactly = host.pinned_pages.known | (host.quota_pages < host.reservation_pages)
        exactly = exactly | (host.quota_pages == 0)
        step_pages = np.where(exactly, 0, pages_of(self.settings.step_bytes))
        return bool(np.all(np.abs(wanted - host.quota_pages) <= step_pages))


@dataclass(frozen=True, slots=True, eq=False)
class _Division:
    """Quotas, and what they were made from."""

    quota_pages: Ints
    shortage_pages: int
    low_pages: Ints
    need_pages: Ints
    free_hand: Bools
    """Neither pinned nor immovable."""
    left_pages: int
    """For those with a free hand."""


def _divide(host: HostColumns, least_pages: Ints) -> _Division:
    """Divide the host; nobody gets less than its `least_pages`, if all of these fit."""
    free_hand, left_pages = ~host.fixed, host.left_pages
    lows = least_pages
    if int(lows[free_hand].sum()) > left_pages:
        lows = host.reservation_pages
    most = host.most_pages
    demands = host.demand_pages.or_else(host.quota_pages)
    needs = np.maximum(np.clip(demands, host.reservation_pages, most), lows)
    shortage_pages = max(int(needs[free_hand].sum()) - left_pages, 0)
    low, high = (lows, needs) if shortage_pages else (needs, np.maximum(most, needs))
    quotas = host.fixed_pages
    quotas[free_hand] = fill(left_pages, low[free_hand], high[free_hand], host.shares[free_hand])
    return _Division(quotas, shortage_pages, lows, needs, free_hand, left_pages)


def _unsparable_pages(host: HostColumns) -> Ints:
    """What can't be taken from a guest: its reservation, and what it says that it can't spare."""
    spare_pages = host.spare_pages.or_else(host.quota_pages)
    return host.within(host.quota_pages - spare_pages)


def _details(host: HostColumns, division: _Division, quotas: Ints, settled: bool) -> Details:
    short = division.shortage_pages > 0
    every = np.ones(len(host), np.bool_)
    got = division.quota_pages
    return Details(
        host=(
            ("shareable", host.shareable_pages, "pages"),
            ("left for those with a free hand", division.left_pages, "pages"),
            ("shortage", division.shortage_pages, "pages"),
        ),
        guests=(
            ("demand", host.demand_pages, "pages"),
            ("reservation", host.reservation_pages, "pages"),
            ("assigned", host.assigned_pages, "pages"),
            ("maximum", host.maximum_pages, "pages"),
            ("spare", host.spare_pages, "pages"),
            ("shares", host.shares, "shares"),
            ("need", division.need_pages, "pages"),
            ("least", division.low_pages, "pages"),
            ("divided", got, "pages"),
            ("quota now", host.quota_pages, "pages"),
            ("quota wanted", quotas, "pages"),
        ),
        rules=(
            (~host.movable, "it can't be moved: it keeps what it has"),
            (host.pinned_pages.known, "the operator fixed its quota"),
            (every & settled, "every guest is near enough to what it should have: nothing moves"),
            (
                (got <= division.low_pages) & short,
                "memory is short: it keeps what can't be taken from it",
            ),
            (
                (got >= division.need_pages) & short,
                "memory is short, and its shares reach its need",
            ),
            (every & short, "memory is short: by shares between what can't be taken and the need"),
            (got >= host.most_pages, "all needs fit: it has the most that it may have"),
            (got <= division.need_pages, "all needs fit: its own, and by its shares no more"),
        ),
        otherwise="all needs fit: its own, and the rest by shares",
    )
