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

from host_agent.guest import Guest, Phase
from host_agent.ledger.ledger import Ledger
from host_agent.ledger.snapshot import HostSnapshot, Observation
from host_agent.moves import MoveBook
from host_agent.policy.plan import Plan
from host_agent.quota.errors import QuotaError
from protocol.page_frames import PageFrames
from protocol.units import MIB, bytes_of, pages_of
from protocol.vocabulary import Urgency

LOG = logging.getLogger("memballoon.balance")

Policy = Callable[[HostSnapshot], Plan]

PLAN_GAP_S: Final = 0.005
"""Plans are at least this far apart: a storm of events is answered by one plan, not by hundreds."""

DEMAND_STEP_PAGES: Final = pages_of(1 * MIB)
"""A demand that changed by less waits for the next interval."""

FIRST_REFUSAL_PAUSE_S: Final = 0.25
LONGEST_REFUSAL_PAUSE_S: Final = 4.0
"""A guest that refused is asked again after a pause that doubles: its state has to change first."""

MOST_REFUSALS: Final = 16
"""Counted no further: the pause is at its longest, and powers of two outgrow a float."""

URGENT_AFTER_S: Final = 0.25
"""A guest that has waited so long for what it is entitled to makes the matter urgent: then the
others give up page cache as well."""

DRY_MEMORY_S: Final = 1.0
"""A guest that ran dry is taken to need more than it has for so long, whatever it reports."""

DRY_NEED_PAGES: Final = pages_of(8 * MIB)
"""And so much more: about a first loan, and more than what a policy leaves alone as too little."""

UNCOOPERATIVE_AFTER: Final = 3
"""Stuck so many times in a row, a guest is planned around until it gives something."""

UNCOOPERATIVE_PAUSE_S: Final = 30.0
"""It is given another chance so often: else it could never give anything again."""


class Balancer:
    """Plans and moves the memory of one host. Implements the sessions' SessionOwner."""

    def __init__(self, ledger: Ledger, policy: Policy, interval_s: float) -> None:
        self.ledger = ledger
        self.policy = policy
        self.guests: dict[str, Guest] = {}
        self.moves = MoveBook()
        self.plan = Plan((), 0)
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
            self.plan_once()
            await trio.sleep(PLAN_GAP_S)

    def replan(self) -> None:
        """Something has changed: plan soon."""
        self._changed.set()

    # Planning

    def plan_once(self) -> None:
        """One round: look, decide, ask, grant."""
        now_s = trio.current_time()
        observed = {name: self._observe(guest, now_s) for name, guest in self.guests.items()}
        self.plan = self.policy(self.ledger.snapshot(observed))
        self.plans_total += 1
        self._tell_shortage()
        for target in self.plan.targets:
            self._note_target(self.guests[target.name], target.quota_pages, now_s)
        urgency = self._urgency(now_s)
        for target in self.plan.targets:
            self._ask(self.guests[target.name], target.quota_pages, urgency, now_s)
        self.grant_free()
        self.ledger.check()

    def _observe(self, guest: Guest, now_s: float) -> Observation:
        if guest.phase is Phase.PENDING:
            return Observation(demand_pages=pages_of(guest.spec.startup_bytes))
        vitals = guest.vitals
        demand_pages = None if vitals is None else _pages_or_none(vitals.demand_bytes)
        if _is_dry(guest, now_s):
            # Its statistics are older than its trouble: it needs more than it has.
            quota = self.ledger.view(guest.name).quota_pages
            demand_pages = max(demand_pages or 0, quota + DRY_NEED_PAGES)
        return Observation(
            demand_pages=demand_pages,
            working_set_pages=None if vitals is None else _pages_or_none(vitals.working_set_bytes),
            spare_pages=None if vitals is None else _pages_or_none(vitals.spare_bytes),
            movable=guest.phase is Phase.RUNNING
            and guest.session is not None
            and (
                guest.stuck_times < UNCOOPERATIVE_AFTER
                or now_s - guest.stuck_s > UNCOOPERATIVE_PAUSE_S
            ),
            pinned_pages=guest.pinned_pages,
        )

    def _note_target(self, guest: Guest, target_pages: int, now_s: float) -> None:
        quota_pages = self.ledger.view(guest.name).quota_pages
        guest.target_pages = target_pages
        if target_pages - quota_pages >= self._frame_pages(guest):
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

    def _urgency(self, now_s: float) -> Urgency:
        waits = any(
            guest.wanted_since_s is not None and now_s - guest.wanted_since_s > URGENT_AFTER_S
            for guest in self.guests.values()
        )
        dry = any(_is_dry(guest, now_s) for guest in self.guests.values())
        if self.plan.shortage_pages or self.ledger.lent_pages or waits or dry:
            return Urgency.SHORT
        return Urgency.CALM

    def _ask(self, guest: Guest, target_pages: int, urgency: Urgency, now_s: float) -> None:
        """Ask a guest that has more than its target for the difference."""
        if guest.session is None or guest.session.inflating:
            return
        if self.ledger.view(guest.name).quota_pages - target_pages < self._frame_pages(guest):
            return
        if _is_dry(guest, now_s):
            return
        more_urgent = urgency is Urgency.SHORT and guest.refused_urgency is not Urgency.SHORT
        if now_s < guest.refused_until_s and not more_urgent:
            return
        guest.refused_urgency = urgency
        guest.session.wish(guest.assigned_pages - target_pages, urgency)

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
        """Give free pages to those who are to get more: dry guests first, then the neediest."""
        takers = [
            guest
            for guest in self.guests.values()
            if guest.phase in (Phase.PENDING, Phase.RUNNING) and self._lack(guest) > 0
        ]
        for guest in sorted(takers, key=lambda g: (not g.dry, -self._lack(g), g.name)):
            pages = self._whole_frames(guest, min(self._lack(guest), self.ledger.free_pages))
            if pages:
                self._give(guest, partial(self.ledger.grant, guest.name, pages))

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
                LOG.error("%s: %s", guest.name, error)
                return 0
        if guest.session is not None:
            guest.session.give_back(frames)
        now_s = trio.current_time()
        self.moves.granted(guest.name, frames.page_count - lent_pages, now_s)
        self.moves.lent(guest.name, lent_pages, now_s)
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
        self.moves.credited(guest.name, pages)
        self.moves.repaid(repaid_pages, trio.current_time())
        guest.tell_quota_changed()
        self.grant_free()

    def vitals_came(self, guest: Guest) -> None:
        """Plan if the guest needs markedly more or less than the last plan knew."""
        demand_pages = None if guest.vitals is None else _pages_or_none(guest.vitals.demand_bytes)
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
            self.moves.credited(guest.name, pages)
            repaid_pages = self.ledger.reserve_left_pages - reserve_before
            self.moves.repaid(repaid_pages, trio.current_time())
        self.moves.forget(guest.name)
        self.replan()

    def _frame_pages(self, guest: Guest) -> int:
        return 1 << guest.spec.frame_order

    def _whole_frames(self, guest: Guest, pages: int) -> int:
        return pages - pages % self._frame_pages(guest)


def _pages_or_none(size_bytes: int | None) -> int | None:
    return None if size_bytes is None else pages_of(size_bytes)


def _is_dry(guest: Guest, now_s: float) -> bool:
    """It waits for memory, or did so just now."""
    return guest.dry or now_s - guest.dry_s < DRY_MEMORY_S
