"""The engine: conservation at every event, a clock that only goes on, the same run every time."""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios_for_tests import engine_of, scenario, scenarios, steps

from host_agent.policy.explain import Explanation
from host_agent.policy.interface import Decision, Memory
from host_agent.policy.registry import BUILT_IN, policy_class
from host_agent.simulator import engine as engine_module
from host_agent.simulator.engine import BooksKind, Engine
from host_agent.simulator.guests import SECOND_US
from host_agent.simulator.host import SimulationError
from host_agent.simulator.metrics import figures_of
from host_agent.simulator.scenario import Scenario
from host_agent.simulator.traces import needs_of
from protocol.units import MIB, pages_of

POLICIES = [kind.name for kind in BUILT_IN]
MANY = max(10, settings().max_examples // 3)
"""Examples of whole simulations, each of hundreds of events."""


class Events(list[tuple[int, str, str]]):
    """A log that keeps when, what and who."""

    def __call__(self, now_us: int, event: str, fields: Mapping[str, Any]) -> None:
        self.append((now_us, event, str(fields.get("vm", ""))))

    def of(self, *kinds: str) -> list[tuple[str, str]]:
        return [(event, vm) for _, event, vm in self if event in kinds]


def play(made: Scenario, policy: str = "shares", **options: Any) -> tuple[Engine, Events]:
    events = Events()
    engine = engine_of(made, policy, log=events, **options)
    engine.run()
    return engine, events


def quotas_mib(engine: Engine) -> dict[str, int]:
    names = engine.state.traits.names
    return dict(zip(names, (engine.books.quota // pages_of(MIB)).tolist(), strict=True))


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=MANY)
@given(made=scenarios(), books=st.sampled_from(("ledger", "columns")))
def test_at_every_event_no_page_is_made_and_time_goes_on(
    policy: str, made: Scenario, books: BooksKind
) -> None:
    engine = engine_of(made, policy, books=books)
    engine.begin()
    pool_pages = pages_of(made.host.pool_bytes)
    before_us = 0
    while engine.step():
        kept, host = engine.books, engine.state
        kept.check()
        assert int(kept.quota.sum()) + kept.reserve_left_pages + kept.free_pages == pool_pages
        assert kept.free_pages >= 0
        assert before_us <= engine.now_us <= made.duration_s * SECOND_US
        before_us = engine.now_us
        guests = host.guests
        workload = host.workload
        assert (guests.held + guests.cache <= workload).all()
        assert (guests.held + guests.swapped + guests.waiting == guests.anon).all()
        assert (guests.swapped <= host.traits.swap).all()
        assert (host.dry == (guests.waiting > 0)).all()
        assert not (host.running & ~host.present).any()
        assert (kept.quota[~host.present] == 0).all()
        assert (kept.room[~host.inflating] == 0).all()


@settings(max_examples=MANY)
@given(made=scenarios())
def test_the_ledger_and_the_columns_give_the_same_run(made: Scenario) -> None:
    logs: list[Events] = []
    figures = []
    for books in ("ledger", "columns"):
        events = Events()
        run = engine_of(made, books=books, log=events).run()
        logs.append(events)
        figures.append(figures_of([run.totals]))
    assert logs[0] == logs[1]
    assert figures[0] == figures[1]


def test_a_grown_guest_gets_what_the_others_can_spare() -> None:
    made = scenario(
        {"memory_mib": 400, "trace": steps((0, 100), (10, 300)), "cache_share": 0.0},
        {"memory_mib": 400, "trace": steps((0, 100))},
        {"memory_mib": 400, "trace": steps((0, 100))},
        pool_mib=700,
        reserve_mib=40,
    )
    engine, events = play(made)
    quotas = quotas_mib(engine)
    assert quotas["g0"] >= 300
    assert quotas["g1"] == pytest.approx(quotas["g2"], abs=3)
    after = [event for event in events if event[0] >= 10 * SECOND_US]
    kinds = [kind for _, kind, _ in after]
    assert kinds.index("dry") < kinds.index("is lent") < kinds.index("gives")
    assert engine.books.reserve_left_pages == pages_of(40 * MIB), "it was paid back"
    assert engine.state.counts.lent_pages > 0


def test_a_slow_guest_gives_late_and_a_stuck_one_never() -> None:
    def served_s(behaviour: dict[str, Any]) -> float | None:
        made = scenario(
            {"memory_mib": 600, "trace": steps((0, 50), (10, 400)), "swap": 600 * MIB},
            {"memory_mib": 600, "trace": steps((0, 50)), "behaviour": behaviour},
            pool_mib=660,
            reserve_mib=20,
        )
        engine, _ = play(made)
        at_most = pages_of(400 * MIB)
        return (
            None if engine.books.quota[0] < at_most else engine.meter.totals.satisfied_us[0] / 1e6
        )

    honest = served_s({"kind": "honest"})
    slow = served_s({"kind": "slow", "factor": 0.02})
    assert honest is not None
    assert slow is not None
    assert honest < 2.0 < slow
    assert served_s({"kind": "stuck"}) is None


def test_a_stuck_guest_is_found_and_planned_around() -> None:
    made = scenario(
        {"memory_mib": 600, "trace": steps((0, 50), (5, 500)), "swap": 600 * MIB},
        {"memory_mib": 600, "trace": steps((0, 50)), "behaviour": {"kind": "stuck"}},
        pool_mib=660,
        reserve_mib=20,
    )
    engine, events = play(made)
    stuck = [now_us for now_us, kind, _ in events if kind == "stuck"]
    assert len(stuck) == 3
    assert stuck[0] == pytest.approx(15.0 * SECOND_US, abs=SECOND_US)
    assert engine.books.room[1] == 0


def test_a_guest_whose_driver_is_away_is_not_asked() -> None:
    made = scenario(
        {"memory_mib": 600, "trace": steps((0, 50), (12, 400)), "swap": 600 * MIB},
        {
            "memory_mib": 600,
            "trace": steps((0, 50)),
            "behaviour": {"kind": "intermittent", "on_s": 10, "off_s": 10},
        },
        pool_mib=660,
        reserve_mib=20,
    )
    _, events = play(made)
    asked_s = [now_us / SECOND_US for now_us, kind, _ in events if kind in ("offers", "refuses")]
    assert asked_s
    assert not [at_s for at_s in asked_s if 10 <= at_s % 20 < 20]


def test_a_heap_never_gives_back() -> None:
    def at_the_end(*, heap_managed: bool) -> int:
        made = scenario(
            {
                "memory_mib": 400,
                "trace": steps((0, 50), (5, 300), (15, 50)),
                "cache_share": 0.0,
                "heap_managed": heap_managed,
            },
            {"memory_mib": 400, "trace": steps((0, 50), (30, 350)), "cache_share": 0.0},
            pool_mib=500,
            reserve_mib=20,
        )
        return quotas_mib(play(made)[0])["g0"]

    assert at_the_end(heap_managed=True) >= 300
    assert at_the_end(heap_managed=False) < 150


def test_without_swap_it_waits_and_then_its_kernel_decides() -> None:
    made = scenario(
        {"trace": steps((0, 50), (10, 250)), "cache_share": 0.0},
        {"trace": steps((0, 200)), "reservation": 200 * MIB, "cache_share": 0.0},
        pool_mib=320,
        reserve_mib=10,
        dry_patience_s=3.0,
    )
    engine, events = play(made)
    dry_us = next(now_us for now_us, kind, _ in events if kind == "dry")
    killed_us = next(now_us for now_us, kind, _ in events if kind == "kernel kills")
    assert (dry_us, killed_us) == (10 * SECOND_US, 13 * SECOND_US)
    figures = figures_of([engine.meter.totals])
    assert figures["oom_kills"] >= 1
    assert figures["stall_s"] >= 3.0
    assert figures["would_be_swaps_bytes"] == 0
    with_swap = scenario(
        {"trace": steps((0, 50), (10, 250)), "cache_share": 0.0, "swap": 256 * MIB},
        {"trace": steps((0, 200)), "reservation": 200 * MIB, "cache_share": 0.0},
        pool_mib=320,
        reserve_mib=10,
    )
    figures = figures_of([play(with_swap)[0].meter.totals])
    assert (figures["oom_kills"], figures["stall_s"]) == (0, 0.0)
    assert figures["would_be_swaps_bytes"] > 50 * MIB


def test_a_liar_gets_more_than_it_needs() -> None:
    def quota_of(behaviour: dict[str, Any]) -> int:
        made = scenario(
            {"trace": steps((0, 80)), "behaviour": behaviour},
            {"trace": steps((0, 200))},
            pool_mib=320,
            reserve_mib=10,
        )
        return quotas_mib(play(made)[0])["g0"]

    assert quota_of({"kind": "lying", "factor": 3.0}) > quota_of({"kind": "honest"}) + 20


def test_a_launch_without_memory_is_refused_after_a_while() -> None:
    made = scenario(
        {"trace": steps((0, 240)), "cache_share": 0.0, "reservation": 64 * MIB},
        {"arrives_s": 20.0, "reservation": 128 * MIB, "trace": steps((0, 100))},
        pool_mib=320,
        reserve_mib=10,
    )
    engine, events = play(made)
    assert ("launch refused", "g1") in events.of("launch refused")
    assert quotas_mib(engine)["g1"] == 0
    assert figures_of([engine.meter.totals])["launches_refused"] == 1


def test_the_policy_sees_the_vms_own_maximum_and_buffer() -> None:
    """Under hyperv a VM has its demand and its buffer beyond it, and its maximum at most."""

    def quota_mib(**own: Any) -> int:
        made = scenario(
            {
                "reservation": 0,
                "startup": 64 * MIB,
                "cache_share": 0.0,
                "trace": steps((0, 100)),
                **own,
            }
        )
        return quotas_mib(play(made, "hyperv")[0])["g0"]

    # 5 % of headroom, then the buffer, of which a tenth is slack.
    assert quota_mib() == pytest.approx(105 * 1.2, abs=2 + 0.1 * 21)
    assert quota_mib(buffer_percent=80.0) == pytest.approx(105 * 1.8, abs=2 + 0.1 * 84)
    assert quota_mib(buffer_percent=80.0, maximum=150 * MIB) == 150


GO = threading.Event()


class Broken:
    """A policy that is wrong in one way."""

    name = "broken"
    source = "a test"
    settings = None

    def __init__(self, fault: str) -> None:
        self._fault = fault

    def decide(self, host: Any, memory: Memory, now_s: float) -> Decision:
        decision = policy_class("shares")().decide(host, memory, now_s)
        plan = decision.plan
        if self._fault == "raises":
            raise ZeroDivisionError("no guests")
        if self._fault == "exits":
            raise SystemExit(0)
        if self._fault == "hangs":
            GO.wait()
        if self._fault == "mute":
            return Decision(plan, None, Explanation(host.names, lambda: {}["terms"]))
        if self._fault == "others":
            changes = {"names": (*plan.names[:-1], "zz")}
        else:
            changes = {"quota_pages": host.assigned_pages + 1}
        fields = {"names": plan.names, "quota_pages": plan.quota_pages} | changes
        return Decision(type(plan)(**fields), None, decision.why)


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("raises", "policy broken at 0 s: it raised ZeroDivisionError: no guests"),
        ("exits", "policy broken at 0 s: it raised SystemExit: 0"),
        ("hangs", "policy broken at 0 s: it has not answered within 0.3 s"),
        ("others", "policy broken at 0 s: its names are not those of the guests, in their order"),
        ("beyond", "policy broken at 0 s: g0 is to have more than its size"),
    ],
)
def test_a_policy_at_fault_is_told_in_a_line(
    fault: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scenario({"trace": steps((0, 80))})
    if fault == "hangs":
        monkeypatch.setattr(engine_module, "ANSWER_DEADLINE_S", 0.3)
    GO.clear()
    try:
        with pytest.raises(SimulationError) as raised:
            Engine(made, needs_of(made, 0, {}), Broken(fault)).run()
    finally:
        GO.set()
    assert raised.value.one_line() == line


def test_a_policy_that_cannot_explain_itself_ends_a_trace() -> None:
    made = scenario({"trace": steps((0, 80))})
    engine = Engine(made, needs_of(made, 0, {}), Broken("mute"), log=lambda *_: None)
    with pytest.raises(SimulationError, match="policy broken can't explain itself: it raised Key"):
        engine.run()
    Engine(made, needs_of(made, 0, {}), Broken("mute")).run()  # nobody asked


def test_a_snapshot_does_not_change_when_time_goes_on() -> None:
    made = scenario(
        {"trace": steps((0, 80), (5, 200))}, {"trace": steps((0, 80))}, pool_mib=400, reserve_mib=20
    )
    engine = engine_of(made)
    engine.begin()
    while engine.now_us < 4 * SECOND_US:
        engine.step()
    host = engine.state.snapshot(engine.now_us)
    quotas = host.quota_pages.copy()
    demand = host.demand_pages.values.copy()
    while engine.step():
        pass
    assert (engine.books.quota != quotas).any()
    assert np.array_equal(host.quota_pages, quotas)
    assert np.array_equal(host.demand_pages.values, demand)
