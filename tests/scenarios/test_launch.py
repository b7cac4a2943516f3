"""Launching where memory is short, where it can't be, and where somebody changes his mind."""

import logging
import math
import random
import threading
import time
from typing import Any

import pytest
import trio
import trio.lowlevel
from scenario_rig import PATIENCE_S, Rig, appetite, spec, touched, until, workload

from host_agent import agent as agent_module
from host_agent.agent import Agent
from host_agent.errors import BadRequest, NotEnoughMemory, VmExists
from host_agent.facade.port import VmChange
from host_agent.guest import Guest, Phase
from host_agent.hosting import Places
from host_agent.intake.reception import Reception
from host_agent.quota.base import VmQuota
from protocol.units import MIB

pytestmark = pytest.mark.effects


def nothing_of(rig: Rig, agent: Agent, name: str) -> list[str]:
    """What is there of a VM that should not be."""
    found = [str(path) for path in rig.base.glob(f"*/*/{name}*")]
    if (rig.cgroup / name).exists():
        found.append(f"cgroup {name}")
    if name in agent.ledger or name in agent.balancer.guests:
        found.append("an entry in the books")
    if f'"{name}"' in (rig.state_dir / "state.json").read_text():
        found.append("an entry in the state file")
    return found


def test_the_others_are_ballooned_first(rig: Rig) -> None:
    async def scenario() -> None:
        async with rig.agent(pool_mib=336, reserve_mib=16) as agent, rig.watched(agent, 160):
            for name in ("a", "b"):
                await agent.launch(spec(name, 160, reservation_bytes=60 * MIB))
            assert agent.host().free_bytes == 0
            await agent.launch(spec("late", 160, reservation_bytes=100 * MIB))
            assert agent.vm("late").quota_bytes >= 100 * MIB
            await until(lambda: agent.vm("late").quota_bytes >= 104 * MIB, "its part")
            client = workload(agent, "late")
            await appetite(client, 80)
            await touched(client, 80)
            assert agent.oom_kills == 0

    rig.play(scenario)


def test_what_can_not_be_is_refused_and_leaves_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "MEMORY_DEADLINE_S", 1.0)

    async def scenario() -> None:
        async with rig.agent(pool_mib=216, reserve_mib=16) as agent:
            await agent.launch(spec("full", 200, reservation_bytes=50 * MIB))
            client = workload(agent, "full")
            await appetite(client, 150)
            await touched(client, 150)
            with pytest.raises(NotEnoughMemory) as promised:
                await agent.launch(spec("b", 160, reservation_bytes=151 * MIB))
            assert "reservations together would exceed the pool" in promised.value.one_line()
            with pytest.raises(NotEnoughMemory) as needed:
                await agent.launch(spec("b", 160, reservation_bytes=120 * MIB))
            assert needed.value.missing_bytes > 50 * MIB
            assert "full" in needed.value.one_line()
            assert nothing_of(rig, agent, "b") == []
            # What was given for it comes back.
            await until(lambda: agent.vm("full").quota_bytes == 200 * MIB, "all of it")
            assert agent.oom_kills == 0

    rig.play(scenario)


def test_a_fixed_quota_is_a_promise_too(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """To launches and to the VM's own reservation; what is refused changes nothing."""
    monkeypatch.setattr(agent_module, "MEMORY_DEADLINE_S", math.inf)

    async def scenario() -> None:
        async with rig.agent(pool_mib=316, reserve_mib=16) as agent:
            await agent.launch(spec("p", 300, reservation_bytes=10 * MIB))
            await agent.change("p", VmChange(quota_bytes=240 * MIB))
            # At once: who waits for memory waits for ever here.
            with (
                trio.fail_after(PATIENCE_S),
                pytest.raises(NotEnoughMemory, match="fixed: p at 240MiB") as refused,
            ):
                await agent.launch(spec("q", 200, reservation_bytes=150 * MIB))
            assert refused.value.missing_bytes == 90 * MIB
            assert nothing_of(rig, agent, "q") == []
            with pytest.raises(BadRequest, match="its quota is fixed at 240MiB, below"):
                await agent.change("p", VmChange(reservation_bytes=250 * MIB))
            assert agent.vm("p").reservation_bytes == 10 * MIB
            await agent.change("p", VmChange(reservation_bytes=250 * MIB, automatic=True))
            assert agent.vm("p").reservation_bytes == 250 * MIB

    rig.play(scenario)


async def let_nobody_in(_reception: Reception, guest: Guest, _stream: trio.SocketStream) -> None:
    """A driver that was faster than the end of its VM's command would make the launch a success."""
    await guest.ended.wait()


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("no-such-program",), "no program no-such-program in the mock VM"),
        (("/etc/passwd",), "no program /etc/passwd in the mock VM"),
        (("sh", "-c", "exit 3"), "its command ended at once, exit status 3"),
        (("sh", "-c", "echo no disk >&2; exit 4"), "exit status 4: no disk"),
    ],
)
def test_a_command_that_is_none(
    rig: Rig, command: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reception, "serve", let_nobody_in)

    async def scenario() -> None:
        async with rig.agent() as agent:
            with pytest.raises(BadRequest) as refused:
                await agent.launch(spec("a", 64, command=command))
            assert why in refused.value.one_line()
            assert "\n" not in refused.value.one_line()
            assert nothing_of(rig, agent, "a") == []
            assert agent.host().free_bytes == (512 - 16) * MIB

    rig.play(scenario)


def test_cancelled_at_any_moment_nothing_is_left(rig: Rig) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)

    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(spec("other", 64))
            for turn in range(16):
                # Most of what happens, happens early.
                with trio.move_on_after(dice.uniform(0, 0.6) ** 2):
                    await agent.launch(spec("a", 64, frames=dice.choice(["4KiB", "2MiB"])))
                if "a" in agent.balancer.guests:
                    await agent.stop("a")
                assert nothing_of(rig, agent, "a") == [], turn
                assert agent.vm("other").connected
            assert agent.host().free_bytes == (512 - 16 - 64) * MIB

    rig.play(scenario)


def test_cancelled_at_each_step_nothing_is_left(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent:
            making = threading.Event()
            create = agent.quotas.create

            def create_slowly(*arguments: Any) -> VmQuota:
                making.set()
                time.sleep(0.1)
                return create(*arguments)

            monkeypatch.setattr(agent.quotas, "create", create_slowly)

            async def cancel_when(step: str, scope: trio.CancelScope) -> None:
                while "a" not in agent.balancer.guests:
                    await trio.lowlevel.checkpoint()
                guest = agent.balancer.guests["a"]
                reached = {
                    "admitted": lambda: True,
                    "starting": lambda: guest.phase is not Phase.PENDING,
                    "its cgroups are being made": making.is_set,
                    "has a quota": lambda: guest.quota is not None,
                    "has a process": lambda: bool(rig.processes()),
                    "runs": lambda: guest.machine is not None,
                }[step]
                while not reached():
                    await trio.lowlevel.checkpoint()
                scope.cancel()

            steps = ("admitted", "starting", "its cgroups are being made")
            for step in (*steps, "has a quota", "has a process", "runs"):
                making.clear()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cancel_when, step, nursery.cancel_scope)
                    await agent.launch(spec("a", 64))
                    pytest.fail(f"not cancelled: {step}")
                # A thread that was left behind would have made something by then.
                await agent.launch(spec("b", 64))
                await agent.stop("b")
                assert nothing_of(rig, agent, "a") == [], step

    rig.play(scenario)


def test_many_at_once_and_twice_the_same_name(rig: Rig) -> None:
    async def scenario() -> None:
        errors: list[str] = []

        async with rig.agent() as agent:

            async def launch(name: str) -> None:
                try:
                    await agent.launch(spec(name, 64))
                except Exception as error:
                    errors.append(str(error))

            async with trio.open_nursery() as nursery:
                for name in ("a", "b", "c", "a"):
                    nursery.start_soon(launch, name)
            assert errors == ["a VM named 'a' exists already"]
            assert [vm.name for vm in agent.vms()] == ["a", "b", "c"]
            async with trio.open_nursery() as nursery:
                for name in ("a", "b", "c"):
                    nursery.start_soon(agent.stop, name)
            assert agent.vms() == []

    rig.play(scenario)


def test_a_command_that_exits_ends_its_vm(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent:
            script = "while [ ! -e /var/tmp/go ]; do sleep 0.01; done; exit 7"
            await agent.launch(spec("a", 64, command=("sh", "-c", script)))
            await agent.launch(spec("b", 64))
            (agent.places.disk_dir("a") / "go").touch()
            await until(lambda: [vm.name for vm in agent.vms()] == ["b"], "its end")
            assert agent.host().free_bytes == (512 - 16 - 64) * MIB
            await until(
                lambda: nothing_of(rig, agent, "a") == [], lambda: nothing_of(rig, agent, "a")
            )
            assert "a ended: exit status 7" in caplog.text
            # The name and the memory can be had again.
            await agent.launch(spec("a", 128))

    with caplog.at_level(logging.INFO):
        rig.play(scenario)


def test_a_name_is_free_when_its_files_are_gone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    removing, go_on = threading.Event(), threading.Event()
    remove = Places.remove

    def remove_slowly(places: Places, name: str) -> None:
        removing.set()
        assert go_on.wait(PATIENCE_S)
        remove(places, name)

    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(spec("a", 64))
            monkeypatch.setattr(Places, "remove", remove_slowly)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(agent.stop, "a")
                try:
                    await until(removing.is_set, "the removal of its files")
                    with pytest.raises(VmExists):
                        await agent.launch(spec("a", 64))
                finally:
                    go_on.set()
            assert nothing_of(rig, agent, "a") == []
            await agent.launch(spec("a", 64))
            assert agent.places.disk_dir("a").is_dir()
            assert agent.vm("a").connected

    rig.play(scenario)


def test_stopping_one_that_does_not_want_to_end(rig: Rig) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent:
            script = "trap '' TERM; while :; do sleep 1; done"
            await agent.launch(spec("a", 64, command=("sh", "-c", script)))
            await agent.stop("a")
            assert nothing_of(rig, agent, "a") == []
            assert agent.host().free_bytes == (512 - 16) * MIB

    rig.play(scenario)


def test_a_container_is_one_vms(rig: Rig) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(spec("a", 64, container="db"))
            with pytest.raises(BadRequest) as refused:
                await agent.launch(spec("b", 64, container="db"))
            assert refused.value.one_line() == "b: the container db is a's"
            assert nothing_of(rig, agent, "b") == []
            await agent.launch(spec("b", 64, container="db2"))
            await agent.stop("a")
            await agent.launch(spec("c", 64, container="db"))

    rig.play(scenario)
