"""How one container that is a mock VM is made, with its driver beside it; undone on failure.

With the engine's cgroupfs driver the container is born below the VM's limit. With its systemd
driver it is born in a scope of systemd's, at a shut gate (vm_slice.py): there it is moved below the
limit before it runs, and only then is known where its driver belongs.
"""

import contextlib
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import trio

from host_agent.machines.base import MachineError, MachineSpec
from host_agent.machines.cgroup_layout import hierarchy_of, parent_path
from host_agent.machines.docker_machine import init_of, status_of
from host_agent.machines.driver_template import DriverTemplate
from host_agent.machines.engine import Engine, EngineError, NoEngine
from host_agent.machines.engine_answers import OddAnswer
from host_agent.machines.identity import ProcessHandle
from host_agent.machines.other_hierarchies import remove_elsewhere
from host_agent.machines.outside_driver import (
    DriverProcess,
    OutsideDriver,
    prepare_outside_driver,
)
from host_agent.machines.supervisor import birth_of
from host_agent.machines.vm_slice import Gate, remove_container
from host_agent.quota.base import Part
from protocol.units import PAGE_BYTES

LOG = logging.getLogger("memballoon.docker")

VM_LABEL: Final = "memballoon.vm"
AGENT_LABEL: Final = "memballoon.agent"

LOOK_AGAIN_S: Final = 5.0
"""For a look at what an engine has made that did not say so."""


@dataclass(slots=True)
class Parts:
    """What there is of a machine that is being made."""

    spec: MachineSpec
    container_id: str | None = None
    init: ProcessHandle | None = None
    files: OutsideDriver | None = None
    driver: DriverProcess | None = None
    failure: MachineError | None = None
    placed: trio.Event = field(default_factory=trio.Event)
    """It is known where the VM's directories are."""

    def whole(self) -> tuple[str, OutsideDriver, ProcessHandle, DriverProcess]:
        """All of it. Raises the MachineError that happened instead."""
        if self.failure is not None:
            raise self.failure
        assert self.container_id is not None
        assert self.files is not None
        assert self.init is not None
        assert self.driver is not None
        return self.container_id, self.files, self.init, self.driver


class Making:
    """Makes one machine's container and driver."""

    def __init__(
        self,
        engine: Engine,
        agent_name: str,
        container_name: str,
        template: DriverTemplate | None,
        trees: tuple[tuple[Path, ...], tuple[Path, ...]],
        gate: Gate | None,
    ) -> None:
        """`trees`: what the driver does not see of the host, and what it does all the same."""
        self._engine = engine
        self._agent_name = agent_name
        self._container_name = container_name
        self._template = template
        self._hidden, self._shown = trees
        self._gate = gate

    async def make(self, spec: MachineSpec) -> Parts:
        """Container and driver at once: each takes some hundred milliseconds.

        Raises MachineError and QuotaError; nothing is left then, or when it is cancelled.
        """
        made = Parts(spec)
        if self._gate is None:
            await self._prepare_driver(made)
        try:
            async with trio.open_nursery() as nursery:
                for work in (self._make_container(made), self._make_driver(made)):
                    nursery.start_soon(_or_tell, work, made, nursery.cancel_scope)
            _, _, init, driver = made.whole()
            driver.tie_to(init)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._unmake(made)
            raise
        return made

    async def _make_container(self, made: Parts) -> None:
        # Shielded: a container that was made while nobody listened would stay.
        with trio.CancelScope(shield=True):
            container_id = made.container_id = await self._create(made.spec)
        if self._gate is None:
            await self._engine.start(container_id)
        else:
            await self._start_behind(self._gate, made, container_id)
        view = await self._engine.inspect(container_id)
        made.init = init_of(view)
        if made.init is None:
            raise MachineError(await self._why_ended(container_id))
        _check_place(made.init.pid, made.spec.workload_procs)

    async def _start_behind(self, gate: Gate, made: Parts, container_id: str) -> None:
        gate.shut(made.spec.name)
        async with trio.open_nursery() as nursery:

            async def pass_through() -> None:
                scope = await gate.pass_through(made.spec.name, container_id)
                made.spec = moved(made.spec, scope / made.spec.name)
                made.placed.set()

            async def start() -> None:
                await self._engine.start(container_id)
                # Who was let go had been moved before; nobody else gets past the gate.
                if not made.placed.is_set():
                    raise _not_below(gate.slice.directory)

            nursery.start_soon(_or_tell, pass_through(), made, nursery.cancel_scope)
            nursery.start_soon(_or_tell, start(), made, nursery.cancel_scope)
        if made.failure is not None:
            raise made.failure

    async def _prepare_driver(self, made: Parts) -> None:
        spec = made.spec
        try:
            await trio.to_thread.run_sync(prepare_outside_driver, spec, self._hidden, self._shown)
        except OSError as error:
            raise MachineError(f"{spec.name} can't be started: {error}") from error
        birth = birth_of(spec, self._template)
        made.files = OutsideDriver(spec.name, spec.socket_dir, spec.log_path, birth)

    async def _make_driver(self, made: Parts) -> None:
        if self._gate is not None:
            await made.placed.wait()
            await self._prepare_driver(made)
        assert made.files is not None
        made.driver = await made.files.start()

    async def _create(self, spec: MachineSpec) -> str:
        name = self._container_name
        config = container_config(
            spec, self._agent_name, None if self._gate is None else self._gate.slice.unit
        )
        try:
            try:
                return await self._engine.create(name, config)
            except EngineError as error:
                if error.status != 409 or not await self._remove_own(name, spec.name):
                    raise
            return await self._engine.create(name, config)
        except EngineError as error:
            if error.status == 404:
                raise MachineError(
                    f"no image {spec.image}: `docker pull {spec.image}` or build it first"
                ) from error
            if error.status == 409:
                raise MachineError(
                    f"a container named {name} is there already, and not this agent's: "
                    f"`docker rm -f {name}`, or choose another name for the VM"
                ) from error
            raise
        except (NoEngine, OddAnswer):
            # It may have made it all the same, and nobody knows the id.
            with trio.move_on_after(LOOK_AGAIN_S), contextlib.suppress(MachineError):
                await self._remove_own(name, spec.name)
            raise

    async def _remove_own(self, container: str, name: str) -> bool:
        """Remove a container of this name that an agent of ours left; whether there was one."""
        view = await self._engine.inspect(container)
        if view.labels.get(AGENT_LABEL) != self._agent_name or view.labels.get(VM_LABEL) != name:
            return False
        LOG.warning("%s: a container that an agent left is removed", name)
        await self._engine.remove(view.container_id)
        return True

    async def _unmake(self, made: Parts) -> None:
        if made.driver is not None:
            await made.driver.kill()
        if made.init is not None:
            made.init.close()
        if made.container_id is not None:
            with contextlib.suppress(MachineError):
                await remove_container(self._engine, made.container_id, self._gate)
            remove_elsewhere(made.spec.cgroup_dir)

    async def _why_ended(self, container_id: str) -> str:
        """What can be said of a command that ended before it was seen."""
        view = await self._engine.wait_ended(container_id)
        words = await self._engine.last_words(container_id)
        return f"its command ended at once, {status_of(view)}" + (f": {words}" if words else "")


def moved(spec: MachineSpec, directory: Path) -> MachineSpec:
    """The same VM with its cgroups somewhere else."""
    return replace(
        spec,
        cgroup_dir=directory,
        workload_procs=directory / Part.WORKLOAD / spec.workload_procs.name,
        driver_procs=directory / Part.DRIVER / spec.driver_procs.name,
    )


def container_config(
    spec: MachineSpec, agent_name: str, slice_unit: str | None = None
) -> dict[str, Any]:
    """What the engine is asked for: its own defaults, in the VM's cgroup, in the network or none.

    The container's own limit is a page above the VM's size: never reached, since the agent's limit
    above it is at most the size, but a program that asks how much memory it has reads it. In a
    slice (`slice_unit`) the engine's limit is the scope's, with the driver in there as well; it is
    what bounds a container that is started again while no agent is there.
    """
    assert spec.image is not None
    workload = spec.workload_procs.parent
    if slice_unit is None:
        parent, overhead_bytes = parent_path(workload, hierarchy_of(workload)), 0
    else:
        parent, overhead_bytes = slice_unit, spec.overhead_bytes
    host: dict[str, Any] = {"CgroupParent": parent, "NetworkMode": spec.network or "none"}
    if spec.assigned_bytes is not None:
        host |= {"Memory": spec.assigned_bytes + overhead_bytes + PAGE_BYTES, "MemorySwap": -1}
    config: dict[str, Any] = {
        "Image": spec.image,
        "Hostname": spec.name,
        "Env": [f"{name}={value}" for name, value in spec.env.items()],
        "Labels": {VM_LABEL: spec.name, AGENT_LABEL: agent_name},
        "HostConfig": host,
    }
    if spec.command:
        config["Cmd"] = list(spec.command)
    return config


def _check_place(pid: int, workload_procs: Path) -> None:
    """Whether the kernel has a container's process below the VM's workload. Raises MachineError."""
    workload = workload_procs.parent
    path = parent_path(workload, hierarchy_of(workload))
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return  # it has ended: that is for others to find
    if not any(f"{line.split(':', 2)[-1]}/".startswith(f"{path}/") for line in text.splitlines()):
        raise _not_below(workload)


def _not_below(cgroup: Path) -> MachineError:
    return MachineError(
        f"the engine did not put the container below {cgroup}: is it in a container of its own, "
        "or on another machine?"
    )


async def _or_tell(work: Coroutine[Any, Any, None], made: Parts, scope: trio.CancelScope) -> None:
    """Do one part of the making; if it fails, the other part is not wanted any more."""
    try:
        await work
    except MachineError as error:
        # Raised outside of the nursery: alone, not in a group.
        made.failure = made.failure or error
        scope.cancel()
