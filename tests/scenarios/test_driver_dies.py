"""The guest's side dies, or stands still: its quota is kept, and it comes back."""

import contextlib
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from scenario_rig import PATIENCE_S, Rig, appetite, spec, touched, until, workload

from host_agent.agent import Agent
from host_agent.facade.port import VmChange
from host_agent.intake import session
from protocol.units import MIB

pytestmark = pytest.mark.effects


async def balloon_of(agent: Agent, name: str, balloon_mib: int) -> None:
    """Pin a VM's balloon, and wait for it."""
    await agent.change(name, VmChange(target_bytes=balloon_mib * MIB))
    await until(
        lambda: agent.vm(name).balloon_actual_bytes == balloon_mib * MIB,
        lambda: f"a balloon of {balloon_mib} MiB: {agent.vm(name)}",
    )


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def no_other_driver(rig: Rig, name: str) -> contextlib.AbstractContextManager[None]:
    """For as long as the block runs nobody starts another one: a second is soon over."""
    pids = rig.pids(name, "driver")
    return stopped(*(pid for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "sh\n"))


@pytest.mark.parametrize("victim", ["driver", "balloon"])
def test_killed_it_comes_back_with_what_it_had_given(rig: Rig, victim: str) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(spec("a", 128))
            await balloon_of(agent, "a", 40)
            old = {rig.pid_of("a", "driver"), rig.pid_of("a", "balloon")}
            with no_other_driver(rig, "a"):
                os.kill(rig.pid_of("a", victim), signal.SIGKILL)
                await until(lambda: not agent.vm("a").connected, "the connection to end")
                assert rig.quota("a", 128) == agent.vm("a").quota_bytes == 88 * MIB
            await until(lambda: agent.vm("a").connected, "the driver to come back")
            assert not old & {rig.pid_of("a", "driver"), rig.pid_of("a", "balloon")}
            assert rig.quota("a", 128) == agent.vm("a").quota_bytes == 88 * MIB
            await balloon_of(agent, "a", 50)
            await balloon_of(agent, "a", 0)
            assert rig.quota("a", 128) == rig.limit("a", "workload") == 128 * MIB

    rig.play(scenario)


@pytest.mark.parametrize("victim", ["driver", "balloon"])
@pytest.mark.parametrize("moment", range(3))
def test_killed_in_the_middle_of_an_inflation(rig: Rig, victim: str, moment: int) -> None:
    async def scenario() -> None:
        async with rig.agent(pool_mib=1024) as agent, rig.watched(agent, 768):
            await agent.launch(spec("a", 768, reservation_bytes=64 * MIB))
            await agent.change("a", VmChange(target_bytes=500 * MIB))
            guest = agent.balancer.guests["a"]
            # Asked, room being made, some of it claimed.
            await until(
                lambda: (
                    guest.session is not None and guest.session.inflating
                    if moment == 0
                    else agent.ledger.view("a").room_pages
                    if moment == 1
                    else agent.vm("a").balloon_actual_bytes >= 100 * MIB
                ),
                "the moment",
            )
            with no_other_driver(rig, "a"):
                os.kill(rig.pid_of("a", victim), signal.SIGKILL)
                await until(lambda: not agent.vm("a").connected, "the connection to end")
                # The room goes back to the workload without waiting for the driver.
                await until(
                    lambda: rig.limit("a", "workload") == agent.vm("a").quota_bytes, "its room"
                )
                assert not agent.vm("a").connected
            # The wish stands, so the driver that comes back is asked again.
            await balloon_of(agent, "a", 500)
            await until(lambda: not rig.differences(agent), lambda: rig.differences(agent))
            await balloon_of(agent, "a", 0)

    rig.play(scenario)


@pytest.mark.parametrize("victim", ["driver", "balloon"])
def test_standing_still_it_is_stuck_and_holds_nobody_up(
    rig: Rig, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "PROGRESS_DEADLINE_S", 2 * PATIENCE_S)

    def is_stuck(agent: Agent) -> bool:
        """Its time is up whenever it is looked at: nobody waits for that here."""
        still = agent.balancer.guests["still"].session
        inflation = None if still is None else still._inflation
        if inflation is not None and inflation.deadline_s < math.inf:  # it is the guest's turn
            inflation.deadline_s = 0.0
        return agent.vm("still").state == "stuck"

    async def scenario() -> None:
        async with rig.agent(pool_mib=1024) as agent, rig.watched(agent, 512):
            await agent.launch(spec("still", 512, reservation_bytes=64 * MIB))
            await agent.launch(spec("other", 128, reservation_bytes=32 * MIB))
            guest = agent.balancer.guests["still"]
            await agent.change("still", VmChange(target_bytes=300 * MIB))
            await until(lambda: guest.session is not None and guest.session.inflating, "a target")
            with stopped(rig.pid_of("still", victim)):
                await balloon_of(agent, "other", 40)
                await balloon_of(agent, "other", 0)
                assert agent.vm("still").state != "stuck", "it is still waited for"
                await until(lambda: is_stuck(agent), "it to be called stuck")
                reason = agent.vm("still").last_reason
                assert reason is not None
                assert "no progress" in reason
                assert rig.quota("still", 512) == agent.vm("still").quota_bytes
                assert rig.limit("still", "workload") <= agent.vm("still").quota_bytes
                await balloon_of(agent, "other", 40)
            await balloon_of(agent, "still", 300)
            assert agent.vm("still").state == "running"
            await balloon_of(agent, "still", 0)

    rig.play(scenario)


def test_a_guest_without_a_driver_keeps_its_workload_running(rig: Rig) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(spec("a", 128))
            client = workload(agent, "a")
            await appetite(client, 30)
            await touched(client, 30)
            await balloon_of(agent, "a", 40)
            for _ in range(2):
                with no_other_driver(rig, "a"):
                    os.kill(rig.pid_of("a", "driver"), signal.SIGKILL)
                    await until(lambda: not agent.vm("a").connected, "the connection to end")
                    await appetite(client, 60)
                    await touched(client, 60)
                await until(lambda: agent.vm("a").connected, "the driver to come back")
            assert agent.oom_kills == 0

    rig.play(scenario)
