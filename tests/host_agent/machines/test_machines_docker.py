"""What an engine is asked for, and the engines that are refused, without any engine."""

from pathlib import Path
from typing import Any

import pytest
import trio

from host_agent.machines.base import ExitStatus, MachineError, MachineSpec
from host_agent.machines.docker import DockerBackend
from host_agent.machines.docker_machine import status_of
from host_agent.machines.docker_making import container_config
from host_agent.machines.engine import Engine
from host_agent.machines.engine_answers import ContainerView, EngineView
from protocol.units import MIB, PAGE_BYTES


def spec(tmp_path: Path, **changes: Any) -> MachineSpec:
    values: dict[str, Any] = {
        "name": "web1",
        "command": ("sleep", "1"),
        "socket_dir": tmp_path / "guests" / "web1",
        "run_dir": tmp_path,
        "disk_dir": tmp_path / "disk",
        "log_path": tmp_path / "log",
        "cgroup_dir": Path("/memballoon/web1"),
        "workload_procs": Path("/memballoon/web1/workload/cgroup.procs"),
        "driver_procs": Path("/memballoon/web1/driver/cgroup.procs"),
        "driver_argv": (),
        "image": "redis:7",
        "assigned_bytes": 64 * MIB,
    }
    return MachineSpec(**(values | changes))


def test_the_engine_is_asked_for_a_place_and_no_network(tmp_path: Path) -> None:
    config = container_config(spec(tmp_path), "lab")
    assert config["HostConfig"] == {
        "CgroupParent": "/memballoon/web1/workload",
        "NetworkMode": "none",
        "Memory": 64 * MIB + PAGE_BYTES,
        "MemorySwap": -1,
    }
    assert config["Labels"] == {"memballoon.vm": "web1", "memballoon.agent": "lab"}
    assert (config["Image"], config["Hostname"], config["Cmd"]) == (
        "redis:7",
        "web1",
        ["sleep", "1"],
    )


def test_a_network_is_passed_on(tmp_path: Path) -> None:
    config = container_config(spec(tmp_path, network="lab"), "lab")
    assert config["HostConfig"]["NetworkMode"] == "lab"


def test_without_a_command_it_is_the_images(tmp_path: Path) -> None:
    assert "Cmd" not in container_config(spec(tmp_path, command=()), "lab")


@pytest.mark.parametrize("root", ["lab/m", "/lab/m"])
def test_a_root_that_is_a_path_gives_a_name_as_well(root: str) -> None:
    assert DockerBackend(root).container_name("web1") == "lab-m-web1"


class OtherEngine(Engine):
    """One with the systemd cgroup driver."""

    async def view(self) -> EngineView:
        return EngineView("systemd")


def test_an_engine_that_leaves_cgroups_to_systemd_is_refused(tmp_path: Path) -> None:
    backend = DockerBackend("lab", OtherEngine(tmp_path / "e.sock"))
    with pytest.raises(MachineError) as refused:
        trio.run(backend.launch, spec(tmp_path))
    assert str(refused.value) == (
        f"the engine at {tmp_path}/e.sock leaves cgroups to systemd, which "
        "needs cgroup version 2: "
        "set native.cgroupdriver=cgroupfs in its exec-opts and start it again"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "state",
    [{}, {"name": "x"}, {"name": "x", "container_id": "y", "cgroup_dir": 7, "log_path": None}],
)
def test_a_state_that_makes_no_sense(state: dict[str, Any]) -> None:
    with pytest.raises(MachineError, match="makes no sense"):
        trio.run(DockerBackend("lab").adopt, state)


def ended(**changes: Any) -> ContainerView:
    values: dict[str, Any] = {
        "container_id": "f",
        "name": "lab-web1",
        "running": False,
        "pid": 0,
        "exit_code": 0,
        "oom_killed": False,
        "error": "",
        "labels": {},
    }
    return ContainerView(**(values | changes))


@pytest.mark.parametrize(
    ("view", "status"),
    [
        (ended(), ExitStatus(0)),
        (ended(exit_code=3), ExitStatus(3)),
        (ended(exit_code=143), ExitStatus(143, "ended by SIGTERM")),
        (ended(exit_code=255), ExitStatus(255)),
        (ended(exit_code=127, error="no x"), ExitStatus(127, "no x")),
        (
            ended(exit_code=137, oom_killed=True),
            ExitStatus(137, "its kernel killed for want of memory", out_of_memory=True),
        ),
        (None, ExitStatus(detail="exit status unknown: its container or its engine is gone")),
    ],
)
def test_how_it_ended(view: ContainerView | None, status: ExitStatus) -> None:
    assert status_of(view) == status
