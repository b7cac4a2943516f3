"""One control file of a cgroup, kept open: 1 us a write instead of 6.

Each file has a lock of its own, for two reasons. The kernel takes one mutex for each open file, so
a write that blocks in reclaim would make every other use of that descriptor wait: whatever may
block gets a ControlFile of its own. And a descriptor that is closed while another thread is about
to use its number would send a limit into somebody else's socket: `close` waits for the call.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from host_agent.quota.base import UNLIMITED_BYTES
from host_agent.quota.errors import VmGone

READ_BYTES = 64 * 1024
"""More than any control file that is read here has."""


class ControlFile:
    """An open control file. Raises VmGone when the cgroup is gone, OSError as the kernel says."""

    def __init__(self, path: Path, *, writable: bool = False, waits: bool = True) -> None:
        """`waits=False` asks for writes that set a limit without waiting for reclaim.

        Version 2 knows that from Linux 6.16 on; older kernels may reclaim during the write.
        """
        self.path = path
        self._lock = Lock()
        self._flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        if not waits:
            self._flags |= os.O_NONBLOCK
        self._fd = self._opened(path)

    def write(self, value: int | str) -> None:
        """Write one value. The newline makes it whole on plain files too, which tests use."""
        with self._lock:
            self._check_open()
            try:
                os.pwrite(self._fd, f"{value}\n".encode(), 0)
            except OSError as error:
                raise self._translated(error) from error

    def read(self) -> str:
        """The whole text."""
        with self._lock:
            self._check_open()
            try:
                return os.pread(self._fd, READ_BYTES, 0).decode()
            except OSError as error:
                raise self._translated(error) from error

    def read_bytes_count(self) -> int:
        """The one number that the file holds, "max" as UNLIMITED_BYTES."""
        return parse_limit(self.read())

    def fileno(self) -> int:
        """The descriptor, for the kernel's event registration."""
        self._check_open()
        return self._fd

    def move_to(self, path: Path) -> None:
        """Go on with another file, after a call that is under way; the descriptor's number stays.

        Raises VmGone and OSError, and is what it was then; closed, it stays so.
        """
        with self._lock:
            self._check_open()
            opened = self._opened(path)
            try:
                os.dup2(opened, self._fd, inheritable=False)
            finally:
                os.close(opened)
            self.path = path

    def close(self) -> None:
        """Close after a call that is under way; twice is no error."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _opened(self, path: Path) -> int:
        try:
            return os.open(path, self._flags)
        except FileNotFoundError as missing:
            raise VmGone(f"{path} is not there: was the VM removed by somebody else?") from missing

    def _check_open(self) -> None:
        if self._fd < 0:
            raise VmGone(f"{self.path} was closed: the VM was removed or let go")

    def _translated(self, error: OSError) -> Exception:
        if error.errno == errno.ENODEV:
            return VmGone(f"{self.path} is gone: was the VM removed by somebody else?")
        return error


FileOpener = Callable[..., ControlFile]
"""`ControlFile` itself, or what a test puts in its place to see the order of writes."""


def parse_limit(text: str) -> int:
    """Bytes in a limit or usage file; "max" is UNLIMITED_BYTES. Raises ValueError."""
    first = text.split("\n", 1)[0].strip()
    return UNLIMITED_BYTES if first == "max" else min(int(first), UNLIMITED_BYTES)


def parse_counters(text: str) -> dict[str, int]:
    """A flat keyed file (memory.stat, memory.events, memory.oom_control) as a dictionary."""
    counters = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if value.isdigit():
            counters[key] = int(value)
    return counters
