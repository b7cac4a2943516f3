"""The ledger: every page of the pool has exactly one place, and every frame at most one owner.

A page of the pool is part of a guest's quota, part of the host reserve, or free. A guest's quota is
its assigned size minus the frames that the host has claimed from its balloon. The ledger says what
may be done; it does nothing itself. Each method checks, changes state, and returns what the caller
is to do in the kernel. It raises LedgerError, with nothing changed, for what must not happen.

The life of a frame, from the ledger's side:

    free in the guest -> pending (reported) -> claimed -> free in the guest (granted back)

Room is what the guest's workload was shrunk by so that the balloon may reserve that much:
workload limit = quota - room. A claim consumes room and quota alike, so the workload's limit does
not move; closing the room gives the unused rest back to the workload.

Held pages are kept for clients that have reserved them (client_reservations.py): part of the pool,
in no quota, and neither granted nor lent to anybody but the VM that a client hands them over to.

The host reserve is lent when a guest runs dry. What is lent is in that guest's quota; what is left
is still reserve, so that quotas + reserve left <= pool holds throughout. Every page that becomes
free pays the debt first: what the guest that gave it owes, then what the others owe, by name. So
nobody ever owes more than its quota, and the debt of a guest that leaves is covered by what it
leaves behind.

An agent may find running guests that have more than its pool, which was larger before. The books
are overdrawn by so much then: quotas + held + reserve left <= pool + overdrawn. Only `adopt` makes
that more. Every page that becomes free pays it off once no debt is left, so that the reserve is
there again first, and the last of them makes the pool what it is said to be.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Final

from host_agent.ledger.snapshot import UNSEEN, GuestSnapshot, HostSnapshot, Observation
from protocol.page_frames import MAX_PFN, PageFrames

_OBSERVED: Final = tuple(column.name for column in fields(Observation))


class LedgerError(Exception):
    """An operation that would break the ledger's invariants; nothing was changed."""


@dataclass(slots=True)
class _Account:
    """One guest's entry. `quota_pages` is derived, never stored beside the frames."""

    name: str
    assigned_pages: int
    reservation_pages: int
    shares: int
    claimed: PageFrames
    frames_known: bool
    pending: PageFrames = field(default_factory=PageFrames.empty)
    room_pages: int = 0
    lent_pages: int = 0

    @property
    def quota_pages(self) -> int:
        return self.assigned_pages - self.claimed.page_count


@dataclass(frozen=True, slots=True)
class AccountView:
    """One guest's entry as others may see it; sizes in pages."""

    name: str
    assigned_pages: int
    reservation_pages: int
    shares: int
    quota_pages: int
    claimed: PageFrames
    pending: PageFrames
    room_pages: int
    lent_pages: int

    @property
    def workload_pages(self) -> int:
        """Limit of the workload's cgroup: the quota without the room made for the balloon."""
        return self.quota_pages - self.room_pages


@dataclass(frozen=True, slots=True)
class SortedReport:
    """A report, sorted by what the ledger knows of its frames."""

    fresh: PageFrames
    """Frames that may be verified; they are pending now."""
    out_of_range: PageFrames
    already_taken: PageFrames
    """Claimed or pending already."""
    without_room: PageFrames
    """More than the room that was made for this guest."""


class Ledger:
    """The books of one host. Not thread-safe: owned by the agent's event loop."""

    def __init__(self, pool_pages: int, reserve_pages: int) -> None:
        if not 0 <= reserve_pages <= pool_pages:
            raise LedgerError(f"a reserve of {reserve_pages} pages does not fit {pool_pages} pages")
        self.pool_pages = pool_pages
        self.reserve_pages = reserve_pages
        self.held_pages = 0
        self.overdrawn_pages = 0
        self._accounts: dict[str, _Account] = {}

    # What there is

    @property
    def quota_pages(self) -> int:
        """Sum of all quotas."""
        return sum(account.quota_pages for account in self._accounts.values())

    @property
    def lent_pages(self) -> int:
        """How much of the reserve is lent."""
        return sum(account.lent_pages for account in self._accounts.values())

    @property
    def owed_pages(self) -> int:
        """What guests have to give back, of the reserve and beyond the pool."""
        return self.lent_pages + self.overdrawn_pages

    @property
    def reserve_left_pages(self) -> int:
        """How much of the reserve is still there to be lent."""
        return self.reserve_pages - self.lent_pages

    @property
    def free_pages(self) -> int:
        """Pages of the pool in no quota, not held for a client and not in the reserve."""
        there = self.pool_pages + self.overdrawn_pages
        return there - self.quota_pages - self.reserve_left_pages - self.held_pages

    def __contains__(self, name: str) -> bool:
        return name in self._accounts

    def __iter__(self) -> Iterator[str]:
        return iter(self._accounts)

    def view(self, name: str) -> AccountView:
        """The guest's entry. Raises LedgerError for a name that is not in the books."""
        account = self._account(name)
        return AccountView(
            name=account.name,
            assigned_pages=account.assigned_pages,
            reservation_pages=account.reservation_pages,
            shares=account.shares,
            quota_pages=account.quota_pages,
            claimed=account.claimed,
            pending=account.pending,
            room_pages=account.room_pages,
            lent_pages=account.lent_pages,
        )

    def snapshot(self, observed: Mapping[str, Observation], kept_pages: int = 0) -> HostSnapshot:
        """What a policy sees: the books, and what was `observed` of each guest by name.

        `kept_pages` of the pool are kept for clients: for a policy they aren't there.
        """
        guests = []
        for account in self._accounts.values():
            seen = observed.get(account.name, UNSEEN)
            guests.append(
                GuestSnapshot(
                    name=account.name,
                    assigned_pages=account.assigned_pages,
                    reservation_pages=account.reservation_pages,
                    shares=account.shares,
                    quota_pages=account.quota_pages,
                    lent_pages=account.lent_pages,
                    **{column: getattr(seen, column) for column in _OBSERVED},
                )
            )
        return HostSnapshot(self.pool_pages - kept_pages, self.reserve_pages, tuple(guests))

    # Guests come and go

    def admit(self, name: str, assigned_pages: int, reservation_pages: int, shares: int) -> None:
        """Enter a new guest with quota 0: all of its frames count as claimed until granted.

        Raises LedgerError when the name is taken, the assigned size is no number of frames that
        pfns can name, shares are negative, the reservation exceeds the assigned size, or the
        reservations together would exceed what the host can guarantee (pool minus reserve).
        """
        if name in self._accounts:
            raise LedgerError(f"{name} is in the books already")
        if not 1 <= assigned_pages <= MAX_PFN + 1:
            raise LedgerError(f"{name}: a guest can't have {assigned_pages} pages")
        if shares < 0:
            raise LedgerError(f"{name}: shares can't be negative")
        self._check_reservation(name, reservation_pages, assigned_pages)
        self._accounts[name] = _Account(
            name=name,
            assigned_pages=assigned_pages,
            reservation_pages=reservation_pages,
            shares=shares,
            claimed=PageFrames.span(0, assigned_pages),
            frames_known=True,
        )

    def adopt(
        self, name: str, assigned_pages: int, reservation_pages: int, shares: int, quota_pages: int
    ) -> None:
        """Enter a guest that runs already, with the quota that its kernel limit tells.

        How many frames are claimed is known from the limit; which ones, only the guest's inventory
        can tell (`settle`). Quotas beyond pool minus reserve count as lent to the last adopted, and
        what is beyond the whole pool overdraws it. Raises LedgerError as `admit` does, and when
        the quota is outside the assigned size.
        """
        if not 0 <= quota_pages <= assigned_pages:
            raise LedgerError(f"{name}: a quota of {quota_pages} pages is outside its size")
        beyond = max(0, quota_pages - self.free_pages)
        lent = min(beyond, self.reserve_left_pages)
        self.admit(name, assigned_pages, reservation_pages, shares)
        account = self._accounts[name]
        account.claimed = PageFrames.span(0, assigned_pages - quota_pages)
        account.frames_known = False
        account.lent_pages = lent
        self.overdrawn_pages += beyond - lent

    def settle(self, name: str, inventory: PageFrames) -> PageFrames:
        """What both sides hold as claimed from now on, given a (re)connected guest's inventory.

        The kernel's limit, and with it the ledger, decides how many; after a restart of the agent
        the guest's inventory decides which ones. Reports that were pending are void: a driver
        releases what is not claimed before it connects again.
        """
        account = self._account(name)
        account.pending = PageFrames.empty()
        if not account.frames_known:
            wanted = account.claimed.page_count
            own = inventory & PageFrames.span(0, account.assigned_pages)
            kept = own.lowest(wanted)
            rest = PageFrames.span(0, account.assigned_pages) - kept
            account.claimed = kept | rest.lowest(wanted - kept.page_count)
            account.frames_known = True
        return account.claimed

    def remove(self, name: str) -> int:
        """Strike a guest out; its quota becomes free. Returns the pages set free."""
        account = self._account(name)
        quota = account.quota_pages
        del self._accounts[name]
        # Its debt went with it: what it owed was part of its quota and is reserve again. The rest
        # of the quota pays for the others.
        self._repay()
        return quota

    def set_shares(self, name: str, shares: int) -> None:
        """Change the weight. Raises LedgerError if negative."""
        if shares < 0:
            raise LedgerError(f"{name}: shares can't be negative")
        self._account(name).shares = shares

    def set_reservation(self, name: str, reservation_pages: int) -> None:
        """Change the guaranteed minimum. Raises LedgerError as `admit` does."""
        account = self._account(name)
        self._check_reservation(name, reservation_pages, account.assigned_pages)
        account.reservation_pages = reservation_pages

    # Inflating: room -> report -> claim

    def make_room(self, name: str, pages: int) -> None:
        """The workload's limit was lowered by `pages`: so many may be reserved and claimed."""
        account = self._account(name)
        if pages < 1 or account.room_pages + pages > account.quota_pages:
            raise LedgerError(f"{name}: no room of {pages} pages in {account.quota_pages}")
        account.room_pages += pages

    def close_room(self, name: str) -> int:
        """The reservation ended; returns the pages of room to give back to the workload.

        Room for pending frames stays: they are still locked in the guest, and the workload's limit
        must not rise over them. Call again when they have been claimed or dropped.
        """
        account = self._account(name)
        rest = account.room_pages - account.pending.page_count
        account.room_pages -= rest
        return rest

    def report(self, name: str, frames: PageFrames) -> SortedReport:
        """Sort reported frames; the fresh ones become pending."""
        account = self._account(name)
        own = PageFrames.span(0, account.assigned_pages)
        inside = frames & own
        new = inside - account.claimed - account.pending
        fresh = new.lowest(account.room_pages - account.pending.page_count)
        account.pending |= fresh
        return SortedReport(
            fresh=fresh,
            out_of_range=frames - own,
            already_taken=inside - new,
            without_room=new - fresh,
        )

    def drop_report(self, name: str, frames: PageFrames) -> None:
        """Pending frames that were rejected: they are the guest's again. Others are ignored."""
        account = self._account(name)
        account.pending -= frames

    def claim(self, name: str, frames: PageFrames) -> int:
        """Verified and dropped frames become the host's; the quota falls by as many pages.

        Returns how many of them paid back the host reserve. The caller lowers the VM's limit
        BEFORE it calls this: a page is credited only when the kernel has let go of it.
        Raises LedgerError when the frames were not pending (room was made for those that are).
        """
        account = self._account(name)
        if not account.pending.issuperset(frames):
            raise LedgerError(f"{name}: frames are claimed that were not reported")
        account.pending -= frames
        account.claimed |= frames
        account.room_pages -= frames.page_count
        return self._repay(name)

    # Deflating: grants and loans

    def grant(self, name: str, pages: int, held_pages: int = 0) -> PageFrames:
        """Give `pages` to the guest; returns the frames that become its own again.

        `held_pages` of them are held, for this guest, the others free. Raises LedgerError when
        there are not so many, or the guest has not given up so many.
        """
        if held_pages and not 0 < held_pages <= min(pages, self.held_pages):
            raise LedgerError(f"{name}: {held_pages} held pages are wanted of {self.held_pages}")
        if pages - held_pages > self.free_pages:
            raise LedgerError(f"{name}: {pages} pages are wanted, {self.free_pages} are free")
        frames = self._give(name, pages)
        self.held_pages -= held_pages
        return frames

    def hold(self, pages: int) -> None:
        """Keep free pages for a client. Raises LedgerError when there are not so many."""
        if not 0 <= pages <= self.free_pages:
            raise LedgerError(f"{pages} pages are to be held, {self.free_pages} are free")
        self.held_pages += pages

    def let_go(self, pages: int) -> int:
        """Held pages are free again; returns how many of them paid back the host reserve.

        Raises LedgerError when not so many are held.
        """
        if not 0 <= pages <= self.held_pages:
            raise LedgerError(f"{pages} pages are let go, {self.held_pages} are held")
        self.held_pages -= pages
        return self._repay()

    def lend(self, name: str, pages: int) -> PageFrames:
        """Give up to `pages` to a guest that ran dry: free pages first, then the host reserve.

        Returns the frames that become its own again, fewer or none when there is no more to give
        or the guest has its full size.
        """
        account = self._account(name)
        free = self.free_pages
        given = max(0, min(pages, account.claimed.page_count, free + self.reserve_left_pages))
        frames = self._give(name, given)
        account.lent_pages += max(0, given - free)
        return frames

    def take_back(self, name: str, frames: PageFrames) -> None:
        """Undo a grant or loan whose kernel limit could not be raised.

        The guest was not told of it. If it has reported these frames all the same, it lied, and
        that report is void: a lie must not be able to stop the undoing.
        Raises LedgerError when the frames were not granted, or room was made of them since.
        """
        account = self._account(name)
        own = PageFrames.span(0, account.assigned_pages)
        if not own.issuperset(frames) or account.claimed.overlaps(frames):
            raise LedgerError(f"{name}: frames are taken back that were not granted")
        if frames.page_count > account.quota_pages - account.room_pages:
            raise LedgerError(f"{name}: frames are taken back that the guest does not have")
        account.pending -= frames
        account.claimed |= frames
        self._repay(name)

    def check(self) -> None:
        """Raise LedgerError if an invariant is broken: for tests, and after each plan at run time.

        Each guest: claimed and pending frames lie inside its size and apart from each other; room
        fits its quota; pending frames fit its room; it owes no more than its quota. The host:
        quotas + held pages + reserve left <= pool + overdrawn, no more is lent than the reserve,
        nothing is free while something is owed or overdrawn, and all reservations can be kept at
        once.
        """
        for account in self._accounts.values():
            own = PageFrames.span(0, account.assigned_pages)
            ok = (
                own.issuperset(account.claimed)
                and own.issuperset(account.pending)
                and not account.claimed.overlaps(account.pending)
                and 0 <= account.room_pages <= account.quota_pages
                and account.pending.page_count <= account.room_pages
                and 0 <= account.lent_pages <= account.quota_pages
                and 0 <= account.reservation_pages <= account.assigned_pages
            )
            if not ok:
                raise LedgerError(f"{account.name}: its entry is inconsistent: {account}")
        if self.lent_pages > self.reserve_pages:
            raise LedgerError(f"{self.lent_pages} pages lent of {self.reserve_pages}")
        if self.held_pages < 0:
            raise LedgerError(f"{self.held_pages} pages are held")
        if self.free_pages < 0:
            raise LedgerError(f"quotas and reserve exceed the pool by {-self.free_pages} pages")
        if self.overdrawn_pages < 0:
            raise LedgerError(f"{self.overdrawn_pages} pages are overdrawn")
        if (owed := self.owed_pages) and self.free_pages:
            raise LedgerError(f"{self.free_pages} pages are free, {owed} are owed or overdrawn")
        reserved = sum(account.reservation_pages for account in self._accounts.values())
        if reserved > self.pool_pages - self.reserve_pages:
            raise LedgerError(f"reservations of {reserved} pages exceed the pool")

    def _give(self, name: str, pages: int) -> PageFrames:
        account = self._account(name)
        if not 0 <= pages <= account.claimed.page_count:
            raise LedgerError(f"{name}: {pages} pages of {account.claimed.page_count} claimed ones")
        # The highest first: the balloon stays in one piece and in few ranges.
        frames = account.claimed.highest(pages)
        account.claimed -= frames
        return frames

    def _repay(self, giver: str | None = None) -> int:
        """Put free pages back into the reserve while something is owed; returns how many.

        What is free then pays off what is overdrawn.

        The giver's own debt comes first: pages that leave its quota must not leave a larger debt
        behind than the quota. Then by name, so that the same events always give the same books.
        """
        repaid = 0
        available = self.free_pages
        for name in sorted(self._accounts, key=lambda name: (name != giver, name)):
            account = self._accounts[name]
            part = min(account.lent_pages, available - repaid)
            account.lent_pages -= part
            repaid += part
        self.overdrawn_pages -= min(self.overdrawn_pages, available - repaid)
        return repaid

    def _check_reservation(self, name: str, reservation_pages: int, assigned_pages: int) -> None:
        if not 0 <= reservation_pages <= assigned_pages:
            raise LedgerError(f"{name}: the reservation exceeds the assigned size")
        others = sum(
            account.reservation_pages for account in self._accounts.values() if account.name != name
        )
        if others + reservation_pages > self.pool_pages - self.reserve_pages:
            raise LedgerError(f"{name}: the reservations together exceed the pool")

    def _account(self, name: str) -> _Account:
        try:
            return self._accounts[name]
        except KeyError:
            raise LedgerError(f"{name} is not in the books") from None
