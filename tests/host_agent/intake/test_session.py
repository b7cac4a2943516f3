"""A guest's session: frames come in, the quota goes down, and what is refused or rejected."""

import trio
import trio.testing
from host_rig import Rig, plan_of
from session_steps import PAGES, SIZE, STEP, Run, drop, offer, reserve, session_of

from protocol.messages import (
    Claim,
    Decline,
    Offer,
    Refusal,
    Rejection,
    Report,
    Reserve,
    Reserved,
    Target,
)
from protocol.page_frames import PageFrames
from protocol.units import MIB, bytes_of, pages_of
from protocol.vocabulary import SWAP_FEATURE, RefusalReason, RejectionReason, Urgency


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


def test_what_may_be_swapped_is_allowed_by_the_host_and_asked_for_by_the_guest(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE, swap_bytes=32 * MIB)
        vm = rig.vm("one")
        vm.allocate(SIZE)
        line = rig.dial(nursery, guest)
        welcome = await line.greet(PAGES, features=(SWAP_FEATURE, "other"))
        assert welcome.features == (SWAP_FEATURE,)
        session_of(guest).wish(2 * STEP, Urgency.SHORT, swap_pages=STEP)
        target = await line.hear(Target)
        assert target.swap_pages == STEP
        # Without it there is no room; with it there is for half of the offer.
        await line.say(Offer(target.target_id, 2 * STEP, swap_pages=STEP, detail="half by swap"))
        assert await line.hear(Decline)
        assert vm.swapped_bytes == 0
        session_of(guest).wish(STEP, Urgency.SHORT, swap_pages=STEP)
        target = await line.hear(Target)
        await line.say(Offer(target.target_id, STEP, swap_pages=STEP, detail="all by swap"))
        assert (await line.hear(Reserve)).pages == STEP
        assert guest.last_reason == "all by swap"
        assert vm.swapped_bytes == bytes_of(STEP)
        await line.hang_up()
        await rig.settle()
        assert vm.workload_limit_bytes == SIZE

    run(body)


def test_a_driver_that_does_not_know_of_swap_is_not_asked_to(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE, swap_bytes=32 * MIB)
        line = await rig.connect(nursery, guest)
        session_of(guest).wish(STEP, Urgency.SHORT, swap_pages=STEP)
        assert (await line.hear(Target)).swap_pages == 0

    run(body)


def test_a_guest_that_swaps_more_than_it_may_breaks_the_protocol(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", SIZE, swap_bytes=32 * MIB)
        line = rig.dial(nursery, guest)
        await line.greet(PAGES, features=(SWAP_FEATURE,))
        session_of(guest).wish(STEP, Urgency.SHORT, swap_pages=10)
        target = await line.hear(Target)
        # Its own connection would not say that: so another one's state is put in its place.
        line.channel.connection.inflation.swap_pages = 11
        await line.say(Offer(target.target_id, STEP, swap_pages=11))
        await line.hear_end()
        assert "more than the 10 to be swapped" in str(rig.ends["one"][-1])
        assert guest.live_quota.read().workload_limit_bytes == SIZE

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
