"""A ledger that can be seen to be right: sets of frame numbers and integers, no cleverness.

Every method that the ledger would refuse raises Refused, and has changed nothing.
"""

from dataclasses import dataclass, field


class Refused(Exception):
    """The model does not allow it."""


def require(condition: bool) -> None:
    if not condition:
        raise Refused


@dataclass
class Guest:
    assigned: int
    reservation: int
    shares: int
    claimed: set[int]
    known: bool = True
    pending: set[int] = field(default_factory=set)
    room: int = 0
    lent: int = 0

    @property
    def quota(self) -> int:
        return self.assigned - len(self.claimed)


class Model:
    def __init__(self, pool: int, reserve: int) -> None:
        self.pool = pool
        self.reserve = reserve
        self.held = 0
        self.overdrawn = 0
        self.guests: dict[str, Guest] = {}

    @property
    def lent(self) -> int:
        return sum(guest.lent for guest in self.guests.values())

    @property
    def free(self) -> int:
        quotas = sum(guest.quota for guest in self.guests.values())
        return self.pool + self.overdrawn - quotas - (self.reserve - self.lent) - self.held

    def guest(self, name: str) -> Guest:
        require(name in self.guests)
        return self.guests[name]

    def require_reservation(self, name: str, reservation: int, assigned: int) -> None:
        others = [guest.reservation for other, guest in self.guests.items() if other != name]
        require(0 <= reservation <= assigned)
        require(sum(others) + reservation <= self.pool - self.reserve)

    def repay(self, giver: str = "") -> int:
        """Page by page: while one is free and one is owed, the debt falls by one; then the rest."""
        repaid = 0
        order = [name for name in [giver, *sorted(self.guests)] if name in self.guests]
        for name in order:
            while self.guests[name].lent and self.free:
                self.guests[name].lent -= 1
                repaid += 1
        while self.overdrawn and self.free:
            self.overdrawn -= 1
        return repaid

    def admit(self, name: str, assigned: int, reservation: int, shares: int) -> None:
        require(name not in self.guests and assigned >= 1 and shares >= 0)
        self.require_reservation(name, reservation, assigned)
        self.guests[name] = Guest(assigned, reservation, shares, set(range(assigned)))

    def adopt(self, name: str, assigned: int, reservation: int, shares: int, quota: int) -> None:
        require(0 <= quota <= assigned)
        self.admit(name, assigned, reservation, shares)
        guest = self.guests[name]
        guest.known = False
        for pfn in reversed(range(assigned - quota, assigned)):
            if not self.free:
                if self.lent < self.reserve:
                    guest.lent += 1
                else:
                    self.overdrawn += 1
            guest.claimed.remove(pfn)

    def settle(self, name: str, inventory: set[int]) -> set[int]:
        guest = self.guest(name)
        guest.pending = set()
        if not guest.known:
            own = set(range(guest.assigned))
            told = set(sorted(inventory & own)[: len(guest.claimed)])
            while len(told) < len(guest.claimed):
                told.add(min(own - told))
            guest.claimed, guest.known = told, True
        return guest.claimed

    def remove(self, name: str) -> int:
        quota = self.guest(name).quota
        del self.guests[name]
        self.repay()
        return quota

    def set_shares(self, name: str, shares: int) -> None:
        require(shares >= 0)
        self.guest(name).shares = shares

    def set_reservation(self, name: str, reservation: int) -> None:
        self.require_reservation(name, reservation, self.guest(name).assigned)
        self.guest(name).reservation = reservation

    def make_room(self, name: str, pages: int) -> None:
        guest = self.guest(name)
        require(pages >= 1 and guest.room + pages <= guest.quota)
        guest.room += pages

    def close_room(self, name: str) -> int:
        guest = self.guest(name)
        unused = guest.room - len(guest.pending)
        guest.room = len(guest.pending)
        return unused

    def report(self, name: str, frames: set[int]) -> tuple[set[int], set[int], set[int], set[int]]:
        """Fresh, out of range, already taken, without room."""
        guest = self.guest(name)
        fresh, outside, taken, beyond = set(), set(), set(), set()
        for pfn in sorted(frames):
            if pfn >= guest.assigned:
                outside.add(pfn)
            elif pfn in guest.claimed or pfn in guest.pending:
                taken.add(pfn)
            elif len(guest.pending) + len(fresh) == guest.room:
                beyond.add(pfn)
            else:
                fresh.add(pfn)
        guest.pending |= fresh
        return fresh, outside, taken, beyond

    def drop_report(self, name: str, frames: set[int]) -> None:
        self.guest(name).pending -= frames

    def claim(self, name: str, frames: set[int]) -> int:
        guest = self.guest(name)
        require(frames <= guest.pending)
        guest.pending -= frames
        guest.claimed |= frames
        guest.room -= len(frames)
        return self.repay(name)

    def give(self, name: str, pages: int) -> set[int]:
        guest = self.guest(name)
        given = set(sorted(guest.claimed, reverse=True)[:pages])
        guest.claimed -= given
        return given

    def grant(self, name: str, pages: int, held: int = 0) -> set[int]:
        require(0 <= held <= min(pages, self.held))
        require(0 <= pages <= min(self.free + held, len(self.guest(name).claimed)))
        self.held -= held
        return self.give(name, pages)

    def hold(self, pages: int) -> None:
        require(0 <= pages <= self.free)
        self.held += pages

    def let_go(self, pages: int) -> int:
        require(0 <= pages <= self.held)
        self.held -= pages
        return self.repay()

    def lend(self, name: str, pages: int) -> set[int]:
        guest = self.guest(name)
        free = self.free
        there = min(free + self.reserve - self.lent, len(guest.claimed))
        given = self.give(name, min(max(pages, 0), there))
        guest.lent += max(0, len(given) - free)
        return given

    def take_back(self, name: str, frames: set[int]) -> None:
        guest = self.guest(name)
        require(frames <= set(range(guest.assigned)) - guest.claimed)
        require(len(frames) <= guest.quota - guest.room)
        guest.pending -= frames
        guest.claimed |= frames
        self.repay(name)
