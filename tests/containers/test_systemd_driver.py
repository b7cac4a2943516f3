"""A real engine that leaves cgroups to systemd: VMs inside of the scopes that it makes.

In the VM bed alone: cgroup version 2 and a systemd that may be reloaded.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from docker_rig import make_small_image
from engine import Engine, EngineUnavailable, engine_for_tests, tool
from scenario_rig import SLOWNESS, until, until_blocking
from systemd_rig import TOP, SystemdRig, systemctl

from host_agent.errors import BadRequest
from host_agent.facade.port import VmChange
from host_agent.hosting import Hosting
from host_agent.machines import docker_machine
from host_agent.machines.docker_machine import DockerMachine
from host_agent.machines.docker_making import AGENT_LABEL, VM_LABEL
from host_agent.machines.vm_slice import VmSlice
from protocol.units import MIB, PAGE_BYTES
from tests.conftest import RUN_PREFIX, missing_systemd

pytestmark = [
    pytest.mark.effects,
    pytest.mark.skipif(missing_systemd() is not None, reason=f"{missing_systemd()}"),
]

IMAGE = f"{RUN_PREFIX}-small-systemd"
LIMITS = ("memory.max", "memory.high", "memory.min", "cgroup.subtree_control")


@pytest.fixture(scope="module")
def systemd_engine() -> Iterator[Engine]:
    try:
        with engine_for_tests(f"{RUN_PREFIX}-systemd", "systemd") as engine:
            assert engine.docker("info", "--format", "{{.CgroupDriver}}") == "systemd"
            make_small_image(engine, IMAGE)
            yield engine
    except EngineUnavailable as error:
        pytest.skip(f"no Docker engine: {error}")


@pytest.fixture
def systemd_rig(
    cgroup_name: str, systemd_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SystemdRig]:
    monkeypatch.setenv("DOCKER_HOST", systemd_engine.url)
    # Emulated, an engine needs so much longer to start a container again.
    for name in ("RESTART_GRACE_S", "EXIT_DEADLINE_S"):
        monkeypatch.setattr(docker_machine, name, getattr(docker_machine, name) * 5 * SLOWNESS)
    enter = Hosting.enter_scope

    async def enter_at_a_shut_gate(hosting: Hosting, name: str, scope: Path) -> None:
        """However long this takes: who has arrived does not run before."""
        assert (scope.parent / "cgroup.freeze").read_text() == "1\n"
        await until(
            lambda: "frozen 1" in (scope / "cgroup.events").read_text(), "it to stand still"
        )
        await enter(hosting, name, scope)

    monkeypatch.setattr(Hosting, "enter_scope", enter_at_a_shut_gate)
    rig = SystemdRig(cgroup_name, systemd_engine, IMAGE)
    try:
        yield rig
        rig.assert_nothing_left()
    finally:
        rig.take_down()


def limits(rig: SystemdRig, name: str) -> dict[str, str]:
    """Everything about memory in a VM's directories, which are the agent's."""
    place = rig.place(name)
    return {str(path): path.read_text() for file in LIMITS for path in sorted(place.rglob(file))}


async def engine(rig: SystemdRig, *arguments: str) -> str:
    return await trio.to_thread.run_sync(rig.engine.docker, *arguments)


def test_memory_moves_between_scopes(systemd_rig: SystemdRig) -> None:
    rig = systemd_rig

    async def scenario() -> None:
        async with rig.agent(pool_mib=128, reserve_mib=8) as agent:
            tell = ("sh", "-c", "cat /sys/fs/cgroup/memory.max /proc/self/cgroup; exec sleep 1000")
            await agent.launch(rig.vm("one", 110, command=tell))
            # It was below its limit before its program ran, and reads the VM's size there.
            said = await engine(rig, "logs", rig.container("one"))
            assert said.split() == [str(110 * MIB + PAGE_BYTES), "0::/"]

            await agent.launch(rig.vm("two", 60))
            assert agent.vm("two").quota_bytes >= 15 * MIB
            assert agent.vm("one").balloon_actual_bytes > 0
            for name in ("one", "two"):
                await until(
                    lambda name=name: rig.limit(name, "workload") == agent.vm(name).quota_bytes,
                    "its limit",
                )
                machine = agent.balancer.guests[name].machine
                assert isinstance(machine, DockerMachine)
                assert rig.place(name) == rig.scope(name) / name
                assert machine.init_pid in rig.pids(name, "workload/container")
                assert rig.pid_of(name, "driver")
                assert (rig.scope(name) / "cgroup.procs").read_text() == ""
                assert not (rig.cgroup / name).exists()

            # Who is started in there later is below the same limit.
            joined = await engine(rig, "exec", rig.container("two"), "cat", "/proc/self/cgroup")
            assert joined == "0::/"

            before = limits(rig, "two")
            assert len(before) > 12
            systemctl("daemon-reload")
            assert limits(rig, "two") == before
            await agent.stop("two")
            assert rig.containers() == [rig.container("one")]
            assert not rig.slice("two").exists()
            await agent.stop("one")
            assert agent.host().quotas_bytes == 0

    rig.play(scenario)


def test_restarted_it_keeps_its_quota(systemd_rig: SystemdRig) -> None:
    rig = systemd_rig

    async def scenario() -> None:
        async with rig.agent(pool_mib=256) as agent:
            tell = "cat /sys/fs/cgroup/memory.max"
            stays = f"{tell}; trap 'exit 0' TERM; while :; do sleep 0.05; done"
            await agent.launch(rig.vm("web1", 128, command=("sh", "-c", stays)))
            await agent.change("web1", VmChange(target_bytes=32 * MIB))
            await until(
                lambda: agent.vm("web1").balloon_actual_bytes == 32 * MIB, "32 MiB in its balloon"
            )
            guest = agent.balancer.guests["web1"]
            machine = guest.machine
            assert isinstance(machine, DockerMachine)
            pid = machine.init_pid
            guest.connected = trio.Event()
            await engine(rig, "restart", "--time=0", rig.container("web1"))
            await until(lambda: machine.init_pid != pid, "its new process 1")
            assert machine.init_pid in rig.pids("web1", "workload/container")
            said = await engine(rig, "logs", rig.container("web1"))
            assert said.split() == [str(128 * MIB + PAGE_BYTES)] * 2
            await guest.connected.wait()
            await until(
                lambda: (
                    agent.vm("web1").balloon_actual_bytes == 32 * MIB
                    and rig.limit("web1", "workload") == rig.quota("web1", 128) == 96 * MIB
                ),
                "its quota",
            )
            await agent.change("web1", VmChange(target_bytes=0))
            await until(lambda: rig.limit("web1", "workload") == 128 * MIB, "its memory back")
            await agent.stop("web1")

    rig.play(scenario)


def test_an_agent_that_dies_and_the_next_one(systemd_rig: SystemdRig) -> None:
    rig = systemd_rig
    agent = rig.agent_process(dry_patience_s=60.0)
    with rig.client() as client:
        client.launch(rig.vm("web1", 64))
        client.change("web1", VmChange(target_bytes=20 * MIB))
        until_blocking(lambda: client.vm("web1").balloon_actual_bytes == 20 * MIB, "its balloon")
    agent.kill()
    agent.wait()
    # Joins from outside, and is held below the limit by the one that outlives the agent.
    eat = "head -c 56000000 /dev/zero >/dev/shm/held; : >/dev/shm/fed; sleep 1000"
    rig.engine.docker("exec", "--detach", rig.container("web1"), "sh", "-c", eat)
    workload = rig.place("web1") / "workload"
    until_blocking(lambda: "frozen 1" in (workload / "cgroup.events").read_text(), "it to be held")
    assert rig.usage("web1", "workload") <= 44 * MIB

    async def scenario() -> None:
        async with rig.agent(dry_patience_s=60.0) as next_agent:
            assert [vm.name for vm in next_agent.vms()] == ["web1"]
            await next_agent.change("web1", VmChange(automatic=True))
            await until(lambda: rig.usage("web1", "workload") > 53 * MIB, "it to have its memory")
            assert next_agent.host().oom_kills == 0
            await next_agent.stop("web1")

    rig.play(scenario)


def test_what_does_not_start_leaves_nothing_behind(systemd_rig: SystemdRig) -> None:
    """Nor does an agent that died while a container of its stood at its gate."""
    rig = systemd_rig
    gate = VmSlice(TOP, rig.cgroup.name, "left")
    labels = ("--label", f"{VM_LABEL}=left", "--label", f"{AGENT_LABEL}={rig.cgroup.name}")
    place = ("--cgroup-parent", gate.unit, "--name", rig.container("left"), "--network", "none")
    left = rig.engine.docker("create", *labels, *place, IMAGE)
    gate.shut()
    procs = gate.scope(left) / "cgroup.procs"
    with subprocess.Popen(
        [tool("docker"), "start", left],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=rig.engine.client_environment(),
    ) as starting:
        until_blocking(lambda: procs.exists() and procs.read_text(), "it to stand at the gate")

        async def scenario() -> None:
            async with rig.agent() as agent:
                with pytest.raises(BadRequest, match="no-such-program"):
                    await agent.launch(rig.vm("web1", command=("no-such-program",)))
                with pytest.raises(BadRequest, match="docker pull no-such-image"):
                    await agent.launch(rig.vm("web1", image="no-such-image"))
                assert agent.vms() == []
                await until(lambda: rig.containers() == [], "what was left to be removed")

        rig.play(scenario)
        assert starting.wait() != 0
