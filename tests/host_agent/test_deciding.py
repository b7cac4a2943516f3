"""Policies that fail, in every way that they can: the last plan stays and the VMs are safe."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing
from host_rig import Rig, Run, plan_of
from made_up_policies import MadeUp, decision, keep

from host_agent.deciding import DECIDE_DEADLINE_S, TELL_AGAIN_S, Decider
from host_agent.facade.port import VmSpec
from host_agent.guest import Guest
from host_agent.ledger.columns import HostColumns
from host_agent.ledger.snapshot import GuestSnapshot, HostSnapshot
from host_agent.policy.plan import Plan
from host_agent.policy.shares import Shares
from protocol.messages import Return, Target
from protocol.units import MIB, pages_of
from protocol.vocabulary import SWAP_FEATURE, Urgency

HOST = HostSnapshot(200, 20, (GuestSnapshot("a", 100, 20, 1000, 50),)).columns


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("not even that")


class NoPlan(Plan):
    @property
    def quota_pages(self) -> Any:  # type: ignore[override]
        raise KeyError("nothing here")


def raises(error: BaseException) -> MadeUp:
    def answer(*_: Any) -> Any:
        raise error

    return MadeUp(answer)


def of_too_much(host: HostColumns, memory: Any, now_s: float) -> Any:
    return decision(host, Plan(host.names, host.assigned_pages * 2))


def of_no_number(host: HostColumns, memory: Any, now_s: float) -> Any:
    return decision(host, Plan(host.names, np.full(len(host), np.nan)))  # type: ignore[arg-type]


def of_nobody(host: HostColumns, memory: Any, now_s: float) -> Any:
    return decision(host, Plan(("nobody",), np.array([1])))


BAD: list[tuple[MadeUp, str]] = [
    (raises(ValueError("no\nidea")), "it raised ValueError: no idea"),
    (raises(MemoryError()), "it raised MemoryError"),
    (raises(SystemExit(0)), "it raised SystemExit: 0"),
    (raises(GeneratorExit()), "it raised GeneratorExit"),
    (raises(Unprintable()), "it raised Unprintable"),
    (MadeUp(lambda *_: None), "it answered with NoneType and not with a Decision"),
    (MadeUp(of_too_much), "is to have more than its size"),
    (MadeUp(of_no_number), "its quotas are not whole numbers of pages, but float64"),
    (MadeUp(of_nobody), "its names are not those of the guests"),
    (MadeUp(lambda h, *_: decision(h, object.__new__(NoPlan))), "its answer is nonsense"),
]


@pytest.mark.parametrize(("policy", "message"), BAD)
def test_a_bad_answer_is_none_and_a_fault(
    policy: MadeUp, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    decider = Decider(policy)
    for number in (1, 2):
        assert decider.decide(HOST, 100.0 + number) is None
        assert decider.fault is not None
        assert message in decider.fault.text
        assert (decider.fault.since_s, decider.fault.times) == (101.0, number)
    (line,) = caplog.messages
    assert line.startswith("policy made-up: ")
    assert line.endswith("; the last plan stays")


@pytest.mark.parametrize(("policy", "message"), BAD)
def test_vms_are_safe_from_a_bad_answer(run: Run, policy: MadeUp, message: str) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        giver = rig.add("giver", 100 * MIB)
        rig.add("taker", 100 * MIB, quota_bytes=40 * MIB)
        line = await rig.connect(nursery, giver)
        rig.balancer.policy = plan_of({"giver": pages_of(92 * MIB), "taker": pages_of(48 * MIB)})
        rig.balancer.plan_once()
        await line.hear(Target)
        before = rig.balancer.plan
        rig.balancer.policy = policy
        rig.balancer.plan_once()
        assert rig.balancer.policy_fault is not None
        assert message in rig.balancer.policy_fault.text
        assert rig.balancer.plan.targets == before.targets
        assert giver.target_pages == pages_of(92 * MIB)
        rig.check_agreement()
        assert rig.balancer.lend(rig.balancer.guests["taker"], 256) == 256
        rig.check_agreement()

    run(body)


def test_the_same_fault_is_told_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answers: list[Any] = [None]
    decider = Decider(MadeUp(lambda host, *_: answers[0]))
    for second in range(int(TELL_AGAIN_S) + 1):
        decider.decide(HOST, float(second))
    assert len(caplog.messages) == 2
    answers[0] = decision(HOST, keep(HOST))
    assert decider.decide(HOST, 100.0) is not None
    assert decider.fault is None
    assert caplog.messages[-1] == "policy made-up answers well again"
    answers[0] = None
    decider.decide(HOST, 101.0)
    assert caplog.messages[-1].endswith("the last plan stays")


def test_a_memory_is_given_back_and_a_bad_answers_memory_is_not() -> None:
    seen: list[Any] = []

    def answer(host: HostColumns, memory: Any, now_s: float) -> Any:
        seen.append((memory, now_s))
        plan = None if len(seen) == 2 else keep(host)
        return decision(host, plan, memory=len(seen))

    decider = Decider(MadeUp(answer))
    for second in range(4):
        decider.decide(HOST, float(second))
    assert seen == [(None, 0.0), (1, 1.0), (1, 2.0), (3, 3.0)]


def test_another_policy_starts_without_the_memory_of_the_one_before(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        seen: list[Any] = []

        def answer(host: HostColumns, memory: Any, now_s: float) -> Any:
            seen.append(memory)
            return decision(host, keep(host), memory="mine")

        for _ in range(2):
            rig.balancer.use(MadeUp(answer))
            rig.balancer.plan_once()
            rig.balancer.plan_once()
        assert seen == [None, "mine", None, "mine"]

    run(body)


class Hanging:
    """Hangs in its thread until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.began = threading.Event()
        self.calls = 0
        self.policy = MadeUp(self.answer)

    def answer(self, host: HostColumns, memory: Any, now_s: float) -> Any:
        self.calls += 1
        self.began.set()
        assert self.go.wait(30)
        return decision(host, keep(host))

    async def wait_for_call(self) -> None:
        assert await trio.to_thread.run_sync(self.began.wait, 30)


async def until(
    condition: Callable[[], bool], clock: trio.testing.MockClock, jump_s: float
) -> None:
    """Threads take real time, and the loop's clock is moved on by hand."""
    real_deadline_s = time.monotonic() + 25
    while not condition():
        assert time.monotonic() < real_deadline_s
        clock.jump(jump_s)
        await trio.to_thread.run_sync(time.sleep, 0.002)


def test_a_policy_that_hangs_is_left_alone_until_it_comes_back(
    run: Run, clock: trio.testing.MockClock
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        giver = rig.add("giver", 100 * MIB)
        taker = rig.add("taker", 64 * MIB, quota_bytes=32 * MIB)
        line = await rig.connect(nursery, giver)
        await rig.connect(nursery, taker)
        rig.balancer.policy = plan_of({"taker": pages_of(48 * MIB)})
        rig.balancer.plan_once()
        hanging = Hanging()
        try:
            rig.balancer.use(hanging.policy, in_thread=True)
            nursery.start_soon(rig.balancer.run)
            await hanging.wait_for_call()
            # The loop goes on: dry guests are answered, and what the last plan wants is granted.
            assert rig.balancer.lend(taker, 256) == 256
            rig.balancer.grant_free()
            rig.check_agreement()
            await until(
                lambda: rig.balancer.policy_fault is not None, clock, DECIDE_DEADLINE_S / 10
            )
            assert rig.balancer.policy_fault is not None
            assert rig.balancer.policy_fault.text == "it has not answered within 1 s"
            for _ in range(3):
                plans = rig.balancer.plans_total
                await until(lambda plans=plans: rig.balancer.plans_total > plans, clock, 0.5)
            assert hanging.calls == 1
            assert "has not answered for" in rig.balancer.policy_fault.text
            assert await line.is_silent()
            assert taker.target_pages == pages_of(48 * MIB)
            rig.check_agreement()
        finally:
            hanging.go.set()
        await until(lambda: rig.balancer.policy_fault is None, clock, 0.5)
        assert hanging.calls >= 2

    run(body)


def test_guests_come_and_go_while_a_thread_decides(run: Run, clock: trio.testing.MockClock) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        stays = rig.add("stays", 64 * MIB, quota_bytes=32 * MIB)
        gone = rig.add("gone", 64 * MIB)
        await rig.connect(nursery, stays)
        hanging = Hanging()
        try:
            rig.balancer.use(hanging.policy, in_thread=True)
            nursery.start_soon(rig.balancer.run)
            await hanging.wait_for_call()
            rig.balancer.left(gone)
            spec = VmSpec.model_validate({"name": "new", "assigned_bytes": 64 * MIB})
            rig.ledger.admit("new", pages_of(64 * MIB), pages_of(spec.reservation_bytes), 1000)
            new = rig.balancer.guests["new"] = Guest(spec)
            stays.pinned_pages = pages_of(40 * MIB)
            plans = rig.balancer.plans_total
        finally:
            hanging.go.set()
        await until(lambda: rig.balancer.plans_total > plans, clock, 0.0)
        assert rig.balancer.policy_fault is None
        assert rig.balancer.plan.names == ("new", "stays")
        assert new.target_pages == pages_of(64 * MIB)
        assert rig.ledger.view("new").quota_pages == pages_of(64 * MIB)
        assert rig.ledger.view("stays").quota_pages == pages_of(40 * MIB)
        rig.ledger.check()

    run(body)


@pytest.mark.parametrize(("came", "left"), [(1, 0), (0, 1), (2, 1), (1, 2)])
def test_other_numbers_of_guests_come_and_go_while_a_thread_decides(
    run: Run, clock: trio.testing.MockClock, came: int, left: int
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        for name in ("gone0", "gone1", "stays"):
            rig.add(name, 32 * MIB)
        hanging = Hanging()
        try:
            rig.balancer.use(hanging.policy, in_thread=True)
            nursery.start_soon(rig.balancer.run)
            await hanging.wait_for_call()
            for number in range(left):
                rig.balancer.left(rig.balancer.guests[f"gone{number}"])
            for number in range(came):
                rig.add(f"new{number}", 32 * MIB)
            plans = rig.balancer.plans_total
        finally:
            hanging.go.set()
        await until(lambda: rig.balancer.plans_total > plans, clock, 0.0)
        names = tuple(sorted(rig.balancer.guests))
        assert rig.balancer.plan.names == names
        assert {record.vm for name in names for record in rig.balancer.log.of(name)} <= set(names)
        assert rig.balancer.log.of("stays")
        assert not any(rig.balancer.log.of(f"gone{number}") for number in range(left))
        rig.ledger.check()

    run(body)


def test_an_answer_for_a_policy_that_no_longer_decides_is_void(
    run: Run, clock: trio.testing.MockClock
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        rig.add("one", 64 * MIB, quota_bytes=32 * MIB)
        hanging = Hanging()
        try:
            rig.balancer.use(hanging.policy, in_thread=True)
            nursery.start_soon(rig.balancer.run)
            await hanging.wait_for_call()
            rig.balancer.use(plan_of({"one": pages_of(48 * MIB)}))
            await rig.balancer.plan_anew()
            assert rig.ledger.view("one").quota_pages == pages_of(48 * MIB)
            rig.balancer.replan()
        finally:
            hanging.go.set()
        plans = rig.balancer.plans_total
        await until(lambda: rig.balancer.plans_total > plans, clock, 0.5)
        # It wanted all to stay as it was when it was asked.
        decided = {record.target_pages for record in rig.balancer.log.of("one")}
        assert decided == {pages_of(48 * MIB)}

    run(body)


def test_in_a_thread_a_bad_answer_is_the_same_fault(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        for policy, message in BAD:
            decider = Decider(policy, in_thread=True)
            assert await decider.decide_in_thread(HOST, 1.0) is None
            assert decider.fault is not None
            assert message in decider.fault.text
        decider = Decider(Shares(), in_thread=True)
        assert await decider.decide_in_thread(HOST, 1.0) is not None

    run(body)


def test_whoever_asks_for_a_plan_in_a_thread_waits_for_it(
    run: Run, clock: trio.testing.MockClock
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        rig.add("one", 64 * MIB, quota_bytes=32 * MIB)
        nursery.start_soon(rig.balancer.run)

        async def plan() -> None:
            rig.balancer.use(plan_of({"one": pages_of(48 * MIB)}), in_thread=True)
            rig.balancer.plan_once()  # is soon, not now
            assert rig.ledger.view("one").quota_pages == pages_of(32 * MIB)
            await rig.balancer.plan_anew()
            planned.set()

        planned = trio.Event()
        nursery.start_soon(plan)
        await until(planned.is_set, clock, 0.001)
        assert rig.ledger.view("one").quota_pages == pages_of(48 * MIB)

    run(body)


@pytest.mark.parametrize(
    ("says", "urgency", "swap_pages", "detail"),
    [
        ({}, Urgency.CALM, 0, "calm"),
        ({"shortage_pages": 1}, Urgency.SHORT, 4096, "short"),
        ({"urgency": Urgency.SHORT}, Urgency.SHORT, 4096, "short"),
        ({"urgency": Urgency.CALM, "shortage_pages": 1}, Urgency.CALM, 0, "calm"),
        ({"may_swap": np.array([True])}, Urgency.CALM, 4096, "calm"),
        ({"may_swap": np.array([False]), "shortage_pages": 1}, Urgency.SHORT, 0, "short"),
        ({"reclaim_outside": np.array([True])}, Urgency.SHORT, 4096, "short, and not from outside"),
    ],
)
def test_how_a_plan_is_carried_out(
    run: Run, says: dict[str, Any], urgency: Urgency, swap_pages: int, detail: str
) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", 64 * MIB, swap_bytes=16 * MIB, balloon_may_swap=True)
        line = rig.dial(nursery, guest)
        await line.greet(guest.assigned_pages, features=(SWAP_FEATURE,))

        def answer(host: HostColumns, memory: Any, now_s: float) -> Any:
            return decision(host, Plan(host.names, host.quota_pages // 2, **says))

        rig.balancer.use(MadeUp(answer))
        rig.balancer.plan_once()
        target = await line.hear(Target)
        assert (target.urgency, target.swap_pages) == (urgency, swap_pages)
        assert rig.balancer.log.of("one")[0].deeds[0].detail.startswith(detail)

    run(body)


def test_a_loan_is_urgent_whatever_the_policy_says(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", 250 * MIB, quota_bytes=240 * MIB)
        line = await rig.connect(nursery, guest)
        assert rig.balancer.lend(guest, 256) == 256

        def answer(host: HostColumns, memory: Any, now_s: float) -> Any:
            return decision(host, Plan(host.names, host.quota_pages // 2, urgency=Urgency.CALM))

        await line.hear(Return)
        rig.balancer.use(MadeUp(answer))
        rig.balancer.plan_once()
        assert (await line.hear(Target)).urgency is Urgency.SHORT

    run(body)


def test_growth_that_is_blocked_reaches_dry_guests_only(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        guests = [rig.add(name, 64 * MIB, quota_bytes=32 * MIB) for name in ("calm", "dry")]
        guests[1].dry = True

        def answer(host: HostColumns, memory: Any, now_s: float) -> Any:
            wanted = host.quota_pages + pages_of(8 * MIB)
            return decision(host, Plan(host.names, wanted, block_growth=True))

        rig.balancer.use(MadeUp(answer))
        rig.balancer.plan_once()
        assert rig.ledger.view("calm").quota_pages == pages_of(32 * MIB)
        assert rig.ledger.view("dry").quota_pages == pages_of(40 * MIB)

    run(body)
