"""Who gave the memory that somebody got: the record of moves between guests.

A wish opens when a guest is to get more than it has, and ends when it has got it. Pages that become
free are credited to whoever gave them, in order, and debited in the same order to whoever gets
them; so each part of a wish is known by its giver. Pure: time is an argument.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from protocol.units import bytes_of

HOST_RESERVE: Final = "reserve"
"""Name of the host reserve as a giver or taker."""

FREE_POOL: Final = "free"
"""Name of pages that no guest had given: free in the pool all along."""

KEPT_MOVES: Final = 1000
"""How many moves are remembered: enough for a day of a busy demonstration."""


@dataclass(frozen=True, slots=True)
class Move:
    """Memory that went from one holder to another to fulfil one wish."""

    giver: str
    taker: str
    pages: int
    wished_s: float
    """When the taker's wish was known, on the agent's clock."""
    done_s: float
    """When the last page of it was in the taker's limit."""

    @property
    def size_bytes(self) -> int:
        """How much moved."""
        return bytes_of(self.pages)

    @property
    def seconds(self) -> float:
        """From the wish to the higher limit."""
        return self.done_s - self.wished_s


@dataclass(slots=True)
class _Wish:
    wished_s: float
    parts: dict[str, tuple[int, float]]


class MoveBook:
    """The moves of one host, newest last."""

    def __init__(self) -> None:
        self._credits: deque[tuple[str, int]] = deque()
        self._wishes: dict[str, _Wish] = {}
        self._moves: deque[Move] = deque(maxlen=KEPT_MOVES)
        self.moves_total = 0

    @property
    def moves(self) -> tuple[Move, ...]:
        """The latest moves, oldest first."""
        return tuple(self._moves)

    def credited(self, giver: str, pages: int) -> None:
        """`pages` of `giver` became free."""
        if pages:
            self._credits.append((giver, pages))

    def repaid(self, pages: int, now_s: float) -> None:
        """`pages` of what became free went back into the host reserve."""
        for giver, part in self._draw(pages):
            self._record(Move(giver, HOST_RESERVE, part, now_s, now_s))

    def wished(self, taker: str, now_s: float) -> None:
        """`taker` is to get more; an open wish keeps its time."""
        self._wishes.setdefault(taker, _Wish(now_s, {}))

    def granted(self, taker: str, pages: int, now_s: float) -> None:
        """`pages` of what was free are in the taker's limit now."""
        self._debit(taker, self._draw(pages), now_s)

    def lent(self, taker: str, pages: int, now_s: float) -> None:
        """`pages` of the host reserve are in the taker's limit now."""
        if pages:
            self._debit(taker, [(HOST_RESERVE, pages)], now_s)

    def fulfilled(self, taker: str) -> tuple[Move, ...]:
        """The taker wants no more: its wish ends. Returns the moves that it was made of."""
        wish = self._wishes.pop(taker, None)
        if wish is None:
            return ()
        made = tuple(
            Move(giver, taker, pages, wish.wished_s, done_s)
            for giver, (pages, done_s) in wish.parts.items()
        )
        for move in made:
            self._record(move)
        return made

    def forget(self, name: str) -> None:
        """`name` is gone: what it was promised is void, what it gave stays given."""
        self._wishes.pop(name, None)

    def _debit(self, taker: str, drawn: Iterable[tuple[str, int]], now_s: float) -> None:
        wish = self._wishes.setdefault(taker, _Wish(now_s, {}))
        for giver, pages in drawn:
            if giver == taker:
                continue  # it has its own back: nothing moved
            before, _ = wish.parts.get(giver, (0, now_s))
            wish.parts[giver] = (before + pages, now_s)

    def _draw(self, pages: int) -> list[tuple[str, int]]:
        """Take `pages` out of the credits, oldest first; the rest was free all along."""
        drawn = []
        while pages > 0 and self._credits:
            giver, available = self._credits.popleft()
            part = min(available, pages)
            drawn.append((giver, part))
            pages -= part
            if part < available:
                self._credits.appendleft((giver, available - part))
        if pages > 0:
            drawn.append((FREE_POOL, pages))
        return drawn

    def _record(self, move: Move) -> None:
        self._moves.append(move)
        self.moves_total += 1
