"""A VM's reservation is protected by the kernel as long as it runs, where the kernel can."""

import pytest
from scenario_rig import Rig, spec

from host_agent.facade.port import VmChange
from protocol.units import MIB

pytestmark = pytest.mark.effects


def claims(rig: Rig, name: str) -> set[int]:
    """memory.min of a VM and its workload, in MiB; and of the root, which has this one VM."""
    paths = (rig.cgroup, rig.cgroup / name, rig.cgroup / name / "workload")
    return {int((path / "memory.min").read_text()) // MIB for path in paths}


def test_a_reservation_is_protected_from_launch_to_takeover(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[float] = []

    async def first() -> None:
        async with rig.agent(on_exit="keep") as agent:
            await agent.launch(spec("a", 64, reservation_bytes=32 * MIB))
            quota = agent.balancer.guests["a"].live_quota
            real = type(quota).protect
            monkeypatch.setattr(
                type(quota),
                "protect",
                lambda self, size: (asked.append(size / MIB), real(self, size))[1],
            )
            if rig.version == 2:
                assert claims(rig, "a") == {32}
            await agent.change("a", VmChange(reservation_bytes=48 * MIB))
            if rig.version == 2:
                assert claims(rig, "a") == {48}
            await agent.change("a", VmChange(shares=500))
            assert asked == [48]

    async def second() -> None:
        async with rig.agent() as agent:
            assert [vm.name for vm in agent.vms()] == ["a"]
            assert asked == [48, 48]
            if rig.version == 2:
                assert claims(rig, "a") == {48}
            await agent.change("a", VmChange(reservation_bytes=16 * MIB))
            if rig.version == 2:
                assert claims(rig, "a") == {16}

    rig.play(first)
    if rig.version == 2:
        (rig.cgroup / "a" / "workload" / "memory.min").write_text("0")  # by somebody else
    rig.play(second)
    assert not [record for record in caplog.records if "protects" in record.getMessage()]
