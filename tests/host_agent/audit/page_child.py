"""A child process that plays the guest: it runs the statements that a test sends it.

Statements see `libc`, `os`, `map_arena(pages, huge)`, `lock`, `populate`, `touch`, `drop`.
Each is answered by a line: "ok " and the repr of `result`, or "error ..." .
"""

import ctypes
import mmap
import os
import sys

PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 1, *[ctypes.c_int] * 3, ctypes.c_long]


def check(status):
    if status:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def advise(address, pages, advice):
    check(libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(pages * PAGE), advice))


def map_pages(pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, fd=-1, at=None):
    if at is not None:
        flags |= 0x10  # MAP_FIXED
    address = libc.mmap(at, pages * PAGE, 3, flags, fd, 0)
    if address == 2**64 - 1:
        raise OSError(ctypes.get_errno(), "mmap")
    return address


def map_arena(pages, huge=False):
    address = -(-map_pages(pages + 512) // (512 * PAGE)) * (512 * PAGE)
    advise(address, pages, 14 if huge else 15)
    return address


def lock(address, pages):
    check(libc.mlock2(ctypes.c_void_p(address), ctypes.c_size_t(pages * PAGE), 1))


def populate(address, pages):
    advise(address, pages, 23)


def drop(address, pages):
    advise(address, pages, 24)


def touch(address, pages):
    for page in range(pages):
        ctypes.memset(address + page * PAGE, 1, 1)


def join(procs_path):
    with open(procs_path, "w") as procs:
        procs.write("0")


def main():
    names = dict(globals())
    print("ok None", flush=True)
    for line in sys.stdin:
        names["result"] = None
        try:
            exec(eval(line), names)
        except BaseException as error:
            print(f"error {error!r}", flush=True)
        else:
            print(f"ok {names['result']!r}", flush=True)


if __name__ == "__main__":
    main()
