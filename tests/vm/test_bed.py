"""The bed itself: what comes out of it, how it ends, and that nothing is left of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

BED = Path(__file__).parent / "bed.py"
pytestmark = pytest.mark.vm
DEADLINE_S = 120.0


@dataclass(frozen=True)
class Bed:
    """`scratch` is where each run puts its files: empty again afterwards."""

    scratch: Path

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(BED), "run", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(self.scratch)},
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        with self.start(*arguments) as process:
            try:
                output, errors = process.communicate(timeout=DEADLINE_S)
            finally:
                process.terminate()
        return process.returncode, output, errors

    def qemus(self) -> list[int]:
        return [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if str(self.scratch) in _text(path)
        ]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def wait_for(predicate: Callable[[], object], what: str) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not predicate():
        assert time.monotonic() < end_s, what
        time.sleep(0.05)


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    made = Bed(tmp_path)
    try:
        yield made
        assert made.qemus() == []
        assert list(tmp_path.iterdir()) == []
    finally:
        for pid in made.qemus():
            os.kill(pid, signal.SIGKILL)


INSIDE = """
echo "controllers: $(cat /sys/fs/cgroup/cgroup.controllers)"
echo "mounts: $(grep -c ' cgroup ' /proc/mounts)"
echo "pressure: $(head -n 1 /proc/pressure/memory)"
echo "uid: $(id -u)"
echo "links: $(ls /sys/class/net)"
echo "here: $(pwd) $(test -f host_agent/cli.py && echo checkout)"
python -c 'import numpy, host_agent; print("python:", host_agent.__file__)'
touch protocol/made-inside
echo "an error" >&2
exit 7
"""


def test_a_command_under_version_2(bed: Bed) -> None:
    status, output, errors = bed.run("--", "sh", "-c", INSIDE)
    said = dict(line.split(": ", 1) for line in output.splitlines())
    assert status == 7, errors
    assert errors == "an error\n"
    assert "memory" in said["controllers"].split()
    assert said["mounts"] == "0", "no version 1"
    assert said["pressure"].startswith("some avg10=")
    assert said["uid"] == "0"
    assert said["links"] == "lo", "no network"
    assert said["here"] == "/root/memballoon checkout"
    assert said["python"] == "/root/memballoon/host_agent/__init__.py"
    assert not (BED.parent.parent.parent / "protocol" / "made-inside").exists()


def test_arguments_and_environment_arrive_as_they_are(bed: Bed) -> None:
    argument = "a 'b' \"c\" $HOME ü\n*"
    status, output, _ = bed.run(
        "--env", "X=y  z'", "--", "sh", "-c", 'echo "$X"; echo "$0"', argument
    )
    assert (status, output) == (0, f"y  z'\n{argument}\n")


def test_by_its_own_clock_an_emulated_machine_is_not_slow(bed: Bed) -> None:
    """The same work takes the same time as on any machine, however long it takes outside."""
    work = "import time; t = time.monotonic(); sum(range(10**7)); print(time.monotonic() - t)"
    status, output, errors = bed.run("--own-clock", "--", "python", "-S", "-c", work)
    assert status == 0, errors
    assert float(output) < 2.0


def test_a_signal_shows_in_the_status(bed: Bed) -> None:
    status, _, _ = bed.run("--", "sh", "-c", "kill -KILL $$")
    assert status == 128 + signal.SIGKILL


def test_much_output_arrives_whole(bed: Bed) -> None:
    status, output, _ = bed.run("--", "seq", "300000")
    assert status == 0
    assert output == "".join(f"{number}\n" for number in range(1, 300001))


def test_a_panic_is_125_and_says_so(bed: Bed) -> None:
    status, output, errors = bed.run("--", "sh", "-c", "echo before; echo c > /proc/sysrq-trigger")
    assert (status, output) == (125, "before\n")
    assert "Kernel panic" in errors
    assert "sysrq triggered crash" in errors


def test_time_up_is_125(bed: Bed) -> None:
    status, _, errors = bed.run("--timeout-s", "3", "--", "sleep", "1000")
    assert status == 125
    assert "not within 3 s" in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_end_from_outside_takes_the_vm_along(bed: Bed, number: signal.Signals) -> None:
    with bed.start("--", "sh", "-c", "echo ready; sleep 1000") as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            assert bed.qemus()
            process.send_signal(number)
            process.wait(DEADLINE_S)
            wait_for(lambda: not bed.qemus(), "the VM outlived its bed")
        finally:
            process.kill()
    if number == signal.SIGKILL:  # nobody was left to remove its files
        for path in sorted(bed.scratch.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    else:
        assert process.returncode == 128 + number
