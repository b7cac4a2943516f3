"""Page frame lists against Python's own sets: nothing lost, nothing twice, always sorted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import page_frames
from protocol.page_frames import MAX_PFN, PageFrames

# A small range of numbers makes adjacent and overlapping ranges likely.
pfn_sets = st.sets(st.integers(0, 60), max_size=40)


def frames_of(pfns: set[int]) -> PageFrames:
    return PageFrames.from_frames(np.array(sorted(pfns, reverse=True), dtype=np.int64))


def set_of(frames: PageFrames) -> set[int]:
    """The frames as a set, after checking that the list is canonical."""
    pfns = frames.to_array().tolist()
    assert pfns == sorted(set(pfns))
    assert frames.page_count == len(frames) == len(pfns)
    assert bool(frames) == bool(pfns)
    assert (frames.starts[1:] > frames.stops[:-1]).all(), "adjacent or overlapping ranges"
    assert (frames.counts > 0).all()
    return set(pfns)


@pytest.mark.parametrize("few_ranges", [0, page_frames.FEW_RANGES, 1000])
@given(a=pfn_sets, b=pfn_sets)
def test_set_operations_equal_those_of_sets(few_ranges: int, a: set[int], b: set[int]) -> None:
    """With numpy alone, as it is, and with plain Python alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_frames, "FEW_RANGES", few_ranges)
        check_set_operations(a, b)


def check_set_operations(a: set[int], b: set[int]) -> None:
    left, right = frames_of(a), frames_of(b)
    assert PageFrames.from_wire(left.to_wire()) == left
    assert set_of(left | right) == a | b
    assert set_of(left - right) == a - b
    assert set_of(left & right) == a & b
    assert left.overlaps(right) == bool(a & b)
    assert left.issuperset(right) == (a >= b)
    assert (left == right) == (a == b)


@given(pfn_sets)
def test_equal_sets_are_equal_and_hash_alike_however_made(pfns: set[int]) -> None:
    frames = frames_of(pfns)
    again = PageFrames.empty()
    for pfn in pfns:
        again |= PageFrames.span(pfn, 1)
    assert again == frames
    assert hash(again) == hash(frames)
    assert frames != pfns


@given(pfn_sets)
def test_wire_form_comes_back(pfns: set[int]) -> None:
    frames = frames_of(pfns)
    data = frames.to_wire()
    assert len(data) == 8 * frames.range_count
    assert PageFrames.from_wire(data) == frames


@given(st.binary(max_size=64))
def test_any_bytes_are_a_list_or_a_value_error(data: bytes) -> None:
    try:
        frames = PageFrames.from_wire(data)
    except ValueError:
        return
    set_of_is_canonical = (frames.starts[1:] > frames.stops[:-1]).all()
    assert set_of_is_canonical
    assert frames.to_wire() == data


@given(pfn_sets, st.integers(-3, 50))
def test_lowest_and_highest(pfns: set[int], pages: int) -> None:
    ordered = sorted(pfns)
    wanted = max(pages, 0)
    assert set_of(frames_of(pfns).lowest(pages)) == set(ordered[:wanted])
    expected = set(ordered[len(ordered) - wanted :]) if wanted < len(ordered) else pfns
    assert set_of(frames_of(pfns).highest(pages)) == expected


@given(pfn_sets, st.integers(1, 20))
def test_chunks_are_a_partition_in_order(pfns: set[int], max_pages: int) -> None:
    pieces = list(frames_of(pfns).chunks(max_pages))
    assert [pfn for piece in pieces for pfn in piece.to_array().tolist()] == sorted(pfns)
    assert all(len(piece) == max_pages for piece in pieces[:-1])


def test_adjacent_ranges_are_merged() -> None:
    frames = PageFrames.from_ranges([0, 4, 10], [4, 6, 1])
    assert list(frames.ranges()) == [(0, 11)]
    assert frames.range_count == 1


@pytest.mark.parametrize(
    ("starts", "counts", "complaint"),
    [
        ([0], [0], "empty or negative"),
        ([0], [-1], "empty or negative"),
        ([-1], [2], "outside"),
        ([MAX_PFN], [2], "outside"),
        ([MAX_PFN + 1], [1], "outside"),
        ([0], [2**62], "outside"),
        ([5, 0], [1, 1], "unsorted or overlap"),
        ([0, 3], [4, 1], "unsorted or overlap"),
        ([0, 0], [1, 1], "unsorted or overlap"),
        ([0, 1], [1], "do not fit"),
    ],
)
def test_bad_ranges_are_refused(starts: list[int], counts: list[int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PageFrames.from_ranges(starts, counts)


def test_a_number_that_stands_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        PageFrames.from_frames([3, 5, 3])


def test_the_wire_form_is_canonical() -> None:
    adjacent = np.array([[0, 4], [4, 4]], dtype="<u4").tobytes()
    with pytest.raises(ValueError, match="not merged"):
        PageFrames.from_wire(adjacent)
    with pytest.raises(ValueError, match="no whole ranges"):
        PageFrames.from_wire(b"1234567")


def test_a_list_is_immutable() -> None:
    frames = PageFrames.span(3, 4)
    with pytest.raises(ValueError, match="read-only"):
        frames.starts[0] = 9
    with pytest.raises(ValueError, match="read-only"):
        frames.counts[0] = 9


def test_the_ends_of_the_number_range() -> None:
    last = PageFrames.span(MAX_PFN, 1)
    assert PageFrames.from_wire(last.to_wire()) == last
    whole = PageFrames.span(0, MAX_PFN + 1)
    assert len(whole - last) == MAX_PFN
    with pytest.raises(ValueError, match="no wire form"):
        whole.to_wire()
    with pytest.raises(ValueError, match="at least one page"):
        next(last.chunks(0))
    assert PageFrames.span(7, 0) == PageFrames.empty()
