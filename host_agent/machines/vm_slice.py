"""The slice of one VM whose container is systemd's, and the gate that it is.

An engine with the systemd cgroup driver takes a slice for a container's parent, and what is written
into a slice is systemd's matter (cgroup_layout.py, docs/containers.md). But it can be frozen before
there is anything in it: the container's first process stands still where it joins its scope, before
it has loaded the program, made a namespace or forked, and the engine's call waits for it. So it can
be moved into the VM's directories, with the limits in force, before it runs.

A gate that stays shut would keep the engine's call, and with it every other call about this
container, waiting until the processes behind it are killed: `emptying`, or the next agent.
"""

import contextlib
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from host_agent.machines.base import MachineError
from host_agent.machines.cgroup_layout import slice_name, slice_path
from host_agent.machines.engine import Engine
from host_agent.quota.cgroup_tree import child_directories, remove_empty, subtree

LOOK_S: Final = 0.005
"""For the first process behind the gate: a restart takes an engine some hundred milliseconds."""

FREEZE: Final = "cgroup.freeze"
SYSTEMCTL_DEADLINE_S: Final = 20.0


class VmSlice:
    """One VM's slice. Making this makes nothing in the kernel."""

    def __init__(self, hierarchy: Path, root: str, name: str) -> None:
        """`root` is the agent's root of cgroups, as a path in the hierarchy."""
        parts = (*root.strip("/").split("/"), name)
        self.unit = slice_name(*parts)
        self.directory = hierarchy / slice_path(*parts)

    def scope(self, container_id: str) -> Path:
        """Where the engine has a container's processes."""
        return self.directory / f"docker-{container_id}.scope"

    def shut(self) -> None:
        """From now on who gets in stands still. Makes the slice's directory. Raises OSError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._freeze(1)

    def open(self) -> None:
        """Let go on what is in there. Raises OSError."""
        self._freeze(0)

    async def arrival(self, container_id: str) -> Path:
        """Wait until a process is in the container's scope; the scope."""
        scope = self.scope(container_id)
        while not _has_processes(scope):
            await trio.sleep(LOOK_S)
        return scope

    @contextlib.asynccontextmanager
    async def emptying(self) -> AsyncIterator[None]:
        """Kill whoever is in there or comes, for as long as the block: it waits for nobody then."""

        async def kill_again() -> None:
            while True:
                _kill(self.directory)
                await trio.sleep(10 * LOOK_S)

        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_again)
            try:
                yield
            except Exception as error:
                failure = error  # raised outside of the nursery: alone, not in a group
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def remove(self) -> None:
        """Have systemd forget it, and remove its directory if nothing is in it."""
        await forget_slice(self.unit, self.directory)

    def _freeze(self, value: int) -> None:
        (self.directory / FREEZE).write_text(f"{value}\n")


EnterScope = Callable[[str, Path], Awaitable[None]]
"""Moves the VM of that name, limits and all, into a scope, and whoever stands still there below its
limit. Raises MachineError."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Through which a container gets below its VM's limit, where systemd has its scope."""

    slice: VmSlice
    enter: EnterScope

    def shut(self, name: str) -> None:
        """From now on nobody gets in. Raises MachineError."""
        try:
            self.slice.shut()
        except OSError as error:
            raise MachineError(f"{name}: {self.slice.directory}: {error.strerror}") from error

    async def pass_through(self, name: str, container_id: str) -> Path:
        """Wait for the container's first process, move it to its place, let it go on; its scope.

        Raises MachineError; it stands still then.
        """
        scope = await self.slice.arrival(container_id)
        with trio.CancelScope(shield=True):
            await self.enter(name, scope)
            try:
                self.slice.open()
            except OSError as error:
                raise MachineError(f"{name}: {scope}: {error.strerror}") from error
        return scope


async def remove_container(engine: Engine, container_id: str, gate: Gate | None) -> None:
    """Have the engine remove a container, whatever stands still in its slice, and the slice.

    Raises MachineError; the slice is gone then all the same, if nothing is in it.
    """
    if gate is None:
        return await engine.remove(container_id)
    try:
        async with gate.slice.emptying():
            await engine.remove(container_id)
    finally:
        with trio.CancelScope(shield=True):
            await gate.slice.remove()


def slices_below(hierarchy: Path, root: str) -> list[tuple[str, Path]]:
    """Name and directory of each slice right below that of the agent's root, sorted."""
    parts = root.strip("/").split("/")
    prefix = slice_name(*parts).removesuffix(".slice")
    return [
        (path.name, path)
        for path in child_directories(hierarchy / slice_path(*parts))
        if path.name.startswith(f"{prefix}-") and path.name.endswith(".slice")
    ]


async def forget_slice(unit: str, directory: Path) -> None:
    """Stop an empty slice, as nobody else does; its directory goes with it."""
    if any(_has_processes(path) for path in subtree(directory)):
        return
    with contextlib.suppress(OSError), trio.move_on_after(SYSTEMCTL_DEADLINE_S):
        await trio.run_process(
            ("systemctl", "stop", unit),
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    # Of one that systemd never knew: no container was started in it.
    remove_empty(subtree(directory))


async def forget_root_slice(hierarchy: Path, root: str) -> None:
    """Have systemd forget the slices that all VMs' were in, as far as nothing else is in them."""
    parts = root.strip("/").split("/")
    for depth in range(len(parts), 0, -1):
        directory = hierarchy / slice_path(*parts[:depth])
        if not directory.is_dir() or child_directories(directory):
            return
        await forget_slice(slice_name(*parts[:depth]), directory)


def kill_at_gate(directory: Path) -> None:
    """Kill whoever stands still in a slice that is shut, and open it; nothing if it is open."""
    with contextlib.suppress(OSError):
        if (directory / FREEZE).read_text().strip() == "1":
            _kill(directory)
            (directory / FREEZE).write_text("0\n")


def _kill(directory: Path) -> None:
    with contextlib.suppress(OSError):
        (directory / "cgroup.kill").write_text("1\n")


def _has_processes(cgroup: Path) -> bool:
    try:
        return bool((cgroup / "cgroup.procs").read_text())
    except OSError:
        return False
