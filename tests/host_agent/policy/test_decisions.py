"""The log of decisions: one record a target, with its reason and what came of it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.ledger.columns import HostColumns
from host_agent.ledger.snapshot import GuestSnapshot, HostSnapshot
from host_agent.policy.decisions import KEPT_DEEDS, KEPT_RECORDS, NOTEWORTHY_PAGES, DecisionLog
from host_agent.policy.explain import Details, Explanation, Term
from host_agent.policy.interface import Decision
from host_agent.policy.plan import Plan

STEP = NOTEWORTHY_PAGES


def host(**quotas: int) -> HostColumns:
    some = tuple(GuestSnapshot(name, 10**6, 0, 1000, quota) for name, quota in quotas.items())
    return HostSnapshot(10**7, 0, some).columns


def decision(like: HostColumns, *wanted: int, term: Any = 0) -> Decision:
    details = Details(
        host=(("said", term, ""),),
        guests=(("quota", like.quota_pages, "pages"), ("demand", like.demand_pages, "pages")),
        rules=((like.quota_pages > STEP, "large"),),
        otherwise="small",
    )
    plan = Plan(like.names, np.array(wanted, np.int64))
    return Decision(plan, None, Explanation(like.names, lambda: details))


TWO = host(a=STEP, b=2 * STEP)


def test_a_record_says_what_when_and_why() -> None:
    log = DecisionLog()
    log.decided("p", TWO, decision(TWO, 3 * STEP, 2 * STEP, term="first"), 10.0)
    log.decided("p", TWO, decision(TWO, 3 * STEP, 2 * STEP, term="last"), 11.0)
    (record,) = log.of("a")
    assert (record.vm, record.policy, record.first_s, record.last_s) == ("a", "p", 10.0, 11.0)
    assert (record.times, record.quota_pages, record.target_pages) == (2, STEP, 3 * STEP)
    assert record.why.rule == "small"
    assert record.last_why.terms[0] == Term("said", "last")
    assert record.why.terms == (
        Term("said", "first"),
        Term("quota", STEP, "pages"),
        Term("demand", None, "pages"),
    )
    assert log.of("b")[0].why.rule == "large"
    assert log.of("nobody") == ()


def test_only_another_target_opens_another_record() -> None:
    log = DecisionLog()
    wanted = [5 * STEP, 5 * STEP + STEP - 1, 6 * STEP, 6 * STEP - (STEP - 1), 5 * STEP]
    for number, pages in enumerate(wanted):
        log.decided("p", TWO, decision(TWO, pages, 0, term=number), float(number))
    newest, middle, oldest = log.of("a")
    assert (oldest.target_pages, oldest.times, oldest.last_why.terms[0].value) == (wanted[1], 2, 1)
    assert (middle.target_pages, middle.times, middle.last_why.terms[0].value) == (wanted[3], 2, 3)
    assert (newest.target_pages, newest.times, newest.first_s) == (wanted[4], 1, 4.0)
    assert [record.why.terms[0].value for record in log.of("a")] == [4, 2, 0]
    (steady,) = log.of("b")
    assert (steady.times, steady.first_s, steady.last_s) == (5, 0.0, 4.0)


def test_another_policy_opens_a_record_for_everybody() -> None:
    log = DecisionLog()
    log.decided("one", TWO, decision(TWO, 1, 2), 0.0)
    log.decided("two", TWO, decision(TWO, 1, 2), 1.0)
    assert [record.policy for record in log.of("a")] == ["two", "one"]
    assert [record.times for record in log.of("b")] == [1, 1]


def test_guests_come_and_go() -> None:
    log = DecisionLog()
    log.decided("p", TWO, decision(TWO, 1, 2), 0.0)
    three = host(a=STEP, b=STEP, c=STEP)
    log.decided("p", three, decision(three, 1, 2, 3), 1.0)
    assert [len(log.of(name)) for name in "abc"] == [1, 1, 1]
    log.forget("b")
    log.forget("b")
    assert log.of("b") == ()
    log.decided("p", three, decision(three, 1, 2, 3), 2.0)
    assert [(r.first_s, r.target_pages) for r in log.of("b")] == [(2.0, 2)]
    assert [r.times for r in log.of("a")] == [3]
    fewer = host(b=STEP)
    log.decided("p", fewer, decision(fewer, 2), 3.0)
    assert log.of("a")[0].target_pages == 1  # not forgotten yet, and no longer decided about


def test_what_was_done_stands_with_the_decision_that_wanted_it() -> None:
    log = DecisionLog()
    log.done("a", "granted", 5, 0.0)  # before anything was decided about it
    log.decided("p", TWO, decision(TWO, 3 * STEP, 0), 1.0)
    log.done("a", "asked", 7, 1.0, "calm")
    log.done("a", "refused", 0, 1.5, "swap")
    log.done("a", "refused", 0, 2.5, "swap")
    log.done("a", "refused", 0, 3.5, "pressure")
    log.decided("p", TWO, decision(TWO, 9 * STEP, 0), 4.0)
    log.done("a", "claimed", 3, 5.0)
    log.done("a", "claimed", 4, 6.0)
    newest, oldest = log.of("a")
    assert [(d.what, d.pages, d.times, d.detail) for d in oldest.deeds] == [
        ("asked", 7, 1, "calm"),
        ("refused", 0, 2, "swap"),
        ("refused", 0, 1, "pressure"),
    ]
    assert (oldest.deeds[1].first_s, oldest.deeds[1].last_s) == (1.5, 2.5)
    assert [(d.what, d.pages, d.times) for d in newest.deeds] == [("claimed", 7, 2)]


def test_everything_is_bounded() -> None:
    log = DecisionLog()
    for number in range(3 * KEPT_RECORDS):
        log.decided("p", TWO, decision(TWO, number * STEP, 0), float(number))
        for deed in range(3 * KEPT_DEEDS):
            log.done("a", "asked" if deed % 2 else "refused", deed, float(number))
    assert len(log.of("a")) == KEPT_RECORDS
    assert log.of("a")[0].first_s == 3 * KEPT_RECORDS - 1
    assert all(len(record.deeds) == KEPT_DEEDS for record in log.of("a"))
    assert log.of("a")[0].deeds[-1].pages == 3 * KEPT_DEEDS - 1


def test_nothing_is_put_in_words_before_somebody_asks() -> None:
    asked = []

    def make() -> Details:
        asked.append(1)
        return Details(otherwise="because")

    log = DecisionLog()
    for number in range(50):
        plan = Plan(TWO.names, np.array([number * STEP, 0]))
        log.decided("p", TWO, Decision(plan, None, Explanation(TWO.names, make)), float(number))
    assert asked == []
    (record,) = log.of("b")
    assert asked == []
    assert record.why.rule == record.last_why.rule == "because"
    assert asked == [1, 1]  # of the first and of the last decision


def test_who_is_not_there_has_no_explanation() -> None:
    with pytest.raises(KeyError):
        decision(TWO, 1, 2).why.of("c")


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 4), min_size=1)))
def test_the_newest_record_is_the_latest_plan(plans: list[dict[str, int]]) -> None:
    log = DecisionLog()
    for number, wanted in enumerate(plans):
        like = host(**dict.fromkeys(wanted, 1))
        pages = [wanted[name] * STEP for name in like.names]
        log.decided("p", like, decision(like, *pages), float(number))
        for name, steps in wanted.items():
            newest = log.of(name)[0]
            assert (newest.target_pages, newest.last_s) == (steps * STEP, number)
