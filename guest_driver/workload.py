"""A program with a known appetite, to run inside a mock VM: `python -m guest_driver.workload`.

It holds an anonymous working set and a page cache of real files, touches both round and round at
a rate, and measures how long its own touches take: what a balloon costs its guest, seen from
inside. Only the standard library, and little of it, since ten of these run beside each other.

Here stand the memory that it touches and the command line; workload_loop.py does the touching,
workload_latency.py measures, workload_control.py reads commands. Each touch here is of one unit,
and returns when the kernel has let it: the loop measures the time.
"""

import argparse
import contextlib
import mmap
import os
import re
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Final

from guest_driver.workload_control import MAX_BYTES, MAX_CACHE_BYTES, CommandError, Rate, Set
from guest_driver.workload_loop import Makers, Workload

UNIT_BYTES: Final = 256 * 1024
"""Touched at a time; small enough that one late page shows, large enough to cost no CPU."""

BURST_UNIT_BYTES: Final = 64 * 1024
"""The same for bursts, where a stall is to be seen in detail."""

FILE_BYTES: Final = 8 * 1024 * 1024
WRITE_BYTES: Final = 1024 * 1024

_MAP_NORESERVE: Final = 0x4000  # include/uapi/asm-generic/mman-common.h; not in mmap of 3.11
_ONES: Final = b"\1" * (UNIT_BYTES // mmap.PAGESIZE)


def _anonymous(size_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    # Huge pages would make the set larger than asked for, by steps of 2 MiB.
    with contextlib.suppress(OSError):  # EINVAL: a kernel without them
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


class AnonymousSet:
    """Anonymous memory of which the first `wanted_bytes` are touched in turn.

    `touched_bytes` of it are there. It grows by `grow`, a unit at a time, and shrinks at once.
    """

    def __init__(self) -> None:
        self._memory = _anonymous(MAX_BYTES)
        self._next = 0
        self.wanted_bytes = 0
        self.touched_bytes = 0

    def close(self) -> None:
        """Give all of it back."""
        self._memory.close()

    def set_wanted(self, wanted_bytes: int) -> None:
        """Want whole units up to `wanted_bytes`; what is beyond goes back to the kernel now."""
        self.wanted_bytes = wanted_bytes - wanted_bytes % UNIT_BYTES
        surplus_bytes = self.touched_bytes - self.wanted_bytes
        if surplus_bytes > 0:
            self._memory.madvise(mmap.MADV_DONTNEED, self.wanted_bytes, surplus_bytes)
            self.touched_bytes = self.wanted_bytes

    def grow(self) -> int:
        """Touch the next unit that is wanted and not there; its bytes, 0 when there is none."""
        if self.touched_bytes >= self.wanted_bytes:
            return 0
        self._write(self.touched_bytes)
        self.touched_bytes += UNIT_BYTES
        return UNIT_BYTES

    def touch(self) -> int:
        """Write to the pages of the next unit in turn; its bytes, 0 when nothing is there."""
        if not self.touched_bytes:
            return 0
        if self._next >= self.touched_bytes:
            self._next = 0
        self._write(self._next)
        self._next += UNIT_BYTES
        return UNIT_BYTES

    def _write(self, offset: int) -> None:
        self._memory[offset : offset + UNIT_BYTES : mmap.PAGESIZE] = _ONES


class Burst:
    """Anonymous memory allocated at full speed; `touch` until it returns 0, then `close`.

    Errors: OSError (ENOMEM) where not even the addresses can be had.
    """

    def __init__(self, wanted_bytes: int) -> None:
        self.wanted_bytes = -(-wanted_bytes // BURST_UNIT_BYTES) * BURST_UNIT_BYTES
        self.touched_bytes = 0
        self._memory = _anonymous(self.wanted_bytes)
        self._ones = _ONES[: BURST_UNIT_BYTES // mmap.PAGESIZE]

    def touch(self) -> int:
        """Write to the pages of the next unit; its bytes, 0 when all are there."""
        offset = self.touched_bytes
        if offset >= self.wanted_bytes:
            return 0
        self._memory[offset : offset + BURST_UNIT_BYTES : mmap.PAGESIZE] = self._ones
        self.touched_bytes += BURST_UNIT_BYTES
        return BURST_UNIT_BYTES

    def close(self) -> None:
        """Give it back."""
        self._memory.close()


class CacheSet:
    """Files of 8 MiB in `directory`, the first `wanted_bytes` of which are read in turn.

    The pages of files are page cache, and clean: a file counts once it is on the disk, because
    dirty pages can't be dropped quickly. Files are written by a thread of their own, so that the
    touching goes on meanwhile. Files of the right size that are there already are used.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._buffer = bytearray(UNIT_BYTES)
        self._next = 0
        self._descriptors: list[int] = []
        self._writer: threading.Thread | None = None
        self._is_closing = False
        self.wanted_bytes = 0
        self.error: str | None = None
        self._made_directory = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def ready_bytes(self) -> int:
        """Bytes of the wanted ones that are on the disk and being read."""
        return min(self.wanted_bytes, len(self._descriptors) * FILE_BYTES)

    def set_wanted(self, wanted_bytes: int) -> None:
        """Read whole units up to `wanted_bytes`. Files beyond stay on the disk, untouched."""
        self.wanted_bytes = wanted_bytes - wanted_bytes % UNIT_BYTES
        self.error = None
        self._write_missing()

    def touch(self) -> int:
        """Read the next unit in turn; its bytes, 0 when nothing is there.

        Errors: OSError from the disk.
        """
        ready_bytes = self.ready_bytes
        if not ready_bytes:
            return 0
        if self._next >= ready_bytes:
            self._next = 0
        file, offset = divmod(self._next, FILE_BYTES)
        self._next += UNIT_BYTES
        return os.preadv(self._descriptors[file], [self._buffer], offset)

    def tend(self) -> None:
        """Start the writing thread again if more became wanted as it ended."""
        if self.error is None:
            self._write_missing()

    def close(self, *, remove_files: bool) -> None:
        """Stop writing, close the files, remove them (and the directory, if it was made here)."""
        self._is_closing = True
        if self._writer is not None:
            self._writer.join()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        if not remove_files:
            return
        for path in self._directory.glob("memballoon-cache-*"):
            path.unlink(missing_ok=True)
        if self._made_directory:
            with contextlib.suppress(OSError):  # somebody put something else there
                self._directory.rmdir()

    def _write_missing(self) -> None:
        is_writing = self._writer is not None and self._writer.is_alive()
        if is_writing or len(self._descriptors) * FILE_BYTES >= self.wanted_bytes:
            return
        self._writer = threading.Thread(target=self._write_files, name="writer", daemon=True)
        self._writer.start()

    def _write_files(self) -> None:
        """The thread: one file after the other, each complete before it counts."""
        try:
            while not self._is_closing and len(self._descriptors) * FILE_BYTES < self.wanted_bytes:
                name = f"memballoon-cache-{len(self._descriptors):04d}"
                descriptor = self._file(self._directory / name)
                if descriptor is not None:
                    self._descriptors.append(descriptor)
        except OSError as error:  # a full disk, mostly
            self.error = f"{error.strerror}: {error.filename or self._directory}"

    def _file(self, path: Path) -> int | None:
        """A descriptor of the whole file; None when closing cut the writing short."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_size != FILE_BYTES:
                # Under its own name only when whole; size is the sign of that, so a file
                # that was cut short is written from the start.
                os.ftruncate(descriptor, 0)
                block = os.urandom(WRITE_BYTES)
                for offset in range(0, FILE_BYTES, WRITE_BYTES):
                    if self._is_closing:
                        os.close(descriptor)
                        return None
                    _write_all(descriptor, block, offset)
            # Also for a file found: it may be dirty still.
            os.fdatasync(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor


def _write_all(descriptor: int, block: bytes, offset: int) -> None:
    written = 0
    while written < len(block):
        written += os.pwrite(descriptor, block[written:], offset + written)


_UNITS = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def _size_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    unit = None if match is None else _UNITS.get("" if match[2] == "b" else match[2])
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; say 40MiB, or bytes")
    return int(float(match[1]) * unit)


def _bounded(size_bytes: int, most_bytes: int, name: str) -> int:
    if size_bytes > most_bytes:
        raise CommandError(f"{name} is more than {most_bytes} bytes")
    return size_bytes


def _nothing(signal_number: int, frame: FrameType | None) -> None:
    """The wake-up socket carries the signal; this only keeps it from killing."""


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM, SIGINT or a stop command; 0 then, 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(prog="workload", description="A known appetite.")
    parser.add_argument("--files", type=Path, required=True, help="directory for the cache's files")
    parser.add_argument("--control", type=Path, required=True, help="path of the control socket")
    parser.add_argument("--anon", type=_size_bytes, default=0, help="anonymous set, as 40MiB")
    parser.add_argument("--cache", type=_size_bytes, default=0, help="page cache, as 40MiB")
    parser.add_argument("--rate", type=_size_bytes, help="bytes touched a second (all, once)")
    parser.add_argument("--grow-rate", type=_size_bytes, help="bytes grown a second (unbounded)")
    parser.add_argument("--keep-files", action="store_true", help="leave the files at the end")
    arguments = parser.parse_args(argv)

    wakeup, woken = socket.socketpair()
    with wakeup, woken:
        wakeup.setblocking(False)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _nothing)
        try:
            first = Set(
                _bounded(arguments.anon, MAX_BYTES, "--anon"),
                _bounded(arguments.cache, MAX_CACHE_BYTES, "--cache"),
                Rate(arguments.rate or None),
            )
            makers = Makers(AnonymousSet, Burst, lambda: CacheSet(arguments.files))
            workload = Workload(makers, arguments.control, keep_files=arguments.keep_files)
            workload.run(first, woken, arguments.grow_rate or None)
        except (OSError, CommandError) as error:
            print(f"workload: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
