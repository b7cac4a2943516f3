"""FrameStates against a plain list, and what it must not touch."""

import mmap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_driver.frame_states import FrameState, FrameStates
from guest_driver.memory import map_shared
from protocol.page_frames import PageFrames

PAGES = 1500  # two whole groups of 512 and a rest
FREE = FrameState.FREE

frame_lists = st.one_of(
    st.builds(PageFrames.span, st.integers(0, 1000), st.integers(0, 500)),
    st.sets(st.integers(0, PAGES - 1)).map(lambda pfns: PageFrames.from_frames(sorted(pfns))),
    st.just(PageFrames.from_frames(range(0, PAGES, 3))),  # scattered: the indexed write
)
marks = st.lists(st.tuples(frame_lists, st.sampled_from(FrameState)), max_size=8)


def resident_kib(states: mmap.mmap) -> int:
    """KiB of pages that the shared mapping holds. It is the only one of its size."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    sizes = [index for index, line in enumerate(lines) if line.split()[0] == "Size:"]
    (mine,) = (i for i in sizes if int(lines[i].split()[1]) == len(states) // 1024)
    return int(next(line for line in lines[mine:] if line.startswith("Rss:")).split()[1])


@settings(max_examples=80, deadline=None)
@given(marks=marks, pages=st.integers(0, PAGES + 10))
def test_answers_are_those_of_a_plain_list(
    marks: list[tuple[PageFrames, FrameState]], pages: int
) -> None:
    model = [FREE] * PAGES
    with FrameStates(map_shared(PAGES)) as states:
        for frames, state in marks:
            states.mark(frames, state)
            for pfn in frames.to_array():
                model[pfn] = state
        for state in FrameState:
            expected = [pfn for pfn in range(PAGES) if model[pfn] is state]
            assert states.frames_in(state) == PageFrames.from_frames(expected)
            assert states.count(state) == len(expected)
            for frames, _ in marks:
                assert states.all_in(frames, state) == all(
                    model[pfn] is state for pfn in frames.to_array()
                )
        free = [pfn for pfn in range(PAGES) if model[pfn] is FREE]
        assert states.lowest_free(pages, 0) == PageFrames.from_frames(free[:pages])
        groups = [
            start for start in (0, 512) if all(s is FREE for s in model[start : start + 512])
        ][: pages // 512]
        huge = PageFrames.from_frames([start + k for start in groups for k in range(512)])
        assert states.lowest_free(pages, 9) == huge


def test_frames_outside_the_arena() -> None:
    with FrameStates(map_shared(PAGES)) as states:
        for state in FrameState:
            with pytest.raises(ValueError, match="outside the arena"):
                states.mark(PageFrames.span(PAGES - 1, 2), state)
        assert not states.all_in(PageFrames.span(PAGES - 1, 2), *FrameState)
        assert states.count(FREE) == PAGES


def test_what_was_never_used_is_never_touched() -> None:
    memory = map_shared(23 << 20)
    with FrameStates(memory) as states:
        states.mark(PageFrames.span(10, 5000), FrameState.RESERVED)
        states.mark(PageFrames.span(1 << 20, 1 << 20), FREE)
        assert states.lowest_free(1 << 20, 0).page_count == 1 << 20
        assert states.lowest_free(1 << 20, 9).page_count == 1 << 20
        assert states.count(FREE) == (23 << 20) - 5000
        assert states.frames_in(FREE).range_count == 2
        assert states.all_in(PageFrames.span(6000, 1 << 20), FREE)
        assert resident_kib(memory) <= 8


def test_closed_states_are_unmapped_and_refuse() -> None:
    memory = map_shared(PAGES)
    states = FrameStates(memory)
    kept = states.frames_in(FREE)
    states.close()
    states.close()
    assert memory.closed
    assert kept.page_count == PAGES  # what was returned is no view
    for use in (
        lambda: states.count(FREE),
        lambda: states.lowest_free(1, 9),
        lambda: states.mark(PageFrames.span(0, 1), FREE),
    ):
        with pytest.raises(ValueError, match="closed"):
            use()
