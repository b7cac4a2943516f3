"""Policies at work on real mock VMs: switched, wrong, hanging, and explained."""

import json
import os
import threading
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest
import trio
import trio.lowlevel
from made_up_policies import MadeUp, decision, keep
from scenario_rig import Rig, appetite, spec, touched, until, until_blocking, workload

from host_agent.errors import BadRequest
from host_agent.facade.port import VmChange
from host_agent.policy import registry
from protocol.units import MIB

pytestmark = pytest.mark.effects

GO = threading.Event()


class Wrong(MadeUp):
    """Raises."""

    name = "wrong"

    def __init__(self) -> None:
        super().__init__(lambda *_: 1 // 0)


class Hangs(MadeUp):
    """Computes for ever, until it is let go."""

    name = "hangs"

    def __init__(self) -> None:
        def answer(host: Any, *_: Any) -> Any:
            while not GO.is_set():
                pass
            return decision(host, keep(host))

        super().__init__(answer)


class Keeps(MadeUp):
    """Everybody keeps what it has."""

    name = "keeps"

    def __init__(self) -> None:
        super().__init__(lambda host, *_: decision(host, keep(host)))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (Wrong, Hangs, Keeps)
    points = [EntryPoint(k.name, f"{__name__}:{k.__name__}", "memballoon.policies") for k in kinds]
    monkeypatch.setattr(registry, "entry_points", lambda *, group: EntryPoints(points))


def test_a_policy_is_changed_and_explained(rig: Rig, installed: None) -> None:
    async def scenario() -> None:
        async with rig.agent(pool_mib=272, reserve_mib=16) as agent, rig.watched(agent, 160):
            for name in ("a", "b"):
                await agent.launch(spec(name, 160, reservation_bytes=40 * MIB))
            await until(lambda: agent.vm("a").quota_bytes == agent.vm("b").quota_bytes, "halves")
            shown = await agent.use_policy("keeps")
            assert (shown.name, shown.configured, shown.fault) == ("keeps", "shares", None)
            assert set(shown.known) >= {"shares", "keeps", "wrong", "hangs"}
            client = workload(agent, "a")
            await appetite(client, 60)
            await touched(client, 60)
            halves = agent.vm("a").quota_bytes
            assert halves == agent.vm("b").quota_bytes
            assert (await agent.decisions("a"))[0].policy == "keeps"
            with pytest.raises(BadRequest, match="unknown policy 'nope'"):
                await agent.use_policy("nope")
            await agent.use_policy("shares")
            client = workload(agent, "b")
            await appetite(client, 140)
            await touched(client, 140)
            await until(lambda: agent.vm("a").quota_bytes < halves, "what b needs")
            explained = await agent.decisions("a")
            assert explained[0].policy == "shares"
            assert {term.name for term in explained[0].terms} >= {"demand", "need", "shares"}
            done = {deed.what for record in explained for deed in record.done}
            assert {"asked", "offered", "claimed"} <= done
            assert agent.oom_kills == 0

    rig.play(scenario)


@pytest.mark.parametrize("name", ["wrong", "hangs"])
def test_vms_live_on_under_a_policy_that_fails(rig: Rig, installed: None, name: str) -> None:
    async def scenario() -> None:
        async with rig.agent(pool_mib=400, reserve_mib=32) as agent, rig.watched(agent, 160):
            for vm in ("a", "b"):
                await agent.launch(spec(vm, 160, reservation_bytes=40 * MIB))
            shown = await agent.use_policy(name)
            assert shown.fault is not None
            assert agent.host().policy_fault is not None
            threads = threading.active_count()
            # A guest that needs more is answered from the reserve, and nobody is killed.
            await agent.stop("b")
            client = workload(agent, "a")
            await appetite(client, 150)
            await touched(client, 150)
            # Who comes is given what is free.
            await agent.launch(spec("late", 160, reservation_bytes=40 * MIB))
            assert agent.vm("late").quota_bytes >= 40 * MIB
            assert threading.active_count() <= threads + 4  # the others write limits
            assert agent.oom_kills == 0
            GO.set()
            back = await agent.use_policy("shares")
            assert back.fault is None
            await trio.lowlevel.checkpoint()

    GO.clear()
    try:
        rig.play(scenario)
    finally:
        GO.set()


def test_an_installed_policy_that_hangs_is_in_nobodys_way(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of its own, an entry point as pip writes it, and a loop without an end."""
    info = rig.base / "hanging-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hanging\nVersion: 1.0\n")
    points = "[memballoon.policies]\nhanging = hanging:Hanging\nmute = hanging:Mute\n"
    (info / "entry_points.txt").write_text(points)
    (rig.base / "hanging.py").write_text(HANGING)
    monkeypatch.setenv("PYTHONPATH", os.fspath(rig.base))
    child = rig.agent_process(pool_mib=256, reserve_mib=16)
    run_dir = os.fspath(rig.run_dir)
    with rig.client() as client:
        assert client.use_policy("shares").known.count("hanging") == 1
        client.launch(spec("before", 64))
        fault = client.use_policy("hanging").fault
        assert fault is not None
        assert "has not answered" in fault.text
        client.launch(spec("after", 64))
        assert [vm.connected for vm in client.vms()] == [True, True]
        assert client.vm("after").quota_bytes == 64 * MIB
        client.stop("before")
    listed = rig.balloon("ps", "--run-dir", run_dir)
    assert "after" in listed.communicate(timeout=60)[0]
    assert "has not answered" in rig.stderr()
    # Another one that decides, and says nothing of it.
    with rig.client() as client:
        client.use_policy("mute")
        until_blocking(lambda: client.decisions("after")[0].policy == "mute", "its decision")
        view = client.decisions("after")[0]
        assert view.terms == ()
        assert view.rule == "not explained by the policy: it has not answered within 1 s"
        with pytest.raises(BadRequest, match="can't judge the range: it has not answered"):
            client.change("after", VmChange(maximum_bytes=48 * MIB))
        assert client.change("after", VmChange(shares=7)).shares == 7
    assert rig.balloon("set", "after", "--maximum", "32MiB", "--run-dir", run_dir).wait(60) == 2
    assert rig.stderr().count("\n") == 1
    # Nobody waits for it at the end.
    child.terminate()
    assert child.wait(60) == 0


HANGING = """
class Hanging:
    name = "hanging"
    source = "a test"
    settings = None

    def decide(self, host, memory, now_s):
        while True:
            pass


class Mute(Hanging):
    name = "mute"

    def decide(self, host, memory, now_s):
        from host_agent.policy.explain import Explanation
        from host_agent.policy.interface import Decision
        from host_agent.policy.plan import Plan

        plan = Plan(host.names, host.quota_pages)
        return Decision(plan, None, Explanation(host.names, self.hang))

    def range_fault(self, *ranges):
        return self.hang()

    def hang(self):
        import time

        while True:
            time.sleep(1)
"""


def test_the_commands_speak_to_a_running_agent(rig: Rig) -> None:
    child = rig.agent_process(pool_mib=256, reserve_mib=16)
    run_dir = os.fspath(rig.run_dir)
    assert rig.balloon("launch", "web1", "--memory", "64MiB", "--run-dir", run_dir).wait(60) == 0
    shown = rig.balloon("policy", "--json", "--run-dir", run_dir)
    assert json.loads(shown.communicate(timeout=60)[0])["settings"] == {"step": "2MiB"}
    said = rig.balloon("explain", "web1", "--run-dir", run_dir).communicate(timeout=60)[0]
    assert "by shares" in said
    assert "  term   demand " in said
    assert "  done   granted 64MiB" in said
    child.terminate()
    assert child.wait(60) == 0
