"""A client reserves memory of real VMs, hands it over to a new one, and is remembered."""

import json
import os
from typing import Any

import pytest
import trio
from scenario_rig import Rig, spec, until_blocking

from host_agent.agent import Agent
from host_agent.errors import NotEnoughMemory
from host_agent.facade.port import ClientRequest
from protocol.units import MIB

pytestmark = pytest.mark.effects


def test_a_launch_that_is_cancelled_at_its_end_leaves_no_vm(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent:
            reserved = await agent.reserve(ClientRequest(client="xapi", size_bytes=64 * MIB))
            await agent.transfer(reserved.id, "late")
            launch = trio.CancelScope()
            real = Agent._save

            async def save(self: Agent) -> None:
                await real(self)
                if not agent.reservations():  # the VM has begun with it
                    launch.cancel()

            monkeypatch.setattr(Agent, "_save", save)
            with launch:
                await agent.launch(spec("late", 64))
            assert launch.cancelled_caught
            assert agent.vms() == []
            assert agent.ledger.quota_pages == 0

    rig.play(scenario)


def test_from_a_reservation_to_a_vm(rig: Rig) -> None:
    child = rig.agent_process(pool_mib=272, reserve_mib=16)
    run_dir = os.fspath(rig.run_dir)

    def client(*arguments: str, status: int = 0) -> str:
        command = rig.balloon("client", *arguments, "--run-dir", run_dir)
        said = command.communicate(timeout=60)[0]
        assert command.returncode == status, rig.stderr()
        return said.strip()

    def listed() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(client("list", "--json"))
        return found

    with rig.client() as agent:
        agent.use_policy("squeezed")
        agent.launch(spec("first", 240, reservation_bytes=40 * MIB))
        until_blocking(lambda: agent.vm("first").quota_bytes > 230 * MIB, "most of the pool")
        # Of 256 MiB, 96 are reserved: the VM gives what is not free.
        name = client("reserve", "xapi", "96MiB")
        (one,) = listed()
        assert (one["id"], one["size_bytes"], one["missing_bytes"]) == (name, 96 * MIB, 0)
        assert agent.vm("first").quota_bytes <= 160 * MIB
        assert agent.host().held_bytes == 96 * MIB
        with pytest.raises(NotEnoughMemory, match="can't be reserved"):
            agent.reserve("xapi", 200 * MIB)
        assert client("transfer", name, "second") == f"{name}: kept for second"
        agent.launch(spec("second", 96, reservation_bytes=80 * MIB))
        assert agent.vm("second").quota_bytes >= 80 * MIB
        assert (listed(), agent.host().held_bytes) == ([], 0)
        agent.stop("first")
        agent.stop("second")
        kept = agent.reserve("xapi", 64 * MIB)
    # Another agent knows of it.
    child.terminate()
    assert child.wait(60) == 0
    child = rig.agent_process(pool_mib=272, reserve_mib=16)
    with rig.client() as agent:
        assert agent.reservations() == [kept]
        until_blocking(lambda: agent.host().held_bytes == 64 * MIB, "what was reserved")
        assert client("release", "nope", status=2) == ""
        assert client("login", "xapi") == "xapi: 1 reservation purged, 64MiB"
        assert agent.host().held_bytes == 0
    child.terminate()
    assert child.wait(60) == 0
