"""Decisions about a target: each rule by example, then what holds for any guest."""

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from guest_driver.balloon import (
    CACHE_FLOOR_BYTES,
    Decision,
    Wish,
    decide,
    spare,
)
from guest_driver.demand import DemandEstimate, next_estimate, pinned_bytes
from guest_driver.vitals import GuestMemory
from protocol.guest_floor import floor_bytes
from protocol.units import GIB, MIB, bytes_of, pages_of
from protocol.vocabulary import MAX_TEXT_CHARS, RefusalReason, Urgency

ASSIGNED = 256 * MIB  # floor: 104 MiB
MEMORY = GuestMemory(
    limit_bytes=256 * MIB,
    usage_bytes=150 * MIB,
    anon_bytes=60 * MIB,
    shmem_bytes=0,
    file_bytes=80 * MIB,
    mapped_file_bytes=2 * MIB,
    inactive_file_bytes=40 * MIB,
    active_file_bytes=40 * MIB,
    inactive_anon_bytes=55 * MIB,
    active_anon_bytes=5 * MIB,
    dirty_bytes=0,
    writeback_bytes=0,
    unevictable_bytes=0,
    kernel_bytes=10 * MIB,
    refault_bytes_total=0,
    refault_anon_bytes_total=0,
    swap_used_bytes=0,
    swap_free_bytes=0,
    oom_kills_total=0,
)
SHORT, CALM = Urgency.SHORT, Urgency.CALM


def _estimate(memory: GuestMemory) -> DemandEstimate:
    return next_estimate(None, memory, 0.0, ASSIGNED)


def _decide(
    memory: GuestMemory,
    wish_mib: int,
    urgency: Urgency,
    estimate: DemandEstimate | None = None,
    *,
    current_mib: int = 0,
    assigned_bytes: int = ASSIGNED,
    swap_mib: int = 0,
) -> Decision:
    current = pages_of(current_mib * MIB)
    wish = Wish(current + pages_of(wish_mib * MIB), current, urgency, pages_of(swap_mib * MIB))
    return decide(wish, memory, estimate or _estimate(memory), assigned_bytes)


def _changed(**fields: int | float | None) -> GuestMemory:
    return dataclasses.replace(MEMORY, **fields)  # type: ignore[arg-type]


def test_a_wish_within_the_spare_is_offered_whole_and_without_reason() -> None:
    assert _decide(MEMORY, 100, CALM) == Decision(pages_of(100 * MIB))


def test_calm_gives_what_is_beyond_demand() -> None:
    # working set 110 + headroom 5.5; margin 5.12
    decision = _decide(MEMORY, 200, CALM)
    assert bytes_of(decision.pages) == pytest.approx((256 - 115.5 - 5.12) * MIB, abs=8192)
    assert decision.reason is RefusalReason.WORKING_SET
    assert decision.detail == "116 MiB of 256 MiB is needed"


@pytest.mark.parametrize("urgency", Urgency)
def test_what_lies_above_the_wall_can_not_be_given(urgency: Urgency) -> None:
    def spare_bytes(wall_bytes: int | None) -> int:
        memory = dataclasses.replace(MEMORY, wall_bytes=wall_bytes)
        return spare(memory, _estimate(memory), 0, ASSIGNED, urgency).spare_bytes

    assert spare_bytes(None) == spare_bytes(256 * MIB) == spare_bytes(248 * MIB) + 8 * MIB


def test_short_gives_active_cache_too_down_to_the_cache_floor() -> None:
    decision = _decide(MEMORY, 200, SHORT)
    # The guest's floor comes first here...
    assert bytes_of(decision.pages) == (256 - 104) * MIB
    assert decision.reason is RefusalReason.FLOOR
    assert decision.detail == "104 MiB stay with a guest of 256 MiB"
    # ... and with more anonymous memory the cache's floor: in use 200 of which 80 is cache
    fuller = _changed(usage_bytes=200 * MIB, anon_bytes=110 * MIB, inactive_anon_bytes=105 * MIB)
    decision = _decide(fuller, 200, SHORT)
    kept = 120 * MIB + CACHE_FLOOR_BYTES
    assert bytes_of(decision.pages) == pytest.approx((256 - 5.12) * MIB - kept, abs=8192)
    assert decision.reason is RefusalReason.WORKING_SET
    assert decision.detail == "124 MiB of 256 MiB is in use and cannot be dropped"


def test_programs_keep_their_mapped_text() -> None:
    mapped = _changed(usage_bytes=200 * MIB, anon_bytes=110 * MIB, mapped_file_bytes=30 * MIB)
    assert "150 MiB of 256 MiB is in use" in _decide(mapped, 200, SHORT).detail


def test_anonymous_memory_is_not_offered_for_swap_unless_that_is_allowed() -> None:
    memory = _changed(
        limit_bytes=200 * MIB,
        usage_bytes=196 * MIB,
        anon_bytes=186 * MIB,
        inactive_file_bytes=0,
        active_file_bytes=0,
        swap_free_bytes=GIB,
    )
    for urgency in Urgency:
        decision = _decide(memory, 10, urgency)
        assert decision.pages == 0
        assert decision.reason is RefusalReason.WORKING_SET
        assert decision.detail.endswith("may not swap") is (urgency is SHORT)


# 190 of 200 MiB in use, 150 of them anonymous and 40 idle cache.
FULL = _changed(
    limit_bytes=200 * MIB,
    usage_bytes=190 * MIB,
    anon_bytes=150 * MIB,
    inactive_anon_bytes=150 * MIB,
    active_anon_bytes=0,
    inactive_file_bytes=40 * MIB,
    active_file_bytes=0,
    kernel_bytes=0,
    swap_free_bytes=128 * MIB,
)
WITHOUT_SWAPPING_MIB = 200 - 154 - 4  # 4 of the cache stay, and a margin of 4


def _full(memory: GuestMemory, wish_mib: int, urgency: Urgency, swap_mib: int) -> Decision:
    estimate = _estimate(memory)
    return _decide(memory, wish_mib, urgency, estimate, assigned_bytes=200 * MIB, swap_mib=swap_mib)


def test_a_full_guest_does_not_swap_for_its_balloon() -> None:
    decision = _full(FULL, 100, SHORT, 0)
    assert (decision.pages, decision.swap_pages) == (pages_of(WITHOUT_SWAPPING_MIB * MIB), 0)
    assert decision.reason is RefusalReason.WORKING_SET
    assert decision.detail == (
        "154 MiB of 200 MiB is in use and cannot be dropped, and its balloon may not swap"
    )


def test_where_it_is_allowed_the_rest_comes_from_swap() -> None:
    decision = _full(FULL, 90, SHORT, 100)
    assert bytes_of(decision.pages) == 90 * MIB
    assert bytes_of(decision.swap_pages) == (90 - WITHOUT_SWAPPING_MIB) * MIB
    assert decision.reason is None
    assert decision.detail == "48 MiB are swapped out for it"


def test_no_more_is_swapped_than_is_allowed() -> None:
    decision = _full(FULL, 100, SHORT, 10)
    assert bytes_of(decision.pages) == (WITHOUT_SWAPPING_MIB + 10) * MIB
    assert bytes_of(decision.swap_pages) == 10 * MIB
    assert decision.reason is RefusalReason.WORKING_SET
    assert decision.detail.endswith("; 10 MiB are swapped out for it")


def test_no_more_is_swapped_than_there_is_swap_left() -> None:
    decision = _full(dataclasses.replace(FULL, swap_free_bytes=12 * MIB), 100, SHORT, 100)
    assert bytes_of(decision.swap_pages) == (12 - 4) * MIB
    assert decision.reason is RefusalReason.NO_SWAP
    assert "only 8 MiB of swap are left for it" in decision.detail


@pytest.mark.parametrize("left_bytes", [0, 4 * MIB, None])
def test_without_swap_left_it_refuses_and_says_so(left_bytes: int | None) -> None:
    full = dataclasses.replace(
        FULL, swap_free_bytes=left_bytes, usage_bytes=199 * MIB, anon_bytes=190 * MIB
    )
    full = dataclasses.replace(full, inactive_anon_bytes=190 * MIB, inactive_file_bytes=4 * MIB)
    decision = _full(full, 100, SHORT, 100)
    assert (decision.pages, decision.swap_pages) == (0, 0)
    assert decision.reason is RefusalReason.NO_SWAP
    assert decision.detail.endswith("and no swap is left for it")


def test_swapping_is_for_when_memory_is_short() -> None:
    assert _full(FULL, 90, CALM, 100) == _full(FULL, 90, CALM, 0)


def test_cache_goes_before_anything_is_swapped() -> None:
    assert _full(FULL, WITHOUT_SWAPPING_MIB, SHORT, 100) == _full(
        FULL, WITHOUT_SWAPPING_MIB, SHORT, 0
    )


def test_locked_memory_is_not_offered_for_swap() -> None:
    locked = dataclasses.replace(FULL, inactive_anon_bytes=20 * MIB, unevictable_bytes=130 * MIB)
    decision = _full(locked, 100, SHORT, 100)
    assert bytes_of(decision.swap_pages) == 20 * MIB
    assert decision.reason is RefusalReason.WORKING_SET


def test_a_guest_that_is_over_its_margin_swaps_for_that_as_well() -> None:
    """Nothing is to spare before 6 MiB have gone: they are part of what has to be swapped."""
    over = dataclasses.replace(
        FULL, usage_bytes=202 * MIB, inactive_anon_bytes=196 * MIB, inactive_file_bytes=0
    )
    decision = _full(over, 20, SHORT, 100)
    assert bytes_of(decision.pages) == 20 * MIB
    assert bytes_of(decision.swap_pages) == 26 * MIB


def test_the_floor_holds_whatever_may_be_swapped() -> None:
    decision = _full(dataclasses.replace(FULL, swap_free_bytes=GIB), 150, SHORT, 500)
    assert bytes_of(decision.pages) == 200 * MIB - floor_bytes(200 * MIB)
    assert decision.reason is RefusalReason.FLOOR
    assert decision.detail.endswith("are swapped out for it")


def test_where_there_is_swap_active_cache_stays() -> None:
    with_swap = _decide(_changed(swap_free_bytes=GIB), 200, SHORT)
    without = _decide(MEMORY, 200, SHORT)
    assert with_swap.pages < without.pages
    assert _decide(_changed(swap_free_bytes=None), 200, SHORT).pages == with_swap.pages


def test_dirty_pages_and_writeback_are_no_quick_gift() -> None:
    fuller = {"usage_bytes": 200 * MIB, "anon_bytes": 110 * MIB}
    clean = _decide(_changed(**fuller), 200, SHORT)
    dirty = _decide(_changed(**fuller, dirty_bytes=30 * MIB, writeback_bytes=MIB), 200, SHORT)
    assert clean.pages - dirty.pages == pages_of(31 * MIB)


def test_refaulting_keeps_all_cache_in_calm_and_not_when_short() -> None:
    first = _estimate(MEMORY)
    memory = _changed(refault_bytes_total=10 * MIB)
    estimate = next_estimate(first, memory, 0.25, ASSIGNED)
    decision = _decide(memory, 200, CALM, estimate)
    assert decision.reason is RefusalReason.REFAULTING
    assert "evicted page cache is being read again" in decision.detail
    assert bytes_of(decision.pages) <= (256 - 150 - 10) * MIB
    assert _decide(memory, 150, SHORT, estimate).pages == pages_of(150 * MIB)


def test_refaulting_keeps_cache_even_where_the_demand_is_low() -> None:
    # The assigned size bounds a demand: it does not bound what the cache is worth
    estimate = dataclasses.replace(
        _estimate(MEMORY), demand_bytes=0, recent_refault_bytes=10.0 * MIB
    )
    decision = _decide(MEMORY, 200, CALM, estimate)
    assert bytes_of(decision.pages) <= (256 - 150) * MIB
    assert decision.reason is RefusalReason.REFAULTING


def test_figures_that_do_not_fit_together_are_read_as_more_in_use() -> None:
    # lists read after usage: by them 10 MiB are in use, by the anonymous figures 130
    odd = _changed(inactive_file_bytes=140 * MIB, active_file_bytes=0, anon_bytes=120 * MIB)
    decision = _decide(odd, 200, SHORT)
    assert bytes_of(decision.pages) <= (256 - 130) * MIB
    assert decision.reason is RefusalReason.WORKING_SET


def test_a_swapping_guest_gives_nothing() -> None:
    memory = _changed(swap_used_bytes=20 * MIB)
    estimate = next_estimate(_estimate(MEMORY), memory, 0.25, ASSIGNED)
    for urgency in Urgency:
        decision = _decide(memory, 10, urgency, estimate, swap_mib=100)
        assert (decision.pages, decision.reason) == (0, RefusalReason.SWAPPING)
        assert decision.detail == "20 MiB were swapped in the last second"


def test_a_guest_that_was_just_killed_into_gives_nothing() -> None:
    memory = _changed(oom_kills_total=1)
    killed = next_estimate(_estimate(MEMORY), memory, 1.0, ASSIGNED)
    estimate = next_estimate(killed, memory, 4.0, ASSIGNED)
    for urgency in Urgency:
        decision = _decide(memory, 10, urgency, estimate)
        assert (decision.pages, decision.reason) == (0, RefusalReason.PRESSURE)
        assert decision.detail == "a task was killed for lack of memory 3 s ago"


@pytest.mark.parametrize(
    ("percent", "urgency", "gives"),
    [(0.0, CALM, True), (5.0, CALM, False), (5.0, SHORT, True), (40.0, SHORT, False)],
)
def test_stalling_guests_give_nothing(percent: float, urgency: Urgency, gives: bool) -> None:
    decision = _decide(_changed(pressure_full_avg10=percent), 10, urgency)
    assert (decision.pages > 0) is gives
    if not gives:
        assert decision.reason is RefusalReason.PRESSURE


def test_at_the_target_or_beyond_it_nothing_is_to_be_done() -> None:
    for target in (100, 50):
        decision = decide(Wish(target, 100, SHORT), MEMORY, _estimate(MEMORY), ASSIGNED)
        assert (decision.pages, decision.reason) == (0, RefusalReason.AT_TARGET)


def test_a_single_page_is_offered_when_it_is_all_that_is_wished() -> None:
    one_page = decide(Wish(1, 0, SHORT), MEMORY, _estimate(MEMORY), ASSIGNED)
    assert one_page == Decision(1)


def test_half_a_mib_of_spare_is_refused_to_a_large_wish_only() -> None:
    kept = 70 * MIB + CACHE_FLOOR_BYTES
    assigned = 118 * MIB  # floor 67 MiB
    limit = next(
        size
        for size in range(kept, assigned, 4096)
        if size - kept - max(2 * MIB, 0.02 * size) >= MIB / 2
    )
    memory = _changed(limit_bytes=limit, usage_bytes=limit)
    memory = dataclasses.replace(
        memory, inactive_file_bytes=limit - 70 * MIB, active_file_bytes=0, anon_bytes=60 * MIB
    )
    decision = _decide(memory, 10, SHORT, assigned_bytes=assigned)
    assert (decision.pages, decision.reason) == (0, RefusalReason.WORKING_SET)
    few = decide(Wish(100, 0, SHORT), memory, _estimate(memory), assigned)
    assert few == Decision(100)


def test_the_floor_counts_what_the_balloon_has_already() -> None:
    idle = _changed(limit_bytes=None, usage_bytes=20 * MIB, anon_bytes=10 * MIB)
    idle = dataclasses.replace(idle, inactive_anon_bytes=0, active_anon_bytes=0, kernel_bytes=0)
    decision = _decide(idle, 100, SHORT, current_mib=150)
    assert (decision.pages, decision.reason) == (pages_of(2 * MIB), RefusalReason.FLOOR)


@pytest.mark.parametrize(
    ("assigned_mib", "floor_mib"),
    [(16, 16), (64, 40), (128, 72), (256, 104), (512, 168), (1024, 232), (2048, 360), (8192, 744)],
)
def test_the_floors(assigned_mib: int, floor_mib: int) -> None:
    assert floor_bytes(assigned_mib * MIB) == floor_mib * MIB


def test_nothing_known_gives_nothing() -> None:
    for urgency in Urgency:
        blind = _decide(GuestMemory(), 10, urgency)
        assert (blind.pages, blind.reason) == (0, RefusalReason.WORKING_SET)
        assert blind.detail == "how much memory is in use is unknown"


# What holds for any guest

FIELDS = [item.name for item in dataclasses.fields(GuestMemory)]
PRESSURES = ["pressure_some_avg10", "pressure_full_avg10"]
amounts = {name: st.none() | st.integers(0, 2 * GIB) for name in FIELDS if name not in PRESSURES}
pressures = {name: st.none() | st.floats(0, 100) for name in PRESSURES}
memories = st.builds(GuestMemory, **amounts, **pressures)
assigned_sizes = st.integers(1, 2 * GIB)
pages = st.integers(0, pages_of(2 * GIB))
wishes = st.builds(Wish, pages, pages, st.sampled_from(Urgency))


@st.composite
def consistent_memories(draw: st.DrawFn) -> GuestMemory:
    """A guest whose figures fit together, as the kernel's do but for its counters' steps."""
    anon, inactive, active, kernel, free = (draw(st.integers(0, 256)) * MIB for _ in range(5))
    files = inactive + active
    return GuestMemory(
        limit_bytes=anon + files + kernel + free,
        usage_bytes=anon + files + kernel,
        anon_bytes=anon,
        inactive_anon_bytes=anon,
        active_anon_bytes=0,
        inactive_file_bytes=inactive,
        active_file_bytes=active,
        dirty_bytes=draw(st.integers(0, files)),
        writeback_bytes=0,
        kernel_bytes=kernel,
        swap_free_bytes=draw(st.sampled_from([0, GIB])),
        refault_bytes_total=0,
    )


@given(wishes, memories, memories, assigned_sizes)
def test_offers_are_bounded_by_wish_floor_and_spare(
    wish: Wish, before: GuestMemory, memory: GuestMemory, assigned_bytes: int
) -> None:
    estimate = next_estimate(None, before, 0.0, assigned_bytes)
    estimate = next_estimate(estimate, memory, 0.25, assigned_bytes)
    decision = decide(wish, memory, estimate, assigned_bytes)
    assert 0 <= decision.pages <= wish.missing_pages
    assert (decision.reason is None) == (0 < decision.pages == wish.missing_pages)
    assert bool(decision.detail) == (decision.reason is not None)
    assert len(decision.detail) <= MAX_TEXT_CHARS
    if decision.pages:
        after_pages = wish.current_pages + decision.pages
        assert assigned_bytes - bytes_of(after_pages) >= floor_bytes(assigned_bytes)
        found = spare(memory, estimate, wish.current_pages, assigned_bytes, wish.urgency)
        assert bytes_of(decision.pages) <= found.spare_bytes
        # what can't be dropped stays, whatever the figures
        pinned = pinned_bytes(memory)
        assert pinned is not None
        if memory.limit_bytes is not None:
            assert pinned <= memory.limit_bytes - bytes_of(decision.pages)


@given(wishes, consistent_memories(), st.integers(0, 512), st.booleans())
def test_more_free_memory_never_means_less_offered(
    wish: Wish, memory: GuestMemory, more_mib: int, by_limit: bool
) -> None:
    assert memory.limit_bytes is not None
    assert memory.usage_bytes is not None
    assert memory.anon_bytes is not None
    if by_limit:
        freer = dataclasses.replace(memory, limit_bytes=memory.limit_bytes + more_mib * MIB)
    else:
        less = min(more_mib * MIB, memory.anon_bytes)
        freer = dataclasses.replace(
            memory,
            usage_bytes=memory.usage_bytes - less,
            anon_bytes=memory.anon_bytes - less,
            inactive_anon_bytes=memory.anon_bytes - less,
        )
    assigned_bytes = 2 * GIB
    offers = [
        decide(wish, each, next_estimate(None, each, 0.0, assigned_bytes), assigned_bytes).pages
        for each in (memory, freer)
    ]
    assert offers[0] <= offers[1]


UNKNOWABLE = ["usage_bytes", "inactive_file_bytes", "active_file_bytes", "dirty_bytes"]
UNKNOWABLE += ["writeback_bytes", "swap_free_bytes"]


@given(wishes, consistent_memories(), st.sampled_from(UNKNOWABLE))
def test_knowing_less_never_means_offering_more(
    wish: Wish, memory: GuestMemory, unknown: str
) -> None:
    assigned_bytes = 2 * GIB
    blinder = dataclasses.replace(memory, **{unknown: None})  # type: ignore[arg-type]
    offers = [
        decide(wish, each, next_estimate(None, each, 0.0, assigned_bytes), assigned_bytes).pages
        for each in (blinder, memory)
    ]
    assert offers[0] <= offers[1]


@given(wishes, consistent_memories())
def test_shortage_never_gets_less_than_calm(wish: Wish, memory: GuestMemory) -> None:
    # With swap the active cache is kept when short, and by demand when calm
    assume(memory.swap_free_bytes == 0)
    estimate = next_estimate(None, memory, 0.0, 2 * GIB)
    calm, short = (
        decide(dataclasses.replace(wish, urgency=urgency), memory, estimate, 2 * GIB).pages
        for urgency in (CALM, SHORT)
    )
    assert calm <= short
