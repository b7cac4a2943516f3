"""Guests that lie, flood, keep silent or speak nonsense: they lose the connection, never the quota.

The lies are told by a process in the driver's cgroup, since nobody else is listened to.
"""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from scenario_rig import PATIENCE_S, Rig, spec, until

from host_agent.agent import Agent
from host_agent.facade.port import VmChange
from host_agent.intake import listener, reception, session
from protocol.units import MIB, pages_of

pytestmark = pytest.mark.effects

LIAR = Path(__file__).with_name("liar.py")
ROOT = LIAR.parent.parent.parent
SIZE_MIB = 128


@contextlib.asynccontextmanager
async def lying(rig: Rig, kind: str, procs: Path | None = None) -> AsyncIterator["Liar"]:
    """A liar at the socket of guest `a`, whose own driver stands still meanwhile."""
    driver = rig.pid_of("a", "driver")
    os.kill(driver, signal.SIGSTOP)
    process = await trio.lowlevel.open_process(
        [
            *(sys.executable, str(LIAR), kind, str(rig.run_dir / "guests/a/channel.sock")),
            *(str(procs or rig.cgroup / "a/driver/cgroup.procs"), str(pages_of(SIZE_MIB * MIB))),
        ],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT)},
    )
    try:
        yield Liar(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        os.kill(driver, signal.SIGCONT)


class Liar:
    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self.said = ""

    async def says(self, word: str) -> None:
        """Wait until it has said so."""
        assert self._process.stdout is not None
        with trio.fail_after(PATIENCE_S):
            while word not in self.said:
                more = await self._process.stdout.receive_some(4096)
                assert more, f"it ended after {self.said!r}, without {word!r}"
                self.said += more.decode()


@contextlib.asynccontextmanager
async def host(rig: Rig) -> AsyncIterator[Agent]:
    """Guest `a` with a balloon of 20 MiB, and a bystander."""
    async with rig.agent(pool_mib=512) as agent, rig.watched(agent, SIZE_MIB):
        await agent.launch(spec("a", SIZE_MIB, reservation_bytes=20 * MIB))
        await agent.launch(spec("other", SIZE_MIB, reservation_bytes=20 * MIB))
        await settle(agent, "a", 20)
        yield agent
        # The honest driver is back, and all is as if nothing had been.
        await settle(agent, "a", 30)
        await settle(agent, "a", 0)
        assert agent.vm("other").connected
        assert agent.oom_kills == 0


async def settle(agent: Agent, name: str, balloon_mib: int) -> None:
    await agent.change(name, VmChange(target_bytes=balloon_mib * MIB))
    await until(
        lambda: (
            agent.vm(name).balloon_actual_bytes == balloon_mib * MIB and agent.vm(name).connected
        ),
        lambda: f"a balloon of {balloon_mib} MiB: {agent.vm(name)}",
    )


def unchanged(rig: Rig, agent: Agent) -> None:
    expected = (SIZE_MIB - 20) * MIB
    assert agent.vm("a").quota_bytes == rig.quota("a", SIZE_MIB) == expected
    assert not rig.differences(agent) or rig.limit("a", "workload") <= expected


BEFORE_THE_WELCOME = {
    "garbage": "",
    "endless": "",
    "no hello": "",
    "silent": "it did not say hello",
    "arena at 0": "address 0x0",
    "arena too large": "its arena has",
    "frame order": "its frames have order 9",
    "foreign process": "no process of its driver has pid 4000000",
}


def test_it_is_not_let_in(
    rig: Rig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "FAULT_PAUSE_S", 0.1)

    async def scenario() -> None:
        async with host(rig) as agent:
            honest = agent.balancer.guests["a"].session
            for kind, why in BEFORE_THE_WELCOME.items():
                caplog.clear()
                # Who is only slow is not to be taken for silent.
                greeting_s = 0.5 if kind == "silent" else PATIENCE_S
                monkeypatch.setattr(listener, "GREETING_DEADLINE_S", greeting_s)
                async with lying(rig, kind) as liar:
                    await liar.says("\n")
                    assert "welcome" not in liar.said, kind
                    unchanged(rig, agent)
                    assert agent.balancer.guests["a"].session is honest, kind
                at_fault(caplog, why)

    with caplog.at_level(logging.INFO):
        rig.play(scenario)


def at_fault(caplog: pytest.LogCaptureFixture, why: str) -> None:
    pattern = re.compile(f"a: its driver is at fault: .*{re.escape(why)}")
    assert pattern.search(caplog.text), caplog.text


LIES = {
    "foreign pages": "foreign_cgroup",
    "more than room": "",
    "out of range": "",
    "of the welcome": "already_claimed",
    "twice": "",
    "keeps": "it kept",
    "drops others": "",
    "flood": "vitals a second",
    "resets": "it greets more than",
    "unasked": "",
    "host's words": "",
}


def test_a_lie_ends_the_connection(
    rig: Rig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "FAULT_PAUSE_S", 0.1)

    async def scenario() -> None:
        async with host(rig) as agent:
            for kind, why in LIES.items():
                caplog.clear()
                async with lying(rig, kind) as liar:
                    await liar.says("welcome")
                    await agent.change("a", VmChange(target_bytes=40 * MIB))
                    await until(lambda: "at fault" in caplog.text, lambda: caplog.text)
                    unchanged(rig, agent)
                    await agent.change("a", VmChange(target_bytes=20 * MIB))
                at_fault(caplog, why)
                await until(lambda: agent.vm("a").connected, "the honest driver")

    with caplog.at_level(logging.INFO):
        rig.play(scenario)


NO_FRAMES = {
    "unreserved": "not_present",
    "arena elsewhere": "not_present",
    "file pages": "not_anonymous",
}


@pytest.mark.parametrize("kind", NO_FRAMES)
def test_what_is_no_frame_is_rejected_and_never_credited(rig: Rig, kind: str) -> None:
    async def scenario() -> None:
        async with host(rig) as agent, lying(rig, kind) as liar:
            await liar.says("welcome")
            await agent.change("a", VmChange(target_bytes=40 * MIB))
            await liar.says("rejected")
            await until(lambda: "rejected" in str(agent.vm("a").last_reason), "the reason")
            unchanged(rig, agent)
            assert NO_FRAMES[kind] in liar.said
            await agent.change("a", VmChange(target_bytes=20 * MIB))

    rig.play(scenario)


def test_an_inventory_does_not_change_the_quota(rig: Rig) -> None:
    async def scenario() -> None:
        async with host(rig) as agent, lying(rig, "claims all") as liar:
            await liar.says("welcome")
            unchanged(rig, agent)

    rig.play(scenario)


def test_taking_the_offer_and_going_silent_is_being_stuck(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with host(rig) as agent:
            async with lying(rig, "more than room") as liar:
                monkeypatch.setattr(session, "PROGRESS_DEADLINE_S", 0.5)
                await liar.says("welcome")
                unchanged(rig, agent)
                os.kill(liar._process.pid, signal.SIGSTOP)
                await agent.change("a", VmChange(target_bytes=40 * MIB))
                await until(lambda: agent.vm("a").state == "stuck", "stuck")
                unchanged(rig, agent)
                await agent.change("a", VmChange(target_bytes=20 * MIB))
            monkeypatch.undo()
            at_fault(caplog, "no progress")

    with caplog.at_level(logging.INFO):
        rig.play(scenario)


@pytest.mark.parametrize("where", ["host", "workload", "other guest"])
def test_only_its_own_driver_is_listened_to(
    rig: Rig, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with host(rig) as agent:
            procs = {
                "host": rig.cgroup / "cgroup.procs",
                "workload": rig.cgroup / "a/workload/cgroup.procs",
                "other guest": rig.cgroup / "other/driver/cgroup.procs",
            }[where]
            honest = agent.balancer.guests["a"].session
            async with lying(rig, "honest", procs) as liar:
                await liar.says("closed")
                assert agent.balancer.guests["a"].session is honest
                assert f"pid {liar._process.pid} is not its driver: turned away" in caplog.text
                unchanged(rig, agent)

    with caplog.at_level(logging.INFO):
        rig.play(scenario)


def test_more_connections_than_a_driver_needs_are_turned_away(
    rig: Rig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "GREETING_DEADLINE_S", 3 * PATIENCE_S)

    async def scenario() -> None:
        async with host(rig) as agent, contextlib.AsyncExitStack() as stack:
            for _ in range(reception.MOST_CONNECTIONS - 1):
                await stack.enter_async_context(lying(rig, "silent"))
            guest = agent.balancer.guests["a"]
            await until(
                lambda: guest.connections == reception.MOST_CONNECTIONS, "all that it may have"
            )
            one_more = await stack.enter_async_context(lying(rig, "silent"))
            await one_more.says("closed")
            assert "a: its driver has 4 connections" in caplog.text
            unchanged(rig, agent)

    with caplog.at_level(logging.INFO):
        rig.play(scenario)
