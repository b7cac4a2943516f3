"""Page frame lists: sets of page frame numbers as sorted, disjoint ranges.

A balloon is mostly contiguous, so a list is kept as ranges (start, count) and every operation costs
the number of ranges, not of frames: a balloon of 1 GiB in one piece is one range. The worst case,
every second frame, is no larger on the wire than the plain list would be.

A `PageFrames` is immutable and always canonical: ranges sorted by start, disjoint, and never
adjacent (adjacent ones are merged), so that equal sets are equal objects. It knows nothing of who
owns a frame or what state it is in.
"""

import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Final, Self

import numpy as np
import numpy.typing as npt

PfnArray = npt.NDArray[np.int64]

MAX_PFN: Final = 2**32 - 1
"""Highest page frame number: a u4 on the wire, 16 TiB of 4 KiB frames."""

WIRE_RANGE_BYTES: Final = 8
"""Bytes of one range on the wire: start and count, each a little-endian u4."""

FEW_RANGES: Final = 8
"""Up to so many ranges, plain Python is several times faster than numpy's calls of 1 to 5 us; a
balloon's lists usually have one or two."""

_WIRE_RANGE: Final = struct.Struct("<II")


class PageFrames:
    """A set of page frame numbers (`pfn`, index of a 4 KiB frame from 0), immutable.

    Build one with `empty`, `span`, `from_ranges`, `from_frames` or `from_wire`.
    """

    __slots__ = ("_counts", "_page_count", "_starts")

    _starts: PfnArray
    _counts: PfnArray
    _page_count: int

    def __init__(self, starts: PfnArray, counts: PfnArray) -> None:
        """Take canonical arrays as they are: for this module's own use."""
        starts.flags.writeable = False
        counts.flags.writeable = False
        self._starts = starts
        self._counts = counts
        self._page_count = int(counts.sum())

    @classmethod
    def empty(cls) -> Self:
        """The list without a frame."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64))

    @classmethod
    def span(cls, start: int, count: int) -> Self:
        """The `count` frames from `start` on; `count` may be 0.

        Raises ValueError when the span leaves 0..MAX_PFN or `count` is negative.
        """
        if count == 0 and start >= 0:
            return cls.empty()
        if not 0 <= start <= MAX_PFN or not 1 <= count <= MAX_PFN + 1 - start:
            raise ValueError(f"{count} page frames from {start} on leave 0..{MAX_PFN}")
        return cls._of([(start, start + count)])

    @classmethod
    def _of(cls, spans: list[tuple[int, int]]) -> Self:
        """Frames of canonical (start, stop) pairs."""
        if len(spans) == 1:
            start, stop = spans[0]
            return cls(np.array((start,), np.int64), np.array((stop - start,), np.int64))
        pairs = np.array(spans, np.int64).reshape(-1, 2)
        return cls(pairs[:, 0].copy(), pairs[:, 1] - pairs[:, 0])

    @classmethod
    def from_ranges(cls, starts: npt.ArrayLike, counts: npt.ArrayLike) -> Self:
        """Frames of ranges that are sorted and disjoint; adjacent ranges are merged.

        `starts` and `counts` have the same shape (n,). Raises ValueError when a count is below 1,
        a range leaves 0..MAX_PFN, or the ranges are unsorted or overlap: whoever sends such a list
        has a bug or lies, and sorting it here would hide that.
        """
        start = np.array(starts, dtype=np.int64, ndmin=1)
        count = np.array(counts, dtype=np.int64, ndmin=1)
        if start.shape != count.shape or start.ndim != 1:
            raise ValueError(f"{start.shape} starts do not fit {count.shape} counts")
        if not start.size:
            return cls(start, count)
        if count.min() < 1:
            raise ValueError("a range of page frames is empty or negative")
        if start.min() < 0 or start.max() > MAX_PFN or count.max() > MAX_PFN + 1:
            raise ValueError(f"a page frame number is outside 0..{MAX_PFN}")
        stop = start + count
        if stop.max() > MAX_PFN + 1:
            raise ValueError(f"a page frame number is outside 0..{MAX_PFN}")
        gap = start[1:] - stop[:-1]
        if gap.size and gap.min() < 0:
            raise ValueError("ranges of page frames are unsorted or overlap")
        if gap.size and gap.min() == 0:
            first = np.concatenate(([True], gap > 0))
            last = np.concatenate((gap > 0, [True]))
            start, count = start[first], stop[last] - start[first]
        return cls(start, count)

    @classmethod
    def from_frames(cls, frames: npt.ArrayLike) -> Self:
        """Frames of page frame numbers, shape (n,), in any order.

        Raises ValueError for a number that stands twice or lies outside 0..MAX_PFN.
        """
        pfns = np.sort(np.array(frames, dtype=np.int64, ndmin=1))
        if pfns.size > 1 and not np.diff(pfns).all():
            raise ValueError("a page frame number stands twice")
        return cls.from_ranges(pfns, np.ones_like(pfns))

    @classmethod
    def from_wire(cls, data: bytes) -> Self:
        """Frames of `to_wire`'s bytes. Raises ValueError for bytes that it can't have made."""
        if len(data) % WIRE_RANGE_BYTES:
            raise ValueError(f"{len(data)} bytes are no whole ranges of {WIRE_RANGE_BYTES} bytes")
        if len(data) == WIRE_RANGE_BYTES:
            start, count = _WIRE_RANGE.unpack(data)
            if count == 0:
                raise ValueError("a range of page frames is empty")
            return cls.span(start, count)
        pairs = np.frombuffer(data, dtype="<u4").reshape(-1, 2).astype(np.int64)
        frames = cls.from_ranges(pairs[:, 0], pairs[:, 1])
        if frames.range_count != len(pairs):
            raise ValueError("adjacent ranges of page frames are not merged")
        return frames

    def to_wire(self) -> bytes:
        """Wire form: for each range its start and count, each a little-endian u4.

        A list of 2**32 frames in one range has no wire form (its count is no u4): ValueError.
        """
        if self._page_count > MAX_PFN and self._counts.max() > MAX_PFN:
            raise ValueError("a range of 2**32 page frames has no wire form")
        if self._starts.size <= FEW_RANGES:
            return b"".join(_WIRE_RANGE.pack(start, count) for start, count in self.ranges())
        return np.stack((self._starts, self._counts), axis=1).astype("<u4").tobytes()

    @property
    def starts(self) -> PfnArray:
        """First frame of each range, shape (range_count,), ascending, read-only."""
        return self._starts

    @property
    def counts(self) -> PfnArray:
        """Frames in each range, shape (range_count,), read-only."""
        return self._counts

    @property
    def stops(self) -> PfnArray:
        """One past the last frame of each range, shape (range_count,)."""
        return self._starts + self._counts

    @property
    def page_count(self) -> int:
        """How many frames there are."""
        return self._page_count

    @property
    def range_count(self) -> int:
        """How many ranges hold them."""
        return int(self._starts.size)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Each range as (start, count)."""
        return zip(self._starts.tolist(), self._counts.tolist(), strict=True)

    def to_array(self) -> PfnArray:
        """Every page frame number, shape (page_count,), ascending."""
        # The k-th frame of all is k plus how far its range stands from where the ranges before it
        # would have put it.
        shift = self._starts - (np.cumsum(self._counts) - self._counts)
        pfns: PfnArray = np.arange(self._page_count) + np.repeat(shift, self._counts)
        return pfns

    def union(self, other: "PageFrames") -> "PageFrames":
        """Frames that are in either."""
        if not other:
            return self
        if not self:
            return other
        return self._combine(other, np.logical_or, lambda mine, theirs: mine or theirs)

    def difference(self, other: "PageFrames") -> "PageFrames":
        """Frames of this list that are not in `other`."""
        if not other or not self:
            return self
        return self._combine(other, np.greater, lambda mine, theirs: mine and not theirs)

    def intersection(self, other: "PageFrames") -> "PageFrames":
        """Frames that are in both."""
        if not self or not other:
            return PageFrames.empty()
        return self._combine(other, np.logical_and, lambda mine, theirs: mine and theirs)

    __or__ = union
    __sub__ = difference
    __and__ = intersection

    def overlaps(self, other: "PageFrames") -> bool:
        """Whether a frame is in both."""
        if not self or not other:
            return False
        # The last range of `other` that starts before each of ours ends is the only one that can
        # reach furthest into it, since ranges are disjoint and sorted.
        last = np.searchsorted(other._starts, self.stops, side="left") - 1
        reach = other.stops[np.maximum(last, 0)]
        return bool(((last >= 0) & (reach > self._starts)).any())

    def issuperset(self, other: "PageFrames") -> bool:
        """Whether every frame of `other` is in this list."""
        return not other - self

    def lowest(self, pages: int) -> "PageFrames":
        """The `pages` lowest frames, or all of them if there are fewer."""
        if pages >= self._page_count:
            return self
        return self._slice(0, max(pages, 0))

    def highest(self, pages: int) -> "PageFrames":
        """The `pages` highest frames, or all of them if there are fewer."""
        if pages >= self._page_count:
            return self
        return self._slice(self._page_count - max(pages, 0), self._page_count)

    def chunks(self, max_pages: int) -> Iterator["PageFrames"]:
        """The list in pieces of `max_pages` frames (the last may be smaller), lowest first.

        Raises ValueError if `max_pages` is below 1.
        """
        if max_pages < 1:
            raise ValueError("a chunk holds at least one page")
        for first in range(0, self._page_count, max_pages):
            yield self._slice(first, min(first + max_pages, self._page_count))

    def _slice(self, first: int, stop: int) -> "PageFrames":
        """The frames with index first..stop-1 in ascending order."""
        if self._starts.size == 1:
            start = int(self._starts[0])
            return PageFrames.span(start + first, stop - first)
        after = np.cumsum(self._counts)
        before = after - self._counts
        low = np.clip(first - before, 0, self._counts)
        high = np.clip(stop - before, 0, self._counts)
        kept = high > low
        return PageFrames((self._starts + low)[kept], (high - low)[kept])

    def _combine(
        self, other: "PageFrames", keep: np.ufunc, keep_one: Callable[[bool, bool], bool]
    ) -> "PageFrames":
        """Sweep over both lists' borders; `keep(in_self, in_other)` says which stretches stay.

        `keep_one` is the same for single values.
        """
        if self._starts.size + other._starts.size <= FEW_RANGES:
            return PageFrames._of(_swept(self._spans(), other._spans(), keep_one))
        borders = np.concatenate((self._starts, self.stops, other._starts, other.stops))
        mine = np.zeros(borders.size, np.int64)
        theirs = np.zeros(borders.size, np.int64)
        mine[: 2 * self.range_count] = np.repeat((1, -1), self.range_count)
        theirs[2 * self.range_count :] = np.repeat((1, -1), other.range_count)
        order = np.argsort(borders, kind="stable")
        borders = borders[order]
        kept = keep(np.cumsum(mine[order]) > 0, np.cumsum(theirs[order]) > 0)[:-1]
        count = np.diff(borders)
        kept &= count > 0
        return PageFrames.from_ranges(borders[:-1][kept], count[kept])

    def _spans(self) -> list[tuple[int, int]]:
        return [(start, start + count) for start, count in self.ranges()]

    def __len__(self) -> int:
        return self._page_count

    def __bool__(self) -> bool:
        return self._page_count > 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PageFrames):
            return NotImplemented
        return np.array_equal(self._starts, other._starts) and np.array_equal(
            self._counts, other._counts
        )

    def __hash__(self) -> int:
        return hash((self._starts.tobytes(), self._counts.tobytes()))

    def __repr__(self) -> str:
        shown = ", ".join(f"{start}+{count}" for start, count in list(self.ranges())[:4])
        more = ", ..." if self.range_count > 4 else ""
        return f"<PageFrames {self._page_count} pages in {self.range_count} ranges: {shown}{more}>"


def _swept(
    mine: list[tuple[int, int]],
    theirs: list[tuple[int, int]],
    keep: Callable[[bool, bool], bool],
) -> list[tuple[int, int]]:
    """Canonical spans of the stretches that `keep`; for few spans."""
    borders = sorted({border for span in (*mine, *theirs) for border in span})
    result: list[tuple[int, int]] = []
    for start, stop in pairwise(borders):
        in_mine = any(first <= start < last for first, last in mine)
        in_theirs = any(first <= start < last for first, last in theirs)
        if not keep(in_mine, in_theirs):
            continue
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return result
