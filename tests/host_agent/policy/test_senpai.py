"""senpai by hand: how far it backs off and how far it probes, and what counts as a stall."""

from typing import Any

import pytest
from mib_hosts import decide, host, mib, pages, rule, term, vm

from host_agent.ledger.snapshot import HostSnapshot
from host_agent.policy.senpai import Senpai, SenpaiSettings
from protocol.vocabulary import Urgency

SENPAI = Senpai()


def at(quota: float, stall_s: float | None = None, **others: Any) -> HostSnapshot:
    return host(4000, vm("a", 4000, quota, pressure_some_total_s=stall_s, **others))


@pytest.mark.parametrize(
    ("stall_s", "wanted"),
    [
        # err = 0.2 / 0.01 = 20: adj = (20 / 20)^2 = 1
        (0.2, 2000),
        # err = 10: adj = 0.25
        (0.1, 1250),
        # err = 2: adj = 0.01
        (0.02, 1010),
        # err = 100: at most 1
        (1.0, 2000),
        # not above the target, and 6 s have not passed
        (0.01, 1000),
    ],
)
def test_it_backs_off_by_the_square_of_the_error(stall_s: float, wanted: float) -> None:
    first = decide(SENPAI, at(1000, 5.0), None, 0.0)
    assert mib(first.plan) == {"a": 1000}
    assert rule(first, "a") == "the next probe is not due yet"
    second = decide(SENPAI, at(1000, 5.0 + stall_s), first.memory, 2.0)
    assert mib(second.plan)["a"] == pytest.approx(wanted, abs=1 / 128)


@pytest.mark.parametrize(
    ("stall_s", "wanted"),
    [
        # err = 0.01 / 0.001 = 10: adj = (10 / 10)^2 * 0.01
        (0.001, 990),
        # err = 2: adj = 0.04 * 0.01
        (0.005, 999.6),
        # at least a microsecond: at most 0.01
        (0.0, 990),
    ],
)
def test_it_probes_by_the_square_of_the_error(stall_s: float, wanted: float) -> None:
    first = decide(SENPAI, at(1000, 5.0), None, 0.0)
    early = decide(SENPAI, at(1000, 5.0 + stall_s), first.memory, 5.9)
    assert mib(early.plan) == {"a": 1000}
    second = decide(SENPAI, at(1000, 5.0 + stall_s), early.memory, 6.0)
    assert mib(second.plan)["a"] == pytest.approx(wanted, abs=1 / 128)
    assert rule(second, "a") == "it stalls for less than what is aimed at: probe"
    assert second.plan.urgency is Urgency.SHORT


def test_the_integral_begins_anew_after_a_change() -> None:
    memory = decide(SENPAI, at(1000, 0.0), None, 0.0).memory
    memory = decide(SENPAI, at(1000, 0.008), memory, 1.0).memory
    # 8 ms and 8 ms are more than 10: err = 1.6, adj = (1.6 / 20)^2 = 0.0064
    backed_off = decide(SENPAI, at(1000, 0.016), memory, 2.0)
    assert term(backed_off, "a", "integral") == pytest.approx(0.016)
    assert mib(backed_off.plan)["a"] == pytest.approx(1006.4, abs=1 / 128)
    after = decide(SENPAI, at(1006.4, 0.016), backed_off.memory, 3.0)
    assert term(after, "a", "integral") == 0
    # And the next probe is an interval away.
    assert term(after, "a", "next probe in") == 5.0


def test_a_probe_that_was_not_reached_is_wanted_further_and_no_step_added() -> None:
    memory = decide(SENPAI, at(1000, 0.0), None, 0.0).memory
    probe = decide(SENPAI, at(1000, 0.0), memory, 6.0)
    again = decide(SENPAI, at(995, 0.0), probe.memory, 7.0)
    assert mib(probe.plan) == mib(again.plan) == {"a": 990}
    assert rule(again, "a") == "on its way to what was wanted last"


def test_without_psi_pages_that_are_read_again_count() -> None:
    # 1000 pages * 100 us = 0.1 s: err = 10, adj = 0.25
    first = decide(SENPAI, at(1000, refault_pages_total=5000), None, 0.0)
    second = decide(SENPAI, at(1000, refault_pages_total=6000), first.memory, 1.0)
    assert mib(second.plan) == {"a": 1250}
    assert term(second, "a", "stall is measured") is False


def test_a_measure_is_not_compared_with_an_estimate() -> None:
    first = decide(SENPAI, at(1000, refault_pages_total=0), None, 0.0)
    second = decide(SENPAI, at(1000, 50.0, refault_pages_total=0), first.memory, 1.0)
    assert mib(second.plan) == {"a": 1000}


def test_a_dry_guest_stalls_all_the_time() -> None:
    # 0.1 s: err = 10, adj = 0.25, though nothing is known of it
    first = decide(SENPAI, at(1000), None, 0.0)
    assert rule(first, "a") == "how long it stalls is unknown: it is left alone"
    second = decide(SENPAI, at(1000, dry=True), first.memory, 0.1)
    assert mib(second.plan)["a"] == pytest.approx(1250, abs=1 / 128)


def test_of_whom_nothing_is_known_is_left_alone() -> None:
    memory = decide(SENPAI, at(1000), None, 0.0).memory
    assert mib(decide(SENPAI, at(1000), memory, 60.0).plan) == {"a": 1000}


def test_growth_ends_where_the_pool_ends_and_probing_at_the_reservation() -> None:
    guests = at(1000, 0.0), at(1000, 1.0)
    small = [HostSnapshot(pages(1600), pages(100), one.guests) for one in guests]
    first = decide(SENPAI, small[0], None, 0.0)
    second = decide(SENPAI, small[1], first.memory, 1.0)
    assert mib(second.plan) == {"a": 1500}
    assert rule(second, "a").startswith("cut: it may grow only as far as pool minus reserve")
    kept = host(4000, vm("a", 4000, 1000, least=995, pressure_some_total_s=0.0))
    memory = decide(SENPAI, kept, None, 0.0).memory
    probe = decide(SENPAI, kept, memory, 6.0)
    assert mib(probe.plan) == {"a": 995}
    assert rule(probe, "a") == "cut: never below its reservation"


@pytest.mark.parametrize(
    "wrong",
    [
        {"interval_s": 0.0},
        {"stall_s": 0.0},
        {"coeff_probe": 0.0},
        {"max_probe": 1.0},
        {"max_backoff": -1.0},
        {"refault_cost_s": -1.0},
    ],
)
def test_settings_out_of_bounds_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must|can't"):
        SenpaiSettings(**wrong)
