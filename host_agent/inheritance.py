"""What an agent leaves to the next one: mock VMs that run, and the remains of those that don't.

The kernel's limits and the guests' inventories are the truth; the state file tells what can't be
derived from them.
"""

import contextlib
import logging
from collections.abc import Awaitable, Callable

import trio

from host_agent.balance import Balancer
from host_agent.blocking import DeadlinePassed, Threads, run_blocking
from host_agent.errors import ConfigError
from host_agent.guest import Guest, Phase
from host_agent.hosting import Places
from host_agent.ledger.ledger import LedgerError
from host_agent.machines.base import Machine, MachineBackend, MachineError
from host_agent.machines.init_script import Workshop
from host_agent.quota.base import QuotaBackend
from host_agent.quota.errors import QuotaError, VmGone
from host_agent.state import AgentState, GuestState, StateError, load_state
from protocol.units import bytes_of, pages_of

LOG = logging.getLogger("memballoon.agent")

CLEAR_DEADLINE_S = 60.0
"""For killing and removing what a dead agent left; that may be many gigabytes."""

Host = Callable[[Guest, Machine], Awaitable[object]]
"""Starts to host a guest that runs already."""


def state_of(balancer: Balancer, backend: str) -> AgentState:
    """What the next agent has to know of the guests that run now."""
    ledger = balancer.ledger
    guests = tuple(
        GuestState(
            name=guest.name,
            assigned_bytes=guest.spec.assigned_bytes,
            reservation_bytes=bytes_of(ledger.view(guest.name).reservation_pages),
            shares=ledger.view(guest.name).shares,
            overhead_bytes=guest.overhead_bytes,
            frame_order=guest.spec.frame_order,
            command=guest.spec.command,
            backend=backend,
            machine=guest.machine.state,
            pinned_bytes=None if guest.pinned_pages is None else bytes_of(guest.pinned_pages),
        )
        for guest in balancer.guests.values()
        if guest.machine is not None and guest.phase is not Phase.STOPPING
    )
    return AgentState(guests=guests)


class Inheritance:
    """Takes over what an earlier agent left."""

    def __init__(
        self,
        balancer: Balancer,
        quotas: QuotaBackend,
        machines: MachineBackend,
        threads: Threads,
        places: Places,
    ) -> None:
        self._balancer = balancer
        self._quotas = quotas
        self._machines = machines
        self._threads = threads
        self._places = places

    async def take_over(self, host: Host) -> None:
        """Adopt the VMs that run, each with `host`; then clear away what is dead.

        Raises ConfigError for what can't be taken over; nothing is cleared away then.
        """
        try:
            states = load_state(self._places.state_dir).guests
        except StateError as error:
            raise ConfigError(str(error)) from error
        for state in states:
            try:
                machine = await self._machines.adopt(state.machine)
                if machine is None:
                    LOG.warning("%s is not running any more", state.name)
                    continue
                await self._adopt(_guest_of(state), machine, host)
            except (MachineError, QuotaError) as error:
                raise ConfigError(
                    f"the VM {state.name} can't be taken over: {error}",
                    what_to_do="start with the configuration of before, or stop its processes",
                ) from error
        await self._clear_leftovers({state.name for state in states})

    async def _adopt(self, guest: Guest, machine: Machine, host: Host) -> None:
        quota = self._quotas.open_existing(guest.name, guest.overhead_bytes)
        quota_bytes = quota.read().vm_limit_bytes - guest.overhead_bytes
        guest.oom_kills = quota.oom_kills_total
        quota.close()
        try:
            self._balancer.ledger.adopt(
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
        self._balancer.guests[guest.name] = guest
        await host(guest, machine)
        LOG.info("%s was running and is taken over", guest.name)

    async def _clear_leftovers(self, once_known: set[str]) -> None:
        """Remove what a dead agent left of VMs that nobody knows any more.

        A directory's place alone does not make it a VM's: files go where the state file or a
        cgroup below this agent's root names the VM, or where its socket directory is there, which
        this agent has made. Whatever else is found is somebody's own.
        """
        running = set(self._balancer.guests)
        with_cgroups = set(self._quotas.names()) - running
        with_files = self._places.names() - running
        ours = once_known | with_cgroups | set(filter(self._has_workshop, with_files))
        for name in sorted(with_files - ours):
            LOG.warning("%s has files here but was no VM of this agent: left alone", name)
        async with trio.open_nursery() as nursery:
            for name in sorted(with_cgroups | (with_files & ours)):
                nursery.start_soon(self._clear, name, name in with_cgroups)

    def _has_workshop(self, name: str) -> bool:
        return Workshop.of(self._places.socket_dir(name)).supervise_file.is_file()

    async def _clear(self, name: str, has_cgroups: bool) -> None:
        """Remove one; what can't be removed is said, and stays for the next agent."""

        def clear() -> None:
            if has_cgroups:
                with contextlib.suppress(VmGone):  # it went by itself
                    quota = self._quotas.open_existing(name, 0)
                    quota.kill_all()
                    quota.remove()
            self._places.remove(name)

        try:
            await run_blocking(
                clear, timeout_s=CLEAR_DEADLINE_S, limiter=self._threads.limit_writes
            )
        except (QuotaError, DeadlinePassed, OSError, ValueError) as error:
            LOG.warning("%s was left by an agent that died and stays: %s", name, error)
        else:
            LOG.warning("%s was left by an agent that died: removed", name)


def _guest_of(state: GuestState) -> Guest:
    guest = Guest(state.spec)
    if state.pinned_bytes is not None:
        guest.pinned_pages = pages_of(state.pinned_bytes)
    return guest
