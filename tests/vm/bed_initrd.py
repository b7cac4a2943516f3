"""The initial RAM disk: busybox, a few modules, the checkout, and the command to run.

A cpio archive in the "newc" format (kernel's Documentation/driver-api/early-userspace/
buffer-format.rst), made anew for each run: so nothing else has to carry the checkout in.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from bed_errors import BedError

MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4")
"""What the kernel needs for its disk and for the ports that the output leaves by."""

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


class Initrd:
    """Collects files; `bytes()` of it is the archive."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._directories: set[str] = set()

    def add(self, name: str, content: bytes, mode: int = 0o644, mtime_s: int = 0) -> None:
        self._add_parents(name)
        self._entry(name, content, stat.S_IFREG | mode, mtime_s)

    def add_link(self, name: str, target: str) -> None:
        self._add_parents(name)
        self._entry(name, os.fsencode(target), stat.S_IFLNK | 0o777, 0)

    def add_directory(self, name: str) -> None:
        if name not in self._directories:
            self._directories.add(name)
            self._add_parents(name)
            self._entry(name, b"", stat.S_IFDIR | 0o755, 0)

    def __bytes__(self) -> bytes:
        return b"".join([*self._parts, self._header("TRAILER!!!", 0, 0, 0)])

    def _add_parents(self, name: str) -> None:
        if parent := name.rpartition("/")[0]:
            self.add_directory(parent)

    def _entry(self, name: str, content: bytes, mode: int, mtime_s: int) -> None:
        self._parts += [self._header(name, mode, len(content), mtime_s), _padded(content)]

    def _header(self, name: str, mode: int, size_bytes: int, mtime_s: int) -> bytes:
        inode = len(self._parts) + 1
        encoded = os.fsencode(name) + b"\0"
        fields = (inode, mode, 0, 0, 1, mtime_s, size_bytes, 0, 0, 0, 0, len(encoded), 0)
        return _padded(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def module_files(modules: Path, names: tuple[str, ...] = MODULES) -> list[Path]:
    """Files of the named modules and of all that they depend on, in the order of loading.

    Read from each module's own `depends`: the kernel's package has no modules.dep, which is made
    where it is installed. Raises BedError.
    """
    built_in = {_name(line) for line in (modules / "modules.builtin").read_text().split()}
    files = {_name(str(path)): path for path in modules.rglob("*.ko")}

    def with_dependencies(name: str) -> Iterator[Path]:
        if name in built_in:
            return
        if name not in files:
            raise BedError(f"{modules} has no module {name}: is its kernel made for a VM?")
        found = _DEPENDS.search(files[name].read_bytes())
        for dependency in found.group(1).decode().split(",") if found else ():
            if dependency:
                yield from with_dependencies(dependency)
        yield files[name]

    return list(dict.fromkeys(path for name in names for path in with_dependencies(name)))


def _name(path: str) -> str:
    return Path(path).name.removesuffix(".ko").replace("-", "_")
