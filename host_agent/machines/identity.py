"""Processes that need not be our children: found by pid and start time, held by a pidfd.

A pid alone may be another process's by the time it is used. A pidfd never is: it is opened once,
the start time tells whether it is the right process, and from then on everything goes through it.
"""

import errno
import os
import signal
from pathlib import Path
from typing import Self

import trio

BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")


class ProcessHandle:
    """One process, for sure. `close` it when it is not needed any more."""

    def __init__(self, pid: int, start_ticks: int, pidfd: int) -> None:
        """Take over an open pidfd. Use `of` or `find`."""
        self.pid = pid
        self.start_ticks = start_ticks
        self._pidfd = pidfd

    @classmethod
    def of(cls, pid: int) -> Self:
        """The process that has `pid` now. Raises ProcessLookupError if there is none.

        Only for a pid that can't have changed hands: an unreaped child, or one that is told by the
        process itself.
        """
        pidfd = os.pidfd_open(pid)
        try:
            return cls(pid, start_ticks_of(pid), pidfd)
        except BaseException:
            os.close(pidfd)
            raise

    @classmethod
    def find(cls, pid: int, start_ticks: int) -> Self | None:
        """The process that had `pid` and started at `start_ticks`; None if it has ended.

        None as well for a number that no process can have: a state file may hold any.
        """
        try:
            handle = cls.of(pid)
        except ProcessLookupError:
            return None
        except (OSError, OverflowError) as error:
            # EINVAL: not above 0, or a thread that leads no process.
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            return None
        if handle.start_ticks != start_ticks or not handle.is_alive():
            handle.close()
            return None
        return handle

    def fileno(self) -> int:
        """The pidfd, which stays this handle's."""
        return self._pidfd

    def is_alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        try:
            signal.pidfd_send_signal(self._pidfd, 0)
        except ProcessLookupError:
            return False
        return not _is_zombie(self.pid)

    def send(self, which: signal.Signals) -> None:
        """Send a signal; to a process that has ended it is no error."""
        try:
            signal.pidfd_send_signal(self._pidfd, which)
        except ProcessLookupError:
            return

    async def wait_ended(self) -> None:
        """Wait until it has ended (it may be a zombie still). Any number of tasks may wait."""
        # trio lets one task wait for a descriptor: each has a copy of its own.
        copy = os.dup(self._pidfd)
        try:
            await trio.lowlevel.wait_readable(copy)
        finally:
            os.close(copy)

    def close(self) -> None:
        """Let go of the process, which runs on. Nothing else may be called afterwards."""
        os.close(self._pidfd)


def start_ticks_of(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc(5), field 22 of stat).

    Raises ProcessLookupError if there is none of this pid.
    """
    return int(_stat_fields(pid)[19])


def parent_of(pid: int) -> int:
    """The pid of its parent, 0 if that is not to be seen from here. Raises ProcessLookupError."""
    return int(_stat_fields(pid)[1])


def pid_inside(pid: int) -> int | None:
    """The pid that a process has in its innermost namespace; None if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return None


def boot_id() -> str:
    """Which boot of the machine this is: pids and start times of another one mean nothing."""
    return BOOT_ID_PATH.read_text(encoding="ascii").strip()


def _is_zombie(pid: int) -> bool:
    try:
        return _stat_fields(pid)[0] in ("Z", "X")
    except ProcessLookupError:
        return True


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (the state) on."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    # The name stands in brackets and may contain anything, brackets included.
    return text.rpartition(")")[2].split()
