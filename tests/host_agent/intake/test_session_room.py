"""Room for the balloon: kernel and books stay together, whoever raises or fails meanwhile."""

import pytest
import trio
import trio.testing
from host_rig import Rig, SlowRoom
from session_steps import PAGES, SIZE, STEP, Run, drop, inflate, offer, reserve, session_of

from host_agent.intake.faults import GuestAtFault
from host_agent.intake.room import ROOM_DEADLINE_S
from host_agent.quota.errors import LimitRefused, NoRoom, QuotaError
from protocol.messages import (
    Claim,
    Decline,
    Offer,
    Report,
    Reserve,
    Reserved,
    Return,
    Target,
)
from protocol.page_frames import PageFrames
from protocol.units import bytes_of
from protocol.vocabulary import RefusalReason, Urgency


def test_room_is_sought_by_halves(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        rig.vm("one").allocate(SIZE - bytes_of(STEP // 4))
        line = await rig.connect(nursery, guest)
        target = await offer(line, guest, STEP)
        order = await line.hear(Reserve)
        assert (order.target_id, order.pages) == (target.target_id, STEP // 4)
        await line.say(Reserved(target.target_id, 0, RefusalReason.NO_MEMORY, "none came"))
        await rig.settle()
        # What was made and not used is the workload's again.
        assert rig.vm("one").workload_limit_bytes == SIZE
        assert guest.last_reason == "no_memory: none came"
        rig.check_agreement()

    run(body)


def test_no_room_at_all_is_declined(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        rig.vm("one").allocate(SIZE)
        line = await rig.connect(nursery, guest)
        target = await offer(line, guest, STEP)
        assert (await line.hear(Decline)).target_id == target.target_id
        await rig.settle()
        assert guest.refusals == 1
        assert not session_of(guest).inflating
        rig.check_agreement()

    run(body)


def test_memory_given_before_the_room_is_made_ends_the_attempt(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE, quota_bytes=SIZE // 2)
        line = await rig.connect(nursery, guest)
        slow = SlowRoom(monkeypatch, rig.quota(guest))
        target = await offer(line, guest, STEP)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert rig.ledger.view("one").room_pages == STEP
        assert rig.balancer.lend(guest, STEP) == STEP
        returned = await line.hear(Return)
        assert len(returned.frames) == STEP
        rig.check_agreement()
        slow.go.set()
        assert (await line.hear(Decline)).target_id == target.target_id
        await rig.settle()
        assert slow.calls == 1  # half of it is not taken from a guest that needs more
        assert rig.vm("one").workload_limit_bytes == SIZE // 2 + bytes_of(STEP)
        rig.check_agreement()

    run(body)


@pytest.mark.parametrize("looks_late", [False, True])
def test_room_is_given_up_for_a_dry_guest_that_can_get_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, looks_late: bool
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)  # its full size: nothing is claimed
        line = await rig.connect(nursery, guest)
        slow = SlowRoom(monkeypatch, rig.quota(guest), looks_late=looks_late)
        await offer(line, guest, STEP)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert rig.balancer.lend(guest, STEP) == 0
        slow.go.set()
        await line.hear(Decline)
        await rig.settle()
        assert rig.vm("one").workload_limit_bytes == SIZE
        rig.check_agreement()

    run(body)


def test_a_raise_that_fails_while_room_is_made(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE, quota_bytes=SIZE // 2)
        line = await rig.connect(nursery, guest)
        slow = SlowRoom(monkeypatch, rig.quota(guest))
        await offer(line, guest, STEP)
        await trio.testing.wait_all_tasks_blocked(0.01)
        rig.quota(guest).failures["raise_quota"] = QuotaError("no")
        assert rig.balancer.lend(guest, STEP) == 0
        slow.go.set()
        await line.hear(Decline)
        await rig.settle()
        assert rig.ledger.view("one").quota_pages == PAGES // 2
        rig.check_agreement()

    run(body)


def test_memory_given_between_target_and_offer_makes_the_wish_void(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE, quota_bytes=SIZE // 2)
        line = await rig.connect(nursery, guest)
        session_of(guest).wish(PAGES // 2 + STEP, Urgency.SHORT)
        target = await line.hear(Target)
        rig.balancer.lend(guest, STEP)
        await line.hear(Return)
        await line.say(Offer(target.target_id, STEP))
        await line.hear(Decline)
        await rig.settle()
        assert rig.ledger.view("one").quota_pages == PAGES // 2 + STEP
        rig.check_agreement()

    run(body)


def test_memory_given_while_it_reserves_keeps_the_room(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE, quota_bytes=SIZE // 2)
        line = await rig.connect(nursery, guest)
        target = await offer(line, guest, STEP)
        await line.hear(Reserve)
        frames = PageFrames.span(PAGES // 2, STEP)
        line.frames.populate(frames)
        rig.balancer.lend(guest, STEP)
        returned = await line.hear(Return)
        assert not returned.frames & frames
        rig.check_agreement()
        assert rig.vm("one").workload_limit_bytes == SIZE // 2
        await line.say(Report(target.target_id, 1001, frames), Reserved(target.target_id, STEP))
        await drop(line, await line.hear(Claim))
        await rig.settle()
        assert rig.ledger.view("one").quota_pages == PAGES // 2
        rig.check_agreement()

    run(body)


def test_a_limit_write_without_end_is_given_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = trio.testing.MockClock()

    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        slow = SlowRoom(monkeypatch, rig.quota(guest), looks_late=True)
        await offer(line, guest, STEP)
        await trio.testing.wait_all_tasks_blocked(0.01)
        clock.jump(ROOM_DEADLINE_S + 0.1)
        await line.hear(Decline)
        # One write at a time: the next attempt finds the first still in the kernel.
        await offer(line, guest, STEP)
        await line.hear(Decline)
        assert slow.calls == 1
        rig.check_agreement()
        slow.go.set()
        await rig.settle()
        # It succeeded late, and has been undone.
        assert rig.vm("one").workload_limit_bytes == SIZE
        rig.check_agreement()
        await inflate(line, guest, STEP)
        await rig.settle()
        assert rig.ledger.view("one").quota_pages == PAGES - STEP
        rig.check_agreement()

    run(body, clock)


def test_room_that_cannot_be_returned_stays_in_the_books(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        target, _ = await reserve(line, guest, STEP)
        line.frames.drop(line.frames.present)
        rig.quota(guest).failures["raise_workload"] = QuotaError("no")
        await line.say(Reserved(target.target_id, 0, RefusalReason.NO_MEMORY))
        await rig.settle()
        assert rig.ledger.view("one").room_pages == STEP
        assert guest.last_reason == "quota: no"
        rig.check_agreement()
        await inflate(line, guest, STEP)
        await rig.settle()
        assert rig.ledger.view("one").room_pages == 0  # the next attempt's end returned it
        rig.check_agreement()

    run(body)


def test_a_late_limit_write_outlives_its_connection(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        slow = SlowRoom(monkeypatch, rig.quota(guest), looks_late=True)
        await offer(line, guest, STEP)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await line.hang_up()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert rig.ledger.view("one").room_pages == 0
        rig.check_agreement()
        slow.go.set()
        await rig.settle()
        assert rig.vm("one").workload_limit_bytes == SIZE
        rig.check_agreement()

    run(body)


def test_counters_that_lag_hold_the_credit_back(run: Run) -> None:
    clock = trio.testing.MockClock()

    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE, quota_bytes=SIZE // 2)
        line = await rig.connect(nursery, guest)
        target = await offer(line, guest, STEP)
        await line.hear(Reserve)
        frames = PageFrames.span(PAGES // 2, STEP)
        line.frames.populate(frames)
        await line.say(Report(target.target_id, 1001, frames), Reserved(target.target_id, STEP))
        claim = await line.hear(Claim)
        vm = rig.vm("one")
        vm.driver_bytes += bytes_of(STEP)  # the kernel has not counted down yet
        await drop(line, claim)
        await rig.settle()
        assert rig.ledger.view("one").quota_pages == PAGES // 2
        # A raise in between: the books and the kernel stay together.
        assert rig.balancer.lend(guest, STEP // 2) == STEP // 2
        rig.check_agreement()
        vm.driver_bytes -= bytes_of(STEP)
        clock.jump(0.01)
        await rig.settle()
        assert rig.ledger.view("one").quota_pages == PAGES // 2 - STEP // 2
        rig.check_agreement()

    run(body, clock)


def test_a_limit_that_cannot_be_lowered_is_not_credited(run: Run) -> None:
    clock = trio.testing.MockClock()

    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        target, frames = await reserve(line, guest, STEP)
        await line.say(Report(target.target_id, 1001, frames))
        claim = await line.hear(Claim)
        rig.vm("one").driver_bytes += bytes_of(STEP)
        await drop(line, claim)
        await rig.settle()
        clock.jump(1.0)
        assert "limit" in (await line.hear_end()) or rig.ends["one"]
        rig.vm("one").driver_bytes -= bytes_of(STEP)
        await rig.settle()
        clock.jump(1.0)
        await rig.settle()
        (end,) = rig.ends["one"]
        assert isinstance(end, GuestAtFault)
        assert isinstance(end.__cause__, LimitRefused)
        assert rig.ledger.view("one").quota_pages == PAGES
        rig.check_agreement()

    run(body, clock)


def test_room_waits_for_the_frames_of_a_driver_that_left(run: Run) -> None:
    clock = trio.testing.MockClock()

    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        _, frames = await reserve(line, guest, STEP)
        await line.channel.aclose()
        await rig.settle()
        clock.jump(1.0)
        await rig.settle()
        # Its frames are still locked: the workload can't have that room yet.
        assert rig.vm("one").workload_limit_bytes == SIZE - bytes_of(STEP)
        rig.check_agreement()
        line.frames.drop(frames)
        clock.jump(0.1)
        await rig.settle()
        assert rig.vm("one").workload_limit_bytes == SIZE
        rig.check_agreement()

    run(body, clock)


def test_no_room_error_names_the_reason(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        rig.quota(guest).failures["make_room"] = NoRoom("not now")
        await offer(line, guest, STEP)
        assert (await line.hear(Reserve)).pages == STEP // 2  # the next try found some

    run(body)
