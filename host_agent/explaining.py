"""Decisions as the control API shows them, explained by policies that may be anybody's.

An explanation is put together when somebody asks for it, by the policy's own code. A built-in
policy is asked on the event loop, another one in a thread with a deadline. One that can't explain
itself spoils nothing: what was decided and done is shown without its terms.
"""

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Final

import trio

from host_agent.deciding import DECIDE_DEADLINE_S, TELL_AGAIN_S
from host_agent.facade.views import DecisionView
from host_agent.foreign import ForeignFault, ask, guarded
from host_agent.policy.decisions import DecisionRecord
from host_agent.policy.explain import Why, plain
from host_agent.policy.registry import is_built_in
from host_agent.views import decision_view

LOG = logging.getLogger("memballoon.policy")

AT_ONCE: Final = 2
"""Explanations at once. As many threads hang for ever if a policy does; others then wait in vain,
until their deadlines."""

Whys = tuple[Why, Why]
"""Of the first and of the last decision of a record."""


class Explainer:
    """Asks policies why they decided as they did."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(AT_ONCE)
        self._told_s: dict[str, float] = {}

    async def views(self, records: Sequence[DecisionRecord], now_s: float) -> list[DecisionView]:
        """The records as they are shown, each with its explanations or why there are none."""
        foreign = [record for record in records if not is_built_in(record.policy)]
        theirs = await self._ask(foreign, now_s) if foreign else {}
        views = []
        for record in records:
            why, last_why = theirs[id(record)] if id(record) in theirs else _whys(record)
            views.append(decision_view(record, why, last_why, now_s))
        return views

    async def _ask(self, records: Sequence[DecisionRecord], now_s: float) -> dict[int, Whys]:
        """The explanations of these by id, whatever their policies do."""
        try:
            asked = await ask(
                partial(_each, records), timeout_s=DECIDE_DEADLINE_S, limiter=self._limiter
            )
        except ForeignFault as fault:
            asked = [fault] * len(records)
        found = {}
        for record, answer in zip(records, asked, strict=True):
            if isinstance(answer, ForeignFault):
                self._tell(record.policy, answer, now_s)
                nothing = Why(f"not explained by the policy: {answer}", ())
                found[id(record)] = (nothing, nothing)
            else:
                found[id(record)] = answer
        return found

    def _tell(self, policy: str, fault: ForeignFault, now_s: float) -> None:
        if now_s - self._told_s.get(policy, -math.inf) >= TELL_AGAIN_S:
            self._told_s[policy] = now_s
            LOG.error("policy %s can't explain itself: %s", policy, fault)


def _each(records: Sequence[DecisionRecord]) -> list[Whys | ForeignFault]:
    """In the thread: one that can't be explained does not spoil the others."""
    found: list[Whys | ForeignFault] = []
    for record in records:
        try:
            found.append(guarded(partial(_whys, record)))
        except ForeignFault as fault:
            found.append(fault)
    return found


def _whys(record: DecisionRecord) -> Whys:
    return plain(record.why), plain(record.last_why)
