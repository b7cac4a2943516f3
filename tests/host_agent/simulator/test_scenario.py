"""Scenarios: what is refused, and in which words; what comes along, and that it can be played."""

from pathlib import Path

import pytest

from host_agent.errors import ConfigError
from host_agent.simulator.library import load_scenario, shipped
from host_agent.simulator.scenario import Scenario, parse_scenario
from protocol.units import GIB

HEAD = 'duration_s = 60.0\n[host]\npool = "4GiB"\n'
TRACE = 'trace = { kind = "steady", level = "1GiB" }'


def guest(*lines: str, name: str = "a", memory: str = '"2GiB"', trace: str = TRACE) -> str:
    return "\n".join(["[[guest]]", f'name = "{name}"', f"memory = {memory}", trace, *lines, ""])


def parsed(text: str) -> Scenario:
    return parse_scenario(text, "x.toml")


def test_defaults() -> None:
    made = parsed(HEAD + guest())
    (one,) = made.guests
    assert (made.seed, made.look_s, made.looks) == (0, 1.0, 61)
    assert (made.host.interval_s, made.host.count) == (1.0, 1)
    assert made.host.reserve_bytes == 4 * GIB // 20 // 4096 * 4096
    assert (one.reservation_bytes, one.startup_bytes) == (GIB // 2, 2 * GIB)
    assert (one.shares, one.swap_bytes, one.heap_managed) == (1000, 0, False)
    assert one.behaviour.kind == "honest"
    assert one.names() == ["a"]


def test_many_alike_are_numbered() -> None:
    made = parsed(HEAD + guest("count = 12", 'reservation = "0"'))
    assert made.guests[0].names()[0] == "a-01"
    assert made.guests[0].names()[-1] == "a-12"


REFUSED = {
    "x.toml: not TOML: ": "duration_s = ",
    "x.toml: unknown key 'seeds' (did you mean 'seed'?)": "seeds = 1\n" + HEAD + guest(),
    "x.toml: 'duration_s' is missing": '[host]\npool = "1GiB"\n' + guest(),
    "x.toml: duration_s: input should be greater than 0": (
        HEAD.replace("60.0", "-60.0") + guest()
    ),
    "x.toml: 'guest' is missing": HEAD,
    "x.toml: [host]: unknown key 'pol' (did you mean 'pool'?)": (
        HEAD.replace("pool", "pol") + guest()
    ),
    "x.toml: [host]: pool: '-4GiB' is negative: a size is 0 or more": (
        HEAD.replace("4GiB", "-4GiB") + guest()
    ),
    "x.toml: [host]: the reserve of 4GiB leaves nothing of the pool of 4GiB": (
        HEAD + 'reserve = "4GiB"\n' + guest()
    ),
    "x.toml: guest 'a': unknown key 'memry' (did you mean 'memory'?)": (
        HEAD + guest('memry = "1GiB"')
    ),
    "x.toml: guest 'a': memory: '-2GiB' is negative: a size is 0 or more": (
        HEAD + guest(memory='"-2GiB"')
    ),
    "x.toml: guest 'a': shares: input should be greater than or equal to 1": (
        HEAD + guest("shares = -1")
    ),
    "x.toml: guest 'a': the reservation of 3GiB is above the memory of 2GiB": (
        HEAD + guest('reservation = "3GiB"')
    ),
    "x.toml: guest 'a': the maximum of 3GiB is not between the reservation of 512MiB and the memory"
    " of 2GiB": HEAD + guest('maximum = "3GiB"'),
    "x.toml: guest 'a': leaves_s is not after arrives_s": HEAD + guest("leaves_s = 0.0"),
    "x.toml: guest 'a': trace: kind: this must be one of steady, diurnal, burst, correlated, steps,"
    " recorded": HEAD + guest(trace='trace = { kind = "stedy" }'),
    "x.toml: guest 'a': trace: kind: this must be one of steady": HEAD + guest(trace="trace = {}"),
    "x.toml: guest 'a': 'trace' is missing": HEAD + guest(trace=""),
    "x.toml: guest 'a': trace: unknown key 'levl' (did you mean 'level'?)": (
        HEAD + guest(trace='trace = { kind = "steady", levl = "1GiB" }')
    ),
    "x.toml: guest 'a': trace: level: '-1GiB' is negative": (
        HEAD + guest(trace='trace = { kind = "steady", level = "-1GiB" }')
    ),
    "x.toml: guest 'a': trace: low is 2GiB, above high, which is 1GiB": HEAD
    + guest(trace='trace = { kind = "diurnal", low = "2GiB", high = "1GiB" }'),
    "x.toml: guest 'a': trace: the points are not in the order of time": HEAD
    + guest(trace='trace = { kind = "steps", points = [[5, "1GiB"], [0, "2GiB"]] }'),
    "x.toml: guest 'a': trace.points.0.1: '-1GiB' is negative": HEAD
    + guest(trace='trace = { kind = "steps", points = [[5, "-1GiB"]] }'),
    "x.toml: guest 'a': behaviour: kind: this must be one of honest, slow, stuck, intermittent, "
    "lying": HEAD + guest('behaviour = { kind = "odd" }'),
    "x.toml: guest 'a': behaviour: factor: input should be greater than 0": HEAD
    + guest('behaviour = { kind = "slow", factor = -1 }'),
    "x.toml: [policy.shares]: unknown key 'stp' (did you mean 'step'?)": (
        HEAD + guest() + "[policy.shares]\nstp = 1\n"
    ),
    "x.toml: unknown policy 'best'": HEAD + guest() + "[policy.best]\n",
    "x.toml: guest 'a' is there twice": HEAD + guest() + guest(),
    "x.toml: the reservations (5GiB) and the host reserve": HEAD
    + guest("count = 10"),
    "x.toml: 100000 guests with 3601 steps each are more than fit into memory": (
        HEAD.replace("60.0", "3600.0") + guest("count = 100000", 'reservation = "0"')
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_refused_in_one_line(line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parsed(REFUSED[line])
    assert refused.value.one_line().startswith(line)
    assert "\n" not in refused.value.one_line()
    assert refused.value.exit_code == 2


def test_all_that_come_along_can_be_read() -> None:
    assert sorted(shipped()) == [
        "boot-storm", "classic", "datacenter", "java-heap", "no-swap", "simultaneous",
    ]  # fmt: skip
    for name in shipped():
        loaded = load_scenario(name)
        assert loaded.name == name
        assert loaded.scenario.title
    classic = load_scenario("classic").scenario
    sizes = {table.assigned_bytes for table in classic.guests}
    assert len(sizes) == 1
    assert abs(sizes.pop() - 16e9) < 4096
    assert sum(table.count for table in classic.guests if not table.arrives_s) == 10
    datacenter = load_scenario("datacenter").scenario
    assert datacenter.host.count == 1000
    assert sum(table.count for table in datacenter.guests) == 30


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no scenario and no file 'clasic'"):
        load_scenario("clasic")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_scenario(str(tmp_path))
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a text file in UTF-8"):
        load_scenario(str(path))


def test_a_recording_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(HEAD + guest(trace='trace = { kind = "recorded", file = "run.csv" }'))
    with pytest.raises(ConfigError, match=r"run\.csv: No such file"):
        load_scenario(str(path))
