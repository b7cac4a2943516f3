"""Keeping the driver's own memory small: it is the guest's loss, in every one of many guests.

`before_imports` and `after_imports` stand around the imports of trio and numpy. Measured with
numpy 2 and trio 0.35: 23 MiB of the driver's own memory without them, 16 MiB with them.
"""

import ctypes
import importlib
import os
import sys
from types import ModuleType
from typing import Any, Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
"""mallopt(3): from malloc.h of glibc."""

_KEPT_BYTES: Final = 64 * 1024
"""Free memory at the heap's end that is kept, and the size from which blocks are mapped by
themselves. Left alone, glibc raises both to what was ever freed at once: a scan of the frame states
would cost the driver its size for ever."""

_UNUSED: Final = (
    "hashlib",
    "hmac",
    "idna",
    "ipaddress",
    "locale",
    "pickle",
    "shutil",
    "ssl",
    "tempfile",
    "tokenize",
)
"""Modules that trio, numpy and the standard library import for what a driver never does (TLS, host
names, temporary files, pickling, reading source): 4 MiB, most of it OpenSSL's. They are loaded when
somebody does touch one after all."""


class _Deferred(ModuleType):
    """Stands for a module until an attribute of it is wanted.

    importlib's LazyLoader won't do: it loads the module when it is imported a second time.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # the import system itself, looking at what this is
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def before_imports() -> None:
    """Call before trio and numpy are imported.

    One malloc arena: threads of the driver do next to nothing, and an arena each costs pages. No
    OpenBLAS threads: they would reserve buffers for linear algebra that nobody does.
    """
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    _libc_call("mallopt", _M_ARENA_MAX, 1)
    _libc_call("mallopt", _M_TRIM_THRESHOLD, _KEPT_BYTES)
    _libc_call("mallopt", _M_MMAP_THRESHOLD, _KEPT_BYTES)
    for name in _UNUSED:
        sys.modules.setdefault(name, _Deferred(name))


def after_imports() -> None:
    """Give back what importing needed and left free: 4 MiB."""
    _libc_call("malloc_trim", 0)


def _libc_call(name: str, *arguments: int) -> None:
    # Another libc (musl) has neither; it also has no arenas.
    call = getattr(ctypes.CDLL(None), name, None)
    if call is not None:
        call(*arguments)
