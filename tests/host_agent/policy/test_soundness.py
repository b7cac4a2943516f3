"""What is believed of a policy's answer, and a plan for a host that has changed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made_up_policies import decision, keep

from host_agent.ledger.columns import HostColumns
from host_agent.ledger.snapshot import GuestSnapshot, HostSnapshot
from host_agent.policy.plan import Plan
from host_agent.policy.soundness import UnsoundPlan, checked, fitted


def guest(name: str, quota: int = 50, **values: Any) -> GuestSnapshot:
    return GuestSnapshot(name, 100, 20, 1000, quota, **values)


def host(*guests: GuestSnapshot, pool: int = 200) -> HostColumns:
    return HostSnapshot(pool, 20, guests).columns


TWO = host(guest("a"), guest("b"))


def plan(*quotas: float, like: HostColumns = TWO, **values: Any) -> Plan:
    return Plan(like.names, np.array(quotas), **values)


@pytest.mark.parametrize("answer", [None, 7, "plan", keep(TWO), (keep(TWO), None, None)])
def test_what_is_no_decision_is_refused(answer: Any) -> None:
    with pytest.raises(UnsoundPlan, match="not with a Decision"):
        checked(TWO, answer)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "not with a Decision"),
        (plan(50), "one quota for each"),
        (plan(50, 50, 50), "one quota for each"),
        (plan(50.0, np.nan), "not whole numbers"),
        (Plan(TWO.names, [50, 50]), "one quota for each"),  # type: ignore[arg-type]
        (Plan(("a", "c"), np.array([50, 50])), "names"),
        (Plan(("b", "a"), np.array([50, 50])), "names"),
        (plan(50, 19), "b is to have less than its reservation"),
        (plan(101, 50), "a is to have more than its size"),
        (plan(-(2**63), 50), "less than its reservation"),
        (plan(100, 81), "add up to 181 pages, and there are 180"),
        (plan(10, 10), r"a is to have less than its reservation \(and 1 more\)"),
        (plan(50, 50, shortage_pages=-1), "shortage is negative"),
        (plan(50, 50, shortage_pages=10**400), "shortage is more than any host has"),
        (plan(50, 50, shortage_pages=0.5), "shortage is not a whole number"),
        (plan(50, 50, urgency="soon"), "urgency"),
        (plan(50, 50, may_swap=np.array([True])), "may_swap has not one value"),
        (plan(50, 50, reclaim_outside=np.array([1, 0])), "reclaim_outside is of the wrong type"),
        (plan(50, 50, entitled_pages=np.array([0.5, 1])), "entitled_pages is of the wrong type"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(UnsoundPlan, match=message):
        checked(TWO, decision(TWO, wrong))


def test_a_sum_that_overflows_is_no_small_sum() -> None:
    size = 2**62
    some = tuple(replace(guest(name), assigned_pages=size) for name in "abcd")
    with pytest.raises(UnsoundPlan, match="add up to"):
        checked(host(*some), decision(host(*some), plan(*[size] * 4, like=host(*some))))


def test_promises_and_what_cannot_be_moved_are_kept() -> None:
    like = host(guest("pinned", pinned_pages=30), guest("stuck", movable=False))
    for quotas, message in (((31, 50), "what the operator fixed"), ((30, 49), "can't be moved")):
        with pytest.raises(UnsoundPlan, match=message):
            checked(like, decision(like, plan(*quotas, like=like)))
    assert checked(like, decision(like, plan(30, 50, like=like))).plan.quota_pages.sum() == 80


def test_promises_may_exceed_what_there_is_and_so_may_what_is_there() -> None:
    tight = host(guest("a", 90), guest("b", 90), pool=120)
    # 180 of 100: less is a plan only down to what there is; all as it is, is one.
    checked(tight, decision(tight, keep(tight)))
    checked(tight, decision(tight, plan(50, 50, like=tight)))
    with pytest.raises(UnsoundPlan, match="add up to 179"):
        checked(tight, decision(tight, plan(90, 89, like=tight)))
    stuck = host(guest("a", 90, movable=False), guest("b", 90), pool=120)
    checked(stuck, decision(stuck, plan(90, 20, like=stuck)))
    with pytest.raises(UnsoundPlan, match="add up to 111 pages, and there are 110"):
        checked(stuck, decision(stuck, plan(90, 21, like=stuck)))


def test_who_answered_cannot_change_it_later() -> None:
    quotas, swap = np.array([50, 50]), np.array([True, False])
    believed = checked(TWO, decision(TWO, Plan(TWO.names, quotas, may_swap=swap), memory="m"))
    quotas[0], swap[0] = 10**9, False
    assert believed.plan.quota_pages.tolist() == [50, 50]
    assert believed.plan.may_swap is not None
    assert believed.plan.may_swap.tolist() == [True, False]
    assert believed.memory == "m"


class TestFitted:
    def test_the_same_host_changes_nothing(self) -> None:
        wanted = plan(40, 60, shortage_pages=3, may_swap=np.array([True, False]))
        now = fitted(wanted, TWO)
        assert now.targets == wanted.targets
        assert (now.shortage_pages, now.may_swap) == (3, wanted.may_swap)

    def test_who_left_is_gone_and_who_came_gets_what_is_free(self) -> None:
        wanted = plan(40, 60, may_swap=np.array([False, True]))
        now = fitted(wanted, host(guest("b"), guest("c", 0), guest("d", 0, startup_pages=30)))
        # 200 - 20 - 50 = 130 are free.
        assert [(t.name, t.quota_pages) for t in now.targets] == [("b", 60), ("c", 100), ("d", 30)]
        assert now.may_swap is not None
        assert now.may_swap.tolist() == [True, False, False]

    def test_nothing_is_free_for_who_came_but_its_reservation_was_promised(self) -> None:
        now = fitted(plan(90, 90), host(guest("a", 90), guest("b", 90), guest("c", 0)))
        assert [t.quota_pages for t in now.targets] == [90, 90, 20]

    def test_without_any_plan_everybody_keeps_what_it_has(self) -> None:
        nobody = Plan((), np.array([], np.int64))
        full = host(guest("a", 90), guest("b", 90))
        assert fitted(nobody, full).quota_pages.tolist() == [90, 90]

    def test_promises_made_since_hold(self) -> None:
        now = host(
            guest("a", pinned_pages=70), replace(guest("b"), reservation_pages=65, quota_pages=66)
        )
        assert fitted(plan(40, 60), now).quota_pages.tolist() == [70, 65]
        stuck = host(guest("a", movable=False), guest("b", 50))
        assert fitted(plan(40, 60), stuck).quota_pages.tolist() == [50, 60]

    def test_a_smaller_namesake_that_cannot_be_moved_gets_its_size_at_most(self) -> None:
        smaller = replace(guest("a", 20, movable=False), assigned_pages=30, reservation_pages=10)
        assert fitted(plan(90, 60), host(smaller, guest("b"))).quota_pages.tolist() == [30, 60]
