"""Traces: each kind as it is described, from the seed alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenarios_for_tests import scenario, steps

from host_agent.errors import ConfigError
from host_agent.simulator.scenario import Recorded
from host_agent.simulator.traces import needs_of, read_recording
from protocol.units import MIB


def needs_mib(*traces: dict[str, Any], host: int = 0, **more: Any) -> "np.ndarray[Any, Any]":
    guests = [{"memory_mib": 1000, "reservation": 0, "trace": trace} for trace in traces]
    return needs_of(scenario(*guests, **more), host, {}) / 256


def test_steady() -> None:
    flat, noisy = needs_mib(
        {"kind": "steady", "level": 100 * MIB},
        {"kind": "steady", "level": 100 * MIB, "noise": 0.1},
        duration_s=1000.0,
    ).T
    assert set(flat) == {100.0}
    assert noisy.mean() == pytest.approx(100, abs=2)
    assert noisy.std() == pytest.approx(10, abs=1)


def test_a_need_stays_within_the_guests_size() -> None:
    (big,) = needs_mib({"kind": "steady", "level": 999 * MIB, "noise": 0.5}).T
    assert big.max() == 1000
    assert big.min() >= 0


def test_diurnal() -> None:
    trace = {"kind": "diurnal", "low": 100 * MIB, "high": 500 * MIB, "period_s": 40.0, "peak_s": 10}
    (wave,) = needs_mib(trace).T
    assert (wave[10], wave[30], wave[50]) == (500, 100, 500)
    assert wave[0] == pytest.approx(300, abs=1)
    spread = needs_mib(*[trace | {"spread_s": 40.0}] * 8)
    assert len({int(column.argmax()) % 40 for column in spread.T}) > 3


def test_bursts() -> None:
    trace = {"kind": "burst", "low": 10 * MIB, "high": 90 * MIB, "every_s": 100, "length_s": 20}
    one, two = needs_mib(trace, trace, duration_s=50_000.0).T
    assert set(one) == {10.0, 90.0}
    assert not np.array_equal(one, two)
    # The part of time within a burst, where they may overlap: 1 - exp(-length / every).
    assert (one == 90).mean() == pytest.approx(1 - np.exp(-0.2), abs=0.02)


def test_correlated_bursts_come_together() -> None:
    trace = {"kind": "correlated", "low": 10 * MIB, "high": 90 * MIB, "every_s": 100, "length_s": 9}
    together = needs_mib(trace, trace, duration_s=5000.0)
    assert np.array_equal(together[:, 0], together[:, 1])
    assert set(together[:, 0]) == {10.0, 90.0}
    apart = needs_mib(trace, trace | {"group": "other"}, duration_s=5000.0)
    assert not np.array_equal(apart[:, 0], apart[:, 1])
    half = needs_mib(trace, trace | {"joins": 0.5}, duration_s=50_000.0)
    joined = (half == 90).mean(axis=0)
    assert joined[1] / joined[0] == pytest.approx(0.5, abs=0.1)
    assert not ((half[:, 1] == 90) & (half[:, 0] == 10)).any()
    late = needs_mib(trace, trace | {"stagger_s": 5.0}, duration_s=5000.0)
    first = np.flatnonzero(late[:, 0] == 90)[0]
    assert first <= np.flatnonzero(late[:, 1] == 90)[0] <= first + 6


def test_steps() -> None:
    made = scenario(
        {"trace": steps((5, 100), (10, 50))},
        {"trace": steps((5, 100), (10, 50), from_launch=True), "arrives_s": 7.0},
    )
    one, two = (needs_of(made, 0, {}) / 256).T
    assert one[:12].tolist() == [0] * 5 + [100] * 5 + [50] * 2
    assert two[:19].tolist() == [0] * 12 + [100] * 5 + [50] * 2


def test_a_guests_trace_depends_on_seed_host_and_its_number_alone() -> None:
    trace = {"kind": "burst", "low": 0, "high": 90 * MIB, "every_s": 9, "length_s": 3, "noise": 0.1}
    first = needs_mib(trace, trace)
    assert np.array_equal(first, needs_mib(trace, trace))
    assert np.array_equal(first[:, 0], needs_mib(trace)[:, 0])
    assert not np.array_equal(first, needs_mib(trace, trace, host=1))
    assert not np.array_equal(first, needs_mib(trace, trace, seed=1))


CSV = """time_s,vm,working_set_bytes,usage_bytes
100.0,b,1048576,2097152
100.0,a,10485760,20971520
102.0,b,,2097152
102.0,a,31457280,41943040
104.0,a,52428800,62914560
"""


def recorded(tmp_path: Path, text: str = CSV, **trace: Any) -> list[float]:
    (tmp_path / "run.csv").write_text(text)
    made = scenario({"trace": {"kind": "recorded", "file": "run.csv", **trace}}, duration_s=9.0)
    one = made.guests[0].trace
    assert isinstance(one, Recorded)
    found = {one: read_recording(tmp_path / "run.csv", one)}
    column: list[float] = (needs_of(made, 0, found)[:, 0] / 256).tolist()
    return column


def test_a_recording_is_played(tmp_path: Path) -> None:
    assert recorded(tmp_path) == [10, 10, 30, 30, 10, 10, 30, 30, 10, 10]
    assert recorded(tmp_path, repeat=False) == [10, 10, 30, 30, 50, 50, 50, 50, 50, 50]
    assert recorded(tmp_path, column="usage_bytes", repeat=False, scale=2.0)[:3] == [40, 40, 80]
    assert recorded(tmp_path, vm="b") == [1] * 10


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no column 'time_s'"),
        ("time_s,vm\n", "no column 'working_set_bytes'"),
        ("time_s,vm,working_set_bytes\n", "it holds no working_set_bytes of any VM"),
        ("time_s,vm,working_set_bytes\nx,a,1\n", "line 2: no time, or no number of bytes"),
        ("time_s,vm,working_set_bytes\n0,a,-1\n", "line 2: no time, or no number of bytes"),
        ("time_s,vm,working_set_bytes\nnan,a,1\n", "line 2: no time, or no number of bytes"),
        ("time_s,vm,working_set_bytes\n2,b,1\n1,b,1\n", "the rows of b are not in the order"),
        ("time_s,vm,working_set_bytes\n0,c,1\n", r"no VM 'b' \(it has: c\)"),
    ],
)
def test_a_recording_that_cannot_be_used(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "run.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as refused:
        read_recording(path, Recorded(kind="recorded", file="run.csv", vm="b"))
    assert refused.value.one_line().startswith(str(path))
