"""The columns keep the same accounts as the agent's ledger: the two run side by side."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from host_agent.ledger.ledger import LedgerError
from host_agent.simulator.books import Books, ColumnBooks, LedgerBooks, Pages, Rows

NAMES = ("a", "b", "c", "d", "e")
ASSIGNED = np.array([40, 40, 25, 60, 10])
RESERVATION = np.array([10, 0, 25, 5, 0])


def made(kind: type[LedgerBooks] | type[ColumnBooks], pool: int = 100, reserve: int = 20) -> Books:
    return kind(NAMES, ASSIGNED, RESERVATION, pool, reserve)


def rows_of(*rows: int) -> Rows:
    return np.array(rows, np.intp)


def pages_of(*pages: int) -> Pages:
    return np.array(pages, np.int64)


class SideBySide(RuleBasedStateMachine):
    """Every operation on both, and they agree; what one refuses the other refuses."""

    @initialize(pool=st.sampled_from((60, 100, 200)), reserve=st.sampled_from((0, 20, 60)))
    def begin(self, pool: int, reserve: int) -> None:
        self.ledger = made(LedgerBooks, pool, reserve)
        self.columns = made(ColumnBooks, pool, reserve)
        self.inside: set[int] = set()

    def both(self, operation: Callable[[Books], object]) -> bool:
        """Do it to both. False if both refuse."""
        results = []
        for books in (self.ledger, self.columns):
            try:
                results.append(operation(books))
            except LedgerError:
                results.append(LedgerError)
        first, second = results
        if isinstance(first, np.ndarray):
            assert isinstance(second, np.ndarray)
            assert first.tolist() == second.tolist()
        else:
            assert first == second
        return first is not LedgerError

    def some(self, data: st.DataObject) -> Rows:
        return rows_of(*data.draw(st.lists(st.sampled_from(sorted(self.inside)), unique=True)))

    @rule(row=st.integers(0, 4))
    def admit(self, row: int) -> None:
        if self.both(lambda books: books.admit(row)):
            self.inside.add(row)

    @rule(row=st.integers(0, 4))
    def remove(self, row: int) -> None:
        if self.both(lambda books: books.remove(row)):
            self.inside.remove(row)

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), part=st.floats(0, 1))
    def grant(self, data: st.DataObject, part: float) -> None:
        rows = self.some(data)
        left = int(part * max(self.columns.free_pages, 0))
        pages = []
        for row in rows.tolist():
            pages.append(min(left, int(ASSIGNED[row] - self.columns.quota[row])))
            left -= pages[-1]
        assert self.both(lambda books: books.grant(rows, pages_of(*pages)))

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), beyond=st.integers(0, 50))
    def grant_one(self, data: st.DataObject, beyond: int) -> None:
        row = rows_of(data.draw(st.sampled_from(sorted(self.inside))))
        self.both(lambda books: books.grant(row, pages_of(beyond)))

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), each=st.integers(0, 30))
    def lend(self, data: st.DataObject, each: int) -> None:
        rows = self.some(data)
        self.both(lambda books: books.lend(rows, np.full(rows.size, each)))

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), pages=st.integers(0, 30))
    def make_room(self, data: st.DataObject, pages: int) -> None:
        row = rows_of(data.draw(st.sampled_from(sorted(self.inside))))
        self.both(lambda books: books.make_room(row, pages_of(pages)))

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), part=st.floats(0, 1))
    def claim(self, data: st.DataObject, part: float) -> None:
        rows = self.some(data)
        pages = (self.columns.room[rows] * part).astype(np.int64)
        rows, pages = rows[pages > 0], pages[pages > 0]
        assert self.both(lambda books: books.claim(rows, pages))

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), pages=st.integers(1, 30))
    def claim_one(self, data: st.DataObject, pages: int) -> None:
        row = rows_of(data.draw(st.sampled_from(sorted(self.inside))))
        self.both(lambda books: books.claim(row, pages_of(pages)))

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def close_room(self, data: st.DataObject) -> None:
        rows = self.some(data)
        assert self.both(lambda books: books.close_room(rows))

    @invariant()
    def they_agree(self) -> None:
        for books in (self.ledger, self.columns):
            books.check()
        for column in ("quota", "room", "lent"):
            assert getattr(self.ledger, column).tolist() == getattr(self.columns, column).tolist()
        assert self.ledger.free_pages == self.columns.free_pages
        assert self.ledger.reserve_left_pages == self.columns.reserve_left_pages


TestSideBySide = SideBySide.TestCase


@pytest.mark.parametrize("kind", [LedgerBooks, ColumnBooks])
def test_a_claim_pays_the_givers_debt_first_then_by_name(
    kind: type[LedgerBooks] | type[ColumnBooks],
) -> None:
    books = made(kind, 100, 20)
    for row in (0, 1, 3):
        books.admit(row)
    books.grant(rows_of(3), pages_of(60))
    books.grant(rows_of(0, 1), pages_of(10, 10))
    assert books.lend(rows_of(0, 1, 3), pages_of(8, 8, 8)).tolist() == [8, 8, 0]
    books.make_room(rows_of(1, 3), pages_of(3, 6))
    assert books.claim(rows_of(1, 3), pages_of(3, 6)) == 9
    assert books.lent.tolist() == [2, 5, 0, 0, 0]
    assert (books.free_pages, books.reserve_left_pages) == (0, 13)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda books: books.quota.__setitem__(0, 41), "inconsistent"),
        (lambda books: books.quota.__setitem__(0, 9), "sums"),
        (lambda books: books.room.__setitem__(0, 11), "inconsistent"),
        (lambda books: books.lent.__setitem__(0, 1), "sums"),
        (lambda books: setattr(books, "pool_pages", 20), "exceed the pool"),
        (lambda books: setattr(books, "reserve_pages", 95), "exceed the pool"),
    ],
)
def test_the_check_of_the_columns_finds_what_is_broken(
    break_it: Callable[[ColumnBooks], None], says: str
) -> None:
    books = ColumnBooks(NAMES, ASSIGNED.copy(), RESERVATION, 100, 20)
    books.admit(0)
    books.grant(rows_of(0), pages_of(10))
    books.check()
    break_it(books)
    with pytest.raises(LedgerError, match=says):
        books.check()
