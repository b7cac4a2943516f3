"""The book of moves: who gave what somebody got, in order, and not a page more."""

from collections import Counter, deque

from hypothesis import given
from hypothesis import strategies as st

from host_agent.moves import FREE_POOL, HOST_RESERVE, KEPT_MOVES, Move, MoveBook
from protocol.units import MIB


def test_a_wish_is_known_by_its_givers() -> None:
    book = MoveBook()
    book.wished("taker", 1.0)
    book.credited("one", 300)
    book.credited("two", 300)
    book.granted("taker", 400, 2.0)
    book.granted("taker", 300, 3.0)
    assert book.fulfilled("taker") == (
        Move("one", "taker", 300, 1.0, 2.0),
        Move("two", "taker", 300, 1.0, 3.0),
        Move(FREE_POOL, "taker", 100, 1.0, 3.0),
    )
    assert book.moves_total == 3
    assert book.fulfilled("taker") == ()


def test_the_oldest_credit_is_spent_first() -> None:
    book = MoveBook()
    book.credited("one", 5)
    book.credited("two", 5)
    book.granted("a", 3, 1.0)
    book.granted("b", 4, 1.0)
    assert [(move.giver, move.pages) for move in book.fulfilled("a")] == [("one", 3)]
    given = [(move.giver, move.pages) for move in book.fulfilled("b")]
    assert given == [("one", 2), ("two", 2)]


def test_an_open_wish_keeps_its_time() -> None:
    book = MoveBook()
    book.wished("taker", 1.0)
    book.wished("taker", 5.0)
    book.granted("taker", 256, 6.0)
    (move,) = book.fulfilled("taker")
    assert (move.wished_s, move.seconds, move.size_bytes) == (1.0, 5.0, MIB)


def test_a_grant_without_a_wish_begins_one() -> None:
    book = MoveBook()
    book.granted("taker", 10, 4.0)
    assert book.fulfilled("taker") == (Move(FREE_POOL, "taker", 10, 4.0, 4.0),)


def test_what_is_lent_comes_from_the_reserve_and_is_repaid_by_the_next_giver() -> None:
    book = MoveBook()
    book.lent("dry", 100, 1.0)
    book.lent("dry", 0, 1.0)
    assert book.fulfilled("dry") == (Move(HOST_RESERVE, "dry", 100, 1.0, 1.0),)
    book.credited("giver", 150)
    book.repaid(100, 2.0)
    assert book.moves[-1] == Move("giver", HOST_RESERVE, 100, 2.0, 2.0)
    book.granted("taker", 50, 3.0)
    assert [move.giver for move in book.fulfilled("taker")] == ["giver"]


def test_nothing_is_no_move() -> None:
    book = MoveBook()
    book.credited("one", 0)
    book.repaid(0, 1.0)
    book.granted("taker", 0, 1.0)
    assert book.fulfilled("taker") == ()
    assert book.moves == ()


def test_what_the_gone_gave_stays_given() -> None:
    book = MoveBook()
    book.credited("gone", 10)
    book.wished("gone", 1.0)
    book.granted("gone", 5, 1.0)
    book.forget("gone")
    assert book.fulfilled("gone") == ()
    book.granted("taker", 5, 2.0)
    assert [move.giver for move in book.fulfilled("taker")] == ["gone"]


def test_only_the_latest_are_kept() -> None:
    book = MoveBook()
    for number in range(KEPT_MOVES + 5):
        book.granted("taker", 1, float(number))
        book.fulfilled("taker")
    assert len(book.moves) == KEPT_MOVES
    assert book.moves_total == KEPT_MOVES + 5
    assert book.moves[0].done_s == 5.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["credit", "grant", "repay"]),
            st.sampled_from(["a", "b", "c"]),
            st.integers(0, 50),
        ),
        max_size=50,
    )
)
def test_every_page_is_in_one_move(events: list[tuple[str, str, int]]) -> None:
    """But for those that came back to whom they came from: those did not move."""
    book = MoveBook()
    free: deque[str] = deque()  # page by page, by who gave it
    drawn: Counter[str] = Counter()
    for kind, name, pages in events:
        match kind:
            case "credit":
                book.credited(name, pages)
                free.extend(name * pages)
            case "grant":
                book.granted(name, pages, 1.0)
            case "repay":
                book.repaid(pages, 1.0)
        if kind != "credit":
            givers = [free.popleft() if free else FREE_POOL for _ in range(pages)]
            taker = name if kind == "grant" else HOST_RESERVE
            drawn.update(giver for giver in givers if giver != taker)
    for name in "abc":
        book.fulfilled(name)
    given_by: Counter[str] = Counter()
    for move in book.moves:
        given_by[move.giver] += move.pages
    assert given_by == drawn


def test_having_its_own_back_is_no_move() -> None:
    book = MoveBook()
    book.wished("a", 1.0)
    book.credited("a", 10)
    book.credited("b", 5)
    book.granted("a", 15, 2.0)
    assert [(move.giver, move.pages) for move in book.fulfilled("a")] == [("b", 5)]
    assert book.moves_total == 1
