"""The ledger against a model of sets and integers, under any order of calls, allowed or not."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from ledger_model import Model, Refused

from host_agent.ledger.ledger import Ledger, LedgerError
from protocol.page_frames import PageFrames

# Few names and few pages: calls meet the same guest, and bounds are hit all the time.
NAMES = st.sampled_from(["a", "b", "c"])
PAGES = st.integers(-1, 14)
FEW = st.integers(-1, 5)
PFNS = st.sets(st.integers(0, 18), max_size=19)


def frames_of(pfns: set[int]) -> PageFrames:
    return PageFrames.from_frames(np.array(sorted(pfns), dtype=np.int64))


def set_of(frames: PageFrames) -> set[int]:
    return set(frames.to_array().tolist())


class LedgerAgainstModel(RuleBasedStateMachine):
    ledger: Ledger
    model: Model
    most_overdrawn: int

    @initialize(
        pool=st.integers(10, 50),
        reserve=st.integers(0, 10),
        running=st.lists(st.tuples(st.integers(1, 16), st.integers(0, 16)), min_size=3, max_size=3),
    )
    def open_books(self, pool: int, reserve: int, running: list[tuple[int, int]]) -> None:
        """Three guests run already: calls for nobody are refused, and teach little."""
        self.ledger = Ledger(pool, reserve)
        self.model = Model(pool, reserve)
        self.most_overdrawn = 0
        for name, (assigned, quota) in zip("abc", running, strict=True):
            self.admit(name, assigned, 0, 1)
            self.grant(name, min(quota, assigned, self.model.free))

    def both(self, real: Callable[[], Any], modelled: Callable[[], Any]) -> tuple[Any, Any]:
        """What both answer; the ledger refuses exactly what the model refuses."""
        try:
            expected = modelled()
        except Refused:
            try:
                real()
            except LedgerError:
                return None, None
            raise AssertionError("the model refuses what the ledger allows") from None
        return real(), expected

    def both_frames(
        self, real: Callable[[], PageFrames], modelled: Callable[[], set[int]]
    ) -> set[int]:
        got, expected = self.both(real, modelled)
        if expected is None:
            return set()
        assert set_of(got) == expected
        return set(expected)

    # Guests come and go

    @rule(name=NAMES, assigned=st.integers(0, 16), reservation=FEW, shares=st.integers(-1, 3))
    def admit(self, name: str, assigned: int, reservation: int, shares: int) -> None:
        self.both(
            lambda: self.ledger.admit(name, assigned, reservation, shares),
            lambda: self.model.admit(name, assigned, reservation, shares),
        )

    @rule(
        name=NAMES,
        assigned=st.integers(1, 16),
        reservation=FEW,
        shares=st.integers(0, 3),
        quota=st.integers(0, 16),
    )
    def adopt(self, name: str, assigned: int, reservation: int, shares: int, quota: int) -> None:
        self.both(
            lambda: self.ledger.adopt(name, assigned, reservation, shares, quota),
            lambda: self.model.adopt(name, assigned, reservation, shares, quota),
        )
        self.most_overdrawn = self.ledger.overdrawn_pages

    @rule(name=NAMES, inventory=PFNS)
    def settle(self, name: str, inventory: set[int]) -> None:
        self.both_frames(
            lambda: self.ledger.settle(name, frames_of(inventory)),
            lambda: self.model.settle(name, inventory),
        )

    @precondition(lambda self: len(self.model.guests) > 1)
    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        got, expected = self.both(lambda: self.ledger.remove(name), lambda: self.model.remove(name))
        assert got == expected

    @rule(name=NAMES, shares=st.integers(-1, 3))
    def set_shares(self, name: str, shares: int) -> None:
        self.both(
            lambda: self.ledger.set_shares(name, shares),
            lambda: self.model.set_shares(name, shares),
        )

    @rule(name=NAMES, reservation=PAGES)
    def set_reservation(self, name: str, reservation: int) -> None:
        self.both(
            lambda: self.ledger.set_reservation(name, reservation),
            lambda: self.model.set_reservation(name, reservation),
        )

    # Inflating

    @rule(name=NAMES, pages=PAGES)
    def make_room(self, name: str, pages: int) -> None:
        self.both(
            lambda: self.ledger.make_room(name, pages), lambda: self.model.make_room(name, pages)
        )

    @rule(name=NAMES)
    def close_room(self, name: str) -> None:
        got, expected = self.both(
            lambda: self.ledger.close_room(name), lambda: self.model.close_room(name)
        )
        assert got == expected

    @rule(name=NAMES, frames=PFNS)
    def report(self, name: str, frames: set[int]) -> None:
        """A guest says what it likes: beyond its size, what it said before, more than it may."""
        got, expected = self.both(
            lambda: self.ledger.report(name, frames_of(frames)),
            lambda: self.model.report(name, frames),
        )
        if expected is None:
            return
        parts = (got.fresh, got.out_of_range, got.already_taken, got.without_room)
        assert tuple(set_of(part) for part in parts) == expected
        assert sum(part.page_count for part in parts) == len(frames), "each frame in one part"

    @rule(name=NAMES, frames=PFNS)
    def drop_report(self, name: str, frames: set[int]) -> None:
        self.both(
            lambda: self.ledger.drop_report(name, frames_of(frames)),
            lambda: self.model.drop_report(name, frames),
        )

    @rule(name=NAMES, frames=PFNS)
    def claim_anything(self, name: str, frames: set[int]) -> None:
        self._claim(name, frames)

    @precondition(lambda self: any(guest.pending for guest in self.model.guests.values()))
    @rule(data=st.data())
    def claim_pending(self, data: st.DataObject) -> None:
        waiting = sorted(name for name, guest in self.model.guests.items() if guest.pending)
        name = data.draw(st.sampled_from(waiting))
        pending = sorted(self.model.guests[name].pending)
        self._claim(name, set(pending[data.draw(st.integers(0, len(pending) - 1)) :]))

    @rule(name=NAMES, pages=st.integers(1, 14))
    def inflate(self, name: str, pages: int) -> None:
        """The whole way, since single steps rarely meet."""
        if name not in self.model.guests:
            return
        own = set(range(self.model.guests[name].assigned))
        self.make_room(name, min(pages, self.model.guests[name].quota))
        self.report(name, own)
        self._claim(name, set(self.model.guests[name].pending))

    def _claim(self, name: str, frames: set[int]) -> None:
        got, expected = self.both(
            lambda: self.ledger.claim(name, frames_of(frames)),
            lambda: self.model.claim(name, frames),
        )
        assert got == expected

    # Deflating

    @rule(name=NAMES, pages=FEW, held=st.just(0) | FEW)
    def grant(self, name: str, pages: int, held: int = 0) -> None:
        self.both_frames(
            lambda: self.ledger.grant(name, pages, held),
            lambda: self.model.grant(name, pages, held),
        )

    @rule(pages=FEW)
    def hold(self, pages: int) -> None:
        self.both(lambda: self.ledger.hold(pages), lambda: self.model.hold(pages))

    @rule(pages=FEW)
    def let_go(self, pages: int) -> None:
        got, expected = self.both(
            lambda: self.ledger.let_go(pages), lambda: self.model.let_go(pages)
        )
        assert got == expected

    @rule(name=NAMES, pages=PAGES, fails=st.booleans())
    def lend(self, name: str, pages: int, fails: bool) -> None:
        """Where it `fails`, the kernel's limit could not be raised, and the loan is undone."""
        given = self.both_frames(
            lambda: self.ledger.lend(name, pages), lambda: self.model.lend(name, pages)
        )
        if fails and given:
            self.take_back(name, given)

    @rule(name=NAMES, frames=PFNS)
    def take_back(self, name: str, frames: set[int]) -> None:
        self.both(
            lambda: self.ledger.take_back(name, frames_of(frames)),
            lambda: self.model.take_back(name, frames),
        )

    # What holds after each step, refused ones included

    @invariant()
    def equals_the_model(self) -> None:
        ledger, model = self.ledger, self.model
        assert sorted(ledger) == sorted(model.guests)
        for name, guest in model.guests.items():
            assert name in ledger
            view = ledger.view(name)
            assert view.name == name
            assert (view.assigned_pages, view.reservation_pages, view.shares) == (
                guest.assigned,
                guest.reservation,
                guest.shares,
            )
            assert set_of(view.claimed) == guest.claimed
            assert set_of(view.pending) == guest.pending
            assert (view.room_pages, view.lent_pages) == (guest.room, guest.lent)
            assert view.quota_pages == guest.quota
            assert view.workload_pages == guest.quota - guest.room

    @invariant()
    def every_page_has_one_place(self) -> None:
        ledger, guests = self.ledger, self.model.guests.values()
        quotas = sum(guest.quota for guest in guests)
        lent = sum(guest.lent for guest in guests)
        left = self.model.reserve - lent
        assert ledger.quota_pages == quotas
        assert ledger.lent_pages == lent
        assert ledger.reserve_left_pages == left >= 0
        held = self.model.held
        assert ledger.held_pages == held >= 0
        assert ledger.overdrawn_pages == self.model.overdrawn >= 0
        there = self.model.pool + self.model.overdrawn
        assert ledger.free_pages == there - quotas - left - held >= 0

    @invariant()
    def every_frame_has_one_owner(self) -> None:
        for guest in self.model.guests.values():
            own = set(range(guest.assigned))
            assert guest.claimed <= own
            assert guest.pending <= own
            assert not guest.claimed & guest.pending
            assert len(guest.pending) <= guest.room <= guest.quota

    @invariant()
    def what_is_owed_is_paid_first(self) -> None:
        assert not (self.ledger.owed_pages and self.ledger.free_pages)
        for guest in self.model.guests.values():
            assert 0 <= guest.lent <= guest.quota

    @invariant()
    def no_overdraft_is_made_larger_but_by_what_is_found(self) -> None:
        assert self.ledger.overdrawn_pages <= self.most_overdrawn
        self.most_overdrawn = self.ledger.overdrawn_pages

    @invariant()
    def check_passes(self) -> None:
        self.ledger.check()

    @invariant()
    def the_snapshot_shows_the_books(self) -> None:
        snapshot = self.ledger.snapshot({})
        assert (snapshot.pool_pages, snapshot.reserve_pages) == (
            self.model.pool,
            self.model.reserve,
        )
        seen = {guest.name: (guest.quota_pages, guest.lent_pages) for guest in snapshot.guests}
        assert seen == {name: (g.quota, g.lent) for name, g in self.model.guests.items()}


TestLedgerAgainstModel = LedgerAgainstModel.TestCase
TestLedgerAgainstModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
