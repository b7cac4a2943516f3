"""The life of one mock VM: cgroups, socket, processes, channel, and the end of all of them.

`Hosting.run` is one function from the making to the removal, so that whatever goes wrong in
between, nothing is left behind. A VM ends when its command exits, when it is stopped, or with the
agent (unless the agent was told to keep it).
"""

import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from host_agent.balance import Balancer
from host_agent.blocking import Threads, run_blocking
from host_agent.dry import DryAnswer
from host_agent.guest import Guest, Phase
from host_agent.intake.listener import (
    SOCKET_NAME,
    HelloRefused,
    guest_socket,
    is_driver_of,
    new_channel,
    open_auditor,
    peer_pid,
    receive_hello,
    say_goodbye,
)
from host_agent.intake.session import GuestAtFault, GuestSession, GuestStuck
from host_agent.machines.base import Machine, MachineBackend, MachineSpec
from host_agent.quota.base import Part, QuotaBackend, VmQuota
from host_agent.quota.errors import QuotaError
from protocol.channel import Channel
from protocol.errors import ChannelBroken, LocalProtocolError, RemoteProtocolError
from protocol.messages import Welcome
from protocol.negotiation import negotiate
from protocol.units import bytes_of

LOG = logging.getLogger("memballoon.hosting")

VITALS_INTERVAL_MS: Final = 200
"""Demand is known at most this late; reading the statistics costs a guest 0.1 ms."""

STOP_TIMEOUT_S: Final = 5.0
"""What a workload is given to end by itself."""

CGROUP_DEADLINE_S: Final = 20.0
"""For making and removing cgroups; killed processes with much memory need a while."""

ROOM_WATCH_S: Final = 0.05
ROOM_WATCHES: Final = 200
"""For so long a broken-off guest's reserved pages are waited for before its room is given back."""


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
        self._places = places
        self._dry_patience_s = dry_patience_s
        self.keep_running = False
        """Set before the agent ends, to leave the VMs as they are."""

    async def run(
        self,
        guest: Guest,
        found: Machine | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Host one guest until its end; started when its processes run.

        `found` is a machine that an earlier agent left running. Errors before the start are raised
        (MachineError, QuotaError, OSError); afterwards they end the guest and are logged.
        """
        started = False
        try:
            with guest.scope:
                guest.quota = await self._open_quota(guest, found is not None)
                directory = self._places.socket_dir(guest.name)
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                async with guest_socket(directory) as listener, trio.open_nursery() as nursery:
                    nursery.start_soon(
                        trio.serve_listeners, partial(self._serve, guest), [listener]
                    )
                    dry = DryAnswer(guest, self._balancer, self._dry_patience_s)
                    nursery.start_soon(dry.run)
                    guest.machine = found or await self._machines.launch(self._spec(guest))
                    started = True
                    task_status.started()
                    status = await guest.machine.wait_exited()
                    LOG.info("%s ended: %s", guest.name, status)
                    nursery.cancel_scope.cancel()
        except* QuotaError as errors:
            # The cgroups went away under us: the guest is gone, whoever did it.
            if not started:
                raise
            LOG.error("%s: %s", guest.name, _first(errors))
        finally:
            with trio.CancelScope(shield=True):
                await self._end(guest)

    async def _open_quota(self, guest: Guest, exists: bool) -> VmQuota:
        view = self._balancer.ledger.view(guest.name)
        overhead = guest.overhead_bytes
        if exists:
            make = partial(self._quotas.open_existing, guest.name, overhead)
        else:
            make = partial(self._quotas.create, guest.name, bytes_of(view.quota_pages), overhead)
        return await run_blocking(
            make, timeout_s=CGROUP_DEADLINE_S, limiter=self._threads.limit_writes
        )

    def _spec(self, guest: Guest) -> MachineSpec:
        quota = guest.live_quota
        socket_path = self._places.run_dir / SOCKET_NAME
        cgroup = Path("/sys/fs/cgroup")
        python = (sys.executable, "-OO", "-m")
        driver = (
            *python,
            "guest_driver.cli",
            "driver",
            f"--socket={socket_path}",
            f"--cgroup={cgroup}",
            f"--assigned-pages={guest.assigned_pages}",
            f"--frame-order={guest.spec.frame_order}",
        )
        idle = (
            *python,
            "guest_driver.workload",
            "--files=/var/tmp",
            "--control=/var/tmp/workload.sock",
        )
        return MachineSpec(
            name=guest.name,
            command=guest.spec.command or idle,
            socket_dir=self._places.socket_dir(guest.name),
            run_dir=self._places.run_dir,
            disk_dir=self._places.disk_dir(guest.name),
            log_path=self._places.log_path(guest.name),
            cgroup_dir=quota.directory,
            workload_procs=quota.procs_path(Part.WORKLOAD),
            driver_procs=quota.procs_path(Part.DRIVER),
            driver_argv=driver,
        )

    # The channel

    async def _serve(self, guest: Guest, stream: trio.SocketStream) -> None:
        """One connection to the guest's socket, to its end. Faults of the peer end here."""
        channel = new_channel(stream)
        async with channel:
            pid = peer_pid(stream)
            if not is_driver_of(guest, pid):
                LOG.warning("%s: pid %d is not its driver: turned away", guest.name, pid)
                return
            try:
                while True:
                    await self._converse(guest, channel)
            except* ChannelBroken as errors:
                LOG.info("%s: the driver's connection ended: %s", guest.name, _first(errors))
            except* (RemoteProtocolError, HelloRefused, GuestAtFault) as errors:
                fault = _first(errors)
                if isinstance(fault, GuestStuck):
                    guest.stuck_times += 1
                guest.last_reason = str(fault)
                LOG.warning("%s: its driver is at fault: %s", guest.name, fault)
                await say_goodbye(channel, str(fault))
            except* LocalProtocolError as errors:
                LOG.error("%s: a fault of this agent: %s", guest.name, _first(errors))
                await say_goodbye(channel, "the host agent made an error")

    async def _converse(self, guest: Guest, channel: Channel) -> None:
        """One Hello and what follows, until the guest resets."""
        hello = await receive_hello(channel)
        agreement = negotiate(hello)
        auditor = await run_blocking(
            partial(open_auditor, guest, hello),
            timeout_s=CGROUP_DEADLINE_S,
            limiter=self._threads.audits,
        )
        ledger = self._balancer.ledger
        with auditor, trio.CancelScope() as scope:
            if guest.session is not None:
                # A driver speaks on one connection: this one is newer.
                guest.session.supersede()
            session = GuestSession(
                guest, hello, auditor, ledger, self._threads, self._balancer, scope
            )
            # A driver that greets has released what was not claimed.
            session.return_room()
            claimed = ledger.settle(guest.name, hello.claimed)
            guest.session = session
            try:
                await channel.send(
                    Welcome(
                        version=agreement.version,
                        features=agreement.features,
                        assigned_pages=guest.assigned_pages,
                        claimed=claimed,
                        vitals_interval_ms=VITALS_INTERVAL_MS,
                    )
                )
                guest.connected.set()
                self._balancer.replan()
                await session.run(channel)
            finally:
                if guest.session is session:
                    guest.session = None
                    guest.vitals = None
                ledger.drop_report(guest.name, ledger.view(guest.name).pending)
                self._balancer.replan()
                await self._return_room_later(guest, session)
        if scope.cancelled_caught:
            raise ChannelBroken("a newer connection of the same driver took its place")

    async def _return_room_later(self, guest: Guest, session: GuestSession) -> None:
        """Give back the room of a broken attempt, once the driver has let go of its frames."""
        if not self._balancer.ledger.view(guest.name).room_pages:
            return
        with trio.CancelScope(shield=True):
            for _ in range(ROOM_WATCHES):
                if guest.session is not None or guest.phase is Phase.STOPPING:
                    return  # the new session has done it, or nobody needs it any more
                try:
                    held = guest.live_quota.read().driver_usage_bytes
                except QuotaError:
                    return
                if held <= guest.overhead_bytes:
                    session.return_room()
                    return
                await trio.sleep(ROOM_WATCH_S)
        LOG.error("%s: its driver still holds frames: the workload's room stays away", guest.name)

    # The end

    async def _end(self, guest: Guest) -> None:
        """Take everything down, whatever of it there is; or leave it, if VMs are to be kept."""
        if self.keep_running and guest.machine is not None:
            if guest.quota is not None:
                # Nobody will answer a dry guest until the next agent comes.
                guest.quota.let_kernel_decide()
                guest.quota.close()
            guest.ended.set()
            return
        guest.phase = Phase.STOPPING
        try:
            if guest.machine is not None:
                await guest.machine.stop(STOP_TIMEOUT_S)
            if guest.quota is not None:
                await self._remove_quota(guest.quota)
        except Exception as error:
            # The books must not give away what the kernel still holds.
            LOG.error("%s could not be taken down: %s", guest.name, error)
            if guest.quota is not None and guest.quota.directory.exists():
                guest.ended.set()
                return
        self._balancer.left(guest)
        await trio.to_thread.run_sync(self._remove_files, guest.name)
        guest.ended.set()

    async def _remove_quota(self, quota: VmQuota) -> None:
        def take_down() -> None:
            quota.kill_all()
            quota.remove()

        await run_blocking(
            take_down, timeout_s=2 * CGROUP_DEADLINE_S, limiter=self._threads.limit_writes
        )

    def _remove_files(self, name: str) -> None:
        for directory in (self._places.disk_dir(name), self._places.socket_dir(name)):
            shutil.rmtree(directory, ignore_errors=True)
        self._places.log_path(name).unlink(missing_ok=True)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside a group of groups."""
    return next(_leaves(errors))


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
