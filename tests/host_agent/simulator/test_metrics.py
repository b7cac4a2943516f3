"""The figures, worked out by hand for hosts where that can be done."""

import pytest
from scenarios_for_tests import engine_of, scenario, steps

from host_agent.simulator.metrics import Figures, Totals, figures_of
from host_agent.simulator.scenario import Scenario
from protocol.units import MIB


def figures(made: Scenario, policy: str = "shares") -> Figures:
    return figures_of([engine_of(made, policy).run().totals])


def test_where_all_is_met() -> None:
    found = figures(scenario({"trace": steps((0, 100))}, {"trace": steps((0, 100))}))
    assert found["demand_met_percent"] == 100.0
    assert found["fairness"] is None, "nobody lacked anything"
    assert found["request_p50_s"] is None
    for name in ("stall_s", "unmet_s", "shortage_s", "moved_bytes", "requests", "oom_kills"):
        assert found[name] == 0, name


def test_where_nobody_can_be_met() -> None:
    """Two guests of equal shares need 200 MiB each of 240: 120 each, for 30 of 60 s."""
    guest = {
        "trace": steps((0, 100), (10, 200), (40, 100)),
        "reservation": 0,
        "cache_share": 0.0,
        "swap": 256 * MIB,
    }
    found = figures(scenario(guest, guest, pool_mib=240, reserve_mib=0))
    needed, lacking = 2 * (30 * 100 + 30 * 200), 2 * 30 * 80
    percent = 100 * (1 - lacking / needed)
    assert found["demand_met_percent"] == pytest.approx(percent, abs=0.01)
    assert found["shortage_s"] == found["unmet_s"] == 30.0
    assert found["would_be_swaps_bytes"] == 2 * 80 * MIB
    assert found["fairness"] == pytest.approx(1.0)
    assert found["stall_s"] == 0.0
    assert (found["requests"], found["requests_withdrawn"]) == (2, 2)
    assert found["request_p50_s"] == found["request_p99_s"] == 30.0


def test_unfair_is_told_from_fair() -> None:
    """Both need 200 MiB of 240. The first is stuck with its 200 MiB: 1.67 and 0.33 of its part."""
    greedy = {
        "trace": steps((0, 200)),
        "reservation": 0,
        "cache_share": 0.0,
        "behaviour": {"kind": "stuck"},
    }
    late = {"trace": steps((0, 200)), "reservation": 0, "cache_share": 0.0, "arrives_s": 20.0,
            "swap": 256 * MIB}  # fmt: skip
    found = figures(scenario(greedy, late, pool_mib=260, reserve_mib=0))
    assert found["fairness"] is not None
    assert found["fairness"] < 0.8


def test_requests_that_are_never_met_count_with_their_age() -> None:
    totals = Totals(satisfied_us=[1_000_000] * 98, withdrawn_us=[5_000_000], open_us=[9_000_000])
    found = figures_of([totals])
    assert (found["requests"], found["requests_satisfied"]) == (100, 98)
    assert (found["request_p50_s"], found["request_p99_s"]) == (1.0, 5.0)


def test_turns_and_what_was_moved_for_nothing() -> None:
    """Two bursts of one guest: its quota goes up and down twice, and so does the other's."""
    burst = steps((0, 60), (10, 220), (20, 60), (50, 220), (60, 60))
    guest = {"trace": burst, "reservation": 0, "cache_share": 0.0, "swap": 256 * MIB}
    still = {"trace": steps((0, 60)), "reservation": 0, "cache_share": 0.0, "swap": 256 * MIB}
    found = figures(scenario(guest, still, pool_mib=320, reserve_mib=0, duration_s=90.0))
    guest_hours = 2 * 90 / 3600
    turns = round(found["turns_per_guest_hour"] * guest_hours)
    assert 4 <= turns <= 8
    assert found["back_and_forth_bytes"] > 2 * 60 * MIB
    quiet = figures(scenario(still, still, pool_mib=320, reserve_mib=0, duration_s=90.0))
    assert (quiet["turns_per_guest_hour"], quiet["back_and_forth_bytes"]) == (0.0, 0)


def test_hosts_add_up() -> None:
    made = scenario(
        {"trace": {"kind": "burst", "low": 0, "high": 250 * MIB, "every_s": 9, "length_s": 3}},
        {"trace": steps((0, 200))},
        pool_mib=320,
        reserve_mib=8,
    )
    runs = [engine_of(made, host=number).run().totals for number in range(3)]
    apart = [figures_of([run]) for run in runs]
    together = figures_of(runs)
    for name in ("stall_s", "moved_bytes", "requests", "plans", "dry_events"):
        assert together[name] == pytest.approx(sum(one[name] for one in apart)), name
    assert len({one["moved_bytes"] for one in apart}) == 3, "each host has seeds of its own"
    lowest, *_, highest = sorted(one["demand_met_percent"] for one in apart)
    assert lowest <= together["demand_met_percent"] <= highest
