"""The doctor: judgements by value, and the whole of it on this machine."""

import contextlib
import json
import os
import resource
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from facade_fixtures import NumbersAgent, served

from host_agent import doctor
from host_agent.doctor import CAP_IPC_LOCK, Check, Verdict
from host_agent.quota.base import Part
from host_agent.quota.cgroup2_backend import Cgroup2Backend
from host_agent.quota.detect import detect
from host_agent.quota.errors import QuotaUnavailable
from protocol.units import MIB

RUN = "from host_agent.cli import main; main()"
OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL


@pytest.mark.parametrize(
    ("check", "verdict"),
    [
        (doctor.judge_kernel("6.1.0-18-amd64"), OK),
        (doctor.judge_kernel("5.18.0"), OK),
        (doctor.judge_kernel("5.17.9-generic"), FAIL),
        (doctor.judge_kernel("4.19"), FAIL),
        (doctor.judge_page_size(4096), OK),
        (doctor.judge_page_size(65536), FAIL),
        (doctor.judge_locked_memory(1 << CAP_IPC_LOCK, 8 * MIB), OK),
        (doctor.judge_locked_memory(0, resource.RLIM_INFINITY), OK),
        (doctor.judge_locked_memory((1 << CAP_IPC_LOCK) - 1, 8 * MIB), FAIL),
        (doctor.judge_free_memory("MemAvailable: 4194304 kB\n"), OK),
        (doctor.judge_free_memory("MemAvailable: 100000 kB\n"), WARN),
        (doctor.judge_free_memory("MemFree: 100000 kB\n"), FAIL),
        (doctor.judge_swap("SwapTotal: 0 kB\n", True), OK),
        (doctor.judge_swap("SwapTotal: 0 kB\n", False), OK),
        (doctor.judge_swap("SwapTotal: 1048576 kB\n", True), OK),
        (doctor.judge_swap("SwapTotal: 1048576 kB\n", None), OK),
        (doctor.judge_swap("SwapTotal: 1048576 kB\n", False), WARN),
    ],
    ids=lambda value: f"{value.name}: {value.found}" if isinstance(value, Check) else None,
)
def test_judgements(check: Check, verdict: Verdict) -> None:
    assert check.verdict is verdict
    assert check.found
    if verdict is WARN or (verdict is FAIL and "no MemAvailable" not in check.found):
        assert check.what_to_do


def test_swap_says_how_much() -> None:
    assert doctor.judge_swap("SwapTotal: 1048576 kB\n", True).found.startswith("1GiB")
    unaccounted = doctor.judge_swap("SwapTotal: 1048576 kB\n", False)
    assert "not accounted" in unaccounted.found
    assert unaccounted.what_to_do is not None
    assert "swapaccount=1" in unaccounted.what_to_do


def test_a_check_that_breaks_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_pressure", lambda: 1 // 0 or int("x"))
    with pytest.raises(ZeroDivisionError):  # a defect stays loud
        doctor.run_checks(Path("/nowhere"))

    def broken() -> Check:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(doctor, "check_pressure", broken)
    checks = {check.name: check for check in doctor.run_checks(Path("/nowhere"))}
    assert checks["pressure"].verdict is FAIL
    assert "Input/output error" in checks["pressure"].found
    assert len(checks) == 13


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor.check_namespaces()
    assert check.verdict is FAIL
    assert check.found == "no unshare, no nsenter, no setpriv"
    assert check.what_to_do == "apt-get install util-linux"


@pytest.mark.parametrize("answer", [b"HTTP/1.0 200 OK\r\n\r\nOK", b"HTTP/1.0 503 no\r\n\r\n", b""])
def test_docker_is_an_engine_that_answers(
    answer: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as engine:
        engine.bind(str(path))
        engine.listen()

        def serve() -> None:
            with engine.accept()[0] as asker:
                asker.recv(1024)
                asker.sendall(answer)

        serving = threading.Thread(target=serve)
        serving.start()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        check = doctor.check_docker()
        serving.join(10)
    assert check.found.endswith(f"{'an' if b' 200 ' in answer else 'no'} engine answers at {path}")


@pytest.mark.parametrize("where", ["unix:///nowhere/docker.sock", "tcp://127.0.0.1:2375"])
def test_docker_is_information_and_promises_nothing(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", where)
    check = doctor.check_docker()
    assert (check.verdict, check.what_to_do) == (OK, None)
    assert check.found.startswith("not needed, mock VMs here are processes; ")


def test_a_running_agent_is_seen(tmp_path: Path) -> None:
    with served(NumbersAgent(), tmp_path / "control.sock"):
        check = doctor.check_agent(tmp_path)
    assert (check.verdict, check.found) == (OK, f"one answers at {tmp_path}/control.sock")


@pytest.mark.parametrize("systemd", [True, False])
def test_the_memory_cgroup_is_said_with_its_place(
    systemd: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = Cgroup2Backend(tmp_path / "a", delegated=False)
    monkeypatch.setattr(doctor, "detect", lambda path: here)
    monkeypatch.setattr(doctor, "SYSTEMD_RUNS", tmp_path if systemd else tmp_path / "none")
    check = doctor.check_memory_cgroup()
    advice = ", beside systemd's own; `systemd-run -p Delegate=yes balloon agent` has a part"
    assert check.verdict is OK
    assert check.found == f"version 2 at {tmp_path}" + (f"{advice} delegated" if systemd else "")
    here.delegated = True
    assert doctor.check_memory_cgroup().found == f"version 2 at {tmp_path}, delegated"

    def nothing(path: str) -> Cgroup2Backend:
        raise QuotaUnavailable("no memory controller: have it delegated")

    monkeypatch.setattr(doctor, "detect", nothing)
    check = doctor.check_memory_cgroup()
    assert (check.verdict, check.found) == (FAIL, "none")
    assert check.what_to_do == "no memory controller: have it delegated"


@pytest.fixture
def left_in() -> Iterator[str]:
    """A cgroup root below which a VM was left, empty and without an agent."""
    name = f"mbtest-{secrets.token_hex(4)}"
    root = detect(name).root
    parts = [root / "web1" / part for part in Part]
    try:
        for part in parts:
            part.mkdir(parents=True)
        yield name
    finally:
        for directory in (*parts, root / "web1", root):
            with contextlib.suppress(FileNotFoundError):
                directory.rmdir()


@pytest.mark.effects
def test_what_a_dead_agent_left_is_named_for_its_root(left_in: str, tmp_path: Path) -> None:
    check = doctor.check_agent(tmp_path, left_in)
    assert check.verdict is WARN
    assert check.found.endswith(f"VMs are left in {left_in}: web1")
    other = doctor.check_agent(tmp_path, f"{left_in}-other")
    assert (other.verdict, other.what_to_do) == (OK, None)


@pytest.mark.effects
def test_the_command_looks_where_the_configuration_says(left_in: str, tmp_path: Path) -> None:
    config = tmp_path / "balloon.toml"
    config.write_text(
        f'[host]\npool = "64MiB"\nrun_dir = "{tmp_path}/run"\ncgroup_root = "{left_in}"\n',
        encoding="utf-8",
    )
    (found,) = agent_check("--config", str(config))
    assert found.startswith(f"none at {tmp_path}/run/control.sock")
    assert left_in in found
    (found,) = agent_check("--config", str(config), "--run-dir", f"{tmp_path}/other")
    assert found.startswith(f"none at {tmp_path}/other/control.sock")
    assert left_in in found


def agent_check(*arguments: str) -> list[str]:
    """What `balloon doctor` says of the agent."""
    environment = {key: value for key, value in os.environ.items() if key != "MEMBALLOON_RUN_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "doctor", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    checks = json.loads(done.stdout)["checks"]
    return [check["found"] for check in checks if check["name"] == "agent"]


def test_a_run_directory_that_is_too_long_is_no_fault_of_the_machine(tmp_path: Path) -> None:
    check = doctor.check_agent(tmp_path / ("x" * 100))
    assert check.verdict is FAIL
    assert "more than 107 bytes" in check.found
    assert check.what_to_do == "choose a shorter run directory"
    others = [Check("root", OK, "yes"), Check("huge pages", WARN, "off", "on")]
    assert doctor.is_fit([*others, check])
    assert not doctor.is_fit([*others, Check("kernel", FAIL, "4.19", "newer")])


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_on_this_machine(as_json: bool, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, "doctor"] + ["--json"] * as_json,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "MEMBALLOON_RUN_DIR": str(tmp_path)},
    )
    assert done.stderr == ""
    failed = [check for check in doctor.run_checks(tmp_path) if check.verdict is FAIL]
    assert done.returncode == (2 if failed else 0)
    if as_json:
        report = json.loads(done.stdout)
        assert report["fit"] == (not failed)
        assert {check["name"] for check in report["checks"]} >= {"root", "memory cgroup", "agent"}
    else:
        assert done.stdout.splitlines()[0].split() == ["CHECK", "FOUND", "WHAT", "TO", "DO"]


@pytest.mark.effects
def test_where_effects_can_run_the_doctor_agrees(tmp_path: Path) -> None:
    checks = {check.name: check for check in doctor.run_checks(tmp_path)}
    for name in ("root", "memory cgroup", "locked memory", "page frames"):
        assert checks[name].verdict is OK, checks[name]
