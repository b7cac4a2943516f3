"""Keeping the driver's own memory small: it is the guest's loss, in every one of many guests."""

import ctypes
import os
from typing import Final

_M_ARENA_MAX: Final = -8
"""mallopt(3): from malloc.h of glibc."""


def before_imports() -> None:
    """Call before numpy and trio are imported.

    One malloc arena: threads of the driver do next to nothing, and an arena each costs pages. No
    OpenBLAS threads: they would reserve buffers for linear algebra that nobody does.
    """
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    _libc_call("mallopt", _M_ARENA_MAX, 1)


def after_imports() -> None:
    """Give back what importing needed and left free: 4 MiB of 23 with numpy 2."""
    _libc_call("malloc_trim", 0)


def _libc_call(name: str, *arguments: int) -> None:
    # Another libc (musl) has neither; it also has no arenas.
    call = getattr(ctypes.CDLL(None), name, None)
    if call is not None:
        call(*arguments)
