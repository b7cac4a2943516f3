"""Who gets what, carried out: events -> ledger -> snapshot -> plan -> free first, grant later.

The balancer ties the pure parts to the effects. It plans when something has changed or an interval
has passed, asks guests for what the plan takes from them, and raises the limits of those that are
to get more, as far as pages are free: a page is granted only after it was credited. Nothing here
waits: raising a limit takes microseconds, everything slower is the sessions' business.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Final

import trio

from host_agent.client_memory import ClientMemory
from host_agent.deciding import Decider, PolicyFault
from host_agent.guest import Guest, Phase
from host_agent.ledger.columns import HostColumns
from host_agent.ledger.ledger import Ledger
from host_agent.moves import MoveBook
from host_agent.observing import is_dry, observe, pages_or_none
from host_agent.overdraft import Overdraft
from host_agent.policy.decisions import DecisionLog
from host_agent.policy.interface import Decision, Policy, RangeChange
from host_agent.policy.plan import NO_PLAN
from host_agent.policy.soundness import fitted
from host_agent.pressing import Pressing, pressing_on, urgency_of
from host_agent.quota.errors import QuotaError
from protocol.page_frames import PageFrames
from protocol.units import MIB, bytes_of, pages_of
from protocol.vocabulary import Urgency

LOG = logging.getLogger("memballoon.balance")

PLAN_GAP_S: Final = 0.005
"""Plans are at least this far apart: a storm of events is answered by one plan, not by hundreds."""

DEMAND_STEP_PAGES: Final = pages_of(1 * MIB)
"""A demand that changed by less waits for the next interval."""

FIRST_REFUSAL_PAUSE_S: Final = 0.25
LONGEST_REFUSAL_PAUSE_S: Final = 4.0
"""A guest that refused is asked again after a pause that doubles: its state has to change first."""

MOST_REFUSALS: Final = 16
"""Counted no further: the pause is at its longest, and powers of two outgrow a float."""

PLAN_PATIENCE_S: Final = 2.0
"""Twice what a policy is given to decide."""


class Balancer:
    """Plans and moves the memory of one host. Implements the sessions' SessionOwner."""

    def __init__(self, ledger: Ledger, policy: Policy, interval_s: float) -> None:
        self.ledger = ledger
        self.guests: dict[str, Guest] = {}
        self.clients = ClientMemory(ledger)
        self.moves = MoveBook()
        self.overdraft = Overdraft(ledger)
        self.log = DecisionLog()
        self.plan = NO_PLAN
        self._decided_plan = NO_PLAN
        """As the policy gave it; `plan` is what it means for the guests that there are."""
        self._decider = Decider(policy)
        self._decided = trio.Event()
        self.plans_total = 0
        self._interval_s = interval_s
        self._changed = trio.Event()
        self._was_short = False

    async def run(self) -> None:
        """Plan for ever: at once when something has changed, else at the interval."""
        while True:
            with trio.move_on_after(self._interval_s):
                await self._changed.wait()
            self._changed = trio.Event()
            await self._plan_round()
            await trio.sleep(PLAN_GAP_S)

    def replan(self) -> None:
        """Something has changed: plan soon."""
        self._changed.set()

    # Planning

    @property
    def policy(self) -> Policy:
        """The policy that decides."""
        return self._decider.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self.use(policy)

    @property
    def policy_fault(self) -> PolicyFault | None:
        """What is wrong with the policy, as long as it gives no plan that can be carried out."""
        return self._decider.fault

    def use(self, policy: Policy, *, in_thread: bool = False) -> None:
        """Let another policy decide from the next plan on. `in_thread` as for Decider."""
        self._decider = Decider(policy, in_thread=in_thread)
        self.replan()

    async def range_fault(self, change: RangeChange) -> str | None:
        """As Decider.range_fault, of the policy in force."""
        return await self._decider.range_fault(change)

    async def plan_anew(self) -> None:
        """Have a plan made, and return when it is carried out or known to be none."""
        if self._decider.in_thread:
            self.replan()
            with trio.move_on_after(PLAN_PATIENCE_S):
                await self._decided.wait()
        else:
            self.plan_once()

    def plan_once(self) -> None:
        """One round now: look, decide, ask, grant. One whose policy needs a thread is soon."""
        if self._decider.in_thread:
            self.replan()
            return
        now_s = trio.current_time()
        host = self._look(now_s)
        self._carry_out(host, host, self._decider.decide(host, now_s), now_s)

    async def _plan_round(self) -> None:
        if not self._decider.in_thread:
            self.plan_once()
            return
        decider, asked_s = self._decider, trio.current_time()
        asked = self._look(asked_s)
        decision = await decider.decide_in_thread(asked, asked_s)
        if decider is not self._decider:
            self.replan()  # another policy decides by now
            return
        now_s = trio.current_time()
        self._carry_out(self._look(now_s), asked, decision, now_s)

    def _look(self, now_s: float) -> HostColumns:
        observed = {
            guest.name: observe(guest, self.ledger.view(guest.name).quota_pages, now_s)
            for guest in self.guests.values()
        }
        return self.ledger.snapshot(observed, self.clients.hidden_pages).columns

    def _carry_out(
        self, host: HostColumns, asked: HostColumns, decision: Decision | None, now_s: float
    ) -> None:
        """Ask and grant on `host` by a decision about `asked`, the host as it was a little before.

        Without a decision the last plan stays in force.
        """
        if decision is not None:
            self.log.decided(self._decider.name, asked, decision, now_s)
            for name in asked.names:
                if name not in self.guests:  # it left while the policy decided
                    self.log.forget(name)
            self._decided_plan = decision.plan
        # What it was decided about may have changed since.
        self.plan = fitted(self._decided_plan, host)
        self.plans_total += 1
        self._tell_shortage()
        targets = self.plan.targets
        for target in targets:
            self._note_target(self.guests[target.name], target.quota_pages, now_s)
        urgency = urgency_of(
            self.plan,
            self.ledger.owed_pages,
            self.guests.values(),
            now_s,
            clients_wait=self.clients.waits,
        )
        for place, target in enumerate(targets):
            pressing = pressing_on(self.plan, place, urgency)
            self._ask(self.guests[target.name], target.quota_pages, pressing, now_s)
        self.grant_free()
        self.ledger.check()
        self._decided.set()
        self._decided = trio.Event()

    def _note_target(self, guest: Guest, target_pages: int, now_s: float) -> None:
        quota_pages = self.ledger.view(guest.name).quota_pages
        guest.target_pages = target_pages
        if quota_pages - target_pages < guest.frame_pages:
            guest.stalled_since_s = None
        elif guest.stalled_since_s is None:
            guest.stalled_since_s = now_s
        if target_pages - quota_pages >= guest.frame_pages:
            if guest.wanted_since_s is None:
                guest.wanted_since_s = now_s
                self.moves.wished(guest.name, now_s)
        else:
            self._fulfil(guest)

    def _fulfil(self, guest: Guest) -> None:
        guest.wanted_since_s = None
        for move in self.moves.fulfilled(guest.name):
            LOG.info(
                "%s got %.1f MiB from %s in %.0f ms",
                move.taker,
                move.size_bytes / MIB,
                move.giver,
                move.seconds * 1000,
            )

    def _ask(self, guest: Guest, target_pages: int, pressing: Pressing, now_s: float) -> None:
        """Ask a guest that has more than its target for the difference."""
        urgency = pressing.urgency
        if guest.session is None or guest.session.inflating:
            return
        if self.ledger.view(guest.name).quota_pages - target_pages < guest.frame_pages:
            return
        if is_dry(guest, now_s):
            return
        more_urgent = urgency is Urgency.SHORT and guest.refused_urgency is not Urgency.SHORT
        if now_s < guest.refused_until_s and not more_urgent:
            return
        guest.refused_urgency = urgency
        swap_pages = guest.balloon_swap_pages if pressing.may_swap else 0
        guest.session.wish(guest.assigned_pages - target_pages, urgency, swap_pages)
        wanted_pages = self.ledger.view(guest.name).quota_pages - target_pages
        self.log.done(guest.name, "asked", wanted_pages, now_s, pressing.detail)

    def _tell_shortage(self) -> None:
        short = self.plan.shortage_pages > 0
        if short and not self._was_short:
            LOG.warning(
                "memory is short: %.0f MiB more are wanted than there are; "
                "shares and reservations decide",
                bytes_of(self.plan.shortage_pages) / MIB,
            )
        elif self._was_short and not short:
            LOG.info("memory is no longer short")
        self._was_short = short

    # Granting

    def grant_free(self) -> None:
        """Give free pages to those who are to get more: dry guests first, then the neediest.

        What clients have reserved comes before all of them.
        """
        self.clients.settle()
        takers = [
            guest
            for guest in self.guests.values()
            if guest.phase in (Phase.PENDING, Phase.RUNNING)
            and self._lack(guest) > 0
            and (guest.dry or not self.plan.block_growth)
        ]
        for guest in sorted(takers, key=lambda g: (not g.dry, -self._lack(g), g.name)):
            held = self.clients.meant_for(guest.name)
            there = held + max(self.ledger.free_pages, 0)
            pages = self._whole_frames(guest, min(self._lack(guest), there))
            if pages:
                self._grant(guest, pages, min(held, pages))
        self.clients.settle()

    def hand_over(self, guest: Guest, pages: int) -> int:
        """Give a guest that runs up to `pages` of what is held; returns how many it got.

        They must be there and kept for nobody else.
        """
        claimed = self.ledger.view(guest.name).claimed.page_count
        pages = self._whole_frames(guest, min(pages, claimed, self.ledger.held_pages))
        return self._grant(guest, pages, pages) if pages else 0

    def _grant(self, guest: Guest, pages: int, held_pages: int) -> int:
        return self._give(guest, partial(self.ledger.grant, guest.name, pages, held_pages))

    def lend(self, guest: Guest, pages: int) -> int:
        """Give a guest that ran dry up to `pages`, out of the host reserve if need be.

        Returns how many it got. Takes microseconds.
        """
        available = self.ledger.free_pages + self.ledger.reserve_left_pages
        wanted = self._whole_frames(guest, min(pages, available))
        return self._give(guest, partial(self.ledger.lend, guest.name, wanted)) if wanted else 0

    def _give(self, guest: Guest, take: Callable[[], PageFrames]) -> int:
        """Let the ledger give frames, raise the limit, tell the driver. Returns the pages given."""
        if guest.session is not None:
            guest.session.stop_making_room()
        lent_before = self.ledger.lent_pages
        frames = take()
        if not frames:
            return 0
        lent_pages = self.ledger.lent_pages - lent_before
        view = self.ledger.view(guest.name)
        if guest.quota is not None:
            try:
                guest.quota.raise_quota(
                    bytes_of(view.quota_pages), workload_bytes=bytes_of(view.workload_pages)
                )
            except QuotaError as error:
                self.ledger.take_back(guest.name, frames)
                self.clients.settle()  # what was held is free now
                LOG.error("%s: %s", guest.name, error)
                return 0
        if guest.session is not None:
            guest.session.give_back(frames)
        now_s = trio.current_time()
        self.moves.granted(guest.name, frames.page_count - lent_pages, now_s)
        self.moves.lent(guest.name, lent_pages, now_s)
        if frames.page_count > lent_pages:
            self.log.done(guest.name, "granted", frames.page_count - lent_pages, now_s)
        if lent_pages:
            self.log.done(guest.name, "lent", lent_pages, now_s)
        guest.tell_quota_changed()
        if self._lack(guest) <= 0:
            self._fulfil(guest)
        return frames.page_count

    def _lack(self, guest: Guest) -> int:
        if guest.target_pages is None:
            return 0
        return guest.target_pages - self.ledger.view(guest.name).quota_pages

    # What the sessions tell

    def credited(self, guest: Guest, pages: int, repaid_pages: int) -> None:
        """The guest gave `pages`, of which `repaid_pages` went back into the host reserve."""
        guest.stuck_times = 0
        guest.stalled_since_s = None
        self.moves.credited(guest.name, pages - self.overdraft.paid_pages())
        now_s = trio.current_time()
        self.moves.repaid(repaid_pages, now_s)
        self.log.done(guest.name, "claimed", pages, now_s)
        guest.tell_quota_changed()
        self.grant_free()

    def offered(self, guest: Guest, pages: int) -> None:
        """The guest can spare `pages` now; if that is less than wanted, it has said why."""
        self.log.done(guest.name, "offered", pages, trio.current_time(), guest.last_reason or "")

    def vitals_came(self, guest: Guest) -> None:
        """Plan if the guest needs markedly more or less than the last plan knew."""
        demand_pages = None if guest.vitals is None else pages_or_none(guest.vitals.demand_bytes)
        known = guest.planned_demand_pages
        if demand_pages is None:
            return
        if known is None or abs(demand_pages - known) >= DEMAND_STEP_PAGES:
            guest.planned_demand_pages = demand_pages
            self.replan()

    def inflation_ended(self, guest: Guest, claimed_pages: int) -> None:
        """An attempt is over; one that brought nothing is followed by a pause."""
        if claimed_pages:
            guest.refusals = 0
        else:
            pause_s = min(FIRST_REFUSAL_PAUSE_S * 2**guest.refusals, LONGEST_REFUSAL_PAUSE_S)
            guest.refused_until_s = trio.current_time() + pause_s
            guest.refusals = min(guest.refusals + 1, MOST_REFUSALS)
            self.log.done(guest.name, "refused", 0, trio.current_time(), guest.last_reason or "")
        self.replan()

    def left(self, guest: Guest) -> None:
        """The guest is gone from the kernel: strike it out of the books, and free its name.

        Does nothing for one that has left already, whoever has its name now.
        """
        if self.guests.get(guest.name) is not guest:
            return
        del self.guests[guest.name]
        if guest.name in self.ledger:
            reserve_before = self.ledger.reserve_left_pages
            pages = self.ledger.remove(guest.name)
            self.moves.credited(guest.name, pages - self.overdraft.paid_pages())
            repaid_pages = self.ledger.reserve_left_pages - reserve_before
            self.moves.repaid(repaid_pages, trio.current_time())
            self.clients.settle()  # a loan before the next plan must not find it free
        self.moves.forget(guest.name)
        self.log.forget(guest.name)
        self.replan()

    def _whole_frames(self, guest: Guest, pages: int) -> int:
        return pages - pages % guest.frame_pages
