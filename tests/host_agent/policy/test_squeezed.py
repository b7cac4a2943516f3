"""squeezed by hand: gamma, the two phases, who does not give, and starts."""

from dataclasses import replace

import pytest
from mib_hosts import decide, host, mib, pages, rule, term, vm

from host_agent.ledger.snapshot import GuestSnapshot, HostSnapshot
from host_agent.policy.squeezed import Squeezed, SqueezedSettings
from protocol.units import MIB
from protocol.vocabulary import Urgency

HALF_MIB = 128
SQUEEZED = Squeezed()


def ranged(name: str, least: float, most: float, quota: float) -> GuestSnapshot:
    """A guest with a range, and an inaccuracy of half a MiB."""
    return vm(name, most, quota, least=least, inaccuracy_pages=HALF_MIB)


A, B = ranged("a", 100, 500, 500), ranged("b", 100, 300, 300)


class TestGamma:
    def test_every_guest_has_the_same_part_of_its_range(self) -> None:
        # free = 1000 - 800 = 200; freeable: 500 - 100 - 1 = 399 and 300 - 100 - 1 = 199.
        # goal 498: gamma = (200 + 399 + 199 - 498) / (400 + 200) = 0.5
        #   a = 100 + 0.5 * 400 = 300, b = 100 + 0.5 * 200 = 200
        decision = decide(Squeezed(SqueezedSettings(free_bytes=498 * MIB)), host(1000, A, B))
        assert mib(decision.plan) == {"a": 300, "b": 200}
        assert term(decision, "a", "gamma") == 0.5
        assert term(decision, "a", "phase") == "freeing"
        assert rule(decision, "a") == "freeing: down to its part of the range"
        assert decision.plan.urgency is Urgency.SHORT

    def test_with_memory_for_all_they_are_at_their_maximum(self) -> None:
        # gamma = (600 + 199 + 99 - 0) / 600, clamped to 1
        decision = decide(
            SQUEEZED, host(1000, ranged("a", 100, 500, 300), ranged("b", 100, 300, 200))
        )
        assert mib(decision.plan) == {"a": 500, "b": 300}
        assert term(decision, "a", "gamma") == 1.0
        assert rule(decision, "a") == "allocating: its part of the range"

    def test_more_than_there_is_leaves_the_minimum(self) -> None:
        decision = decide(Squeezed(SqueezedSettings(free_bytes=900 * MIB)), host(1000, A, B))
        assert mib(decision.plan) == {"a": 100, "b": 100}
        assert term(decision, "a", "gamma") == 0.0

    def test_within_its_inaccuracy_a_guest_is_where_it_should_be(self) -> None:
        near = ranged("b", 100, 300, 200.5)
        # free = 499.5 - (... ) : a at 300, b at 200.5, goal as above
        decision = decide(
            Squeezed(SqueezedSettings(free_bytes=498 * MIB)),
            host(1000, ranged("a", 100, 500, 300), near),
        )
        assert mib(decision.plan) == {"a": 300, "b": 200.5}
        assert rule(decision, "b") == "near enough to its target"


class TestPhases:
    def test_nobody_grows_while_somebody_has_to_give(self) -> None:
        # a at 500, b at 100, nothing free: gamma = (399 - 0) / 600 = 0.665
        #   a = 100 + 266 = 366, b would have 100 + 133 = 233
        squeezed = decide(SQUEEZED, host(600, A, ranged("b", 100, 300, 100)))
        assert mib(squeezed.plan) == {"a": 366, "b": 100}
        assert rule(squeezed, "b") == "others are freeing: it waits for the allocating phase"
        # When a has given, b gets its part: gamma = (134 + 265) / 600 = 0.665 as before.
        given = host(600, ranged("a", 100, 500, 366), ranged("b", 100, 300, 100))
        assert mib(decide(SQUEEZED, given, squeezed.memory, 1001.0).plan) == {"a": 366, "b": 233}


class TestWhoDoesNotGive:
    """a gives nothing; b could give."""

    POLICY = Squeezed(SqueezedSettings(free_bytes=498 * MIB))

    def test_left_out_after_5_s_and_uncooperative_after_20(self) -> None:
        snapshot = host(1000, A, B)
        memory = decide(self.POLICY, snapshot, None, 0.0).memory
        patient = decide(self.POLICY, snapshot, memory, 5.0)
        assert mib(patient.plan) == {"a": 300, "b": 200}
        # b gives; a has not for more than 5 s: b alone is squeezed further.
        #   gamma = (300 + 99 - 498) / 200 < 0: b down to its minimum. a still owes its 300.
        snapshot = host(1000, A, ranged("b", 100, 300, 200))
        stuck = decide(self.POLICY, snapshot, patient.memory, 5.1)
        assert mib(stuck.plan) == {"a": 300, "b": 100}
        assert rule(stuck, "a") == "no progress: left out of this run"
        # b has given all it has: the run is over, and a has another chance.
        snapshot = host(1000, A, ranged("b", 100, 300, 100))
        over = decide(self.POLICY, snapshot, stuck.memory, 6.0)
        again = decide(self.POLICY, snapshot, over.memory, 7.0)
        assert rule(again, "a") == "freeing: down to its part of the range"
        last = decide(self.POLICY, snapshot, again.memory, 20.1)
        assert rule(last, "a") == "uncooperative: left out until it gives something"
        # No new run helps it, but progress does.
        still = decide(self.POLICY, snapshot, last.memory, 21.0)
        assert rule(still, "a") == "uncooperative: left out until it gives something"
        gives = host(1000, ranged("a", 100, 500, 490), ranged("b", 100, 300, 100))
        back = decide(self.POLICY, gives, still.memory, 22.0)
        assert rule(back, "a") == "freeing: down to its part of the range"

    def test_who_gives_slowly_is_not_stuck(self) -> None:
        memory = decide(self.POLICY, host(1000, A, B), None, 0.0).memory
        for second in range(1, 30):
            snapshot = host(1000, ranged("a", 100, 500, 500 - second), B)
            decision = decide(self.POLICY, snapshot, memory, float(second))
            memory = decision.memory
            assert rule(decision, "a") == "freeing: down to its part of the range"


def test_a_guest_below_its_minimum_comes_first() -> None:
    # c starts: of its 200, 100 are promised at once. surplus = 200 + 199 - 100 = 299,
    # span = 400 + 100: gamma = 0.598; a = 100 + 239.2, c = 100 + 59.8
    starts = replace(ranged("c", 100, 200, 0), has_driver=False, startup_pages=pages(200))
    decision = decide(SQUEEZED, host(500, ranged("a", 100, 500, 300), starts))
    assert term(decision, "c", "gamma") == 0.598
    assert mib(decision.plan) == {"a": pages(339.2) / 256, "c": pages(159.8) / 256}


def test_one_that_cannot_be_moved_takes_no_part() -> None:
    stuck = replace(A, movable=False)
    # b alone: gamma = (0 + 199) / 200 = 0.995
    decision = decide(SQUEEZED, HostSnapshot(pages(900), pages(100), (stuck, B)))
    assert mib(decision.plan) == {"a": 500, "b": 299}


@pytest.mark.parametrize("wrong", [{"free_bytes": -1}, {"stuck_s": 0.0}, {"stuck_s": 30.0}])
def test_settings_out_of_bounds_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must|can't"):
        SqueezedSettings(**wrong)  # type: ignore[arg-type]
