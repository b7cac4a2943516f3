"""The host agent: the one owner of the ledger, and what the operator talks to.

    events -> ledger -> snapshot -> policy's plan -> ordered (free first) -> cgroups

The sentence is carried out by the balancer (balance.py); sessions (intake/) bring the events, and
hosting.py gives each mock VM its life. Here they are put together, VMs are launched, changed and
stopped, and an agent that starts finds the VMs that another one left.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

import trio

from host_agent.balance import Balancer, Policy
from host_agent.blocking import Threads, run_blocking
from host_agent.config import Config, HostConfig
from host_agent.errors import (
    AgentError,
    BadRequest,
    ConfigError,
    MissingRight,
    NoMemoryController,
    NoSuchVm,
    NotEnoughMemory,
    SocketInUse,
    VmExists,
)
from host_agent.facade.control import build_app
from host_agent.facade.port import HostView, VitalsView, VmChange, VmSpec, VmView
from host_agent.facade.server import is_answered, serve
from host_agent.guest import Guest, Phase
from host_agent.hosting import START_ERRORS, Hosting, Places, count_kills
from host_agent.ledger.ledger import Ledger, LedgerError
from host_agent.machines.base import Machine, MachineBackend, MachineError
from host_agent.machines.process import ProcessBackend
from host_agent.policy import shares
from host_agent.quota.base import QuotaBackend
from host_agent.quota.detect import detect
from host_agent.quota.errors import QuotaError, QuotaUnavailable
from host_agent.sole_owner import sole_owner
from host_agent.state import AgentState, GuestState, StateError, load_state, save_state
from host_agent.views import vitals_view, vm_view
from host_agent.watchdog_client import Watchdog
from protocol.units import HUGE_PAGE_BYTES, bytes_of, pages_of

LOG = logging.getLogger("memballoon.agent")

POLICIES: Final[dict[str, Policy]] = {"shares": shares.plan}

MEMORY_DEADLINE_S: Final = 10.0
"""How long a launch waits for the others' balloons to give it what it needs to start."""

CONNECT_DEADLINE_S: Final = 30.0
"""A driver connects within 0.5 s; a box where many start at once takes longer."""

PROCESS_BACKEND: Final = "process"

FLOOR_CHECK_S: Final = 0.1
"""How often a launch looks again whether its plan has changed."""


class Agent:
    """One host's agent; implements the control API's AgentPort. `running` gives a working one."""

    def __init__(self, config: Config, quotas: QuotaBackend, machines: MachineBackend) -> None:
        host = config.host
        try:
            policy = POLICIES[host.policy]
        except KeyError:
            known = ", ".join(POLICIES)
            raise ConfigError(
                f"[host]: policy: unknown policy {host.policy!r} (known: {known})"
            ) from None
        self._config = config
        self._quotas = quotas
        self._machines = machines
        self.ledger = Ledger(pages_of(host.pool_bytes), pages_of(host.reserve_bytes))
        self.balancer = Balancer(self.ledger, policy, host.interval_s)
        self._threads = Threads()
        self._places = Places(host.run_dir, host.state_dir)
        self._hosting = Hosting(
            self.balancer,
            quotas,
            machines,
            self._threads,
            self._places,
            dry_patience_s=host.dry_patience_s,
        )
        self._nursery: trio.Nursery | None = None
        self._started_s = 0.0
        self._saving = trio.Lock()
        self._knows_all = False
        """All VMs of the state file were taken over; before, it knows more than this agent."""

    @property
    def places(self) -> Places:
        """Where the files of the mock VMs are."""
        return self._places

    @property
    def quotas(self) -> QuotaBackend:
        """The limits of this agent's mock VMs."""
        return self._quotas

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled; then stop every VM, or leave them running, as configured."""
        self._started_s = trio.current_time()
        # An agent that can't take over all VMs must leave all of them, and their state, alone.
        self._hosting.keep_running = True
        async with trio.open_nursery() as nursery:
            await self._adopt_all(nursery)
            self._hosting.keep_running = False
            self._knows_all = True
            try:
                self._nursery = nursery
                nursery.start_soon(self.balancer.run)
                nursery.start_soon(self._watch_kernel)
                await self._warm_up()
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def keep_vms(self) -> None:
        """From now on the end of the agent is not the end of its VMs."""
        self._hosting.keep_running = True

    # Launching and stopping

    async def launch(self, spec: VmSpec) -> VmView:
        """Start a mock VM: wait for its memory, then make it, then wait for its driver.

        Raises VmExists, BadRequest, NotEnoughMemory; nothing is left behind then, or when the
        caller is cancelled.
        """
        guest = self._admit(spec)
        try:
            await self._wait_for_memory(guest)
            guest.phase = Phase.STARTING
            await self._start(guest)
        except BaseException as error:
            await self._undo_launch(guest)
            if isinstance(error, START_ERRORS):
                raise BadRequest(f"{spec.name} can't be launched: {error}") from error
            raise
        await self._save()
        return self.vm(spec.name)

    def _admit(self, spec: VmSpec) -> Guest:
        if self._nursery is None:
            raise AgentError("the agent is starting or stopping")
        if spec.name in self.balancer.guests:
            raise VmExists(spec.name)
        if spec.frame_order and spec.assigned_bytes % HUGE_PAGE_BYTES:
            raise BadRequest(
                f"{spec.name}: a guest with 2 MiB frames has a whole number of them",
                what_to_do="choose a memory size that is a multiple of 2MiB",
            )
        self._check_promise(spec.name, spec.reservation_bytes)
        self.ledger.admit(
            spec.name,
            pages_of(spec.assigned_bytes),
            pages_of(spec.reservation_bytes),
            spec.shares,
        )
        guest = self.balancer.guests[spec.name] = Guest(spec)
        self.balancer.replan()
        return guest

    def _check_promise(self, name: str, reservation_bytes: int) -> None:
        """Refuse a reservation that could not be kept together with all others."""
        others = sum(
            bytes_of(self.ledger.view(other).reservation_pages)
            for other in self.ledger
            if other != name
        )
        room = bytes_of(self.ledger.pool_pages - self.ledger.reserve_pages)
        missing = others + reservation_bytes - room
        if missing > 0:
            raise NotEnoughMemory(
                missing,
                message=f"{name}: the reservations together would exceed the pool",
                what_to_do="lower this reservation, or another VM's with `balloon set`",
            )

    async def _wait_for_memory(self, guest: Guest) -> None:
        """Until the guest has its startup quota, or the most that shares entitle it to now."""
        with trio.move_on_after(MEMORY_DEADLINE_S):
            while not self._may_start(guest):
                changed = guest.quota_changed
                with trio.move_on_after(FLOOR_CHECK_S):
                    await changed.wait()
        view = self.ledger.view(guest.name)
        least_pages = max(view.reservation_pages, 1)
        if view.quota_pages < least_pages:
            refused = [
                other.name
                for other in self.balancer.guests.values()
                if other is not guest and other.last_reason is not None
            ]
            raise NotEnoughMemory(bytes_of(least_pages - view.quota_pages), sorted(refused))

    def _may_start(self, guest: Guest) -> bool:
        view = self.ledger.view(guest.name)
        if guest.target_pages is None or view.quota_pages < max(view.reservation_pages, 1):
            return False
        wish = min(guest.target_pages, pages_of(guest.spec.startup_bytes))
        return view.quota_pages >= wish - wish % (1 << guest.spec.frame_order)

    async def _start(self, guest: Guest) -> None:
        if self._nursery is None:
            raise AgentError("the agent is stopping")
        await self._nursery.start(self._host, guest)
        await self._save()
        with trio.move_on_after(CONNECT_DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_first_of, guest.connected, nursery.cancel_scope)
                nursery.start_soon(_first_of, guest.ended, nursery.cancel_scope)
        if guest.ended.is_set():
            raise MachineError(
                f"its command ended at once, {guest.ended_with or 'nobody knows how'}"
            )
        if not guest.connected.is_set():
            raise MachineError(f"its driver did not connect in {CONNECT_DEADLINE_S:g} s")
        guest.phase = Phase.RUNNING
        self.balancer.replan()

    async def _host(
        self,
        guest: Guest,
        found: Machine | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Host a guest to its end, and keep the state file true."""
        try:
            await self._hosting.run(guest, found, task_status=task_status)
        finally:
            with trio.CancelScope(shield=True):
                await self._save()

    async def _undo_launch(self, guest: Guest) -> None:
        with trio.CancelScope(shield=True):
            if guest.quota is None and guest.machine is None:
                self.balancer.left(guest)
                return
            guest.scope.cancel()
            await guest.ended.wait()
            await self._save()

    async def stop(self, name: str) -> None:
        """Stop a mock VM; its memory is back in the pool when this returns. Raises NoSuchVm."""
        guest = self._guest(name)
        guest.phase = Phase.STOPPING
        guest.scope.cancel()
        await guest.ended.wait()
        await self._save()

    # Changing

    async def change(self, name: str, change: VmChange) -> VmView:
        """Apply an operator's wish; what can't be is refused as a whole."""
        guest = self._guest(name)
        pinned = self._pinned_pages(guest, change)
        if change.reservation_bytes is not None:
            if change.reservation_bytes > guest.spec.assigned_bytes:
                raise BadRequest(f"{name}: the reservation exceeds the assigned size")
            self._check_promise(name, change.reservation_bytes)
        try:
            if change.reservation_bytes is not None:
                self.ledger.set_reservation(name, pages_of(change.reservation_bytes))
            if change.shares is not None:
                self.ledger.set_shares(name, change.shares)
        except LedgerError as error:
            raise BadRequest(str(error)) from error
        guest.pinned_pages = pinned
        guest.refused_until_s = 0.0
        self.balancer.plan_once()
        await self._save()
        return self.vm(name)

    def _pinned_pages(self, guest: Guest, change: VmChange) -> int | None:
        """The quota that the operator fixes; None if the policy decides."""
        if change.automatic:
            return None
        quota_bytes = change.quota_bytes
        if change.target_bytes is not None:
            if change.target_bytes > guest.spec.assigned_bytes:
                raise BadRequest(f"{guest.name}: the target exceeds the assigned size")
            quota_bytes = guest.spec.assigned_bytes - change.target_bytes
        if quota_bytes is None:
            return guest.pinned_pages
        if quota_bytes > guest.spec.assigned_bytes:
            raise BadRequest(f"{guest.name}: the quota exceeds the assigned size")
        account = self.ledger.view(guest.name)
        reservation_bytes = (
            bytes_of(account.reservation_pages)
            if change.reservation_bytes is None
            else change.reservation_bytes
        )
        if quota_bytes < reservation_bytes:
            raise BadRequest(
                f"{guest.name}: the quota would be below its reservation",
                what_to_do="lower the reservation as well",
            )
        others = sum(
            max(self.ledger.view(name).reservation_pages, other.pinned_pages or 0)
            for name, other in self.balancer.guests.items()
            if other is not guest
        )
        room = self.ledger.pool_pages - self.ledger.reserve_pages - others
        if pages_of(quota_bytes) > room:
            raise NotEnoughMemory(
                quota_bytes - bytes_of(room),
                message=f"{guest.name}: the others' reservations leave no room for that quota",
            )
        return pages_of(quota_bytes)

    # Looking

    def vms(self) -> list[VmView]:
        """All mock VMs, by name."""
        return [self.vm(name) for name in sorted(self.balancer.guests)]

    def vm(self, name: str) -> VmView:
        """One mock VM. Raises NoSuchVm."""
        guest = self._guest(name)
        return vm_view(guest, self.ledger.view(name), PROCESS_BACKEND, trio.current_time())

    def vitals(self, name: str) -> VitalsView | None:
        """A VM's last statistics. Raises NoSuchVm."""
        return vitals_view(self._guest(name), trio.current_time())

    def host(self) -> HostView:
        """The pool."""
        ledger = self.ledger
        assigned = sum(guest.assigned_pages for guest in self.balancer.guests.values())
        return HostView(
            pool_bytes=bytes_of(ledger.pool_pages),
            reserve_bytes=bytes_of(ledger.reserve_pages),
            reserve_left_bytes=bytes_of(ledger.reserve_left_pages),
            free_bytes=bytes_of(ledger.free_pages),
            quotas_bytes=bytes_of(ledger.quota_pages),
            assigned_bytes=bytes_of(assigned),
            overcommit_ratio=assigned / ledger.pool_pages,
            policy=self._config.host.policy,
            shortage=self.balancer.plan.shortage_pages > 0,
            shortage_bytes=bytes_of(self.balancer.plan.shortage_pages),
            oom_kills=self.oom_kills,
            moves_total=self.balancer.moves.moves_total,
            version=version("memballoon"),
            cgroup_version=self._quotas.cgroup_version,
            uptime_s=trio.current_time() - self._started_s,
        )

    @property
    def oom_kills(self) -> int:
        """Processes of mock VMs that the kernel killed for want of memory, since the start."""
        return self._hosting.kills_of_the_gone + sum(
            guest.oom_kills for guest in self.balancer.guests.values()
        )

    def _guest(self, name: str) -> Guest:
        try:
            return self.balancer.guests[name]
        except KeyError:
            raise NoSuchVm(name) from None

    def rearm_all(self) -> None:
        """Hold dry guests again: the watchdog has let all of them go while we did not beat."""
        LOG.warning("this agent stood still: the watchdog had let all guests go")
        for guest in self.balancer.guests.values():
            if guest.quota is not None and guest.phase is not Phase.STOPPING:
                with contextlib.suppress(QuotaError):
                    guest.quota.rearm()

    async def _watch_kernel(self) -> None:
        """Count what the guests' kernels killed for want of memory."""
        while True:
            await trio.sleep(self._config.host.interval_s)
            for guest in tuple(self.balancer.guests.values()):
                if guest.quota is not None and guest.phase is Phase.RUNNING:
                    count_kills(guest, guest.quota)

    # What lasts

    async def _save(self) -> None:
        if not self._knows_all:
            return
        guests = tuple(
            GuestState(
                name=guest.name,
                assigned_bytes=guest.spec.assigned_bytes,
                reservation_bytes=bytes_of(self.ledger.view(guest.name).reservation_pages),
                shares=self.ledger.view(guest.name).shares,
                overhead_bytes=guest.overhead_bytes,
                frame_order=guest.spec.frame_order,
                command=guest.spec.command,
                backend=PROCESS_BACKEND,
                machine=guest.machine.state,
                pinned_bytes=None if guest.pinned_pages is None else bytes_of(guest.pinned_pages),
            )
            for guest in self.balancer.guests.values()
            if guest.machine is not None and guest.phase is not Phase.STOPPING
        )
        state = AgentState(guests=guests)
        # In a thread, since it waits for the disk; one at a time and in order, the newest last.
        async with self._saving:
            try:
                await trio.to_thread.run_sync(save_state, self._places.state_dir, state)
            except StateError as error:
                LOG.error("%s", error)

    async def _adopt_all(self, nursery: trio.Nursery) -> None:
        """Take over the VMs that an earlier agent left running; clear away what is dead.

        Raises ConfigError for what can't be taken over.
        """
        try:
            states = load_state(self._places.state_dir).guests
        except StateError as error:
            raise ConfigError(str(error)) from error
        for state in states:
            spec = VmSpec(
                name=state.name,
                assigned_bytes=state.assigned_bytes,
                reservation_bytes=state.reservation_bytes,
                shares=state.shares,
                startup_bytes=state.assigned_bytes,
                frames="2MiB" if state.frame_order else "4KiB",
                command=state.command,
            )
            guest = Guest(spec)
            if state.pinned_bytes is not None:
                guest.pinned_pages = pages_of(state.pinned_bytes)
            try:
                machine = await self._machines.adopt(state.machine)
                if machine is None:
                    LOG.warning("%s is not running any more", state.name)
                    continue
                await self._adopt(guest, machine, nursery)
            except (MachineError, QuotaError) as error:
                raise ConfigError(
                    f"the VM {state.name} can't be taken over: {error}",
                    what_to_do="start with the configuration of before, or stop its processes",
                ) from error
        await run_blocking(
            self._clear_leftovers, timeout_s=60.0, limiter=self._threads.limit_writes
        )

    async def _adopt(self, guest: Guest, machine: Machine, nursery: trio.Nursery) -> None:
        quota = self._quotas.open_existing(guest.name, guest.overhead_bytes)
        quota_bytes = quota.read().vm_limit_bytes - guest.overhead_bytes
        guest.oom_kills = quota.oom_kills_total
        quota.close()
        try:
            self.ledger.adopt(
                guest.name,
                guest.assigned_pages,
                pages_of(guest.spec.reservation_bytes),
                guest.spec.shares,
                pages_of(quota_bytes),
            )
        except LedgerError as error:
            raise ConfigError(
                f"the VM {guest.name} that is running does not fit this pool ({error})",
                what_to_do="start with the pool of before, or stop the VM's processes",
            ) from error
        guest.phase = Phase.RUNNING
        self.balancer.guests[guest.name] = guest
        await nursery.start(self._host, guest, machine)
        LOG.info("%s was running and is taken over", guest.name)

    def _clear_leftovers(self) -> None:
        """Remove what a dead agent left of VMs that nobody knows any more."""
        for name in set(self._quotas.names()) - set(self.balancer.guests):
            LOG.warning("%s was left by an agent that died: removed", name)
            quota = self._quotas.open_existing(name, 0)
            quota.kill_all()
            quota.remove()
        for name in self._places.names() - set(self.balancer.guests):
            self._places.remove(name)

    async def _warm_up(self) -> None:
        """Compile the driver's modules once: a mock VM's root is read-only, it can't keep them."""
        imports = "import guest_driver.cli, guest_driver.driver, guest_driver.workload"
        await trio.run_process([sys.executable, "-OO", "-c", imports], check=False)


async def _first_of(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


@contextlib.asynccontextmanager
async def running(
    config: Config, *, die_with_agent: bool = False, scratch_dir: Path | None = None
) -> AsyncIterator[Agent]:
    """A working agent with its control API, inside a nursery; everything ends with the block.

    `die_with_agent`: if this process is killed, the watchdog removes the VMs as well (a
    demonstration), instead of leaving them to the next agent, and with them all files, or
    `scratch_dir` as a whole.

    Raises UserErrors before anything is made: MissingRight, NoMemoryController, SocketInUse.
    """
    host = config.host
    if os.geteuid() != 0:
        raise MissingRight("the agent needs root", what_to_do="run it with sudo")
    try:
        quotas = detect(host.cgroup_root)
    except QuotaUnavailable as error:
        raise NoMemoryController(str(error)) from error
    with contextlib.suppress(OSError):  # of a path that can't be, more is said when it is made
        if is_answered(host.control_socket):
            raise SocketInUse(host.control_socket)
    with contextlib.ExitStack() as owned:
        try:
            _make_private(host.run_dir)
            owned.enter_context(sole_owner(host.state_dir, partial(_make_private, host.state_dir)))
            owned.enter_context(sole_owner(quotas.root, quotas.prepare))
        except QuotaUnavailable as error:
            raise NoMemoryController(str(error)) from error
        except OSError as error:
            raise BadRequest(f"{error.filename}: {error.strerror}") from error
        owned.callback(_remove_root, quotas)
        agent = Agent(config, quotas, ProcessBackend(hidden_dirs=(host.state_dir,)))
        async with trio.open_nursery() as nursery:
            watchdog = Watchdog(
                quotas.root,
                on_death="remove" if die_with_agent else "release",
                remove_paths=_paths_of(host, scratch_dir) if die_with_agent else (),
                on_released=agent.rearm_all,
            )
            async with watchdog, trio.open_nursery() as workers:
                await workers.start(agent.run)
                try:
                    # Only now: who asks is answered by an agent that knows all of its VMs.
                    await nursery.start(partial(serve, build_app(agent), host.control_socket))
                except BaseException:
                    agent.keep_vms()
                    raise
                yield agent
                if host.on_exit == "keep" and not die_with_agent:
                    agent.keep_vms()
                workers.cancel_scope.cancel()
            nursery.cancel_scope.cancel()


def _paths_of(host: HostConfig, scratch_dir: Path | None) -> tuple[Path, ...]:
    return (host.run_dir, host.state_dir) if scratch_dir is None else (scratch_dir,)


def _make_private(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _remove_root(quotas: QuotaBackend) -> None:
    # It stays where VMs were kept.
    with contextlib.suppress(QuotaError):
        quotas.remove_root()


async def run_agent(config: Config) -> None:
    """`balloon agent`: run until SIGINT or SIGTERM."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with running(config) as agent, trio.open_nursery() as nursery:
            for spec in config.vms:
                if spec.name not in agent.balancer.guests:
                    nursery.start_soon(_launch_configured, agent, spec)
            async for number in signals:
                LOG.info("%s: ending", signal.Signals(number).name)
                nursery.cancel_scope.cancel()
                break


async def _launch_configured(agent: Agent, spec: VmSpec) -> None:
    try:
        await agent.launch(spec)
    except AgentError as error:
        LOG.error("%s: %s", spec.name, error.one_line())
