"""One host under any order of events: guests of every manner, failing limit writes, time.

The balancer, the sessions, the ledger, the policy and the answers to dry guests are real; quotas
are the fake kernel's. Whatever happens, and
whatever the policy answers: the kernel's limits and the reserve fit the pool, the books
are sound, no frame has two owners, and when nothing is under way kernel and books agree. An honest
guest is never taken for a liar, and once all are well again memory moves as planned.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count

import pytest
import trio
import trio.testing
from host_rig import Line, Rig, hello_of, open_rig, vitals_of
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from made_up_policies import MadeUp, decision

from host_agent.audit.errors import ProcessGone
from host_agent.dry import DryAnswer
from host_agent.guest import Guest
from host_agent.intake.faults import GuestAtFault, GuestLied
from host_agent.intake.listener import HelloRefused
from host_agent.intake.session import PROGRESS_DEADLINE_S
from host_agent.policy.plan import Plan
from host_agent.policy.shares import Shares
from host_agent.quota.errors import LimitRefused, NoRoom, QuotaError
from host_agent.quota.fake import FakeVm
from protocol.errors import ChannelBroken, LocalProtocolError
from protocol.messages import (
    Claim,
    Dropped,
    Goodbye,
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
    Welcome,
)
from protocol.page_frames import PageFrames
from protocol.units import MIB, bytes_of, pages_of
from protocol.vocabulary import RefusalReason, RejectionReason

NAMES = ("a", "b", "c")
POOL_BYTES, RESERVE_BYTES = 160 * MIB, 16 * MIB
ASSIGNED_BYTES = 96 * MIB
RESERVATION_BYTES = 8 * MIB
PIECE_PAGES = pages_of(8 * MIB)


class Manner(StrEnum):
    """How a guest answers."""

    HONEST = "honest"
    REFUSING = "refusing"
    SHORT = "reserves half of what it offered"
    KEEPING = "says that it dropped what it kept"
    DOUBLE = "reports frames that are claimed"
    OUTSIDE = "reports frames that it has not got"


@dataclass
class Actor:
    """One guest's driver: answers in its manner, when it is not held up."""

    rig: Rig
    guest: Guest
    nursery: trio.Nursery
    manner: Manner = Manner.HONEST
    has_lied: bool = False
    line: Line | None = None
    awake: trio.Event = field(default_factory=trio.Event)
    report_ids: "count[int]" = field(default_factory=count)

    def __post_init__(self) -> None:
        self.awake.set()

    @property
    def frames(self) -> PageFrames:
        """Those that have a physical page."""
        return self.rig.frames[self.guest.name].present

    async def connect(self) -> None:
        """On a new connection; an older one is let go without a word."""
        self.leave()
        line = self.line = self.rig.dial(self.nursery, self.guest)
        self.nursery.start_soon(self._live, line)

    def leave(self) -> None:
        """Vanish, as a dying pseudo-process does: its frames are gone with it."""
        if self.line is not None:
            self.nursery.start_soon(self.line.channel.aclose)
            self.line = None
        self._release()

    async def begin_anew(self) -> None:
        """Reset and greet again on the same connection."""
        if self.line is not None and self.line.welcome:
            await self.say(Reset("lost the thread"))
            self._release()
            self.report_ids = count()
            self.line.welcome = False
            with suppress(ChannelBroken):
                await self.line.say(hello_of(self.guest.assigned_pages, self.line.claimed))

    def _release(self) -> None:
        self.rig.frames[self.guest.name].drop(self.frames)

    async def say(self, *messages: Message) -> None:
        """On the connection that there is, if there is one that listens."""
        if self.line is not None and self.line.welcome:
            try:
                await self.line.say(*messages)
            except ChannelBroken:
                return

    async def _live(self, line: Line) -> None:
        try:
            await line.greet(self.guest.assigned_pages)
            while True:
                message = await line.channel.receive()
                await self.awake.wait()
                if self.line is not line:
                    return
                if line.welcome or isinstance(message, Welcome):
                    await self._answer(line, message)
        except ChannelBroken:
            if self.line is line:
                self.line = None
                self._release()

    async def _answer(self, line: Line, message: Message) -> None:
        """Answer; an answer that a reset comes between is given up."""
        try:
            await self._answer_in_manner(line, message)
        except LocalProtocolError:
            if line.welcome:
                raise
            self._release()

    async def _answer_in_manner(self, line: Line, message: Message) -> None:
        match message:
            case Target():
                missing = message.balloon_pages - len(line.claimed)
                if self.manner is Manner.REFUSING or missing <= 0:
                    await line.say(Refusal(message.target_id, RefusalReason.WORKING_SET))
                else:
                    await line.say(Offer(message.target_id, missing))
            case Reserve():
                await self._reserve(line, message)
            case Claim():
                if self.manner is Manner.KEEPING:
                    self.has_lied = True
                else:
                    line.frames.drop(message.frames)
                line.claimed |= message.frames
                await line.say(Dropped(message.report_id, message.frames))
            case Rejection():
                line.frames.drop(message.frames)
            case Welcome():
                line.claimed, line.welcome = message.claimed, True
            case Return():
                line.claimed -= message.frames

    async def _reserve(self, line: Line, order: Reserve) -> None:
        own = PageFrames.span(0, self.guest.assigned_pages)
        pages = order.pages // 2 if self.manner is Manner.SHORT else order.pages
        frames = (own - line.claimed - line.frames.present).lowest(pages)
        said = 0
        for piece in frames.chunks(PIECE_PAGES):
            line.frames.populate(piece)
            told = piece
            if self.manner is Manner.OUTSIDE:
                told = PageFrames.span(self.guest.assigned_pages, 1)
            elif self.manner is Manner.DOUBLE and line.claimed:
                told = line.claimed.lowest(1)
            self.has_lied |= told != piece
            await line.say(Report(order.target_id, next(self.report_ids), told))
            said += len(told)
        reason = None if said == order.pages else RefusalReason.NO_MEMORY
        await line.say(Reserved(order.target_id, said, reason))


class Host:
    """The host under test, with its actors; one method for each thing that can happen."""

    def __init__(
        self,
        rig: Rig,
        nursery: trio.Nursery,
        clock: trio.testing.MockClock,
        manners: tuple[Manner, ...],
    ) -> None:
        self.rig = rig
        self.nursery = nursery
        self.clock = clock
        self.actors: dict[str, Actor] = {}
        self.manners = dict(zip(NAMES, manners, strict=True))

    async def launch(self, name: str) -> None:
        if name in self.actors:
            return
        ledger = self.rig.ledger
        free_bytes = bytes_of(ledger.free_pages)
        guest = self.rig.add(
            name,
            ASSIGNED_BYTES,
            quota_bytes=min(ASSIGNED_BYTES, free_bytes),
            reservation_bytes=RESERVATION_BYTES,
        )
        actor = self.actors[name] = Actor(self.rig, guest, self.nursery, self.manners[name])
        self.nursery.start_soon(self._answer_dry, guest)
        await actor.connect()

    async def _answer_dry(self, guest: Guest) -> None:
        with guest.scope:
            await DryAnswer(guest, self.rig.balancer, patience_s=10.0).run()
        guest.ended.set()

    async def remove(self, name: str) -> None:
        actor = self.actors.pop(name, None)
        if actor is None:
            return
        self._judge(actor)
        actor.leave()
        actor.guest.scope.cancel()
        await actor.guest.ended.wait()
        await self.settle()
        self.rig.remove(actor.guest)

    def _judge(self, actor: Actor) -> None:
        """Why its connections have ended: nothing is this agent's fault, no honest guest lied."""
        for end in self.rig.ends[actor.guest.name]:
            # HelloRefused: the clock jumped while it was about to greet anew.
            known = ChannelBroken | GuestAtFault | HelloRefused | ProcessGone
            assert isinstance(end, known), repr(end)
            event(type(end).__name__)
            if isinstance(end, GuestLied):
                assert actor.has_lied, str(end)

    async def settle(self) -> None:
        await self.rig.settle()
        self.rig.check_agreement()

    async def want(self, name: str) -> None:
        """The guest asks for much, the others for little."""
        for actor in self.actors.values():
            wants_all = actor.guest.name == name
            await actor.say(vitals_of(ASSIGNED_BYTES if wants_all else RESERVATION_BYTES))
        await self.rig.settle()
        self.rig.balancer.plan_once()

    async def recover(self) -> None:
        """All are well and the policy is the default one; what was under way ends or is ended."""
        self.rig.balancer.use(Shares())
        for actor in self.actors.values():
            actor.manner = Manner.HONEST
            actor.awake.set()
            self.rig.quota(actor.guest).failures.clear()
            self.rig.frames[actor.guest.name].rejects.clear()
            vm = self.rig.vm(actor.guest.name)
            vm.wanted_bytes = 0
            vm.anon_bytes = min(vm.anon_bytes, RESERVATION_BYTES)
        for _ in range(3):
            await self.settle()
            self.clock.jump(1.0)
        self.clock.jump(PROGRESS_DEADLINE_S + 1.0)
        for _ in range(3):
            await self.settle()
            self.clock.jump(1.0)
        await self.settle()
        for actor in self.actors.values():
            self._judge(actor)
            actor.guest.stuck_times = 0
            await actor.connect()
        await self.settle()

    async def check_it_works(self) -> None:
        """Memory goes where it is wanted: the first guest asks for much, the others for little."""
        await self.recover()
        names = sorted(self.actors)
        for _ in range(30):
            await self.want(names[0] if names else "")
            await self.settle()
            self.clock.jump(0.3)
        await self.settle()
        for name in names:
            guest, view = self.actors[name].guest, self.rig.ledger.view(name)
            assert guest.session is not None
            assert not guest.session.inflating
            assert view.room_pages == 0
            assert not view.pending
            assert guest.target_pages is not None
            assert abs(view.quota_pages - guest.target_pages) <= pages_of(1 * MIB), name
        assert not names or self.rig.ledger.lent_pages == 0


Op = tuple[str, str, int, str]

FAILURES: dict[str, Callable[[], Exception]] = {
    "raise_quota": lambda: QuotaError("it failed on purpose"),
    "raise_workload": lambda: QuotaError("it failed on purpose"),
    "make_room": lambda: NoRoom("it failed on purpose"),
    "lower_quota": lambda: LimitRefused("it failed on purpose"),
}

BAD_POLICIES: dict[str, MadeUp] = {
    "raises": MadeUp(lambda *_: 1 // 0),
    "nothing": MadeUp(lambda *_: None),
    "all": MadeUp(lambda host, *_: decision(host, Plan(host.names, host.assigned_pages))),
    "none": MadeUp(lambda host, *_: decision(host, Plan(host.names, host.quota_pages * 0))),
}
"""They give no plan, or one that can't be carried out: by size, or by reservation."""

KINDS = {
    "launch": [""],
    "remove": [""],
    "connect": [""],
    "vanish": [""],
    "goodbye": [""],
    "reset": [""],
    "manner": [manner.value for manner in Manner],
    "sleep": [""],
    "wake": [""],
    "demand": [""],
    "allocate": [""],
    "cache": [""],
    "free": [""],
    "lend": [""],
    "fail": sorted(FAILURES),
    "time": [""],
    "plan": [""],
    "want": [""],
    "spoil": [""],
    "policy": ["shares", *sorted(BAD_POLICIES)],
}
OFTEN = ["want", "want", "want", "plan", "manner", "time", "sleep", "wake"]


async def happen(host: Host, op: Op) -> None:
    """One thing happens."""
    kind, name, amount_mib, what = op
    size_bytes = amount_mib * MIB
    actor = host.actors.get(name)
    match kind:
        case "launch":
            await host.launch(name)
        case "remove":
            await host.remove(name)
        case "want":
            await host.want(name)
        case "plan":
            host.rig.balancer.plan_once()
        case "time":
            host.clock.jump(amount_mib / 8)
        case "policy":
            host.rig.balancer.use(BAD_POLICIES.get(what, Shares()))
        case _ if actor is not None:
            await happen_to(host, actor, kind, size_bytes, what)


async def happen_to(host: Host, actor: Actor, kind: str, size_bytes: int, what: str) -> None:
    """One thing happens to a guest that is there."""
    match kind:
        case "connect":
            await actor.connect()
        case "vanish":
            actor.leave()
        case "goodbye":
            await actor.say(Goodbye("enough"))
            actor.leave()
        case "reset":
            await actor.begin_anew()
        case "manner":
            actor.manner = Manner(what)
        case "sleep":
            actor.awake = trio.Event()
        case "wake":
            actor.awake.set()
        case "demand":
            await actor.say(vitals_of(size_bytes))
        case "lend":
            host.rig.balancer.lend(actor.guest, pages_of(size_bytes))
        case "spoil":
            bad = PageFrames.span(0, pages_of(size_bytes))
            host.rig.frames[actor.guest.name].rejects = [(bad, RejectionReason.NOT_LOCKED)]
        case "fail":
            host.rig.quota(actor.guest).failures[what] = FAILURES[what]()
        case _:
            use_memory(host.rig.vm(actor.guest.name), kind, size_bytes)


def use_memory(vm: FakeVm, kind: str, size_bytes: int) -> None:
    """What a workload does."""
    match kind:
        case "allocate":
            vm.allocate(size_bytes)
        case "cache":
            vm.fill_cache(size_bytes)
        case "free":
            vm.anon_bytes -= min(vm.anon_bytes, size_bytes)
            vm.settle()


ops = st.sampled_from([*sorted(KINDS), *OFTEN]).flatmap(
    lambda kind: st.tuples(
        st.just(kind),
        st.sampled_from(NAMES),
        st.integers(1, 100),
        st.sampled_from(KINDS[kind]),
        st.sampled_from(["settle", "step", "at once"]),
    )
)


manners = st.sampled_from([*Manner, Manner.HONEST, Manner.HONEST])


@given(manners=st.tuples(manners, manners, manners), program=st.lists(ops, min_size=5, max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_order_of_events(
    monkeypatch: pytest.MonkeyPatch,
    manners: tuple[Manner, ...],
    program: list[tuple[str, str, int, str, str]],
) -> None:
    clock = trio.testing.MockClock()

    async def main() -> None:
        async with open_rig(monkeypatch, pool_bytes=POOL_BYTES, reserve_bytes=RESERVE_BYTES) as (
            rig,
            nursery,
        ):
            host = Host(rig, nursery, clock, manners)
            await host.launch("a")
            await host.launch("b")
            await host.settle()
            for kind, name, amount, what, pause in program:
                await happen(host, (kind, name, amount, what))
                rig.check_bounds()
                if pause == "settle":
                    await host.settle()
                elif pause == "step":
                    await trio.testing.wait_all_tasks_blocked()
                    rig.check_bounds()
            await host.check_it_works()

    trio.run(main, clock=clock)
