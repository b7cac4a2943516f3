"""How much the guests are to put up with when they are asked for memory. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from host_agent.guest import Guest
from host_agent.observing import is_dry
from host_agent.policy.plan import Plan
from protocol.vocabulary import Urgency

URGENT_AFTER_S: Final = 0.25
"""A guest that has waited so long for what it is entitled to makes the matter urgent: then the
others give up page cache as well."""


@dataclass(frozen=True, slots=True)
class Pressing:
    """How one guest is asked."""

    urgency: Urgency
    may_swap: bool
    """As far as its configuration lets its balloon push it into swap at all."""
    detail: str
    """The same in words."""


def urgency_of(
    plan: Plan,
    owed_pages: int,
    guests: Iterable[Guest],
    now_s: float,
    *,
    clients_wait: bool = False,
) -> Urgency:
    """How urgent it is that memory moves.

    A dry guest and pages that are owed, to the reserve or beyond the pool, are urgent whatever the
    policy says; so are a shortage, and a guest or a client that waits, if it says nothing.
    """
    some = tuple(guests)
    if owed_pages or any(is_dry(guest, now_s) for guest in some):
        return Urgency.SHORT
    if plan.urgency is not None:
        return plan.urgency
    waits = clients_wait or any(
        guest.wanted_since_s is not None and now_s - guest.wanted_since_s > URGENT_AFTER_S
        for guest in some
    )
    return Urgency.SHORT if plan.shortage_pages or waits else Urgency.CALM


def pressing_on(plan: Plan, place: int, urgency: Urgency) -> Pressing:
    """How the guest at `place` of the plan is asked, where the whole matter is of `urgency`."""
    outside = plan.reclaim_outside is not None and bool(plan.reclaim_outside[place])
    if outside:
        urgency = Urgency.SHORT
    may_swap = urgency is Urgency.SHORT if plan.may_swap is None else bool(plan.may_swap[place])
    # A page counts only once its frame is claimed, and only the guest's driver can reserve one.
    detail = f"{urgency.value}, and not from outside: frames are its driver's" if outside else ""
    return Pressing(urgency, may_swap, detail or urgency.value)
