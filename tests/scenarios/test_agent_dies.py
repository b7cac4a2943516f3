"""The agent is killed or ends, and another one takes over what it left."""

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable

import pytest
import trio
from scenario_rig import (
    PATIENCE_S,
    SLOWNESS,
    Rig,
    appetite,
    spec,
    touched,
    until,
    until_blocking,
    workload,
)

from host_agent.blocking import DeadlinePassed
from host_agent.client import AgentClient
from host_agent.errors import ConfigError
from host_agent.facade.port import VmChange
from host_agent.facade.views import VmView
from host_agent.quota.base import QuotaBackend, VmQuota
from host_agent.quota.detect import detect
from host_agent.quota.errors import StillBusy, VmGone
from host_agent.workload_client import WorkloadClient
from protocol.units import MIB

pytestmark = pytest.mark.effects


def kill(rig: Rig) -> None:
    """SIGKILL to the agent that was started last."""
    child = rig.children[-1]
    child.kill()
    child.wait()


def until_vm(client: AgentClient, name: str, holds: Callable[[VmView], bool], what: str) -> VmView:
    until_blocking(lambda: holds(client.vm(name)), what)
    return client.vm(name)


def set_balloon(client: AgentClient, name: str, balloon_mib: int) -> None:
    client.change(name, VmChange(target_bytes=balloon_mib * MIB))
    until_vm(
        client,
        name,
        lambda vm: vm.balloon_actual_bytes == balloon_mib * MIB,
        f"a balloon of {balloon_mib} MiB",
    )


def is_released(rig: Rig, name: str) -> bool:
    return not rig.is_armed(name)


def until_held(rig: Rig, name: str) -> None:
    """An agent that was late is told that its guests were released, and arms them again."""
    until_blocking(lambda: rig.is_armed(name), f"{name} to be held when it runs dry")


def test_killed_and_its_vms_are_adopted(rig: Rig) -> None:
    rig.agent_process(dry_patience_s=0.1)
    with rig.client() as client:
        client.launch(spec("a", 128, reservation_bytes=40 * MIB, shares=2000))
        client.launch(spec("b", 128, frames="2MiB"))
        set_balloon(client, "a", 40)
        set_balloon(client, "b", 20)
        before = client.vms()
        until_held(rig, "a")
    pids = rig.processes()
    kill(rig)
    until_blocking(lambda: is_released(rig, "a") and is_released(rig, "b"), "the watchdog")
    # For as long as nobody is there: everything as it was, and no claimed frame taken back.
    time.sleep(0.5)
    assert rig.processes() == pids
    assert (rig.quota("a", 128), rig.quota("b", 128)) == (88 * MIB, 108 * MIB)
    assert rig.limit("a", "workload") == 88 * MIB

    rig.agent_process()
    with rig.client() as client:
        for old in before:
            new = until_vm(client, old.name, lambda vm: vm.connected, "the driver to connect")
            for field in ("state", "assigned_bytes", "reservation_bytes", "shares", "quota_bytes"):
                assert getattr(new, field) == getattr(old, field), field
            assert new.balloon_actual_bytes == old.balloon_actual_bytes
            assert new.pinned
        until_held(rig, "a")
        set_balloon(client, "a", 50)
        set_balloon(client, "b", 0)
        assert rig.quota("a", 128) == rig.limit("a", "workload") == 78 * MIB
        assert rig.quota("b", 128) == rig.limit("b", "workload") == 128 * MIB
        client.stop("a")
        assert [vm.name for vm in client.vms()] == ["b"]
    end_in_order(rig)


HOG = """
import os, time
while not os.path.exists("/var/tmp/go"):
    time.sleep(0.01)
kept = b"x" * (110 << 20)
open("/var/tmp/fed", "w").close()
time.sleep(1000)
"""


def test_a_guest_that_runs_dry_without_an_agent_waits_for_the_next_one(rig: Rig) -> None:
    rig.agent_process(dry_patience_s=60.0 * SLOWNESS)
    disk = rig.state_dir / "disks" / "a"
    with rig.client() as client:
        client.launch(spec("a", 128, command=(sys.executable, "-c", HOG)))
        set_balloon(client, "a", 40)
    kill(rig)
    (disk / "go").touch()
    until_blocking(lambda: rig.usage("a", "workload") > 85 * MIB, "it to run dry")

    rig.agent_process(dry_patience_s=60.0 * SLOWNESS)
    with rig.client() as client:
        client.change("a", VmChange(automatic=True))
        until_blocking((disk / "fed").exists, "it to have its memory")
        assert client.host().oom_kills == 0
        client.stop("a")
    end_in_order(rig)


def end_in_order(rig: Rig) -> None:
    child = rig.children[-1]
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=PATIENCE_S) == 0


def test_killed_in_the_middle_of_inflations(rig: Rig) -> None:
    """At moments that nobody chose; the seed is printed where it fails."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    pool = {"pool_mib": 1024, "reserve_mib": 16}
    rig.agent_process(**pool)
    with rig.client() as client:
        client.launch(spec("a", 768, reservation_bytes=64 * MIB))
    for turn in range(5):
        balloon_mib = 550 if turn % 2 == 0 else 100
        with rig.client() as client:
            until_vm(client, "a", lambda vm: vm.connected, "the driver to connect")
            client.change("a", VmChange(target_bytes=balloon_mib * MIB))
        time.sleep(dice.uniform(0.0, 0.25))
        kill(rig)
        quota_bytes = rig.quota("a", 768)
        assert rig.limit("a", "workload") <= quota_bytes <= 768 * MIB
        rig.agent_process(**pool)
        with rig.client() as client:
            # The pin was saved before it was answered: it goes on where the dead one stopped.
            until_vm(
                client,
                "a",
                lambda vm: vm.balloon_actual_bytes == balloon_mib * MIB,  # noqa: B023
                f"a balloon of {balloon_mib} MiB",
            )
            vm = client.vm("a")
        until_blocking(
            lambda: rig.quota("a", 768) == rig.limit("a", "workload") == vm.quota_bytes,  # noqa: B023
            "the kernel's limits to be the books'",
        )
    end_in_order(rig)


def test_killed_again_before_it_has_adopted_all(rig: Rig) -> None:
    rig.agent_process()
    with rig.client() as client:
        for name in ("a", "b", "c"):
            client.launch(spec(name, 64))
    pids = rig.processes()
    kill(rig)
    for delay_s in (0.3, 0.5, 0.7):
        path = rig.base / "agent.toml"
        rig.balloon("agent", "--config", str(path))
        time.sleep(delay_s)
        kill(rig)
    assert rig.processes() == pids
    rig.agent_process()
    with rig.client() as client:
        assert [vm.name for vm in client.vms()] == ["a", "b", "c"]
    end_in_order(rig)


def test_keep_then_adopt_then_stop(rig: Rig) -> None:
    pids: list[set[int]] = []

    async def first() -> None:
        async with rig.agent(on_exit="keep") as agent:
            await agent.launch(spec("a", 128))
            await agent.change("a", VmChange(target_bytes=40 * MIB))
            await until(lambda: agent.vm("a").quota_bytes == 88 * MIB, "the balloon")
            client = workload(agent, "a")
            await appetite(client, 50)
            await touched(client, 50)
            pids.append(rig.processes())

    async def second() -> None:
        async with rig.agent() as agent:
            assert rig.processes() == pids[0]
            await until(lambda: agent.vm("a").connected, "the driver")
            assert agent.vm("a").quota_bytes == 88 * MIB
            client = workload(agent, "a")
            assert (await client.stats())["anon"]["touched_bytes"] == 50 * MIB
            await agent.change("a", VmChange(target_bytes=0))
            await until(lambda: agent.vm("a").quota_bytes == 128 * MIB, "the whole size")

    rig.play(first)
    assert is_released(rig, "a")
    assert rig.quota("a", 128) == 88 * MIB
    rig.play(second)
    assert rig.leftovers() == []


def test_a_killed_watchdog_is_replaced_and_no_vm_is_stopped(rig: Rig) -> None:
    rig.agent_process(dry_patience_s=0.1)
    with rig.client() as client:
        client.launch(spec("a", 64))
        (killed,) = rig.watchdogs()
        os.kill(killed, signal.SIGKILL)
        until_blocking(lambda: len(set(rig.watchdogs()) - {killed}) == 1, "another watchdog")
        assert client.vm("a").connected
        until_held(rig, "a")
    kill(rig)
    until_blocking(lambda: is_released(rig, "a"), "the new watchdog to act")
    rig.agent_process()
    end_in_order(rig)


def test_an_agent_that_fails_keeps_the_vms_that_it_is_to_keep(rig: Rig) -> None:
    class Defect(Exception):
        pass

    async def fail() -> None:
        async with rig.agent(on_exit="keep") as agent:
            for name in ("a", "b", "c"):
                await agent.launch(spec(name, 64))
            await agent.stop("c")

            def broken() -> None:
                raise Defect

            agent.balancer.plan_once = broken  # type: ignore[method-assign]
            agent.balancer.replan()
            await trio.sleep_forever()

    async def take_over() -> None:
        async with rig.agent() as agent:
            assert [vm.name for vm in agent.vms()] == ["a", "b"]
            await until(lambda: agent.vm("a").connected, "the driver")

    with pytest.RaisesGroup(Defect, flatten_subgroups=True):
        rig.play(fail)
    assert rig.pids("a", "workload")
    assert is_released(rig, "a")
    assert not (rig.cgroup / "c").exists()
    rig.play(take_over)


def test_a_vm_that_died_meanwhile_is_cleared_away(rig: Rig) -> None:
    rig.agent_process()
    with rig.client() as client:
        client.launch(spec("a", 64))
        client.launch(spec("b", 64))
    kill(rig)
    for pid in [*rig.pids("a", "workload"), *rig.pids("a", "driver")]:
        with contextlib.suppress(ProcessLookupError):  # it went with the one before
            os.kill(pid, signal.SIGKILL)
    until_blocking(lambda: not rig.pids("a", "driver"), "its end")
    rig.agent_process()
    with rig.client() as client:
        assert [vm.name for vm in client.vms()] == ["b"]
    assert not (rig.cgroup / "a").exists()
    assert not list(rig.base.glob("*/*/a*"))
    end_in_order(rig)


def test_files_of_others_are_left_alone(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    log, disk = rig.state_dir / "logs" / "app.log", rig.state_dir / "disks" / "mydata"
    others = rig.run_dir / "guests" / "people"
    for directory in (log.parent, disk, others):
        directory.mkdir(parents=True)
    for file in (log, disk / "thesis", others / "list"):
        file.write_text("precious")

    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(spec("a", 64))
            assert [vm.name for vm in agent.vms()] == ["a"]

    rig.play(scenario)
    for file in (log, disk / "thesis", others / "list"):
        assert file.read_text() == "precious"
    said = [record.getMessage() for record in caplog.records]
    for name in ("app", "mydata", "people"):
        assert f"{name} has files here but was no VM of this agent: left alone" in said
    for directory in (log.parent, disk, others):
        shutil.rmtree(directory)


def test_a_leftover_that_can_not_be_cleared_keeps_no_agent_from_starting(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quotas = detect(rig.cgroup.name)
    quotas.prepare()
    for name in ("busy", "gone", "slow", "dead"):
        quotas.create(name, 16 * MIB, 16 * MIB).close()
    real = type(quotas).open_existing

    def open_existing(
        backend: QuotaBackend, name: str, overhead_bytes: int, swap_bytes: int = 0
    ) -> VmQuota:
        quota = real(backend, name, overhead_bytes, swap_bytes)
        if name == "busy":
            raise StillBusy("its processes do not die")
        if name == "slow":
            raise DeadlinePassed("no end after 60 s")
        if name == "gone":
            quota.remove()
            raise VmGone("gone")
        return quota

    async def scenario() -> None:
        async with rig.agent() as agent:
            assert agent.vms() == []
            assert sorted(agent.quotas.names()) == ["busy", "slow"]
            await agent.launch(spec("a", 64))

    with monkeypatch.context() as patched:
        patched.setattr(type(quotas), "open_existing", open_existing)
        rig.play(scenario)
    said = [record.getMessage() for record in caplog.records]
    assert "busy was left by an agent that died and stays: its processes do not die" in said
    assert "slow was left by an agent that died and stays: no end after 60 s" in said
    assert "dead was left by an agent that died: removed" in said

    async def next_agent() -> None:
        async with rig.agent() as agent:
            assert agent.quotas.names() == ()

    rig.play(next_agent)


def test_with_a_smaller_pool_the_vms_give_what_is_too_much(rig: Rig) -> None:
    """An agent is killed; the next one has a pool that its VMs' quotas don't fit.

    Of 256 MiB 16 are lent then and 48 beyond the pool. 200 are in use, so the most
    that the two can give is not enough, until one of them needs less.
    """

    def use(name: str, anon_mib: int) -> None:
        client = WorkloadClient(rig.state_dir / "disks" / name / "workload.sock")
        trio.run(appetite, client, anon_mib)
        trio.run(touched, client, anon_mib)

    rig.agent_process(pool_mib=400)
    with rig.client() as client:
        for name in ("a", "b"):
            client.launch(spec(name, 128))
            use(name, 100)
    pids = rig.processes()
    kill(rig)
    rig.agent_process(pool_mib=208)
    assert "the VMs that run have 48MiB more than the pool of 208MiB: they are" in rig.stderr()
    with rig.client() as client:
        until_blocking(lambda: client.host().quotas_bytes < 256 * MIB, "what they can spare")
        host = client.host()
        assert host.overdrawn_bytes > 0
        assert host.quotas_bytes + host.reserve_left_bytes == 208 * MIB + host.overdrawn_bytes
        assert host.free_bytes == 0
        use("a", 10)
        until_blocking(lambda: client.host().overdrawn_bytes == 0, "what is too much")
        until_blocking(lambda: client.host().reserve_left_bytes == 16 * MIB, "the reserve")
        host = client.host()
        assert host.quotas_bytes <= 192 * MIB
        assert host.oom_kills == 0
        assert "the VMs have no more than the pool any longer" in rig.stderr()
    assert pids <= rig.processes()
    end_in_order(rig)


def test_an_agent_that_refuses_a_pool_leaves_no_guest_held(rig: Rig) -> None:
    """Killed, and the next one can't keep what was promised: the guests run on by themselves."""
    rig.agent_process(pool_mib=400, dry_patience_s=0.1)
    with rig.client() as client:
        for name in ("a", "b"):
            client.launch(spec(name, 128, reservation_bytes=100 * MIB))
    pids = rig.processes()
    kill(rig)
    config = rig.base / "agent.toml"
    config.write_text(config.read_text().replace("400MiB", "192MiB"))
    refused = rig.balloon("agent", "--config", str(config))
    assert refused.wait(PATIENCE_S) == 2
    (line,) = [said for said in rig.stderr().splitlines() if said.startswith("balloon: ")]
    assert "the 2 VMs that run were promised 200MiB (a 100MiB, b 100MiB)" in line
    assert "the pool has 176MiB beside its reserve" in line
    assert "start with a pool of 216MiB or more" in line
    until_blocking(lambda: is_released(rig, "a") and is_released(rig, "b"), "the watchdog")
    assert rig.processes() == pids
    rig.agent_process(pool_mib=216)
    with rig.client() as client:
        assert [vm.name for vm in client.vms()] == ["a", "b"]
    end_in_order(rig)


@pytest.mark.parametrize("fault", ["small pool", "damaged state", "impossible value", "other root"])
def test_an_agent_that_can_not_take_over_leaves_all_as_it_is(rig: Rig, fault: str) -> None:
    async def keep() -> None:
        async with rig.agent(on_exit="keep") as agent:
            await agent.launch(spec("a", 64))
            await agent.launch(spec("b", 128))

    async def refuse() -> None:
        # Promised are 48 MiB, and 16 are the reserve.
        changes = {"pool_mib": 60} if fault == "small pool" else {}
        async with rig.agent(**changes):
            pass

    async def take_over() -> None:
        async with rig.agent() as agent:
            assert [vm.name for vm in agent.vms()] == ["a", "b"]

    rig.play(keep)
    pids = rig.processes()
    state = rig.state_dir / "state.json"
    saved = state.read_bytes()
    cgroup = rig.cgroup
    if fault == "damaged state":
        state.write_bytes(saved[:-9])
    if fault == "impossible value":
        state.write_bytes(saved.replace(b'"shares": 1000', b'"shares": 0'))
        assert state.read_bytes() != saved
    if fault == "other root":
        rig.cgroup = cgroup.with_name(cgroup.name + "-2")
    broken = state.read_bytes()
    try:
        with pytest.RaisesGroup(ConfigError, allow_unwrapped=True, flatten_subgroups=True):
            rig.play(refuse)
        assert not rig.cgroup.exists() or fault != "other root"
    finally:
        rig.cgroup = cgroup
    assert state.read_bytes() == broken
    assert rig.processes() == pids
    state.write_bytes(saved)
    rig.play(take_over)
