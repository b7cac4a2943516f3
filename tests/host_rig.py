"""An agent's core without an agent: balancer, ledger, fake quotas, real hosting of connections.

A `Rig` is one host. A `ScriptedGuest` is the other end of a guest's channel, which does what its
`Manner` says. Physical pages are sets of frames in a `FakeFrames`, seen by an auditor made of them.
"""

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import pytest
import trio
import trio.testing

import host_agent.intake.reception
from host_agent.audit.frames import AuditResult
from host_agent.balance import Balancer
from host_agent.blocking import Threads
from host_agent.facade.port import VmSpec
from host_agent.guest import Guest, Phase, overhead_of
from host_agent.intake.reception import Reception, _Visit
from host_agent.ledger.columns import HostColumns
from host_agent.ledger.ledger import Ledger
from host_agent.ledger.snapshot import HostSnapshot, rows_of
from host_agent.policy.explain import Details, Explanation
from host_agent.policy.interface import Decision, Policy
from host_agent.policy.plan import Plan, QuotaTarget
from host_agent.policy.shares import Shares
from host_agent.quota.errors import NoRoom
from host_agent.quota.fake import FakeBackend, FakeVm, FakeVmQuota
from protocol.channel import Channel
from protocol.connection import Connection
from protocol.errors import ChannelBroken
from protocol.messages import (
    Claim,
    Dropped,
    Hello,
    Message,
    Offer,
    Report,
    Reserve,
    Reserved,
    Target,
    Vitals,
    Welcome,
)
from protocol.page_frames import PageFrames
from protocol.units import MIB, bytes_of, pages_of
from protocol.vocabulary import RejectionReason, Role

SETTLE_DEADLINE_S = 20.0
HANG_S = 30.0

M = TypeVar("M", bound=Message)


class FakeFrames:
    """Which frames of one guest have a physical page; also the host's auditor of them.

    `hold` keeps audits waiting until it is set again; `rejects` is found bad, once, for a reason.
    """

    def __init__(self, vm: FakeVm) -> None:
        self._vm = vm
        self.present = PageFrames.empty()
        self.rejects: list[tuple[PageFrames, RejectionReason]] = []
        self.error: Exception | None = None
        self.keep_going = threading.Event()
        self.keep_going.set()

    def populate(self, frames: PageFrames) -> None:
        self._vm.driver_bytes += bytes_of(len(frames - self.present))
        self.present |= frames

    def drop(self, frames: PageFrames) -> None:
        self._vm.driver_bytes -= bytes_of(len(frames & self.present))
        self.present -= frames

    def __enter__(self) -> "FakeFrames":
        return self

    def __exit__(self, *_exc: object) -> None:
        pass

    def verify(self, frames: PageFrames, frame_order: int) -> AuditResult:
        self._look()
        rejected = [(frames & bad, reason) for bad, reason in self.rejects]
        self.rejects.clear()
        good = frames & self.present
        rejected.append((frames - good, RejectionReason.NOT_PRESENT))
        for bad, _ in rejected[:-1]:
            good -= bad
        return AuditResult(good, tuple((bad, reason) for bad, reason in rejected if bad))

    def gone(self, frames: PageFrames) -> PageFrames:
        self._look()
        return frames & self.present

    def _look(self) -> None:
        assert self.keep_going.wait(SETTLE_DEADLINE_S)
        if self.error is not None:
            raise self.error


class Rig:
    """One host. Use it inside a running trio loop, by `open_rig`."""

    def __init__(self, pool_bytes: int, reserve_bytes: int, policy: Policy | None = None) -> None:
        self.quotas = FakeBackend()
        self.ledger = Ledger(pages_of(pool_bytes), pages_of(reserve_bytes))
        self.balancer = Balancer(self.ledger, policy or Shares(), interval_s=1.0)
        self.threads = Threads()
        self.reception = Reception(self.balancer, self.threads)
        self.frames: dict[str, FakeFrames] = {}
        self.ends: dict[str, list[BaseException]] = {}
        """Why each guest's connections have ended, oldest first."""

    def add(
        self,
        name: str,
        assigned_bytes: int,
        *,
        quota_bytes: int | None = None,
        reservation_bytes: int = 0,
        shares: int = 1000,
        frames: str = "4KiB",
        swap_bytes: int = 0,
        balloon_may_swap: bool = False,
    ) -> Guest:
        """A guest that runs, with its cgroups and without a driver yet."""
        spec = VmSpec.model_validate(
            {
                "name": name,
                "assigned_bytes": assigned_bytes,
                "reservation_bytes": reservation_bytes,
                "shares": shares,
                "frames": frames,
                "swap_bytes": swap_bytes,
                "balloon_may_swap": balloon_may_swap,
            }
        )
        quota_bytes = assigned_bytes if quota_bytes is None else quota_bytes
        self.ledger.admit(name, pages_of(assigned_bytes), pages_of(reservation_bytes), shares)
        self.ledger.grant(name, pages_of(quota_bytes))
        guest = self.balancer.guests[name] = Guest(spec, phase=Phase.RUNNING)
        overhead_bytes = overhead_of(assigned_bytes)
        guest.quota = self.quotas.create(name, quota_bytes, overhead_bytes, swap_bytes)
        # No slack: a limit that falls before the frames are dropped is refused.
        self.vm(name).driver_bytes = overhead_bytes
        self.frames[name] = FakeFrames(self.vm(name))
        self.ends[name] = []
        return guest

    def remove(self, guest: Guest) -> None:
        """Take the guest down, once its connections have ended."""
        quota = guest.live_quota
        quota.kill_all()
        quota.remove()
        self.balancer.left(guest)

    def vm(self, name: str) -> FakeVm:
        return self.quotas.vms[name]

    def quota(self, guest: Guest) -> FakeVmQuota:
        quota = guest.live_quota
        assert isinstance(quota, FakeVmQuota)
        return quota

    async def serve(self, guest: Guest, stream: trio.abc.Stream) -> None:
        """One connection, as the reception serves it, but for who it is; its end is noted."""
        async with Channel(stream, Connection(Role.HOST)) as channel:
            visit = _Visit(guest, channel)
            try:
                while True:
                    await self.reception._converse(visit)
            except* Exception as errors:
                self.ends[guest.name].append(first_leaf(errors))
        if visit.session is not None:
            await self.reception._return_room_later(guest, visit.session)

    async def settle(self) -> None:
        """Until nobody has anything to do before time goes on."""
        with trio.fail_after(SETTLE_DEADLINE_S):
            quiet = 0
            while quiet < 2:
                await trio.testing.wait_all_tasks_blocked()
                busy = (
                    self.threads.audits.borrowed_tokens + self.threads.limit_writes.borrowed_tokens
                )
                quiet = 0 if busy else quiet + 1

    async def connect(self, nursery: trio.Nursery, guest: Guest) -> "Line":
        """A driver's greeted connection, in the hands of the test."""
        line = self.dial(nursery, guest)
        await line.greet(guest.assigned_pages, guest.spec.frame_order)
        return line

    def dial(self, nursery: trio.Nursery, guest: Guest) -> "Line":
        """A connection on which nobody has said anything yet."""
        ours, theirs = trio.testing.memory_stream_pair()
        nursery.start_soon(self.serve, guest, ours)
        claimed = self.ledger.view(guest.name).claimed
        channel = Channel(theirs, Connection(Role.GUEST))
        return Line(channel, self.frames[guest.name], claimed)

    def check_bounds(self) -> None:
        """What holds at every instant, as the kernel tells it."""
        self.ledger.check()
        quotas_bytes = 0
        for name, vm in self.quotas.vms.items():
            overhead_bytes = overhead_of(self.balancer.guests[name].spec.assigned_bytes)
            quotas_bytes += vm.vm_limit_bytes - overhead_bytes
            assert vm.workload_limit_bytes <= vm.vm_limit_bytes - overhead_bytes, name
            assert vm.workload_limit_bytes + vm.driver_bytes <= vm.vm_limit_bytes, name
        kept_bytes = bytes_of(self.ledger.reserve_left_pages + self.ledger.held_pages)
        assert quotas_bytes + kept_bytes <= bytes_of(self.ledger.pool_pages)

    def check_agreement(self) -> None:
        """Besides, where nothing is under way: kernel and books say the same of every guest."""
        self.check_bounds()
        for name, guest in self.balancer.guests.items():
            if guest.quota is None:
                continue
            view, vm = self.ledger.view(name), self.vm(name)
            assert vm.vm_limit_bytes == bytes_of(view.quota_pages) + guest.overhead_bytes, name
            assert vm.workload_limit_bytes == bytes_of(view.workload_pages), name
            present = self.frames[name].present
            assert not present & view.claimed, f"{name}: frames with two owners"


Body = Callable[[Rig, trio.Nursery], Awaitable[None]]
Run = Callable[[Body], None]
"""The fixture `run`: plays a body on a host."""


@asynccontextmanager
async def open_rig(
    monkeypatch: pytest.MonkeyPatch,
    *,
    pool_bytes: int = 256 * MIB,
    reserve_bytes: int = 16 * MIB,
) -> AsyncIterator[tuple[Rig, trio.Nursery]]:
    """A host, and a nursery for its connections; everything ends with the block."""
    rig = Rig(pool_bytes, reserve_bytes)

    def auditor_of(guest: Guest, _hello: Hello) -> FakeFrames:
        return rig.frames[guest.name]

    # The one part that can't be real: it looks at real pages.
    monkeypatch.setattr(host_agent.intake.reception, "open_auditor", auditor_of)
    ended = False
    async with trio.open_nursery() as nursery:
        # Also where the clock is a mock: nobody waits for ever for a message that does not come.
        token = trio.lowlevel.current_trio_token()
        alarm = threading.Timer(HANG_S, token.run_sync_soon, [nursery.cancel_scope.cancel])
        alarm.start()
        try:
            yield rig, nursery
        finally:
            alarm.cancel()
        nursery.cancel_scope.cancel()
        ended = True
    assert ended, f"somebody still waits after {HANG_S:g} s"


class SlowRoom:
    """A guest's `make_room` that waits until it may go on, and to which a raise comes first.

    `looks_late`: the thread is held up before it looks at the limit, so a raise is no news to it.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, quota: FakeVmQuota, *, looks_late: bool = False
    ) -> None:
        self._quota = quota
        self._raises = 0
        self._looks_late = looks_late
        self.calls = 0
        self.go = threading.Event()
        self._make_room = quota.make_room
        self._raise_quota, self._raise_workload = quota.raise_quota, quota.raise_workload
        monkeypatch.setattr(quota, "make_room", self.make_room)
        monkeypatch.setattr(quota, "raise_quota", self.raise_quota)
        monkeypatch.setattr(quota, "raise_workload", self.raise_workload)

    def make_room(self, limit_bytes: int, timeout_s: float = 10.0, swap_bytes: int = 0) -> None:
        raises = self._raises
        self.calls += 1
        assert self.go.wait(SETTLE_DEADLINE_S)
        if self._raises != raises and not self._looks_late:
            raise NoRoom("the guest was given memory while room was made in it")
        self._make_room(limit_bytes, swap_bytes=swap_bytes)

    def raise_quota(self, quota_bytes: int, workload_bytes: int | None = None) -> None:
        self._raises += 1
        self._raise_quota(quota_bytes, workload_bytes)

    def raise_workload(self, limit_bytes: int) -> None:
        self._raises += 1
        self._raise_workload(limit_bytes)


class PolicyOf:
    """A policy out of a function from rows to a plan."""

    name: ClassVar[str] = "made-up"
    source: ClassVar[str] = "a test"

    def __init__(self, plan: Callable[[HostSnapshot], Plan]) -> None:
        self.settings = None
        self._plan = plan

    def decide(self, host: HostColumns, memory: object, now_s: float) -> Decision:
        return Decision(self._plan(rows_of(host)), None, Explanation(host.names, Details))


def plan_of(quotas_pages: Mapping[str, int], shortage_pages: int = 0) -> Policy:
    """A policy that wants these quotas, whatever it sees; others stay as they are."""

    def plan(snapshot: HostSnapshot) -> Plan:
        wanted = {g.name: quotas_pages.get(g.name, g.quota_pages) for g in snapshot.guests}
        return Plan.of((QuotaTarget(n, p, p) for n, p in wanted.items()), shortage_pages)

    return PolicyOf(plan)


def first_leaf(error: BaseException) -> BaseException:
    """The first error inside a group of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def hello_of(
    assigned_pages: int,
    claimed: PageFrames,
    frame_order: int = 0,
    features: tuple[str, ...] = (),
) -> Hello:
    """A greeting of a guest that holds `claimed`."""
    return Hello(
        version_min=1,
        version_max=1,
        features=features,
        software="a scripted guest",
        pseudo_process_pid=7,
        arena_address=1 << 32,
        arena_pages=assigned_pages,
        frame_order=frame_order,
        claimed=claimed,
    )


def vitals_of(demand_bytes: int, spare_bytes: int | None = None) -> Vitals:
    """Statistics that say only what a guest needs."""
    return Vitals(clock_s=1.0, demand_bytes=demand_bytes, spare_bytes=spare_bytes)


@dataclass
class Line:
    """The guest's end of a channel, in the hands of a test."""

    channel: Channel
    frames: FakeFrames
    claimed: PageFrames = field(default_factory=PageFrames.empty)
    welcome: bool = False

    async def greet(
        self, assigned_pages: int, frame_order: int = 0, features: tuple[str, ...] = ()
    ) -> Welcome:
        await self.say(hello_of(assigned_pages, self.claimed, frame_order, features))
        welcome = await self.hear(Welcome)
        self.claimed = welcome.claimed
        self.welcome = True
        return welcome

    async def say(self, *messages: Message) -> None:
        await self.channel.send(*messages)

    async def hear(self, kind: type[M]) -> M:
        message = await self.channel.receive()
        assert isinstance(message, kind), message
        return message

    async def give(self, target: Target, pages: int) -> None:
        """The guest gives `pages` for a target that it was told."""
        await self.say(Offer(target.target_id, pages))
        order = await self.hear(Reserve)
        own = PageFrames.span(0, 1 << 20)
        frames = (own - self.claimed).lowest(order.pages)
        self.frames.populate(frames)
        await self.say(Report(order.target_id, order.target_id, frames))
        await self.say(Reserved(order.target_id, order.pages))
        claim = await self.hear(Claim)
        self.frames.drop(claim.frames)
        self.claimed |= claim.frames
        await self.say(Dropped(claim.report_id, claim.frames))

    async def is_silent(self) -> bool:
        """Whether the host has nothing to say until everybody is blocked."""
        message: Message | None = None
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def give_up() -> None:
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    scope.cancel()

                nursery.start_soon(give_up)
                message = await self.channel.receive()
                nursery.cancel_scope.cancel()
        return message is None

    async def hang_up(self) -> None:
        """Vanish; what was reserved is released, as by a dying pseudo-process."""
        await self.channel.aclose()
        self.frames.drop(self.frames.present)

    async def hear_end(self) -> str:
        """Until the host hangs up; why."""
        try:
            while True:
                await self.channel.receive()
        except ChannelBroken as broken:
            return str(broken)
