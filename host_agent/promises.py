"""What the host can promise: reservations and pinned quotas that all can be kept at once. Pure."""

from collections.abc import Mapping

from host_agent.errors import BadRequest, NotEnoughMemory
from host_agent.facade.port import VmChange
from host_agent.guest import Guest
from host_agent.ledger.ledger import Ledger
from host_agent.sizes import format_size
from protocol.units import bytes_of, pages_of

Guests = Mapping[str, Guest]


def check_promise(
    ledger: Ledger, guests: Guests, name: str, reservation_bytes: int, pinned: int | None = None
) -> None:
    """Refuse what could not be kept together with what the others were promised.

    A guest is promised its reservation, or the quota in pages that it is pinned to. Raises
    BadRequest for a pin below the reservation, NotEnoughMemory for more than the pool.
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
    others = sum(
        pins.get(other, ledger.view(other).reservation_pages) for other in ledger if other != name
    )
    room = ledger.pool_pages - ledger.reserve_pages - others
    missing = max(reservation_bytes, bytes_of(pinned or 0)) - bytes_of(room)
    if missing <= 0:
        return
    fixed = ", ".join(f"{other} at {format_size(bytes_of(pin))}" for other, pin in pins.items())
    promises = "reservations" if not pins and pinned is None else "reservations and fixed quotas"
    raise NotEnoughMemory(
        missing,
        tuple(pins),
        message=f"{name}: the {promises} together would exceed the pool by {format_size(missing)}"
        + (f" (fixed: {fixed})" if pins else ""),
        what_to_do="lower this one, or with `balloon set` another VM's"
        + (f"; `balloon set {next(iter(pins))} --auto` ends a fixed quota" if pins else ""),
    )


def pinned_pages(ledger: Ledger, guests: Guests, guest: Guest, change: VmChange) -> int | None:
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
    check_promise(ledger, guests, guest.name, reservation_bytes, pinned)
    return pinned


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
