"""How sessions end: guests that leave, lie, get stuck, reset or come again take nothing along."""

from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import trio
import trio.testing
from host_rig import Line, Rig, hello_of, vitals_of
from session_steps import PAGES, SIZE, STEP, Run, drop, inflate, offer, reserve, session_of

from host_agent import blocking
from host_agent.audit.errors import ProcessGone
from host_agent.guest import Guest
from host_agent.intake import session as session_module
from host_agent.intake.faults import LIES, GuestLied, GuestStuck
from host_agent.intake.session import GuestSession
from protocol.errors import ChannelBroken
from protocol.messages import (
    Claim,
    Dropped,
    Goodbye,
    Offer,
    Report,
    Reserved,
    Reset,
    Target,
    Welcome,
)
from protocol.page_frames import PageFrames
from protocol.units import MIB, bytes_of, pages_of
from protocol.vocabulary import RejectionReason, Urgency


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


def test_hello_is_answered_by_what_the_books_say(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE, quota_bytes=SIZE // 2)
        line = rig.dial(nursery, guest)
        await line.say(hello_of(PAGES, PageFrames.span(7, 5)))
        welcome = await line.hear(Welcome)
        assert welcome.assigned_pages == PAGES
        assert welcome.claimed == rig.ledger.view("one").claimed

    run(body)
