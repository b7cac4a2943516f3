"""The agent's driver template: there when it is needed, gone with the agent, missed by nobody."""

import os
import signal
from pathlib import Path

import pytest
import trio
from scenario_rig import Rig, spec, until, until_blocking

from host_agent import service
from host_agent.config import Config, VmTable
from host_agent.facade.port import VmChange
from protocol.units import MIB

pytestmark = pytest.mark.effects


def is_forked(pid: int) -> bool:
    return b"guest_driver.template" in Path(f"/proc/{pid}/cmdline").read_bytes()


def templates(rig: Rig) -> set[int]:
    """Host pids of the templates of this test's agents; not the drivers that came from one."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if str(rig.run_dir).encode() in words and int(path.name) not in rig.processes():
                found.add(int(path.name))
        except OSError:
            continue
    return found


def test_an_agent_that_is_killed_leaves_its_drivers_and_no_template(rig: Rig) -> None:
    child = rig.agent_process()
    with rig.client() as client:
        client.launch(spec("a", 128))
        driver = rig.pid_of("a", "driver")
        assert is_forked(driver)
        client.change("a", VmChange(target_bytes=40 * MIB))
        until_blocking(lambda: client.vm("a").balloon_actual_bytes == 40 * MIB, "the balloon")
        [old] = templates(rig)
    child.kill()
    child.wait()
    until_blocking(lambda: not templates(rig), "the template's end")
    assert rig.pid_of("a", "driver") == driver
    child = rig.agent_process()
    with rig.client() as client:
        until_blocking(lambda: client.vm("a").connected, "its driver again")
        assert client.vm("a").balloon_actual_bytes == 40 * MIB
        client.launch(spec("b", 128))
        assert is_forked(rig.pid_of("b", "driver"))
        assert rig.pid_of("a", "driver") == driver
        assert templates(rig) != {old}
        client.change("a", VmChange(target_bytes=0))
        until_blocking(lambda: client.vm("a").balloon_actual_bytes == 0, "its memory back")
    child.terminate()
    assert child.wait() == 0
    assert not templates(rig)


def test_a_template_that_is_killed_costs_no_vm_and_no_launch(rig: Rig) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(spec("a", 128))
            [old] = templates(rig)
            os.kill(old, signal.SIGKILL)
            await agent.launch(spec("b", 128))
            assert agent.vm("a").connected
            await until(lambda: templates(rig) and templates(rig) != {old}, "another template")
            await agent.launch(spec("c", 64))
            assert is_forked(rig.pid_of("c", "driver"))

    rig.play(scenario)


def test_without_a_template_vms_are_what_they_are(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "template_command", lambda _: ("sh", "-c", "exit 3"))

    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(spec("a", 128))
            assert not is_forked(rig.pid_of("a", "driver"))
            await agent.change("a", VmChange(target_bytes=40 * MIB))
            await until(lambda: agent.vm("a").balloon_actual_bytes == 40 * MIB, "the balloon")
            await agent.change("a", VmChange(target_bytes=0))
            await until(lambda: agent.vm("a").balloon_actual_bytes == 0, "its memory back")

    rig.play(scenario)


def test_an_agent_of_others_containers_has_none_until_it_launches(rig: Rig) -> None:
    theirs = VmTable.model_validate({"name": "c", "memory": "64MiB", "container": "c"})

    async def scenario() -> None:
        config = Config(host=rig.config().host, vms=(theirs,))
        async with service.running(config) as agent:
            await agent.launch(theirs)
            with trio.move_on_after(0.2):
                await until(lambda: templates(rig), "one that should not be there")
                raise AssertionError("a template for containers that bring their drivers")
            await agent.launch(spec("a", 64))
            await until(lambda: len(templates(rig)) == 1, "one")

    rig.play(scenario)
