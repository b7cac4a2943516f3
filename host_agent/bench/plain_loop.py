"""The yardstick: reserve memory with the calls that win, and nothing else. A program of its own.

    python plain_loop.py PROCS_FILE SIZE_BYTES FRAME_BYTES

Joins the cgroup of PROCS_FILE, populates and locks SIZE_BYTES in steps of 32 MiB for each line that
comes on standard input, prints the seconds that took, and drops the memory again. It shares no code
with the balloon, so that a slip there can't slow both. Standard library only.
"""

import ctypes
import mmap
import os
import sys
import time

STEP_BYTES = 32 << 20
HUGE_BYTES = 2 << 20
MLOCK_ONFAULT = 1
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_POPULATE_WRITE = 23
MADV_DONTNEED_LOCKED = 24
MAP_NORESERVE = 0x4000


def main() -> None:
    """Run the loop; see above."""
    procs_file, size, frame = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with open(procs_file, "w", encoding="ascii") as procs:
        procs.write(str(os.getpid()))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    pointer, length = ctypes.c_void_p, ctypes.c_size_t
    libc.mmap.argtypes = (pointer, length, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.madvise.argtypes = (pointer, length, ctypes.c_int)
    libc.mlock2.argtypes = (pointer, length, ctypes.c_uint)

    def call(result: int, name: str) -> None:
        if result != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{name}: {os.strerror(code)}")

    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    mapped = libc.mmap(None, size + HUGE_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    start = -(-mapped // HUGE_BYTES) * HUGE_BYTES
    advice = MADV_HUGEPAGE if frame == HUGE_BYTES else MADV_NOHUGEPAGE
    call(libc.madvise(start, size, advice), "madvise")
    call(libc.mlock2(start, size, MLOCK_ONFAULT), "mlock2")
    print("ready", flush=True)
    for _line in sys.stdin:
        began = time.perf_counter()
        for offset in range(0, size, STEP_BYTES):
            step = min(STEP_BYTES, size - offset)
            call(libc.madvise(start + offset, step, MADV_POPULATE_WRITE), "populate")
        print(time.perf_counter() - began, flush=True)
        call(libc.madvise(start, size, MADV_DONTNEED_LOCKED), "drop")


if __name__ == "__main__":
    main()
