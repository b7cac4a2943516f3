"""One container that is a mock VM, from its start to its removal, with the driver beside it.

What the kernel says goes before what the engine says: the container has ended when its process 1
has, whether or not an engine is there to tell. The engine is asked for the exit status then, and
what it said before tells a restart from an end (docs/containers.md has all rules).
"""

import contextlib
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import trio

from host_agent.machines.base import ExitStatus, MachineError
from host_agent.machines.engine import Engine, EngineError, NoEngine
from host_agent.machines.engine_answers import ContainerView, EngineEvent, OddAnswer
from host_agent.machines.identity import ProcessHandle, boot_id
from host_agent.machines.other_hierarchies import remove_elsewhere
from host_agent.machines.outside_driver import DriverProcess, OutsideDriver
from host_agent.machines.vm_slice import Gate, remove_container

LOG = logging.getLogger("memballoon.docker")

KILL_DEADLINE_S: Final = 20.0
"""The kernel frees the memory of what it kills first, and there may be much."""

RESTART_GRACE_S: Final = 2.0
"""An engine that restarts a container starts it again at once after its end."""

EXIT_DEADLINE_S: Final = 5.0
"""The engine knows of an end some milliseconds after the kernel."""

EXIT_WATCH_S: Final = 0.02

DRIVER_PAUSE_S: Final = 1.0
"""A driver that can't start must not eat the processor."""

_ENDS_BY_ORDER: Final = frozenset({"kill", "stop"})
"""Events of an engine that was told to end a container, and may be about to start it again."""


class DockerMachine:
    """A running mock VM in a container. Made by `DockerBackend`."""

    def __init__(
        self,
        engine: Engine,
        on_removed: Callable[[str], None],
        name: str,
        container_id: str,
        cgroup_dir: Path,
        driver_files: OutsideDriver,
        init: ProcessHandle,
        driver: DriverProcess | None,
        gate: Gate | None = None,
    ) -> None:
        """`gate`: that which it passed where the engine leaves cgroups to systemd."""
        self._engine = engine
        self._on_removed = on_removed
        self._name = name
        self.container_id = container_id
        self._cgroup_dir = cgroup_dir
        self._driver_files = driver_files
        self._init = init
        self._driver = driver
        self._gate = gate
        self._status: ExitStatus | None = None
        self._removed = False
        self._stopping = False
        self._watching = trio.Lock()
        self._told_to_end = False
        """The engine was told so by somebody else; it may be a restart."""

    @property
    def name(self) -> str:
        """Its name."""
        return self._name

    @property
    def init_pid(self) -> int:
        """The host's pid of its process 1; another one after a restart."""
        return self._init.pid

    @property
    def place(self) -> Path | None:
        """Inside its container's scope, where the engine leaves cgroups to systemd."""
        return None if self._gate is None else self._cgroup_dir

    @property
    def outlives_agent(self) -> bool:
        """It is this agent's, and ends with it."""
        return False

    @property
    def state(self) -> dict[str, Any]:
        """What `DockerBackend.adopt` needs: JSON values only."""
        driver = None if self._driver is None else self._driver.supervisor
        return {
            "name": self._name,
            "boot_id": boot_id(),
            "container_id": self.container_id,
            "cgroup_dir": str(self._cgroup_dir),
            "socket_dir": str(self._driver_files.socket_dir),
            "log_path": str(self._driver_files.log_path),
            "init_pid": self._init.pid,
            "init_start_ticks": self._init.start_ticks,
            "driver_pid": driver.pid if driver else None,
            "driver_start_ticks": driver.start_ticks if driver else None,
        }

    async def wait_exited(self) -> ExitStatus:
        """See `Machine.wait_exited`. As long as somebody waits, a driver that ended is started."""
        async with self._watching:
            while self._status is None:
                if await self._someone_ended():
                    await self._after_end()
                else:
                    await self._start_driver()
            return self._status

    async def last_words(self) -> str | None:
        """See `Machine.last_words`: its log is the engine's, in the other one is its driver's."""
        try:
            return await self._engine.last_words(self.container_id)
        except MachineError:
            return ""

    async def stop(self, timeout_s: float) -> ExitStatus:
        """See `Machine.stop`. Also removes the container, whether it runs or has ended."""
        self._stopping = True
        with trio.CancelScope(shield=True):
            if self._status is None and self._init.is_alive():
                try:
                    await self._engine.stop(self.container_id, timeout_s)
                except MachineError as error:
                    # Its cgroup is the agent's: so it ends without an engine as well.
                    LOG.warning("%s is killed: %s", self._name, error)
                    self._init.send(signal.SIGKILL)
            with trio.move_on_after(KILL_DEADLINE_S) as scope:
                status = await self.wait_exited()
            if scope.cancelled_caught:
                raise MachineError(
                    f"{self._name} is still there {KILL_DEADLINE_S:g} s after SIGKILL"
                )
            await self._remove()
        return status

    def heard(self, event: EngineEvent) -> None:
        """The engine tells of something that happened to this container."""
        match event.action:
            case action if action in _ENDS_BY_ORDER:
                self._told_to_end = True
            case "start":
                self._told_to_end = False
            case "pause" | "unpause":
                LOG.info("%s was %sd: it keeps its quota", self._name, event.action)
            case "update":
                LOG.warning(
                    "%s was updated through its engine: its memory limit is this agent's matter, "
                    "use `balloon set %s`",
                    *(self._name, self._name),
                )
            case _:
                return

    async def _someone_ended(self) -> bool:
        """Wait until process 1 or the driver has ended; whether it was process 1."""
        if self._driver is None:
            return not self._init.is_alive()
        async with trio.open_nursery() as nursery:
            for process in (self._init, self._driver):
                nursery.start_soon(_first_of, process, nursery.cancel_scope)
        return not self._init.is_alive()

    async def _start_driver(self) -> None:
        """The driver has ended: start it again, unless that is how the container ends."""
        if self._driver is not None:
            self._let_go_of_driver()
            # The kernel ends what is in a pid namespace before its process 1.
            with trio.move_on_after(DRIVER_PAUSE_S):
                return await self._init.wait_ended()
            LOG.warning("%s: its driver was ended by somebody, and is started again", self._name)
        try:
            driver = await self._driver_files.start()
            try:
                driver.tie_to(self._init)
            except BaseException:
                await driver.kill()
                raise
            self._driver = driver
        except MachineError as error:
            with trio.move_on_after(DRIVER_PAUSE_S):
                return await self._init.wait_ended()
            LOG.error("%s", error)

    async def _after_end(self) -> None:
        """Process 1 has ended: the mock VM has as well, unless it is being restarted."""
        view = await self._view_at_gate()
        if view is None or not view.running or self._stopping:
            self._settle(view)
            return
        try:
            init = init_of(view)
        except OddAnswer as error:
            LOG.error("%s", error)
            self._settle(None)
            return
        if init is None:
            await trio.sleep(EXIT_WATCH_S)
            return  # ended again: look again
        LOG.info("%s was restarted: it keeps its quota", self._name)
        self._init.close()
        self._init = init
        self._told_to_end = False
        self._let_go_of_driver()

    async def _view_at_gate(self) -> ContainerView | None:
        """`_view_after_end`; a container that is started again gets below its limit meanwhile.

        The engine answers nothing about it while it stands still.
        """
        gate = self._gate
        if gate is None or self._stopping:
            return await self._view_after_end()
        # At once: the engine starts it again some hundred milliseconds after its end.
        gate.shut(self._name)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gate.pass_through, self._name, self.container_id)
            view = await self._view_after_end()
            nursery.cancel_scope.cancel()
        return view

    async def _view_after_end(self) -> ContainerView | None:
        """What the engine says of the container now; None if it knows none, or can't tell."""
        view: ContainerView | None = None
        pid = self._init.pid
        with trio.move_on_after(EXIT_DEADLINE_S):
            ended_s = trio.current_time()
            while True:
                try:
                    view = await self._engine.inspect(self.container_id)
                except EngineError as error:
                    return None if error.status == 404 else view
                except (NoEngine, OddAnswer):
                    return None
                restarts = self._told_to_end and not self._stopping
                patience_s = RESTART_GRACE_S if restarts else 0.0
                # An engine that has not noticed the end yet still says the old pid.
                if view.running and view.pid != pid:
                    return view
                if not view.running and trio.current_time() >= ended_s + patience_s:
                    return view
                await trio.sleep(EXIT_WATCH_S)
        return view

    def _settle(self, view: ContainerView | None) -> None:
        self._status = status_of(view)
        self._init.close()
        self._let_go_of_driver()

    def _let_go_of_driver(self) -> None:
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    async def _remove(self) -> None:
        """Remove the container; what can't be removed now is removed when the engine is back."""
        if self._removed:
            return
        try:
            await remove_container(self._engine, self.container_id, self._gate)
        except MachineError as error:
            LOG.warning("the container of %s stays until its engine is back: %s", self._name, error)
        self._removed = True
        self._on_removed(self.container_id)
        remove_elsewhere(self._cgroup_dir)


def init_of(view: ContainerView) -> ProcessHandle | None:
    """A container's process 1; None if it does not run any more. Raises OddAnswer."""
    if not view.running:
        return None
    try:
        return ProcessHandle.of(view.pid)
    except ProcessLookupError:
        return None
    except OSError as error:  # of a thread, which leads no process
        raise OddAnswer(
            f"the container engine answers what makes no sense: process 1 of {view.name} is "
            f"{view.pid}, which is none"
        ) from error


def status_of(view: ContainerView | None) -> ExitStatus:
    """How a container ended; None is one that nobody can tell of any more."""
    if view is None:
        return ExitStatus(detail="exit status unknown: its container or its engine is gone")
    detail = view.error
    if view.oom_killed:
        detail = "its kernel killed for want of memory"
    elif not detail and view.exit_code > 128:
        with contextlib.suppress(ValueError):
            detail = f"ended by {signal.Signals(view.exit_code - 128).name}"
    return ExitStatus(view.exit_code, detail, out_of_memory=view.oom_killed)


async def _first_of(process: ProcessHandle | DriverProcess, scope: trio.CancelScope) -> None:
    await process.wait_ended()
    scope.cancel()
