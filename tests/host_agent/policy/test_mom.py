"""MOM by hand: both branches, the critical one, and what ends growth."""

import pytest
from mib_hosts import carried_out, decide, host, mib, pages, rule, term, vm

from host_agent.policy.interface import Memory
from host_agent.policy.mom import Mom, MomSettings
from protocol.vocabulary import Urgency

MOM = Mom()


def test_below_20_percent_all_shrink() -> None:
    # h = (1000 - 900) / 1000 = 0.10, g = 0.10
    #   a: max(0.95 * 500, max(100, 100 + 50)) = max(475, 150) = 475
    #   b: max(0.95 * 300, max(100, 260 + 30)) = max(285, 290) = 290
    #   c: 95 + 10 = 105 is more than it has: it is not to grow now
    decision = decide(
        MOM,
        host(
            1000,
            vm("a", 600, 500, least=100, used=100),
            vm("b", 400, 300, least=100, used=260),
            vm("c", 200, 100, least=50, used=95),
        ),
    )
    assert mib(decision.plan) == {"a": 475, "b": 290, "c": 100}
    assert term(decision, "a", "host free") == 0.1
    assert term(decision, "a", "guest free") == pytest.approx(0.1)
    assert rule(decision, "a") == "the host is short of free memory: all shrink"
    assert rule(decision, "c") == "the change is too small to be worth it"
    assert decision.plan.urgency is Urgency.SHORT
    assert decision.plan.may_swap is None


def test_at_5_percent_they_shrink_below_what_they_use() -> None:
    # h = 40 / 1000 = 0.04, g = 0.04 - 0.05 = -0.01
    #   a: max(0.95 * 560, max(100, 550 - 5.6)) = max(532, 544.4) = 544.4
    #   b: max(0.95 * 400, max(390, 390 - 4)) = 390, its minimum
    decision = decide(
        MOM,
        host(1000, vm("a", 600, 560, least=100, used=550), vm("b", 600, 400, least=390, used=390)),
    )
    assert mib(decision.plan) == {"a": pages(544.4) / 256, "b": 390}
    assert rule(decision, "a") == "memory is critically short: it shrinks into swapping"
    assert decision.plan.may_swap is not None
    assert decision.plan.may_swap.tolist() == [True, True]


def test_above_20_percent_all_grow() -> None:
    # h = 400 / 1000 = 0.40
    #   a: max(1.05 * 300, max(100, 100 + 60)) = 315
    #   b: max(1.05 * 300, max(100, 290 + 60)) = 350
    decision = decide(
        MOM,
        host(1000, vm("a", 512, 300, least=100, used=100), vm("b", 512, 300, least=100, used=290)),
    )
    assert mib(decision.plan) == {"a": 315, "b": 350}
    assert rule(decision, "a") == "the host has free memory: all grow"


def test_growth_ends_at_the_threshold_and_at_the_maximum() -> None:
    # h = 210 / 1000. Growth of 26.5 and 13 would leave 170.5; 10 may go until 200 are left.
    # By equal shares one level for both: b reaches its 273 first... a has more than that already.
    decision = decide(
        MOM,
        host(
            1000,
            vm("a", 600, 530, least=100, used=100),
            vm("b", 600, 260, least=100, used=100),
        ),
    )
    assert mib(decision.plan) == {"a": 530, "b": 270}
    assert rule(decision, "a") == "cut: growth ends at the pressure threshold"
    full = decide(MOM, host(1000, vm("a", 310, 300, least=100, used=100)))
    assert mib(full.plan) == {"a": 310}


def test_a_quarter_of_a_percent_is_not_worth_it() -> None:
    # 511 of at most 512: 1 <= 0.0025 * 511 = 1.28
    decision = decide(MOM, host(1000, vm("a", 512, 511, least=100, used=100)))
    assert mib(decision.plan) == {"a": 511}
    assert rule(decision, "a") == "the change is too small to be worth it"


def test_who_does_not_say_what_it_uses_is_left_alone() -> None:
    decision = decide(MOM, host(1000, vm("a", 600, 500), vm("b", 600, 450, used=100)))
    assert mib(decision.plan) == {"a": 500, "b": 427.5}
    assert rule(decision, "a") == "how much it uses is unknown: it is left alone"


def test_between_runs_no_step_is_added() -> None:
    first = decide(MOM, host(1000, vm("a", 900, 900, used=100)), None, 0.0)
    assert mib(first.plan) == {"a": 855}
    halfway = host(1000, vm("a", 900, 870, used=100))
    second = decide(MOM, halfway, first.memory, 9.9)
    assert mib(second.plan) == {"a": 855}
    assert rule(second, "a") == "between two runs: what the last one wanted"
    # 0.95 * 870 = 826.5
    assert mib(decide(MOM, halfway, second.memory, 10.0).plan) == {"a": 826.5}


def test_it_comes_to_rest_at_the_threshold() -> None:
    snapshot = host(1000, vm("a", 900, 500, used=50), vm("b", 900, 480, used=50))
    memory: Memory = None
    for number in range(12):
        decision = decide(MOM, snapshot, memory, 10.0 * number)
        snapshot, memory = carried_out(snapshot, decision.plan), decision.memory
    assert sum(mib(decision.plan).values()) == pytest.approx(800, abs=1 / 128)


@pytest.mark.parametrize(
    "wrong",
    [
        {"pressure_threshold": 1.0},
        {"pressure_critical": 0.3},
        {"max_change": -0.1},
        {"interval_s": -1.0},
    ],
)
def test_settings_out_of_bounds_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must|can't"):
        MomSettings(**wrong)
