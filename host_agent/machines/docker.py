"""Mock VMs as containers of any image, made by a container engine that is told where to put them.

The engine makes the container below the VM's `workload` cgroup, whose limit is the agent's and in
force before; it is asked for nothing else about memory. The driver comes from outside
(outside_driver.py): the image needs no Python, and nothing is added to it.

Here they are made, found again and told what the engine says of them; what each of them then does
is docker_machine.py's.
"""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import trio

from host_agent.machines.base import MachineError, MachineSpec
from host_agent.machines.cgroup_layout import CGROUPFS, SYSTEMD
from host_agent.machines.docker_machine import DockerMachine, init_of
from host_agent.machines.docker_making import AGENT_LABEL, VM_LABEL, Making
from host_agent.machines.driver_template import DriverTemplate
from host_agent.machines.engine import Engine, EngineError, engine_socket
from host_agent.machines.engine_answers import OddAnswer
from host_agent.machines.file_tree import interpreter_dirs
from host_agent.machines.identity import ProcessHandle, boot_id
from host_agent.machines.outside_driver import DriverProcess, OutsideDriver
from host_agent.machines.vm_slice import (
    EnterScope,
    Gate,
    VmSlice,
    forget_root_slice,
    forget_slice,
    kill_at_gate,
    slices_below,
)
from host_agent.quota.base import Part
from host_agent.quota.cgroup_tree import pids_below

LOG = logging.getLogger("memballoon.docker")

FIRST_RETRY_S: Final = 0.1
LAST_RETRY_S: Final = 5.0
"""Between attempts to hear an engine that is gone."""


class DockerBackend:
    """The backend. It speaks to the engine when it is first needed, and not before."""

    def __init__(
        self,
        agent_name: str,
        engine: Engine | None = None,
        *,
        hidden_dirs: tuple[Path, ...] = (),
        shown_dirs: tuple[Path, ...] | None = None,
        template: DriverTemplate | None = None,
        hierarchy: Path | None = None,
    ) -> None:
        """`agent_name` is what this agent's containers are labelled with: its root of cgroups.

        `engine` is the one at $DOCKER_HOST or the usual socket unless given. `hidden_dirs`,
        `shown_dirs` and `template` are as in ProcessBackend, for the drivers. `hierarchy` is where
        cgroup version 2 is mounted, if that has the memory controller: an engine that leaves
        cgroups to systemd needs it, and `enter_scope`.
        """
        self._hierarchy = hierarchy
        self.enter_scope: EnterScope | None = None
        self._template = template
        self._agent_name = agent_name
        self._engine = engine
        self._hidden = hidden_dirs
        self._shown = interpreter_dirs() if shown_dirs is None else shown_dirs
        self._machines: dict[str, DockerMachine] = {}
        self._launching: set[str] = set()
        self._wanted = trio.Event()
        self._driver: str | None = None
        """The engine's cgroup driver, once it is known."""
        self._has_slices = False
        """Or has had: what they were in is this agent's to remove."""

    @property
    def engine(self) -> Engine:
        """The engine's client. Raises MachineError where $DOCKER_HOST makes no sense."""
        if self._engine is None:
            self._engine = Engine(engine_socket())
        return self._engine

    async def aclose(self) -> None:
        """Let go of the engine; machines run on."""
        if self._engine is not None:
            await self._engine.aclose()
        if self._has_slices and self._hierarchy is not None:
            with trio.CancelScope(shield=True):
                await forget_root_slice(self._hierarchy, self._agent_name)

    def container_name(self, name: str) -> str:
        """What a mock VM's container is called in the engine."""
        return f"{self._agent_name.strip('/').replace('/', '-')}-{name}"

    async def run(self) -> None:
        """Follow the engine's events from the first machine on; until cancelled.

        Started when all machines of an earlier agent were adopted: what else that agent left in
        the engine, if there is one, is removed.
        """
        with contextlib.suppress(MachineError):
            await self._remove_strangers()
        await self._wanted.wait()
        retry_s = FIRST_RETRY_S
        while True:
            began_s = trio.current_time()
            try:
                async with self.engine.events(f"{AGENT_LABEL}={self._agent_name}") as events:
                    await self._remove_strangers()
                    async for event in events:
                        if machine := self._machines.get(event.container_id):
                            machine.heard(event)
            except MachineError as error:
                if trio.current_time() >= began_s + LAST_RETRY_S:
                    retry_s = FIRST_RETRY_S  # it was there for a while
                if retry_s == FIRST_RETRY_S:
                    LOG.warning("%s: its VMs run on, it is asked again", error)
            await trio.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def launch(self, spec: MachineSpec) -> DockerMachine:
        """See `MachineBackend.launch`. The container's limit is that of `workload_procs`."""
        if spec.image is None:
            raise MachineError(f"{spec.name} has no image")
        self._launching.add(spec.name)
        try:
            await self._check_engine()
            await self._check_network(spec)
            self._wanted.set()
            if self._template is not None:
                self._template.want()
            gate = self._gate_of(spec.name) if self._driver == SYSTEMD else None
            making = Making(
                *(self.engine, self._agent_name, self.container_name(spec.name), self._template),
                *((self._hidden, self._shown), gate),
            )
            made = await making.make(spec)
            container_id, files, init, driver = made.whole()
            machine = DockerMachine(
                *(self.engine, self._forget, spec.name, container_id, made.spec.cgroup_dir),
                *(files, init, driver, gate),
            )
            self._machines[container_id] = machine
        finally:
            self._launching.discard(spec.name)
        return machine

    def _gate_of(self, name: str) -> Gate | None:
        if self._hierarchy is None or self.enter_scope is None:
            return None
        return Gate(VmSlice(self._hierarchy, self._agent_name, name), self.enter_scope)

    async def adopt(self, state: Mapping[str, Any]) -> DockerMachine | None:
        """See `MachineBackend.adopt`."""
        try:
            name, container_id = str(state["name"]), str(state["container_id"])
            cgroup_dir, log_path = Path(state["cgroup_dir"]), Path(state["log_path"])
            files = OutsideDriver(name, Path(state["socket_dir"]), log_path)
            known_init = int(state["init_pid"]), int(state["init_start_ticks"])
            known_driver: tuple[int, int] | None = None
            if state["driver_pid"] is not None:
                known_driver = int(state["driver_pid"]), int(state["driver_start_ticks"])
            boot = str(state["boot_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise MachineError(f"the state of a mock VM makes no sense: {error!r}") from error
        self._wanted.set()
        if boot != boot_id():
            return None
        gate = self._gate_of(name)
        if gate is not None and gate.slice.scope(container_id) not in cgroup_dir.parents:
            gate = None  # it is below the agent's root
        elif gate is not None:
            self._has_slices = True
            # The agent died in the middle of its restart, and the engine waits for that.
            kill_at_gate(gate.slice.directory)
        init = ProcessHandle.find(*known_init)
        driver = None if known_driver is None else DriverProcess.find(name, *known_driver)
        if init is None:
            init = await self._restarted(container_id)
        if init is None:
            return None
        if gate is not None and init.pid not in pids_below(cgroup_dir / Part.WORKLOAD):
            init.close()
            LOG.warning(
                "%s was started again while no agent was there, without the VM's limits: it ends",
                name,
            )
            return None
        machine = DockerMachine(
            *(self.engine, self._forget, name, container_id, cgroup_dir, files, init, driver, gate)
        )
        self._machines[container_id] = machine
        return machine

    async def _restarted(self, container_id: str) -> ProcessHandle | None:
        """Process 1 of a container that was restarted while no agent was there; None if it ended.

        Raises NoEngine and OddAnswer: then nobody knows.
        """
        try:
            view = await self.engine.inspect(container_id)
            return init_of(view)
        except EngineError:
            return None

    def _forget(self, container_id: str) -> None:
        self._machines.pop(container_id, None)

    async def _check_engine(self) -> None:
        """Whether the engine puts a container where it is told. Raises MachineError."""
        if self._driver is not None:
            return
        driver = (await self.engine.view()).cgroup_driver
        if driver != CGROUPFS and (driver != SYSTEMD or self._hierarchy is None):
            raise MachineError(
                f"the engine at {self.engine.socket_path} leaves cgroups to {driver}"
                + (", which needs cgroup version 2" if driver == SYSTEMD else "")
                + ": set native.cgroupdriver=cgroupfs in its exec-opts and start it again"
            )
        self._driver = driver
        self._has_slices = self._has_slices or driver == SYSTEMD

    async def _check_network(self, spec: MachineSpec) -> None:
        """Now, since the engine would make the container and then not start it."""
        network = spec.network
        if network is not None and not await self.engine.has_network(network):
            raise MachineError(
                f"no network {network}: `docker network create {network}`, or choose another one "
                "(see `docker network ls`)"
            )

    async def _remove_strangers(self) -> None:
        """Remove containers of this agent that are no machine's: left when it, or they, died."""
        self._kill_strangers_at_gates()
        for container_id in await self.engine.containers(f"{AGENT_LABEL}={self._agent_name}"):
            if container_id in self._machines:
                continue
            with contextlib.suppress(EngineError, OddAnswer):  # gone meanwhile, or beyond help
                view = await self.engine.inspect(container_id)
                name = view.labels.get(VM_LABEL, "")
                if container_id not in self._machines and name not in self._launching:
                    LOG.warning("container %s was left by an agent: removed", view.name)
                    await self.engine.remove(container_id)
        for unit, directory in self._slices_of_strangers():
            self._has_slices = True
            await forget_slice(unit, directory)

    def _kill_strangers_at_gates(self) -> None:
        """The engine answers nothing about a container that stands still at a gate."""
        for _, directory in self._slices_of_strangers():
            kill_at_gate(directory)

    def _slices_of_strangers(self) -> list[tuple[str, Path]]:
        if self._hierarchy is None:
            return []
        names = {machine.name for machine in self._machines.values()} | self._launching
        known = {VmSlice(self._hierarchy, self._agent_name, name).unit for name in names}
        found = slices_below(self._hierarchy, self._agent_name)
        return [(unit, directory) for unit, directory in found if unit not in known]
