"""A container's first program: options, the knock, and that it becomes the workload."""

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_driver import container
from guest_driver.cli import main
from host_agent.quota.detect import MOUNTINFO, memory_mounts
from host_agent.sizes import parse_size

PATIENCE_S = 60.0
BALLOON_GUEST = "from guest_driver.cli import main; import sys; sys.exit(main())"


@pytest.mark.parametrize(
    "size",
    ["512MiB", "512mib", "512M", "512m", "512MB", "1.5GiB", ".5g", "64 MiB", "1048576", "8192b"],
)
def test_a_size_is_read_as_the_host_reads_it(size: str) -> None:
    assert container.pages_of(size) == parse_size(size) // 4096


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory=64MiB", "sleep", "1"], "no `--` before the command"),
        (["--memory=64MiB", "--"], "no command after `--`"),
        (["--", "true"], "--memory is missing: say --memory=512MiB"),
        (["--memory=lots", "--", "true"], "--memory=lots is no size"),
        (["--memory=64", "--", "true"], "--memory=64 is less than a page"),
        (["--memory=16385GiB", "--", "true"], "--memory=16385GiB is more than a guest can have"),
        (["--memory=" + 400 * "9", "--", "true"], "is more than a guest can have"),
        (["--memory=1MiB", "--frame-order=x", "--", "true"], "--frame-order=x: it is 0"),
        (["--memory=1MiB", "--swap=2", "--", "true"], "unknown option --swap=2"),
        (["--memory", "64MiB", "--", "true"], "unknown option --memory"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments]) == 2
    output = capsys.readouterr().err
    assert output.startswith("balloon-guest: ")
    assert said in output
    assert output.count("\n") == 1


def test_a_program_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--memory=64MiB", "--", "no-such-program"]) == 127
    assert capsys.readouterr().err == (
        "balloon-guest: no program no-such-program in this container\n"
    )


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    assert "--memory=SIZE" in capsys.readouterr().out


def test_the_driver_gets_its_options() -> None:
    options, command = container.parse(["--memory=64MiB", "--socket=/s", "--", "a", "--", "b"])
    assert command == ["a", "--", "b"]
    assert container.driver_command(options)[-5:] == [
        "driver",
        "--socket=/s",
        f"--cgroup={container.CGROUP}",
        "--frame-order=0",
        "--assigned-pages=16384",
    ]


# In a pid namespace it is process 1's only child that is told to end, as in a container.


def start(tmp_path: Path, *command: str) -> "subprocess.Popen[str]":
    guest = (sys.executable, "-c", BALLOON_GUEST, "run", "--memory=64MiB")
    return subprocess.Popen(
        [
            *("unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"),
            *(*guest, f"--socket={tmp_path}/none.sock", "--", *command),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.effects
def test_its_status_is_the_workloads(tmp_path: Path) -> None:
    child = start(tmp_path, "sh", "-c", "echo here; exit 7")
    output, errors = child.communicate(timeout=PATIENCE_S)
    assert (child.returncode, output, errors) == (7, "here\n", "")


@pytest.mark.effects
def test_it_is_the_workload_and_hears_the_signals_itself(tmp_path: Path) -> None:
    loop = "trap 'echo told; exit 9' TERM; echo $$; while :; do sleep 0.05; done"
    child = start(tmp_path, "sh", "-c", loop)
    assert child.stdout is not None
    assert child.stdout.readline() == "1\n"
    [init] = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    os.kill(int(init), signal.SIGTERM)
    output, _ = child.communicate(timeout=PATIENCE_S)
    assert (child.returncode, output) == (9, "told\n")


@pytest.mark.effects
def test_a_broken_pipe_ends_the_workload_as_ever(tmp_path: Path) -> None:
    shown = "grep SigIgn /proc/self/status"
    output, _ = start(tmp_path, "sh", "-c", shown).communicate(timeout=PATIENCE_S)
    assert not int(output.split()[1], 16) >> (signal.SIGPIPE - 1) & 1


# The knock


@pytest.fixture
def driver_cgroup(cgroup_name: str) -> Iterator[Path]:
    hierarchy = next(found for found in memory_mounts(MOUNTINFO.read_text()) if found)
    path = hierarchy / cgroup_name
    path.mkdir()
    yield path
    end_s = time.monotonic() + PATIENCE_S
    while path.exists():
        with contextlib.suppress(OSError):
            path.rmdir()
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.fixture
def knocking(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    code = f"from guest_driver.container import knock; knock({str(tmp_path / 'x.sock')!r})"
    child = subprocess.Popen([sys.executable, "-c", code])
    yield child
    child.kill()
    child.wait()


def visitor(listening: socket.socket) -> tuple[socket.socket, int]:
    assert select.select([listening], [], [], PATIENCE_S)[0], "nobody knocks"
    visit, _ = listening.accept()
    raw = visit.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return visit, struct.unpack("3i", raw)[0]


@pytest.mark.effects
def test_it_knocks_until_it_is_moved(
    tmp_path: Path, driver_cgroup: Path, knocking: "subprocess.Popen[bytes]"
) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "x.sock"))
        listening.listen()
        first, pid = visitor(listening)
        assert pid == knocking.pid
        first.close()  # turned away
        second, again = visitor(listening)
        assert again == pid
        assert knocking.poll() is None
        (driver_cgroup / "cgroup.procs").write_text(str(pid))
        second.close()
        assert knocking.wait(PATIENCE_S) == 0
