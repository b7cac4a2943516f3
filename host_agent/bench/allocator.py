"""A guest that allocates as fast as it can, and knows how long it stood still. A program.

    python allocator.py PROCS_FILE SIZE_BYTES

Joins the cgroup of PROCS_FILE. One process takes SIZE_BYTES of anonymous memory and gives it back,
again and again; another one wakes every half millisecond. For each line on standard input it prints
the longest pause between two wakings since the last line, in seconds. Standard library only.
"""

import ctypes
import mmap
import os
import select
import signal
import sys
import time

CHUNK = bytes(1 << 20)
WAKE_S = 0.0005
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run until standard input ends; see above."""
    procs_file, size = sys.argv[1], int(sys.argv[2])
    with open(procs_file, "w", encoding="ascii") as procs:
        procs.write(str(os.getpid()))
    parent = os.getpid()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            allocate(size)
    print("ready", flush=True)
    longest, last = 0.0, time.perf_counter()
    while True:
        asked, _, _ = select.select([sys.stdin], [], [], WAKE_S)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        if asked:
            if not sys.stdin.readline():
                return
            print(longest, flush=True)
            longest = 0.0


def allocate(size: int) -> None:
    """At the kernel's speed, not Python's: a chunk is one copy. Never returns."""
    while True:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(size // len(CHUNK)):
            memory.write(CHUNK)
        memory.close()


if __name__ == "__main__":
    main()
