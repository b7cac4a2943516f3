"""`backend = "docker"`: containers of any image as mock VMs, by an agent with a real engine."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio
from docker_rig import DockerRig
from engine import cgroups_named
from scenario_rig import PATIENCE_S, until

from host_agent.agent import Agent
from host_agent.errors import BadRequest, NotEnoughMemory, VmExists
from host_agent.facade.port import VmChange
from host_agent.guest import Guest
from host_agent.intake.reception import Reception
from protocol.units import MIB, PAGE_BYTES

pytestmark = pytest.mark.effects


def namespace(pid: int | str, kind: str) -> str:
    return str(Path(f"/proc/{pid}/ns/{kind}").readlink())


def test_a_container_without_python_is_a_mock_vm(rig: DockerRig) -> None:
    async def scenario() -> None:
        async with rig.agent(pool_mib=256) as agent:
            view = await agent.launch(rig.vm("web1", 128))
            assert (view.backend, view.state, view.connected) == ("docker", "running", True)
            [container] = rig.containers()
            described = rig.engine.inspect(container)
            assert described["HostConfig"]["CgroupParent"] == f"/{rig.cgroup.name}/web1/workload"
            assert described["HostConfig"]["NetworkMode"] == "none"
            pid, container_id = described["State"]["Pid"], described["Id"]
            own = rig.cgroup / "web1" / "workload" / container_id
            assert str(pid) in (own / "cgroup.procs").read_text().split()
            limit = own / ("memory.limit_in_bytes" if rig.version == 1 else "memory.max")
            assert int(limit.read_text()) == 128 * MIB + PAGE_BYTES

            await agent.change("web1", VmChange(target_bytes=32 * MIB))
            await until(lambda: agent.vm("web1").balloon_actual_bytes == 32 * MIB, "the balloon")
            assert rig.quota("web1", 128) == rig.limit("web1", "workload") == 96 * MIB
            await agent.change("web1", VmChange(target_bytes=0))
            await until(lambda: agent.vm("web1").quota_bytes == 128 * MIB, "its memory")

            await agent.stop("web1")
            assert rig.containers() == []
            assert [path for path in cgroups_named(rig.cgroup.name) if "web1" in str(path)] == []
            assert agent.host().quotas_bytes == 0

    rig.play(scenario)


def test_the_driver_is_outside_of_the_container_and_walled_in(rig: DockerRig) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(rig.vm("web1"))
            init = agent.balancer.guests["web1"].machine
            assert init is not None
            driver = rig.pid_of("web1", "driver")
            proc = Path(f"/proc/{driver}")
            kinds = ("pid", "mnt", "ipc", "uts", "net")
            for kind in kinds:
                own = namespace(driver, kind)
                assert own not in (namespace("self", kind), namespace(init.init_pid, kind))
            status = (proc / "status").read_text()
            assert "CapEff:\t0000000000004000\n" in status
            assert "NoNewPrivs:\t1\n" in status
            guests = proc / "root" / str(rig.run_dir)[1:]
            assert sorted(path.name for path in guests.iterdir()) == [".vm", "channel.sock"]
            mounts = (proc / "mountinfo").read_text().splitlines()
            [options] = [line.split()[5] for line in mounts if line.split()[4] == "/"]
            assert options.split(",")[0] == "ro"

    rig.play(scenario)


def test_the_images_own_command_is_run_where_none_is_given(rig: DockerRig) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(rig.vm("web1", command=()))
            container = rig.container("web1")
            await until(lambda: rig.engine.docker("logs", container) == "the image", "its output")

    rig.play(scenario)


def test_a_network_of_the_engines(rig: DockerRig) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(rig.vm("web1", network="host"))
            described = rig.engine.inspect(rig.container("web1"))
            assert described["HostConfig"]["NetworkMode"] == "host"
            # The driver has none, whatever the container has.
            others = {namespace(pid, "net") for pid in ("self", described["State"]["Pid"])}
            assert namespace(rig.pid_of("web1", "driver"), "net") not in others

    rig.play(scenario)


def test_an_unknown_network(rig: DockerRig) -> None:
    assert refusal(rig, {"network": "no-such-net"}) == (
        "web1 can't be launched: no network no-such-net: `docker network create no-such-net`, or "
        "choose another one (see `docker network ls`)"
    )
    assert rig.containers() == []


def test_a_launch_waits_until_others_have_given(rig: DockerRig) -> None:
    async def scenario() -> None:
        async with rig.agent(pool_mib=128, reserve_mib=8) as agent:
            await agent.launch(rig.vm("one", 110))
            await agent.launch(rig.vm("two", 60))
            assert agent.vm("two").quota_bytes >= 15 * MIB
            assert agent.vm("one").balloon_actual_bytes > 0
            for name in ("one", "two"):
                # Each in its place, below the limit that is in force.
                await until(
                    lambda name=name: rig.limit(name, "workload") == agent.vm(name).quota_bytes,
                    "its limit",
                )
                described = rig.engine.inspect(rig.container(name))
                own = rig.cgroup / name / "workload" / described["Id"] / "cgroup.procs"
                assert str(described["State"]["Pid"]) in own.read_text().split()
                assert rig.pid_of(name, "driver")
                await agent.stop(name)
            assert agent.host().quotas_bytes == 0
            assert rig.containers() == []

    rig.play(scenario)


def test_memory_that_cannot_be_had_is_named_with_who_refused(
    rig: DockerRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("host_agent.agent.MEMORY_DEADLINE_S", 1.0)
    hold = ("sh", "-c", "head -c 60000000 /dev/zero >/dev/shm/held; sleep 1000")

    async def scenario() -> None:
        async with rig.agent(pool_mib=98, reserve_mib=8) as agent:
            await agent.launch(rig.vm("full", 90, command=hold, reservation_bytes=0))
            await until(lambda: rig.usage("full", "workload") > 55 * MIB, "its memory in use")
            with pytest.raises(NotEnoughMemory) as refused:
                await agent.launch(rig.vm("late", 64, reservation_bytes=60 * MIB))
            assert refused.value.missing_bytes > 0
            assert refused.value.refused_by == ("full",)
            assert rig.containers() == [rig.container("full")]

    rig.play(scenario)


def test_its_command_ends_and_so_does_the_vm(rig: DockerRig) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent:
            waits = "trap 'exit 3' USR1; while :; do sleep 0.05; done"
            await agent.launch(rig.vm("web1", command=("sh", "-c", waits)))
            guest = agent.balancer.guests["web1"]
            assert guest.machine is not None
            os.kill(guest.machine.init_pid, signal.SIGUSR1)
            with trio.fail_after(PATIENCE_S):
                await guest.ended.wait()
            assert guest.ended_with == "exit status 3"
            assert agent.host().quotas_bytes == 0
            assert rig.containers() == []

    rig.play(scenario)


def refusal(rig: DockerRig, changes: dict[str, Any]) -> str:
    said: list[str] = []

    async def scenario() -> None:
        async with rig.agent() as agent:
            with pytest.raises(BadRequest) as refused:
                await agent.launch(rig.vm("web1", **changes))
            said.append(refused.value.one_line())
            assert agent.host().quotas_bytes == 0
            assert_nothing_of_it(rig, agent)

    rig.play(scenario)
    return said[0]


def assert_nothing_of_it(rig: DockerRig, agent: Agent) -> None:
    assert agent.vms() == []
    assert [path for path in cgroups_named(rig.cgroup.name) if "web1" in str(path)] == []
    assert list(rig.base.glob("*/*/web1*")) == []


def test_an_unknown_image(rig: DockerRig) -> None:
    said = refusal(rig, {"image": "no-such-image:7"})
    assert said == (
        "web1 can't be launched: no image no-such-image:7: `docker pull no-such-image:7` "
        "or build it first"
    )
    assert rig.containers() == []


def test_no_engine(rig: DockerRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{rig.base}/no.sock")
    assert refusal(rig, {}) == (
        f"web1 can't be launched: no container engine answers at {rig.base}/no.sock: "
        "start one, or set DOCKER_HOST for the agent"
    )


def test_an_engine_elsewhere(rig: DockerRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://192.0.2.1:2375")
    assert refusal(rig, {}) == (
        "web1 can't be launched: DOCKER_HOST is 'tcp://192.0.2.1:2375': mock VMs need an engine on "
        "this machine, at unix:///PATH"
    )


def test_a_program_that_the_image_has_not(rig: DockerRig) -> None:
    said = refusal(rig, {"command": ("no-such-program",)})
    assert "web1 can't be launched: " in said
    assert '"no-such-program": executable file not found' in said
    assert rig.containers() == []


@pytest.mark.parametrize("first", ["", "sleep 1; "], ids=["at once", "seen alive"])
def test_a_command_that_ends_at_once_says_its_last_words(
    rig: DockerRig, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    async def let_nobody_in(_: Reception, guest: Guest, _stream: trio.SocketStream) -> None:
        """A driver that was faster than the end would make the launch a success."""
        await guest.ended.wait()

    monkeypatch.setattr(Reception, "serve", let_nobody_in)
    said = refusal(rig, {"command": ("sh", "-c", f"{first}echo bad luck >&2; exit 4")})
    assert said == "web1 can't be launched: its command ended at once, exit status 4: bad luck"
    assert rig.containers() == []


def test_a_name_that_somebody_elses_container_has(rig: DockerRig) -> None:
    name = rig.container("web1")
    rig.engine.docker("create", "--name", name, "--network", "none", rig.image)
    said = refusal(rig, {})
    assert said == (
        f"web1 can't be launched: a container named {name} is there already, and not this "
        f"agent's: `docker rm -f {name}`, or choose another name for the VM"
    )
    assert rig.containers() == [name]
    rig.engine.docker("rm", name)


def test_a_name_that_a_vm_has(rig: DockerRig) -> None:
    async def scenario() -> None:
        async with rig.agent() as agent:
            await agent.launch(rig.vm("web1"))
            with pytest.raises(VmExists):
                await agent.launch(rig.vm("web1"))
            assert agent.vm("web1").connected

    rig.play(scenario)


def test_a_container_that_an_agent_left_makes_way(rig: DockerRig) -> None:
    name, labels = rig.container("web1"), [f"memballoon.agent={rig.cgroup.name}"]
    labels.append("memballoon.vm=web1")
    flags = [word for label in labels for word in ("--label", label)]

    async def scenario() -> None:
        async with rig.agent() as agent:
            await until(lambda: rig.containers() == [], "the removal at its start")
            rig.engine.docker("create", "--name", name, "--network", "none", *flags, rig.image)
            await agent.launch(rig.vm("web1"))
            assert agent.vm("web1").connected

    rig.engine.docker("create", "--name", name, "--network", "none", *flags, rig.image)
    rig.play(scenario)


def test_the_command_line(rig: DockerRig) -> None:
    rig.agent_process()
    socket = ("--run-dir", str(rig.run_dir))
    launch = rig.balloon(
        *("launch", "web1", *socket, "--backend", "docker", "--image", rig.image),
        *("--memory", "64MiB", "--", "sleep", "1000"),
    )
    assert launch.wait() == 0, rig.stderr()
    listed = rig.balloon("ps", "--json", *socket)
    [view] = json.loads(listed.communicate()[0])
    assert (view["name"], view["backend"], view["state"]) == ("web1", "docker", "running")
    refused = rig.balloon(
        *("launch", "web2", *socket, "--image", "no-such-image", "--memory", "64MiB")
    )
    assert refused.wait() == 2
    assert rig.stderr().count("\n") == 1
    assert rig.balloon("stop", "web1", *socket).wait() == 0, rig.stderr()
    assert rig.containers() == []
    rig.children[0].terminate()
    assert rig.children[0].wait() == 0


def test_the_configuration_file(rig: DockerRig) -> None:
    text = f'\n[[vm]]\nname = "web1"\nmemory = "64MiB"\nimage = "{rig.image}"\nbackend = "docker"\n'
    path = rig.base / "vms.toml"
    path.write_text(
        f'[host]\npool = "256MiB"\nrun_dir = "{rig.run_dir}"\nstate_dir = "{rig.state_dir}"\n'
        f'cgroup_root = "{rig.cgroup.name}"\n{text}'
    )
    child = rig.balloon("agent", "--config", str(path))

    async def scenario() -> None:
        await until(lambda: rig.containers() == [rig.container("web1")], rig.stderr)

    rig.play(scenario)
    child.terminate()
    assert child.wait() == 0
