"""Mock VMs as process trees in namespaces of their own: util-linux and sh, nothing to install.

A mock VM sees its own processes, its own host name, no network but its loopback, the host's files
read-only, its own disk, its own channel socket and its own cgroup. It is root without capabilities
but IPC_LOCK, so it can't undo any of that. init_script.py says how.

It is nobody's child that matters: the supervisor has a session of its own, and an agent that starts
anew finds the VM again by pid and start time (`adopt`).
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import trio

from host_agent.machines.base import ExitStatus, MachineError, MachineSpec
from host_agent.machines.driver_template import DriverTemplate
from host_agent.machines.environment import ENVIRONMENT
from host_agent.machines.file_tree import interpreter_dirs, prepare, write_fstab
from host_agent.machines.identity import ProcessHandle, boot_id
from host_agent.machines.init_script import Workshop, write_scripts
from host_agent.machines.supervisor import birth_of, set_up, start_supervisor

KILL_DEADLINE_S: Final = 20.0
"""The kernel frees the memory of what it kills first, and there may be much."""

EMPTY_WATCH_S: Final = 0.002
"""Between looks at a cgroup whose last processes are on their way out."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
"""A host name of at most 63 characters (HOST_NAME_MAX is 64)."""


class ProcessMachine:
    """A running mock VM. Made by `ProcessBackend`."""

    def __init__(
        self,
        name: str,
        socket_dir: Path,
        init: ProcessHandle,
        supervisor: ProcessHandle | None,
        child: subprocess.Popen[bytes] | None,
    ) -> None:
        self._name = name
        self._socket_dir = socket_dir
        self._init = init
        self._supervisor = supervisor
        self._child = child
        self._status: ExitStatus | None = None
        self._state = {
            "name": name,
            "boot_id": boot_id(),
            "socket_dir": str(socket_dir),
            "init_pid": init.pid,
            "init_start_ticks": init.start_ticks,
            "supervisor_pid": supervisor.pid if supervisor else None,
            "supervisor_start_ticks": supervisor.start_ticks if supervisor else None,
        }

    @property
    def name(self) -> str:
        """Its name."""
        return self._name

    @property
    def init_pid(self) -> int:
        """The host's pid of its process 1."""
        return self._init.pid

    @property
    def place(self) -> Path | None:
        """Below the agent's root."""
        return None

    @property
    def outlives_agent(self) -> bool:
        """It is this agent's, and ends with it."""
        return False

    @property
    def state(self) -> dict[str, Any]:
        """What `ProcessBackend.adopt` needs: JSON values only."""
        return dict(self._state)

    async def wait_exited(self) -> ExitStatus:
        """See `Machine.wait_exited`."""
        if self._status is None:
            # When a pid namespace's init has ended, the kernel has ended everything in it.
            await self._init.wait_ended()
            if self._supervisor is not None:
                await self._supervisor.wait_ended()
            self._settle()
        assert self._status is not None
        return self._status

    async def last_words(self) -> str | None:
        """See `Machine.last_words`."""
        return None

    async def stop(self, timeout_s: float) -> ExitStatus:
        """See `Machine.stop`."""
        if self._status is None:
            self._init.send(signal.SIGTERM)
            with trio.move_on_after(timeout_s):
                return await self.wait_exited()
            self._init.send(signal.SIGKILL)
            with trio.CancelScope(shield=True), trio.move_on_after(KILL_DEADLINE_S):
                return await self.wait_exited()
            raise MachineError(f"{self._name} is still there {KILL_DEADLINE_S:g} s after SIGKILL")
        return self._status

    def _settle(self) -> None:
        """Everything has ended: reap, read the status, let go. Another task may have done so."""
        if self._status is not None:
            return
        if self._child is not None:
            self._child.wait()
        self._status = _read_status(Workshop.of(self._socket_dir).exit_file)
        self._init.close()
        if self._supervisor is not None:
            self._supervisor.close()


class ProcessBackend:
    """The backend. It holds nothing: machines live on their own."""

    def __init__(
        self,
        *,
        hidden_dirs: tuple[Path, ...] = (),
        shown_dirs: tuple[Path, ...] | None = None,
        template: DriverTemplate | None = None,
    ) -> None:
        """`hidden_dirs` are empty inside (other guests' disks); `shown_dirs` stay visible though
        they lie in /tmp, /var/tmp, /run or /dev (None: what this Python needs). Drivers are forked
        from the `template` where there is one.
        """
        self._template = template
        self._hidden = hidden_dirs
        self._shown = interpreter_dirs() if shown_dirs is None else shown_dirs

    async def launch(self, spec: MachineSpec) -> ProcessMachine:
        """See `MachineBackend.launch`."""
        _check(spec)
        if self._template is not None:
            self._template.want()
        try:
            child, talk = await trio.to_thread.run_sync(self._start, spec)
        except OSError as error:
            raise MachineError(f"{spec.name} can't be started: {error}") from error
        async with _killed_on_failure(child, spec):
            birth = birth_of(spec, self._template)
            init = await set_up(talk, spec.name, spec.log_path, birth)
            supervisor = ProcessHandle.of(child.pid)
        return ProcessMachine(spec.name, spec.socket_dir, init, supervisor, child)

    async def adopt(self, state: Mapping[str, Any]) -> ProcessMachine | None:
        """See `MachineBackend.adopt`."""
        try:
            name, socket_dir = str(state["name"]), Path(state["socket_dir"])
            init_pid, init_ticks = int(state["init_pid"]), int(state["init_start_ticks"])
            known: tuple[int, int] | None = None
            # An earlier agent had already found it dead where there is none.
            if state["supervisor_pid"] is not None:
                known = int(state["supervisor_pid"]), int(state["supervisor_start_ticks"])
            boot = str(state["boot_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise MachineError(f"the state of a mock VM makes no sense: {error!r}") from error
        if boot != boot_id():
            return None
        init = ProcessHandle.find(init_pid, init_ticks)
        if init is None:
            return None
        supervisor = None if known is None else ProcessHandle.find(*known)
        return ProcessMachine(name, socket_dir, init, supervisor, None)

    def _start(self, spec: MachineSpec) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Write the VM's files and start its supervisor."""
        prepare(spec)
        mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        write_fstab(spec, mountinfo, self._hidden, self._shown)
        write_scripts(spec)
        environment = {**ENVIRONMENT, **spec.env}
        return start_supervisor(
            spec.socket_dir, spec.log_path, environment, stdin=subprocess.DEVNULL
        )


def _check(spec: MachineSpec) -> None:
    if not _NAME.fullmatch(spec.name):
        raise MachineError(f"{spec.name!r} is no host name")
    if not spec.command:
        raise MachineError(f"{spec.name} has no command")
    if "\0" in "".join((*spec.command, *spec.driver_argv)):
        raise MachineError(f"{spec.name}: a command can't contain a null character")


@contextlib.asynccontextmanager
async def _killed_on_failure(
    child: subprocess.Popen[bytes], spec: MachineSpec
) -> AsyncIterator[None]:
    """Whatever goes wrong inside (cancellation included) leaves no process behind.

    Until the VM is ready, all of it is in the supervisor's process group, which can't be anybody
    else's while the supervisor is not reaped. The death of unshare kills the namespace's init as
    well, and the init's death whatever else there is.
    """
    try:
        yield
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        with trio.CancelScope(shield=True):
            supervisor = ProcessHandle.of(child.pid)
            await supervisor.wait_ended()
            supervisor.close()
            child.wait()
            with trio.move_on_after(KILL_DEADLINE_S):
                while any(map(_has_processes, (spec.driver_procs, spec.workload_procs))):
                    await trio.sleep(EMPTY_WATCH_S)
        raise


def _has_processes(procs: Path) -> bool:
    try:
        return bool(procs.read_text(encoding="ascii"))
    except OSError:
        return False


def _read_status(path: Path) -> ExitStatus:
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ExitStatus(detail="exit status unknown: its supervisor was killed")
    if not text:
        # The init did not live to tell.
        return ExitStatus(128 + signal.SIGKILL, "killed as a whole")
    if not re.fullmatch("[0-9]{1,3}", text):
        return ExitStatus(detail="exit status unknown: its init tells nonsense")
    code = int(text)
    if code > 128:
        with contextlib.suppress(ValueError):
            return ExitStatus(code, f"ended by {signal.Signals(code - 128).name}")
    return ExitStatus(code)
