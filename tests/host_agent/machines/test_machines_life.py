"""Mock VMs from launch to end, with real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from machine_rig import PATIENCE_S, MachineRig, until

from host_agent.machines.base import ExitStatus, MachineError
from host_agent.machines.identity import ProcessHandle
from host_agent.machines.process import ProcessBackend

pytestmark = pytest.mark.effects


def procs(path: Path) -> set[int]:
    return set(map(int, path.read_text().split()))


@pytest.mark.parametrize("code", [0, 7, 127])
def test_the_exit_status_is_kept(rig: MachineRig, code: int) -> None:
    async def main() -> None:
        machine = await rig.backend.launch(rig.spec("sh", "-c", f"exit {code}"))
        assert await machine.wait_exited() == ExitStatus(code)
        assert await machine.wait_exited() == ExitStatus(code)
        assert await machine.stop(1) == ExitStatus(code)

    trio.run(main)


def test_a_workload_killed_by_a_signal(rig: MachineRig) -> None:
    async def main() -> None:
        machine = await rig.backend.launch(rig.spec("sh", "-c", "kill -9 $$"))
        assert await machine.wait_exited() == ExitStatus(137, "ended by SIGKILL")

    trio.run(main)


def test_every_waiter_is_told(rig: MachineRig) -> None:
    async def main() -> None:
        machine = await rig.backend.launch(rig.spec("sleep", "60"))
        found: list[ExitStatus] = []

        async def wait() -> None:
            found.append(await machine.wait_exited())

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert not found
            nursery.start_soon(machine.stop, PATIENCE_S)
        assert found == [ExitStatus(143, "ended by SIGTERM")] * 3

    trio.run(main)


def test_stop_lets_the_workload_end_by_itself(rig: MachineRig) -> None:
    script = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.05; done"

    async def main() -> None:
        spec = rig.spec("sh", "-c", script)
        machine = await rig.backend.launch(spec)
        await until(lambda: "up" in spec.log_path.read_text(), "the workload runs")
        assert await machine.stop(PATIENCE_S) == ExitStatus(5)
        assert "bye" in spec.log_path.read_text()

    trio.run(main)


def test_stop_kills_what_does_not_end(rig: MachineRig) -> None:
    script = "trap '' TERM; echo up; setsid sleep 61 & while :; do sleep 0.05; done"

    async def main() -> None:
        spec = rig.spec("sh", "-c", script, driver_argv=("sleep", "62"))
        machine = await rig.backend.launch(spec)
        await until(lambda: "up" in spec.log_path.read_text(), "the workload runs")
        assert await machine.stop(0.05) == ExitStatus(137, "killed as a whole")
        assert not procs(spec.workload_procs) | procs(spec.driver_procs)

    trio.run(main)


def test_each_process_is_in_its_cgroup(rig: MachineRig) -> None:
    async def main() -> None:
        spec = rig.spec("sleep", "60", driver_argv=("sleep", "61"))
        async with rig.running(spec) as machine:
            await until(lambda: "61" in commands(spec.driver_procs), "the driver runs")
            await until(lambda: commands(spec.workload_procs) == ["60"], "the workload runs")
            assert machine.init_pid in procs(spec.driver_procs)
            assert f"NSpid:\t{machine.init_pid}\t1" in status_of(machine.init_pid)

    def commands(path: Path) -> list[str]:
        lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in procs(path)]
        return [line.split(b"\0")[1].decode() for line in lines if line.startswith(b"sleep\0")]

    trio.run(main)


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def test_nothing_of_the_workload_is_charged_to_the_driver(rig: MachineRig) -> None:
    v1, v2 = "memory.usage_in_bytes", "memory.current"
    hog = "import sys; data = b'x' * (64 << 20); print('full', flush=True); sys.stdin.read(); "
    hog += "import time; time.sleep(60)"

    async def main() -> None:
        spec = rig.spec(sys.executable, "-S", "-c", hog)
        async with rig.running(spec):
            await until(lambda: "full" in spec.log_path.read_text(), "memory is filled")
            driver, workload = (
                int((path.parent / usage).read_text())
                for path in (spec.driver_procs, spec.workload_procs)
            )
            assert workload > 64 << 20
            assert driver < 8 << 20

    usage = v1 if (rig.cgroup / v1).exists() else v2
    trio.run(main)


def test_a_driver_that_ends_is_started_again(rig: MachineRig) -> None:
    async def main() -> None:
        driver = ("sh", "-c", "echo driver; exit 3")
        spec = rig.spec("sleep", "60", driver_argv=driver)
        async with rig.running(spec):
            await until(lambda: spec.log_path.read_text().count("driver\n") >= 2, "it came again")
            assert "the driver ended (3)" in spec.log_path.read_text()

    trio.run(main)


def test_orphans_are_reaped(rig: MachineRig) -> None:
    script = "i=0; while [ $i -lt 5 ]; do (sh -c 'sleep 0.01 & exit' &); i=$((i+1)); done; sleep 60"

    async def main() -> None:
        spec = rig.spec("sh", "-c", script)
        async with rig.running(spec) as machine:
            children = Path(f"/proc/{machine.init_pid}/task/{machine.init_pid}/children")
            # its own two: the workload, and the workload's sleep is not its child
            await until(lambda: len(children.read_text().split()) == 1, "no zombies")

    trio.run(main)


def test_odd_words_reach_the_command_unchanged(rig: MachineRig) -> None:
    words = ["a b", "$HOME", "`id`", "it's", '"', "\\", "new\nline", "@COMMAND@", "", "*"]
    script = "import sys, os; print(ascii(sys.argv[1:]), os.environ['ODD'])"

    async def main() -> None:
        spec = rig.spec(sys.executable, "-S", "-c", script, *words, env={"ODD": "x y'z"})
        machine = await rig.backend.launch(spec)
        assert (await machine.wait_exited()).ok
        assert spec.log_path.read_text() == f"{words!a} x y'z\n"

    trio.run(main)


def test_nothing_of_the_agents_environment_leaks(
    rig: MachineRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MBTEST_SECRET", "s3cret")
    assert "s3cret" not in trio.run(rig.output, "env")


@pytest.mark.parametrize("program", ["mbtest-no-such-program", "/no/such/program", "/etc/passwd"])
def test_a_command_that_is_no_program(rig: MachineRig, program: str) -> None:
    async def main() -> None:
        spec = rig.spec(program, "x", driver_argv=("sleep", "60"))
        with pytest.raises(MachineError) as caught:
            await rig.backend.launch(spec)
        assert str(caught.value) == f"vm1 can't be started: no program {program} in the mock VM"
        assert not rig.processes()

    trio.run(main)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workload_procs": Path("/no/such/procs")}, "/no/such/procs"),
        ({"driver_procs": Path("/no/such/procs")}, "can't join the driver's cgroup"),
        ({"cgroup_dir": Path("/no/such/cgroup")}, "/no/such/cgroup"),
        ({"disk_dir": Path("/proc/no/disk")}, "/proc/no"),
        ({"name": "a b"}, "no host name"),
        ({"command": ()}, "no command"),
    ],
)
def test_a_launch_that_fails_says_why_and_leaves_nothing(
    rig: MachineRig, changes: dict[str, Any], message: str
) -> None:
    async def main() -> None:
        spec = rig.spec("sleep", "60")
        spec = type(spec)(**({name: getattr(spec, name) for name in spec.__slots__} | changes))
        with pytest.raises(MachineError) as caught:
            await rig.backend.launch(spec)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not rig.processes()

    trio.run(main)


@pytest.mark.parametrize("delay_ms", [0, 5, 10, 20, 40, 60])
def test_a_cancelled_launch_leaves_nothing(rig: MachineRig, delay_ms: int) -> None:
    async def main() -> None:
        spec = rig.spec("sleep", "60", driver_argv=("sleep", "61"))
        with trio.move_on_after(delay_ms / 1000):
            machine = await rig.backend.launch(spec)
            with trio.CancelScope(shield=True):
                await machine.stop(0)
        assert not rig.processes()

    trio.run(main)


def test_without_the_agents_answer_there_is_no_machine(rig: MachineRig) -> None:
    spec = rig.spec("sh", "-c", "echo it runs; sleep 60")
    child, talk = rig.backend._start(spec)
    with talk, talk.makefile("rb") as hearing:
        talk.shutdown(socket.SHUT_WR)
        heard = hearing.read()
    assert child.wait(PATIENCE_S) == 0
    assert heard.startswith(b"pid ")
    assert b"ready" not in heard
    assert spec.log_path.read_text() == ""


def test_a_machine_outlives_its_agent_and_is_adopted(rig: MachineRig, tmp_path: Path) -> None:
    script = tmp_path / "agent.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import json, sys
            from pathlib import Path
            sys.path[:0] = {sys.path!r}
            import trio
            from machine_rig import MachineRig
            rig = MachineRig(Path({str(rig.cgroup)!r}), Path({str(rig.base)!r}))
            async def main():
                spec = rig.spec("sh", "-c", "trap 'exit 9' TERM; while :; do sleep 0.05; done")
                machine = await rig.backend.launch(spec)
                print(json.dumps(machine.state), flush=True)
                await trio.sleep_forever()
            trio.run(main)
            """
        )
    )
    agent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    state = json.loads(agent.stdout.readline())
    agent.kill()
    agent.wait()
    agent.stdout.close()

    async def main() -> None:
        os.kill(state["init_pid"], 0)
        backend = ProcessBackend()
        machine = await backend.adopt(state)
        assert machine is not None
        assert (machine.name, machine.init_pid, machine.state) == ("vm1", state["init_pid"], state)
        with trio.move_on_after(0.05) as scope:
            await machine.wait_exited()
        assert scope.cancelled_caught
        assert await machine.stop(PATIENCE_S) == ExitStatus(9)
        assert await backend.adopt(state) is None

    trio.run(main)


def test_other_processes_are_not_adopted(rig: MachineRig) -> None:
    async def main() -> None:
        async with rig.running(rig.spec("sleep", "60")) as machine:
            state = machine.state
            assert await rig.backend.adopt(state | {"init_start_ticks": 1}) is None
            assert await rig.backend.adopt(state | {"boot_id": "another"}) is None
            for damaged in ({}, state | {"init_pid": "x"}, state | {"socket_dir": None}):
                with pytest.raises(MachineError, match="makes no sense"):
                    await rig.backend.adopt(damaged)

    trio.run(main)


def test_a_killed_supervisor_is_no_end_and_leaves_the_status_unknown(rig: MachineRig) -> None:
    async def main() -> None:
        machine = await rig.backend.launch(rig.spec("sleep", "60"))
        os.kill(machine.state["supervisor_pid"], signal.SIGKILL)
        with trio.move_on_after(0.05) as scope:
            await machine.wait_exited()
        assert scope.cancelled_caught
        status = await machine.stop(5)
        assert status.code is None
        assert "unknown" in str(status)

    trio.run(main)


def test_a_machine_without_supervisor_is_adopted_again_and_again(rig: MachineRig) -> None:
    async def main() -> None:
        machine = await rig.backend.launch(rig.spec("sleep", "60"))
        supervisor = ProcessHandle.of(machine.state["supervisor_pid"])
        supervisor.send(signal.SIGKILL)
        await supervisor.wait_ended()
        supervisor.close()
        state = machine.state
        for _ in range(3):
            found = await rig.backend.adopt(json.loads(json.dumps(state)))
            assert found is not None
            state = found.state
            assert state["supervisor_pid"] is None
        # Written by earlier versions for a supervisor that was gone.
        zero = {"supervisor_pid": 0, "supervisor_start_ticks": 0}
        found = await rig.backend.adopt(state | zero)
        assert found is not None
        assert (await found.stop(5)).code is None
        await machine.wait_exited()

    trio.run(main)


@pytest.mark.parametrize("pid", [0, -1, 1 << 40])
def test_a_number_that_is_no_pid_is_no_process(pid: int) -> None:
    assert ProcessHandle.find(pid, 0) is None


def test_two_machines_live_side_by_side(rig: MachineRig) -> None:
    async def main() -> None:
        async with (
            rig.running(rig.spec("sleep", "60", name="a")) as one,
            rig.running(rig.spec("sleep", "60", name="b")) as two,
        ):
            await one.stop(5)
            assert one.init_pid != two.init_pid
            os.kill(two.init_pid, 0)

    trio.run(main)


def test_launch_time_is_printed(rig: MachineRig) -> None:
    async def main() -> list[tuple[float, float]]:
        times = []
        for _ in range(7):
            began = time.perf_counter()
            machine = await rig.backend.launch(rig.spec("sleep", "60"))
            ready = time.perf_counter()
            await machine.stop(5)
            times.append((ready - began, time.perf_counter() - ready))
        return times

    times = trio.run(main)
    ready, ended = (sorted(column)[len(column) // 2] * 1e3 for column in zip(*times, strict=True))
    print(f"\nready in {ready:.0f} ms, stopped in {ended:.1f} ms (medians); aim 100 ms")
