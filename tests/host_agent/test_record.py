"""`balloon record`: rows for what the agent tells, and a line for what can't be recorded."""

import csv
import errno
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import trio
from facade_fixtures import NumbersAgent, served

from host_agent.cli import main
from host_agent.facade.port import VmSpec
from host_agent.simulator.recording import COLUMNS, Recorder
from host_agent.simulator.scenario import Recorded
from host_agent.simulator.traces import read_recording
from protocol.units import MIB


def record(*arguments: str) -> tuple[int, str, str]:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        main(("record", *arguments))
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture
def agent() -> NumbersAgent:
    """Two VMs that have told of themselves, and one that has not yet."""
    made = NumbersAgent()
    for number, name in enumerate(("a", "b", "quiet"), start=1):
        spec = VmSpec.model_validate({"name": name, "assigned_bytes": 64 * MIB})
        trio.run(made.launch, spec)
        if name != "quiet":
            told = {"usage_bytes": number * MIB, "demand_bytes": 9 * MIB}
            made.views[name] = made.views[name].model_copy(update=told)
    return made


@pytest.fixture
def run_dir(agent: NumbersAgent, tmp_path: Path) -> Iterator[str]:
    with served(agent, tmp_path / "control.sock"):
        yield str(tmp_path)


def test_a_recording(agent: NumbersAgent, run_dir: str, tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    looks = ("--interval-s", "0.05", "--duration-s", "0.2")
    status, out, err = record(str(path), *looks, "--run-dir", run_dir)
    assert (status, err) == (0, "")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    told = [vm for vm in agent.vms() if vm.usage_bytes is not None]
    assert len(told) == 2
    assert len(rows) == 5 * len(told)
    assert out == f"{path}: {len(rows)} rows\n"
    assert tuple(rows[0]) == COLUMNS
    first = next(row for row in rows if row["vm"] == told[0].name)
    assert first["usage_bytes"] == str(told[0].usage_bytes)
    assert first["quota_bytes"] == str(told[0].quota_bytes)
    assert first["working_set_bytes"] == "", "not known"
    times_s = [float(row["time_s"]) for row in rows]
    assert times_s == sorted(times_s)
    played = read_recording(path, Recorded(kind="recorded", file="run.csv", column="usage_bytes"))
    assert set(played) == {vm.name for vm in told}


def test_a_file_that_is_there_is_kept(run_dir: str, tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text("mine")
    status, _, err = record(str(path), "--run-dir", run_dir)
    assert (status, err) == (2, f"balloon: {path} exists: choose another name\n")
    assert path.read_text() == "mine"


def test_without_an_agent_no_file_is_made(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    status, _, err = record(str(path), "--run-dir", str(tmp_path))
    assert status == 2
    assert "no agent answers" in err
    assert not path.exists()


def test_where_nothing_is_told_nothing_is_left(
    agent: NumbersAgent, run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "vms", list)
    path = tmp_path / "run.csv"
    status, _, err = record(str(path), "--duration-s", "0.01", "--run-dir", run_dir)
    assert (status, err) == (2, "balloon: no VM has told of itself: nothing was recorded\n")
    assert not path.exists()


def test_where_the_first_look_fails_nothing_is_left(
    run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Recorder, "look", full)
    path = tmp_path / "run.csv"
    status, _, err = record(str(path), "--run-dir", run_dir)
    assert (status, err) == (2, f"balloon: {path}: No space left on device\n")
    assert not path.exists()


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1", "soon"])
@pytest.mark.parametrize("option", ["--interval-s", "--duration-s"])
def test_what_is_no_time(tmp_path: Path, option: str, seconds: str) -> None:
    path = tmp_path / "run.csv"
    status, _, err = record(str(path), option, seconds, "--run-dir", str(tmp_path))
    assert status == 2
    assert option in err
    assert not path.exists()
