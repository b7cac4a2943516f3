"""What the host can promise: reservations and pinned quotas that all can be kept at once. Pure."""

from collections.abc import Mapping
from typing import Final

from host_agent.errors import BadRequest, NotEnoughMemory
from host_agent.facade.port import VmChange
from host_agent.guest import Guest
from host_agent.ledger.client_reservations import ClientReservations
from host_agent.ledger.ledger import Ledger
from host_agent.policy.interface import RangeChange
from host_agent.sizes import format_size
from protocol.units import bytes_of, pages_of

Guests = Mapping[str, Guest]

NO_CLIENTS: Final = ClientReservations()


def check_promise(
    ledger: Ledger,
    guests: Guests,
    name: str,
    reservation_bytes: int,
    pinned: int | None = None,
    *,
    clients: ClientReservations = NO_CLIENTS,
) -> None:
    """Refuse what could not be kept together with what the others were promised.

    A guest is promised its reservation, or the quota in pages that it is pinned to, or what
    `clients` have handed over to it, whichever is most. Raises BadRequest for a pin below the
    reservation, NotEnoughMemory for more than the pool.
    """
    if pinned is not None and bytes_of(pinned) < reservation_bytes:
        raise BadRequest(
            f"{name}: its quota is fixed at {format_size(bytes_of(pinned))}, below the "
            f"reservation of {format_size(reservation_bytes)}",
            what_to_do="raise --quota, lower --reservation, or let the policy choose with --auto",
        )
    pins = {
        other: pin
        for other in sorted(ledger)
        if other != name and (pin := _pin_above_reservation(ledger, guests, other))
    }
    others = sum(_promised_pages(ledger, guests, other) for other in ledger if other != name)
    kept_pages = _kept_beside(ledger, guests, clients, name)
    room = ledger.pool_pages - ledger.reserve_pages - others - kept_pages
    missing = max(reservation_bytes, bytes_of(pinned or 0)) - bytes_of(room)
    if missing <= 0:
        return
    fixed = ", ".join(f"{other} at {format_size(bytes_of(pin))}" for other, pin in pins.items())
    if kept_pages:
        kept = f"{format_size(bytes_of(kept_pages))} reserved by clients"
        fixed = f"{fixed}, {kept}" if fixed else kept
    promises = "reservations" if not pins and pinned is None else "reservations and fixed quotas"
    raise NotEnoughMemory(
        missing,
        tuple(pins),
        message=f"{name}: the {promises} together would exceed the pool by {format_size(missing)}"
        + (f" (fixed: {fixed})" if fixed else ""),
        what_to_do="lower this one, or with `balloon set` another VM's"
        + (f"; `balloon set {next(iter(pins))} --auto` ends a fixed quota" if pins else ""),
    )


def changed_range(guest: Guest, reservation_bytes: int, change: VmChange) -> RangeChange:
    """What a change makes of a guest's range; `reservation_bytes` is what it has now.

    Raises BadRequest for a reservation or a maximum that can't be.
    """
    assigned_bytes = guest.spec.assigned_bytes
    maximum = assigned_bytes if guest.maximum_bytes is None else guest.maximum_bytes
    before = reservation_bytes, maximum
    reservation = before[0] if change.reservation_bytes is None else change.reservation_bytes
    maximum = maximum if change.maximum_bytes is None else change.maximum_bytes
    for what, size_bytes in (("reservation", reservation), ("maximum", maximum)):
        if size_bytes > assigned_bytes:
            raise BadRequest(f"{guest.name}: the {what} exceeds the assigned size")
    if reservation > maximum:
        raise BadRequest(f"{guest.name}: the reservation exceeds the maximum")
    return RangeChange((before[0], reservation), (before[1], maximum))


def excess_pages(ledger: Ledger, guests: Guests, clients: ClientReservations) -> int:
    """By how much all promises to VMs and clients together exceed the pool; below 0: there is room.

    What a VM was handed over counts towards what it is promised anyhow, not beside it.
    """
    promised = sum(_promised_pages(ledger, guests, name) for name in ledger)
    kept_pages = _kept_beside(ledger, guests, clients)
    return promised + kept_pages - (ledger.pool_pages - ledger.reserve_pages)


def check_client(ledger: Ledger, guests: Guests, pages: int, clients: ClientReservations) -> None:
    """Refuse a client's reservation of `pages` beside what VMs and `clients` were promised.

    Raises NotEnoughMemory.
    """
    missing = excess_pages(ledger, guests, clients) + pages
    if missing > 0:
        raise NotEnoughMemory(
            bytes_of(missing),
            message=f"{format_size(bytes_of(pages))} can't be reserved: with the reservations of "
            f"VMs and clients the pool would be exceeded by {format_size(bytes_of(missing))}",
            what_to_do="reserve less, or see `balloon client list` and `balloon stats`",
        )


def pinned_pages(
    ledger: Ledger,
    guests: Guests,
    guest: Guest,
    change: VmChange,
    *,
    clients: ClientReservations = NO_CLIENTS,
) -> int | None:
    """The quota in pages that `change` fixes for `guest`; None if the policy decides.

    Raises BadRequest for one outside the guest's reservation and size, NotEnoughMemory for one
    that what was promised to the others leaves no room for.
    """
    if change.automatic:
        return None
    quota_bytes = _wanted_quota_bytes(guest, change)
    if quota_bytes is None:
        return guest.pinned_pages
    reservation_bytes = (
        bytes_of(ledger.view(guest.name).reservation_pages)
        if change.reservation_bytes is None
        else change.reservation_bytes
    )
    pinned = pages_of(quota_bytes)
    check_promise(ledger, guests, guest.name, reservation_bytes, pinned, clients=clients)
    return pinned


def _promised_pages(ledger: Ledger, guests: Guests, name: str) -> int:
    return _pin_above_reservation(ledger, guests, name) or ledger.view(name).reservation_pages


def _kept_beside(
    ledger: Ledger, guests: Guests, clients: ClientReservations, but_for: str | None = None
) -> int:
    """What clients were promised beyond what VMs were, without what `but_for` was handed over."""
    free = sum(one.pages for one in clients.all if one.vm_name is None)
    for name in clients.vm_names() - {but_for}:
        own = _promised_pages(ledger, guests, name) if name in ledger else 0
        free += max(clients.handed_over_pages(name) - own, 0)
    return free


def _pin_above_reservation(ledger: Ledger, guests: Guests, name: str) -> int | None:
    pinned = guests[name].pinned_pages if name in guests else None
    return pinned if pinned and pinned > ledger.view(name).reservation_pages else None


def _wanted_quota_bytes(guest: Guest, change: VmChange) -> int | None:
    """The quota that is asked for, directly or as the size of the balloon."""
    assigned_bytes = guest.spec.assigned_bytes
    if change.target_bytes is not None:
        if change.target_bytes > assigned_bytes:
            raise BadRequest(f"{guest.name}: the target exceeds the assigned size")
        return assigned_bytes - change.target_bytes
    if change.quota_bytes is not None and change.quota_bytes > assigned_bytes:
        raise BadRequest(f"{guest.name}: the quota exceeds the assigned size")
    return change.quota_bytes
