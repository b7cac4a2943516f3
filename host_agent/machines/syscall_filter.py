"""A seccomp filter: processes of a mock VM can't make user namespaces.

Measured (6.18, cgroup v1): without it, root in a mock VM makes a user and a cgroup namespace, has
every capability in there, mounts the memory controller, finds its own cgroup writable (its files
belong to root, by number) and sets its own limit. Nothing in util-linux 2.38 can forbid this for
one process tree; the kernel's switches are for the whole machine.

A filter holds for a thread and whatever it starts, for ever. So it is installed in a thread that
ends after starting the one process that it is meant for: no code runs between fork and exec.

Sources: seccomp(2), Documentation/userspace-api/seccomp_filter.rst, linux/filter.h.
"""

import ctypes
import errno
import os
import platform
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

T = TypeVar("T")

CLONE_NEWUSER: Final = 0x10000000
PR_SET_SECCOMP: Final = 22
SECCOMP_MODE_FILTER: Final = 2

_ALLOW: Final = 0x7FFF0000
_FAIL: Final = 0x00050000  # plus the errno

# struct seccomp_data: nr, arch, instruction pointer, args
_AT_NUMBER, _AT_ARCHITECTURE, _AT_FLAGS = 0, 4, 16

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


@dataclass(frozen=True, slots=True)
class _Architecture:
    audit_number: int
    clone: int
    unshare: int
    clone3: int = 435


_ARCHITECTURES: Final = {
    "x86_64": _Architecture(0xC000003E, clone=56, unshare=272),
    "aarch64": _Architecture(0xC00000B7, clone=220, unshare=97),
}

_X32_NUMBERS: Final = 0x40000000
"""x86_64's second set of numbers for the same calls."""


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def call_without_user_namespaces(call: Callable[[], T]) -> T:
    """`call()`, in a thread of its own that can't make user namespaces, nor what it starts.

    Its result or its exception. Raises OSError if the kernel or the machine has no such filter.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _install()
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="memballoon-launch")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _install() -> None:
    """Put the filter on this thread. Needs CAP_SYS_ADMIN."""
    instructions = _instructions(platform.machine())
    program = _Program(len(instructions) // 8, instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"no seccomp filter: {os.strerror(code)}")


def _instructions(machine: str) -> bytes:
    """The filter as an array of struct sock_filter."""
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no seccomp filter for {machine}")
    arch = _ARCHITECTURES[machine]
    unknown = _FAIL | errno.ENOSYS
    # (code, jump if true, jump if false, operand); jumps are relative
    steps = (
        (_LOAD, 0, 0, _AT_ARCHITECTURE),
        (_EQUAL, 0, 8, arch.audit_number),  # other architectures' calls: refuse
        (_LOAD, 0, 0, _AT_NUMBER),
        (_AT_LEAST, 6, 0, _X32_NUMBERS),
        (_EQUAL, 5, 0, arch.clone3),  # its flags are out of reach; the C library falls back
        (_EQUAL, 1, 0, arch.unshare),
        (_EQUAL, 0, 4, arch.clone),
        (_LOAD, 0, 0, _AT_FLAGS),
        (_ANY_BIT, 0, 2, CLONE_NEWUSER),
        (_RETURN, 0, 0, _FAIL | errno.EPERM),
        (_RETURN, 0, 0, unknown),
        (_RETURN, 0, 0, _ALLOW),
    )
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
