"""Containers that somebody else starts in a VM's place, with a driver of their own that knocks."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from docker_rig import DockerRig
from engine import remove_empty_cgroups
from scenario_rig import spec, until

from host_agent.errors import BadRequest
from host_agent.facade.port import VmChange
from host_agent.machines.identity import pid_inside
from host_agent.quota.base import Part
from protocol.units import MIB

pytestmark = pytest.mark.effects

ROOT = Path(__file__).parent.parent.parent

SYSTEM = ("/usr", "/lib", "/lib64", "/sbin/ldconfig", "/etc/ld.so.cache")

# Knocks as an image's own driver does, in its container; then it becomes the driver.
KNOCK = """
import os, socket, sys, time
born = open("/proc/self/cgroup").read()
while open("/proc/self/cgroup").read() == born:
    try:
        with socket.socket(socket.AF_UNIX) as knocking:
            knocking.connect(sys.argv[1])
            knocking.recv(1)
    except OSError:
        pass
    time.sleep(0.05)
sys.argv[1:] = ["driver", f"--socket={sys.argv[1]}", *sys.argv[2:]]
from guest_driver.cli import main
sys.exit(main())
"""


def attached(name: str, mib: int = 128, **changes: Any) -> Any:
    return spec(name, mib, container=f"somebodys-{name}", **changes)


class Outside:
    """A container of somebody else's: without an image's Python, its driver is this machine's."""

    def __init__(self, rig: DockerRig, name: str) -> None:
        self.rig, self.name = rig, name
        self.container = rig.container(f"other-{name}")

    def run(self, *, parent: str | None = None, socket_of: str | None = None) -> None:
        """Start it in its VM's place, with this machine's files read-only as its image."""
        rig = self.rig
        parent = parent or f"/{rig.cgroup.name}/{self.name}/workload"
        seen = [sys.prefix, sys.base_prefix, str(ROOT), *SYSTEM]
        mounts = [f"{path}:{path}:ro" for path in dict.fromkeys(seen) if Path(path).exists()]
        mounts += [
            f"{rig.run_dir}/guests/{socket_of or self.name}:/run/memballoon:ro",
            f"{rig.run_dir}/cgroup/{self.name}:/run/memballoon-cgroup:ro",
        ]
        driver = shlex.join(
            (
                *(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{KNOCK}"),
                "/run/memballoon/channel.sock",
                *("--cgroup=/run/memballoon-cgroup", f"--assigned-pages={128 * 256}"),
            )
        )
        rig.engine.docker(
            *("run", "--detach", "--name", self.container, "--network=none", "--init"),
            *("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--cap-add=IPC_LOCK"),
            *("--security-opt=no-new-privileges", f"--cgroup-parent={parent}"),
            *(f"--volume={mount}" for mount in mounts),
            *(rig.image, "sh", "-c", f"{driver} & while :; do sleep 0.1; done"),
        )

    def remove(self) -> None:
        self.rig.engine.docker("rm", "--force", "--volumes", self.container)


def test_a_container_takes_its_place_and_its_driver_the_sibling(rig: DockerRig) -> None:
    async def scenario() -> None:
        async with rig.agent(pool_mib=256) as agent:
            view = await agent.launch(attached("web1"))
            assert (view.backend, view.state, view.connected) == ("attached", "running", False)
            assert rig.limit("web1", "workload") == 128 * MIB
            assert (rig.run_dir / "cgroup" / "web1").resolve() == rig.cgroup / "web1"
            other = Outside(rig, "web1")
            await trio.to_thread.run_sync(other.run)
            await until(lambda: agent.vm("web1").connected, "its driver")
            quota = agent.balancer.guests["web1"].live_quota
            # Its init and its shell stay, the driver and the pseudo-process are in their own place.
            workload = quota.processes(Part.WORKLOAD)
            assert 1 in map(pid_inside, workload)
            assert len(quota.processes(Part.DRIVER)) == 2
            await agent.change("web1", VmChange(target_bytes=32 * MIB))
            await until(lambda: agent.vm("web1").balloon_actual_bytes == 32 * MIB, "the balloon")
            assert rig.limit("web1", "workload") == 96 * MIB

            # It ends, and comes back below the same limit; nobody had to wait for memory.
            guest = agent.balancer.guests["web1"]
            before = guest.session
            restart = ("restart", "--time=0", other.container)
            await trio.to_thread.run_sync(rig.engine.docker, *restart)
            await until(lambda: guest.session not in (None, before), "its driver again")
            assert agent.vm("web1").balloon_actual_bytes == 32 * MIB
            assert rig.limit("web1", "workload") == 96 * MIB

            # Its engine's limit is below the VM's, which holds as before.
            update = ("update", "--memory=300m", "--memory-swap=300m", other.container)
            await trio.to_thread.run_sync(rig.engine.docker, *update)
            assert rig.limit("web1", "workload") == agent.vm("web1").quota_bytes == 96 * MIB
            await agent.change("web1", VmChange(target_bytes=16 * MIB))
            await until(lambda: rig.limit("web1", "workload") == 112 * MIB, "its new quota")

            await agent.stop("web1")
            assert not rig.engine.inspect(other.container)["State"]["Running"]
            other.remove()
            assert agent.host().quotas_bytes == 0

    rig.play(scenario)


def test_strangers_are_named_and_told_what_to_do(
    rig: DockerRig, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with rig.agent(pool_mib=400) as agent:
            await agent.launch(attached("web1"))
            await agent.launch(attached("web2"))
            for parent, said in (
                (
                    f"/{rig.cgroup.name}-elsewhere",
                    f": start its container with the cgroup parent "
                    f"/{rig.cgroup.name}/web1/workload",
                ),
                (
                    f"/{rig.cgroup.name}/web2/workload",
                    ": give each container its own VM's socket directory",
                ),
            ):
                other = Outside(rig, "web1")
                await trio.to_thread.run_sync(lambda o=other, p=parent: o.run(parent=p))
                try:
                    await until(lambda said=said: said in caplog.text, caplog.text)
                finally:
                    other.remove()
                assert not agent.vm("web1").connected
            assert "it belongs to web2 (" in caplog.text

    try:
        rig.play(scenario)
    finally:
        remove_empty_cgroups(f"{rig.cgroup.name}-elsewhere")


def test_a_container_that_was_there_before_its_vm_is_refused(rig: DockerRig) -> None:
    name = rig.container("early")
    place = f"/{rig.cgroup.name}/web1/workload"
    run = ("run", "--detach", "--name", name, "--network=none", f"--cgroup-parent={place}")

    async def scenario() -> None:
        async with rig.agent() as agent:
            rig.engine.docker(*run, rig.image)
            with pytest.raises(BadRequest) as refused:
                await agent.launch(attached("web1"))
            assert refused.value.one_line() == (
                f"web1 can't be launched: a container runs in {rig.cgroup}/web1 already, without "
                "the VM's limits: stop it, and start it again when this agent has made its place"
            )
            rig.engine.docker("rm", "--force", name)
            await agent.launch(attached("web1"))
            assert rig.limit("web1", "workload") == 128 * MIB

    rig.play(scenario)


def test_an_agent_that_ends_leaves_others_containers_alone(rig: DockerRig) -> None:
    other = Outside(rig, "web1")

    async def first() -> None:
        async with rig.agent() as agent:
            await agent.launch(attached("web1"))
            await trio.to_thread.run_sync(other.run)
            await until(lambda: agent.vm("web1").connected, "its driver")
            await agent.change("web1", VmChange(target_bytes=32 * MIB))
            await until(lambda: agent.vm("web1").balloon_actual_bytes == 32 * MIB, "the balloon")

    async def second() -> None:
        async with rig.agent() as agent:
            assert agent.vm("web1").balloon_actual_bytes == 32 * MIB
            await until(lambda: agent.vm("web1").connected, "its driver")
            other.remove()

    rig.play(first)
    assert rig.engine.inspect(other.container)["State"]["Running"]
    assert rig.limit("web1", "workload") == 96 * MIB
    assert not rig.is_armed("web1")
    rig.play(second)
