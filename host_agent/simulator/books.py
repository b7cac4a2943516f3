"""Who holds which memory, for many guests at once: the agent's ledger, and the same in columns.

`LedgerBooks` drives the agent's own ledger, frame ranges and all, one guest after the other. A move
costs it 20 to 100 us and more with more guests, since every total is a sum over all entries:
for 1,000 guests that all move every second, minutes for each simulated hour's minute. So
`ColumnBooks` keeps the same accounts as arrays, where a round over all guests costs what one guest
costs there. It has no frames: a balloon that gives its lowest frames first and gets its highest
back first is always one range from 0, and its length says everything.

Both refuse the same things and repay debts in the same order; tests run them side by side, on any
order of operations and on whole simulations. Guests are rows, numbered in the order of their names.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from host_agent.ledger.ledger import Ledger, LedgerError
from protocol.page_frames import PageFrames

Pages = npt.NDArray[np.int64]
Rows = npt.NDArray[np.intp]
Flags = npt.NDArray[np.bool_]


class Books(Protocol):
    """The accounts of one host, by row; sizes in pages. The arrays are the books' own: look only.

    Methods that take `rows` and `pages` of the same shape treat them in that order. They raise
    LedgerError, as the ledger does, for what must not happen.
    """

    pool_pages: int
    reserve_pages: int
    quota: Pages
    room: Pages
    lent: Pages

    @property
    def free_pages(self) -> int:
        """Pages in no quota and not in the reserve."""
        ...

    @property
    def reserve_left_pages(self) -> int:
        """What of the reserve is still there to be lent."""
        ...

    def admit(self, row: int) -> None:
        """Enter a guest with quota 0."""
        ...

    def remove(self, row: int) -> int:
        """Strike a guest out. Returns its quota, which is free now or has repaid the reserve."""
        ...

    def make_room(self, rows: Rows, pages: Pages) -> None:
        """The workloads' limits were lowered by `pages`."""
        ...

    def close_room(self, rows: Rows) -> None:
        """Give unused room back to the workloads."""
        ...

    def claim(self, rows: Rows, pages: Pages) -> int:
        """Pages that balloons gave, out of their room. Returns how many repaid the reserve."""
        ...

    def grant(self, rows: Rows, pages: Pages) -> None:
        """Give free pages."""
        ...

    def lend(self, rows: Rows, pages: Pages) -> Pages:
        """Give up to `pages`, out of the reserve if need be. Returns what each got."""
        ...

    def check(self) -> None:
        """Raise LedgerError if an invariant is broken."""
        ...


class LedgerBooks:
    """The agent's ledger under the simulator."""

    def __init__(
        self,
        names: Sequence[str],
        assigned: Pages,
        reservation: Pages,
        pool_pages: int,
        reserve_pages: int,
    ) -> None:
        self.pool_pages, self.reserve_pages = pool_pages, reserve_pages
        self.ledger = Ledger(pool_pages, reserve_pages)
        self._names = tuple(names)
        self._assigned, self._reservation = assigned, reservation
        self.quota = np.zeros(len(names), np.int64)
        self.room = np.zeros(len(names), np.int64)
        self.lent = np.zeros(len(names), np.int64)

    @property
    def free_pages(self) -> int:
        """As the ledger says."""
        return self.ledger.free_pages

    @property
    def reserve_left_pages(self) -> int:
        """As the ledger says."""
        return self.ledger.reserve_left_pages

    def admit(self, row: int) -> None:
        """As Books."""
        self.ledger.admit(
            self._names[row], int(self._assigned[row]), int(self._reservation[row]), 0
        )

    def remove(self, row: int) -> int:
        """As Books."""
        pages = self.ledger.remove(self._names[row])
        self.quota[row] = self.room[row] = self.lent[row] = 0
        self._look_at_debts()
        return pages

    def make_room(self, rows: Rows, pages: Pages) -> None:
        """As Books."""
        for row, count in zip(rows.tolist(), pages.tolist(), strict=True):
            self.ledger.make_room(self._names[row], count)
            self._look(row)

    def close_room(self, rows: Rows) -> None:
        """As Books."""
        for row in rows.tolist():
            self.ledger.close_room(self._names[row])
            self._look(row)

    def claim(self, rows: Rows, pages: Pages) -> int:
        """As Books: each claim is a report of the lowest frames that the guest still has."""
        repaid = 0
        for row, count in zip(rows.tolist(), pages.tolist(), strict=True):
            name = self._names[row]
            claimed = self.ledger.view(name).claimed.page_count
            sorted_report = self.ledger.report(name, PageFrames.span(claimed, count))
            if sorted_report.fresh.page_count != count:
                self.ledger.drop_report(name, sorted_report.fresh)
                raise LedgerError(f"{name}: {count} pages are claimed without room")
            repaid += self.ledger.claim(name, sorted_report.fresh)
            self._look(row)
        self._look_at_debts()
        return repaid

    def grant(self, rows: Rows, pages: Pages) -> None:
        """As Books."""
        for row, count in zip(rows.tolist(), pages.tolist(), strict=True):
            self.ledger.grant(self._names[row], count)
            self._look(row)

    def lend(self, rows: Rows, pages: Pages) -> Pages:
        """As Books."""
        given = np.zeros(rows.size, np.int64)
        for at, (row, count) in enumerate(zip(rows.tolist(), pages.tolist(), strict=True)):
            given[at] = self.ledger.lend(self._names[row], count).page_count
            self._look(row)
        return given

    def check(self) -> None:
        """As the ledger; and every balloon is one range from 0."""
        self.ledger.check()
        for name in self.ledger:
            claimed = self.ledger.view(name).claimed
            if claimed != PageFrames.span(0, claimed.page_count):
                raise LedgerError(f"{name}: its balloon is not one range from 0: {claimed}")

    def _look(self, row: int) -> None:
        view = self.ledger.view(self._names[row])
        self.quota[row] = view.quota_pages
        self.room[row] = view.room_pages
        self.lent[row] = view.lent_pages

    def _look_at_debts(self) -> None:
        for row in np.flatnonzero(self.lent).tolist():
            self._look(row)


class ColumnBooks:
    """The ledger's accounts as arrays. See the top of this module."""

    def __init__(
        self,
        names: Sequence[str],
        assigned: Pages,
        reservation: Pages,
        pool_pages: int,
        reserve_pages: int,
    ) -> None:
        if not 0 <= reserve_pages <= pool_pages:
            raise LedgerError(f"a reserve of {reserve_pages} pages does not fit {pool_pages} pages")
        self.pool_pages, self.reserve_pages = pool_pages, reserve_pages
        self._names = tuple(names)
        self._assigned, self._reservation = assigned, reservation
        self._inside = np.zeros(len(names), np.bool_)
        self.quota = np.zeros(len(names), np.int64)
        self.room = np.zeros(len(names), np.int64)
        self.lent = np.zeros(len(names), np.int64)
        self._quota_sum = self._lent_sum = 0
        """Kept beside the arrays: sums over them at every move would cost as much as the moves."""

    @property
    def free_pages(self) -> int:
        """Pool less quotas less what is left of the reserve."""
        return self.pool_pages - self._quota_sum - self.reserve_left_pages

    @property
    def reserve_left_pages(self) -> int:
        """Reserve less what is lent."""
        return self.reserve_pages - self._lent_sum

    def admit(self, row: int) -> None:
        """As Books."""
        name = self._names[row]
        if self._inside[row]:
            raise LedgerError(f"{name} is in the books already")
        if not 0 <= self._reservation[row] <= self._assigned[row]:
            raise LedgerError(f"{name}: the reservation exceeds the assigned size")
        promised = int(self._reservation[self._inside].sum()) + int(self._reservation[row])
        if promised > self.pool_pages - self.reserve_pages:
            raise LedgerError(f"{name}: the reservations together exceed the pool")
        self._inside[row] = True

    def remove(self, row: int) -> int:
        """As Books."""
        if not self._inside[row]:
            raise LedgerError(f"{self._names[row]} is not in the books")
        pages = int(self.quota[row])
        self._quota_sum -= pages
        self._lent_sum -= int(self.lent[row])
        self.quota[row] = self.room[row] = self.lent[row] = 0
        self._inside[row] = False
        self._repay(self.free_pages)
        return pages

    def make_room(self, rows: Rows, pages: Pages) -> None:
        """As Books."""
        if (pages < 1).any() or (self.room[rows] + pages > self.quota[rows]).any():
            raise LedgerError("there is no such room in a quota")
        self.room[rows] += pages

    def close_room(self, rows: Rows) -> None:
        """As Books: nothing is pending here, so all of it goes back."""
        self.room[rows] = 0

    def claim(self, rows: Rows, pages: Pages) -> int:
        """As Books. While something is owed, one guest after the other, as the ledger would."""
        repaid, start = 0, 0
        while self._lent_sum and start < rows.size:
            repaid += self._claim_one(int(rows[start]), int(pages[start]))
            start += 1
        rows, pages = rows[start:], pages[start:]
        if (pages > self.room[rows]).any() or (pages < 0).any():
            raise LedgerError("pages are claimed without room")
        self.quota[rows] -= pages
        self.room[rows] -= pages
        self._quota_sum -= int(pages.sum())
        return repaid

    def grant(self, rows: Rows, pages: Pages) -> None:
        """As Books."""
        total = int(pages.sum())
        if total > self.free_pages:
            raise LedgerError(f"{total} pages are wanted, {self.free_pages} are free")
        if (pages < 0).any() or (self.quota[rows] + pages > self._assigned[rows]).any():
            raise LedgerError("more is granted than was given up")
        self.quota[rows] += pages
        self._quota_sum += total

    def lend(self, rows: Rows, pages: Pages) -> Pages:
        """As Books."""
        free = self.free_pages
        wanted = np.clip(pages, 0, self._assigned[rows] - self.quota[rows])
        upto = np.minimum(np.cumsum(wanted), max(0, free + self.reserve_left_pages))
        given: Pages = np.diff(upto, prepend=0)
        owed = np.diff(np.maximum(upto - max(free, 0), 0), prepend=0)
        self.quota[rows] += given
        self.lent[rows] += owed
        self._quota_sum += int(given.sum())
        self._lent_sum += int(owed.sum())
        return given

    def check(self) -> None:
        """As the ledger, and that the sums are those of the arrays."""
        quota, room, lent = self.quota, self.room, self.lent
        ok = (
            (quota >= 0) & (quota <= self._assigned) & (room >= 0) & (room <= quota)
            & (lent >= 0) & (lent <= quota) & (self._inside | (quota == 0))
        )  # fmt: skip
        if not ok.all():
            raise LedgerError(f"{self._names[int(np.argmin(ok))]}: its entry is inconsistent")
        if self._quota_sum != quota.sum() or self._lent_sum != lent.sum():
            raise LedgerError("the sums are not those of the entries")
        if self._lent_sum > self.reserve_pages:
            raise LedgerError(f"{self._lent_sum} pages lent of {self.reserve_pages}")
        if self.free_pages < 0:
            raise LedgerError(f"quotas and reserve exceed the pool by {-self.free_pages} pages")
        if self._lent_sum and self.free_pages:
            raise LedgerError(f"{self.free_pages} pages are free, {self._lent_sum} are owed")
        if self._reservation[self._inside].sum() > self.pool_pages - self.reserve_pages:
            raise LedgerError("the reservations exceed the pool")

    def _claim_one(self, row: int, pages: int) -> int:
        if not 0 <= pages <= self.room[row]:
            raise LedgerError(f"{self._names[row]}: {pages} pages are claimed without room")
        self.quota[row] -= pages
        self.room[row] -= pages
        self._quota_sum -= pages
        # The giver's own debt first, then the others', by name.
        own = min(int(self.lent[row]), self.free_pages)
        self.lent[row] -= own
        self._lent_sum -= own
        return own + self._repay(self.free_pages)

    def _repay(self, available: int) -> int:
        debtors = np.flatnonzero(self.lent)
        upto = np.minimum(np.cumsum(self.lent[debtors]), max(available, 0))
        paid = np.diff(upto, prepend=0)
        self.lent[debtors] -= paid
        repaid = int(paid.sum())
        self._lent_sum -= repaid
        return repaid
