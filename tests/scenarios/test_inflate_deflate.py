"""A balloon inflates and deflates by an operator's word, and memory moves from guest to guest."""

import pytest
from scenario_rig import Rig, appetite, spec, touched, until, workload

from host_agent.facade.port import VmChange
from protocol.units import MIB

pytestmark = pytest.mark.effects


@pytest.mark.parametrize("frames", ["4KiB", "2MiB"])
def test_inflate_and_deflate_to_the_byte(rig: Rig, frames: str) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(spec("a", 128, frames=frames))
            await until(lambda: agent.vm("a").quota_bytes == 128 * MIB, "the whole size")
            idle_bytes = rig.usage("a", "driver")

            async def turn(balloon_mib: int) -> None:
                await agent.change("a", VmChange(target_bytes=balloon_mib * MIB))
                wanted = (128 - balloon_mib) * MIB
                await until(lambda: agent.vm("a").quota_bytes == wanted, f"{wanted}")
                await until(lambda: not rig.differences(agent), lambda: rig.differences(agent))
                assert rig.quota("a", 128) == rig.limit("a", "workload") == wanted
                assert agent.vm("a").balloon_actual_bytes == balloon_mib * MIB
                # Page tables and counters' slack may stay, the frames may not.
                await until(lambda: rig.usage("a", "driver") < idle_bytes + 8 * MIB, "frames gone")

            for balloon_mib in (48, 20, 40, 0):
                await turn(balloon_mib)

    rig.play(scenario)


def test_memory_moves_to_the_guest_whose_demand_grows(rig: Rig) -> None:
    async def scenario() -> None:
        async with (
            rig.agent(pool_mib=256, reserve_mib=16) as agent,
            rig.watched(agent, 160) as watch,
        ):
            await agent.launch(spec("giver", 160, reservation_bytes=40 * MIB))
            await agent.launch(spec("taker", 160, reservation_bytes=40 * MIB))
            await until(
                lambda: {vm.quota_bytes for vm in agent.vms()} == {120 * MIB}, "equal parts"
            )
            giver, taker = workload(agent, "giver"), workload(agent, "taker")
            await appetite(giver, 20)
            await appetite(taker, 20)
            before = agent.vm("giver").quota_bytes
            await appetite(taker, 135)
            await touched(taker, 135)
            assert agent.vm("taker").quota_bytes >= 135 * MIB
            assert agent.vm("giver").quota_bytes < before
            assert agent.oom_kills == 0
            await until(lambda: agent.host().reserve_left_bytes == 16 * MIB, "the reserve is full")
            assert any(
                move.giver == "giver" and move.taker in ("taker", "reserve")
                for move in agent.balancer.moves.moves
            )
            assert watch.highest_bytes > 200 * MIB

    rig.play(scenario)
