"""Real page frames: the one caller of mmap, mlock2 and madvise.

The arena is one virtual mapping of the guest's assigned size, made once and kept for the balloon's
life; page frame number `pfn` lies at `address + pfn * PAGE_BYTES`. It is locked "on fault": a frame
is locked when and only when it is populated, and neither populating nor dropping frames ever splits
the mapping (mlock page by page would make a VMA for each, and the kernel allows 65,530 of them).

This module knows nothing of frame states, processes or who asks. It is imported before the
pseudo-process is forked, and every module imported until then is memory in each pseudo-process:
so it keeps away from `typing`, which alone is 0.4 MiB (and thereby from `protocol.units`).

Sources: madvise(2), mlock2(2); Documentation/admin-guide/mm/transhuge.rst.
"""

import ctypes
import errno
import mmap
import posix as os
import resource

PAGE_BYTES = 4096
"""The same as protocol.units.PAGE_BYTES (see above; a test compares them)."""

PAGES_PER_HUGE_PAGE = 512
FRAME_ORDERS = (0, 9)
"""Order 0 is a frame of 4 KiB, order 9 one of 2 MiB."""

MAX_ARENA_PAGES = 2**32
"""A page frame number is a u4 on the wire: 16 TiB."""

_MLOCK_ONFAULT = 1
_MADV_DONTFORK = 10
_MADV_HUGEPAGE = 14
_MADV_NOHUGEPAGE = 15
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MADV_DONTNEED_LOCKED = 24  # Linux 5.18
_MAP_NORESERVE = 0x4000
_MAP_FAILED = 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1

# ctypes releases the GIL during a call; CPython 3.11's own mmap.madvise holds it, and one worker's
# populate would stall the other's.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)


class ArenaError(Exception):
    """The arena or its process can't be set up here; the text says what is missing."""


class Arena:
    """The mapping whose frames are reserved and dropped. Made by `map_arena`.

    `populate` and `drop` may run in several threads at once on ranges that don't overlap: the
    kernel takes the address space's lock for reading only.
    """

    __slots__ = ("address", "frame_order", "pages")

    def __init__(self, address: int, pages: int, frame_order: int) -> None:
        self.address = address
        self.pages = pages
        self.frame_order = frame_order

    def populate(self, start: int, count: int) -> int:
        """Give the `count` frames from `start` on a physical page each, zeroed and locked.

        Returns 0, or errno when the kernel has no page (ENOMEM, EFAULT, EHWPOISON): a part of the
        range may be populated then, and the caller drops it. It is no exception, because raising
        one takes memory, and for that a process may wait (v1 cgroup at its limit, OOM killer off)
        with the very pages in hand that it is about to drop. With the OOM killer on there is no
        error: the process is killed.

        Raises ValueError for a range that is not made of whole frames inside the arena.
        """
        return self._advise(start, count, _MADV_POPULATE_WRITE)

    def drop(self, start: int, count: int) -> None:
        """Give the physical pages of a range back to the kernel at once; absent ones are no error.

        Raises ValueError as `populate` does.
        """
        # Plain MADV_DONTNEED refuses locked memory with EINVAL.
        code = self._advise(start, count, _MADV_DONTNEED_LOCKED)
        if code:
            raise OSError(code, f"frames {start}+{count} can't be dropped: {os.strerror(code)}")

    def unmap(self) -> None:
        """Give up the whole arena. Using it afterwards is a fault of the caller's."""
        _checked(_libc.munmap(self.address, self.pages * PAGE_BYTES), "munmap")

    def _advise(self, start: int, count: int, advice: int) -> int:
        if start < 0 or count < 1 or start + count > self.pages:
            raise ValueError(f"frames {start}+{count} leave the arena of {self.pages} pages")
        if (start | count) & ((1 << self.frame_order) - 1):
            # Half of a huge page can't be dropped: the kernel would split it and free nothing.
            raise ValueError(f"frames {start}+{count} are no whole frames of this arena")
        address = self.address + start * PAGE_BYTES
        if _libc.madvise(address, count * PAGE_BYTES, advice) == 0:
            return 0
        return ctypes.get_errno()


def map_arena(pages: int, frame_order: int) -> Arena:
    """Map an arena of `pages` base pages, aligned to 2 MiB, without a physical page in it.

    `frame_order` 0 keeps huge pages out (touching one frame must not populate 512), 9 asks for
    them. Raises ValueError for other orders and sizes, ArenaError when the kernel is too old or
    refuses to lock so much.
    """
    if frame_order not in FRAME_ORDERS:
        raise ValueError(f"frame order {frame_order} is not among {FRAME_ORDERS}")
    if not 1 <= pages <= MAX_ARENA_PAGES:
        raise ValueError(f"an arena has 1 to {MAX_ARENA_PAGES} pages, not {pages}")
    arena = Arena(_map_aligned(pages * PAGE_BYTES), pages, frame_order)
    try:
        _prepare(arena)
    except BaseException:
        arena.unmap()
        raise
    return arena


def map_shared(pages: int) -> mmap.mmap:
    """One byte for each of `pages` frames, zero, shared with the processes forked from now on.

    A page of it exists from its first touch on, reading included: do not scan what is unused.
    """
    return mmap.mmap(-1, pages, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)


def _prepare(arena: Arena) -> None:
    arena_bytes = arena.pages * PAGE_BYTES
    for advice in (_MADV_POPULATE_WRITE, _MADV_DONTNEED_LOCKED):
        # Of length 0 it changes nothing, and tells whether the kernel knows the advice.
        if _libc.madvise(arena.address, 0, advice) != 0:
            raise ArenaError(
                f"Linux {os.uname().release} lacks MADV_POPULATE_WRITE or MADV_DONTNEED_LOCKED: "
                "the balloon needs Linux 5.18 or later"
            )
    # A fork alive while pages are dropped would keep them.
    _checked(_libc.madvise(arena.address, arena_bytes, _MADV_DONTFORK), "madvise(MADV_DONTFORK)")
    advice = _MADV_HUGEPAGE if arena.frame_order else _MADV_NOHUGEPAGE
    if _libc.madvise(arena.address, arena_bytes, advice) != 0 and arena.frame_order:
        # A kernel without huge pages refuses both; keeping them out is then no loss.
        raise ArenaError("this kernel has no transparent huge pages: use frames of 4 KiB (order 0)")
    if _libc.mlock2(arena.address, arena_bytes, _MLOCK_ONFAULT) != 0:
        raise _lock_refused(ctypes.get_errno(), arena_bytes)


def _lock_refused(code: int, arena_bytes: int) -> ArenaError:
    name = errno.errorcode.get(code, str(code))
    limit_bytes = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return ArenaError(
        f"the kernel refuses to lock {arena_bytes // 1024} KiB ({name}): give the guest driver "
        "CAP_IPC_LOCK (with Docker: cap_add IPC_LOCK, and user 0 inside) or a locked-memory limit "
        f"(ulimit -l, now {'unlimited' if limit_bytes < 0 else limit_bytes // 1024} KiB) of that "
        "size"
    )


def _map_aligned(size_bytes: int) -> int:
    """Address of a new mapping that starts on a 2 MiB boundary: mapped too large, then trimmed."""
    huge_bytes = PAGES_PER_HUGE_PAGE * PAGE_BYTES
    mapped = _libc.mmap(
        None,
        size_bytes + huge_bytes,
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE,
        -1,
        0,
    )
    if mapped == _MAP_FAILED:
        reason = os.strerror(ctypes.get_errno())
        raise ArenaError(f"no address space for an arena of {size_bytes} bytes: {reason}")
    address: int = -(-mapped // huge_bytes) * huge_bytes
    head_bytes = address - mapped
    if head_bytes:
        _checked(_libc.munmap(mapped, head_bytes), "munmap")
    if head_bytes < huge_bytes:
        _checked(_libc.munmap(address + size_bytes, huge_bytes - head_bytes), "munmap")
    return address


def _checked(result: int, call: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")
