"""Stopping a mock VM wherever it is in its life, and what is said where that can't be done."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing
from scenario_rig import PATIENCE_S, Rig, appetite, spec, touched, until, workload

from host_agent import hosting
from host_agent.agent import Agent
from host_agent.blocking import DeadlinePassed
from host_agent.errors import AgentError, UserError, VmExists
from host_agent.guest import Guest, Phase
from host_agent.machines import process
from host_agent.machines.base import ExitStatus, MachineError
from host_agent.machines.process import ProcessMachine
from host_agent.quota.errors import QuotaError
from protocol.units import MIB

pytestmark = pytest.mark.effects

FREEZER = Path("/sys/fs/cgroup/freezer")


def nothing_of(rig: Rig, agent: Agent, name: str) -> list[str]:
    """What is there of a VM that should not be."""
    found = [str(path) for path in rig.base.glob(f"*/*/{name}*")]
    if (rig.cgroup / name).exists():
        found.append(f"cgroup {name}")
    if name in agent.ledger or name in agent.balancer.guests:
        found.append("an entry in the books")
    return found


async def launch_that_is_stopped(agent: Agent, name: str, **changes: Any) -> None:
    with pytest.raises(UserError) as refused:
        await agent.launch(spec(name, **changes))
    assert refused.value.one_line() == f"{name} was stopped while it was being launched"


def test_stopping_one_that_waits_for_memory(rig: Rig) -> None:
    async def scenario() -> None:
        async with rig.agent(pool_mib=216, reserve_mib=16) as agent:
            await agent.launch(spec("full", 200, reservation_bytes=50 * MIB))
            client = workload(agent, "full")
            await appetite(client, 150)
            await touched(client, 150)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    lambda: launch_that_is_stopped(agent, "b", mib=160, reservation_bytes=120 * MIB)
                )
                await until(lambda: "b" in agent.balancer.guests, "its admission")
                await trio.sleep(0.2)
                assert agent.balancer.guests["b"].phase is Phase.PENDING
                with trio.fail_after(PATIENCE_S):
                    await agent.stop("b")
                assert nothing_of(rig, agent, "b") == []
            await until(lambda: agent.vm("full").quota_bytes == 200 * MIB, "all of it")

    rig.play(scenario)


def test_stopping_one_whose_wait_ends_in_the_same_moment(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = False
    monkeypatch.setattr(Agent, "_may_start", lambda _agent, _guest: enough)

    async def scenario() -> None:
        nonlocal enough
        async with rig.agent() as agent, trio.open_nursery() as nursery:
            nursery.start_soon(launch_that_is_stopped, agent, "a")
            await until(lambda: "a" in agent.balancer.guests, "its admission")
            await trio.testing.wait_all_tasks_blocked(0.01)
            guest = agent.balancer.guests["a"]
            enough = True
            guest.tell_quota_changed()
            with trio.fail_after(PATIENCE_S):
                await agent.stop("a")
            assert nothing_of(rig, agent, "a") == []
            assert not rig.processes()

    rig.play(scenario)


STEPS: dict[str, Callable[[Rig, Guest], bool]] = {
    "admitted": lambda _rig, _guest: True,
    "starting": lambda _rig, guest: guest.phase is not Phase.PENDING,
    "has a quota": lambda _rig, guest: guest.quota is not None,
    "has a process": lambda rig, _guest: bool(rig.processes()),
    "has a machine": lambda _rig, guest: guest.machine is not None,
    "connects": lambda _rig, guest: guest.connected.is_set(),
}


@pytest.mark.parametrize("step", STEPS)
def test_stopped_at_each_step_of_its_launch(rig: Rig, step: str) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent, trio.open_nursery() as nursery:
            nursery.start_soon(launch_that_is_stopped, agent, "a")
            while "a" not in agent.balancer.guests:
                await trio.lowlevel.checkpoint()
            guest = agent.balancer.guests["a"]
            while not STEPS[step](rig, guest):
                await trio.lowlevel.checkpoint()
            with trio.fail_after(PATIENCE_S):
                await agent.stop("a")
            assert nothing_of(rig, agent, "a") == []
            assert agent.host().free_bytes == (512 - 16) * MIB
            await agent.launch(spec("b", 64))

    rig.play(scenario)


@contextlib.contextmanager
def frozen(name: str, pids: list[int]) -> Iterator[Callable[[], None]]:
    """Processes that not even SIGKILL ends; gives what thaws them."""
    directory = FREEZER / name
    directory.mkdir()

    def thaw() -> None:
        (directory / "freezer.state").write_text("THAWED")

    try:
        for pid in pids:
            (directory / "cgroup.procs").write_text(str(pid))
        (directory / "freezer.state").write_text("FROZEN")
        deadline_s = time.monotonic() + PATIENCE_S
        while (directory / "freezer.state").read_text() != "FROZEN\n":
            assert time.monotonic() < deadline_s, "they don't freeze"
            time.sleep(0.01)
        yield thaw
    finally:
        thaw()
        for pid in (directory / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (FREEZER / "cgroup.procs").write_text(pid)
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                directory.rmdir()
                break
            except OSError:
                assert time.monotonic() < deadline_s, "the freezer's cgroup stays"
                time.sleep(0.01)


@pytest.mark.skipif(
    not (FREEZER / "cgroup.procs").exists(),
    reason="no version 1 freezer: there SIGKILL waits until the thaw",
)
def test_a_stop_that_fails_says_so_and_can_be_repeated(
    rig: Rig, cgroup_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "KILL_DEADLINE_S", 0.3)
    monkeypatch.setattr(hosting, "STOP_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(spec("a", 64))
            await agent.launch(spec("b", 64))
            with frozen(
                cgroup_name, [*rig.pids("a", "workload"), *rig.pids("a", "driver")]
            ) as thaw:
                for _ in range(2):
                    with pytest.raises(AgentError) as failed:
                        await agent.stop("a")
                    line = failed.value.one_line()
                    assert line.startswith(
                        "a could not be taken down: a is still there 0.3 s after"
                    )
                    assert "then `balloon stop a` again" in line
                    assert not isinstance(failed.value, UserError)
                # What the kernel still holds is not given away.
                assert agent.host().free_bytes == (512 - 16 - 128) * MIB
                with pytest.raises(VmExists):
                    await agent.launch(spec("a", 64))
                thaw()
                monkeypatch.setattr(process, "KILL_DEADLINE_S", PATIENCE_S)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(agent.stop, "a")
                    nursery.start_soon(agent.stop, "a")
            assert nothing_of(rig, agent, "a") == []
            assert agent.host().free_bytes == (512 - 16 - 64) * MIB
            assert agent.vm("b").connected
            await agent.launch(spec("a", 64))

    rig.play(scenario)


@pytest.mark.parametrize("error_type", [MachineError, QuotaError, DeadlinePassed, OSError])
def test_an_error_of_one_vm_does_not_end_the_agent(
    rig: Rig,
    error_type: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wait_exited = ProcessMachine.wait_exited
    broken = trio.Event()

    async def wait_exited_or_fail(machine: ProcessMachine) -> ExitStatus:
        if machine.name == "a" and not broken.is_set():
            await broken.wait()
            raise error_type("its processes can't be watched")
        return await wait_exited(machine)

    monkeypatch.setattr(ProcessMachine, "wait_exited", wait_exited_or_fail)

    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(spec("a", 64))
            await agent.launch(spec("b", 64))
            broken.set()
            await until(lambda: "a" not in agent.balancer.guests, "its end")
            await until(lambda: not nothing_of(rig, agent, "a"), "the removal")
            assert "a can't go on and ends: its processes can't be watched" in caplog.text
            assert agent.vm("b").connected
            assert agent.host().free_bytes == (512 - 16 - 64) * MIB
            await agent.launch(spec("a", 64))

    with caplog.at_level(logging.INFO):
        rig.play(scenario)
