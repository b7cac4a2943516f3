"""A balloon driver for a container of any image: it comes from the host, with the host's Python.

The driver's processes are children of the host: in the driver's cgroup from their first
instruction, in namespaces of their own, with the file tree, the capabilities and the system call
filter of a mock VM's driver of the process backend. Nothing is added to the image. It is started
beside the container, since that takes as long, and then tied to it: see init_script.py.
"""

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import trio

from host_agent.machines.base import MachineError, MachineSpec
from host_agent.machines.environment import ENVIRONMENT
from host_agent.machines.file_tree import prepare, write_fstab
from host_agent.machines.identity import ProcessHandle
from host_agent.machines.init_script import write_outside_scripts
from host_agent.machines.supervisor import DriverBirth, set_up, start_supervisor


def prepare_outside_driver(
    spec: MachineSpec, hidden: tuple[Path, ...], shown: tuple[Path, ...]
) -> None:
    """Write the files that `start` needs; blocks for a few milliseconds. Raises OSError."""
    prepare(spec)
    mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    write_fstab(spec, mountinfo, hidden, shown)
    write_outside_scripts(spec)


class DriverProcess:
    """A running driver, held by its supervisor on the host."""

    def __init__(
        self, name: str, supervisor: ProcessHandle, child: "subprocess.Popen[bytes] | None"
    ) -> None:
        self._name = name
        self.supervisor = supervisor
        self._child = child

    @classmethod
    def find(cls, name: str, pid: int, start_ticks: int) -> "DriverProcess | None":
        """That of an earlier agent; None if it has ended."""
        supervisor = ProcessHandle.find(pid, start_ticks)
        return None if supervisor is None else cls(name, supervisor, None)

    def tie_to(self, init: ProcessHandle) -> None:
        """From now on it ends with the container whose process 1 is `init`.

        Raises MachineError if one of the two has ended already.
        """
        assert self._child is not None
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(f"{init.pid}\n".encode())
            self._child.stdin.close()
        except OSError as error:
            raise MachineError(f"the driver of {self._name} ended at once") from error
        # A pid that is still the same process's now was so when it was told.
        if not init.is_alive():
            raise MachineError(f"{self._name} ended while its driver was being started")

    async def wait_ended(self) -> None:
        """Wait until it has ended."""
        await self.supervisor.wait_ended()

    def close(self) -> None:
        """Let go of it; one that has ended is reaped."""
        if self._child is not None:
            self._child.poll()
        self.supervisor.close()

    async def kill(self) -> None:
        """End it and let go of it; nothing of it is left then."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._child.wait)
        self.close()


@dataclass(frozen=True, slots=True)
class OutsideDriver:
    """Where a container's driver has its files; they last as long as the VM."""

    name: str
    socket_dir: Path
    log_path: Path
    birth: DriverBirth | None = None
    """How it is forked; None where its init has to start it."""

    async def start(self) -> DriverProcess:
        """Start the driver, for a container that may not be there yet: tie it to that soon.

        Raises MachineError; nothing of it is left then, or when the caller is cancelled.
        """
        try:
            child, talk = await trio.to_thread.run_sync(
                lambda: start_supervisor(
                    self.socket_dir, self.log_path, ENVIRONMENT, stdin=subprocess.PIPE
                )
            )
        except OSError as error:
            raise MachineError(f"the driver of {self.name} can't be started: {error}") from error
        driver = DriverProcess(self.name, ProcessHandle.of(child.pid), child)
        try:
            init = await set_up(talk, f"the driver of {self.name}", self.log_path, self.birth)
        except BaseException:
            await driver.kill()
            raise
        init.close()
        return driver
