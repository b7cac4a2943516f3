"""How an engine is told in which cgroup to put a container, for both of its cgroup drivers.

With the cgroupfs driver a parent is a path in the hierarchy, /<root>/<vm>/workload, and the
container's cgroup is a directory of its id in there. With the systemd driver a parent has to be a
slice, and slices are nested by the dashes in their names: a-b.slice is in a.slice. So a dash in a
name has to be escaped (systemd.unit(5)), or it would be a level of its own.

Pure, but for `hierarchy_of`, which asks the kernel what is a mount point.
"""

import os
from pathlib import Path
from typing import Final

CGROUPFS: Final = "cgroupfs"
SYSTEMD: Final = "systemd"


def hierarchy_of(cgroup: Path) -> Path:
    """The mount point of the hierarchy that a cgroup's directory is in."""
    while not os.path.ismount(cgroup) and cgroup != cgroup.parent:
        cgroup = cgroup.parent
    return cgroup


def parent_path(workload: Path, hierarchy: Path) -> str:
    """The parent of a container, for the cgroupfs driver: `workload` as a path from the top."""
    return f"/{workload.relative_to(hierarchy)}"


def slice_name(*parts: str) -> str:
    """The slice that is nested as `parts` are, from the outermost: for the systemd driver."""
    if not parts or not all(parts):
        raise ValueError(f"a slice has a name at every level: {parts!r}")
    return "-".join(map(_escaped, parts)) + ".slice"


def slice_path(*parts: str) -> Path:
    """Where systemd makes the cgroup of that slice, below a hierarchy's top."""
    return Path(*(slice_name(*parts[: depth + 1]) for depth in range(len(parts))))


def _escaped(part: str) -> str:
    """A name as one level of a unit's name (systemd.unit(5), "String escaping")."""
    text = "".join(
        char if char.isascii() and (char.isalnum() or char in "_:.") else _as_hex(char)
        for char in part
    )
    return f"\\x2e{text[1:]}" if text.startswith(".") else text


def _as_hex(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in char.encode())
