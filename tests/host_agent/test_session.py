"""A guest's session from the Hello to its end: frames in, quota down, and nothing lost between."""

from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import trio
import trio.testing
from host_rig import Line, Rig, SlowRoom, hello_of, open_rig, plan_of, vitals_of

from host_agent import blocking
from host_agent.audit.errors import ProcessGone
from host_agent.guest import Guest
from host_agent.intake import session as session_module
from host_agent.intake.faults import LIES, GuestAtFault, GuestLied, GuestStuck
from host_agent.intake.room import ROOM_DEADLINE_S
from host_agent.intake.session import GuestSession
from host_agent.quota.errors import LimitRefused, NoRoom, QuotaError
from protocol.errors import ChannelBroken
from protocol.messages import (
    Claim,
    Decline,
    Dropped,
    Goodbye,
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
from protocol.vocabulary import RefusalReason, RejectionReason, Urgency

SIZE = 64 * MIB
PAGES = pages_of(SIZE)
STEP = pages_of(8 * MIB)

Body = Callable[[Rig, trio.Nursery], Awaitable[None]]
Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(body: Body, clock: trio.abc.Clock | None = None) -> None:
        async def main() -> None:
            async with open_rig(monkeypatch) as (rig, nursery):
                await body(rig, nursery)

        trio.run(main, clock=clock)

    return run


def session_of(guest: Guest) -> GuestSession:
    assert guest.session is not None
    return guest.session


async def offer(line: Line, guest: Guest, pages: int) -> Target:
    """The host wishes for `pages` more, and the guest offers them."""
    actual = len(line.claimed)
    assert not session_of(guest).inflating
    session_of(guest).wish(actual + pages, Urgency.CALM)
    target = await line.hear(Target)
    assert target.balloon_pages == actual + pages
    await line.say(Offer(target.target_id, pages))
    return target


async def reserve(line: Line, guest: Guest, pages: int) -> tuple[Target, PageFrames]:
    """As far as populated frames that are not reported yet."""
    target = await offer(line, guest, pages)
    order = await line.hear(Reserve)
    assert order.pages == pages
    first = int(line.claimed.stops[-1]) if line.claimed else 0
    frames = PageFrames.span(first, pages)
    line.frames.populate(frames)
    return target, frames


async def drop(line: Line, claim: Claim) -> None:
    line.frames.drop(claim.frames)
    line.claimed |= claim.frames
    await line.say(Dropped(claim.report_id, claim.frames))


async def inflate(line: Line, guest: Guest, pages: int) -> None:
    """All of it, in one report."""
    target, frames = await reserve(line, guest, pages)
    await line.say(Report(target.target_id, target.target_id, frames))
    await line.say(Reserved(target.target_id, pages))
    await drop(line, await line.hear(Claim))


def test_frames_come_in_and_the_quota_goes_down(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        rig.vm("one").fill_cache(SIZE)
        line = await rig.connect(nursery, guest)
        target, frames = await reserve(line, guest, STEP)
        vm = rig.vm("one")
        # Room first: the workload has less, the VM as much as before.
        assert vm.workload_limit_bytes == SIZE - bytes_of(STEP)
        assert vm.vm_limit_bytes == SIZE + guest.overhead_bytes
        rig.check_agreement()
        # Reports overlap: the second is said before the first is claimed.
        first, second = frames.chunks(STEP // 2)
        await line.say(
            Report(target.target_id, 1001, first), Report(target.target_id, 1002, second)
        )
        await line.say(Reserved(target.target_id, STEP))
        claims = [await line.hear(Claim), await line.hear(Claim)]
        assert [(claim.report_id, claim.frames) for claim in claims] == [
            (1001, first),
            (1002, second),
        ]
        assert rig.ledger.view("one").quota_pages == PAGES  # nothing is credited yet
        await drop(line, claims[0])
        await rig.settle()
        assert rig.ledger.view("one").claimed == first
        assert session_of(guest).inflating
        await drop(line, claims[1])
        await rig.settle()
        assert rig.ledger.view("one").claimed == frames
        assert vm.vm_limit_bytes == SIZE - bytes_of(STEP) + guest.overhead_bytes
        assert not session_of(guest).inflating
        assert guest.refused_until_s == 0.0
        rig.check_agreement()

    run(body)


def test_a_refusal_ends_the_attempt_with_its_reason(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        session_of(guest).wish(STEP, Urgency.SHORT)
        target = await line.hear(Target)
        assert target.urgency is Urgency.SHORT
        await line.say(Refusal(target.target_id, RefusalReason.PRESSURE, "it stalls"))
        await rig.settle()
        assert guest.last_reason == "pressure: it stalls"
        assert guest.refusals == 1
        assert not session_of(guest).inflating
        rig.check_agreement()

    run(body)


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


def test_an_offer_above_the_wish_is_cut(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        session_of(guest).wish(STEP, Urgency.CALM)
        target = await line.hear(Target)
        await line.say(Offer(target.target_id, 4 * STEP))
        assert (await line.hear(Reserve)).pages == STEP

    run(body)


def test_huge_frames_come_whole(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE, frames="2MiB")
        rig.vm("one").allocate(SIZE - 5 * MIB)
        line = await rig.connect(nursery, guest)
        session_of(guest).wish(511, Urgency.CALM)
        assert not session_of(guest).inflating
        target = await offer(line, guest, 7 * 512)
        order = await line.hear(Reserve)
        assert (order.pages, order.frame_order) == (512, 9)  # 7 frames, then 3, then 1
        await line.say(Reserved(target.target_id, 0, RefusalReason.NO_MEMORY))

    run(body)


def test_some_frames_are_rejected_the_rest_is_claimed(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        target, frames = await reserve(line, guest, STEP)
        bad = frames.lowest(10)
        line.frames.rejects.append((bad, RejectionReason.NOT_LOCKED))
        await line.say(Report(target.target_id, 1001, frames), Reserved(target.target_id, STEP))
        rejection = await line.hear(Rejection)
        assert rejection.rejected == ((bad, RejectionReason.NOT_LOCKED),)
        line.frames.drop(bad)
        claim = await line.hear(Claim)
        assert claim.frames == frames - bad
        await drop(line, claim)
        await rig.settle()
        view = rig.ledger.view("one")
        assert view.claimed == frames - bad
        assert (view.room_pages, len(view.pending)) == (0, 0)
        assert not session_of(guest).inflating
        rig.check_agreement()

    run(body)


def test_a_report_rejected_as_a_whole_is_no_claim(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        target, frames = await reserve(line, guest, STEP)
        line.frames.drop(frames)  # reclaimed under its hands, say
        await line.say(Report(target.target_id, 1001, frames), Reserved(target.target_id, STEP))
        assert (await line.hear(Rejection)).frames == frames
        await rig.settle()
        assert not session_of(guest).inflating
        assert guest.refusals == 1
        rig.check_agreement()

    run(body)


@pytest.mark.parametrize("reason", sorted(LIES - {RejectionReason.NO_ROOM}))
def test_a_lie_ends_the_connection_and_not_the_guest(run: Run, reason: RejectionReason) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        await inflate(line, guest, STEP)
        await rig.settle()
        target, frames = await reserve(line, guest, STEP)
        told = frames
        if reason is RejectionReason.OUT_OF_RANGE:
            told = PageFrames.span(PAGES - 1, 2)
        elif reason is RejectionReason.ALREADY_CLAIMED:
            told = PageFrames.span(STEP - 1, 2)
        else:
            line.frames.rejects.append((frames.lowest(1), reason))
        await line.say(Report(target.target_id, 1001, told))
        await line.hear_end()
        line.frames.drop(frames)
        await rig.settle()
        (end,) = rig.ends["one"]
        assert isinstance(end, GuestLied)
        assert reason.value in str(end)
        assert guest.session is None
        assert rig.ledger.view("one").quota_pages == PAGES - STEP
        assert rig.ledger.view("one").room_pages == 0
        rig.check_agreement()

    run(body)


def test_frames_that_are_kept_are_not_credited(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        target, frames = await reserve(line, guest, STEP)
        await line.say(Report(target.target_id, 1001, frames))
        claim = await line.hear(Claim)
        line.frames.drop(claim.frames - claim.frames.lowest(1))
        await line.say(Dropped(1001, claim.frames))
        await line.hear_end()
        line.frames.drop(claim.frames)
        await rig.settle()
        (end,) = rig.ends["one"]
        assert isinstance(end, GuestLied)
        assert str(end) == "it kept 1 frames that it said it had dropped"
        assert rig.ledger.view("one").quota_pages == PAGES
        rig.check_agreement()

    run(body)


async def be_silent_after_target(line: Line, guest: Guest) -> None:
    session_of(guest).wish(STEP, Urgency.CALM)
    await line.hear(Target)


async def be_silent_after_reserve(line: Line, guest: Guest) -> None:
    await reserve(line, guest, STEP)


async def be_silent_after_claim(line: Line, guest: Guest) -> None:
    target, frames = await reserve(line, guest, STEP)
    await line.say(Report(target.target_id, 1001, frames), Reserved(target.target_id, STEP))
    await line.hear(Claim)


SILENCES = [be_silent_after_target, be_silent_after_reserve, be_silent_after_claim]


@pytest.mark.parametrize("silence", SILENCES)
def test_a_guest_that_owes_too_long_is_stuck(
    run: Run, silence: Callable[[Line, Guest], Awaitable[None]]
) -> None:
    clock = trio.testing.MockClock()

    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        await silence(line, guest)
        await rig.settle()
        clock.jump(session_module.PROGRESS_DEADLINE_S - 0.1)
        await rig.settle()
        assert guest.session is not None
        clock.jump(1.0)
        await line.hear_end()
        line.frames.drop(line.frames.present)
        await rig.settle()
        clock.jump(1.0)  # its room is looked after now and then
        await rig.settle()
        (end,) = rig.ends["one"]
        assert isinstance(end, GuestStuck)
        assert rig.ledger.view("one").quota_pages == PAGES
        rig.check_agreement()

    run(body, clock)


def test_progress_puts_the_deadline_off(run: Run) -> None:
    clock = trio.testing.MockClock()

    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        target, frames = await reserve(line, guest, STEP)
        for report_id, part in enumerate(frames.chunks(STEP // 4)):
            clock.jump(session_module.PROGRESS_DEADLINE_S * 0.7)
            await line.say(Report(target.target_id, 1000 + report_id, part))
            claim = await line.hear(Claim)
            await rig.settle()
            clock.jump(session_module.PROGRESS_DEADLINE_S * 0.7)
            await drop(line, claim)
            await rig.settle()
        await line.say(Reserved(target.target_id, STEP))
        await rig.settle()
        assert rig.ledger.view("one").claimed == frames
        clock.jump(1000.0)  # nothing is owed any more
        await rig.settle()
        assert guest.session is not None
        rig.check_agreement()

    run(body, clock)


def test_the_deadline_of_a_drop_runs_from_the_claim(run: Run) -> None:
    clock = trio.testing.MockClock()

    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        target, frames = await reserve(line, guest, STEP)
        line.frames.keep_going.clear()
        await line.say(Report(target.target_id, 1001, frames))
        await trio.testing.wait_all_tasks_blocked()
        clock.jump(session_module.AUDIT_DEADLINE_S * 0.9)
        line.frames.keep_going.set()
        claim = await line.hear(Claim)
        await rig.settle()
        clock.jump(session_module.PROGRESS_DEADLINE_S * 0.9)
        await rig.settle()
        await drop(line, claim)
        await rig.settle()
        assert rig.ledger.view("one").claimed == frames

    run(body, clock)


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


def test_a_drop_heard_as_its_session_is_replaced_is_void(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        target, frames = await reserve(line, guest, STEP)
        await line.say(Report(target.target_id, 1001, frames))
        claim = await line.hear(Claim)
        session, run_blocking = session_of(guest), blocking.run_blocking

        async def replaced_meanwhile(*args: Any, **kwargs: Any) -> Any:
            result = await run_blocking(*args, **kwargs)
            session.supersede()
            rig.ledger.settle("one", PageFrames.empty())  # as the reception does at once
            return result

        monkeypatch.setattr(session_module, "run_blocking", replaced_meanwhile)
        await drop(line, claim)
        await rig.settle()
        (end,) = rig.ends["one"]
        assert isinstance(end, ChannelBroken)
        assert rig.ledger.view("one").quota_pages == PAGES
        rig.check_agreement()

    run(body)


@pytest.mark.parametrize("has_begun", [False, True])
@pytest.mark.parametrize("message", ["offer", "report"])
def test_what_is_heard_as_a_session_is_replaced_is_void(
    run: Run, message: str, has_begun: bool
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        session = session_of(guest)
        if message == "report":
            target, frames = await reserve(line, guest, STEP)
            session._take(Report(target.target_id, 1001, frames))
        else:
            session.wish(STEP, Urgency.CALM)
            target = await line.hear(Target)
            session._take(Offer(target.target_id, STEP))
        if has_begun:
            await trio.lowlevel.cancel_shielded_checkpoint()
        # As the reception does in the instant of the newer Hello:
        session.supersede()
        rig.ledger.settle("one", PageFrames.empty())
        session.return_room()
        guest.session = cast(GuestSession, object())
        line.frames.drop(line.frames.present)
        await trio.testing.wait_all_tasks_blocked(0.01)
        (end,) = rig.ends["one"]
        assert isinstance(end, ChannelBroken)
        view = rig.ledger.view("one")
        assert (view.room_pages, len(view.pending)) == (0, 0)
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


@pytest.mark.parametrize("in_drop", [False, True])
def test_a_pseudo_process_that_dies_is_nobodys_fault(run: Run, in_drop: bool) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        target, frames = await reserve(line, guest, STEP)
        if in_drop:
            await line.say(Report(target.target_id, 1001, frames))
            claim = await line.hear(Claim)
        line.frames.error = ProcessGone(7)
        line.frames.drop(frames)
        if in_drop:
            await line.say(Dropped(1001, claim.frames))
        else:
            await line.say(Report(target.target_id, 1001, frames))
        await line.hear_end()
        await rig.settle()
        (end,) = rig.ends["one"]
        assert isinstance(end, ProcessGone)
        assert rig.ledger.view("one").quota_pages == PAGES
        rig.check_agreement()

    run(body)


def test_a_reset_in_the_middle_begins_anew(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        await inflate(line, guest, STEP)
        await rig.settle()
        target, frames = await reserve(line, guest, STEP)
        await line.say(Report(target.target_id, 1001, frames))
        await line.hear(Claim)
        await line.say(Reset("lost the thread"))
        line.frames.drop(frames)
        await rig.settle()
        welcome = await line.greet(PAGES)
        assert welcome.claimed == PageFrames.span(0, STEP)
        await rig.settle()
        view = rig.ledger.view("one")
        assert (view.room_pages, len(view.pending)) == (0, 0)
        rig.check_agreement()
        await inflate(line, guest, STEP)
        await rig.settle()
        assert rig.ledger.view("one").quota_pages == PAGES - 2 * STEP
        assert rig.ends["one"] == []

    run(body)


async def leave_at_once(line: Line, guest: Guest) -> None:
    pass


async def leave_after_offer(line: Line, guest: Guest) -> None:
    await offer(line, guest, STEP)


async def leave_after_report(line: Line, guest: Guest) -> None:
    target, frames = await reserve(line, guest, STEP)
    await line.say(Report(target.target_id, 1001, frames.lowest(STEP // 2)))


async def leave_half_claimed(line: Line, guest: Guest) -> None:
    target, frames = await reserve(line, guest, STEP)
    await line.say(Report(target.target_id, 1001, frames.lowest(STEP // 2)))
    await drop(line, await line.hear(Claim))
    await line.say(Report(target.target_id, 1002, frames.highest(STEP // 2)))


STEPS = [leave_at_once, leave_after_offer, *SILENCES, leave_after_report, leave_half_claimed]


@pytest.mark.parametrize("manner", ["vanishes", "says goodbye", "comes again"])
@pytest.mark.parametrize("leave", STEPS)
def test_whoever_leaves_takes_nothing_along(
    run: Run, leave: Callable[[Line, Guest], Awaitable[None]], manner: str
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        await leave(line, guest)
        if manner == "says goodbye":
            await line.say(Goodbye("enough"))
        if manner == "comes again":
            # The old connection is not known to be dead yet.
            line.frames.drop(line.frames.present)
            newer = rig.dial(nursery, guest)
            newer.claimed = line.claimed
            await newer.greet(PAGES)
        else:
            await line.hang_up()
        await rig.settle()
        rig.check_bounds()
        with trio.fail_after(10.0):
            while rig.ledger.view("one").room_pages:
                await trio.sleep(0.01)
        view = rig.ledger.view("one")
        assert not view.pending
        rig.check_agreement()
        (end,) = rig.ends["one"]
        assert isinstance(end, ChannelBroken)
        assert (guest.session is None) == (manner != "comes again")
        if manner != "comes again":
            line = await rig.connect(nursery, guest)
        else:
            line = newer
        await inflate(line, guest, STEP)
        await rig.settle()
        assert rig.ledger.view("one").quota_pages == view.quota_pages - STEP
        rig.check_agreement()

    run(body)


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


def test_a_workload_limit_that_an_earlier_agent_left_low_is_raised(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        rig.quota(guest).make_room(SIZE - bytes_of(STEP))
        await rig.connect(nursery, guest)
        assert rig.vm("one").workload_limit_bytes == SIZE

    run(body)


def test_a_newer_connection_keeps_its_reports(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        await rig.connect(nursery, guest)
        newer = await rig.connect(nursery, guest)
        # The older one ends while this one reports.
        target, frames = await reserve(newer, guest, STEP)
        newer.frames.keep_going.clear()
        await newer.say(Report(target.target_id, 1001, frames), Reserved(target.target_id, STEP))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert rig.ledger.view("one").pending == frames
        newer.frames.keep_going.set()
        await drop(newer, await newer.hear(Claim))
        await rig.settle()
        assert rig.ledger.view("one").claimed == frames
        rig.check_agreement()

    run(body)


def test_the_welcome_tells_what_was_granted_while_nobody_listened(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        await inflate(line, guest, 2 * STEP)
        await rig.settle()
        await line.hang_up()
        await rig.settle()
        rig.balancer.lend(guest, STEP)
        again = rig.dial(nursery, guest)
        again.claimed = line.claimed  # it knows of no grant
        welcome = await again.greet(PAGES)
        assert welcome.claimed == rig.ledger.view("one").claimed == PageFrames.span(0, STEP)
        assert await again.is_silent()
        rig.check_agreement()

    run(body)


def test_a_session_is_silent_towards_a_guest_that_said_goodbye(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE, quota_bytes=SIZE // 2)
        line = await rig.connect(nursery, guest)
        await line.say(Goodbye("the driver ends"))
        # Before the host has heard it, and in the same instant as it does.
        session_of(guest).wish(PAGES, Urgency.CALM)
        rig.balancer.lend(guest, STEP)
        await rig.settle()
        (end,) = rig.ends["one"]
        assert isinstance(end, ChannelBroken)
        rig.check_agreement()

    run(body)


def test_vitals_are_kept_and_forgotten_with_the_connection(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        await line.say(vitals_of(10 * MIB))
        await rig.settle()
        assert guest.vitals is not None
        assert guest.planned_demand_pages == pages_of(10 * MIB)
        await line.hang_up()
        await rig.settle()
        assert guest.vitals is None

    run(body)


def test_no_wish_for_what_is_there_already(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE, quota_bytes=SIZE // 2)
        line = await rig.connect(nursery, guest)
        session_of(guest).wish(PAGES // 2, Urgency.CALM)
        session_of(guest).wish(0, Urgency.CALM)
        assert not session_of(guest).inflating
        session_of(guest).wish(PAGES // 2 + 1, Urgency.CALM)
        session_of(guest).wish(PAGES, Urgency.CALM)  # one attempt at a time
        assert (await line.hear(Target)).balloon_pages == PAGES // 2 + 1
        assert await line.is_silent()

    run(body)


def test_a_credit_goes_where_it_is_wanted_at_once(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        one = rig.add("one", 120 * MIB)
        two = rig.add("two", 240 * MIB, quota_bytes=120 * MIB)
        rig.balancer.policy = plan_of({"one": pages_of(112 * MIB), "two": pages_of(128 * MIB)})
        line = await rig.connect(nursery, one)
        rig.balancer.plan_once()
        target = await line.hear(Target)
        await line.say(Offer(target.target_id, STEP))
        await line.hear(Reserve)
        frames = PageFrames.span(0, STEP)
        line.frames.populate(frames)
        await line.say(Report(target.target_id, 1001, frames), Reserved(target.target_id, STEP))
        claim = await line.hear(Claim)
        rig.check_agreement()
        assert rig.ledger.view("two").quota_pages == pages_of(120 * MIB)
        await drop(line, claim)
        await rig.settle()
        assert rig.ledger.view("two").quota_pages == pages_of(128 * MIB)
        (move,) = rig.balancer.moves.moves
        assert (move.giver, move.taker, move.pages) == ("one", "two", STEP)
        assert two.last_reason is None
        rig.check_agreement()

    run(body)


def test_hello_is_answered_by_what_the_books_say(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE, quota_bytes=SIZE // 2)
        line = rig.dial(nursery, guest)
        await line.say(hello_of(PAGES, PageFrames.span(7, 5)))
        welcome = await line.hear(Welcome)
        assert welcome.assigned_pages == PAGES
        assert welcome.claimed == rig.ledger.view("one").claimed

    run(body)


def test_no_room_error_names_the_reason(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE)
        line = await rig.connect(nursery, guest)
        rig.quota(guest).failures["make_room"] = NoRoom("not now")
        await offer(line, guest, STEP)
        assert (await line.hear(Reserve)).pages == STEP // 2  # the next try found some

    run(body)
