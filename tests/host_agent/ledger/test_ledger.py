"""Each rule of the ledger's docstrings, one by one, by example."""

import pytest

from host_agent.ledger.ledger import Ledger, LedgerError
from host_agent.ledger.snapshot import GuestSnapshot, HostSnapshot, Observation
from protocol.page_frames import MAX_PFN, PageFrames

NOTHING = PageFrames.empty()


def span(start: int, count: int) -> PageFrames:
    return PageFrames.span(start, count)


def running(name: str = "g", *, quota: int, assigned: int = 100) -> Ledger:
    """A pool of 1000 pages, 100 of them reserve, and one guest.

    With a quota of 60, frames 0-39 are claimed and 40-99 are its own.
    """
    ledger = Ledger(1000, 100)
    ledger.admit(name, assigned, 0, 1)
    ledger.grant(name, quota)
    return ledger


def inflate(ledger: Ledger, name: str, pages: int) -> int:
    """Room, report and claim of `pages`; returns what was repaid."""
    ledger.make_room(name, pages)
    report = ledger.report(name, span(0, ledger.view(name).assigned_pages))
    assert report.fresh.page_count == pages
    return ledger.claim(name, report.fresh)


def in_debt(**loans: int) -> Ledger:
    """A full pool of 100 pages and a reserve of 50, of which each guest has borrowed `loans`.

    Each guest has a quota of 10 pages and its loan, and a size of 100 pages; "full" has the rest.
    """
    ledger = Ledger(100, 50)
    for name in loans:
        ledger.admit(name, 100, 0, 1)
        ledger.grant(name, 10)
    ledger.admit("full", 100, 0, 1)
    ledger.grant("full", ledger.free_pages)
    for name, pages in loans.items():
        assert ledger.lend(name, pages).page_count == pages
        assert ledger.view(name).lent_pages == pages
    ledger.check()
    return ledger


class TestTheBooks:
    def test_a_new_pool_is_reserve_and_free_pages(self) -> None:
        ledger = Ledger(1000, 100)
        assert (ledger.quota_pages, ledger.lent_pages) == (0, 0)
        assert (ledger.reserve_left_pages, ledger.free_pages) == (100, 900)
        assert list(ledger) == []
        ledger.check()

    @pytest.mark.parametrize(("pool", "reserve"), [(10, 11), (10, -1), (-1, 0)])
    def test_a_reserve_fits_its_pool(self, pool: int, reserve: int) -> None:
        with pytest.raises(LedgerError, match="does not fit"):
            Ledger(pool, reserve)

    def test_all_of_the_pool_may_be_reserve(self) -> None:
        ledger = Ledger(10, 10)
        ledger.admit("g", 10, 0, 1)
        assert ledger.free_pages == 0
        assert ledger.lend("g", 20).page_count == 10

    def test_names_are_listed_in_the_order_of_coming(self) -> None:
        ledger = Ledger(1000, 0)
        ledger.admit("b", 1, 0, 1)
        ledger.admit("a", 1, 0, 1)
        assert list(ledger) == ["b", "a"]
        assert "a" in ledger
        assert "c" not in ledger

    def test_every_call_refuses_an_unknown_name(self) -> None:
        ledger = Ledger(10, 0)
        for call in (
            lambda: ledger.view("x"),
            lambda: ledger.settle("x", NOTHING),
            lambda: ledger.remove("x"),
            lambda: ledger.set_shares("x", 1),
            lambda: ledger.set_reservation("x", 1),
            lambda: ledger.make_room("x", 1),
            lambda: ledger.close_room("x"),
            lambda: ledger.report("x", NOTHING),
            lambda: ledger.drop_report("x", NOTHING),
            lambda: ledger.claim("x", NOTHING),
            lambda: ledger.grant("x", 0),
            lambda: ledger.lend("x", 0),
            lambda: ledger.take_back("x", NOTHING),
        ):
            with pytest.raises(LedgerError, match="x is not in the books"):
                call()

    def test_the_snapshot_joins_books_and_observations(self) -> None:
        ledger = in_debt(a=5)
        ledger.set_reservation("a", 3)
        ledger.set_shares("a", 7)
        seen = Observation(
            demand_pages=1, working_set_pages=2, spare_pages=3, movable=False, pinned_pages=4
        )
        assert ledger.snapshot({"a": seen, "gone": seen}) == HostSnapshot(
            pool_pages=100,
            reserve_pages=50,
            guests=(
                GuestSnapshot(
                    "a",
                    100,
                    3,
                    7,
                    15,
                    5,
                    demand_pages=1,
                    working_set_pages=2,
                    spare_pages=3,
                    movable=False,
                    pinned_pages=4,
                ),
                GuestSnapshot("full", 100, 0, 1, 40, 0),
            ),
        )


class TestComing:
    def test_a_new_guest_has_nothing_until_granted(self) -> None:
        ledger = Ledger(1000, 100)
        ledger.admit("g", 100, 20, 3)
        view = ledger.view("g")
        assert (view.name, view.assigned_pages, view.reservation_pages) == ("g", 100, 20)
        assert (view.shares, view.quota_pages, view.workload_pages) == (3, 0, 0)
        assert (view.claimed, view.pending) == (span(0, 100), NOTHING)
        assert (view.room_pages, view.lent_pages) == (0, 0)
        assert ledger.free_pages == 900

    def test_sizes_may_add_up_to_more_than_the_pool(self) -> None:
        ledger = Ledger(100, 0)
        ledger.admit("a", 100, 0, 1)
        ledger.admit("b", 100, 0, 1)
        ledger.check()

    @pytest.mark.parametrize(
        ("assigned", "reservation", "shares"),
        [(0, 0, 1), (-1, -1, 1), (10, -1, 1), (10, 11, 1), (10, 0, -1), (MAX_PFN + 2, 0, 1)],
    )
    def test_a_guest_that_makes_no_sense_is_refused(
        self, assigned: int, reservation: int, shares: int
    ) -> None:
        ledger = Ledger(1000, 100)
        with pytest.raises(LedgerError, match="g: "):
            ledger.admit("g", assigned, reservation, shares)
        assert "g" not in ledger

    def test_the_largest_and_the_smallest_guest(self) -> None:
        ledger = Ledger(1000, 100)
        ledger.admit("large", MAX_PFN + 1, 0, 0)
        ledger.admit("small", 1, 1, 0)
        ledger.check()

    def test_a_name_is_taken_once(self) -> None:
        ledger = running(quota=50)
        with pytest.raises(LedgerError, match="already"):
            ledger.admit("g", 10, 0, 1)
        with pytest.raises(LedgerError, match="already"):
            ledger.adopt("g", 10, 0, 1, 5)
        assert ledger.view("g").quota_pages == 50

    def test_reservations_fit_pool_minus_reserve(self) -> None:
        ledger = Ledger(1000, 100)
        ledger.admit("a", 900, 600, 1)
        with pytest.raises(LedgerError, match="reservations"):
            ledger.admit("b", 900, 301, 1)
        ledger.admit("b", 900, 300, 1)
        with pytest.raises(LedgerError, match="reservations"):
            ledger.set_reservation("a", 601)
        assert ledger.view("a").reservation_pages == 600
        # Its own old reservation does not count against the new one.
        ledger.set_reservation("a", 550)
        ledger.set_reservation("b", 350)
        ledger.check()

    @pytest.mark.parametrize("reservation", [-1, 101])
    def test_a_new_reservation_fits_the_size(self, reservation: int) -> None:
        ledger = running(quota=50)
        with pytest.raises(LedgerError, match="assigned size"):
            ledger.set_reservation("g", reservation)

    def test_shares_change_and_are_never_negative(self) -> None:
        ledger = running(quota=50)
        ledger.set_shares("g", 0)
        with pytest.raises(LedgerError, match="negative"):
            ledger.set_shares("g", -1)
        assert ledger.view("g").shares == 0


class TestAdopting:
    def test_the_quota_is_what_the_kernel_says(self) -> None:
        ledger = Ledger(1000, 100)
        ledger.adopt("g", 100, 20, 3, 60)
        view = ledger.view("g")
        assert (view.reservation_pages, view.shares) == (20, 3)
        assert (view.quota_pages, view.lent_pages) == (60, 0)
        assert ledger.free_pages == 840

    def test_a_quota_may_be_nothing_or_the_whole_size(self) -> None:
        ledger = Ledger(1000, 100)
        ledger.adopt("none", 100, 0, 1, 0)
        ledger.adopt("whole", 100, 0, 1, 100)
        assert ledger.view("none").claimed == span(0, 100)
        assert ledger.settle("whole", NOTHING) == NOTHING
        assert ledger.quota_pages == 100

    @pytest.mark.parametrize("quota", [-1, 101])
    def test_a_quota_beyond_the_size_is_refused(self, quota: int) -> None:
        with pytest.raises(LedgerError, match="outside its size"):
            Ledger(1000, 100).adopt("g", 100, 0, 1, quota)

    def test_what_exceeds_pool_minus_reserve_is_lent_to_the_last(self) -> None:
        ledger = Ledger(1000, 100)
        ledger.adopt("a", 900, 0, 1, 880)
        ledger.adopt("b", 900, 0, 1, 50)
        ledger.adopt("c", 900, 0, 1, 70)
        assert [ledger.view(name).lent_pages for name in "abc"] == [0, 30, 70]
        assert (ledger.reserve_left_pages, ledger.free_pages) == (0, 0)
        ledger.check()

    def test_what_exceeds_the_pool_overdraws_it(self) -> None:
        ledger = Ledger(1000, 100)
        ledger.adopt("a", 900, 0, 1, 850)
        ledger.adopt("b", 900, 0, 1, 350)
        assert [ledger.view(name).lent_pages for name in "ab"] == [0, 100]
        assert (ledger.overdrawn_pages, ledger.owed_pages) == (200, 300)
        assert (ledger.free_pages, ledger.reserve_left_pages) == (0, 0)
        assert ledger.snapshot({}).pool_pages == 1000
        ledger.check()

    def test_who_comes_after_that_overdraws_it_by_all_that_it_has(self) -> None:
        ledger = Ledger(1000, 100)
        for name in "abc":
            ledger.adopt(name, 900, 0, 1, 600)
        assert ledger.overdrawn_pages == 800
        ledger.check()

    def test_what_becomes_free_refills_the_reserve_then_the_pool(self) -> None:
        ledger = Ledger(1000, 100)
        ledger.adopt("a", 900, 0, 1, 850)
        ledger.adopt("b", 900, 0, 1, 350)
        ledger.settle("a", span(0, 50))
        assert inflate(ledger, "a", 120) == 100
        assert (ledger.reserve_left_pages, ledger.overdrawn_pages) == (100, 180)
        assert ledger.lend("b", 5).page_count == 5, "the reserve is there for who runs dry"
        assert inflate(ledger, "a", 200) == 5
        assert (ledger.overdrawn_pages, ledger.free_pages) == (0, 15)
        ledger.check()

    def test_who_leaves_pays_it_off(self) -> None:
        ledger = Ledger(1000, 100)
        ledger.adopt("a", 900, 0, 1, 850)
        ledger.adopt("b", 900, 0, 1, 350)
        ledger.remove("b")
        assert (ledger.overdrawn_pages, ledger.lent_pages, ledger.free_pages) == (0, 0, 50)
        ledger.check()

    def test_reservations_are_held_as_for_new_guests(self) -> None:
        ledger = Ledger(1000, 100)
        with pytest.raises(LedgerError, match="reservations"):
            ledger.adopt("g", 1000, 901, 1, 10)
        assert "g" not in ledger


class TestSettling:
    def test_a_known_balloon_is_kept_whatever_the_guest_says(self) -> None:
        ledger = running(quota=60)
        claimed = ledger.view("g").claimed
        assert ledger.settle("g", NOTHING) == claimed
        assert ledger.settle("g", span(0, 100)) == claimed
        assert ledger.settle("g", span(50, 40)) == claimed

    def test_an_adopted_guest_tells_which_frames(self) -> None:
        ledger = Ledger(1000, 100)
        ledger.adopt("g", 100, 0, 1, 60)
        inventory = span(3, 20) | span(50, 20)
        assert ledger.settle("g", inventory) == inventory
        assert ledger.view("g").claimed == inventory
        # Once told, it is the ledger's word again.
        assert ledger.settle("g", NOTHING) == inventory

    def test_it_tells_which_and_never_how_many(self) -> None:
        """Too many: the lowest stay. Too few: filled up from below. Beyond its size: ignored."""
        for told, held in (
            (span(10, 50), span(10, 40)),
            (span(10, 30), span(0, 40)),
            (span(80, 40), span(0, 20) | span(80, 20)),
            (NOTHING, span(0, 40)),
        ):
            ledger = Ledger(1000, 100)
            ledger.adopt("g", 100, 0, 1, 60)
            assert ledger.settle("g", told) == held
            assert ledger.view("g").quota_pages == 60

    def test_reports_are_void_after_a_reconnection_and_the_room_can_be_closed(self) -> None:
        ledger = running(quota=60)
        ledger.make_room("g", 10)
        ledger.report("g", span(40, 4))
        ledger.settle("g", ledger.view("g").claimed)
        assert ledger.view("g").pending == NOTHING
        with pytest.raises(LedgerError, match="not reported"):
            ledger.claim("g", span(40, 4))
        assert ledger.close_room("g") == 10


class TestInflating:
    def test_room_leaves_the_workload_and_stays_in_the_quota(self) -> None:
        ledger = running(quota=60)
        ledger.make_room("g", 10)
        ledger.make_room("g", 5)
        view = ledger.view("g")
        assert (view.quota_pages, view.room_pages, view.workload_pages) == (60, 15, 45)

    @pytest.mark.parametrize("pages", [0, -1, 51])
    def test_room_fits_what_the_workload_has(self, pages: int) -> None:
        ledger = running(quota=60)
        ledger.make_room("g", 10)
        with pytest.raises(LedgerError, match="no room"):
            ledger.make_room("g", pages)
        ledger.make_room("g", 50)

    def test_a_claim_takes_room_and_quota_alike(self) -> None:
        ledger = running(quota=60)
        ledger.make_room("g", 10)
        fresh = ledger.report("g", span(40, 10)).fresh
        assert ledger.claim("g", fresh.lowest(4)) == 0
        view = ledger.view("g")
        assert (view.quota_pages, view.room_pages, view.workload_pages) == (56, 6, 50)
        assert view.claimed == span(0, 44)
        assert view.pending == span(44, 6)
        assert ledger.free_pages == 900 - 56

    def test_closing_the_room_gives_the_rest_back_to_the_workload(self) -> None:
        ledger = running(quota=60)
        ledger.make_room("g", 10)
        ledger.claim("g", ledger.report("g", span(40, 4)).fresh)
        assert ledger.close_room("g") == 6
        assert ledger.close_room("g") == 0
        view = ledger.view("g")
        assert (view.quota_pages, view.workload_pages) == (56, 56)

    def test_room_of_pending_frames_stays_until_they_are_settled(self) -> None:
        """Else workload and locked frames together would exceed what the guest may use."""
        ledger = running(quota=60)
        ledger.make_room("g", 10)
        ledger.report("g", span(40, 4))
        assert ledger.close_room("g") == 6
        ledger.check()
        ledger.claim("g", span(40, 3))
        ledger.drop_report("g", span(43, 1))
        assert ledger.close_room("g") == 1
        assert ledger.view("g").workload_pages == ledger.view("g").quota_pages == 57

    def test_a_report_is_sorted(self) -> None:
        """Claimed are 0-39, pending 50-59, its own the others; there are none from 100 on."""
        ledger = running(quota=60)
        ledger.make_room("g", 13)
        ledger.report("g", span(50, 10))
        report = ledger.report("g", span(35, 70))
        assert report.fresh == span(40, 3)
        assert report.out_of_range == span(100, 5)
        assert report.already_taken == span(35, 5) | span(50, 10)
        assert report.without_room == span(43, 7) | span(60, 40)
        assert ledger.view("g").pending == span(40, 3) | span(50, 10)

    def test_without_room_nothing_can_be_reported(self) -> None:
        ledger = running(quota=60)
        report = ledger.report("g", span(40, 5))
        assert (report.fresh, report.without_room) == (NOTHING, span(40, 5))

    def test_rejected_frames_are_the_guests_again_and_can_be_reported_again(self) -> None:
        ledger = running(quota=60)
        ledger.make_room("g", 10)
        ledger.report("g", span(40, 10))
        ledger.drop_report("g", span(40, 4) | span(0, 10))
        assert ledger.view("g").pending == span(44, 6)
        assert ledger.view("g").claimed == span(0, 40)
        assert ledger.report("g", span(40, 4)).fresh == span(40, 4)

    def test_only_reported_frames_are_claimed(self) -> None:
        ledger = running(quota=60)
        ledger.make_room("g", 10)
        ledger.report("g", span(40, 4))
        before = ledger.view("g")
        for frames in (span(40, 5), span(0, 1), span(200, 1)):
            with pytest.raises(LedgerError, match="not reported"):
                ledger.claim("g", frames)
        assert ledger.view("g") == before


class TestDeflating:
    def test_a_grant_returns_the_highest_frames(self) -> None:
        ledger = running(quota=60)
        assert ledger.grant("g", 10) == span(30, 10)
        view = ledger.view("g")
        assert (view.quota_pages, view.claimed) == (70, span(0, 30))

    def test_a_grant_fits_what_is_free_and_what_the_guest_gave_up(self) -> None:
        ledger = Ledger(100, 10)
        ledger.admit("a", 80, 0, 1)
        ledger.admit("b", 80, 0, 1)
        for pages in (81, -1):
            with pytest.raises(LedgerError, match="claimed ones"):
                ledger.grant("a", pages)
        ledger.grant("a", 80)
        with pytest.raises(LedgerError, match="11 pages are wanted, 10 are free"):
            ledger.grant("b", 11)
        assert ledger.grant("b", 10).page_count == 10
        assert ledger.grant("b", 0) == NOTHING
        # The reserve is nobody's to grant.
        assert (ledger.free_pages, ledger.reserve_left_pages) == (0, 10)

    def test_a_loan_takes_free_pages_first(self) -> None:
        ledger = Ledger(100, 30)
        ledger.admit("g", 200, 0, 1)
        ledger.grant("g", 50)
        assert ledger.lend("g", 15).page_count == 15
        assert ledger.view("g").lent_pages == 0
        assert ledger.lend("g", 15).page_count == 15
        assert ledger.view("g").lent_pages == 10
        assert (ledger.free_pages, ledger.reserve_left_pages) == (0, 20)
        assert ledger.lend("g", 5).page_count == 5
        assert ledger.view("g").lent_pages == 15
        ledger.check()

    def test_a_loan_ends_where_the_reserve_ends(self) -> None:
        ledger = in_debt(a=20)
        assert ledger.lend("a", 1000).page_count == 30
        assert ledger.lend("a", 1) == NOTHING
        assert ledger.reserve_left_pages == 0
        ledger.check()

    def test_a_loan_ends_at_the_full_size(self) -> None:
        ledger = running(quota=95)
        assert ledger.lend("g", 10) == span(0, 5)
        assert ledger.lend("g", 10) == NOTHING
        assert ledger.view("g").lent_pages == 0

    @pytest.mark.parametrize("pages", [0, -5])
    def test_a_loan_of_nothing_is_nothing(self, pages: int) -> None:
        ledger = running(quota=50)
        assert ledger.lend("g", pages) == NOTHING
        assert ledger.view("g").quota_pages == 50

    def test_a_failed_grant_is_undone(self) -> None:
        ledger = running(quota=60)
        before = ledger.view("g")
        ledger.take_back("g", ledger.grant("g", 10))
        assert ledger.view("g") == before

    def test_a_failed_loan_is_undone_with_its_own_debt(self) -> None:
        """Not with that of "a", though that comes first by name."""
        ledger = in_debt(a=20, b=5)
        before = ledger.view("a"), ledger.view("b")
        ledger.take_back("b", ledger.lend("b", 20))
        assert (ledger.view("a"), ledger.view("b")) == before
        ledger.check()

    def test_only_the_guests_own_frames_are_taken_back(self) -> None:
        ledger = running(quota=60)
        before = ledger.view("g")
        for frames in (span(39, 1), span(100, 1), span(39, 2)):
            with pytest.raises(LedgerError, match="not granted"):
                ledger.take_back("g", frames)
        ledger.make_room("g", 51)
        with pytest.raises(LedgerError, match="does not have"):
            ledger.take_back("g", span(40, 10))
        ledger.take_back("g", span(40, 9))
        assert ledger.view("g").quota_pages == before.quota_pages - 9

    def test_a_lying_report_does_not_stop_the_undoing(self) -> None:
        """It reports frames that it was never told it has back; they must not be owned twice."""
        ledger = running(quota=60)
        ledger.make_room("g", 10)
        granted = ledger.grant("g", 10)
        ledger.report("g", granted.highest(4) | span(40, 6))
        ledger.take_back("g", granted)
        ledger.check()
        assert ledger.view("g").pending == span(40, 6)
        with pytest.raises(LedgerError, match="not reported"):
            ledger.claim("g", granted.highest(4))


class TestDebt:
    def test_what_a_claim_frees_repays_the_reserve_first(self) -> None:
        ledger = in_debt(a=20)
        assert inflate(ledger, "full", 15) == 15
        assert (ledger.free_pages, ledger.view("a").lent_pages) == (0, 5)
        assert inflate(ledger, "full", 15) == 5
        assert (ledger.free_pages, ledger.lent_pages) == (10, 0)
        ledger.check()

    def test_what_a_leaving_guest_frees_repays_the_reserve_first(self) -> None:
        ledger = in_debt(a=20, b=25)
        assert ledger.remove("full") == 30
        assert [ledger.view(name).lent_pages for name in "ab"] == [0, 15]
        assert ledger.free_pages == 0
        ledger.check()

    def test_a_loan_undone_repays_nobody_elses_debt(self) -> None:
        ledger = in_debt(a=20)
        loan = ledger.lend("full", 10)
        ledger.take_back("full", loan)
        assert (ledger.view("full").lent_pages, ledger.view("a").lent_pages) == (0, 20)

    def test_the_givers_own_debt_is_struck_off_first_then_the_others_by_name(self) -> None:
        ledger = in_debt(c=5, b=10, a=15)
        assert inflate(ledger, "b", 12) == 12
        assert [ledger.view(name).lent_pages for name in "abc"] == [13, 0, 5]
        assert inflate(ledger, "full", 14) == 14
        assert [ledger.view(name).lent_pages for name in "abc"] == [0, 0, 4]

    def test_a_debtor_that_shrinks_to_nothing_owes_nothing(self) -> None:
        """Were another's debt paid first, b would leave a debt that nothing covers."""
        ledger = in_debt(a=25, b=25)
        assert inflate(ledger, "b", 35) == 35
        assert (ledger.view("a").lent_pages, ledger.view("b").lent_pages) == (15, 0)
        assert ledger.remove("b") == 0
        assert (ledger.lent_pages, ledger.free_pages) == (15, 0)
        ledger.check()

    def test_a_debtor_that_leaves_takes_its_debt_along(self) -> None:
        ledger = in_debt(a=20, b=15)
        assert ledger.remove("a") == 30
        # 20 of its 30 pages are the reserve's again, the other 10 pay for b.
        assert ledger.view("b").lent_pages == 5
        assert (ledger.reserve_left_pages, ledger.free_pages) == (45, 0)
        ledger.check()

    def test_an_overcommitted_host_that_was_adopted_pays_back(self) -> None:
        ledger = Ledger(100, 20)
        ledger.adopt("a", 80, 0, 1, 60)
        ledger.adopt("b", 80, 0, 1, 40)
        assert ledger.view("b").lent_pages == 20
        ledger.remove("a")
        assert (ledger.lent_pages, ledger.free_pages) == (0, 40)
        ledger.check()


class TestCheck:
    """Books that no call can make: the ledger's own entries are falsified."""

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("claimed", span(61, 40)),
            ("pending", span(100, 1)),
            ("pending", span(39, 1)),
            ("pending", span(40, 11)),
            ("room_pages", -1),
            ("room_pages", 61),
            ("lent_pages", -1),
            ("lent_pages", 61),
            ("reservation_pages", -1),
            ("reservation_pages", 101),
        ],
    )
    def test_an_inconsistent_entry_is_named(self, field: str, value: object) -> None:
        ledger = Ledger(160, 100)
        ledger.admit("g", 100, 0, 1)
        ledger.grant("g", 60)
        ledger.make_room("g", 10)
        ledger.check()
        setattr(ledger._accounts["g"], field, value)
        with pytest.raises(LedgerError, match="g: its entry is inconsistent"):
            ledger.check()

    def test_lent_more_than_the_reserve(self) -> None:
        ledger = running(quota=60)
        ledger._accounts["g"].lent_pages = 60
        ledger.reserve_pages = 59
        with pytest.raises(LedgerError, match="60 pages lent of 59"):
            ledger.check()

    @pytest.mark.parametrize(
        ("overdrawn", "said"),
        [(-1, "-1 pages are overdrawn"), (1, "841 pages are free, 1 are owed or overdrawn")],
    )
    def test_overdrawn_where_nothing_is_too_much(self, overdrawn: int, said: str) -> None:
        ledger = running(quota=60)
        ledger.overdrawn_pages = overdrawn
        with pytest.raises(LedgerError, match=said):
            ledger.check()

    def test_quotas_beyond_the_pool(self) -> None:
        ledger = running(quota=60)
        ledger.pool_pages = 159
        with pytest.raises(LedgerError, match="exceed the pool by 1 pages"):
            ledger.check()

    def test_free_pages_while_something_is_owed(self) -> None:
        ledger = running(quota=60)
        ledger._accounts["g"].lent_pages = 1
        with pytest.raises(LedgerError, match="841 pages are free, 1 are owed"):
            ledger.check()

    def test_reservations_that_cannot_be_kept(self) -> None:
        ledger = running(quota=60)
        ledger.set_reservation("g", 60)
        ledger.check()
        ledger.pool_pages = 160
        ledger.check()
        ledger._accounts["g"].reservation_pages = 61
        with pytest.raises(LedgerError, match="reservations of 61 pages"):
            ledger.check()
