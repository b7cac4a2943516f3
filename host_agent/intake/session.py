"""One connection of a guest driver, from its Hello to its end: frames come in, quota goes down.

The session turns what a guest says into changes of the ledger and of the kernel's limits, in the
one order that is safe:

    Target -> Offer -> make room (the workload's limit falls) -> Reserve -> Report -> verify
    -> Claim -> Dropped -> check -> the VM's limit falls -> the ledger is credited

It never decides who gets what: the agent does, through `wish` and `give_back`. Reports are
verified in order by one task in threads, while the guest goes on reserving: that overlap is where
the speed comes from.

A guest that breaks the protocol, or names frames that are not its own, raises out of `run`; the
caller closes the connection. Its quota stays what the ledger says.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol, TypeVar

import trio

from host_agent.audit.frames import AuditResult
from host_agent.blocking import DeadlinePassed, Threads, run_blocking
from host_agent.guest import Guest
from host_agent.intake.faults import LIES, GuestAtFault, GuestLied, GuestStuck
from host_agent.intake.pace import Pace
from host_agent.intake.room import Room
from host_agent.ledger.ledger import Ledger
from host_agent.quota.base import SETTLE_TIMEOUT_S
from host_agent.quota.errors import LimitRefused
from protocol.channel import Channel
from protocol.errors import ChannelBroken, LocalProtocolError
from protocol.messages import (
    Claim,
    Decline,
    Dropped,
    Goodbye,
    Hello,
    Message,
    Offer,
    Refusal,
    Rejection,
    Report,
    Reserve,
    Reserved,
    Reset,
    Return,
    Target,
    Vitals,
)
from protocol.page_frames import PageFrames
from protocol.transitions import SessionState
from protocol.units import MIB, bytes_of, pages_of
from protocol.vocabulary import RejectionReason, Urgency

T = TypeVar("T")

PROGRESS_DEADLINE_S: Final = 10.0
"""A guest that owes an answer, a report or a drop for so long is stuck."""

AUDIT_DEADLINE_S: Final = 10.0
"""Verifying 1 GiB takes 60 ms; a hundred times as long means that something is wrong."""

LOWER_AGAIN_S: Final = 0.002
"""The kernel's counters lag by 64 pages a CPU, and come right within milliseconds."""

MOST_VITALS: Final = 100
"""In a second: twenty times as many as are asked for. More would keep the host from its work."""

SMALLEST_ROOM_PAGES: Final = pages_of(1 * MIB)
"""Below this, halving an offer that found no room is not worth the attempts."""


class Auditor(Protocol):
    """What the session asks of the audit; see host_agent.audit.frames."""

    def verify(self, frames: PageFrames, frame_order: int) -> AuditResult:
        """Sort reported frames into good ones and rejected ones."""
        ...

    def gone(self, frames: PageFrames) -> PageFrames:
        """Those of `frames` that still have a physical page."""
        ...


class SessionOwner(Protocol):
    """What the session tells the agent. None of these may block."""

    def credited(self, guest: Guest, pages: int, repaid_pages: int) -> None:
        """The guest gave `pages`, of which `repaid_pages` went back into the host reserve."""
        ...

    def vitals_came(self, guest: Guest) -> None:
        """The guest's vitals are new."""
        ...

    def offered(self, guest: Guest, pages: int) -> None:
        """The guest has offered `pages`; its reason for less than wanted is its last one."""
        ...

    def inflation_ended(self, guest: Guest, claimed_pages: int) -> None:
        """An attempt to inflate is over, with `claimed_pages` (0 if refused)."""
        ...


class _Step(Enum):
    TARGETED = "waits for an offer"
    MAKING_ROOM = "the host makes room"
    RESERVING = "the guest reserves"


@dataclass(slots=True)
class _Inflation:
    """One attempt to inflate, from the target to the last claim."""

    target_id: int
    wanted_pages: int
    step: _Step
    deadline_s: float
    open_reports: int = 0
    claimed_pages: int = 0
    reserved: bool = False
    given_up: bool = False
    """The guest was given memory: no room is to be made any more."""


class GuestSession:
    """The running phase of one connection, after Hello and Welcome.

    Make one for each Hello. `run` ends when the guest resets (returns), says goodbye or vanishes
    (ChannelBroken), breaks the protocol (RemoteProtocolError), or is at fault (GuestAtFault).
    """

    def __init__(
        self,
        guest: Guest,
        hello: Hello,
        auditor: Auditor,
        ledger: Ledger,
        threads: Threads,
        owner: SessionOwner,
        scope: trio.CancelScope,
        *,
        may_swap: bool = False,
    ) -> None:
        """`may_swap`: guest and host agreed on the feature."""
        self._may_swap = may_swap
        self._scope = scope
        self._guest = guest
        self._frame_order = hello.frame_order
        self._auditor = auditor
        self._ledger = ledger
        self._threads = threads
        self._room = Room(guest, ledger, threads)
        self._owner = owner
        self._inflation: _Inflation | None = None
        self._next_target_id = 0
        self._outbox, self._outgoing = trio.open_memory_channel[Message](math.inf)
        self._jobs, self._work = trio.open_memory_channel[Report | Dropped](math.inf)
        self._nursery: trio.Nursery | None = None
        self._vitals_pace = Pace(MOST_VITALS, 1.0)

    # What the agent asks

    @property
    def inflating(self) -> bool:
        """Whether an attempt to inflate is under way."""
        return self._inflation is not None

    def wish(self, balloon_pages: int, urgency: Urgency, swap_pages: int = 0) -> None:
        """Ask the guest for a balloon of `balloon_pages`; ignored while it is inflating.

        It may swap out `swap_pages` for it, if it thinks fit and knows what that is.
        """
        wanted = balloon_pages - self._ledger.view(self._guest.name).claimed.page_count
        if self._inflation is not None or wanted < (1 << self._frame_order):
            return
        self._inflation = _Inflation(
            target_id=self._next_target_id,
            wanted_pages=wanted,
            step=_Step.TARGETED,
            deadline_s=trio.current_time() + PROGRESS_DEADLINE_S,
        )
        self._next_target_id += 1
        allowed_pages = swap_pages if self._may_swap else 0
        self._send(Target(self._inflation.target_id, balloon_pages, urgency, allowed_pages))

    def give_back(self, frames: PageFrames) -> None:
        """Tell the guest that its quota was raised and these frames are its own again."""
        self._send(Return(frames))

    def stop_making_room(self) -> None:
        """The guest is about to get more: an attempt that has no room yet is given up.

        The kernel side ends by itself: `make_room` gives up when the limit is raised.
        """
        inflation = self._inflation
        if inflation is None or inflation.step is _Step.RESERVING:
            return
        inflation.given_up = True
        if inflation.step is _Step.MAKING_ROOM:
            # The limit is raised here and not only by what the guest gets, which may be nothing.
            self.return_room()

    def supersede(self) -> None:
        """Another connection took this one's place: end it."""
        self._scope.cancel()

    # The conversation

    async def run(self, channel: Channel) -> None:
        """Converse until the end, as described above."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._write, channel)
            nursery.start_soon(self._audit)
            nursery.start_soon(self._watch_progress)
            while True:
                message = await channel.receive()
                if isinstance(message, Reset):
                    break
                self._take(message)
            nursery.cancel_scope.cancel()

    def _send(self, message: Message) -> None:
        self._outbox.send_nowait(message)

    async def _write(self, channel: Channel) -> None:
        async for message in self._outgoing:
            try:
                await channel.send(message)
            except LocalProtocolError:
                # The guest has begun anew while this waited for its turn: it is void.
                if channel.connection.session is SessionState.RUNNING:
                    raise

    def _take(self, message: Message) -> None:
        match message:
            case Vitals():
                if self._vitals_pace.is_too_fast(trio.current_time()):
                    raise GuestLied(f"it sends more than {MOST_VITALS} vitals a second")
                self._guest.vitals = message
                self._guest.vitals_s = trio.current_time()
                self._owner.vitals_came(self._guest)
            case Offer():
                self._take_offer(message)
            case Refusal():
                if self._is_current(message.target_id):
                    self._note(message.reason.value, message.detail)
                    self._end_inflation()
            case Report():
                if self._is_current(message.target_id) and self._inflation is not None:
                    self._inflation.open_reports += 1
                    self._progress()
                self._jobs.send_nowait(message)
            case Reserved():
                if self._is_current(message.target_id) and self._inflation is not None:
                    if message.reason is not None:
                        self._note(message.reason.value, message.detail)
                    self._inflation.reserved = True
                    self._progress()
                    self._end_if_settled()
            case Dropped():
                self._progress()
                self._jobs.send_nowait(message)
            case Goodbye():
                # At once: nothing more may be said, and more may be about to be.
                raise ChannelBroken(f"the driver said goodbye: {message.reason}")

    def _is_current(self, target_id: int) -> bool:
        return self._inflation is not None and self._inflation.target_id == target_id

    def _note(self, reason: str, detail: str) -> None:
        self._guest.last_reason = f"{reason}: {detail}" if detail else reason

    def _progress(self) -> None:
        if self._inflation is not None:
            self._inflation.deadline_s = trio.current_time() + PROGRESS_DEADLINE_S

    def _take_offer(self, offer: Offer) -> None:
        inflation = self._inflation
        if inflation is None or inflation.target_id != offer.target_id or self._nursery is None:
            return
        if offer.reason is not None:
            self._note(offer.reason.value, offer.detail)
        else:
            self._guest.last_reason = offer.detail or None
        self._owner.offered(self._guest, offer.pages)
        inflation.step = _Step.MAKING_ROOM
        inflation.deadline_s = math.inf  # the host's own deadline runs now
        pages = min(offer.pages, inflation.wanted_pages)
        swap_pages = max(0, offer.swap_pages - (offer.pages - pages))
        self._nursery.start_soon(self._make_room, inflation, pages, swap_pages)

    # Room

    async def _make_room(self, inflation: _Inflation, pages: int, swap_pages: int) -> None:
        """Shrink the workload by `pages`, or by half as often as that finds no room.

        `swap_pages` of them may be swapped out; what is not asked for any more is off these first.
        """
        frame_pages = 1 << self._frame_order
        offered_pages = pages
        pages -= pages % frame_pages
        least_pages = max(frame_pages, min(SMALLEST_ROOM_PAGES, inflation.wanted_pages))
        while pages >= least_pages and not inflation.given_up:
            may_swap_pages = max(0, swap_pages - (offered_pages - pages))
            if await self._try_room(inflation, pages, may_swap_pages):
                inflation.step = _Step.RESERVING
                self._progress()
                self._send(Reserve(inflation.target_id, pages, self._frame_order))
                return
            pages //= 2
            pages -= pages % frame_pages
        self._note("no_room", "the workload's limit could not be lowered")
        self._send(Decline(inflation.target_id, "the guest needs what it was asked for"))
        self._end_inflation()

    async def _try_room(self, inflation: _Inflation, pages: int, swap_pages: int) -> bool:
        await self._check_replaced()
        # Room that was given up while the write was under way has been undone by a raise.
        return await self._room.make(pages, swap_pages) and not inflation.given_up

    # Reports and drops, in order

    async def _audit(self) -> None:
        async for job in self._work:
            await self._check_replaced()
            if isinstance(job, Report):
                await self._verify(job)
            else:
                await self._credit(job)

    async def _verify(self, report: Report) -> None:
        found = self._ledger.report(self._guest.name, report.frames)
        rejected = [
            (found.out_of_range, RejectionReason.OUT_OF_RANGE),
            (found.already_taken, RejectionReason.ALREADY_CLAIMED),
            (found.without_room, RejectionReason.NO_ROOM),
        ]
        good = PageFrames.empty()
        if found.fresh:
            fresh = found.fresh
            result = await self._in_thread(
                lambda: self._auditor.verify(fresh, self._frame_order), "verifying frames"
            )
            good = result.good
            rejected += result.rejected
        rejected = [(frames, reason) for frames, reason in rejected if frames]
        if rejected:
            for frames, _ in rejected:
                self._ledger.drop_report(self._guest.name, frames & found.fresh)
            self._send(Rejection(report.report_id, tuple(rejected)))
            shown = ", ".join(f"{len(frames)} {reason.value}" for frames, reason in rejected)
            if LIES & {reason for _, reason in rejected}:
                raise GuestLied(f"it reported frames that it can't give: {shown}")
            self._note("rejected", shown)
        if good:
            self._send(Claim(report.report_id, good))
            self._progress()  # it owes the drop from now on, however long the look took
        elif self._inflation is not None:
            self._inflation.open_reports -= 1
            self._end_if_settled()

    async def _credit(self, dropped: Dropped) -> None:
        frames = dropped.frames
        kept = await self._in_thread(lambda: self._auditor.gone(frames), "checking dropped frames")
        if kept:
            raise GuestLied(f"it kept {len(kept)} frames that it said it had dropped")
        pages = frames.page_count
        await self._lower_quota(pages)
        repaid = self._ledger.claim(self._guest.name, frames)
        if self._inflation is not None:
            self._inflation.claimed_pages += pages
            self._inflation.open_reports -= 1
        self._owner.credited(self._guest, pages, repaid)
        self._end_if_settled()

    async def _lower_quota(self, pages: int) -> None:
        """Lower the VM's limit by `pages` that have left it; the caller credits them at once.

        On the event loop, so that no raise can come between the kernel and the books: nothing is
        reclaimed, since the pages are gone. Where the kernel's counters lag it is tried again,
        each time with what the books say then.
        """
        quota, name = self._guest.live_quota, self._guest.name
        deadline_s = trio.current_time() + SETTLE_TIMEOUT_S
        while True:
            await self._check_replaced()
            wanted_pages = self._ledger.view(name).quota_pages - pages
            try:
                return quota.lower_quota(bytes_of(wanted_pages), timeout_s=0.0)
            except LimitRefused as error:
                if trio.current_time() >= deadline_s:
                    raise GuestAtFault(f"its limit can't follow its balloon: {error}") from error
            await trio.sleep(LOWER_AGAIN_S)

    async def _in_thread(self, call: Callable[[], T], what: str) -> T:
        try:
            result = await run_blocking(
                call, timeout_s=AUDIT_DEADLINE_S, limiter=self._threads.audits
            )
        except DeadlinePassed as error:
            raise GuestStuck(f"{what}: {error}") from None
        await self._check_replaced()
        return result

    async def _check_replaced(self) -> None:
        """Stop here if this session is over.

        A newer connection may have taken its place, and settled with the books, in the very
        instant in which a task of this one was woken with something to do.
        """
        await trio.lowlevel.checkpoint_if_cancelled()

    # The end of an attempt

    def _end_if_settled(self) -> None:
        inflation = self._inflation
        if inflation is not None and inflation.reserved and inflation.open_reports == 0:
            self._end_inflation()

    def _end_inflation(self) -> None:
        inflation, self._inflation = self._inflation, None
        self.return_room()
        if inflation is not None:
            self._owner.inflation_ended(self._guest, inflation.claimed_pages)

    def return_room(self) -> None:
        """Give room that was made and not used back to the workload."""
        self._room.give_back()

    async def _watch_progress(self) -> None:
        while True:
            await trio.sleep(PROGRESS_DEADLINE_S / 20)
            inflation = self._inflation
            if inflation is not None and trio.current_time() > inflation.deadline_s:
                raise GuestStuck(
                    f"no progress in {PROGRESS_DEADLINE_S:g} s: {inflation.step.value}"
                )
