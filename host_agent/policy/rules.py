"""What the agent promises, whatever a policy's formula says: the rules that cut its wishes.

A formula of another system does not know this agent's promises: targets add up to at most pool
minus reserve, a reservation is never touched, what can't be moved stays as it is, and a pin is
exact. `keep_promises` cuts what a formula wants to what can be promised, and names the rule that
cut it. In all of these formulas the host is what is shared out: its memory is pool minus reserve,
used are the guests' quotas, free is the rest. So a formula may use all of the host that it knows.
"""

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from host_agent.ledger.columns import Bools, HostColumns, Ints
from host_agent.policy.fill import fill

Rules: TypeAlias = tuple[tuple[Bools, str], ...]

IMMOVABLE: Final = "it can't be moved: it keeps what it has"
PINNED: Final = "the operator fixed its quota"
STARTING: Final = "it starts: it gets what it begins with"
POOL: Final = "cut: it may grow only as far as pool minus reserve goes, by shares"
RESERVE: Final = "cut: more is given out than pool minus reserve; it gives back, by shares"
RESERVATION: Final = "cut: never below its reservation"
MAXIMUM: Final = "cut: never above its maximum"


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Quotas that keep the promises, and what they were cut by."""

    quota_pages: Ints
    rules: Rules
    """Why a guest does not have what the formula wants; for an explanation, in order."""


def starting(host: HostColumns) -> Bools:
    """Who has not begun to run: no driver yet, and still to be given memory."""
    return ~host.fixed & ~host.has_driver


def need_pages(host: HostColumns) -> Ints:
    """Demand within reservation and maximum; a guest that has not said keeps what it has.

    One that starts needs what it begins with.
    """
    demand = host.demand_pages.or_else(host.quota_pages)
    demand = np.where(starting(host), host.startup_pages.or_else(demand), demand)
    return np.clip(demand, host.reservation_pages, host.most_pages)


def shortage_pages(host: HostColumns, kept_free_pages: int = 0) -> int:
    """How much more is needed than there is, if the policy keeps so much of it free."""
    needs = int(need_pages(host)[~host.fixed].sum())
    left = host.left_pages
    return max(needs + min(kept_free_pages, max(left, 0)) - left, 0)


def keep_promises(host: HostColumns, wanted_pages: Ints, *, decides_starts: bool = False) -> Kept:
    """Cut what a formula wants for each guest to what the agent can promise.

    The targets add up to at most pool minus reserve, except where reservations and guests that
    can't be moved exceed that. Growth is cut first, by shares; only if more is given out already
    do all give back, by shares. What a formula wants for guests without a free hand does not count,
    nor what it wants for those that start, unless it `decides_starts`.
    """
    free = ~host.fixed
    begins = starting(host) & (not decides_starts)
    least, most = host.reservation_pages, host.most_pages
    wanted = np.where(begins, need_pages(host), np.clip(wanted_pages, least, most))
    # Nobody is given less than it has because others are to grow.
    stays = np.maximum(np.minimum(wanted, host.quota_pages), least)
    left = host.left_pages
    quotas = host.fixed_pages
    quotas[free] = wanted[free]
    if int(wanted[free].sum()) > left:
        low, high = (stays, wanted) if int(stays[free].sum()) <= left else (least, stays)
        quotas[free] = fill(left, low[free], high[free], host.shares[free])
    return Kept(
        quotas,
        (
            (~host.movable, IMMOVABLE),
            (host.pinned_pages.known, PINNED),
            (quotas < stays, RESERVE),
            (quotas < wanted, POOL),
            (begins, STARTING),
            (wanted_pages < least, RESERVATION),
            (wanted_pages > most, MAXIMUM),
        ),
    )
