"""The life of one mock VM: cgroups, socket, processes, channel, and the end of all of them.

`Hosting.run` is one function from the making to the removal, so that whatever goes wrong in
between, nothing is left behind. A VM ends when its command exits, when it is stopped, or with the
agent (unless the agent was told to keep it).
"""

import contextlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from host_agent.balance import Balancer
from host_agent.blocking import DeadlinePassed, Threads, run_blocking
from host_agent.dry import DryAnswer
from host_agent.guest import Guest, Phase
from host_agent.guest_command import driver_arguments, driver_command, idle_workload_command
from host_agent.intake.listener import SOCKET_NAME, guest_socket
from host_agent.intake.reception import Reception
from host_agent.machines.attached import LINKS_DIR, point
from host_agent.machines.base import Machine, MachineBackend, MachineError, MachineSpec
from host_agent.quota.base import Part, QuotaBackend, VmQuota
from host_agent.quota.cgroup_tree import remove_empty, subtree
from host_agent.quota.errors import LimitRefused, QuotaError
from host_agent.quota.swap_space import free_swap_bytes
from host_agent.sizes import format_size
from protocol.units import bytes_of
from protocol.vocabulary import one_line

LOG = logging.getLogger("memballoon.hosting")

STOP_TIMEOUT_S: Final = 5.0
"""What a workload is given to end by itself."""

CGROUP_DEADLINE_S: Final = 20.0
"""For making and removing cgroups; killed processes with much memory need a while."""

MOST_LAST_WORDS: Final = 4096
"""Looked at of a log's end, in bytes."""

START_ERRORS: Final = (MachineError, QuotaError, DeadlinePassed, OSError)
"""Why a mock VM can't be made, whoever is at fault."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the files of this agent's mock VMs are."""

    run_dir: Path
    state_dir: Path

    def socket_dir(self, name: str) -> Path:
        """The directory of the guest's private socket, mounted into that guest alone."""
        return self.run_dir / "guests" / name

    def disk_dir(self, name: str) -> Path:
        """The guest's own writable files; gone with the guest."""
        return self.state_dir / "disks" / name

    def cgroup_link(self, name: str) -> Path:
        """A link to the VM's cgroup, where that can't be known by its name alone."""
        return self.run_dir / LINKS_DIR / name

    def log_path(self, name: str) -> Path:
        """What the guest's processes print."""
        return self.state_dir / "logs" / f"{name}.log"

    def names(self) -> set[str]:
        """Names of all mock VMs that have files here."""
        directories = (self.run_dir / "guests", self.state_dir / "disks")
        found = {path.name for top in directories for path in top.glob("*")}
        return found | {path.stem for path in (self.state_dir / "logs").glob("*.log")}

    def remove(self, name: str) -> None:
        """Delete the files of a mock VM that has ended."""
        for directory in (self.disk_dir(name), self.socket_dir(name)):
            shutil.rmtree(directory, ignore_errors=True)
        self.cgroup_link(name).unlink(missing_ok=True)
        self.log_path(name).unlink(missing_ok=True)


class Hosting:
    """Runs mock VMs for the agent."""

    def __init__(
        self,
        balancer: Balancer,
        quotas: QuotaBackend,
        machines: Mapping[str, MachineBackend],
        threads: Threads,
        places: Places,
        *,
        dry_patience_s: float,
    ) -> None:
        self._balancer = balancer
        self._quotas = quotas
        self._machines = machines
        self._threads = threads
        self._reception = Reception(balancer, threads)
        self._places = places
        self._dry_patience_s = dry_patience_s
        self.keep_running = False
        """The VMs stay as they are when the agent ends, in order or not. They end by themselves
        and are stopped all the same."""
        self.kills_of_the_gone = 0
        """Processes of VMs that have ended, killed by their kernels for want of memory."""

    async def run(
        self,
        guest: Guest,
        found: Machine | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Host one guest until its end; started when its processes run.

        `found` is a machine that an earlier agent left running. Errors before the start are raised
        (MachineError, QuotaError, DeadlinePassed, OSError); afterwards they end the guest and are
        logged. Other exceptions are defects, and raised.
        """
        try:
            await self._live(guest, found, task_status)
        except START_ERRORS as error:
            if guest.machine is None:
                raise
            _give_up(guest, error)
        except BaseExceptionGroup as group:
            known, rest = group.split(START_ERRORS)
            if known is None:
                raise
            if guest.machine is not None:
                _give_up(guest, _first(known))
                if rest is not None:
                    raise rest from None
            elif rest is not None:
                raise
            else:
                raise _first(known) from group
        finally:
            with trio.CancelScope(shield=True):
                await self._end(guest)

    async def _live(
        self, guest: Guest, found: Machine | None, task_status: trio.TaskStatus[None]
    ) -> None:
        with guest.scope:
            guest.quota = await self._open_quota(guest, found)
            # After a takeover as well: the last agent may have been another version of this one.
            protect(guest, bytes_of(self._balancer.ledger.view(guest.name).reservation_pages))
            directory = self._places.socket_dir(guest.name)
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            async with guest_socket(directory) as listener, trio.open_nursery() as nursery:
                nursery.start_soon(
                    trio.serve_listeners, partial(self._reception.serve, guest), [listener]
                )
                dry = DryAnswer(guest, self._balancer, self._dry_patience_s)
                nursery.start_soon(dry.run)
                backend = self._machines[guest.spec.backend]
                guest.machine = found or await backend.launch(self._spec(guest))
                task_status.started()
                status = await guest.machine.wait_exited()
                guest.ended_with = f"{status}{await self._last_words(guest, guest.machine)}"
                LOG.info("%s ended: %s", guest.name, status)
                if status.out_of_memory:
                    # The counter may have gone with the container's own cgroup.
                    count_kills(guest, guest.live_quota, least=1)
                nursery.cancel_scope.cancel()

    async def _last_words(self, guest: Guest, machine: Machine) -> str:
        """What a command that ended at once has said, since its log ends with it."""
        if guest.connected.is_set():
            return ""
        said = await machine.last_words()
        if said is None:
            said = self._end_of_log(guest.name)
        return f": {said}" if said else ""

    def _end_of_log(self, name: str) -> str:
        try:
            text = self._places.log_path(name).read_bytes()[-MOST_LAST_WORDS:]
        except OSError:
            return ""
        lines = text.decode(errors="replace").split("\n")
        return one_line(next((line for line in reversed(lines) if line.strip()), "").strip())

    async def _open_quota(self, guest: Guest, found: Machine | None) -> VmQuota:
        view = self._balancer.ledger.view(guest.name)
        overhead, swap = guest.overhead_bytes, guest.spec.swap_bytes
        if found is not None:
            if found.place is not None:
                self._link(guest.name, found.place)
            return await run_blocking(
                partial(self._take_over_quota, guest.name, overhead, swap, found.place),
                timeout_s=CGROUP_DEADLINE_S,
                limiter=self._threads.limit_writes,
            )
        _warn_of_missing_swap(guest)
        if guest.spec.container is not None:
            await trio.to_thread.run_sync(self._make_way, guest)
        # Shielded: a thread that was left behind would make cgroups that nobody knows of.
        with trio.CancelScope(shield=True):
            made = await run_blocking(
                partial(
                    self._quotas.create, guest.name, bytes_of(view.quota_pages), overhead, swap
                ),
                timeout_s=CGROUP_DEADLINE_S,
                limiter=self._threads.limit_writes,
                undo=lambda: self._quotas.open_existing(guest.name, overhead).remove(),
            )
        return made

    def _make_way(self, guest: Guest) -> None:
        """An engine makes a container's parent itself where no agent has: without any limit."""
        directory = self._quotas.root / guest.name
        remove_empty(subtree(directory))
        if directory.exists():
            raise MachineError(
                f"a container runs in {directory} already, without the VM's limits: stop it, and "
                "start it again when this agent has made its place"
            )

    def _take_over_quota(
        self, name: str, overhead_bytes: int, swap_bytes: int, place: Path | None
    ) -> VmQuota:
        """Of an agent that may have died while it made room."""
        quota = self._quotas.open_existing(name, overhead_bytes, swap_bytes, place)
        try:
            quota.restore_swap()
        except LimitRefused as error:
            LOG.warning("%s", error)
        return quota

    async def enter_scope(self, name: str, scope: Path) -> None:
        """Move a guest, limits and all, into its container's scope, and the container's processes
        below the limit: they stand still until this returns, and nothing of them may run before.

        Raises MachineError.
        """
        guest = self._balancer.guests[name]
        quota, view = guest.live_quota, self._balancer.ledger.view(name)
        try:
            await run_blocking(
                partial(
                    quota.enter_scope,
                    scope,
                    bytes_of(view.quota_pages),
                    bytes_of(view.workload_pages),
                    guest.spec.assigned_bytes,
                ),
                timeout_s=CGROUP_DEADLINE_S,
                limiter=self._threads.limit_writes,
            )
            # It may have been given memory meanwhile.
            view = self._balancer.ledger.view(name)
            quota.raise_quota(bytes_of(view.quota_pages), bytes_of(view.workload_pages))
            protect(guest, bytes_of(view.reservation_pages))
            self._link(name, quota.directory)
        except (QuotaError, DeadlinePassed, OSError) as error:
            raise MachineError(f"{name} can't be put below its limit: {error}") from error

    def _link(self, name: str, cgroup_dir: Path) -> None:
        """For the watchdog, which looks below the agent's root otherwise. Raises OSError."""
        point(self._places.cgroup_link(name), cgroup_dir)

    def _spec(self, guest: Guest) -> MachineSpec:
        quota = guest.live_quota
        socket_path = self._places.run_dir / SOCKET_NAME
        return MachineSpec(
            name=guest.name,
            command=guest.spec.command or (() if guest.spec.image else idle_workload_command()),
            socket_dir=self._places.socket_dir(guest.name),
            run_dir=self._places.run_dir,
            disk_dir=self._places.disk_dir(guest.name),
            log_path=self._places.log_path(guest.name),
            cgroup_dir=quota.directory,
            workload_procs=quota.procs_path(Part.WORKLOAD),
            driver_procs=quota.procs_path(Part.DRIVER),
            driver_argv=driver_command(guest, socket_path),
            driver_arguments=driver_arguments(guest, socket_path),
            image=guest.spec.image,
            network=guest.spec.network,
            overhead_bytes=guest.overhead_bytes,
            assigned_bytes=guest.spec.assigned_bytes,
        )

    # The end

    async def _end(self, guest: Guest) -> None:
        """Take everything down, whatever of it there is; or leave it, if VMs are to be kept."""
        if _runs_on(guest) and (self.keep_running or _is_anothers(guest)):
            if guest.quota is not None:
                # Nobody will answer a dry guest until the next agent comes.
                guest.quota.let_kernel_decide()
                guest.quota.close()
            guest.ended.set()
            return
        await self._take_down(guest)
        guest.ended.set()

    async def take_down(self, guest: Guest) -> None:
        """Try again to take down a guest that could not be; `failure` is None if it worked."""
        with trio.CancelScope(shield=True):
            async with guest.taking_down:
                if guest.failure is not None:  # else another one who tries it was faster
                    await self._take_down(guest)

    async def _take_down(self, guest: Guest) -> None:
        guest.phase = Phase.STOPPING
        try:
            if guest.quota is not None:
                count_kills(guest, guest.quota)
            if guest.machine is not None:
                await guest.machine.stop(STOP_TIMEOUT_S)
            if guest.quota is not None:
                await self._remove_quota(guest.quota)
        except Exception as error:
            # The books must not give away what the kernel still holds.
            LOG.error("%s could not be taken down: %s", guest.name, error)
            if guest.quota is not None and guest.quota.directory.exists():
                guest.failure = str(error) or type(error).__name__
                return
        self.kills_of_the_gone += guest.oom_kills
        try:
            await trio.to_thread.run_sync(self._places.remove, guest.name)
        except OSError as error:
            LOG.error("%s: files of it are left: %s", guest.name, error)
        # Last: from here on its name, and with it the paths of its files, can be a newcomer's.
        self._balancer.left(guest)
        guest.failure = None

    async def _remove_quota(self, quota: VmQuota) -> None:
        def take_down() -> None:
            quota.kill_all()
            quota.remove()

        await run_blocking(
            take_down, timeout_s=2 * CGROUP_DEADLINE_S, limiter=self._threads.limit_writes
        )


def protect(guest: Guest, reservation_bytes: int) -> None:
    """Have the kernel protect the reservation, and say so where it protects less.

    Raises QuotaError. Nothing is said where it never does (version 1): docs/cgroups.md does.
    """
    quota = guest.live_quota
    quota.protect(reservation_bytes)
    protected_bytes = quota.protected_bytes
    if protected_bytes is not None and protected_bytes < reservation_bytes:
        LOG.warning(
            "%s: of its reservation of %s the kernel protects %s, as the cgroups above %s claim "
            "no more: raise memory.min there (with systemd MemoryMin= of the unit)",
            guest.name,
            format_size(reservation_bytes),
            format_size(protected_bytes),
            quota.directory.parent,
        )


def _runs_on(guest: Guest) -> bool:
    """Whether it is only its agent that ends, not the guest itself."""
    stopped = guest.scope.cancel_called or bool(guest.ended_with)
    return guest.machine is not None and not stopped


def _warn_of_missing_swap(guest: Guest) -> None:
    """No fault of the VM: swap space comes and goes while it runs, and others use it as well."""
    free_bytes = free_swap_bytes()
    if guest.spec.swap_bytes > free_bytes:
        LOG.warning(
            "%s has %s of swap, but this machine has %s left: see swapon(8)",
            guest.name,
            format_size(guest.spec.swap_bytes),
            format_size(free_bytes),
        )


def _is_anothers(guest: Guest) -> bool:
    """Whether somebody else's container runs in it."""
    return guest.machine is not None and guest.machine.outlives_agent


def count_kills(guest: Guest, quota: VmQuota, least: int = 0) -> None:
    """Tell what the guest's kernel has killed for want of memory since the last look.

    `least` is what is known from elsewhere to have been killed since the guest began.
    """
    kills = least
    with contextlib.suppress(QuotaError):
        kills = max(kills, quota.oom_kills_total)
    if kills > guest.oom_kills:
        LOG.warning("%s: its kernel killed %d", guest.name, kills - guest.oom_kills)
        guest.oom_kills = kills


def _give_up(guest: Guest, error: BaseException) -> None:
    """Tell of an error that ends a guest which was running: its cgroups are gone, for one."""
    guest.ended_with = guest.ended_with or str(error)
    LOG.error("%s can't go on and ends: %s", guest.name, error)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside a group of groups."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
