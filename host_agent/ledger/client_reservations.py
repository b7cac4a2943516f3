"""Memory that named clients have reserved, for VMs that are still to come.

A client (xapi, in the original) reserves memory before it builds a VM, and hands the reservation
over to the VM. A client that was restarted has forgotten what it had reserved: when it logs in
again, all of its reservations are purged.

Source: xapi, ocaml/squeezed/src/memory_server.ml (login, reserve_memory, delete_reservation,
transfer_reservation_to_domain). All of it is pure: each change gives new reservations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace


class UnknownReservation(LookupError):
    """There is no reservation of that id."""


@dataclass(frozen=True, slots=True)
class ClientReservation:
    """So many pages, kept free for a client until it releases them or a VM has them."""

    client: str
    reservation_id: str
    pages: int
    vm_name: str | None = None
    """The VM that it was handed over to."""


@dataclass(frozen=True, slots=True)
class ClientReservations:
    """All reservations of all clients, in the order in which they were made."""

    all: tuple[ClientReservation, ...] = ()

    def login(self, client: str) -> "ClientReservations":
        """The client begins anew: what it had reserved is free again."""
        return self._without(lambda one: one.client == client)

    def reserve(self, client: str, reservation_id: str, pages: int) -> "ClientReservations":
        """Keep `pages` free. Raises ValueError for less than a page, or an id that is in use."""
        if pages < 1:
            raise ValueError("a reservation must be at least a page")
        if any(one.reservation_id == reservation_id for one in self.all):
            raise ValueError(f"there is a reservation {reservation_id} already")
        return ClientReservations((*self.all, ClientReservation(client, reservation_id, pages)))

    def transfer(self, reservation_id: str, vm_name: str) -> "ClientReservations":
        """Hand it over to a VM: kept until the VM has so much. Raises UnknownReservation."""
        self.get(reservation_id)
        return ClientReservations(
            tuple(
                replace(one, vm_name=vm_name) if one.reservation_id == reservation_id else one
                for one in self.all
            )
        )

    def release(self, reservation_id: str) -> "ClientReservations":
        """Free again. Raises UnknownReservation."""
        self.get(reservation_id)
        return self._without(lambda one: one.reservation_id == reservation_id)

    def ended_for(self, vm_name: str) -> "ClientReservations":
        """The VM has begun to run: what was handed over to it is its own matter now."""
        return self._without(lambda one: one.vm_name == vm_name)

    def get(self, reservation_id: str) -> ClientReservation:
        """The reservation of that id. Raises UnknownReservation."""
        for one in self.all:
            if one.reservation_id == reservation_id:
                return one
        raise UnknownReservation(reservation_id)

    def kept_parts(self, quota_pages: Mapping[str, int]) -> tuple[int, ...]:
        """What is to be kept now of each, in pages and in order; quotas by name.

        What a VM has of its own is kept by itself: of what was handed over to it first.
        """
        own = dict(quota_pages)
        parts = []
        for one in self.all:
            has = 0 if one.vm_name is None else min(own.get(one.vm_name, 0), one.pages)
            if one.vm_name is not None and has:
                own[one.vm_name] -= has
            parts.append(one.pages - has)
        return tuple(parts)

    def handed_over_pages(self, vm_name: str) -> int:
        """All that was handed over to a VM, whatever it has of it."""
        return sum(one.pages for one in self.all if one.vm_name == vm_name)

    def vm_names(self) -> frozenset[str]:
        """The VMs that reservations were handed over to."""
        return frozenset(one.vm_name for one in self.all if one.vm_name is not None)

    def _without(self, leaves: Callable[[ClientReservation], bool]) -> "ClientReservations":
        return ClientReservations(tuple(one for one in self.all if not leaves(one)))
