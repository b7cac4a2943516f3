"""The bed itself: what comes out of it, how it ends, and that nothing is left of it."""

import re
import signal

import pytest
from bed_rig import BED, DEADLINE_S, Bed, wait_for

pytestmark = pytest.mark.vm

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
    status, output, errors = bed.run("run", "--", "sh", "-c", INSIDE)
    said = dict(line.split(": ", 1) for line in output.splitlines())
    assert status == 7, errors
    booted, *others = errors.splitlines()
    assert others == ["an error"]
    took = re.fullmatch(r"bed: booted to the command in (\d+\.\d) s", booted)
    assert took is not None
    assert 0 < float(took.group(1)) < DEADLINE_S
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
        "run", "--env", "X=y  z'", "--", "sh", "-c", 'echo "$X"; echo "$0"', argument
    )
    assert (status, output) == (0, f"y  z'\n{argument}\n")


def test_by_its_own_clock_an_emulated_machine_is_not_slow(bed: Bed) -> None:
    """The same work takes the same time as on any machine, however long it takes outside."""
    work = "import time; t = time.monotonic(); sum(range(10**7)); print(time.monotonic() - t)"
    status, output, errors = bed.run("run", "--own-clock", "--", "python", "-S", "-c", work)
    assert status == 0, errors
    assert float(output) < 2.0


def test_a_signal_shows_in_the_status(bed: Bed) -> None:
    status, _, _ = bed.run("run", "--", "sh", "-c", "kill -KILL $$")
    assert status == 128 + signal.SIGKILL


def test_much_output_arrives_whole(bed: Bed) -> None:
    status, output, _ = bed.run("run", "--", "seq", "300000")
    assert status == 0
    assert output == "".join(f"{number}\n" for number in range(1, 300001))


def test_a_panic_is_125_and_says_so(bed: Bed) -> None:
    status, output, errors = bed.run(
        "run", "--", "sh", "-c", "echo before; echo c > /proc/sysrq-trigger"
    )
    assert (status, output) == (125, "before\n")
    assert "Kernel panic" in errors
    assert "sysrq triggered crash" in errors


def test_time_up_is_125(bed: Bed) -> None:
    status, _, errors = bed.run("run", "--timeout-s", "3", "--", "sleep", "1000")
    assert status == 125
    assert "not within 3 s" in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_end_from_outside_takes_the_vm_along(bed: Bed, number: signal.Signals) -> None:
    with bed.start("run", "--", "sh", "-c", "echo ready; sleep 1000") as process:
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
