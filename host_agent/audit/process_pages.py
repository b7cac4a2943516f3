"""One process's pages: what lies at a virtual page, and which pages of a range are there.

The open pagemap file holds on to the address space that it was opened for, not to the pid: when
the process is gone or has called exec, reads return nothing, whoever has its pid by then. Only
opening it could hit the wrong process, so the pid is pinned by a pidfd first.
"""

import ctypes
import errno
import fcntl
import os
import select
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from host_agent.audit.errors import FramesHidden, ProcessGone
from host_agent.audit.kernel_pages import ENTRY_BYTES, U64Array
from protocol.units import PAGE_BYTES

PAGEMAP_SCAN: Final = 0xC0606610
"""ioctl of Linux 6.7: _IOWR('f', 16, struct pm_scan_arg)."""

PAGE_IS_PRESENT: Final = 1 << 3
PAGE_IS_SWAPPED: Final = 1 << 4

SCAN_REGIONS: Final = 4096
"""Regions fetched by one ioctl: 96 KiB."""


class _ScanArg(ctypes.Structure):
    """struct pm_scan_arg of include/uapi/linux/fs.h."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "category_inverted",
            "category_mask",
            "category_anyof_mask",
            "return_mask",
        )
    )


class ProcessPages:
    """The page tables of one process. `close` it, or use it in a `with`."""

    def __init__(self, pid: int) -> None:
        """Open process `pid`. Raises ProcessGone, or FramesHidden without the rights."""
        self.pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise ProcessGone(pid) from None
        try:
            self._pagemap_fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            os.close(self._pidfd)
            if error.errno in (errno.ENOENT, errno.ESRCH):
                raise ProcessGone(pid) from None
            raise FramesHidden(f"pagemap of process {pid}: {error.strerror}") from error
        if not self.is_alive():
            # It died in between, and the pid may be another's: so may be what was opened.
            self.close()
            raise ProcessGone(pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Nothing else may be called afterwards."""
        os.close(self._pagemap_fd)
        os.close(self._pidfd)

    def is_alive(self) -> bool:
        """Whether the process has not exited yet."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def entries(self, address: int, starts: list[int], counts: list[int]) -> U64Array:
        """pagemap's entries of ranges of pages (`starts` relative to `address`), one after another.

        Pages that are not mapped have entry 0. Raises ProcessGone.
        """
        entries = np.empty(sum(counts), np.uint64)
        if not entries.size:
            return entries
        view = entries.data.cast("B")
        base = address // PAGE_BYTES
        done = 0
        for start, count in zip(starts, counts, strict=True):
            size_bytes = count * ENTRY_BYTES
            offset = (base + start) * ENTRY_BYTES
            while size_bytes:
                got_bytes = os.preadv(self._pagemap_fd, [view[done : done + size_bytes]], offset)
                if not got_bytes:
                    break
                done, offset, size_bytes = (
                    done + got_bytes,
                    offset + got_bytes,
                    size_bytes - got_bytes,
                )
            if size_bytes:
                # Past the end of the address space, or there is no address space any more.
                if not self.has_memory():
                    raise ProcessGone(self.pid)
                view[done : done + size_bytes] = bytes(size_bytes)
                done += size_bytes
        return entries

    def scan_present(self, start_address: int, stop_address: int) -> npt.NDArray[np.int64]:
        """Regions of pages that are present or swapped, ascending: (start, stop addresses) each.

        Shape (regions, 2). Raises OSError (ENOTTY) on a kernel before 6.7. An address space that is
        gone has no regions: ask `has_memory`.
        """
        regions = np.empty((SCAN_REGIONS, 3), np.uint64)
        found: list[npt.NDArray[np.int64]] = [np.empty((0, 2), np.int64)]
        walked = start_address
        while walked < stop_address:
            argument = _ScanArg(
                size=ctypes.sizeof(_ScanArg),
                start=walked,
                end=stop_address,
                vec=regions.ctypes.data,
                vec_len=SCAN_REGIONS,
                category_anyof_mask=PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask=PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            )
            try:
                filled = fcntl.ioctl(self._pagemap_fd, PAGEMAP_SCAN, argument)
            except ProcessLookupError:
                # What some 6.18 kernels say of an address space that is gone; others find nothing.
                break
            found.append(regions[:filled, :2].astype(np.int64))
            walked = argument.walk_end
            if filled:
                # Measured on 6.18: when the last region exactly fills the array, walk_end stands
                # before regions that have been told already.
                walked = max(walked, int(regions[filled - 1, 1]))
        return np.concatenate(found)

    def has_memory(self) -> bool:
        """Whether the address space that was opened is still in use.

        Page 0 of it can always be asked for, mapped or not: no bytes mean that it is gone.
        """
        return bool(os.pread(self._pagemap_fd, ENTRY_BYTES, 0))
