"""One policy at work: asked, checked, and never trusted.

A policy that comes with memballoon is asked on the event loop, which takes a millisecond. One of
somebody else's is asked in a thread with a deadline, while the event loop goes on. Whatever it does
wrong is logged and remembered, and there is no decision: then the last plan stays in force.

A thread can't be ended. One that hangs is left alone, and its policy is asked again only when it
has come back. What the policy has to say of a range is asked in the same way, and its answers are
looked at in the thread as well: they are objects of anybody's. What holds Python's lock for ever,
as C code can, stops the whole agent: then the watchdog frees its guests.
"""

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import trio

from host_agent.foreign import ForeignFault, ask, guarded, said, short
from host_agent.ledger.columns import HostColumns
from host_agent.policy.interface import Decision, JudgesRanges, Memory, Policy, RangeChange
from host_agent.policy.soundness import UnsoundPlan, checked

LOG = logging.getLogger("memballoon.policy")

DECIDE_DEADLINE_S: Final = 1.0
"""A decision about 10,000 guests takes some 10 ms; a hundred times as long is too long."""

TELL_AGAIN_S: Final = 60.0
"""The same fault is logged again only after so long."""


@dataclass(frozen=True, slots=True)
class PolicyFault:
    """What a policy does wrong, and since when."""

    text: str
    since_s: float
    times: int


class Decider:
    """Asks one policy, again and again."""

    def __init__(self, policy: Policy, *, in_thread: bool = False) -> None:
        self.policy = policy
        self.name = policy.name
        self.in_thread = in_thread
        self.fault: PolicyFault | None = None
        """Of the last time that it was asked; None if it answered well."""
        self._memory: Memory = None
        self._limiter = trio.CapacityLimiter(1)
        self._others = trio.CapacityLimiter(1)
        """For what is not a decision: it must not wait for one that hangs."""
        self._asked_s: float | None = None
        """Since when a thread is at work, perhaps for ever."""
        self._told_s = -math.inf

    def decide(self, host: HostColumns, now_s: float) -> Decision | None:
        """Its decision, or None if it gave none that can be carried out."""
        try:
            decision = guarded(self._asking(host, now_s), known=(UnsoundPlan,))
        except ForeignFault as fault:
            self._blame(str(fault), now_s)
            return None
        return self._well(decision)

    async def decide_in_thread(self, host: HostColumns, now_s: float) -> Decision | None:
        """The same in a thread, with a deadline."""
        if self._asked_s is not None:
            self._blame(f"it has not answered for {now_s - self._asked_s:.0f} s", now_s)
            return None
        self._asked_s = now_s
        token = trio.lowlevel.current_trio_token()
        ended = partial(setattr, self, "_asked_s", None)
        try:
            decision = await ask(
                partial(_ask_and_tell, self._asking(host, now_s), ended, token),
                timeout_s=DECIDE_DEADLINE_S,
                limiter=self._limiter,
                known=(UnsoundPlan,),
            )
        except ForeignFault as fault:
            self._blame(str(fault), now_s)
            return None
        return self._well(decision)

    async def range_fault(self, change: RangeChange) -> str | None:
        """What the policy has against a change of a running guest's range; None if nothing.

        Raises ForeignFault if it gives no answer.
        """
        asking = partial(_range_fault, self.policy, change)
        if not self.in_thread:
            return asking()
        return await ask(asking, timeout_s=DECIDE_DEADLINE_S, limiter=self._others)

    def _asking(self, host: HostColumns, now_s: float) -> Callable[[], Decision]:
        return partial(ask_and_check, self.policy, host, self._memory, now_s)

    def _well(self, decision: Decision) -> Decision:
        self._memory = decision.memory
        if self.fault is not None:
            LOG.info("policy %s answers well again", self.name)
            self.fault, self._told_s = None, -math.inf
        return decision

    def _blame(self, text: str, now_s: float) -> None:
        text = short(text)
        before = self.fault
        since_s, times = (now_s, 1) if before is None else (before.since_s, before.times + 1)
        self.fault = PolicyFault(text, since_s, times)
        if now_s - self._told_s >= TELL_AGAIN_S:
            self._told_s = now_s
            LOG.error("policy %s: %s; the last plan stays", self.name, text)


def ask_and_check(policy: Policy, host: HostColumns, memory: Memory, now_s: float) -> Decision:
    """A policy's decision, checked. Raises UnsoundPlan, and whatever the policy raises."""
    answer: Any = policy.decide(host, memory, now_s)
    try:
        return checked(host, answer)
    except UnsoundPlan:
        raise
    except Exception as error:
        # A value of somebody else's class that can't even be looked at.
        raise UnsoundPlan(f"its answer is nonsense: {said(error)}") from error


def _range_fault(policy: Policy, change: RangeChange) -> str | None:
    if not isinstance(policy, JudgesRanges):
        return None
    fault: Any = policy.range_fault(change.reservation_bytes, change.maximum_bytes)
    if not (fault is None or isinstance(fault, str)):
        raise TypeError(f"a range is faulted by {type(fault).__name__}, not by a text")
    return None if fault is None else short(fault)


def _ask_and_tell(
    asking: Callable[[], Decision], ended: Callable[[], object], token: trio.lowlevel.TrioToken
) -> Decision:
    """In the thread. Its end is told also when nobody waits for it any more."""
    try:
        return asking()
    finally:
        with contextlib.suppress(trio.RunFinishedError):  # the agent has ended
            token.run_sync_soon(ended)
