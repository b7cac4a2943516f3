"""The life of one mock VM: cgroups, socket, processes, channel, and the end of all of them.

`Hosting.run` is one function from the making to the removal, so that whatever goes wrong in
between, nothing is left behind. A VM ends when its command exits, when it is stopped, or with the
agent (unless the agent was told to keep it).
"""

import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from host_agent.balance import Balancer
from host_agent.blocking import DeadlinePassed, Threads, run_blocking
from host_agent.dry import DryAnswer
from host_agent.guest import Guest, Phase
from host_agent.guest_command import driver_command, idle_workload_command
from host_agent.intake.listener import SOCKET_NAME, guest_socket
from host_agent.intake.reception import Reception
from host_agent.machines.base import Machine, MachineBackend, MachineError, MachineSpec
from host_agent.quota.base import Part, QuotaBackend, VmQuota
from host_agent.quota.errors import QuotaError
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
        self.log_path(name).unlink(missing_ok=True)


class Hosting:
    """Runs mock VMs for the agent."""

    def __init__(
        self,
        balancer: Balancer,
        quotas: QuotaBackend,
        machines: MachineBackend,
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
            guest.quota = await self._open_quota(guest, found is not None)
            directory = self._places.socket_dir(guest.name)
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            async with guest_socket(directory) as listener, trio.open_nursery() as nursery:
                nursery.start_soon(
                    trio.serve_listeners, partial(self._reception.serve, guest), [listener]
                )
                dry = DryAnswer(guest, self._balancer, self._dry_patience_s)
                nursery.start_soon(dry.run)
                guest.machine = found or await self._machines.launch(self._spec(guest))
                task_status.started()
                status = await guest.machine.wait_exited()
                guest.ended_with = f"{status}{self._last_words(guest)}"
                LOG.info("%s ended: %s", guest.name, status)
                nursery.cancel_scope.cancel()

    def _last_words(self, guest: Guest) -> str:
        """What a command that ended at once has said, since its log ends with it."""
        if guest.connected.is_set():
            return ""
        try:
            text = self._places.log_path(guest.name).read_bytes()[-MOST_LAST_WORDS:]
        except OSError:
            return ""
        lines = text.decode(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "")
        return f": {one_line(said.strip())}" if said else ""

    async def _open_quota(self, guest: Guest, exists: bool) -> VmQuota:
        view = self._balancer.ledger.view(guest.name)
        overhead = guest.overhead_bytes
        if exists:
            return await run_blocking(
                partial(self._quotas.open_existing, guest.name, overhead),
                timeout_s=CGROUP_DEADLINE_S,
                limiter=self._threads.limit_writes,
            )
        # Shielded: a thread that was left behind would make cgroups that nobody knows of.
        with trio.CancelScope(shield=True):
            made = await run_blocking(
                partial(self._quotas.create, guest.name, bytes_of(view.quota_pages), overhead),
                timeout_s=CGROUP_DEADLINE_S,
                limiter=self._threads.limit_writes,
                undo=lambda: self._quotas.open_existing(guest.name, overhead).remove(),
            )
        return made

    def _spec(self, guest: Guest) -> MachineSpec:
        quota = guest.live_quota
        socket_path = self._places.run_dir / SOCKET_NAME
        return MachineSpec(
            name=guest.name,
            command=guest.spec.command or idle_workload_command(),
            socket_dir=self._places.socket_dir(guest.name),
            run_dir=self._places.run_dir,
            disk_dir=self._places.disk_dir(guest.name),
            log_path=self._places.log_path(guest.name),
            cgroup_dir=quota.directory,
            workload_procs=quota.procs_path(Part.WORKLOAD),
            driver_procs=quota.procs_path(Part.DRIVER),
            driver_argv=driver_command(guest, socket_path),
        )

    # The end

    async def _end(self, guest: Guest) -> None:
        """Take everything down, whatever of it there is; or leave it, if VMs are to be kept."""
        if self.keep_running and _runs_on(guest):
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


def _runs_on(guest: Guest) -> bool:
    """Whether it is only its agent that ends, not the guest itself."""
    stopped = guest.scope.cancel_called or bool(guest.ended_with)
    return guest.machine is not None and not stopped


def count_kills(guest: Guest, quota: VmQuota) -> None:
    """Tell what the guest's kernel has killed for want of memory since the last look."""
    try:
        kills = quota.oom_kills_total
    except QuotaError:
        return
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
