"""Clients' memory on a host: nobody else gets it, others are ballooned for it, and it adds up."""

import pytest
import trio
import trio.testing
from host_rig import Rig, Run, plan_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import host_agent.client_desk
from host_agent.client_desk import ClientDesk
from host_agent.client_memory import ClientMemory
from host_agent.errors import NoSuchReservation, NotEnoughMemory
from host_agent.facade.port import ClientRequest, VmSpec
from host_agent.facade.views import ReservationView
from host_agent.guest import Guest, Phase
from host_agent.ledger.client_reservations import ClientReservations
from host_agent.ledger.ledger import Ledger
from host_agent.policy.squeezed import Squeezed
from protocol.messages import Refusal, Target
from protocol.page_frames import PageFrames
from protocol.units import MIB, pages_of
from protocol.vocabulary import RefusalReason

# The rig's host: 256 MiB, 16 MiB of which are its reserve.


async def saved() -> None:
    await trio.lowlevel.checkpoint()


def desk_of(rig: Rig) -> ClientDesk:
    return ClientDesk(rig.balancer, saved)


def wanted(mib: int) -> ClientRequest:
    return ClientRequest(client="xapi", size_bytes=mib * MIB)


def pending(rig: Rig, name: str, mib: int) -> Guest:
    spec = VmSpec(name=name, assigned_bytes=mib * MIB, reservation_bytes=8 * MIB)
    rig.ledger.admit(name, pages_of(mib * MIB), pages_of(8 * MIB), 1000)
    guest = rig.balancer.guests[name] = Guest(spec)
    assert guest.phase is Phase.PENDING
    return guest


def test_what_is_reserved_is_nobody_elses(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        rig.add("one", 200 * MIB, quota_bytes=100 * MIB)
        reserved = await desk_of(rig).reserve(wanted(80))
        assert (reserved.missing_bytes, rig.ledger.held_pages) == (0, pages_of(80 * MIB))
        rig.balancer.policy = plan_of({"one": pages_of(150 * MIB)})
        rig.balancer.plan_once()
        assert rig.ledger.view("one").quota_pages == pages_of(150 * MIB)
        rig.balancer.policy = plan_of({"one": pages_of(200 * MIB)})
        rig.balancer.plan_once()
        assert rig.ledger.view("one").quota_pages <= pages_of(160 * MIB)
        # Nor does it go to one that runs dry: only what is free, and the reserve.
        rig.balancer.lend(rig.balancer.guests["one"], pages_of(100 * MIB))
        assert rig.ledger.view("one").quota_pages == pages_of(176 * MIB)
        assert rig.ledger.held_pages == pages_of(80 * MIB)
        rig.check_agreement()

    run(body)


def test_others_are_ballooned_for_it(run: Run, clock: trio.testing.MockClock) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        giver = rig.add("giver", 240 * MIB, reservation_bytes=40 * MIB)
        line = await rig.connect(nursery, giver)
        rig.balancer.policy = Squeezed()
        nursery.start_soon(rig.balancer.run)
        views: list[ReservationView] = []

        async def reserve() -> None:
            views.append(await desk_of(rig).reserve(wanted(64)))

        nursery.start_soon(reserve)
        target = await line.hear(Target)
        # 64 MiB, and twice the inaccuracy of a frame.
        assert target.balloon_pages == pages_of(64 * MIB) + 2
        await line.give(target, target.balloon_pages)
        clock.autojump_threshold = 0.05
        with trio.fail_after(30):
            while not views:
                await trio.sleep(0.05)
        assert rig.ledger.held_pages == pages_of(64 * MIB)
        assert rig.ledger.view("giver").quota_pages == pages_of(176 * MIB) - 2
        rig.check_agreement()
        await desk_of(rig).release(views[0].id)
        assert rig.ledger.held_pages == 0

    run(body)


def test_what_cannot_be_had_is_refused_and_not_kept(
    run: Run, clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_agent.client_desk, "PATIENCE_S", 1.0)

    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        giver = rig.add("giver", 200 * MIB)
        line = await rig.connect(nursery, giver)
        rig.balancer.policy = Squeezed()
        nursery.start_soon(rig.balancer.run)

        async def refuse() -> None:
            while True:
                target = await line.hear(Target)
                await line.say(Refusal(target.target_id, RefusalReason.PRESSURE, "no"))

        nursery.start_soon(refuse)
        clock.autojump_threshold = 0.05
        with pytest.raises(NotEnoughMemory) as refused:
            await desk_of(rig).reserve(wanted(64))
        assert refused.value.missing_bytes == 24 * MIB  # 40 are free
        assert refused.value.refused_by == ("giver",)
        assert rig.balancer.clients.reservations == ClientReservations()
        assert rig.ledger.held_pages == 0
        with pytest.raises(NotEnoughMemory, match="can't be reserved"):
            await desk_of(rig).reserve(wanted(241))

    run(body)


def test_whoever_goes_away_while_it_waits_has_reserved_nothing(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        rig.add("giver", 240 * MIB)
        async with trio.open_nursery() as waiting:
            waiting.start_soon(desk_of(rig).reserve, wanted(64))
            await trio.testing.wait_all_tasks_blocked()
            assert rig.balancer.clients.kept_pages == pages_of(64 * MIB)
            waiting.cancel_scope.cancel()
        assert rig.balancer.clients.kept_pages == 0

    run(body)


def test_a_reservation_that_is_purged_while_it_waits_is_told_so(
    run: Run, clock: trio.testing.MockClock
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        rig.add("giver", 240 * MIB)

        async def reserve() -> None:
            with pytest.raises(NoSuchReservation):
                await desk_of(rig).reserve(wanted(64))

        async with trio.open_nursery() as waiting:
            waiting.start_soon(reserve)
            await trio.testing.wait_all_tasks_blocked()
            (purged,) = await desk_of(rig).login("xapi")
            assert purged.missing_bytes == 64 * MIB
            clock.jump(host_agent.client_desk.LOOK_S)

    run(body)


def test_a_vm_that_starts_takes_what_was_handed_over_to_it(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        rig.add("full", 200 * MIB, quota_bytes=160 * MIB)
        desk = desk_of(rig)
        first = await desk.reserve(wanted(80))
        done = await desk.transfer(first.id, "late")
        assert done.kept is not None
        assert (done.given_bytes, done.kept.vm) == (0, "late")
        rig.balancer.policy = plan_of({"late": pages_of(64 * MIB), "full": pages_of(176 * MIB)})
        late = pending(rig, "late", 64)
        rig.balancer.plan_once()
        # All that it lacks; the 16 MiB beside it stay kept until it runs.
        assert rig.ledger.view("late").quota_pages == pages_of(64 * MIB)
        assert rig.ledger.view("full").quota_pages == pages_of(160 * MIB)
        assert rig.ledger.held_pages == pages_of(16 * MIB)
        late.phase = Phase.RUNNING
        rig.balancer.clients.began(late)
        assert rig.ledger.held_pages == 0
        rig.balancer.plan_once()
        assert rig.ledger.view("full").quota_pages == pages_of(176 * MIB)
        rig.ledger.check()

    run(body)


def test_a_vm_that_runs_has_it_at_once(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        rig.add("one", 120 * MIB, quota_bytes=100 * MIB)
        desk = desk_of(rig)
        reserved = await desk.reserve(wanted(64))
        done = await desk.transfer(reserved.id, "one")
        assert (done.given_bytes, done.kept) == (20 * MIB, None)
        assert rig.ledger.view("one").quota_pages == pages_of(120 * MIB)
        assert (rig.ledger.held_pages, desk.views()) == (0, [])
        rig.check_agreement()
        with pytest.raises(NoSuchReservation, match="no reservation 'nope'"):
            await desk.release("nope")

    run(body)


def test_what_becomes_free_is_kept_before_it_is_granted(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        going = rig.add("going", 100 * MIB)
        taker = rig.add("taker", 200 * MIB, quota_bytes=140 * MIB)
        rig.balancer.clients.change(ClientReservations().reserve("xapi", "1", pages_of(80 * MIB)))
        assert rig.ledger.held_pages == 0
        rig.remove(going)
        taker.target_pages = pages_of(200 * MIB)  # of a plan from before
        rig.balancer.grant_free()
        assert rig.ledger.held_pages == pages_of(80 * MIB)
        assert rig.ledger.view("taker").quota_pages == pages_of(160 * MIB)

    run(body)


def test_what_is_let_go_pays_back_the_reserve_first() -> None:
    ledger = Ledger(POOL, RESERVE)
    ledger.admit("a", 60, 0, 1000)
    ledger.grant("a", 30)
    ledger.hold(20)
    assert ledger.lend("a", 5).page_count == 5
    assert (ledger.lent_pages, ledger.free_pages) == (5, 0)
    assert ledger.let_go(12) == 5
    assert (ledger.lent_pages, ledger.held_pages, ledger.free_pages) == (0, 8, 7)
    ledger.check()


NAMES = st.sampled_from(["a", "b", "c"])
IDS = st.sampled_from(["1", "2", "3"])
PAGES = st.integers(1, 30)
POOL, RESERVE = 60, 10


class Clients(RuleBasedStateMachine):
    """Any order of what clients, VMs and the balancer do, on the real ledger."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(POOL, RESERVE)
        self.memory = ClientMemory(self.ledger)

    def has(self, reservation_id: str) -> bool:
        return any(one.reservation_id == reservation_id for one in self.memory.reservations.all)

    def kept_for(self, vm: str) -> int:
        handed_over = self.memory.reservations.handed_over_pages(vm)
        return max(handed_over - self.ledger.view(vm).quota_pages, 0)

    @rule(client=NAMES, name=IDS, pages=PAGES)
    def reserve(self, client: str, name: str, pages: int) -> None:
        if not self.has(name):
            self.memory.change(self.memory.reservations.reserve(client, name, pages))

    @rule(name=IDS, vm=NAMES)
    def transfer(self, name: str, vm: str) -> None:
        if self.has(name):
            self.memory.change(self.memory.reservations.transfer(name, vm))

    @rule(name=IDS)
    def release(self, name: str) -> None:
        if self.has(name):
            self.memory.change(self.memory.reservations.release(name))

    @rule(client=NAMES)
    def login(self, client: str) -> None:
        self.memory.change(self.memory.reservations.login(client))
        assert all(one.client != client for one in self.memory.reservations.all)

    @rule(vm=NAMES, assigned=PAGES)
    def admit(self, vm: str, assigned: int) -> None:
        if vm not in self.ledger:
            self.ledger.admit(vm, assigned, 0, 1000)

    @rule(vm=NAMES)
    def leave(self, vm: str) -> None:
        if vm in self.ledger:
            self.ledger.remove(vm)

    @rule(vm=NAMES, pages=PAGES)
    def grant(self, vm: str, pages: int) -> None:
        """As the balancer does it: others' memory is out of reach."""
        if vm not in self.ledger:
            return
        self.memory.settle()
        held = self.memory.meant_for(vm)
        kept = self.memory.kept_pages - self.kept_for(vm)
        others_before = self.ledger.held_pages - held
        claimed = self.ledger.view(vm).claimed.page_count
        pages = min(pages, claimed, held + self.ledger.free_pages)
        self.ledger.grant(vm, pages, min(held, pages))
        assert self.ledger.held_pages >= min(others_before, kept)
        self.memory.settle()

    @rule(vm=NAMES, pages=PAGES)
    def lend(self, vm: str, pages: int) -> None:
        held = self.ledger.held_pages
        if vm in self.ledger:
            self.ledger.lend(vm, pages)
        assert self.ledger.held_pages == held

    @rule(vm=NAMES, pages=PAGES)
    def give(self, vm: str, pages: int) -> None:
        """A balloon inflates: what is free is kept before anybody is granted it."""
        if vm not in self.ledger:
            return
        view = self.ledger.view(vm)
        pages = min(pages, view.quota_pages - view.room_pages)
        if pages:
            self.ledger.make_room(vm, pages)
            own = PageFrames.span(0, view.assigned_pages) - view.claimed
            self.ledger.claim(vm, self.ledger.report(vm, own.lowest(pages)).fresh)
            self.ledger.close_room(vm)
        self.memory.settle()
        assert not (self.ledger.free_pages and self.memory.waits)

    @invariant()
    def every_page_has_one_place(self) -> None:
        ledger, memory = self.ledger, self.memory
        ledger.check()
        parts = (ledger.quota_pages, ledger.held_pages, ledger.reserve_left_pages)
        assert sum(parts) + ledger.free_pages == POOL
        assert 0 <= memory.hidden_pages <= memory.kept_pages
        meant = {vm: memory.meant_for(vm) for vm in self.ledger}
        assert sum(meant.values()) <= ledger.held_pages
        for vm, pages in meant.items():
            assert pages <= self.kept_for(vm)
        for one in memory.reservations.all:
            assert 0 <= memory.missing_pages(one.reservation_id) <= one.pages


TestClients = Clients.TestCase
TestClients.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
