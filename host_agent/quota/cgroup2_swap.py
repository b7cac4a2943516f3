"""What a workload of cgroup version 2 may swap out while room is made in it: nothing, or so much.

`memory.swap.max` is held at what is swapped already, plus what is allowed, from before the first
reclaim until memory.high is where it is to stay: as long as the wall is lower than the workload can
do with, its kernel would swap all that it may.

Swap is slow, and reclaim does not wait for it: memory.reclaim says EAGAIN while pages are on their
way to the disk, and gets them when it is asked again. So a refusal is one only if nothing moves.
"""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from host_agent.quota.base import SWAP_MIN_BYTES
from host_agent.quota.control_file import ControlFile, FileOpener
from host_agent.quota.errors import NoRoom

SWAP_MAX: Final = "memory.swap.max"
SWAP_CURRENT: Final = "memory.swap.current"

DISK_WAIT_S: Final = 0.01
"""Twenty of them without anything that moves are a refusal: long enough for a disk that is busy."""


class Cgroup2Swap:
    """The swap of one workload; does nothing where the VM has none, or the kernel counts none."""

    def __init__(self, workload: Path, open_file: FileOpener, swap_bytes: int) -> None:
        self._workload = workload
        self._swap_bytes = swap_bytes
        self._most_bytes = 0
        self._may_swap = False
        self._moved = (0, 0)
        self._counts = bool(swap_bytes) and (workload / SWAP_MAX).exists()
        with ExitStack() as opened:
            if self._counts:
                self._max = open_file(workload / SWAP_MAX, writable=True)
                opened.callback(self._max.close)
                self._current = open_file(workload / SWAP_CURRENT)
                opened.callback(self._current.close)
            self._files = opened.pop_all()

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def hold(self, swap_bytes: int) -> int:
        """From now on so many bytes more may be swapped out; gives how many it really may."""
        if not self._counts:
            return 0
        used_bytes = self._current.read_bytes_count()
        more_bytes = min(swap_bytes, self._swap_bytes - used_bytes)
        if more_bytes < SWAP_MIN_BYTES:
            more_bytes = 0
        self._may_swap = more_bytes > 0
        self._most_bytes = used_bytes + more_bytes
        self._max.write(self._most_bytes)
        return more_bytes

    def check(self) -> None:
        """NoRoom if more was swapped out than may be: room that was made so is none."""
        if self._counts and self._current.read_bytes_count() > self._most_bytes + SWAP_MIN_BYTES:
            # The watchdog let it swap again, this agent having stood still for too long.
            raise NoRoom(f"{self._workload} has swapped while room was made in it; try later")

    def let_go(self) -> None:
        """The workload may swap what the VM has of swap, by its own need."""
        self._may_swap = False
        if self._counts:
            self._max.write(self._swap_bytes)

    def moves(self, usage: ControlFile) -> bool:
        """After a refusal by reclaim: wait for the disk, then say whether swapping goes on."""
        if not self._may_swap:
            return False
        time.sleep(DISK_WAIT_S)
        usage_bytes, swapped_bytes = usage.read_bytes_count(), self._current.read_bytes_count()
        before_bytes, self._moved = self._moved, (usage_bytes, swapped_bytes)
        return usage_bytes < before_bytes[0] or swapped_bytes > before_bytes[1]
