"""The bench: its figures, and a small run of the real thing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from host_agent.bench.figures import Figure, Reach, machine
from host_agent.bench.shrinks import breakdown
from host_agent.quota.phases import ShrinkPhases

NAMES = {
    "inflate_4KiB_ratio",
    "deflate_4KiB",
    "inflate_2MiB_ratio",
    "deflate_2MiB",
    "guest_side_memory",
    "move_ratio",
    "burst_longest_stall_median",
    "burst_oom_kills",
    "shrink_median",
    "shrink_longest_stall_median",
}


@pytest.mark.parametrize(
    ("reach", "value", "holds"),
    [
        (Reach("at least", 0.9), 0.9, True),
        (Reach("at least", 0.9), 0.89, False),
        (Reach("at most", 5.0), 5.0, True),
        (Reach("at most", 5.0), 5.1, False),
        (Reach("at most", 0), 1, False),
    ],
)
def test_a_figure_says_whether_it_is_within_reach(reach: Reach, value: float, holds: bool) -> None:
    figure = Figure("name", value, "ms", reach)
    assert figure.holds is holds
    assert figure.to_json()["holds"] is holds
    assert figure.to_json()["reach"] == f"{reach.bound} {reach.value:g}"


def test_the_machine_is_described() -> None:
    about = machine(1)
    assert about["cgroup_version"] == 1
    assert about["processors"] >= 1
    json.dumps(about)


def test_the_phases_that_took_no_time_are_left_out() -> None:
    taken = [ShrinkPhases(look_s=0.001, write_s=0.0004, frozen_s=0.002) for _ in range(3)]
    assert breakdown(taken) == "look 1.00, write 0.40"


@pytest.mark.effects
def test_a_small_bench_gives_every_figure() -> None:
    """At this size the ratios say little; that every frame moves and nobody is killed does."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("balloon")), "bench", "--scale", "small", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    figures = {figure["name"]: figure for figure in found["figures"]}
    assert set(figures) == NAMES
    for figure in figures.values():
        assert {"name", "value", "unit", "reach", "holds"} <= set(figure)
    assert figures["burst_oom_kills"]["value"] == 0
    assert figures["burst_longest_stall_median"]["detail"]["dry_events"] > 0
    assert all(figures[name]["value"] > 0 for name in NAMES - {"burst_oom_kills"})
    kinds = {name.split()[0] for name in figures["guest_side_memory"]["detail"]["mib_by_process"]}
    assert "balloon" in kinds
    assert "look " in figures["shrink_median"]["unit"]
    assert figures["shrink_median"]["detail"]["oom_kills"] == 0
    assert len(figures["shrink_median"]["detail"]["phases_s"]) == 2
    assert found["machine"]["kernel"]
