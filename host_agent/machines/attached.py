"""Mock VMs whose container somebody else starts: Compose, `docker run`, anybody.

The agent makes the VM's cgroups, with the limits in force, and its private socket before there is
any container. The container is started with the VM's `workload` as its cgroup parent, and brings
its own driver (`balloon-guest run`), which the agent moves to the sibling cgroup when it knocks
(intake/newcomer.py). The VM lasts until it is stopped, whatever its container does meanwhile: a
container that comes back finds its limits as they were, and waits for nobody.

A container that runs is somebody else's: an agent that ends leaves it alone, with its limits.
"""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import trio

from host_agent.machines.base import ExitStatus, MachineError, MachineSpec
from host_agent.machines.identity import ProcessHandle, pid_inside
from host_agent.machines.other_hierarchies import remove_elsewhere
from host_agent.quota.cgroup_tree import pids_below

LINKS_DIR: Final = "cgroup"
"""In the run directory: a link to each such VM's cgroup. It is what a container mounts read-only,
by one path on every machine, whichever version of cgroups it has."""

ENGINE_DEADLINE_S: Final = 2.0
"""For the engine to remove its own part of what has ended."""

LOOK_S: Final = 0.02


class AttachedMachine:
    """A declared mock VM. Made by `AttachedBackend`."""

    def __init__(self, name: str, cgroup_dir: Path, link: Path) -> None:
        self._name = name
        self._cgroup_dir = cgroup_dir
        self._link = link
        self._stopped = trio.Event()

    @property
    def name(self) -> str:
        """Its name."""
        return self._name

    @property
    def place(self) -> Path | None:
        """Below the agent's root."""
        return None

    @property
    def outlives_agent(self) -> bool:
        """Whether a container runs in it."""
        return bool(self._processes())

    @property
    def state(self) -> dict[str, Any]:
        """What `AttachedBackend.adopt` needs: JSON values only."""
        return {
            "name": self._name,
            "cgroup_dir": str(self._cgroup_dir),
            "link": str(self._link),
        }

    async def wait_exited(self) -> ExitStatus:
        """Wait until it is stopped: it does not end with a container."""
        await self._stopped.wait()
        return ExitStatus(detail="stopped")

    async def last_words(self) -> str | None:
        """See `Machine.last_words`."""
        return None

    async def stop(self, timeout_s: float) -> ExitStatus:
        """See `Machine.stop`: every process 1 in it is told to end; what is left is killed."""
        for pid in self._processes():
            if pid_inside(pid) == 1:
                _tell_to_end(pid)
        with trio.CancelScope(shield=True), trio.move_on_after(timeout_s):
            while self._processes():
                await trio.sleep(LOOK_S)
        self._link.unlink(missing_ok=True)
        with trio.CancelScope(shield=True), trio.move_on_after(ENGINE_DEADLINE_S):
            while not remove_elsewhere(self._cgroup_dir):
                await trio.sleep(LOOK_S)
        self._stopped.set()
        return ExitStatus(detail="stopped")

    def _processes(self) -> tuple[int, ...]:
        return pids_below(self._cgroup_dir / "workload")


class AttachedBackend:
    """The backend. It starts nothing."""

    async def launch(self, spec: MachineSpec) -> AttachedMachine:
        """See `MachineBackend.launch`: the VM is there, its container may come."""
        link = spec.run_dir / LINKS_DIR / spec.name
        try:
            point(link, spec.cgroup_dir)
        except OSError as error:
            raise MachineError(f"{spec.name}: {link} can't be made: {error.strerror}") from error
        return AttachedMachine(spec.name, spec.cgroup_dir, link)

    async def adopt(self, state: Mapping[str, Any]) -> AttachedMachine | None:
        """See `MachineBackend.adopt`: it is there as long as its cgroups are."""
        try:
            name, cgroup_dir = str(state["name"]), Path(state["cgroup_dir"])
            link = Path(state["link"])
        except (KeyError, TypeError) as error:
            raise MachineError(f"the state of a mock VM makes no sense: {error!r}") from error
        if not await trio.Path(cgroup_dir).is_dir():
            return None
        return AttachedMachine(name, cgroup_dir, link)


def point(link: Path, cgroup_dir: Path) -> None:
    """Let a link lead to a VM's cgroup. Raises OSError."""
    link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(cgroup_dir)


def _tell_to_end(pid: int) -> None:
    try:
        handle = ProcessHandle.of(pid)
    except ProcessLookupError:
        return
    handle.send(signal.SIGTERM)
    handle.close()
