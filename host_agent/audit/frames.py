"""Which reported frames are really there to be claimed, and which dropped frames are really gone.

A frame may be claimed when the kernel itself says that it is present, anonymous and private, mapped
once, locked, charged to the guest's driver, and (for 2 MiB frames) one whole huge page. Nothing is
taken from what the guest says but where to look, and that is bounded here.

The plan of a look: pagemap tells the physical page under each frame; those are sorted, and their
flags and cgroups read by runs. For a 2 MiB frame two reads out of 512 are enough, see
`_look_at_huge_frames`.

What the look can't see: a guest may change its mind right after it. That gains it nothing, since
the limit falls only after the drop was confirmed (`gone`).
"""

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from host_agent.audit import page_bits as bits
from host_agent.audit.errors import AuditorClosed, FramesHidden, ProcessGone
from host_agent.audit.kernel_pages import U64Array, kernel_pages, plan_reads
from host_agent.audit.process_pages import ProcessPages
from protocol.page_frames import PageFrames
from protocol.units import HUGE_FRAME_ORDER, PAGE_BYTES, PAGES_PER_HUGE_PAGE
from protocol.vocabulary import MAX_PAGES, RejectionReason

BoolArray = npt.NDArray[np.bool_]
PfnArray = npt.NDArray[np.int64]
ReasonArray = npt.NDArray[np.uint8]

Rejected = tuple[tuple[PageFrames, RejectionReason], ...]

MAX_ADDRESS: Final = 1 << 56
"""End of user space with five-level page tables (x86-64); no 64-bit machine has more."""

LOOKS: Final = 3
"""A frame that looks bad is looked at again: the kernel may move a locked page to another physical
page (compaction) between the read of pagemap and that of its flags, and an honest guest would be
taken for a liar."""

MAX_SCAN_GAP_PAGES: Final = 512
"""Ranges nearer than this are scanned in one go: one page table of the lowest level."""

_GOOD: Final = 0
_REASONS: Final = (
    RejectionReason.NOT_PRESENT,
    RejectionReason.NOT_ANONYMOUS,
    RejectionReason.SHARED,
    RejectionReason.FOREIGN_CGROUP,
    RejectionReason.NOT_LOCKED,
    RejectionReason.NOT_HUGE,
)
"""The first that applies is told. Code in a ReasonArray: index + 1."""


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What `verify` found; every frame asked about is in exactly one place."""

    good: PageFrames
    rejected: Rejected
    """Not empty, disjoint, one entry for each reason that occurred."""


@dataclass(frozen=True, slots=True)
class _Looks:
    """What was seen of each present unit (frame of 4 KiB or of 2 MiB), as arrays of one shape."""

    anonymous: BoolArray
    exclusive: BoolArray
    own_cgroup: BoolArray
    locked: BoolArray
    huge: BoolArray


class FrameAuditor:
    """Looks at the frames of one guest's arena. `close` it, or use it in a `with`.

    Methods block, may be called from several threads, and may outlive `close` (a thread that was
    left behind): the files stay open until the last call has ended.
    """

    def __init__(
        self, pid: int, arena_address: int, arena_pages: int, driver_cgroup_inode: int
    ) -> None:
        """Open the address space of process `pid` (the host's number).

        The arena is what the guest says: it is bounded here, and found wanting by `verify`.
        Raises ValueError for an arena that can't be, ProcessGone, and FramesHidden without rights.
        """
        if arena_address % PAGE_BYTES or arena_address <= 0:
            raise ValueError(f"an arena can't be at address {arena_address:#x}")
        if not 1 <= arena_pages <= MAX_PAGES:
            raise ValueError(f"an arena can't have {arena_pages} pages")
        if arena_address + arena_pages * PAGE_BYTES > MAX_ADDRESS:
            raise ValueError(f"an arena at {arena_address:#x} of {arena_pages} pages can't be")
        self._address = arena_address
        self._arena = PageFrames.span(0, arena_pages)
        self._cgroup_inode = np.uint64(driver_cgroup_inode)
        self._kernel = kernel_pages()
        self._pages = ProcessPages(pid)
        self._lock = Lock()
        self._users = 1
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the process. Never waits; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._leave()

    def verify(self, frames: PageFrames, frame_order: int) -> AuditResult:
        """Sort reported frames into good ones and rejected ones, each with a reason.

        `frame_order` 0 or 9; at 9 each aligned 2 MiB block is judged as one. Costs 15 ms a
        GiB in 2 MiB frames. In 4 KiB frames it goes with how physical memory is fragmented: 50 to
        130 ms a GiB, 330 ms at the worst that was seen. Raises ProcessGone, FramesHidden,
        AuditorClosed.
        """
        if frame_order not in (0, HUGE_FRAME_ORDER):
            raise ValueError(f"no frame order {frame_order}")
        with self._in_use():
            inside = self._inside(frames)
            rejected: dict[RejectionReason, PageFrames] = {}
            if inside is not frames:
                rejected[RejectionReason.OUT_OF_RANGE] = frames - inside
            if frame_order == HUGE_FRAME_ORDER:
                whole = _whole_huge_frames(inside)
                if whole is not inside:
                    rejected[RejectionReason.NOT_HUGE] = inside - whole
                inside = whole
            good = PageFrames.empty()
            doubtful = inside
            found: dict[RejectionReason, PageFrames] = {}
            for _ in range(LOOKS):
                fine, found = self._look(doubtful, frame_order)
                good |= fine
                if not found:
                    break
                doubtful -= fine
        for reason, which in found.items():
            rejected[reason] = rejected.get(reason, PageFrames.empty()) | which
        return AuditResult(good, tuple((which, why) for why, which in rejected.items() if which))

    def gone(self, frames: PageFrames) -> PageFrames:
        """Those of `frames` that still have a physical page (or a swapped one): a drop's failures.

        Frames outside the arena have none. Raises ProcessGone, AuditorClosed.
        """
        with self._in_use():
            inside = self._inside(frames)
            try:
                still = self._present_by_scan(inside)
            except OSError as error:
                if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.EFAULT):
                    raise
                still = self._present_by_pagemap(inside)
            if not still and not self._pages.has_memory():
                raise ProcessGone(self._pages.pid)
        return still

    def _present_by_scan(self, frames: PageFrames) -> PageFrames:
        """By the PAGEMAP_SCAN ioctl, about 3 ms a GiB. Raises OSError where there is none."""
        if not frames:
            return frames
        split = np.flatnonzero(frames.starts[1:] - frames.stops[:-1] > MAX_SCAN_GAP_PAGES)
        firsts = np.concatenate((frames.starts[:1], frames.starts[split + 1]))
        stops = np.concatenate((frames.stops[split], frames.stops[-1:]))
        found: list[npt.NDArray[np.int64]] = []
        for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True):
            regions = self._pages.scan_present(self._virtual(first), self._virtual(stop))
            found.append((regions - self._address) // PAGE_BYTES)
        borders = np.concatenate(found)
        return PageFrames.from_ranges(borders[:, 0], borders[:, 1] - borders[:, 0]) & frames

    def _present_by_pagemap(self, frames: PageFrames) -> PageFrames:
        """By pagemap, about 9 ms a GiB, on any kernel."""
        entries = self._entries(frames)
        there = (entries & (bits.PAGEMAP_PRESENT | bits.PAGEMAP_SWAPPED)) != 0
        return PageFrames.from_frames(frames.to_array()[there])

    def _look(
        self, frames: PageFrames, frame_order: int
    ) -> tuple[PageFrames, dict[RejectionReason, PageFrames]]:
        """One look at frames of the arena: the good ones, and the others by reason."""
        entries = self._entries(frames)
        firsts = frames.to_array()
        unit_pages = 1 << frame_order
        entries = entries.reshape(-1, unit_pages)
        firsts = firsts[::unit_pages]
        present = (entries & bits.PAGEMAP_PRESENT).all(axis=1)
        seen = entries if present.all() else entries[present]
        pfns = (seen & bits.PAGEMAP_PFN).astype(np.int64)
        if not pfns.all():
            raise FramesHidden("the kernel hides physical frame numbers: CAP_SYS_ADMIN is missing")
        look = self._look_at_huge_frames if frame_order else self._look_at_base_frames
        codes = np.ones(firsts.size, np.uint8)
        codes[present] = _judge(look(seen, pfns))
        by_reason = {
            reason: _units(firsts[codes == code], unit_pages)
            for code, reason in enumerate(_REASONS, start=1)
            if (codes == code).any()
        }
        if not by_reason:
            return frames, {}
        return _units(firsts[codes == _GOOD], unit_pages), by_reason

    def _look_at_base_frames(self, entries: U64Array, pfns: PfnArray) -> _Looks:
        """Frames of 4 KiB; arrays of shape (n, 1)."""
        pfn = pfns[:, 0]
        order = np.argsort(pfn)
        ascending = pfn[order]
        plan = plan_reads(ascending)
        flags = np.empty(pfn.size, np.uint64)
        flags[order] = self._kernel.flags(plan)
        own_cgroup = np.empty(pfn.size, np.bool_)
        own_cgroup[order] = self._kernel.cgroup_inodes(plan) == self._cgroup_inode
        alone = np.empty(pfn.size, np.bool_)
        alone[order] = _stand_once(ascending)
        # A page of a larger folio shares its physical memory: dropping it alone frees nothing.
        alone &= (flags & (bits.KPF_COMPOUND | bits.KPF_KSM)) == 0
        return _Looks(
            anonymous=_anonymous(entries, flags),
            exclusive=_exclusive(entries) & alone,
            own_cgroup=own_cgroup,
            locked=(flags & bits.KPF_MLOCKED) != 0,
            huge=np.ones(pfn.size, np.bool_),
        )

    def _look_at_huge_frames(self, entries: U64Array, pfns: PfnArray) -> _Looks:
        """Frames of 2 MiB; arrays of shape (n, 512).

        Why two pages of 512 are enough: a folio has 2**k pages and starts at a multiple of 2**k.
        If the page in the middle of an aligned block of 512 is a tail, its folio does not start
        there, so k is at least 9, and the folio covers the whole block. That the THP flag stands
        on the head alone would prove nothing: smaller folios have it too. Anonymity, locking and
        the cgroup belong to the folio, so what its head says holds for all 512. Mapping belongs
        to the page: presence, privacy and exclusiveness are looked at on every one.
        """
        head = pfns[:, 0]
        block = head - head % PAGES_PER_HUGE_PAGE
        contiguous = (pfns == block[:, None] + np.arange(PAGES_PER_HUGE_PAGE)).all(axis=1)
        wanted = np.concatenate((head, block + PAGES_PER_HUGE_PAGE // 2))
        order = np.argsort(wanted)
        plan = plan_reads(wanted[order])
        flags = np.empty(wanted.size, np.uint64)
        flags[order] = self._kernel.flags(plan)
        inodes = np.empty(wanted.size, np.uint64)
        inodes[order] = self._kernel.cgroup_inodes(plan)
        head_flags, middle_flags = np.split(flags, 2)
        whole = (head_flags & (bits.KPF_THP | bits.KPF_COMPOUND_HEAD)) == (
            bits.KPF_THP | bits.KPF_COMPOUND_HEAD
        )
        whole &= (middle_flags & bits.KPF_COMPOUND_TAIL) != 0
        rank = np.argsort(block)
        alone = np.empty(head.size, np.bool_)
        alone[rank] = _stand_once(block[rank])
        huge = contiguous & whole
        return _Looks(
            anonymous=_anonymous(entries, head_flags),
            # What is no huge frame is told as such, though its pages may be strewn about.
            exclusive=_exclusive(entries) & (alone | ~huge),
            own_cgroup=(np.split(inodes, 2)[0] == self._cgroup_inode),
            locked=(head_flags & bits.KPF_MLOCKED) != 0,
            huge=huge,
        )

    def _inside(self, frames: PageFrames) -> PageFrames:
        """Those of `frames` that are in the arena; `frames` itself if all are."""
        if not frames or frames.stops[-1] <= self._arena.page_count:
            return frames
        return frames & self._arena

    def _entries(self, frames: PageFrames) -> U64Array:
        return self._pages.entries(self._address, frames.starts.tolist(), frames.counts.tolist())

    def _virtual(self, pfn: int) -> int:
        return self._address + pfn * PAGE_BYTES

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise AuditorClosed("this auditor is closed")
            self._users += 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self._pages.close()


def _judge(looks: _Looks) -> ReasonArray:
    """For each unit that is present: `_GOOD`, or the code of the first reason against it."""
    bad = (
        ~looks.anonymous,
        ~looks.exclusive,
        ~looks.own_cgroup,
        ~looks.locked,
        ~looks.huge,
    )
    codes = np.zeros(looks.huge.size, np.uint8)
    # Backwards, so that the first reason is written last.
    for code, which in reversed(list(enumerate(bad, start=2))):
        codes[which] = code
    return codes


def _anonymous(entries: U64Array, flags: U64Array) -> BoolArray:
    private: BoolArray = ((entries & bits.PAGEMAP_FILE_OR_SHARED) == 0).all(axis=1)
    private &= (flags & bits.KPF_ANON) != 0
    return private


def _exclusive(entries: U64Array) -> BoolArray:
    exclusive: BoolArray = ((entries & bits.PAGEMAP_EXCLUSIVE) != 0).all(axis=1)
    return exclusive


def _stand_once(ascending: PfnArray) -> BoolArray:
    """Whether each of the sorted numbers is there only once: one page under two frames is a lie."""
    once = np.ones(ascending.size, np.bool_)
    same = ascending[1:] == ascending[:-1]
    once[1:] &= ~same
    once[:-1] &= ~same
    return once


def _whole_huge_frames(frames: PageFrames) -> PageFrames:
    """The aligned blocks of 512 frames that are in `frames`; `frames` itself if that is all."""
    if not ((frames.starts | frames.counts) % PAGES_PER_HUGE_PAGE).any():
        return frames
    first = -(-frames.starts // PAGES_PER_HUGE_PAGE) * PAGES_PER_HUGE_PAGE
    stop = frames.stops // PAGES_PER_HUGE_PAGE * PAGES_PER_HUGE_PAGE
    whole = stop > first
    return PageFrames.from_ranges(first[whole], (stop - first)[whole])


def _units(firsts: PfnArray, unit_pages: int) -> PageFrames:
    """The frames of units with these ascending first frames."""
    return PageFrames.from_ranges(firsts, np.full(firsts.size, unit_pages))
