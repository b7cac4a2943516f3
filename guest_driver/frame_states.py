"""What each of the guest's frames is doing: the driver's view of the bytes shared with the
pseudo-process.

One byte a frame, in memory shared by fork. The pseudo-process writes the outcome of a command, the
driver everything else, and the two never write the same byte at once: the driver marks a frame
PENDING before it sends a command about it, and leaves it alone until the reply.

    FREE -> PENDING -> RESERVED -> REPORTED -> PENDING -> CLAIMED -> FREE
              |  (no room: FREE)      (rejected: PENDING -> FREE)

The frames are taken lowest first, so all that matters lies below a high-water mark; beyond it every
frame is FREE and its byte is never looked at, since looking would allocate the page it is in.
"""

import mmap
from enum import IntEnum
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from guest_driver import pseudo_process
from protocol.page_frames import PageFrames
from protocol.units import PAGES_PER_HUGE_PAGE

_SCATTERED_RANGES = 64
"""From so many ranges on, one indexed write beats a slice for each."""


class FrameState(IntEnum):
    """State of a frame, as it stands in the shared byte."""

    FREE = pseudo_process.FREE
    """The guest's: no page of the balloon is in it."""
    RESERVED = pseudo_process.RESERVED
    """A real page, populated and locked by the pseudo-process, charged to the guest."""
    REPORTED = pseudo_process.REPORTED
    """Reserved, and named to the host in a report that is still open."""
    CLAIMED = pseudo_process.CLAIMED
    """The host's: its page was dropped and the quota lowered, or is about to be."""
    PENDING = pseudo_process.PENDING
    """A command about it is under way."""


class FrameStates:
    """States of the frames 0..len-1. Takes over `memory` (length: one byte a frame, all FREE).

    For one thread: the driver's. `close` (or leaving the `with` block) ends every use of it.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._view: npt.NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8)
        self.arena_pages = len(memory)
        self._used_pages = 0
        """High-water mark: no frame from here on was ever anything but FREE."""

    def close(self) -> None:
        """Unmap the states. Idempotent. Later calls raise ValueError."""
        # The view first: an array that outlives its mapping would be a segmentation fault, and
        # mmap.close refuses while one exists.
        self._view = np.empty(0, np.uint8)
        self._used_pages = 0
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def lowest_free(self, pages: int, frame_order: int) -> PageFrames:
        """At most `pages` FREE frames, lowest first; fewer if there are no more.

        With `frame_order` 9 whole aligned groups of 512 only, and `pages` rounded down to them.
        """
        if frame_order == 0:
            return self.frames_in(FrameState.FREE).lowest(pages)
        used = self._used()
        groups = self.arena_pages // PAGES_PER_HUGE_PAGE
        used_groups = min(-(-used.size // PAGES_PER_HUGE_PAGE), groups)
        taken = np.zeros(used_groups * PAGES_PER_HUGE_PAGE, np.bool_)
        kept = min(used.size, taken.size)
        np.not_equal(used[:kept], FrameState.FREE, out=taken[:kept])
        free: npt.NDArray[np.bool_] = ~np.any(taken.reshape(-1, PAGES_PER_HUGE_PAGE), axis=1)
        return _frames_where(free, PAGES_PER_HUGE_PAGE, tail_stop=groups).lowest(
            pages - pages % PAGES_PER_HUGE_PAGE
        )

    def frames_in(self, state: FrameState) -> PageFrames:
        """All frames in `state`."""
        tail_stop = self.arena_pages if state is FrameState.FREE else None
        mask: npt.NDArray[np.bool_] = np.equal(self._used(), state)
        return _frames_where(mask, 1, tail_stop)

    def count(self, state: FrameState) -> int:
        """How many frames are in `state`."""
        used = self._used()
        beyond_pages = self.arena_pages - used.size if state is FrameState.FREE else 0
        return int(np.count_nonzero(used == state)) + beyond_pages

    def all_in(self, frames: PageFrames, *states: FrameState) -> bool:
        """Whether each of `frames` is in one of `states`; frames outside the arena are in none."""
        if not frames:
            return True
        if frames.stops[-1] > self.arena_pages:
            return False
        below = frames - PageFrames.span(self._used_pages, self.arena_pages - self._used_pages)
        if below.page_count < frames.page_count and FrameState.FREE not in states:
            return False
        allowed = np.zeros(256, np.bool_)
        allowed[list(states)] = True
        used = self._used()
        if below.range_count < _SCATTERED_RANGES:
            return all(
                allowed[used[start : start + count]].all() for start, count in below.ranges()
            )
        return bool(allowed[used[below.to_array()]].all())

    def mark(self, frames: PageFrames, state: FrameState) -> None:
        """Write `state` for each of `frames`. Raises ValueError for frames outside the arena."""
        if self._memory.closed:
            raise ValueError("the frame states are closed")
        if not frames:
            return
        stop = int(frames.stops[-1])
        if stop > self.arena_pages:
            raise ValueError(f"frame {stop - 1} is outside the arena of {self.arena_pages} pages")
        if state is not FrameState.FREE:
            self._used_pages = max(self._used_pages, stop)
        elif stop > self._used_pages:
            # What lies beyond the high-water mark is FREE already.
            frames = frames - PageFrames.span(self._used_pages, stop - self._used_pages)
        if frames.range_count < _SCATTERED_RANGES:
            for start, count in frames.ranges():
                self._view[start : start + count] = state
        else:
            self._view[frames.to_array()] = state

    def _used(self) -> npt.NDArray[np.uint8]:
        """The bytes below the high-water mark. For this class's own use, within one call."""
        if self._memory.closed:
            raise ValueError("the frame states are closed")
        return self._view[: self._used_pages]


def _frames_where(
    mask: npt.NDArray[np.bool_], frame_pages: int, tail_stop: int | None
) -> PageFrames:
    """Frames of `frame_pages` pages for which `mask` holds, and from its end on to `tail_stop`.

    By the borders of the runs, not frame by frame: an index array of a mostly free guest of
    16 GiB would be 32 MiB.
    """
    stop = mask.size if tail_stop is None else tail_stop
    padded = np.zeros(mask.size + 2, np.int8)
    padded[1:-1] = mask
    padded[-1] = stop > mask.size
    borders = np.flatnonzero(np.diff(padded))
    if padded[-1]:
        borders = np.append(borders, stop)
    return PageFrames.from_ranges(
        borders[::2] * frame_pages, (borders[1::2] - borders[::2]) * frame_pages
    )
