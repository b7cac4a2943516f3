"""ESX by hand: the idle tax, the balloon's 65 %, the states and their two directions."""

import math

import pytest
from mib_hosts import decide, host, mib, pages, rule, term, vm

from host_agent.ledger.snapshot import HostSnapshot
from host_agent.policy.esx import Esx, EsxSettings, HostState, next_state
from host_agent.policy.interface import Decision

ESX = Esx()
HOST_MIB = 28 * 1024  # minFree: 899 MiB


def test_idle_pages_are_dearer_than_active_ones() -> None:
    # Equal shares; a is idle, b is active. k = 1 / (1 - 0.75) = 4.
    #   rho_a = 1000 / (20000 * (0 + 4 * 1)) = 0.0125 per MiB, rho_b = 1000 / 8500 = 0.1176
    # free = 28672 - 28500 = 172 MiB = 19.1 % of 899: below 32 %, hard.
    # Entitled are all together to 28672 - 899 = 27773. Equal rho: b has 4 times what a has.
    #   a = 27773 / 5 = 5554.6,  b = 27773 * 4 / 5 = 22218.4
    decision = decide(
        ESX,
        host(
            HOST_MIB,
            vm("a", HOST_MIB, 20000, active_fraction=0.0, demand=1000),
            vm("b", HOST_MIB, 8500, active_fraction=1.0, demand=28000),
        ),
    )
    assert mib(decision.plan) == {
        "a": pytest.approx(5554.6, abs=0.005),
        "b": pytest.approx(22218.4, abs=0.005),
    }
    assert sum(mib(decision.plan).values()) == 27773
    assert term(decision, "a", "state") == "hard"
    assert term(decision, "a", "rho") == pytest.approx(0.0125 / 256)
    assert term(decision, "b", "rho") == pytest.approx(1000 / 8500 / 256)
    assert rule(decision, "a") == "its rho is the lowest: it gives down to the common level"
    assert rule(decision, "b") == "it grows to what it is entitled to"
    # In hard it may be taken from outside, and only from who has too much.
    assert decision.plan.reclaim_outside is not None
    assert decision.plan.reclaim_outside.tolist() == [True, False]
    assert decision.plan.may_swap is decision.plan.reclaim_outside


def test_without_a_tax_shares_alone_count() -> None:
    # k = 1: rho = S / P whatever is idle; 2000 : 1000 shares of 27773 are 18515.3 and 9257.7.
    decision = decide(
        Esx(EsxSettings(idle_tax=0.0)),
        host(
            HOST_MIB,
            vm("a", HOST_MIB, 20000, active_fraction=0.0, shares=2000),
            vm("b", HOST_MIB, 8500, active_fraction=1.0, demand=28000),
        ),
    )
    assert mib(decision.plan) == {
        "a": pytest.approx(18515.33, abs=0.005),
        "b": pytest.approx(9257.67, abs=0.005),
    }


def test_the_balloon_takes_at_most_65_percent_in_soft() -> None:
    # free = 28672 - 28272 = 400 MiB = 44.5 % of 899: below 64 %, soft.
    # Of 27773, a would get a fifth, 5554.6; but its balloon ends at 65 % of 16000 = 10400,
    # which leaves it 5600. b gets the rest: 27773 - 5600 = 22173, and needs 24000.
    snapshot = host(
        HOST_MIB,
        vm("a", 16000, 16000, active_fraction=0.0, demand=1000),
        vm("b", 24000, 12272, active_fraction=1.0, demand=24000),
    )
    decision = decide(ESX, snapshot)
    assert mib(decision.plan) == {"a": 5600, "b": 22173}
    assert term(decision, "a", "state") == "soft"
    assert rule(decision, "a") == "down to what may be taken from it"
    assert decision.plan.may_swap is None
    # More is needed than the host less minFree has: 1000 + 24000 of 27773 is not.
    assert decision.plan.shortage_pages == 0


def test_in_high_and_clear_nothing_is_taken_and_growth_comes_out_of_what_is_free() -> None:
    # free = 28672 - 27972 = 700 MiB = 77.9 % of 899: clear. a keeps what it doesn't need; b may
    # grow to what it is entitled to, of which 700 MiB are there.
    decision = decide(
        ESX,
        host(
            HOST_MIB,
            vm("a", HOST_MIB, 20000, active_fraction=0.0, demand=1000),
            vm("b", HOST_MIB, 7972, active_fraction=1.0, demand=28000),
        ),
    )
    assert term(decision, "a", "state") == "clear"
    assert mib(decision.plan) == {"a": 20000, "b": 8672}
    assert rule(decision, "a") == "it has more than entitled, but the host has free memory"
    assert rule(decision, "b").startswith("cut: it may grow only as far as pool minus reserve")


def test_in_low_nobody_grows_but_who_runs_dry() -> None:
    # free = 100 MiB = 11.1 % of 899: below 16 %, low. Entitled: 27773 among four with equal rho:
    # the three active ones 4 parts of 13 each (8545.5), the idle one 1 of 13 (2136.4).
    others = {"active_fraction": 1.0, "demand": 10000}
    decision = decide(
        ESX,
        host(
            HOST_MIB,
            vm("dry", HOST_MIB, 4000, dry=True, **others),
            vm("grows", HOST_MIB, 4000, **others),
            vm("idle", HOST_MIB, 16572, active_fraction=0.0, demand=1000),
            vm("starts", HOST_MIB, 4000, least=4100, **others),
        ),
    )
    assert term(decision, "dry", "state") == "low"
    assert decision.plan.block_growth
    assert mib(decision.plan) == {
        "dry": pytest.approx(8545.54, abs=0.005),
        "grows": 4000,
        "idle": pytest.approx(2136.38, abs=0.005),
        "starts": 4100,  # to its reservation, which is a promise
    }
    assert rule(decision, "grows") == "low: nobody grows"


def test_a_limit_of_its_own_bounds_a_guest() -> None:
    decision = decide(
        ESX, host(HOST_MIB, vm("a", 8000, 1000, demand=6000, maximum_pages=pages(3000)))
    )
    assert mib(decision.plan) == {"a": 3000}


@pytest.mark.parametrize(
    ("state", "percent", "then"),
    [
        (HostState.HIGH, 100, HostState.HIGH),
        (HostState.HIGH, 99, HostState.CLEAR),
        (HostState.HIGH, 64, HostState.CLEAR),
        (HostState.HIGH, 63, HostState.SOFT),
        (HostState.HIGH, 31, HostState.HARD),
        (HostState.HIGH, 15, HostState.LOW),
        (HostState.HIGH, -1, HostState.LOW),
        (HostState.CLEAR, 399, HostState.CLEAR),
        (HostState.CLEAR, 400, HostState.HIGH),
        (HostState.SOFT, 64, HostState.SOFT),
        (HostState.SOFT, 99, HostState.SOFT),
        (HostState.SOFT, 100, HostState.CLEAR),
        (HostState.SOFT, 400, HostState.HIGH),
        (HostState.HARD, 32, HostState.HARD),
        (HostState.HARD, 63, HostState.HARD),
        (HostState.HARD, 64, HostState.SOFT),
        (HostState.LOW, 16, HostState.LOW),
        (HostState.LOW, 31, HostState.LOW),
        (HostState.LOW, 32, HostState.HARD),
    ],
)
def test_a_state_is_entered_at_its_own_bound_and_left_at_the_next_better_ones(
    state: HostState, percent: int, then: HostState
) -> None:
    assert next_state(state, 10 * percent, 1000) is then


def test_the_state_is_remembered() -> None:
    # soft at 44.5 %; then 700 free MiB = 77.9 %: still soft, since clear begins at 100 % upward.
    def at(quota: float) -> HostSnapshot:
        return host(HOST_MIB, vm("a", HOST_MIB, quota, demand=quota))

    first = decide(ESX, at(28272))
    second = decide(ESX, at(27972), first.memory)
    third = decide(ESX, at(27772), second.memory)
    states = [term(one, "a", "state") for one in (first, second, third)]
    assert states == ["soft", "soft", "clear"]


@pytest.mark.parametrize(
    ("pool_mib", "settings", "min_free_mib"),
    [
        (28 * 1024, EsxSettings(), 899),
        # 899 + 1 % of 72 GiB, 737.28
        (100 * 1024, EsxSettings(), 1636.28),
        (14 * 1024, EsxSettings(), 449.5),
        (14 * 1024, EsxSettings(scale_min_free=False), 899),
    ],
)
def test_min_free(pool_mib: int, settings: EsxSettings, min_free_mib: float) -> None:
    found = Esx(settings).min_free_pages(host(pool_mib).columns)
    assert found == math.floor(min_free_mib * 256)


def test_the_larger_of_a_slow_and_a_fast_average_counts() -> None:
    def at(active: float | None) -> HostSnapshot:
        return host(1000, vm("a", 500, 400, active_fraction=active))

    def f(decision: Decision) -> list[float]:
        return [term(decision, "a", name) for name in ("f fast", "f slow", "f")]

    first = decide(ESX, at(0.2), None, 0.0)
    assert f(first) == [0.2, 0.2, 0.2]
    # 10 s later all of it is active:
    #   fast = 0.2 + 0.8 * (1 - e^-1)     = 0.2 + 0.8 * 0.63212 = 0.70570
    #   slow = 0.2 + 0.8 * (1 - e^(-1/6)) = 0.2 + 0.8 * 0.15352 = 0.32281
    second = decide(ESX, at(1.0), first.memory, 10.0)
    assert f(second) == pytest.approx([0.70570, 0.32281, 0.70570], abs=1e-5)
    # 60 s later nothing is: fast = 0.70570 * e^-6 = 0.00175, slow = 0.32281 * e^-1 = 0.11876
    third = decide(ESX, at(0.0), second.memory, 70.0)
    assert f(third) == pytest.approx([0.00175, 0.11876, 0.11876], abs=1e-5)
    # Unknown: as it was.
    fourth = decide(ESX, at(None), third.memory, 80.0)
    assert f(fourth) == f(third)


def test_the_active_part_is_guessed_by_the_working_set_and_else_all() -> None:
    decision = decide(
        ESX,
        host(
            1000,
            vm("guessed", 500, 400, working_set_pages=pages(100)),
            vm("unknown", 500, 400),
        ),
    )
    assert term(decision, "guessed", "f") == 0.25
    assert term(decision, "unknown", "f") == 1.0
    assert term(decision, "unknown", "f fast") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"idle_tax": 1.0},
        {"idle_tax": -0.1},
        {"balloon_max_percent": 101.0},
        {"fast_s": 0.0},
        {"fast_s": 70.0},
    ],
)
def test_settings_out_of_bounds_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        EsxSettings(**wrong)  # type: ignore[arg-type]
