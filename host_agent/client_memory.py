"""What clients have reserved, and how much of it is there: tied to the ledger. No I/O, no clock.

Kept is what is to be set aside, held what is. Whatever becomes free is held first, in the order in
which it was reserved, before anybody is granted it; a loan that is owed comes before both. What was
handed over to a VM that waits for its memory is kept for that VM alone, until it has so much.
"""

from collections.abc import Iterator

from host_agent.guest import Guest, Phase
from host_agent.ledger.client_reservations import ClientReservation, ClientReservations
from host_agent.ledger.ledger import Ledger


class ClientMemory:
    """The reservations of one host's clients."""

    def __init__(self, ledger: Ledger) -> None:
        self.reservations = ClientReservations()
        self.unanswered: set[str] = set()
        """Ids of those whose clients still wait for an answer: nobody has been promised them."""
        self._ledger = ledger

    @property
    def kept_pages(self) -> int:
        """What is to be kept now."""
        return sum(self._kept_parts())

    @property
    def hidden_pages(self) -> int:
        """What policies must not count on: all but what is kept for VMs that they decide about."""
        ours = sum(map(self.meant_for, self.reservations.vm_names() & set(self._ledger)))
        return self.kept_pages - ours

    @property
    def waits(self) -> bool:
        """Something is still to be freed."""
        return self._ledger.held_pages < self.kept_pages

    def meant_for(self, name: str) -> int:
        """Held pages that are this VM's to take, beside what is free, and nobody else's."""
        return sum(held for one, _, held in self._parts() if one.vm_name == name)

    def missing_pages(self, reservation_id: str) -> int:
        """How much of a reservation is still to be freed. Raises UnknownReservation."""
        wanted = self.reservations.get(reservation_id)
        return sum(kept - held for one, kept, held in self._parts() if one is wanted)

    def change(self, reservations: ClientReservations) -> None:
        """From now on these are reserved."""
        self.reservations = reservations
        self.settle()

    def settle(self) -> None:
        """Hold what is free of what is to be kept, and let go of what is kept no longer."""
        ledger, kept = self._ledger, self.kept_pages
        if ledger.held_pages > kept:
            ledger.let_go(ledger.held_pages - kept)
        elif ledger.held_pages < kept:
            ledger.hold(max(min(kept - ledger.held_pages, ledger.free_pages), 0))

    def began(self, guest: Guest) -> None:
        """The VM runs: what was handed over to it is its own matter, and the policy's."""
        if guest.phase is Phase.RUNNING and guest.name in self.reservations.vm_names():
            self.change(self.reservations.ended_for(guest.name))

    def _parts(self) -> Iterator[tuple[ClientReservation, int, int]]:
        """Each reservation, what is kept of it and what is held: the first made is filled first."""
        left = self._ledger.held_pages
        for one, kept in zip(self.reservations.all, self._kept_parts(), strict=True):
            held = min(kept, left)
            left -= held
            yield one, kept, held

    def _kept_parts(self) -> tuple[int, ...]:
        there = self.reservations.vm_names() & set(self._ledger)
        return self.reservations.kept_parts(
            {name: self._ledger.view(name).quota_pages for name in there}
        )
