"""Named clients reserve memory, hand it over to VMs and release it: what they ask of the agent.

Reserving waits until the others have given what is not free, as a launch does; what can't be had in
time is not kept, and who refused is named. client_memory.py keeps the accounts.
"""

import secrets
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from host_agent.balance import Balancer
from host_agent.client_memory import ClientMemory
from host_agent.errors import AgentError, BadRequest, NoSuchReservation, NotEnoughMemory
from host_agent.facade.port import ClientRequest
from host_agent.facade.views import ReservationView, TransferView
from host_agent.guest import Guest, Phase
from host_agent.ledger.client_reservations import (
    ClientReservation,
    ClientReservations,
    UnknownReservation,
)
from host_agent.promises import check_client, excess_pages
from protocol.units import bytes_of, pages_of

PATIENCE_S: Final = 10.0
"""As long as a launch waits for the others' balloons."""

LOOK_S: Final = 0.05
"""How often it is looked whether all is there."""


class ClientDesk:
    """Answers clients. `save` makes the state file true."""

    def __init__(self, balancer: Balancer, save: Callable[[], Awaitable[None]]) -> None:
        self._balancer = balancer
        self._save = save

    @property
    def _memory(self) -> ClientMemory:
        return self._balancer.clients

    def views(self) -> list[ReservationView]:
        """All reservations, in the order in which they were made."""
        return [self._view(one) for one in self._memory.reservations.all]

    async def login(self, client: str) -> list[ReservationView]:
        """Purge what the client had reserved; returns that."""
        purged = [view for view in self.views() if view.client == client]
        self._memory.change(self._memory.reservations.login(client))
        await self._changed()
        return purged

    async def reserve(self, request: ClientRequest) -> ReservationView:
        """Keep so much for the client. Raises NotEnoughMemory; nothing is kept then.

        Nor is it if the caller is cancelled.
        """
        memory, ledger, guests = self._memory, self._balancer.ledger, self._balancer.guests
        pages = pages_of(request.size_bytes)
        check_client(ledger, guests, pages, memory.reservations)
        name = secrets.token_hex(4)
        memory.unanswered.add(name)
        memory.change(memory.reservations.reserve(request.client, name, pages))
        self._balancer.replan()
        try:
            with trio.move_on_after(PATIENCE_S):
                while self._find(name) is not None and memory.missing_pages(name):
                    await trio.sleep(LOOK_S)
            reserved = self._get(name)  # it may have been purged meanwhile
            self._refuse_if_missing(name)
            memory.unanswered.discard(name)
            await self._save()
            await trio.lowlevel.checkpoint_if_cancelled()  # a file is written to its end
            return self._view(reserved)
        except BaseException:
            memory.unanswered.discard(name)
            if self._find(name) is not None:
                memory.change(memory.reservations.release(name))
                # It may be in the file by now, and nobody knows its id.
                with trio.CancelScope(shield=True):
                    await self._changed()
            raise

    async def transfer(self, reservation_id: str, vm: str) -> TransferView:
        """Hand a reservation over; a VM that runs gets it now, up to its size.

        Raises NoSuchReservation, BadRequest and NotEnoughMemory for what can't be handed over, and
        AgentError when the VM's limit could not be raised; the reservation is as before then.
        """
        one = self._get(reservation_id)
        if reservation_id in self._memory.unanswered:
            raise BadRequest(f"{reservation_id}: it is still waited for what is to be reserved")
        memory, guest = self._memory, self._balancer.guests.get(vm)
        given_pages = 0
        if guest is not None and guest.phase is Phase.RUNNING:
            given_pages = self._give(one, guest)
            memory.change(memory.reservations.release(reservation_id))
        else:
            moved = memory.reservations.transfer(reservation_id, vm)
            self._check_moved(one, moved)
            memory.change(moved)
        await self._changed()
        left = self._find(reservation_id)
        kept = None if left is None else self._view(left)
        return TransferView(given_bytes=bytes_of(given_pages), kept=kept)

    def _give(self, one: ClientReservation, guest: Guest) -> int:
        missing = self._memory.missing_pages(one.reservation_id)
        if missing:
            # The others' pages lie beside it: it is given when all of it is its own.
            raise NotEnoughMemory(bytes_of(missing))
        if self._balancer.ledger.view(guest.name).claimed.page_count < guest.frame_pages:
            raise BadRequest(
                f"{guest.name} has its full size already",
                what_to_do="hand it over to another VM, or `balloon client release`",
            )
        given = self._balancer.hand_over(guest, one.pages)
        if not given:
            raise AgentError(
                f"nothing of {one.reservation_id} could be given to {guest.name}; it is kept",
                what_to_do="see the agent's log",
            )
        return given

    def _check_moved(self, one: ClientReservation, moved: ClientReservations) -> None:
        """Taken from a VM that was to begin with it, it counts beside that VM's own promise."""
        ledger, guests = self._balancer.ledger, self._balancer.guests
        excess = excess_pages(ledger, guests, moved)
        if one.vm_name is not None and excess > 0:
            raise NotEnoughMemory(bytes_of(excess))

    async def release(self, reservation_id: str) -> None:
        """What was reserved is free again. Raises NoSuchReservation."""
        self._get(reservation_id)
        self._memory.change(self._memory.reservations.release(reservation_id))
        await self._changed()

    def _refuse_if_missing(self, reservation_id: str) -> None:
        missing = self._memory.missing_pages(reservation_id)
        if missing:
            guests = self._balancer.guests.values()
            refused = [guest.name for guest in guests if guest.last_reason is not None]
            raise NotEnoughMemory(bytes_of(missing), sorted(refused))

    async def _changed(self) -> None:
        self._balancer.replan()
        await self._save()

    def _find(self, reservation_id: str) -> ClientReservation | None:
        try:
            return self._memory.reservations.get(reservation_id)
        except UnknownReservation:
            return None

    def _get(self, reservation_id: str) -> ClientReservation:
        one = self._find(reservation_id)
        if one is None:
            raise NoSuchReservation(
                f"no reservation {reservation_id!r}", what_to_do="see `balloon client list`"
            )
        return one

    def _view(self, one: ClientReservation) -> ReservationView:
        return ReservationView(
            id=one.reservation_id,
            client=one.client,
            size_bytes=bytes_of(one.pages),
            missing_bytes=bytes_of(self._memory.missing_pages(one.reservation_id)),
            vm=one.vm_name,
        )
