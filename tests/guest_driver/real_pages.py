"""Page frames as the kernel sees them, for the tests of the arena and its pseudo-process."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from protocol.page_frames import PageFrames
from protocol.units import PAGE_BYTES

ANON, THP, MLOCKED = 12, 22, 33  # bits of /proc/kpageflags: linux/kernel-page-flags.h
CAP_IPC_LOCK = 14
CGROUP_V1 = Path("/sys/fs/cgroup/memory")


def require_root() -> None:
    """Skip where the effects can't be had or seen."""
    if os.geteuid() != 0:
        pytest.skip("needs root: page frame numbers in pagemap and /proc/kpageflags")
    status = Path("/proc/self/status").read_text().split()
    if not int(status[status.index("CapEff:") + 1], 16) >> CAP_IPC_LOCK & 1:
        pytest.skip("needs CAP_IPC_LOCK to lock an arena")


def entries(pid: int, arena_address: int, pages: int) -> npt.NDArray[np.uint64]:
    """The arena's pagemap entries."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        raw = os.pread(file.fileno(), pages * 8, arena_address // PAGE_BYTES * 8)
    return np.frombuffer(raw, np.uint64)


def present(pid: int, arena_address: int, pages: int) -> PageFrames:
    """The frames that have a physical page."""
    return PageFrames.from_frames(np.flatnonzero(entries(pid, arena_address, pages) >> 63))


def flags(pid: int, arena_address: int, frames: PageFrames) -> npt.NDArray[np.uint64]:
    """The kernel's flags of each frame's physical page; all of them must be present."""
    found = entries(pid, arena_address, int(frames.stops[-1]))[frames.to_array()]
    assert (found >> 63).all()
    with open("/proc/kpageflags", "rb", buffering=0) as file:
        raw = b"".join(
            os.pread(file.fileno(), 8, pfn * 8) for pfn in (found & ((1 << 55) - 1)).tolist()
        )
    return np.frombuffer(raw, np.uint64)


def all_have(found: npt.NDArray[np.uint64], bit: int) -> bool:
    """Whether each of the flags has `bit`."""
    return bool((found >> bit & 1).all())


def none_has(found: npt.NDArray[np.uint64], bit: int) -> bool:
    """Whether none of the flags has `bit`."""
    return not (found >> bit & 1).any()


def unshared_kib(pid: int) -> int:
    """KiB that would be free if the process ended (USS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def wait_until(predicate: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """Wait for `predicate`, or fail with `what` after the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline_s:
            pytest.fail(f"not within {timeout_s} s: {what}")
        time.sleep(0.005)
