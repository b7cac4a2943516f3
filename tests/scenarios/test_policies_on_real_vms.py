"""Every built-in policy on two real mock VMs: one has too much, the other one little."""

import pytest
from scenario_rig import Rig, appetite, spec, touched, until, workload

from host_agent.facade.port import VmChange
from host_agent.policy.interface import Policy
from host_agent.policy.registry import BUILT_IN
from host_agent.policy.senpai import Senpai, SenpaiSettings
from protocol.units import MIB

pytestmark = pytest.mark.effects

GROWS = ("shares", "esx", "hyperv", "squeezed")
"""These give the other one what was taken; the others keep it for the host, or leave it."""


def policy_of(kind: type[Policy]) -> Policy:
    # 1 % every 6 s is more patience than a test has.
    return Senpai(SenpaiSettings(interval_s=0.5, max_probe=0.05)) if kind is Senpai else kind()


@pytest.mark.parametrize("kind", BUILT_IN, ids=lambda kind: kind.name)
def test_memory_moves_as_the_policy_wants(rig: Rig, kind: type[Policy]) -> None:
    async def scenario() -> None:
        async with (
            rig.agent(pool_mib=256, reserve_mib=16) as agent,
            rig.watched(agent, 160) as watch,
        ):
            for name in ("giver", "taker"):
                await agent.launch(spec(name, 160, reservation_bytes=40 * MIB))
                await appetite(workload(agent, name), 20)
            await agent.change("giver", VmChange(quota_bytes=160 * MIB))
            unequal = [160 * MIB, 80 * MIB]
            await until(lambda: [vm.quota_bytes for vm in agent.vms()] == unequal, "160 and 80")

            agent.balancer.policy = policy_of(kind)
            await agent.change("giver", VmChange(automatic=True))
            if kind.name == "manual":
                plans = agent.balancer.plans_total
                await until(lambda: agent.balancer.plans_total >= plans + 3, "three plans")
                assert [vm.quota_bytes for vm in agent.vms()] == unequal
                return
            if kind.name in GROWS:
                taker = workload(agent, "taker")
                await appetite(taker, 100)
                await touched(taker, 100)
                await until(lambda: agent.vm("taker").quota_bytes >= 100 * MIB, "what it needs")
            await until(lambda: agent.vm("giver").quota_bytes <= 156 * MIB, "what it gives")
            assert agent.oom_kills == 0
            assert watch.highest_bytes > 200 * MIB

    rig.play(scenario)
