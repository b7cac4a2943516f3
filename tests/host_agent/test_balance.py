"""Plans carried out: free first, grant later, and the books follow the kernel and nothing else."""

import logging
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from host_rig import Line, PolicyOf, Rig, Run, plan_of, vitals_of

from host_agent.balance import (
    FIRST_REFUSAL_PAUSE_S,
    LONGEST_REFUSAL_PAUSE_S,
    PLAN_GAP_S,
)
from host_agent.facade.port import VmSpec
from host_agent.guest import Guest, Phase
from host_agent.ledger.snapshot import GuestSnapshot, HostSnapshot
from host_agent.moves import FREE_POOL, HOST_RESERVE
from host_agent.observing import DRY_MEMORY_S, UNCOOPERATIVE_AFTER, UNCOOPERATIVE_PAUSE_S
from host_agent.policy.plan import Plan, QuotaTarget
from host_agent.pressing import URGENT_AFTER_S
from host_agent.quota.errors import QuotaError
from protocol.messages import (
    Decline,
    Offer,
    Refusal,
    Return,
    Target,
)
from protocol.units import MIB, bytes_of, pages_of
from protocol.vocabulary import SWAP_FEATURE, RefusalReason, Urgency

STEP = pages_of(8 * MIB)


def quota_of(rig: Rig, name: str) -> int:
    return rig.ledger.view(name).quota_pages


def test_what_is_free_is_granted_and_told(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", 64 * MIB, quota_bytes=32 * MIB)
        line = await rig.connect(nursery, guest)
        rig.balancer.policy = plan_of({"one": pages_of(48 * MIB)})
        rig.balancer.plan_once()
        assert quota_of(rig, "one") == pages_of(48 * MIB)
        rig.check_agreement()
        returned = await line.hear(Return)
        assert len(returned.frames) == pages_of(16 * MIB)
        assert not returned.frames & rig.ledger.view("one").claimed
        (move,) = rig.balancer.moves.moves
        assert (move.giver, move.taker, move.size_bytes) == (FREE_POOL, "one", 16 * MIB)
        assert guest.wanted_since_s is None

    run(body)


def test_nothing_is_granted_before_it_is_credited(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        giver = rig.add("giver", 200 * MIB)
        rig.add("taker", 64 * MIB, quota_bytes=40 * MIB)
        line = await rig.connect(nursery, giver)
        wanted = {"giver": pages_of(192 * MIB), "taker": pages_of(48 * MIB)}
        rig.balancer.policy = plan_of(wanted)
        rig.balancer.plan_once()
        target = await line.hear(Target)
        assert target.balloon_pages == STEP
        assert quota_of(rig, "taker") == pages_of(40 * MIB)
        await line.give(target, STEP)
        await rig.settle()
        assert {name: quota_of(rig, name) for name in wanted} == wanted
        rig.check_agreement()

    run(body)


def test_a_limit_that_fails_to_rise_leaves_the_books_as_they_were(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", 64 * MIB, quota_bytes=32 * MIB)
        line = await rig.connect(nursery, guest)
        before = rig.ledger.view("one")
        rig.balancer.policy = plan_of({"one": pages_of(48 * MIB)})
        rig.quota(guest).failures["raise_quota"] = QuotaError("no")
        rig.balancer.plan_once()
        assert rig.ledger.view("one") == before
        assert rig.balancer.moves.moves == ()
        assert await line.is_silent()
        rig.check_agreement()
        rig.balancer.plan_once()  # the next plan tries again
        assert quota_of(rig, "one") == pages_of(48 * MIB)

    run(body)


def test_a_loan_that_fails_is_not_owed(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        guest = rig.add("one", 250 * MIB, quota_bytes=240 * MIB)
        assert rig.ledger.free_pages == 0
        rig.quota(guest).failures["raise_quota"] = QuotaError("no")
        assert rig.balancer.lend(guest, STEP) == 0
        assert rig.ledger.lent_pages == 0
        rig.check_agreement()
        assert rig.balancer.lend(guest, STEP) == STEP
        assert rig.ledger.lent_pages == STEP
        rig.check_agreement()

    run(body)


def test_dry_guests_come_first_then_the_neediest(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        # What the rest is to give has not come yet.
        await rig.connect(nursery, rig.add("rest", 216 * MIB))
        names = ("dry", "little", "much")
        guests = {name: rig.add(name, 64 * MIB, quota_bytes=1 * MIB) for name in names}
        guests["dry"].dry = True
        rig.balancer.policy = plan_of(
            {
                "rest": pages_of(173 * MIB),
                "dry": pages_of(2 * MIB),
                "little": pages_of(5 * MIB),
                "much": pages_of(60 * MIB),
            }
        )
        assert rig.ledger.free_pages == pages_of(21 * MIB)
        rig.balancer.plan_once()
        got = {name: bytes_of(quota_of(rig, name)) // MIB for name in names}
        assert got == {"dry": 2, "much": 21, "little": 1}

    run(body)


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.STOPPING])
def test_a_guest_in_between_gets_nothing(run: Run, phase: Phase) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        guest = rig.add("one", 64 * MIB, quota_bytes=32 * MIB)
        guest.phase = phase
        rig.balancer.policy = plan_of({"one": pages_of(64 * MIB)})
        rig.balancer.plan_once()
        assert quota_of(rig, "one") == pages_of(32 * MIB)

    run(body)


def test_a_guest_that_waits_to_start_is_given_pages_without_limits(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        spec = VmSpec.model_validate({"name": "new", "assigned_bytes": 64 * MIB})
        rig.ledger.admit("new", pages_of(64 * MIB), spec.reservation_bytes // 4096, 1000)
        guest = rig.balancer.guests["new"] = Guest(spec)
        changed = guest.quota_changed
        rig.balancer.plan_once()
        assert quota_of(rig, "new") == pages_of(64 * MIB)
        assert changed.is_set()
        assert not guest.quota_changed.is_set()

    run(body)


def test_huge_frames_are_granted_whole(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        guest = rig.add("one", 64 * MIB, quota_bytes=32 * MIB, frames="2MiB")
        rig.balancer.policy = plan_of({"one": pages_of(37 * MIB)})
        rig.balancer.plan_once()
        assert quota_of(rig, "one") == pages_of(36 * MIB)
        assert guest.wanted_since_s is not None
        rig.balancer.plan_once()
        assert guest.wanted_since_s is None  # less than a frame is not worth waiting for
        assert rig.balancer.lend(guest, 511) == 0
        assert rig.balancer.lend(guest, 1023) == 512

    run(body)


def test_the_reserve_is_lent_and_paid_back_first(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        dry = rig.add("dry", 100 * MIB, quota_bytes=40 * MIB)
        giver = rig.add("giver", 200 * MIB)
        line = await rig.connect(nursery, giver)
        assert rig.balancer.lend(dry, STEP) == STEP
        assert rig.ledger.lent_pages == STEP
        assert rig.balancer.moves.moves[-1].giver == HOST_RESERVE
        rig.check_agreement()
        rig.balancer.policy = plan_of(
            {"giver": pages_of(188 * MIB), "dry": pages_of(52 * MIB)}, shortage_pages=1
        )
        rig.balancer.plan_once()
        target = await line.hear(Target)
        assert target.urgency is Urgency.SHORT
        await line.give(target, pages_of(12 * MIB))
        await rig.settle()
        assert rig.ledger.lent_pages == 0
        assert quota_of(rig, "dry") == pages_of(52 * MIB)
        moves = {(move.giver, move.taker): move.size_bytes for move in rig.balancer.moves.moves}
        assert moves == {
            (HOST_RESERVE, "dry"): 8 * MIB,
            ("giver", HOST_RESERVE): 8 * MIB,
            ("giver", "dry"): 4 * MIB,
        }
        rig.check_agreement()

    run(body)


def test_nothing_is_lent_beyond_the_reserve_or_the_guests_size(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        one = rig.add("one", 250 * MIB, quota_bytes=240 * MIB)
        assert rig.balancer.lend(one, pages_of(64 * MIB)) == pages_of(10 * MIB)
        assert rig.balancer.lend(one, STEP) == 0
        two = rig.add("two", 64 * MIB, quota_bytes=0)
        assert rig.balancer.lend(two, pages_of(64 * MIB)) == pages_of(6 * MIB)
        assert rig.balancer.lend(two, STEP) == 0
        rig.check_agreement()

    run(body)


async def refuse(rig: Rig, line: Line) -> Target:
    rig.balancer.plan_once()
    target = await line.hear(Target)
    await line.say(Refusal(target.target_id, RefusalReason.WORKING_SET))
    await rig.settle()
    return target


async def asks(rig: Rig, line: Line) -> bool:
    rig.balancer.plan_once()
    return not await line.is_silent()


def test_a_refusal_is_followed_by_a_pause_that_doubles(
    run: Run, clock: trio.testing.MockClock
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", 64 * MIB)
        line = await rig.connect(nursery, guest)
        rig.balancer.policy = plan_of({"one": pages_of(32 * MIB)})
        pause_s = FIRST_REFUSAL_PAUSE_S
        for _ in range(8):
            assert (await refuse(rig, line)).urgency is Urgency.CALM
            clock.jump(pause_s * 0.9)
            assert not await asks(rig, line)
            clock.jump(pause_s * 0.2)
            pause_s = min(2 * pause_s, LONGEST_REFUSAL_PAUSE_S)
        for _ in range(1100):  # an hour of it
            rig.balancer.inflation_ended(guest, 0)
        clock.jump(LONGEST_REFUSAL_PAUSE_S)
        await refuse(rig, line)
        clock.jump(LONGEST_REFUSAL_PAUSE_S * 0.9)
        assert not await asks(rig, line)
        clock.jump(LONGEST_REFUSAL_PAUSE_S * 0.2)
        # One that gives is asked again at once.
        rig.balancer.plan_once()
        await line.give(await line.hear(Target), STEP)
        await rig.settle()
        assert guest.refusals == 0
        rig.balancer.plan_once()
        await line.hear(Target)

    run(body)


def test_only_more_urgency_cuts_the_pause_short(run: Run, clock: trio.testing.MockClock) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", 64 * MIB)
        line = await rig.connect(nursery, guest)
        calm = plan_of({"one": pages_of(32 * MIB)})
        short = plan_of({"one": pages_of(32 * MIB)}, shortage_pages=1)
        rig.balancer.policy = calm
        await refuse(rig, line)
        rig.balancer.policy = short
        assert (await refuse(rig, line)).urgency is Urgency.SHORT
        assert not await asks(rig, line)
        rig.balancer.policy = calm  # and less urgency does not
        assert not await asks(rig, line)
        rig.balancer.policy = short
        assert not await asks(rig, line)
        clock.jump(LONGEST_REFUSAL_PAUSE_S)
        assert (await refuse(rig, line)).urgency is Urgency.SHORT

    run(body)


async def nothing(rig: Rig, clock: trio.testing.MockClock) -> None:
    pass


async def a_shortage(rig: Rig, clock: trio.testing.MockClock) -> None:
    rig.balancer.policy = plan_of({"one": pages_of(32 * MIB)}, shortage_pages=1)


async def a_loan(rig: Rig, clock: trio.testing.MockClock) -> None:
    rig.balancer.lend(rig.balancer.guests["two"], rig.ledger.free_pages + STEP)
    clock.jump(2 * DRY_MEMORY_S)


async def a_dry_guest(rig: Rig, clock: trio.testing.MockClock) -> None:
    rig.balancer.guests["two"].dry_s = trio.current_time()


async def a_guest_that_waits(rig: Rig, clock: trio.testing.MockClock) -> None:
    pages = rig.ledger.free_pages + quota_of(rig, "two")
    rig.balancer.policy = plan_of({"two": pages})
    rig.quota(rig.balancer.guests["two"]).failures["raise_quota"] = QuotaError("no")
    rig.balancer.plan_once()
    rig.balancer.policy = plan_of({"one": pages_of(32 * MIB), "two": pages})
    clock.jump(1.1 * URGENT_AFTER_S)


@pytest.mark.parametrize(
    ("reason", "urgency"),
    [
        (nothing, Urgency.CALM),
        (a_shortage, Urgency.SHORT),
        (a_loan, Urgency.SHORT),
        (a_dry_guest, Urgency.SHORT),
        (a_guest_that_waits, Urgency.SHORT),
    ],
)
def test_what_makes_it_urgent(
    run: Run,
    clock: trio.testing.MockClock,
    reason: Callable[[Rig, trio.testing.MockClock], Awaitable[None]],
    urgency: Urgency,
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        clock.jump(100.0)
        guest = rig.add("one", 64 * MIB, swap_bytes=16 * MIB, balloon_may_swap=True)
        rig.add("two", 250 * MIB, quota_bytes=150 * MIB)
        line = rig.dial(nursery, guest)
        await line.greet(guest.assigned_pages, features=(SWAP_FEATURE,))
        rig.balancer.policy = plan_of({"one": pages_of(32 * MIB)})
        await reason(rig, clock)
        rig.balancer.plan_once()
        target = await line.hear(Target)
        assert target.urgency is urgency
        # What may be swapped may be so when memory is short, and at no other time.
        assert bytes_of(target.swap_pages) == (16 * MIB if urgency is Urgency.SHORT else 0)

    run(body)


def test_what_is_beyond_the_pool_is_asked_for_and_given_to_nobody(run: Run) -> None:
    """An agent with a smaller pool has found two that run: 16 MiB are lent, 48 too much."""

    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        one, two = rig.add("one", 240 * MIB), rig.add("two", 64 * MIB, quota_bytes=0)
        rig.quota(two).raise_quota(64 * MIB)
        rig.ledger.remove("two")
        rig.ledger.adopt("two", pages_of(64 * MIB), 0, 1000, pages_of(64 * MIB))
        rig.balancer.overdraft.found()
        first, second = await rig.connect(nursery, one), await rig.connect(nursery, two)
        rig.balancer.policy = plan_of({"one": pages_of(176 * MIB), "two": pages_of(64 * MIB)})
        rig.balancer.plan_once()
        await first.give(await first.hear(Target), pages_of(60 * MIB))
        await rig.settle()
        assert bytes_of(rig.ledger.reserve_left_pages) == 16 * MIB
        assert bytes_of(rig.ledger.overdrawn_pages) == 4 * MIB
        rig.balancer.policy = plan_of({"one": pages_of(186 * MIB), "two": pages_of(54 * MIB)})
        rig.balancer.plan_once()
        target = await second.hear(Target)
        assert target.urgency is Urgency.SHORT
        await second.give(target, pages_of(10 * MIB))
        await rig.settle()
        assert (rig.ledger.overdrawn_pages, quota_of(rig, "one")) == (0, pages_of(186 * MIB))
        rig.check_agreement()
        moves = {(move.giver, move.taker): move.size_bytes for move in rig.balancer.moves.moves}
        assert moves == {("one", HOST_RESERVE): 16 * MIB, ("two", "one"): 6 * MIB}

    run(body)


def test_who_leaves_has_paid_off_what_was_beyond_the_pool(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        rig.add("one", 240 * MIB)
        two = rig.add("two", 64 * MIB, quota_bytes=0)
        rig.ledger.remove("two")
        rig.ledger.adopt("two", pages_of(64 * MIB), 0, 1000, pages_of(64 * MIB))
        rig.balancer.overdraft.found()
        rig.remove(two)
        assert rig.ledger.owed_pages == 0
        assert [(move.giver, move.taker, move.size_bytes) for move in rig.balancer.moves.moves] == [
            ("two", HOST_RESERVE, 16 * MIB)
        ]
        said = [record.getMessage() for record in caplog.records]
        assert said[0].startswith("the VMs that run have 48MiB more than the pool of 256MiB: ")
        assert said[1:] == ["the VMs have no more than the pool any longer"]

    caplog.set_level(logging.INFO, "memballoon.agent")
    run(body)


def test_swap_is_the_guests_own_unless_its_balloon_may_have_it(
    run: Run, clock: trio.testing.MockClock
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        clock.jump(100.0)
        guest = rig.add("one", 64 * MIB, swap_bytes=16 * MIB)
        line = rig.dial(nursery, guest)
        await line.greet(guest.assigned_pages, features=(SWAP_FEATURE,))
        await a_shortage(rig, clock)
        rig.balancer.plan_once()
        target = await line.hear(Target)
        assert (target.urgency, target.swap_pages) == (Urgency.SHORT, 0)

    run(body)


def test_who_is_not_asked(run: Run, clock: trio.testing.MockClock) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        clock.jump(100.0)
        guest = rig.add("one", 64 * MIB)
        rig.balancer.policy = plan_of({"one": pages_of(32 * MIB)})
        rig.balancer.plan_once()  # nobody listens
        line = await rig.connect(nursery, guest)
        guest.dry_s = trio.current_time()
        assert not await asks(rig, line)
        clock.jump(2 * DRY_MEMORY_S)
        rig.balancer.policy = plan_of({})
        assert not await asks(rig, line)
        rig.balancer.policy = plan_of({"one": pages_of(32 * MIB)})
        rig.balancer.plan_once()
        target = await line.hear(Target)
        assert not await asks(rig, line)  # it is being asked
        await line.say(Refusal(target.target_id, RefusalReason.BUSY))

    run(body)


def seen_by(rig: Rig) -> GuestSnapshot:
    """What the policy is shown of guest `one`."""
    seen: list[HostSnapshot] = []

    def policy(snapshot: HostSnapshot) -> Plan:
        seen.append(snapshot)
        return Plan.of(QuotaTarget(g.name, g.quota_pages, 0) for g in snapshot.guests)

    rig.balancer.policy = PolicyOf(policy)
    rig.balancer.plan_once()
    return next(guest for guest in seen[0].guests if guest.name == "one")


def test_what_the_policy_sees(run: Run, clock: trio.testing.MockClock) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        clock.jump(100.0)
        guest = rig.add("one", 64 * MIB, quota_bytes=32 * MIB)
        shown = seen_by(rig)
        assert (shown.movable, shown.demand_pages, shown.spare_pages) == (False, None, None)
        line = await rig.connect(nursery, guest)
        await line.say(vitals_of(20 * MIB, spare_bytes=3 * MIB))
        await rig.settle()
        shown = seen_by(rig)
        assert shown.movable
        assert (shown.demand_pages, shown.spare_pages) == (pages_of(20 * MIB), pages_of(3 * MIB))
        # One that ran dry needs more than it has, whatever it said before.
        guest.dry_s = trio.current_time()
        demand = seen_by(rig).demand_pages
        assert demand is not None
        assert demand > pages_of(32 * MIB)
        clock.jump(2 * DRY_MEMORY_S)
        assert seen_by(rig).demand_pages == pages_of(20 * MIB)
        guest.pinned_pages = 7
        assert seen_by(rig).pinned_pages == 7
        guest.stuck_times, guest.stuck_s = UNCOOPERATIVE_AFTER, trio.current_time()
        assert not seen_by(rig).movable
        clock.jump(1.1 * UNCOOPERATIVE_PAUSE_S)
        assert seen_by(rig).movable  # another chance
        guest.phase = Phase.STOPPING
        assert not seen_by(rig).movable

    run(body)


def test_who_gives_is_not_stuck_any_more(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", 64 * MIB)
        guest.stuck_times = 2
        line = await rig.connect(nursery, guest)
        rig.balancer.policy = plan_of({"one": pages_of(56 * MIB)})
        rig.balancer.plan_once()
        await line.give(await line.hear(Target), STEP)
        await rig.settle()
        assert guest.stuck_times == 0

    run(body)


def test_a_shortage_is_said_once(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "memballoon.balance")

    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        rig.add("one", 64 * MIB)
        for shortage_mib in (1, 5, 3):
            rig.balancer.policy = plan_of({}, shortage_pages=pages_of(shortage_mib * MIB))
            rig.balancer.plan_once()
        for _ in range(3):
            rig.balancer.policy = plan_of({})
            rig.balancer.plan_once()
        rig.balancer.policy = plan_of({}, shortage_pages=pages_of(2 * MIB))
        rig.balancer.plan_once()

    run(body)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "memory is short",
        "memory is no longer short",
        "memory is short",
    ]
    assert "1 MiB more are wanted than there are" in caplog.records[0].getMessage()


def test_a_small_change_of_demand_waits_for_the_interval(
    run: Run, clock: trio.testing.MockClock
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", 64 * MIB)
        line = await rig.connect(nursery, guest)
        nursery.start_soon(rig.balancer.run)
        await rig.settle()

        async def plans_after(demand_bytes: int) -> int:
            clock.jump(PLAN_GAP_S)
            await rig.settle()
            before = rig.balancer.plans_total
            await line.say(vitals_of(demand_bytes))
            await rig.settle()
            return rig.balancer.plans_total - before

        assert await plans_after(20 * MIB) == 1
        assert await plans_after(20 * MIB + MIB // 2) == 0
        assert await plans_after(19 * MIB) == 1
        assert await plans_after(19 * MIB) == 0
        before = rig.balancer.plans_total
        clock.jump(1.1)
        await rig.settle()
        assert rig.balancer.plans_total == before + 1

    run(body)


def test_a_storm_of_events_is_one_plan(run: Run, clock: trio.testing.MockClock) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        nursery.start_soon(rig.balancer.run)
        await rig.settle()
        for _ in range(100):
            rig.balancer.replan()
            await trio.testing.wait_all_tasks_blocked()
        assert rig.balancer.plans_total == 1
        clock.jump(PLAN_GAP_S)
        await rig.settle()
        assert rig.balancer.plans_total == 2

    run(body)


def test_who_leaves_pays_its_debt_and_leaves_the_rest(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        one = rig.add("one", 200 * MIB, quota_bytes=140 * MIB)
        two = rig.add("two", 150 * MIB, quota_bytes=100 * MIB)
        assert rig.balancer.lend(one, STEP) == STEP
        rig.remove(one)
        assert rig.ledger.lent_pages == 0
        assert rig.ledger.free_pages == pages_of(140 * MIB)
        rig.balancer.policy = plan_of({"two": pages_of(150 * MIB)})
        rig.balancer.plan_once()
        moves = {(move.giver, move.taker): move.size_bytes for move in rig.balancer.moves.moves}
        assert moves == {
            (HOST_RESERVE, "one"): 8 * MIB,
            ("one", HOST_RESERVE): 8 * MIB,
            ("one", "two"): 50 * MIB,
        }
        rig.check_agreement()
        rig.balancer.left(one)  # a second time does nothing
        assert two.name in rig.ledger
        newcomer = rig.add("one", 200 * MIB, quota_bytes=20 * MIB)
        rig.balancer.left(one)  # nor to somebody else of that name
        assert rig.balancer.guests["one"] is newcomer
        assert quota_of(rig, "one") == pages_of(20 * MIB)

    run(body)


def test_an_attempt_is_void_when_the_plan_gives_instead(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", 64 * MIB, quota_bytes=40 * MIB)
        line = await rig.connect(nursery, guest)
        rig.balancer.policy = plan_of({"one": pages_of(32 * MIB)})
        rig.balancer.plan_once()
        target = await line.hear(Target)
        rig.balancer.policy = plan_of({"one": pages_of(48 * MIB)})
        rig.balancer.plan_once()
        await line.hear(Return)
        await line.say(Offer(target.target_id, STEP))
        await line.hear(Decline)
        await rig.settle()
        assert quota_of(rig, "one") == pages_of(48 * MIB)
        rig.check_agreement()

    run(body)
