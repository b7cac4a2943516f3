"""Hyper-V by hand: demand and buffer, the range, the floor, weights, status."""

import pytest
from mib_hosts import decide, host, mib, pages, rule, term, vm

from host_agent.policy.hyperv import Hyperv, HypervSettings, floor_pages
from protocol.guest_floor import floor_bytes
from protocol.units import MIB, PAGE_BYTES, pages_of

HYPERV = Hyperv()


def test_everybody_gets_demand_and_buffer_within_its_range() -> None:
    decision = decide(
        HYPERV,
        host(
            4096,
            vm("a", 512, 300, demand=200),  # 200 * 1.2 = 240
            vm("b", 512, 300, demand=200, buffer_percent=50.0),  # 200 * 1.5 = 300
            vm("c", 512, 300, demand=100),  # 120, but the floor of 512 MiB is 104 + 512 / 8 = 168
            vm("d", 512, 300, demand=210, maximum_pages=pages(220)),  # 252, but at most 220
            vm("e", 512, 300, demand=180, least=256),  # 216, but at least 256
            vm("f", 512, 300),  # has not said
        ),
    )
    assert mib(decision.plan) == {"a": 240, "b": 300, "c": 168, "d": 220, "e": 256, "f": 300}
    assert decision.plan.shortage_pages == 0
    assert rule(decision, "a") == "OK: demand and buffer"
    assert rule(decision, "c") == "OK: its minimum is more than demand and buffer"
    assert rule(decision, "d") == "OK: its maximum is less than demand and buffer"
    assert rule(decision, "f") == "what it needs is unknown: it keeps what it has"
    # 100 * 200 / 300
    assert term(decision, "a", "pressure") == pytest.approx(66.667, abs=0.001)


def test_demands_come_before_buffers() -> None:
    # Targets are 300 each, 600 of 560: the demands fit (500), the buffers share 60. By weight 2 : 1
    # a would have 2 parts of all, which is more than its 300; b has the rest.
    decision = decide(
        HYPERV,
        host(
            560,
            vm("a", 512, 280, demand=250, shares=2000),
            vm("b", 512, 280, demand=250, shares=1000),
        ),
    )
    assert mib(decision.plan) == {"a": 300, "b": 260}
    assert decision.plan.shortage_pages == 0
    assert rule(decision, "a") == "OK: demand and buffer"
    assert rule(decision, "b") == "Low: not all of its buffer; buffers are divided by weight"


def test_no_weight_buys_a_buffer_with_anothers_demand() -> None:
    # Targets 408 and 240 of 560; demands 340 and 200 fit. By 1 : 3 b would have all of its 240 and
    # a 320, less than its demand: so a keeps 340, and b has what is left.
    decision = decide(
        HYPERV,
        host(
            560,
            vm("a", 512, 340, demand=340, shares=1000),
            vm("b", 512, 220, demand=200, shares=3000),
        ),
    )
    assert mib(decision.plan) == {"a": 340, "b": 220}


def test_demands_that_do_not_fit_are_divided_by_weight() -> None:
    # 500 of 450. One level for all: 2 * 200 is more than the 250 that a needs, 1 * 200 is b's.
    decision = decide(
        HYPERV,
        host(
            450,
            vm("a", 512, 225, demand=250, shares=2000),
            vm("b", 512, 225, demand=250, shares=1000),
        ),
    )
    assert mib(decision.plan) == {"a": 250, "b": 200}
    assert decision.plan.shortage_pages == pages(50)
    assert rule(decision, "a") == "Low: not all of its buffer; buffers are divided by weight"
    assert rule(decision, "b") == "Warning: less than its demand; demand is divided by weight"
    assert term(decision, "b", "pressure") == pytest.approx(111.111, abs=0.001)  # 100 * 250 / 225


def test_a_guest_starts_with_its_startup_and_no_buffer() -> None:
    decision = decide(
        HYPERV, host(1024, vm("a", 512, 0, has_driver=False, startup_pages=pages(96)))
    )
    assert mib(decision.plan) == {"a": 96}


def test_small_differences_are_left_alone() -> None:
    # 200 * 1.2 = 240, and 241 is near enough; without a step it isn't.
    snapshot = host(1024, vm("a", 512, 241, demand=200))
    assert mib(decide(HYPERV, snapshot).plan) == {"a": 241}
    exact = Hyperv(HypervSettings(step_bytes=0, slack_percent=0))
    assert mib(decide(exact, snapshot).plan) == {"a": 240}


@pytest.mark.parametrize(("quota", "then"), [(244, 244), (245, 240), (236, 236), (235, 240)])
def test_a_tenth_of_the_buffer_swings_freely(quota: int, then: int) -> None:
    # target 200 * 1.2 = 240, buffer 40, a tenth of it 4: more than the step of 2
    assert mib(decide(HYPERV, host(1024, vm("a", 512, quota, demand=200))).plan) == {"a": then}


def test_where_memory_is_wanted_elsewhere_buffers_do_not_swing() -> None:
    # Targets 240 + 240 of 480: a gives back its 4 for b, if there is not a page for both.
    guests = vm("a", 512, 244, demand=200), vm("b", 512, 236, demand=200)
    assert mib(decide(HYPERV, host(480, *guests)).plan) == {"a": 244, "b": 236}
    # 478: both have their demand, and by equal weights 39 of their buffers
    assert mib(decide(HYPERV, host(478, *guests)).plan) == {"a": 239, "b": 239}
    # But for who is below its minimum.
    below = host(1024, vm("a", 512, 167.5, demand=100))
    assert mib(decide(HYPERV, below).plan) == {"a": 168}


def test_the_floor_is_the_drivers_own() -> None:
    sizes_mib = (1, 16, 64, 127, 128, 511, 512, 2047, 2048, 8191, 8192, 32768)
    columns = host(0, *(vm(f"v{mib:05}", mib, 0) for mib in sizes_mib)).columns
    assert floor_pages(columns).tolist() == [
        -(-floor_bytes(mib * MIB) // PAGE_BYTES) for mib in sizes_mib
    ]
    # M = 64: 8 + 32; 512: 104 + 64; 8192: 488 + 256
    floors = dict(zip(sizes_mib, floor_pages(columns).tolist(), strict=True))
    assert [floors[64], floors[512], floors[8192]] == [pages_of(n * MIB) for n in (40, 168, 744)]


@pytest.mark.parametrize(
    ("reservation", "maximum", "word"),
    [
        ((100, 90), (500, 500), None),
        ((100, 100), (500, 600), None),
        ((100, 110), (500, 500), "reservation"),
        ((100, 100), (500, 400), "maximum"),
    ],
)
def test_while_it_runs_the_minimum_may_only_fall_and_the_maximum_only_rise(
    reservation: tuple[int, int], maximum: tuple[int, int], word: str | None
) -> None:
    fault = HYPERV.range_fault(reservation, maximum)
    assert (fault is None) if word is None else (fault is not None and word in fault)


@pytest.mark.parametrize(
    "wrong",
    [
        {"buffer_percent": -1.0},
        {"buffer_percent": 2001.0},
        {"step_bytes": -1},
        {"slack_percent": 101.0},
    ],
)
def test_settings_out_of_bounds_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must|can't"):
        HypervSettings(**wrong)  # type: ignore[arg-type]
