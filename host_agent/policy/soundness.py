"""Whether a plan can be carried out: bounds, promises, and no more than there is. Pure.

A policy may be anybody's, and wrong. Whoever carries out plans believes none that has not passed
`checked`, and holds a plan against the host as it has become meanwhile with `fitted`.
"""

from dataclasses import replace
from typing import Any, Final

import numpy as np

from host_agent.ledger.columns import HostColumns, Ints
from host_agent.policy.explain import Explanation
from host_agent.policy.interface import Decision
from host_agent.policy.plan import Plan
from protocol.vocabulary import Urgency

MOST_SHORTAGE_PAGES: Final = 2**53
"""Up to this a float holds it exactly, and it is told in MiB."""


class UnsoundPlan(Exception):
    """A policy's answer that can't be carried out; one line says why."""


def faults_of(host: HostColumns, plan: Plan) -> list[str]:
    """What is wrong with the quotas of a plan for `host`. Empty for a sound one.

    An immovable guest keeps at least what it has, a pin is exact, and everybody else lies between
    its reservation and its assigned size. The quotas add up to pool minus reserve at most, unless
    what is immovable or promised exceeds that. To leave all as it is, is sound as well: that may
    be all that can be done while a part of the reserve is lent.
    """
    quotas = plan.quota_pages
    if plan.names != host.names:
        return ["its names are not those of the guests, in their order"]
    if not isinstance(quotas, np.ndarray) or quotas.shape != (len(host),):
        return [f"it has not one quota for each of {len(host)} guests"]
    if quotas.dtype.kind not in "iu":
        return [f"its quotas are not whole numbers of pages, but {quotas.dtype}"]
    pinned, fixed = host.pinned_pages.known, ~host.movable
    pins = host.within(host.pinned_pages.or_else(0))
    faults = []
    for wrong, what in (
        (fixed & (quotas < host.quota_pages), "can't be moved, and is to have less than it has"),
        (~fixed & pinned & (quotas != pins), "is not given what the operator fixed"),
        (~fixed & (quotas < host.reservation_pages), "is to have less than its reservation"),
        (quotas > host.assigned_pages, "is to have more than its size"),
    ):
        faults += [f"{host.names[place]} {what}" for place in np.flatnonzero(wrong)]
    promised = np.where(fixed, host.quota_pages, np.where(pinned, pins, host.reservation_pages))
    most = max(host.shareable_pages, int(promised.sum()))
    total = sum(quotas.tolist())  # in Python's integers: nonsense must not overflow into sense
    if total > most and not np.array_equal(quotas, host.quota_pages):
        faults.append(f"its quotas add up to {total} pages, and there are {most}")
    if plan.shortage_pages < 0:
        faults.append("its shortage is negative")
    if plan.shortage_pages > MOST_SHORTAGE_PAGES:
        faults.append("its shortage is more than any host has")
    return faults


def checked(host: HostColumns, answer: Any) -> Decision:
    """The decision that a policy gave for `host`, in arrays that are nobody else's.

    Raises UnsoundPlan when it is no decision, or its plan is not sound.
    """
    if not isinstance(answer, Decision) or not isinstance(answer.plan, Plan):
        raise UnsoundPlan(f"it answered with {type(answer).__name__} and not with a Decision")
    plan = answer.plan
    if not isinstance(answer.why, Explanation) or answer.why.names != host.names:
        raise UnsoundPlan("it does not explain its decision about each guest")
    if isinstance(plan.shortage_pages, bool) or not isinstance(plan.shortage_pages, int):
        raise UnsoundPlan("its shortage is not a whole number of pages")
    if not (plan.urgency is None or isinstance(plan.urgency, Urgency)):
        raise UnsoundPlan("its urgency is none that there is")
    flags: dict[str, Any] = {}
    for name in ("may_swap", "reclaim_outside", "entitled_pages"):
        column = getattr(plan, name)
        if column is not None:
            kinds = "iu" if name == "entitled_pages" else "b"
            if not isinstance(column, np.ndarray) or column.shape != (len(host),):
                raise UnsoundPlan(f"{name} has not one value for each guest")
            if column.dtype.kind not in kinds:
                raise UnsoundPlan(f"{name} is of the wrong type, {column.dtype}")
            flags[name] = column.copy()
    faults = faults_of(host, plan)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UnsoundPlan(faults[0] + more)
    quotas = plan.quota_pages.astype(np.int64)  # a copy
    return replace(
        answer,
        plan=replace(plan, quota_pages=quotas, block_growth=bool(plan.block_growth), **flags),
    )


def fitted(plan: Plan, host: HostColumns) -> Plan:
    """A plan for the host as it is now, where guests came, went or changed since it was made.

    Who came is to get what is free, up to what it would like to begin with; who can't be moved
    keeps what it has; promises made since hold. Nothing else is taken from anybody.
    """
    if plan.names != host.names:
        before = {name: place for place, name in enumerate(plan.names)}
        places = np.array([before.get(name, -1) for name in host.names], np.int64)
        came = places < 0
        wished = np.minimum(
            host.startup_pages.or_else(host.assigned_pages), max(host.free_pages, 0)
        )
        newcomers = np.maximum(host.quota_pages, wished)
        old_quotas = np.append(plan.quota_pages, 0)  # so that -1 is a place, if the plan was empty
        plan = replace(
            plan,
            names=host.names,
            quota_pages=np.where(came, newcomers, old_quotas[places]),
            entitled_pages=None,
            may_swap=_moved(plan.may_swap, places),
            reclaim_outside=_moved(plan.reclaim_outside, places),
        )
    quotas = host.within(host.pinned_pages.or_else(plan.quota_pages))
    # A namesake of one that left may be smaller than that was.
    least = np.clip(plan.quota_pages, host.quota_pages, host.assigned_pages)
    return replace(plan, quota_pages=np.where(host.movable, quotas, least))


def _moved(flags: Any, places: Ints) -> Any:
    return None if flags is None else np.append(flags, False)[places]
