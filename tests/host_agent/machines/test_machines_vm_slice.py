"""The slice of a VM, and what is asked of an engine that leaves cgroups to systemd; no systemd."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
from test_machines_docker import spec

from host_agent.machines.base import MachineError
from host_agent.machines.docker import DockerBackend
from host_agent.machines.docker_making import container_config, moved
from host_agent.machines.engine import Engine
from host_agent.machines.engine_answers import ContainerView, EngineView
from host_agent.machines.identity import boot_id, start_ticks_of
from host_agent.machines.vm_slice import Gate, VmSlice, kill_at_gate, slices_below
from protocol.units import MIB, PAGE_BYTES

ID = "f" * 64


class ScopeEngine(Engine):
    """One with the systemd cgroup driver; `pid` is its container's process 1."""

    def __init__(self, path: Path, pid: int = 0) -> None:
        super().__init__(path)
        self.pid = pid
        self.said: list[str] = []

    async def view(self) -> EngineView:
        return EngineView("systemd")

    async def create(self, name: str, config: Mapping[str, Any]) -> str:
        self.said.append(f"create {name}")
        return ID

    async def start(self, container_id: str) -> None:
        self.said.append("start")

    async def inspect(self, container: str) -> ContainerView:
        return ContainerView(ID, "lab-web1", self.pid > 0, self.pid, 0, False, "", {})

    async def remove(self, container_id: str) -> None:
        self.said.append("remove")


async def nowhere(name: str, scope: Path) -> None:
    raise AssertionError(f"{name} has no {scope}")


def backend(tmp_path: Path, engine: Engine) -> DockerBackend:
    made = DockerBackend("lab", engine, hierarchy=tmp_path / "top")
    made.enter_scope = nowhere
    return made


def test_names(tmp_path: Path) -> None:
    made = VmSlice(tmp_path, "/lab/my-agent", "web-1")
    assert made.unit == r"lab-my\x2dagent-web\x2d1.slice"
    assert made.scope(ID) == (
        tmp_path / "lab.slice" / r"lab-my\x2dagent.slice" / made.unit / f"docker-{ID}.scope"
    )


def test_the_slices_of_an_agent(tmp_path: Path) -> None:
    top = tmp_path / "lab.slice"
    for name in ("lab-b.slice", "lab-a.slice", "docker-x.scope", "other-c.slice"):
        (top / name).mkdir(parents=True)
    found = [(f"lab-{name}.slice", top / f"lab-{name}.slice") for name in "ab"]
    assert slices_below(tmp_path, "lab") == found
    assert slices_below(tmp_path, "none") == []


def test_the_engine_is_asked_for_a_slice(tmp_path: Path) -> None:
    made = spec(tmp_path, overhead_bytes=40 * MIB)
    host = container_config(made, "lab", "lab-web1.slice")["HostConfig"]
    assert host == {
        "CgroupParent": "lab-web1.slice",
        "NetworkMode": "none",
        # The driver is in the scope as well.
        "Memory": (64 + 40) * MIB + PAGE_BYTES,
        "MemorySwap": -1,
    }


def test_where_a_moved_vm_has_its_parts(tmp_path: Path) -> None:
    made = moved(spec(tmp_path), tmp_path / "x.scope" / "web1")
    assert made.cgroup_dir == tmp_path / "x.scope" / "web1"
    assert made.workload_procs == made.cgroup_dir / "workload" / "cgroup.procs"
    assert made.driver_procs == made.cgroup_dir / "driver" / "cgroup.procs"


def test_who_arrives_is_moved_before_the_gate_opens(tmp_path: Path) -> None:
    made = VmSlice(tmp_path, "lab", "web1")
    freeze = made.directory / "cgroup.freeze"
    seen: list[tuple[str, Path, str]] = []

    async def enter(name: str, scope: Path) -> None:
        seen.append((name, scope, freeze.read_text()))

    async def main() -> None:
        gate = Gate(made, enter)
        gate.shut("web1")
        made.scope(ID).mkdir()
        procs = made.scope(ID) / "cgroup.procs"
        procs.write_text("")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gate.pass_through, "web1", ID)
            await trio.testing.wait_all_tasks_blocked()
            assert seen == []
            procs.write_text("1\n")

    trio.run(main)
    assert seen == [("web1", made.scope(ID), "1\n")]
    assert freeze.read_text() == "0\n"


def test_one_that_cannot_be_moved_stands_still(tmp_path: Path) -> None:
    made = VmSlice(tmp_path, "lab", "web1")

    async def enter(name: str, scope: Path) -> None:
        raise MachineError("no")

    async def main() -> None:
        gate = Gate(made, enter)
        gate.shut("web1")
        made.scope(ID).mkdir()
        (made.scope(ID) / "cgroup.procs").write_text("1\n")
        with pytest.raises(MachineError):
            await gate.pass_through("web1", ID)

    trio.run(main)
    assert (made.directory / "cgroup.freeze").read_text() == "1\n"


def test_only_who_stands_still_is_killed_for_it(tmp_path: Path) -> None:
    for freeze, killed in (("1\n", True), ("0\n", False)):
        (tmp_path / "cgroup.freeze").write_text(freeze)
        (tmp_path / "cgroup.kill").write_text("")
        kill_at_gate(tmp_path)
        assert ((tmp_path / "cgroup.kill").read_text() == "1\n") is killed
        assert (tmp_path / "cgroup.freeze").read_text() == "0\n"
    kill_at_gate(tmp_path / "none")


def test_whatever_stands_still_is_killed_while_its_container_is_removed(tmp_path: Path) -> None:
    made = VmSlice(tmp_path, "lab", "web1")
    made.shut()
    kill = made.directory / "cgroup.kill"

    async def main() -> None:
        async with made.emptying():
            for _ in range(2):
                with trio.fail_after(10):
                    while not kill.exists():
                        await trio.sleep(0.005)
                kill.unlink()
            raise MachineError("no")

    with pytest.raises(MachineError):  # alone, not in a group
        trio.run(main)


def test_a_container_that_is_elsewhere_is_removed(tmp_path: Path) -> None:
    engine = ScopeEngine(tmp_path / "e.sock")

    async def main() -> None:
        async with contextlib.aclosing(backend(tmp_path, engine)) as made:
            await made.launch(spec(tmp_path))

    with pytest.raises(MachineError, match=r"did not put the container below .*/lab-web1\.slice: "):
        trio.run(main)
    assert engine.said == ["create lab-web1", "start", "remove"]


@pytest.fixture(autouse=True)
def no_systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may have slices of these names."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def sleeper() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as child:
        yield child.pid
        child.kill()


@pytest.mark.parametrize("inside", [True, False])
def test_one_that_was_started_again_without_an_agent(
    tmp_path: Path, sleeper: int, inside: bool
) -> None:
    """It is found only where it is below the VM's limit."""
    made = VmSlice(tmp_path / "top", "lab", "web1")
    place = made.scope(ID) / "web1"
    container = place / "workload" / "container"
    container.mkdir(parents=True)
    (container / "cgroup.procs").write_text(f"{sleeper}\n" if inside else "")
    state = {
        "name": "web1",
        "boot_id": boot_id(),
        "container_id": ID,
        "cgroup_dir": str(place),
        "socket_dir": str(tmp_path),
        "log_path": str(tmp_path / "log"),
        "init_pid": os.getpid(),
        "init_start_ticks": start_ticks_of(os.getpid()) + 1,
        "driver_pid": None,
        "driver_start_ticks": None,
    }

    async def main() -> None:
        engine = ScopeEngine(tmp_path / "e.sock", sleeper)
        async with contextlib.aclosing(backend(tmp_path, engine)) as docker:
            found = await docker.adopt(state)
            assert (found is not None) is inside
            if found is not None:
                assert found.place == place

    trio.run(main)
