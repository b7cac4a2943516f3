"""The demand estimator: its terms one by one, then in a loop with a guest that has a cache."""

import dataclasses
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_driver.demand import (
    DEMAND_HALF_LIFE_S,
    GROWTH_LOOKAHEAD_S,
    OOM_KILL_CAUTION_S,
    DemandEstimate,
    headroom_bytes,
    next_estimate,
    pinned_bytes,
    working_set_bytes,
)
from guest_driver.vitals import GuestMemory
from protocol.units import GIB, MIB

CALM = GuestMemory(
    limit_bytes=200 * MIB,
    usage_bytes=120 * MIB,
    anon_bytes=60 * MIB,
    inactive_anon_bytes=58 * MIB,
    active_anon_bytes=2 * MIB,
    kernel_bytes=5 * MIB,
    unevictable_bytes=0,
    inactive_file_bytes=40 * MIB,
    active_file_bytes=15 * MIB,
    refault_bytes_total=0,
    oom_kills_total=0,
)


def _demand(estimate: DemandEstimate) -> int:
    assert estimate.demand_bytes is not None
    return estimate.demand_bytes


def _settled(memory: GuestMemory, looks: int = 40, step_s: float = 0.25) -> DemandEstimate:
    estimate = None
    for look in range(looks):
        estimate = next_estimate(estimate, memory, look * step_s, GIB)
    assert estimate is not None
    return estimate


def test_steady_input_gives_steady_output() -> None:
    first = next_estimate(None, CALM, 0.0, GIB)
    assert first.working_set_bytes == 80 * MIB
    assert first.demand_bytes == 84 * MIB
    assert _settled(CALM).demand_bytes == first.demand_bytes


def test_headroom_is_a_share_with_a_minimum() -> None:
    assert headroom_bytes(10 * MIB) == 4 * MIB
    assert headroom_bytes(200 * MIB) == 10 * MIB


def test_locked_anonymous_memory_is_not_counted_twice() -> None:
    locked = GuestMemory(
        usage_bytes=70 * MIB,
        anon_bytes=60 * MIB,
        unevictable_bytes=60 * MIB,
        inactive_anon_bytes=0,
        active_anon_bytes=0,
        kernel_bytes=10 * MIB,
    )
    assert working_set_bytes(locked) == 70 * MIB


def test_the_working_set_is_never_below_what_is_pinned() -> None:
    # usage and the lists are read one after the other: they need not fit together
    odd = dataclasses.replace(CALM, usage_bytes=50 * MIB)
    assert working_set_bytes(odd) == pinned_bytes(odd) == 65 * MIB


def test_demand_rises_at_once_and_falls_by_half_in_its_half_life() -> None:
    estimate = next_estimate(None, CALM, 0.0, GIB)
    grown = dataclasses.replace(CALM, usage_bytes=180 * MIB, anon_bytes=120 * MIB)
    peak = next_estimate(estimate, grown, 0.25, GIB)
    assert peak.demand_bytes == 147 * MIB
    estimate = next_estimate(peak, CALM, 0.25 + DEMAND_HALF_LIFE_S, GIB)
    assert estimate.demand_bytes == pytest.approx((147 + 84) / 2 * MIB, abs=MIB / 10)
    # ... whatever the number of looks in between
    stepped = peak
    for look in range(1, 41):
        stepped = next_estimate(stepped, CALM, 0.25 + look * DEMAND_HALF_LIFE_S / 40, GIB)
    assert _demand(stepped) == pytest.approx(_demand(estimate), abs=MIB / 10)
    assert _demand(next_estimate(stepped, CALM, 300.0, GIB)) == pytest.approx(84 * MIB, rel=1e-3)


def test_refaults_raise_demand_above_usage_by_as_much_as_came_back() -> None:
    calm = _settled(CALM)
    back = dataclasses.replace(CALM, refault_bytes_total=30 * MIB)
    estimate = next_estimate(calm, back, calm.clock_s + 0.25, GIB)
    assert estimate.is_refaulting
    assert _demand(estimate) == pytest.approx((120 + 30) * 1.05 * MIB, rel=0.01)
    later = next_estimate(estimate, back, estimate.clock_s + 10.0, GIB)
    assert not later.is_refaulting


def test_a_few_refaults_are_noise() -> None:
    calm = _settled(CALM)
    few = dataclasses.replace(CALM, refault_bytes_total=MIB // 2)
    estimate = next_estimate(calm, few, calm.clock_s + 0.25, GIB)
    assert not estimate.is_refaulting
    assert estimate.demand_bytes == calm.demand_bytes


def test_counters_of_a_new_cgroup_start_afresh() -> None:
    old = _settled(dataclasses.replace(CALM, refault_bytes_total=GIB, oom_kills_total=3))
    new = next_estimate(old, CALM, old.clock_s + 0.25, GIB)
    assert new.recent_refault_bytes >= 0
    back = dataclasses.replace(CALM, refault_bytes_total=20 * MIB)
    assert next_estimate(new, back, new.clock_s + 0.25, GIB).is_refaulting


def test_anonymous_growth_counts_ahead_at_the_limit_only() -> None:
    grown = dataclasses.replace(CALM, anon_bytes=80 * MIB)
    calm = _settled(CALM)
    away = next_estimate(calm, grown, calm.clock_s + 0.25, GIB)
    assert away.demand_bytes == _settled(grown).demand_bytes
    at_limit = dataclasses.replace(grown, limit_bytes=121 * MIB)
    estimate = next_estimate(calm, at_limit, calm.clock_s + 0.25, GIB)
    assert _demand(estimate) - _demand(away) >= 20 * MIB * GROWTH_LOOKAHEAD_S


def test_growth_counts_at_the_wall_as_well() -> None:
    """On version 2 a guest is slowed at its wall: it never comes near its limit by itself."""
    grown = dataclasses.replace(CALM, anon_bytes=80 * MIB)
    at_wall = dataclasses.replace(grown, limit_bytes=128 * MIB, wall_bytes=121 * MIB)
    calm = _settled(CALM)
    estimate = next_estimate(calm, at_wall, calm.clock_s + 0.25, GIB)
    assert _demand(estimate) - _demand(_settled(grown)) >= 20 * MIB * GROWTH_LOOKAHEAD_S


def test_what_comes_back_from_swap_is_wanted_on_top_at_the_limit_only() -> None:
    swapped = dataclasses.replace(CALM, swap_used_bytes=50 * MIB, refault_anon_bytes_total=0)
    calm = _settled(swapped)
    back = dataclasses.replace(swapped, refault_anon_bytes_total=20 * MIB)
    away = next_estimate(calm, back, calm.clock_s + 0.25, GIB)
    assert away.demand_bytes == calm.demand_bytes
    at_limit = dataclasses.replace(back, limit_bytes=121 * MIB)
    estimate = next_estimate(calm, at_limit, calm.clock_s + 0.25, GIB)
    assert _demand(estimate) - _demand(away) >= 20 * MIB
    # What went out is no need: nobody has asked for it yet.
    out = dataclasses.replace(swapped, swap_used_bytes=70 * MIB, limit_bytes=121 * MIB)
    assert next_estimate(calm, out, calm.clock_s + 0.25, GIB).demand_bytes == calm.demand_bytes


def test_demand_is_bounded_by_the_assigned_size_and_forgets_from_there() -> None:
    estimate = next_estimate(None, CALM, 0.0, 80 * MIB)
    assert estimate.demand_bytes == 80 * MIB
    assert estimate.remembered_bytes == 80 * MIB


def test_a_kill_is_remembered_for_a_while() -> None:
    calm = _settled(CALM)
    assert not calm.was_killed_recently
    killed = dataclasses.replace(CALM, oom_kills_total=1)
    estimate = next_estimate(calm, killed, calm.clock_s + 1, GIB)
    assert estimate.was_killed_recently
    assert estimate.oom_kill_age_s == 0
    later = next_estimate(estimate, killed, estimate.clock_s + OOM_KILL_CAUTION_S + 1, GIB)
    assert not later.was_killed_recently


def test_kills_before_the_first_look_are_old_news() -> None:
    old = dataclasses.replace(CALM, oom_kills_total=7, refault_bytes_total=GIB)
    estimate = next_estimate(None, old, 0.0, GIB)
    assert not estimate.was_killed_recently
    assert not estimate.is_refaulting


def test_growing_swap_is_swapping_and_old_swap_is_not() -> None:
    swapped = dataclasses.replace(CALM, swap_used_bytes=50 * MIB, refault_anon_bytes_total=0)
    calm = _settled(swapped)
    assert not calm.is_swapping
    out = dataclasses.replace(swapped, swap_used_bytes=60 * MIB)
    assert next_estimate(calm, out, calm.clock_s + 0.25, GIB).is_swapping
    back = dataclasses.replace(swapped, refault_anon_bytes_total=10 * MIB)
    assert next_estimate(calm, back, calm.clock_s + 0.25, GIB).is_swapping


def test_without_usage_there_is_no_estimate_but_the_memory_is_kept() -> None:
    calm = _settled(CALM)
    blind = next_estimate(calm, GuestMemory(), calm.clock_s + 0.25, GIB)
    assert (blind.demand_bytes, blind.working_set_bytes, blind.pinned_bytes) == (None, None, None)
    again = next_estimate(blind, CALM, calm.clock_s + 0.5, GIB)
    assert again.demand_bytes == calm.demand_bytes


def test_unknown_lists_count_as_used() -> None:
    memory = GuestMemory(usage_bytes=100 * MIB)
    assert next_estimate(None, memory, 0.0, GIB).demand_bytes == 105 * MIB


FIELDS = [item.name for item in dataclasses.fields(GuestMemory)]
looks = st.builds(GuestMemory, **{name: st.none() | st.integers(0, 4 * GIB) for name in FIELDS})


@given(st.lists(st.tuples(looks, st.floats(-1, 100)), max_size=8), st.integers(0, 4 * GIB))
def test_any_statistics_give_a_bounded_estimate(
    steps: list[tuple[GuestMemory, float]], assigned_bytes: int
) -> None:
    estimate: DemandEstimate | None = None
    clock_s = 0.0
    for memory, step_s in steps:
        clock_s += step_s
        estimate = next_estimate(estimate, memory, clock_s, assigned_bytes)
        assert (estimate.demand_bytes is None) == (memory.usage_bytes is None)
        if estimate.demand_bytes is not None:
            assert 0 <= estimate.demand_bytes <= assigned_bytes


@dataclass
class CachedGuest:
    """A guest that reads `hot` bytes of files round and round, with LRU replacement.

    A round that does not fit misses every page (the worst of LRU), and what was evicted and is
    read again counts as refaults. Pages of a round that fits become active at the second one.
    """

    anon_bytes: int
    hot_bytes: int
    quota_bytes: int
    rounds_per_s: float = 1.0
    cached_bytes: int = 0
    active_bytes: int = 0
    seen: bool = False
    refaults_bytes: float = 0.0
    history_bytes: list[int] = field(default_factory=list)

    def live(self, step_s: float) -> GuestMemory:
        room_bytes = max(0, self.quota_bytes - self.anon_bytes)
        if self.hot_bytes <= room_bytes:
            missing_bytes = self.hot_bytes - min(self.cached_bytes, self.hot_bytes)
            read_bytes = min(missing_bytes, int(self.hot_bytes * self.rounds_per_s * step_s))
            if self.seen:
                self.refaults_bytes += read_bytes
            self.cached_bytes = min(room_bytes, self.cached_bytes + read_bytes)
            if missing_bytes == 0:
                self.active_bytes, self.seen = self.hot_bytes, True
        else:
            if self.cached_bytes >= room_bytes or self.seen:
                self.refaults_bytes += self.hot_bytes * self.rounds_per_s * step_s
                self.seen = True
            self.cached_bytes = room_bytes
            self.active_bytes = min(self.active_bytes, room_bytes // 2)
        usage_bytes = self.anon_bytes + self.cached_bytes
        return GuestMemory(
            limit_bytes=self.quota_bytes,
            usage_bytes=usage_bytes,
            anon_bytes=self.anon_bytes,
            inactive_file_bytes=self.cached_bytes - self.active_bytes,
            active_file_bytes=self.active_bytes,
            refault_bytes_total=int(self.refaults_bytes),
        )


@pytest.mark.parametrize("rounds_per_s", [0.1, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("start_mib", [60, 100, 400])
def test_no_oscillation_when_quota_follows_demand(start_mib: int, rounds_per_s: float) -> None:
    guest = CachedGuest(
        anon_bytes=40 * MIB,
        hot_bytes=100 * MIB,
        quota_bytes=start_mib * MIB,
        rounds_per_s=rounds_per_s,
    )
    estimate: DemandEstimate | None = None
    for look in range(4 * 240):
        estimate = next_estimate(estimate, guest.live(0.25), look * 0.25, GIB)
        if look % 4 == 3:  # the host moves once a second, both ways
            guest.quota_bytes = max(16 * MIB, _demand(estimate))
            guest.history_bytes.append(guest.quota_bytes)
    last_minute = guest.history_bytes[-60:]
    assert max(last_minute) - min(last_minute) <= 2 * MIB
    assert min(last_minute) >= 140 * MIB  # enough for all that it uses
    assert max(last_minute) <= 160 * MIB  # and no more than headroom beyond


def test_in_calm_demand_falls_to_what_is_left_in_use() -> None:
    guest = CachedGuest(anon_bytes=120 * MIB, hot_bytes=20 * MIB, quota_bytes=200 * MIB)
    estimate: DemandEstimate | None = None
    demands = []
    for look in range(4 * 120):
        if look == 80:
            guest.anon_bytes = 30 * MIB
        estimate = next_estimate(estimate, guest.live(0.25), look * 0.25, GIB)
        demands.append(_demand(estimate))
    assert demands[79] >= 140 * MIB
    assert demands[-1] <= 55 * MIB
    falling = demands[80:]
    assert falling == sorted(falling, reverse=True)
    # slowly: no look gives up more than a few per cent
    assert max(a - b for a, b in pairwise(demands)) < 0.03 * demands[79]
