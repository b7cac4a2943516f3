"""Directories and processes of cgroups, the same for both versions: walk, kill, remove.

Nothing here knows of memory. A part of a VM may have cgroups of its own below it (a container's,
made by an engine): so every walk is recursive.
"""

import errno
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from host_agent.quota.base import Part
from host_agent.quota.errors import StillBusy

POLL_INTERVAL_S = 0.005


def subtree(directory: Path) -> Iterator[Path]:
    """`directory` and every cgroup below it, parents first; nothing if it is not there."""
    try:
        links = directory.stat().st_nlink
    except FileNotFoundError:
        return
    yield directory
    # A directory without directories in it has two links, on cgroups too: spares the listing of
    # its thirty files, 60 us of the 65 that a look would take.
    if links != 2:
        for child in child_directories(directory):
            yield from subtree(child)


def child_directories(directory: Path) -> tuple[Path, ...]:
    """Directories right below, sorted; none if it is not there."""
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return ()
    return tuple(directory / name for name in sorted(names))


def names_below(root: Path) -> tuple[str, ...]:
    """Directories below the root that have both parts of a VM, sorted."""
    return tuple(
        child.name
        for child in child_directories(root)
        if all((child / part).is_dir() for part in Part)
    )


def pids_below(directory: Path) -> tuple[int, ...]:
    """Pids in this cgroup and below it, ascending. 0 stands for a process we have no pid of."""
    pids: set[int] = set()
    for path in subtree(directory):
        # Gone between the walk and the read: then nobody is in it.
        with suppress(FileNotFoundError, OSError):
            pids.update(int(line) for line in (path / "cgroup.procs").read_text().split())
    return tuple(sorted(pids))


def kill_below(directory: Path) -> tuple[int, ...]:
    """SIGKILL once to every process below; gives the pids that were there.

    A pid may be another process's by the time of the signal: so each is pinned by a pidfd first,
    and only those that are still in the cgroup afterwards are killed.
    """
    with ExitStack() as pins:
        pidfds: dict[int, int] = {}
        for pid in pids_below(directory):
            if pid == 0 or pid == os.getpid():
                continue
            with suppress(ProcessLookupError):
                pidfds[pid] = os.pidfd_open(pid)
                pins.callback(os.close, pidfds[pid])
        present = pids_below(directory)
        for pid in present:
            if pid in pidfds:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfds[pid], signal.SIGKILL)
    return present


def remove_tree(directory: Path, deadline_s: float) -> None:
    """rmdir the cgroup and all below it, children first, until `deadline_s` (monotonic clock).

    The kernel says EBUSY while tasks are on their way out. Raises StillBusy.
    """

    def removed() -> bool:
        busy = False
        for path in reversed(list(subtree(directory))):
            try:
                path.rmdir()
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                    raise
                busy = True
        return not busy and not directory.exists()

    if not wait_until(removed, deadline_s):
        pids = ", ".join(map(str, pids_below(directory))) or "none left, but the kernel says busy"
        raise StillBusy(f"cannot remove {directory}: kill what is in it first (pids: {pids})")


def remove_empty(directories: Iterable[Path]) -> None:
    """rmdir those that have neither children nor processes, the last first."""
    for directory in reversed(tuple(directories)):
        with suppress(OSError):
            directory.rmdir()


def wait_until(predicate: Callable[[], bool], deadline_s: float) -> bool:
    """Ask every few milliseconds until it is true or `deadline_s` (monotonic clock) is past."""
    while not predicate():
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(POLL_INTERVAL_S)
    return True
