"""What the host can promise: reservations and pinned quotas that all can be kept at once. Pure."""

from collections.abc import Mapping

from host_agent.errors import BadRequest, NotEnoughMemory
from host_agent.facade.port import VmChange
from host_agent.guest import Guest
from host_agent.ledger.ledger import Ledger
from protocol.units import bytes_of, pages_of


def check_promise(ledger: Ledger, name: str, reservation_bytes: int) -> None:
    """Refuse a reservation that could not be kept together with all others: NotEnoughMemory."""
    others = sum(
        bytes_of(ledger.view(other).reservation_pages) for other in ledger if other != name
    )
    missing = others + reservation_bytes - bytes_of(ledger.pool_pages - ledger.reserve_pages)
    if missing > 0:
        raise NotEnoughMemory(
            missing,
            message=f"{name}: the reservations together would exceed the pool",
            what_to_do="lower this reservation, or another VM's with `balloon set`",
        )


def pinned_pages(
    ledger: Ledger, guests: Mapping[str, Guest], guest: Guest, change: VmChange
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
    account = ledger.view(guest.name)
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
        max(ledger.view(name).reservation_pages, other.pinned_pages or 0)
        for name, other in guests.items()
        if other is not guest
    )
    room = ledger.pool_pages - ledger.reserve_pages - others
    if pages_of(quota_bytes) > room:
        raise NotEnoughMemory(
            quota_bytes - bytes_of(room),
            message=f"{guest.name}: what was promised to the others leaves no room for that quota",
            what_to_do="lower a reservation or a fixed quota of theirs with `balloon set`",
        )
    return pages_of(quota_bytes)


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
