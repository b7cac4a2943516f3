"""`balloon simulate` as a person runs it: what comes along, and the same every time."""

import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from host_agent.cli import main
from host_agent.policy.registry import BUILT_IN
from host_agent.simulator.fleet import Job, run_job
from host_agent.simulator.library import load_scenario, shipped
from host_agent.simulator.metrics import Figures, figures_of
from protocol.units import GIB, MIB

RUN = "from host_agent.cli import main; main()"

SMALL = """
title = "two"
duration_s = 30.0
seed = 3
[host]
pool = "300MiB"
[[guest]]
name = "a"
memory = "256MiB"
swap = "64MiB"
trace = { kind = "burst", low = "64MiB", high = "250MiB", every_s = 8, length_s = 3, noise = 0.05 }
[[guest]]
name = "b"
memory = "256MiB"
trace = { kind = "steady", level = "100MiB", noise = 0.05 }
"""


def balloon(*arguments: str) -> tuple[int, str, str]:
    """Exit status and the two streams."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        main(("simulate", *arguments))
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


# The scenarios that come along


def played(name: str, policy: str = "shares", **changes: Any) -> Figures:
    loaded = load_scenario(name)
    scenario = loaded.scenario.model_copy(update=changes)
    # Both kinds of books give the same run (test_simulator_engine.py); these are the quicker ones.
    job = Job(scenario, loaded.recordings, policy, books="columns")
    return figures_of([run_job(job).totals])


def test_classic() -> None:
    """One grows and gets it within seconds; the eleventh starts; all of them can't be served."""
    found = played("classic")
    assert found["launches"] == 11
    assert found["launches_refused"] == 0
    assert found["start_p99_s"] < 5
    assert found["shortage_s"] == pytest.approx(120, abs=2)
    assert found["unmet_s"] < 130, "hardly beyond the time in which nobody could help"
    assert found["fairness"] > 0.9
    assert found["moved_bytes"] > 20 * GIB
    assert found["oom_kills"] == 0


def test_simultaneous() -> None:
    found = played("simultaneous")
    assert found["requests"] >= 20
    assert found["requests_satisfied"] >= 5
    assert found["fairness"] > 0.98
    assert found["request_p99_s"] >= found["request_p50_s"] > 0
    assert found["requests_open"] == 0, "the second time there was enough"


def test_boot_storm() -> None:
    found = played("boot-storm")
    assert found["launches"] == 60
    assert 0 < found["start_p99_s"] <= 10.0
    assert 20 < found["shortage_s"] < 100
    assert found["launches_refused"] < 12


def test_java_heap() -> None:
    """What the heaps keep the others lack: without them there is less shortage."""
    loaded = load_scenario("java-heap")
    tables = [table.model_copy(update={"heap_managed": False}) for table in loaded.scenario.guests]
    kept, given = played("java-heap"), played("java-heap", guests=tuple(tables))
    assert kept["shortage_s"] > given["shortage_s"] + 30
    assert kept["demand_met_percent"] < given["demand_met_percent"]


def test_no_swap() -> None:
    """Where the others swap, the bare guest waits and is killed in; with swap nobody is."""
    loaded = load_scenario("no-swap")
    bare, others = loaded.scenario.guests
    assert bare.swap_bytes == 0
    found = played("no-swap")
    assert found["stall_s"] > 10
    assert found["oom_kills"] > 0
    assert found["would_be_swaps_bytes"] > GIB
    with_swap = bare.model_copy(update={"swap_bytes": others.swap_bytes})
    found = played("no-swap", guests=(with_swap, others))
    assert (found["stall_s"], found["oom_kills"]) == (0.0, 0)


def test_datacenter_in_small() -> None:
    loaded = load_scenario("datacenter")
    jobs = [Job(loaded.scenario, {}, "shares", host) for host in range(3)]
    runs = [run_job(job).totals for job in jobs]
    found = figures_of(runs)
    assert found["launches"] == 90
    assert found["demand_met_percent"] > 95
    assert found["stuck"] >= 3, "one of each host's guests is"
    assert len({run.counts.claimed_pages for run in runs}) == 3


@pytest.mark.parametrize("policy", [kind.name for kind in BUILT_IN])
def test_every_policy_can_be_tried_on_the_classic(policy: str) -> None:
    found = played("classic", policy, duration_s=400.0)
    assert 50 < found["demand_met_percent"] <= 100
    assert found["plans"] > 300


# The command


def test_the_same_seed_gives_the_same_bytes(small: str, tmp_path: Path) -> None:
    """In two processes, report, trace and picture."""
    outputs = []
    for number in (1, 2):
        trace, picture = tmp_path / f"{number}.jsonl", tmp_path / f"{number}.svg"
        arguments = ["simulate", small, "--policy", "shares", "--json", "--trace", str(trace)]
        done = subprocess.run(
            [sys.executable, "-c", RUN, *arguments, "--plot", str(picture)],
            capture_output=True,
            timeout=300,
            check=True,
            env={"PATH": "", "PYTHONHASHSEED": str(number)},
        )
        outputs.append((done.stdout, trace.read_bytes(), picture.read_bytes()))
    assert outputs[0] == outputs[1]
    assert all(outputs[0])
    _, other, _ = balloon(small, "--json", "--seed", "4")
    assert json.loads(other)["policies"] != json.loads(outputs[0][0])["policies"]


def test_a_table_with_a_column_for_each_policy(small: str) -> None:
    names = [kind.name for kind in BUILT_IN]
    status, out, err = balloon(small, *(word for name in names for word in ("--policy", name)))
    assert (status, err) == (0, "")
    first, second, headings, *rows = out.splitlines()
    assert first == "small: two"
    assert second == "2 guests, 30 s, seed 3"
    assert headings.split() == names
    assert any(row.startswith("demand met (%)") for row in rows)
    assert any(row.startswith("time to satisfy, p99 (s)") for row in rows)


def test_json(small: str) -> None:
    status, out, _ = balloon(small, "--json")
    made = json.loads(out)
    assert status == 0
    assert (made["scenario"], made["seed"], made["guests_per_host"]) == ("small", 3, 2)
    assert 0 < made["policies"]["shares"]["demand_met_percent"] < 100


def test_a_trace_tells_events_and_the_terms_of_decisions(small: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    balloon(small, "--trace", str(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"launch", "start", "decision", "offers", "gives", "gets", "short"} <= {
        line["event"] for line in lines
    }
    assert [line["s"] for line in lines] == sorted(line["s"] for line in lines)
    decision = next(line for line in lines if line["event"] == "decision")
    assert (decision["policy"], decision["vm"]) == ("shares", "a")
    assert decision["rule"]
    terms = {name: (value, unit) for name, value, unit in decision["terms"]}
    assert terms["assigned"] == (256 * 256, "pages")
    assert decision["target_bytes"] <= 256 * MIB


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_plot(small: str, tmp_path: Path, ending: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{ending}"
    status, _, err = balloon(small, "--plot", str(path))
    assert (status, err) == (0, "")
    assert path.read_bytes().startswith(begins)
    assert path.stat().st_size > 10_000


def test_without_matplotlib_it_is_one_line_before_anything(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    status, out, err = balloon(small, "--plot", str(tmp_path / "plot.svg"))
    assert (status, out) == (2, "")
    assert err == "balloon: matplotlib is not installed: pip install 'memballoon[plot]'\n"
    assert balloon(small)[0] == 0, "nothing else needs it"


def test_list() -> None:
    status, out, _ = balloon("--list")
    assert status == 0
    for name in shipped():
        assert any(line.startswith(name) for line in out.splitlines())
    assert set(json.loads(balloon("--list", "--json")[1])) == set(shipped())


def test_speeds_as_measured(small: str, tmp_path: Path) -> None:
    def met(mib_per_s: int) -> float:
        path = tmp_path / "bench.json"
        turns = {"balloon_s": [1.0, 2.0, 9.0], "bytes": 2 * mib_per_s * MIB}
        figures = [{"name": "other"}, {"name": "inflate_4KiB_ratio", "detail": turns}]
        path.write_text(json.dumps({"machine": {}, "figures": figures}))
        _, out, _ = balloon(small, "--json", "--speeds", str(path))
        return float(json.loads(out)["policies"]["shares"]["demand_met_percent"])

    assert met(1) < met(2000)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "no scenario given: see `balloon simulate --list`"),
        (("clasic",), "no scenario and no file 'clasic': give a TOML file, or one of boot-storm,"),
        (("classic", "--policy", "best"), "unknown policy 'best' (known: "),
        (("classic", "--plot", "x.pdf"), "x.pdf: a plot is a .png or .svg file"),
        (("classic", "--cluster", "tcp://x:1"), "--cluster goes with --engine dask"),
        (("datacenter", "--trace", "x"), "datacenter has 1000 hosts: --plot and --trace are for"),
        (("datacenter", "--host", "1001"), "datacenter has no host 1001: it has 1000"),
        (("classic", "--speeds", "/no"), "/no: No such file or directory"),
        (("classic", "--trace", "/no/x"), "/no/x: No such file or directory"),
    ],
)
def test_refused_in_one_line(arguments: tuple[str, ...], line: str) -> None:
    status, out, err = balloon(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"balloon: {line}")
    assert err.count("\n") == 1


def test_one_of_many_hosts(small: str, tmp_path: Path) -> None:
    many = tmp_path / "many.toml"
    many.write_text(Path(small).read_text().replace("[host]", "[host]\ncount = 3"))
    traces = []
    for host in ("1", "3"):
        trace = tmp_path / f"{host}.jsonl"
        status, out, _ = balloon(str(many), "--host", host, "--json", "--trace", str(trace))
        made = json.loads(out)
        assert (status, made["hosts"], made["host"]) == (0, 1, int(host))
        traces.append(trace.read_text())
    assert traces[0] != traces[1], "each has its own seeds"
    balloon(small, "--trace", str(tmp_path / "alone.jsonl"))
    assert traces[0] == (tmp_path / "alone.jsonl").read_text()
    assert balloon(str(many), "--host", "2")[1].splitlines()[1].startswith("host 2: 2 guests")


def test_a_trace_has_the_decisions_that_are_worth_a_record(small: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    balloon(small, "--trace", str(path))
    last: dict[str, int] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        if line["event"] == "stop":
            last.pop(line["vm"], None)
        if line["event"] == "decision":
            assert abs(line["target_bytes"] - last.get(line["vm"], -MIB)) >= MIB
            last[line["vm"]] = line["target_bytes"]
    assert last
