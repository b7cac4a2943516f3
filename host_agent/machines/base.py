"""What runs mock VMs: the names that every backend shares.

A backend starts the processes of a mock VM inside cgroups that exist already, hands out what the
agent needs to watch and end it, and finds it again after the agent was restarted. It knows nothing
of balloons, quotas or channels: to it the driver is a command line.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol


class MachineError(Exception):
    """A mock VM could not be started, found or stopped; one line says why."""


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a mock VM's command ended. Both are None when nobody was there to see it."""

    code: int | None = None
    """0 to 255; for a command that a signal ended, 128 + the signal's number, as in a shell."""
    detail: str = ""
    out_of_memory: bool = False
    """Whether its kernel is known to have killed in it for want of memory."""

    @property
    def ok(self) -> bool:
        """Whether the command is known to have ended with 0."""
        return self.code == 0

    def __str__(self) -> str:
        if self.code is None:
            return self.detail or "exit status unknown"
        return f"exit status {self.code}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """One mock VM to start. Paths are the host's; directories are made where they are missing."""

    name: str
    """Also its host name."""
    command: tuple[str, ...]
    """The workload; when it exits, the mock VM ends. Empty: the image's own."""
    socket_dir: Path
    """Directory of the guest's private channel socket; a backend may keep small files in it."""
    run_dir: Path
    """The agent's run directory. Inside the mock VM `socket_dir` stands in its place, so that the
    guest sees `<run_dir>/channel.sock` and no other socket of the agent."""
    disk_dir: Path
    """The VM's own writable files: /var/tmp inside; `tmp` in it is its /tmp."""
    log_path: Path
    """What its processes print; it is appended to, and nothing bounds it."""
    cgroup_dir: Path
    """The VM's memory cgroup: /sys/fs/cgroup inside, read-only."""
    workload_procs: Path
    """cgroup.procs (or tasks) file that the workload joins before it runs."""
    driver_procs: Path
    """The same for the driver and the VM's init."""
    driver_argv: tuple[str, ...]
    """The driver's command line; empty if it is to have none."""
    driver_arguments: tuple[str, ...] = ()
    """The same driver's own arguments, for one that is forked; empty if none can be."""
    image: str | None = None
    """What a container engine makes it of; None for a backend that needs none."""
    network: str | None = None
    """Of the container engine's; None for no network at all."""
    overhead_bytes: int = 0
    """What its limit has beyond its quota, for the driver."""
    assigned_bytes: int | None = None
    """Its size as a VM, where it is to be told to the workload; None where nobody asks."""
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Added to the small environment that every mock VM has; nothing of the agent's leaks in."""


class Machine(Protocol):
    """A running mock VM."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def place(self) -> Path | None:
        """Its memory cgroup, if that isn't below the agent's root: see `VmQuota.enter_scope`."""
        ...

    @property
    def outlives_agent(self) -> bool:
        """Whether somebody else's processes run in it, which an agent that ends leaves alone."""
        ...

    @property
    def state(self) -> dict[str, Any]:
        """What `MachineBackend.adopt` needs to find it again: JSON values only."""
        ...

    async def wait_exited(self) -> ExitStatus:
        """Wait until nothing of the mock VM runs any more; may be called again, and by many."""
        ...

    async def last_words(self) -> str | None:
        """What its command said last, as one line, once it has ended; None: its log has that."""
        ...

    async def stop(self, timeout_s: float) -> ExitStatus:
        """Ask the workload to end (SIGTERM); after `timeout_s` kill everything.

        Returns when nothing of it runs any more; cancelled, it may leave it running. Raises
        MachineError if the kernel does not get rid of it. Stopping what has ended is no error.
        """
        ...


class MachineBackend(Protocol):
    """A way of running mock VMs."""

    async def launch(self, spec: MachineSpec) -> Machine:
        """Start a mock VM; returns when its command is in its cgroup and about to be executed.

        Raises MachineError. When it fails or is cancelled, no process of it is left.
        """
        ...

    async def adopt(self, state: Mapping[str, Any]) -> Machine | None:
        """The mock VM that an earlier agent left running, by its persisted state.

        None if it does not run any more. Raises MachineError if the state makes no sense.
        """
        ...
