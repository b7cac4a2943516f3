"""What `explain` knows: each step of a move stands with the decision that wanted it."""

import trio
import trio.testing
from host_rig import Rig, Run, plan_of, vitals_of

from host_agent.facade.port import VmSpec
from host_agent.guest import Guest, Phase
from host_agent.observing import observe
from protocol.messages import Offer, Refusal, Target
from protocol.units import MIB, pages_of
from protocol.vocabulary import RefusalReason


def deeds(rig: Rig, name: str) -> list[tuple[str, int, str]]:
    return [(deed.what, deed.pages, deed.detail) for deed in rig.balancer.log.of(name)[0].deeds]


def test_a_refusal_stands_there_with_the_drivers_reason(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", 64 * MIB)
        line = await rig.connect(nursery, guest)
        rig.balancer.policy = plan_of({"one": pages_of(32 * MIB)})
        rig.balancer.plan_once()
        target = await line.hear(Target)
        await line.say(Refusal(target.target_id, RefusalReason.WORKING_SET, "it is in use"))
        await rig.settle()
        assert deeds(rig, "one") == [
            ("asked", pages_of(32 * MIB), "calm"),
            ("refused", 0, "working_set: it is in use"),
        ]

    run(body)


def test_a_move_stands_there_on_both_sides(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        giver = rig.add("giver", 200 * MIB)
        rig.add("taker", 64 * MIB, quota_bytes=40 * MIB)
        line = await rig.connect(nursery, giver)
        rig.balancer.policy = plan_of({"giver": pages_of(192 * MIB), "taker": pages_of(48 * MIB)})
        rig.balancer.plan_once()
        target = await line.hear(Target)
        await line.give(target, pages_of(8 * MIB))
        await rig.settle()
        step = pages_of(8 * MIB)
        assert deeds(rig, "giver") == [
            ("asked", step, "calm"),
            ("offered", step, ""),
            ("claimed", step, ""),
        ]
        assert deeds(rig, "taker") == [("granted", step, "")]

    run(body)


def test_less_is_offered_with_the_reason_and_a_loan_is_seen(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", 250 * MIB, quota_bytes=240 * MIB)
        line = await rig.connect(nursery, guest)
        rig.balancer.policy = plan_of({"one": pages_of(200 * MIB)})
        rig.balancer.plan_once()
        target = await line.hear(Target)
        await line.say(Offer(target.target_id, 256, RefusalReason.PRESSURE, "some"))
        await rig.settle()
        assert deeds(rig, "one")[1] == ("offered", 256, "pressure: some")
        assert rig.balancer.lend(guest, 512) == 512
        assert ("lent", 512, "") in deeds(rig, "one")

    run(body)


def test_a_policy_is_told_the_guests_range_and_buffer() -> None:
    values = {"name": "one", "assigned_bytes": 64 * MIB, "maximum_bytes": 48 * MIB}
    spec = VmSpec.model_validate({**values, "startup_bytes": 32 * MIB, "buffer_percent": 5})
    for phase in (Phase.PENDING, Phase.RUNNING):
        seen = observe(Guest(spec, phase=phase), 0, 1.0)
        assert (seen.maximum_pages, seen.startup_pages) == (pages_of(48 * MIB), pages_of(32 * MIB))
        assert (seen.buffer_percent, seen.inaccuracy_pages, seen.has_driver) == (5.0, 1, False)


def test_what_left_is_forgotten(run: Run) -> None:
    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        guest = rig.add("one", 64 * MIB)
        line = await rig.connect(nursery, guest)
        await line.say(vitals_of(20 * MIB))
        await rig.settle()
        rig.balancer.plan_once()
        (record,) = rig.balancer.log.of("one")
        terms = {term.name: term.value for term in record.why.terms}
        assert record.policy == "shares"
        assert terms["demand"] == pages_of(20 * MIB)
        assert terms["spare"] is None
        rig.balancer.left(guest)
        assert rig.balancer.log.of("one") == ()

    run(body)
