"""One inotify watch on one file, through libc: for control files that the kernel notifies about.

poll(2) can't be used on these from an event loop: they are always readable, and say with POLLPRI
that they changed; an inotify descriptor becomes readable then and only then.
"""

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

IN_MODIFY: Final = 0x2
_DRAIN_BYTES: Final = 64 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


def watch_file(path: Path) -> int:
    """A non-blocking descriptor that is readable after `path` was modified. Raises OSError."""
    descriptor = int(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "inotify_init1")
    try:
        watch_also(descriptor, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def watch_also(descriptor: int, path: Path) -> None:
    """Have a descriptor of `watch_file` tell of another file as well. Raises OSError."""
    if _libc.inotify_add_watch(descriptor, os.fsencode(path), ctypes.c_uint32(IN_MODIFY)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))


def drain(descriptor: int) -> None:
    """Make it unreadable until the next change."""
    with suppress(BlockingIOError):
        while os.read(descriptor, _DRAIN_BYTES):
            pass
