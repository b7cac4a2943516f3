"""What the demonstration makes of what it saw."""

import io
import json

import pytest
from rich.console import Console

from host_agent.demo.outcome import Act, Outcome, Stall, describe_moves, unfair
from host_agent.demo.scenario import SCENARIOS
from host_agent.demo.screen import live_table, print_summary
from host_agent.facade.views import HostView, VmState, VmView
from host_agent.moves import Move
from protocol.units import MIB


def outcome(**changes: object) -> Outcome:
    moves = (Move("vm02", "vm01", 256, 10.0, 10.25),)
    act = Act("a. One grows", "much", "enough", 1.5, moves, Stall("vm01", 0.012, "cache"))
    values: dict[str, object] = {
        "pool_bytes": 100 * MIB,
        "overcommit_ratio": 1.33,
        "acts": [act],
        "highest_sum_of_limits_bytes": 100 * MIB,
        "samples": 7,
    }
    return Outcome(**(values | changes))  # type: ignore[arg-type]


def test_json_names_moves_stalls_and_the_kernels_sum() -> None:
    found = json.loads(json.dumps(outcome().to_json()))
    assert found["moves"] == [
        {"act": "a. One grows", "from": "vm02", "to": "vm01", "bytes": MIB, "seconds": 0.25}
    ]
    assert found["stalls"][0]["seconds"] == 0.012
    assert found["oom_kills"] == 0
    assert found["highest_sum_of_limits_bytes"] == found["pool_bytes"] == 100 * MIB
    assert found["holds"] is True


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"oom_kills": 1}, "killed"),
        ({"highest_sum_of_limits_bytes": 100 * MIB + 4096}, "exceeded the pool"),
        ({"samples": 0}, "never read"),
        ({"acts": [Act("a", "x", "y", 1.0, (), None, ("it did not",))]}, "a: it did not"),
    ],
)
def test_it_holds_only_if_all_of_it_held(changes: dict[str, object], complaint: str) -> None:
    found = outcome(**changes)
    assert not found.holds
    assert complaint in "; ".join(found.failures)
    assert found.to_json()["holds"] is False


def test_the_summary_tells_a_person() -> None:
    text = io.StringIO()
    print_summary(Console(file=text, width=120), outcome())
    for part in (
        "One grows",
        "1 MiB from vm02 to vm01",
        "12.0 ms",
        "OOM kills: 0",
        "All of it held",
    ):
        assert part in text.getvalue()
    text = io.StringIO()
    print_summary(Console(file=text, width=120), outcome(oom_kills=2))
    assert "NOT all of it held" in text.getvalue()


def test_moves_are_described_in_a_line() -> None:
    assert describe_moves(()) == "nothing had to move"
    many = tuple(Move(f"vm{n}", "vm9", 256, 0.0, 0.1) for n in range(4))
    assert describe_moves(many).startswith("4 MiB from 4 holders to vm9")


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_a_scenario_overcommits_and_keeps_its_promises(name: str) -> None:
    scenario = SCENARIOS[name]()
    everybody = scenario.vms + 1
    shareable = scenario.pool_bytes - scenario.reserve_bytes
    assert scenario.overcommit_ratio > 1.2
    assert everybody * scenario.reservation_bytes <= shareable
    assert everybody * scenario.crowded.total_bytes > scenario.pool_bytes
    assert scenario.crowded.anon_bytes < scenario.reservation_bytes, "shortage would kill"


def running(name: str, shares: int, quota_mib: int, demand_mib: int | None = None) -> VmView:
    return VmView(
        name=name,
        state=VmState.RUNNING,
        backend="process",
        assigned_bytes=160 * MIB,
        reservation_bytes=0,
        shares=shares,
        quota_bytes=quota_mib * MIB,
        balloon_actual_bytes=(160 - quota_mib) * MIB,
        balloon_target_bytes=(160 - quota_mib) * MIB,
        lent_bytes=0,
        overhead_bytes=0,
        oom_kills=0,
        connected=True,
        demand_bytes=None if demand_mib is None else demand_mib * MIB,
    )


@pytest.mark.parametrize(
    ("demand_mib", "found"),
    [
        (150, ["vm02 (2000 shares) has 91 MiB, vm03 (1000) 115 MiB"]),
        (92, []),  # it has what it needs
        (None, []),  # nobody knows
    ],
)
def test_who_has_less_for_more_shares_and_needs_more(
    demand_mib: int | None, found: list[str]
) -> None:
    vms = [
        running("vm02", 2000, 91, demand_mib),
        running("vm01", 2000, 130, 150),
        running("vm03", 1000, 115, 150),
    ]
    assert unfair(vms, 3 * MIB) == found


def test_a_little_less_is_not_unfair() -> None:
    some, none = running("vm02", 2000, 100, 150), running("vm01", 500, 80, 150)
    assert unfair([none, some, running("vm03", 1000, 103, 150)], 3 * MIB) == []
    assert unfair([none, some, running("vm03", 1000, 104, 150)], 3 * MIB) == [
        "vm02 (2000 shares) has 100 MiB, vm03 (1000) 104 MiB"
    ]


def test_shares_that_told_nothing() -> None:
    few = running("vm01", 1000, 100, 150)
    assert unfair([running("vm02", 2000, 101, 150), few], 3 * MIB) == [
        "vm02 has no more than vm01, for all its shares"
    ]
    assert unfair([running("vm02", 2000, 104, 150), few], 3 * MIB) == []
    assert unfair([few, running("vm02", 2000, 101, 80)], 3 * MIB) == []


def test_the_live_table_shows_everybody() -> None:
    vm = running("vm01", 1000, 120)
    host = HostView(
        pool_bytes=100 * MIB,
        reserve_bytes=0,
        reserve_left_bytes=0,
        free_bytes=0,
        quotas_bytes=0,
        overdrawn_bytes=0,
        assigned_bytes=0,
        overcommit_ratio=1.0,
        policy="shares",
        shortage=True,
        shortage_bytes=9 * MIB,
        oom_kills=0,
        moves_total=0,
        version="0",
        cgroup_version=1,
        uptime_s=1.0,
    )
    console = Console(file=io.StringIO(), width=140, record=True)
    console.print(live_table("act", host, [vm]))
    shown = console.export_text()
    assert "vm01" in shown
    assert "120 MiB" in shown
    assert "SHORT of 9 MiB" in shown
