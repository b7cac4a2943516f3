"""Which of the host's directories a mock VM must see besides the root file system."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import protocol
from host_agent.machines.init_script import FileTree, is_own_tree

SKIPPED_TYPES: Final = frozenset(
    {
        *("autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts"),
        *("devtmpfs", "efivarfs", "fusectl", "hugetlbfs", "mqueue", "nsfs", "overlay", "proc"),
        *("pstore", "ramfs", "rpc_pipefs", "securityfs", "squashfs", "sysfs", "tmpfs", "tracefs"),
    }
)
"""File systems of the kernel's or of containers' making: nothing there is for a mock VM."""


def host_tree(mountinfo: str, hidden: Iterable[Path], shown: Iterable[Path]) -> FileTree:
    """The tree that shows every real file system of the host, and `shown`, but not `hidden`.

    `mountinfo` is the text of /proc/self/mountinfo (proc(5)).
    """
    hide = tuple(dict.fromkeys(hidden))
    mounts = {
        path
        for path, fs_type in _mounts(mountinfo)
        if fs_type not in SKIPPED_TYPES and not is_own_tree(path) and path != Path("/")
    }
    asked = {path for path in shown if is_own_tree(path)}
    visible = {
        path for path in mounts if path.is_dir() and not any(map(path.is_relative_to, hide))
    } | asked
    return FileTree(read_only=tuple(sorted(visible)), hidden=hide)


def interpreter_dirs() -> tuple[Path, ...]:
    """What this Python needs to run the driver: it may live in a place that the VM does not see."""
    project = Path(protocol.__file__).resolve().parent.parent
    executable = Path(sys.executable)
    found = {Path(sys.prefix), Path(sys.base_prefix), project, executable.parent}
    found |= {path.resolve() for path in found} | {executable.resolve().parent}
    # What lies below another one comes with it.
    return tuple(
        sorted(path for path in found if not any(other in path.parents for other in found))
    )


def _mounts(mountinfo: str) -> list[tuple[Path, str]]:
    """Each mount point with its file system's type."""
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode("ascii", "surrogateescape").decode("unicode_escape")
        found.append(
            (Path(point.encode("latin-1").decode("utf-8", "surrogateescape")), after.split()[0])
        )
    return found
