"""A guest that runs dry: loans that double, patience, and its own kernel's word at the end."""

import pytest
import trio
import trio.testing
from host_rig import Rig, Run

from host_agent.dry import (
    CALM_AFTER_S,
    FIRST_STEP_PAGES,
    KERNEL_DECIDES_S,
    LARGEST_STEP_PAGES,
    LOOK_AGAIN_S,
    DryAnswer,
)
from host_agent.guest import Guest
from host_agent.quota.errors import QuotaError
from protocol.page_frames import PageFrames
from protocol.units import MIB, bytes_of, pages_of
from protocol.vocabulary import Urgency

PATIENCE_S = 10.0
STEP_BYTES = bytes_of(FIRST_STEP_PAGES)


@pytest.fixture
def clock() -> trio.testing.MockClock:
    clock = trio.testing.MockClock()
    clock.jump(100.0)
    return clock


async def watched(rig: Rig, nursery: trio.Nursery, assigned_bytes: int, quota_bytes: int) -> Guest:
    guest = rig.add("one", assigned_bytes, quota_bytes=quota_bytes)
    nursery.start_soon(DryAnswer(guest, rig.balancer, PATIENCE_S).run)
    await rig.settle()
    assert rig.vm("one").armed
    return guest


def quota_bytes_of(rig: Rig, name: str = "one") -> int:
    return bytes_of(rig.ledger.view(name).quota_pages)


def test_loans_double_while_it_goes_on_needing_more(
    run: Run, clock: trio.testing.MockClock
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = await watched(rig, nursery, 250 * MIB, 8 * MIB)
        vm = rig.vm("one")
        vm.allocate(vm.workload_limit_bytes)
        lent = []
        for _ in range(5):
            before = quota_bytes_of(rig)
            vm.allocate(1 * MIB)
            await rig.settle()
            lent.append((quota_bytes_of(rig) - before) // STEP_BYTES)
            assert not guest.dry
            vm.allocate(vm.workload_limit_bytes - vm.usage_bytes)
            clock.jump(0.9 * CALM_AFTER_S)
        largest = LARGEST_STEP_PAGES // FIRST_STEP_PAGES
        assert lent == [1, 2, 4, largest, largest]
        # After a calm time the next burst begins small again.
        clock.jump(1.1 * CALM_AFTER_S)
        before = quota_bytes_of(rig)
        vm.allocate(1 * MIB)
        await rig.settle()
        assert quota_bytes_of(rig) - before == STEP_BYTES
        assert guest.dry_total == 6
        assert vm.kills_total == 0
        rig.check_agreement()

    run(body)


def test_one_burst_takes_as_many_loans_as_it_needs(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = await watched(rig, nursery, 250 * MIB, 8 * MIB)
        rig.vm("one").allocate(60 * MIB)
        await rig.settle()
        assert rig.vm("one").wanted_bytes == 0
        assert quota_bytes_of(rig) == (8 + 8 + 16 + 32) * MIB
        assert guest.dry_total == 3
        assert guest.dry_s == trio.current_time()

    run(body)


def test_an_answer_makes_a_plan(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        await watched(rig, nursery, 64 * MIB, 8 * MIB)
        nursery.start_soon(rig.balancer.run)
        await rig.settle()
        assert rig.balancer.plans_total == 0
        rig.vm("one").allocate(12 * MIB)
        await rig.settle()
        assert rig.balancer.plans_total == 1

    run(body)


async def with_nothing_to_lend(rig: Rig, nursery: trio.Nursery) -> Guest:
    """A guest that waits: all of the pool is in quotas, the reserve is lent."""
    rest = rig.add("rest", 200 * MIB)
    guest = await watched(rig, nursery, 100 * MIB, 40 * MIB)
    assert rig.balancer.lend(guest, pages_of(16 * MIB)) == pages_of(16 * MIB)
    assert rest.dry_total == 0
    rig.vm("one").allocate(70 * MIB)
    await rig.settle()
    assert guest.dry
    assert rig.vm("one").wanted_bytes == 70 * MIB
    return guest


def give(rig: Rig, name: str, pages: int) -> None:
    """Another guest's frames are claimed."""
    frames = (PageFrames.span(0, 1 << 20) - rig.ledger.view(name).claimed).lowest(pages)
    rig.ledger.make_room(name, pages)
    rig.quota(rig.balancer.guests[name]).make_room(bytes_of(rig.ledger.view(name).workload_pages))
    rig.ledger.report(name, frames)
    rig.quota(rig.balancer.guests[name]).lower_quota(
        bytes_of(rig.ledger.view(name).quota_pages - pages)
    )
    repaid = rig.ledger.claim(name, frames)
    rig.balancer.credited(rig.balancer.guests[name], pages, repaid)


def test_it_waits_for_what_the_others_give(run: Run, clock: trio.testing.MockClock) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = await with_nothing_to_lend(rig, nursery)
        clock.jump(0.9 * PATIENCE_S)
        await rig.settle()
        assert guest.dry
        give(rig, "rest", pages_of(20 * MIB))
        for _ in range(5):
            clock.jump(LOOK_AGAIN_S)
            await rig.settle()
        assert not guest.dry
        assert rig.vm("one").wanted_bytes == 0
        assert rig.vm("one").kills_total == 0
        rig.check_agreement()

    run(body)


def test_its_kernel_decides_when_patience_ends(run: Run, clock: trio.testing.MockClock) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = await with_nothing_to_lend(rig, nursery)
        clock.jump(0.99 * PATIENCE_S)
        await rig.settle()
        assert rig.vm("one").kills_total == 0
        clock.jump(0.02 * PATIENCE_S)
        await rig.settle()
        assert rig.vm("one").kills_total == 1
        assert rig.vm("one").armed  # held again the next time
        assert not guest.dry
        rig.check_agreement()

    run(body)


def test_a_guest_of_full_size_is_out_of_memory_at_once(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = await watched(rig, nursery, 64 * MIB, 64 * MIB)
        rig.vm("one").allocate(65 * MIB)
        await rig.settle()
        assert rig.vm("one").kills_total == 1
        assert rig.vm("one").armed
        assert not guest.dry
        assert rig.ledger.lent_pages == 0

    run(body)


def test_room_for_the_balloon_is_not_full_size(run: Run, clock: trio.testing.MockClock) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = await watched(rig, nursery, 64 * MIB, 64 * MIB)
        rig.ledger.make_room("one", pages_of(8 * MIB))
        rig.quota(guest).make_room(56 * MIB)
        rig.vm("one").allocate(60 * MIB)
        await rig.settle()
        assert guest.dry
        assert rig.vm("one").kills_total == 0
        rig.ledger.close_room("one")
        rig.quota(guest).raise_workload(64 * MIB)
        clock.jump(LOOK_AGAIN_S)
        await rig.settle()
        assert not guest.dry
        assert rig.vm("one").kills_total == 0

    run(body)


def test_room_that_is_sought_is_given_up_for_it(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = await watched(rig, nursery, 64 * MIB, 32 * MIB)
        await rig.connect(nursery, guest)
        assert guest.session is not None
        guest.session.wish(pages_of(40 * MIB), Urgency.SHORT)
        rig.vm("one").allocate(33 * MIB)
        await rig.settle()
        assert rig.vm("one").wanted_bytes == 0
        assert quota_bytes_of(rig) == 40 * MIB
        rig.check_agreement()

    run(body)


def test_a_guest_that_is_dry_already_is_found(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", 64 * MIB, quota_bytes=32 * MIB)
        rig.vm("one").armed = True
        rig.vm("one").allocate(33 * MIB)  # before anybody watches
        nursery.start_soon(DryAnswer(guest, rig.balancer, PATIENCE_S).run)
        await rig.settle()
        assert rig.vm("one").wanted_bytes == 0
        assert guest.dry_total == 1

    run(body)


def test_it_is_held_again_even_if_the_wait_for_its_kernel_is_cancelled(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", 64 * MIB)
        quota = rig.quota(guest)
        stays_dry = quota.let_kernel_decide

        def kernel_takes_its_time() -> None:
            rig.vm("one").wanted_bytes, wanted = 0, rig.vm("one").wanted_bytes
            stays_dry()
            rig.vm("one").wanted_bytes = wanted

        quota.let_kernel_decide = kernel_takes_its_time  # type: ignore[method-assign]
        async with trio.open_nursery() as watching:
            watching.start_soon(DryAnswer(guest, rig.balancer, PATIENCE_S).run)
            await rig.settle()
            rig.vm("one").allocate(65 * MIB)
            await rig.settle()
            assert not rig.vm("one").armed
            watching.cancel_scope.cancel()
        assert rig.vm("one").armed

    run(body)


def test_its_kernel_is_not_waited_for_for_ever(run: Run, clock: trio.testing.MockClock) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = await watched(rig, nursery, 64 * MIB, 64 * MIB)
        quota = rig.quota(guest)
        decided: list[float] = []

        def nobody_dies() -> None:
            decided.append(trio.current_time())
            rig.vm("one").armed = False

        quota.let_kernel_decide = nobody_dies  # type: ignore[method-assign]
        rig.vm("one").allocate(65 * MIB)
        await rig.settle()
        assert not rig.vm("one").armed
        clock.jump(1.1 * KERNEL_DECIDES_S)
        await rig.settle()
        assert rig.vm("one").armed
        assert len(decided) == 1

    run(body)


def test_a_loan_that_fails_is_tried_again(run: Run, clock: trio.testing.MockClock) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = await watched(rig, nursery, 64 * MIB, 32 * MIB)
        rig.quota(guest).failures["raise_quota"] = QuotaError("no")
        rig.vm("one").allocate(33 * MIB)
        await rig.settle()
        clock.jump(LOOK_AGAIN_S)
        await rig.settle()
        assert rig.vm("one").wanted_bytes == 0
        assert quota_bytes_of(rig) == 40 * MIB
        rig.check_agreement()

    run(body)
