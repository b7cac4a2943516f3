"""The doctor: judgements by value, and the whole of it on this machine."""

import json
import os
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from facade_fixtures import NumbersAgent, served

from host_agent import doctor
from host_agent.doctor import CAP_IPC_LOCK, Check, Verdict
from protocol.units import MIB

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
        (doctor.judge_swap("SwapTotal: 0 kB\n"), OK),
        (doctor.judge_swap("SwapTotal: 1048576 kB\n"), OK),
    ],
    ids=lambda value: f"{value.name}: {value.found}" if isinstance(value, Check) else None,
)
def test_judgements(check: Check, verdict: Verdict) -> None:
    assert check.verdict is verdict
    assert check.found
    if verdict is WARN or (verdict is FAIL and "no MemAvailable" not in check.found):
        assert check.what_to_do


def test_swap_says_how_much() -> None:
    assert doctor.judge_swap("SwapTotal: 1048576 kB\n").found.startswith("1GiB")


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
    assert check.verdict is (OK if b" 200 " in answer else WARN)
    assert str(path) in check.found


@pytest.mark.parametrize("where", ["unix:///nowhere/docker.sock", "tcp://127.0.0.1:2375"])
def test_no_docker_is_only_a_warning(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", where)
    assert doctor.check_docker().verdict is WARN


def test_a_running_agent_is_seen(tmp_path: Path) -> None:
    with served(NumbersAgent(), tmp_path / "control.sock"):
        check = doctor.check_agent(tmp_path)
    assert (check.verdict, check.found) == (OK, f"one answers at {tmp_path}/control.sock")


class _Left:
    root = Path("/sys/fs/cgroup/memory/memballoon")

    @staticmethod
    def names() -> tuple[str, ...]:
        return ("web1", "web2")


def test_what_a_dead_agent_left_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "detect", _Left)
    check = doctor.check_agent(tmp_path)
    assert check.verdict is WARN
    assert check.found.endswith("are left: web1, web2")


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_on_this_machine(as_json: bool, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from host_agent.cli import main; main()", "doctor"]
        + ["--json"] * as_json,
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
