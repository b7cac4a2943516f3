"""What an agent leaves to the next one: mock VMs that run, and the remains of those that don't.

The kernel's limits and the guests' inventories are the truth; the state file tells what can't be
derived from them.
"""

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Final

import trio

from host_agent.balance import Balancer
from host_agent.blocking import Threads, run_blocking
from host_agent.errors import ConfigError
from host_agent.guest import Guest, Phase
from host_agent.hosting import START_ERRORS, Places
from host_agent.ledger.client_reservations import ClientReservation, ClientReservations
from host_agent.ledger.ledger import LedgerError
from host_agent.machines.base import Machine, MachineBackend
from host_agent.machines.init_script import Workshop
from host_agent.promises import excess_pages
from host_agent.quota.base import QuotaBackend
from host_agent.quota.errors import VmGone
from host_agent.sizes import format_size
from host_agent.state import AgentState, GuestState, ReservationState, StateError, load_state
from protocol.units import MIB, bytes_of, pages_of

LOG = logging.getLogger("memballoon.agent")

CLEAR_DEADLINE_S = 60.0
"""For killing and removing what a dead agent left; that may be many gigabytes."""

MOST_NAMED: Final = 5
"""VMs in one line, those first that were promised most."""

Host = Callable[[Guest, Machine], Awaitable[object]]
"""Starts to host a guest that runs already."""


def state_of(balancer: Balancer) -> AgentState:
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
            maximum_bytes=guest.maximum_bytes,
            buffer_percent=guest.spec.buffer_percent,
            swap_bytes=guest.spec.swap_bytes,
            balloon_may_swap=guest.spec.balloon_may_swap,
            image=guest.spec.image,
            network=guest.spec.network,
            container=guest.spec.container,
            backend=guest.spec.backend,
            machine=guest.machine.state,
            pinned_bytes=None if guest.pinned_pages is None else bytes_of(guest.pinned_pages),
        )
        for guest in balancer.guests.values()
        if guest.machine is not None and guest.phase is not Phase.STOPPING
    )
    reservations = tuple(
        ReservationState(
            client=one.client,
            id=one.reservation_id,
            size_bytes=bytes_of(one.pages),
            vm=one.vm_name,
        )
        for one in balancer.clients.reservations.all
        if one.reservation_id not in balancer.clients.unanswered
    )
    return AgentState(guests=guests, reservations=reservations)


class Inheritance:
    """Takes over what an earlier agent left."""

    def __init__(
        self,
        balancer: Balancer,
        quotas: QuotaBackend,
        machines: Mapping[str, MachineBackend],
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
            left = load_state(self._places.state_dir)
        except StateError as error:
            raise ConfigError(str(error)) from error
        found = [
            (_guest_of(state), machine)
            for state in left.guests
            if (machine := await self._find(state)) is not None
        ]
        self._check_promises([guest for guest, _ in found])
        for guest, machine in found:
            with _taking_over(guest.name):
                await self._adopt(guest, machine, host)
        self._balancer.overdraft.found()
        # Only now is it known what is free. What is not there yet is asked for.
        self._take_over_reservations(left.reservations)
        await self._clear_leftovers({state.name for state in left.guests})

    async def _find(self, state: GuestState) -> Machine | None:
        with _taking_over(state.name):
            machine = await self._machines[state.backend].adopt(state.machine)
        if machine is None:
            LOG.warning("%s is not running any more", state.name)
        return machine

    def _check_promises(self, running: list[Guest]) -> None:
        """More quota than there is can be asked for; what was promised can't be taken."""
        ledger = self._balancer.ledger
        promised = sum(pages_of(guest.spec.reservation_bytes) for guest in running)
        there = ledger.pool_pages - ledger.reserve_pages
        if promised <= there:
            return
        most = sorted(running, key=lambda guest: (-guest.spec.reservation_bytes, guest.name))
        named = ", ".join(
            f"{guest.name} {format_size(guest.spec.reservation_bytes)}"
            for guest in most[:MOST_NAMED]
        )
        raise ConfigError(
            f"the {len(running)} VMs that run were promised {format_size(bytes_of(promised))} "
            f"({named}{', ...' if len(most) > MOST_NAMED else ''}), and the pool has "
            f"{format_size(bytes_of(there))} beside its reserve: they run on, without an agent",
            what_to_do=f"start with a pool of {_at_least(promised + ledger.reserve_pages)} or "
            "more, and lower what they were promised with `balloon set VM --reservation` before "
            "you make it smaller",
        )

    def _take_over_reservations(self, left: tuple[ReservationState, ...]) -> None:
        balancer = self._balancer
        # A VM that runs has begun: the agent may have died before it could write that down.
        reserved = ClientReservations(
            tuple(
                ClientReservation(one.client, one.id, pages_of(one.size_bytes), one.vm)
                for one in left
                if one.vm not in balancer.guests
            )
        )
        excess = excess_pages(balancer.ledger, balancer.guests, reserved)
        if reserved.all and excess > 0:
            raise ConfigError(
                "what clients have reserved does not fit this pool of "
                f"{format_size(bytes_of(balancer.ledger.pool_pages))}: with what VMs were promised "
                f"it is exceeded by {format_size(bytes_of(excess))}; the VMs run on, without an "
                "agent",
                what_to_do="start with a pool of "
                f"{_at_least(balancer.ledger.pool_pages + excess)} or more; then `balloon client "
                "list` and `balloon client release`",
            )
        balancer.clients.change(reserved)

    async def _adopt(self, guest: Guest, machine: Machine, host: Host) -> None:
        quota = self._quotas.open_existing(
            guest.name, guest.overhead_bytes, directory=machine.place
        )
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
                f"the VM {guest.name} that is running is not as it was left ({error})",
                what_to_do="stop the VM's processes",
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
        except (*START_ERRORS, ValueError) as error:
            LOG.warning("%s was left by an agent that died and stays: %s", name, error)
        else:
            LOG.warning("%s was left by an agent that died: removed", name)


@contextlib.contextmanager
def _taking_over(name: str) -> Iterator[None]:
    try:
        yield
    except START_ERRORS as error:
        raise ConfigError(
            f"the VM {name} can't be taken over: {error}",
            what_to_do="start with the configuration of before, or stop its processes",
        ) from error


def _at_least(pages: int) -> str:
    """A size that a person may write into the file, and that is enough."""
    return f"{-(-bytes_of(pages) // MIB)}MiB"


def _guest_of(state: GuestState) -> Guest:
    guest = Guest(state.spec)
    if state.pinned_bytes is not None:
        guest.pinned_pages = pages_of(state.pinned_bytes)
    return guest
