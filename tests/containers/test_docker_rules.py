"""What somebody does to a launched container through its engine, and what becomes of its quota.

Each row of the table in docs/containers.md, with a real engine.
"""

import contextlib
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from docker_rig import STAYS, DockerRig
from scenario_rig import PATIENCE_S, until, until_blocking

from host_agent.agent import Agent
from host_agent.facade.port import VmChange
from host_agent.guest import Guest
from host_agent.machines.docker_machine import DockerMachine
from protocol.units import MIB

pytestmark = pytest.mark.effects

ASSIGNED_MIB = 128
BALLOON_BYTES = 32 * MIB


def machine_of(guest: Guest) -> DockerMachine:
    assert isinstance(guest.machine, DockerMachine)
    return guest.machine


def play(rig: DockerRig, scenario: Callable[[Agent, Guest], Awaitable[None]]) -> None:
    """With one VM that has a balloon, so that its quota is not what a new one would have."""

    async def whole() -> None:
        async with rig.agent(pool_mib=256) as agent:
            await agent.launch(rig.vm("web1", ASSIGNED_MIB))
            await agent.change("web1", VmChange(target_bytes=BALLOON_BYTES))
            await balloon(agent)
            await scenario(agent, agent.balancer.guests["web1"])

    rig.play(whole)


async def balloon(agent: Agent) -> None:
    await until(
        lambda: agent.vm("web1").balloon_actual_bytes == BALLOON_BYTES, "32 MiB in its balloon"
    )


async def engine(rig: DockerRig, *arguments: str) -> str:
    """`docker ARGUMENTS` on the VM's container."""
    return await trio.to_thread.run_sync(rig.engine.docker, *arguments, rig.container("web1"))


async def ended(rig: DockerRig, agent: Agent, guest: Guest) -> None:
    with trio.fail_after(PATIENCE_S):
        await guest.ended.wait()
    assert agent.host().quotas_bytes == 0
    assert rig.containers() == []


@pytest.mark.parametrize(
    ("order", "status"),
    [
        (("stop", "--time=60"), "exit status 0"),
        (("kill",), "exit status 137 (ended by SIGKILL)"),
    ],
)
def test_stopped_or_killed_by_its_engine_it_ends(
    rig: DockerRig, order: tuple[str, ...], status: str
) -> None:
    async def scenario(agent: Agent, guest: Guest) -> None:
        await engine(rig, *order)
        await ended(rig, agent, guest)
        assert guest.ended_with == status

    play(rig, scenario)


def test_removed_behind_the_agents_back_it_ends(rig: DockerRig) -> None:
    async def scenario(agent: Agent, guest: Guest) -> None:
        await engine(rig, "rm", "--force")
        await ended(rig, agent, guest)
        assert guest.ended_with.startswith("exit status unknown: its container")

    play(rig, scenario)


def test_restarted_it_keeps_its_quota_and_gets_a_new_driver(rig: DockerRig) -> None:
    async def scenario(agent: Agent, guest: Guest) -> None:
        pid, driver = machine_of(guest).init_pid, rig.pid_of("web1", "driver")
        await engine(rig, "restart", "--time=0")
        await until(lambda: machine_of(guest).init_pid != pid, "its new process 1")

        def has_new_driver() -> bool:
            try:
                return rig.pid_of("web1", "driver") != driver and agent.vm("web1").connected
            except LookupError:
                return False

        await until(has_new_driver, "a new driver")
        await balloon(agent)
        assert rig.limit("web1", "workload") == (ASSIGNED_MIB * MIB) - BALLOON_BYTES
        await agent.change("web1", VmChange(target_bytes=0))
        await until(lambda: agent.vm("web1").balloon_actual_bytes == 0, "its memory back")

    play(rig, scenario)


def test_paused_it_keeps_its_quota_and_still_gives(
    rig: DockerRig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def scenario(agent: Agent, guest: Guest) -> None:
        await engine(rig, "pause")
        await until(lambda: "web1 was paused: it keeps its quota" in caplog.text, "the event")
        more_bytes = BALLOON_BYTES + 16 * MIB
        await agent.change("web1", VmChange(target_bytes=more_bytes))
        await until(
            lambda: agent.vm("web1").balloon_actual_bytes == more_bytes,
            lambda: agent.vm("web1"),
        )
        await engine(rig, "unpause")
        assert agent.vm("web1").connected

    play(rig, scenario)


@pytest.mark.parametrize("mib", [300, 40])
def test_updated_through_its_engine_its_limits_stay_the_agents(
    rig: DockerRig, caplog: pytest.LogCaptureFixture, mib: int
) -> None:
    """To more than it was promised, or to less than its quota: that is the container's own."""

    async def scenario(agent: Agent, guest: Guest) -> None:
        before = agent.vm("web1").quota_bytes
        assert rig.limit("web1", "workload") == before == 96 * MIB
        await engine(rig, "update", f"--memory={mib}m", f"--memory-swap={mib}m")
        said = (
            "web1 was updated through its engine: its memory limit is this agent's matter, use "
            "`balloon set web1`"
        )
        await until(lambda: said in caplog.messages, caplog.text)
        assert rig.limit("web1", f"workload/{machine_of(guest).container_id}") == mib * MIB
        assert rig.limit("web1", "workload") == agent.vm("web1").quota_bytes == before
        await agent.change("web1", VmChange(target_bytes=BALLOON_BYTES // 2))
        await until(lambda: agent.vm("web1").quota_bytes == 112 * MIB, "half of its balloon")
        assert rig.limit("web1", "workload") == 112 * MIB

    play(rig, scenario)


def test_paused_it_can_be_stopped(rig: DockerRig) -> None:
    async def scenario(agent: Agent, guest: Guest) -> None:
        await engine(rig, "pause")
        with trio.fail_after(PATIENCE_S):
            await agent.stop("web1")
        assert rig.containers() == []

    play(rig, scenario)


def test_a_driver_that_is_killed_comes_back(rig: DockerRig) -> None:
    async def scenario(agent: Agent, guest: Guest) -> None:
        before = guest.session
        for pid in rig.pids("web1", "driver"):
            with contextlib.suppress(ProcessLookupError):  # each takes the others with it
                os.kill(pid, signal.SIGKILL)
        await until(lambda: guest.session not in (None, before), "its driver again")
        await balloon(agent)

    play(rig, scenario)


def test_its_kernel_kills_for_want_of_memory(rig: DockerRig) -> None:
    # By page faults: a charge outside of them is refused while a dry guest is held.
    grow = "x=$(head -c 100000000 /dev/zero | tr '\\0' x)"
    waits = ("sh", "-c", f"trap 'grows=1' USR1; while [ -z $grows ]; do sleep 0.05; done; {grow}")

    async def whole() -> None:
        async with rig.agent(pool_mib=256, dry_patience_s=0.5) as agent:
            await agent.launch(rig.vm("web1", 48, command=waits))
            guest = agent.balancer.guests["web1"]
            os.kill(machine_of(guest).init_pid, signal.SIGUSR1)
            await ended(rig, agent, guest)
            assert guest.ended_with == "exit status 137 (its kernel killed for want of memory)"
            assert agent.oom_kills > 0

    rig.play(whole)


async def between(rig: DockerRig, path: Path) -> None:
    """An engine's socket at `path` for as long as this runs: then it is an engine that is gone."""

    async def forward(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for part in source:
                await sink.send_all(part)
        await sink.aclose()

    async def serve(near: trio.SocketStream) -> None:
        far = trio.SocketStream(trio.socket.socket(socket.AF_UNIX))
        async with near, far, trio.open_nursery() as nursery:
            await far.socket.connect(str(rig.engine.socket_path))
            nursery.start_soon(forward, near, far)
            nursery.start_soon(forward, far, near)

    with trio.socket.socket(socket.AF_UNIX) as listening:
        await listening.bind(str(path))
        listening.listen()
        try:
            await trio.serve_listeners(serve, [trio.SocketListener(listening)])
        finally:
            os.unlink(path)


def test_an_engine_that_is_gone_ends_no_vm_and_hinders_no_stop(
    rig: DockerRig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = rig.base / "engine.sock"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")

    async def there(scope: trio.CancelScope) -> None:
        with scope:
            await between(rig, path)

    async def whole() -> None:
        first, second = trio.CancelScope(), trio.CancelScope()
        async with trio.open_nursery() as engines, rig.agent(pool_mib=256) as agent:
            engines.start_soon(there, first)
            await until(path.exists, "the engine")
            await agent.launch(rig.vm("web1", ASSIGNED_MIB))
            await agent.launch(rig.vm("web2", 64))
            first.cancel()
            await until(lambda: "its VMs run on, it is asked again" in caplog.text, "a line")
            await agent.change("web1", VmChange(target_bytes=BALLOON_BYTES))
            await balloon(agent)
            await agent.stop("web2")
            assert [view.name for view in agent.vms()] == ["web1"]
            assert rig.container("web2") in rig.containers()
            engines.start_soon(there, second)
            await until(lambda: rig.containers() == [rig.container("web1")], "its removal")
            assert agent.vm("web1").connected
            await agent.stop("web1")
            second.cancel()

    rig.play(whole)


def test_an_agent_finds_its_container_again(rig: DockerRig) -> None:
    known: list[int] = []

    async def first() -> None:
        async with rig.agent(pool_mib=256, on_exit="keep") as agent:
            await agent.launch(rig.vm("web1", ASSIGNED_MIB))
            await agent.change("web1", VmChange(target_bytes=BALLOON_BYTES))
            await balloon(agent)
            known.append(machine_of(agent.balancer.guests["web1"]).init_pid)

    async def second() -> None:
        async with rig.agent(pool_mib=256) as agent:
            assert machine_of(agent.balancer.guests["web1"]).init_pid == known[0]
            assert agent.vm("web1").backend == "docker"
            assert agent.vm("web1").balloon_actual_bytes == BALLOON_BYTES
            await until(lambda: agent.vm("web1").connected, "its driver")

    rig.play(first)
    assert rig.containers() == [rig.container("web1")]
    rig.play(second)


def test_an_agent_finds_it_restarted_meanwhile(rig: DockerRig) -> None:
    async def first() -> None:
        async with rig.agent(pool_mib=256, on_exit="keep") as agent:
            await agent.launch(rig.vm("web1", ASSIGNED_MIB, command=STAYS))

    async def second() -> None:
        async with rig.agent(pool_mib=256) as agent:
            await until(lambda: agent.vm("web1").connected, "a new driver")

    rig.play(first)
    rig.engine.docker("restart", "--time=0", rig.container("web1"))
    rig.play(second)


def test_a_container_that_ended_without_its_agent_is_removed(rig: DockerRig) -> None:
    async def first() -> None:
        async with rig.agent(pool_mib=256, on_exit="keep") as agent:
            await agent.launch(rig.vm("web1", ASSIGNED_MIB))

    async def second() -> None:
        async with rig.agent(pool_mib=256) as agent:
            assert agent.vms() == []
            await until(lambda: rig.containers() == [], "its removal")

    rig.play(first)
    assert rig.pids("web1", "driver") != []
    rig.engine.docker("kill", rig.container("web1"))
    # Nobody but the kernel was there to end its driver.
    until_blocking(lambda: rig.pids("web1", "driver") == [], "the driver's end")
    rig.play(second)
