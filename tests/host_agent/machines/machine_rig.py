"""Where the mock VMs of one test live."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import trio

from host_agent.machines.base import MachineSpec
from host_agent.machines.process import ProcessBackend, ProcessMachine
from host_agent.quota.cgroup2_levels import hand_down_memory
from host_agent.quota.cgroup_tree import remove_tree

SLOWNESS = 6 if os.environ.get("MEMBALLOON_SLOW_MACHINE") else 1
PATIENCE_S = 20.0 * SLOWNESS
"""For what takes a tenth of a second on an idle machine."""


def memory_root() -> Path:
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    if v1.is_dir():
        return v1
    hand_down_memory(v2)
    return v2


class MachineRig:
    def __init__(self, cgroup: Path, base: Path) -> None:
        self.cgroup = cgroup
        self.base = base
        self.run_dir = base / "run"
        self.backend = ProcessBackend(hidden_dirs=(base / "state",))

    def set_up(self) -> None:
        self.cgroup.mkdir()
        self.hand_down(self.cgroup)
        self.run_dir.mkdir(parents=True)

    def spec(self, *command: str, name: str = "vm1", **changes: Any) -> MachineSpec:
        cgroup = self.cgroup / name
        cgroup.mkdir(exist_ok=True)
        self.hand_down(cgroup)
        for directory in (cgroup / "workload", cgroup / "driver"):
            directory.mkdir(exist_ok=True)
        values: dict[str, Any] = {
            "name": name,
            "command": command,
            "socket_dir": self.run_dir / "guests" / name,
            "run_dir": self.run_dir,
            "disk_dir": self.base / "state" / "disks" / name,
            "log_path": self.base / "state" / "logs" / f"{name}.log",
            "cgroup_dir": cgroup,
            "workload_procs": cgroup / "workload" / "cgroup.procs",
            "driver_procs": cgroup / "driver" / "cgroup.procs",
            "driver_argv": (),
        }
        return MachineSpec(**(values | changes))

    def hand_down(self, cgroup: Path) -> None:
        """With version 2 what is below has the memory controller only if it is given it."""
        if (cgroup / "cgroup.subtree_control").exists():
            hand_down_memory(cgroup)

    async def output(self, script: str, **changes: Any) -> str:
        """What a shell script prints as the workload of a mock VM."""
        spec = self.spec("sh", "-c", script, **changes)
        machine = await self.backend.launch(spec)
        with trio.fail_after(PATIENCE_S):
            await machine.wait_exited()
        return spec.log_path.read_text()

    @contextlib.asynccontextmanager
    async def running(self, spec: MachineSpec) -> Any:
        machine: ProcessMachine = await self.backend.launch(spec)
        try:
            yield machine
        finally:
            with trio.CancelScope(shield=True):
                await machine.stop(0)

    def processes(self) -> set[int]:
        found: set[int] = set()
        for path in self.cgroup.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                found |= set(map(int, path.read_text().split()))
        return found

    def take_down(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # One that is on its way out is not listed any more, and holds its cgroup.
        remove_tree(self.cgroup, time.monotonic() + PATIENCE_S)


async def until(condition: Any, what: str) -> None:
    """Wait for a predicate, with a deadline."""
    with trio.move_on_after(PATIENCE_S):
        while not condition():
            await trio.sleep(0.005)
        return
    raise AssertionError(f"never came true: {what}")
