"""A guest that needs memory at once: lent from the reserve, paid back by the others."""

import logging
import sys

import pytest
import trio
from scenario_rig import LOOK_S, PATIENCE_S, Rig, appetite, spec, touched, until, workload

from host_agent.facade.port import VmChange
from protocol.units import MIB

pytestmark = pytest.mark.effects

WAITS_S = 1.5

HOG = """
import os, time
while not os.path.exists("/var/tmp/go"):
    time.sleep(0.01)
b"x" * (500 << 20)
"""


def test_a_burst_is_lent_from_the_reserve_and_paid_back(rig: Rig) -> None:
    async def scenario() -> None:
        async with (
            rig.agent(pool_mib=300, reserve_mib=60) as agent,
            rig.watched(agent, 160) as watch,
        ):
            for name in ("burster", "other"):
                await agent.launch(spec(name, 160, reservation_bytes=32 * MIB))
            quotas = {120 * MIB}
            await until(lambda: {vm.quota_bytes for vm in agent.vms()} == quotas, "equal parts")
            # Nobody else can give, so the burst waits for nobody, and the loan can be seen.
            await agent.change("other", VmChange(quota_bytes=120 * MIB))
            burster, other = workload(agent, "burster"), workload(agent, "other")
            await appetite(burster, 60)
            await appetite(other, 20)
            await touched(burster, 60)
            await burster.burst(80 * MIB)
            assert agent.vm("burster").quota_bytes >= 140 * MIB
            assert agent.vm("other").quota_bytes == 120 * MIB
            assert agent.balancer.guests["burster"].dry_total > 0
            assert "reserve" in {move.giver for move in agent.balancer.moves.moves}
            await until(lambda: watch.highest_bytes > 240 * MIB, "the kernel to show the loan")
            await agent.change("other", VmChange(automatic=True))
            await until(lambda: agent.host().reserve_left_bytes == 60 * MIB, "a full reserve")
            assert agent.vm("other").quota_bytes < 120 * MIB
            assert agent.oom_kills == 0
            assert len(rig.pids("burster", "workload")) == 1

    rig.play(scenario)


def test_at_its_full_size_its_own_kernel_decides(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """A child of the workload is killed; the VM goes on, since its command does."""
    # It writes to its memory itself: a system call that did would get ENOMEM, and nobody be killed.
    hog = f"touch /var/tmp/go; {sys.executable} -c '{HOG}'; echo > /var/tmp/ended; sleep 1000"

    async def scenario() -> None:
        async with rig.agent(pool_mib=512) as agent:
            await agent.launch(spec("a", 64, command=("sh", "-c", hog)))
            ended = agent.places.disk_dir("a") / "ended"
            await until(ended.exists, "the hog to be killed")
            await until(lambda: agent.oom_kills == 1, "the kill to be counted")
            assert agent.vm("a").oom_kills == 1
            assert "a is out of memory (it has its full size): its kernel decides" in caplog.text
            assert "a: its kernel killed 1" in caplog.text
            # Held again when it runs dry the next time.
            await until(lambda: rig.is_armed("a"), "it to be held again")
            assert agent.vm("a").connected
            await agent.stop("a")
            assert agent.oom_kills == 1

    with caplog.at_level(logging.INFO):
        rig.play(scenario)


def test_the_kernel_kills_the_command_itself_and_the_vm_ends(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with rig.agent(pool_mib=512) as agent:
            await agent.launch(spec("a", 64, command=(sys.executable, "-c", HOG)))
            (agent.places.disk_dir("a") / "go").touch()
            await until(lambda: not agent.vms(), "its end")
            assert agent.oom_kills == 1
            assert agent.host().free_bytes == (512 - 16) * MIB
            assert "a: its kernel killed 1" in caplog.text

    with caplog.at_level(logging.INFO):
        rig.play(scenario)


def test_nobody_can_give_so_it_waits_and_then_its_kernel_decides(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with rig.agent(pool_mib=160, reserve_mib=4, dry_patience_s=WAITS_S) as agent:
            await agent.launch(spec("full", 128, reservation_bytes=78 * MIB))
            await agent.launch(spec("dry", 128, reservation_bytes=78 * MIB))
            await until(lambda: {vm.quota_bytes for vm in agent.vms()} == {78 * MIB}, "parts")
            full = workload(agent, "full")
            await appetite(full, 60)
            await touched(full, 60)
            dry = workload(agent, "dry")
            await appetite(dry, 20)
            guest = agent.balancer.guests["dry"]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(burst_in_vain, dry)
                await until(lambda: "there is nothing to lend: it waits" in caplog.text, "that")
                waits_since_s = guest.dry_s
                pids = rig.pids("dry", "workload")
                while True:
                    seen = agent.vm("dry").state, rig.pids("dry", "workload")
                    if trio.current_time() - waits_since_s >= WAITS_S:
                        break
                    assert seen == ("dry", pids), "stalled, and alive"
                    await trio.sleep(LOOK_S)
                await until(lambda: agent.oom_kills > 0, "the kernel to decide")
            # The workload was all there was: the VM ends, and the reserve is whole again.
            await until(lambda: [vm.name for vm in agent.vms()] == ["full"], "its end")
            assert agent.host().reserve_left_bytes == 4 * MIB
            assert "nobody could give it more" in caplog.text
            assert agent.vm("full").oom_kills == 0

    async def burst_in_vain(client: object) -> None:
        from host_agent.workload_client import WorkloadClient, WorkloadError  # noqa: PLC0415

        assert isinstance(client, WorkloadClient)
        with pytest.raises(WorkloadError):
            await client.burst(90 * MIB, timeout_s=PATIENCE_S)

    with caplog.at_level(logging.INFO):
        rig.play(scenario)


def test_memory_that_comes_while_it_waits_ends_the_wait(rig: Rig) -> None:
    async def scenario() -> None:
        async with rig.agent(pool_mib=160, reserve_mib=4, dry_patience_s=60.0) as agent:
            await agent.launch(spec("rich", 120, reservation_bytes=30 * MIB))
            await agent.launch(spec("dry", 120, reservation_bytes=30 * MIB))
            # The smallest that a guest of this size lets itself be made is 68 MiB.
            await agent.change("rich", VmChange(quota_bytes=88 * MIB))
            await until(lambda: agent.vm("rich").quota_bytes == 88 * MIB, "the pin")
            dry = workload(agent, "dry")
            await appetite(dry, 20)
            await touched(dry, 20)
            guest = agent.balancer.guests["dry"]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(dry.burst, 55 * MIB)
                await until(lambda: guest.dry and not agent.ledger.reserve_left_pages, "it to wait")
                await agent.change("rich", VmChange(automatic=True))
            assert agent.oom_kills == 0
            assert agent.vm("dry").quota_bytes >= 75 * MIB
            await until(lambda: agent.host().reserve_left_bytes == 4 * MIB, "a full reserve")

    rig.play(scenario)
