"""The simulated guests decide as the guest driver does: the two are asked the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenarios_for_tests import scenario, steps

from guest_driver import balloon, demand
from guest_driver.demand import DemandEstimate, next_estimate
from guest_driver.vitals import GuestMemory
from host_agent.simulator import guests as simulated
from host_agent.simulator.guests import SECOND_US, Guests, Traits
from protocol.units import MIB, bytes_of, pages_of
from protocol.vocabulary import Urgency

ASSIGNED_MIB = 1024


def test_the_thresholds_are_the_drivers() -> None:
    assert bytes_of(simulated.HEADROOM_MIN_PAGES) == demand.HEADROOM_MIN_BYTES
    assert simulated.HEADROOM_SHARE == demand.HEADROOM_SHARE
    assert simulated.REFAULT_WINDOW_S == demand.REFAULT_WINDOW_S
    assert bytes_of(simulated.NOISE_PAGES) == demand.REFAULT_NOISE_BYTES == demand.SWAP_NOISE_BYTES
    assert simulated.AT_LIMIT_SHARE == demand.AT_LIMIT_SHARE
    assert simulated.GROWTH_LOOKAHEAD_S == demand.GROWTH_LOOKAHEAD_S
    assert simulated.DEMAND_HALF_LIFE_S == demand.DEMAND_HALF_LIFE_S
    assert simulated.OOM_KILL_CAUTION_S == demand.OOM_KILL_CAUTION_S
    assert bytes_of(simulated.MARGIN_MIN_PAGES) == balloon.MARGIN_MIN_BYTES
    assert simulated.MARGIN_SHARE == balloon.MARGIN_SHARE
    assert bytes_of(simulated.CACHE_FLOOR_PAGES) == balloon.CACHE_FLOOR_BYTES
    assert simulated.MIN_OFFER_PAGES == balloon.MIN_OFFER_PAGES


class Pair:
    """A simulated guest, and a driver that is shown what the guest's kernel would tell."""

    def __init__(self, cache_share: float, swap_mib: int = 0) -> None:
        made = scenario(
            {
                "memory_mib": ASSIGNED_MIB,
                "trace": steps((0, 0)),
                "cache_share": cache_share,
                "swap": swap_mib * MIB,
            }
        )
        self._swap = swap_mib * 256
        self._swapped_in = 0
        self.guests = Guests(Traits.of(made))
        self.estimate: DemandEstimate | None = None
        self.memory = GuestMemory()
        self._refaults = 0.0
        self._clock_s = 0.0
        self.look(0, ASSIGNED_MIB, 0.0)  # the driver is there before the workload

    def look(self, need_mib: int, quota_mib: int, elapsed_s: float) -> None:
        quota = np.array([pages_of(quota_mib * MIB)])
        needs = np.array([pages_of(need_mib * MIB)])
        self._clock_s += elapsed_s
        swapped_before = int(self.guests.swapped[0])
        self.guests.wants(needs, np.array([True]), round(self._clock_s * SECOND_US))
        self.guests.settle(quota)
        self.guests.look(quota, elapsed_s)
        missing = int((self.guests.want_cache - self.guests.cache)[0])
        # The workload reads its cache once in a window: so much fades to the same sum.
        self._refaults += missing * (1 - np.exp(-elapsed_s / demand.REFAULT_WINDOW_S))
        swapped = int(self.guests.swapped[0])
        back = swapped * (1 - np.exp(-elapsed_s / demand.REFAULT_WINDOW_S))
        self._swapped_in += max(0, swapped_before - swapped) + int(back)
        held, cache = int(self.guests.held[0]), int(self.guests.cache[0])
        self.memory = GuestMemory(
            limit_bytes=quota_mib * MIB,
            usage_bytes=bytes_of(held + cache),
            anon_bytes=bytes_of(held),
            active_anon_bytes=bytes_of(held),
            inactive_anon_bytes=0,
            active_file_bytes=bytes_of(cache),
            inactive_file_bytes=0,
            file_bytes=bytes_of(cache),
            dirty_bytes=0,
            writeback_bytes=0,
            unevictable_bytes=0,
            kernel_bytes=0,
            shmem_bytes=0,
            swap_used_bytes=bytes_of(swapped),
            swap_free_bytes=bytes_of(self._swap - swapped),
            refault_anon_bytes_total=bytes_of(self._swapped_in),
            refault_bytes_total=bytes_of(int(self._refaults)),
        )
        assigned_bytes = ASSIGNED_MIB * MIB
        self.estimate = next_estimate(self.estimate, self.memory, self._clock_s, assigned_bytes)

    def demands(self) -> tuple[int, int]:
        assert self.estimate is not None
        assert self.estimate.demand_bytes is not None
        return int(self.guests.says_demand()[0]), -(-self.estimate.demand_bytes // 4096)

    def offers(
        self, target_mib: int, quota_mib: int, urgency: Urgency, *, may_swap: bool
    ) -> tuple[int, int]:
        ours = self.guests.offers(
            np.array([quota_mib * 256]),
            np.array([target_mib * 256]),
            np.array([urgency is Urgency.SHORT]),
            np.array([may_swap]),
            round(self._clock_s * SECOND_US),
        )
        current = ASSIGNED_MIB * 256 - quota_mib * 256
        assert self.estimate is not None
        swap_pages = self._swap if may_swap else 0
        wish = balloon.Wish(ASSIGNED_MIB * 256 - target_mib * 256, current, urgency, swap_pages)
        theirs = balloon.decide(wish, self.memory, self.estimate, ASSIGNED_MIB * MIB)
        return int(ours[0]), theirs.pages


LOOKS = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(150, 1024), st.sampled_from((0.2, 1.0, 5.0))),
    min_size=1,
    max_size=12,
)
PAGES_APART = 16
"""The first refaults fade differently from the kernel's counter, and pages are whole here."""


SHARES = st.sampled_from((0.0, 0.3, 1.0))
SWAPS_MIB = st.sampled_from((0, 100, 1000))


@given(looks=LOOKS, cache_share=SHARES, swap_mib=SWAPS_MIB)
def test_the_demand_is_the_drivers(
    looks: list[tuple[int, int, float]], cache_share: float, swap_mib: int
) -> None:
    pair = Pair(cache_share, swap_mib)
    for need_mib, quota_mib, elapsed_s in looks:
        pair.look(need_mib, quota_mib, elapsed_s)
        ours, theirs = pair.demands()
        assert ours == pytest.approx(theirs, abs=PAGES_APART)


@given(
    looks=LOOKS,
    cache_share=SHARES,
    swap_mib=SWAPS_MIB,
    part=st.floats(0, 1),
    urgency=st.sampled_from(list(Urgency)),
    may_swap=st.booleans(),
)
def test_the_offer_is_the_drivers(
    looks: list[tuple[int, int, float]],
    cache_share: float,
    swap_mib: int,
    part: float,
    urgency: Urgency,
    may_swap: bool,
) -> None:
    pair = Pair(cache_share, swap_mib)
    for need_mib, quota_mib, elapsed_s in looks:
        pair.look(need_mib, quota_mib, elapsed_s)
    quota_mib = looks[-1][1]
    target_mib = int(part * quota_mib)
    ours, theirs = pair.offers(target_mib, quota_mib, urgency, may_swap=may_swap)
    assert ours == pytest.approx(theirs, abs=PAGES_APART)


def test_offers_where_the_balloon_may_swap() -> None:
    made = scenario(
        {"memory_mib": 1024, "trace": steps((0, 0)), "cache_share": 0.0, "swap": 300 * MIB},
        {"memory_mib": 1024, "trace": steps((0, 0)), "cache_share": 0.0},
    )
    guests = Guests(Traits.of(made))
    quota = np.full(2, 1024 * 256)
    guests.wants(np.full(2, 1024 * 256), np.ones(2, np.bool_), 0)
    guests.settle(quota)
    guests.look(quota, 1.0)
    no, yes = np.zeros(2, np.bool_), np.ones(2, np.bool_)
    target = np.full(2, 500 * 256)
    offers = guests.offers(quota, target, yes, yes, 0)
    assert offers[0] // 256 == 300 - 4 - 21, "less what is kept of the swap, less the margin"
    assert offers[1] == 0
    assert guests.offers(quota, target, yes, no, 0).tolist() == [0, 0]
    assert guests.offers(quota, target, no, yes, 0).tolist() == [0, 0], "only if memory is short"
